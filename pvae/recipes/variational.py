"""The variational autoencoder with parts named by arguments, which the other recipes build on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pvae import guides, likelihoods, networks, priors
from pvae.errors import ArgumentError, as_shape, check_int
from pvae.penalties import Penalty
from pvae.vae import VAE

__all__ = ["NETWORKS", "Factory", "vae"]

NETWORKS = ("mlp", "conv", "resnet")
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
    decoder_hidden: Sequence[int] | None = None,
    activation: Factory = nn.ReLU,
    code_activation: Factory | None = None,
    num_classes: int = 0,
    in_scale: float = 1.0,
    unit_norm: bool = False,
    corruption: Callable[[Tensor], Tensor] | None = None,
    penalties: Penalty | Sequence[Penalty] = (),
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
        hidden: Widths of the encoder's layers, or channels.
        decoder_hidden: The decoder's; ``()`` for a linear map from latent to data, whatever the
            network, None for the encoder's in reverse.
        activation: Class of the activation.
        code_activation: Class of an activation at the encoder's end, for a point mass: with
            ``nn.ReLU`` entries of the code can be exactly 0.
        num_classes: Classes of the labels that encoder and decoder get, too; 0 for no labels.
        in_scale: Factor on what the encoder sees, such as ``1 / 16`` for counts up to 16.
        unit_norm: Whether the columns of the decoder's weights have norm 1, see
            `pvae.networks.unit_norm`.
        corruption: What the guide sees of x in training, see `pvae.corruptions`.
        penalties: What training subtracts from the objective, see `pvae.penalties`.

    Example:
        >>> vae((1, 28, 28), 20, network="conv", hidden=(8, 16)).sample(3).shape
        torch.Size([3, 1, 28, 28])
    """
    shape = as_shape("event_shape", event_shape)
    check_int("latent_dim", latent_dim)
    if network not in NETWORKS:
        raise ArgumentError("network", "'mlp', 'conv' or 'resnet'", repr(network))
    encoder = _encoder(
        network,
        shape,
        latent_dim,
        hidden,
        activation,
        code_activation,
        context_dim=num_classes,
        in_scale=in_scale,
    )
    widths = tuple(hidden)[::-1] if decoder_hidden is None else tuple(decoder_hidden)
    decoder = _decoder(network, shape, latent_dim, widths, activation, num_classes)
    if unit_norm:
        decoder = _then_unit_norm(decoder)
    pair = VAE(
        prior=prior(latent_dim),
        likelihood=likelihood(decoder, shape),
        guide=guide(encoder, latent_dim),
        corruption=corruption,
        penalties=penalties,
    )
    if code_activation is not None and not pair.guide.posterior.is_point:
        raise ArgumentError(
            "code_activation",
            "a point mass, whose code is the encoder's output",
            f"{type(pair.guide.posterior).__name__}, whose parameters it would all act on",
            ["guide=guides.Point"],
        )
    return pair


def _then_unit_norm(build: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda p: networks.unit_norm(build(p))


def _encoder(
    network: str,
    shape: tuple[int, ...],
    latent_dim: int,
    hidden: Sequence[int],
    activation: Factory,
    code_activation: Factory | None,
    **inputs: Any,
) -> Callable[[int], nn.Module]:
    """The encoder, as a function of the number of parameters per value."""
    if network == "mlp":
        return lambda p: networks.MLP(
            shape, p * latent_dim, hidden, activation, out_activation=code_activation, **inputs
        )
    return lambda p: networks.ConvEncoder(
        shape,
        p * latent_dim,
        hidden,
        activation=activation,
        out_activation=code_activation,
        residual=network == "resnet",
        **inputs,
    )


def _decoder(
    network: str,
    shape: tuple[int, ...],
    latent_dim: int,
    hidden: Sequence[int],
    activation: Factory,
    context_dim: int,
) -> Callable[[int], nn.Module]:
    """The decoder, likewise; without hidden layers it is a linear map, whatever the network."""
    if network == "mlp" or not hidden:
        size = math.prod(shape)
        return lambda p: networks.MLP(latent_dim, p * size, hidden, activation, context_dim)
    return lambda p: networks.ConvDecoder(
        latent_dim,
        (p * shape[0], *shape[1:]),
        hidden,
        activation=activation,
        residual=network == "resnet",
        context_dim=context_dim,
    )
