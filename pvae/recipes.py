"""Named variants: functions that give a pair, ready to fit.

``RECIPES`` maps a name to the function and to the objective that goes with the pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyro.infer import ELBO as PyroELBO
from torch import nn

from pvae import guides, likelihoods, networks, priors
from pvae.errors import ArgumentError, as_shape, check_int
from pvae.objectives import ELBO
from pvae.pair import VAE

__all__ = ["RECIPES", "Recipe", "ae", "vae"]

Factory = Callable[..., Any]


def vae(
    event_shape: int | Sequence[int],
    latent_dim: int,
    *,
    prior: Factory = priors.StandardNormal,
    likelihood: Factory = likelihoods.Bernoulli,
    guide: Factory = guides.MeanField,
    network: str = "mlp",
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[], nn.Module] = nn.ReLU,
    num_classes: int = 0,
    in_scale: float = 1.0,
) -> VAE:
    r"""A variational autoencoder.

    .. math::
        L(\theta, \phi; x) = E_{q_\theta(z | x)}[\log p_\phi(x | z)] - KL(q_\theta(z | x) \| p(z))

    ==================  =====================================================  ================
    symbol              meaning                                                argument
    ==================  =====================================================  ================
    :math:`p(z)`        prior                                                  ``prior``
    :math:`p_\phi`      likelihood, with the decoder d inside                  ``likelihood``
    :math:`q_\theta`    guide, with the encoder e inside                       ``guide``
    :math:`N_x`         size of x                                              ``event_shape``
    :math:`N_z`         size of z                                              ``latent_dim``
    ==================  =====================================================  ================

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), https://arxiv.org/abs/1312.6114

    Arguments:
        event_shape: Shape of one datum.
        latent_dim: Size of the latent.
        prior: From ``latent_dim`` to a prior: a class of `pvae.priors`, or a function.
        likelihood: From (network, event_shape) to a likelihood: a class of `pvae.likelihoods`, or
            ``functools.partial(likelihoods.Binomial, total_count=16)``.
        guide: From (network, latent_dim) to a guide family: a class of `pvae.guides`.
        network: ``"mlp"``, ``"conv"`` or ``"resnet"``; the last two for images.
        hidden: Widths of the encoder's layers, or channels; the decoder has them in reverse.
        activation: Class of the activation.
        num_classes: Classes of the labels that encoder and decoder get, too; 0 for no labels.
        in_scale: Factor on what the encoder sees, such as ``1 / 16`` for counts up to 16.

    Example:
        >>> vae((1, 28, 28), 20, network="conv", hidden=(8, 16)).sample(3).shape
        torch.Size([3, 1, 28, 28])
    """
    shape = as_shape("event_shape", event_shape)
    check_int("latent_dim", latent_dim)
    encoder, decoder = _networks(
        network, shape, latent_dim, hidden, activation, num_classes, in_scale
    )
    return VAE(
        prior=prior(latent_dim),
        likelihood=likelihood(decoder, shape),
        guide=guide(encoder, latent_dim),
    )


def ae(event_shape: int | Sequence[int], latent_dim: int, **options: Any) -> VAE:
    r"""A plain autoencoder: the same pair with a flat prior and a point-mass guide.

    .. math::
        \hat x = d_\phi(e_\theta(x)), \qquad L = \|x - \hat x\|^2 = -\log p(x | e(x)) + c

    The likelihood is Gaussian with :math:`\sigma^2 = 1/2`, for which minus the log density is the
    squared error, up to :math:`c = -\tfrac D2 \log \pi`; it can be swapped, but not for one whose
    scale adapts. There is no evidence lower bound: what is maximised is log p(x | e(x)).

    ==================  =====================================================  ================
    symbol              meaning                                                argument
    ==================  =====================================================  ================
    :math:`e_\theta`    encoder                                                ``network``
    :math:`d_\phi`      decoder                                                ``network``
    :math:`N_z`         size of the code                                       ``latent_dim``
    ==================  =====================================================  ================

    References:
        From Variational to Deterministic Autoencoders (Ghosh et al., 2020),
        https://arxiv.org/abs/1903.12436

    Arguments:
        event_shape: Shape of one datum.
        latent_dim: Size of the code.
        options: As in `vae`.

    Example:
        >>> autoencoder = ae(64, 2)
        >>> autoencoder.reconstruct(torch.zeros(5, 64)).shape
        torch.Size([5, 64])
    """
    defaults: dict[str, Any] = {
        "prior": priors.Flat,
        "likelihood": _squared_error,
        "guide": guides.Point,
    }
    return vae(event_shape, latent_dim, **{**defaults, **options})


def _squared_error(network: Any, event_shape: Any) -> likelihoods.Gaussian:
    return likelihoods.Gaussian(network, event_shape, sigma=math.sqrt(0.5))


def _networks(
    network: str,
    shape: tuple[int, ...],
    latent_dim: int,
    hidden: Sequence[int],
    activation: Callable[[], nn.Module],
    num_classes: int,
    in_scale: float,
) -> tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]:
    """Encoder and decoder, as functions of the number of parameters per value."""
    size = math.prod(shape)
    if network == "mlp":
        return (
            lambda p: networks.MLP(
                shape, p * latent_dim, hidden, activation, num_classes, in_scale
            ),
            lambda p: networks.MLP(latent_dim, p * size, hidden[::-1], activation, num_classes),
        )
    if network in ("conv", "resnet"):
        options: dict[str, Any] = {"residual": network == "resnet", "context_dim": num_classes}
        return (
            lambda p: networks.ConvEncoder(
                shape,
                p * latent_dim,
                hidden,
                activation=activation,
                in_scale=in_scale,
                **options,
            ),
            lambda p: networks.ConvDecoder(
                latent_dim,
                (p * shape[0], *shape[1:]),
                hidden[::-1],
                activation=activation,
                **options,
            ),
        )
    raise ArgumentError("network", "'mlp', 'conv' or 'resnet'", repr(network))


@dataclass(frozen=True)
class Recipe:
    """A named variant: what builds the pair, and the objective that goes with it."""

    build: Callable[..., VAE]
    objective: Callable[..., PyroELBO] = ELBO


RECIPES: dict[str, Recipe] = {"vae": Recipe(vae), "ae": Recipe(ae)}
