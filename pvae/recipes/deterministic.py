"""The deterministic autoencoders: the same pair with a point-mass guide."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pvae import guides, likelihoods, priors
from pvae.corruptions import Noise
from pvae.errors import ArgumentError, check_int, check_number
from pvae.penalties import MMD, Activations, Commitment, Contractive, Penalty, WeightDecay
from pvae.recipes.variational import Factory, vae
from pvae.vae import VAE

__all__ = [
    "ae",
    "contractive_ae",
    "denoising_ae",
    "rae",
    "sparse_activations_ae",
    "sparse_ae",
    "vq_vae",
    "wae",
]


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


def sparse_ae(
    event_shape: int | Sequence[int],
    latent_dim: int,
    *,
    l1: float | None = None,
    prior: Factory | None = None,
    hidden: Sequence[int] = (256, 256),
    decoder_hidden: Sequence[int] | None = (),
    code_activation: Factory | None = nn.ReLU,
    unit_norm: bool = True,
    **options: Any,
) -> VAE:
    r"""A sparse autoencoder: an L1 penalty on the code, which is a Laplace prior.

    By default the decoder is a dictionary: data are sums of a few of its columns, one an entry of
    the code, and entries that aren't used are exactly 0, as the encoder ends in a ReLU.

    .. math::
        L = \|x - d_\phi(e_\theta(x))\|^2 + \lambda \|e_\theta(x)\|_1
          = -\log p(x | z) - \log p(z) + c, \qquad z = e_\theta(x)

    The constant has the prior's share :math:`N_z \log(\lambda / 2)`. The decoder's columns have
    norm 1: otherwise a code that shrinks, and a decoder that grows, lower the penalty and change
    nothing. That fixes the gain of a linear decoder, and only bounds that of one with hidden
    layers.

    ===================  ====================================================  ================
    symbol               meaning                                               argument
    ===================  ====================================================  ================
    :math:`\lambda`      rate of the Laplace prior                             ``l1``
    :math:`p(z)`         another sparse prior in its place                     ``prior``
    :math:`N_z`          size of the code, often above that of x               ``latent_dim``
    ===================  ====================================================  ================

    References:
        Emergence of simple-cell receptive field properties by learning a sparse code for natural
        images (Olshausen & Field, 1996), https://doi.org/10.1038/381607a0

    Arguments:
        event_shape: Shape of one datum.
        latent_dim: Size of the code.
        l1: :math:`\lambda`; None for 0.1.
        prior: From ``latent_dim`` to another sparse prior, such as `pvae.priors.StudentT`.
        hidden: Widths of the encoder's layers, or channels.
        decoder_hidden: The decoder's, if it isn't to be linear; None for the encoder's in reverse.
        code_activation: Class of the activation at the encoder's end; None for none.
        unit_norm: Whether the decoder's columns have norm 1.
        options: As in `ae`.

    Example:
        >>> sparse = sparse_ae(64, 100, l1=0.3)
        >>> type(sparse.model.prior).__name__, bool((sparse.encode(torch.zeros(5, 64)) == 0).any())
        ('Laplace', True)
    """
    if prior is not None and l1 is not None:
        raise ArgumentError("sparse_ae", "either l1, for a Laplace prior, or another prior", "both")
    if prior is None:
        rate = check_number("l1", 0.1 if l1 is None else l1, above=0)
        prior = functools.partial(priors.Laplace, rate=rate)
    return ae(
        event_shape,
        latent_dim,
        prior=prior,
        hidden=hidden,
        decoder_hidden=decoder_hidden,
        code_activation=code_activation,
        unit_norm=unit_norm,
        **options,
    )


def sparse_activations_ae(
    event_shape: int | Sequence[int],
    latent_dim: int,
    *,
    l1: float = 0.01,
    code: bool | None = None,
    output: bool = False,
    code_activation: Factory | None = None,
    unit_norm: bool = True,
    penalties: Penalty | Sequence[Penalty] = (),
    **options: Any,
) -> VAE:
    r"""A sparse autoencoder: an L1 penalty on all activations of encoder and decoder.

    .. math::
        L = \|x - \hat x\|^2
          + \lambda \big(\sum_j \|a_e^{[j]}\|_1 + \sum_j \|a_d^{[j]}\|_1\big)

    ===================  ====================================================  ====================
    symbol               meaning                                               argument
    ===================  ====================================================  ====================
    :math:`\lambda`      weight                                                ``l1``
    :math:`a^{[j]}`      outputs of activation layers, and which others        ``code``, ``output``
    ===================  ====================================================  ====================

    References:
        Sparse autoencoder (Ng, 2011), lecture notes of CS294A,
        https://web.stanford.edu/class/cs294a/sparseAutoencoder_2011new.pdf

    Arguments:
        event_shape: Shape of one datum.
        latent_dim: Size of the code.
        l1: :math:`\lambda`.
        code: Whether the code counts; None for yes, unless it is counted as the output of a
            ``code_activation``.
        output: Whether the output counts.
        code_activation: Class of an activation at the encoder's end.
        unit_norm: Whether the decoder's columns have norm 1.
        penalties: Further ones.
        options: As in `ae`.

    Example:
        >>> len(sparse_activations_ae(64, 100).model.penalties)
        1
    """
    code = code_activation is None if code is None else code
    own = Activations(l1, code=code, output=output)
    return ae(
        event_shape,
        latent_dim,
        unit_norm=unit_norm,
        code_activation=code_activation,
        penalties=_joined(own, penalties),
        **options,
    )


def contractive_ae(
    event_shape: int | Sequence[int],
    latent_dim: int,
    *,
    contractive: float = 0.1,
    squared: bool = False,
    num_probes: int | None = None,
    weight_decay: float = 1e-3,
    penalties: Penalty | Sequence[Penalty] = (),
    **options: Any,
) -> VAE:
    r"""A contractive autoencoder: codes that change little with the data.

    .. math::
        L = \|x - \hat x\|^2 + \lambda \|\partial e_\theta(x) / \partial x\|_F
          + \gamma \|W_\phi\|^2

    The weight decay on the decoder is there because a code that shrinks, and a decoder that grows,
    lower the penalty and change nothing.

    ===================  ====================================================  ================
    symbol               meaning                                               argument
    ===================  ====================================================  ================
    :math:`\lambda`      weight                                                ``contractive``
    :math:`\|.\|_F^2`    the squared norm, as in the paper                     ``squared``
    :math:`\gamma`       weight decay of the decoder                           ``weight_decay``
    ===================  ====================================================  ================

    References:
        Contractive Auto-Encoders (Rifai et al., 2011),
        https://icml.cc/2011/papers/455_icmlpaper.pdf

    Arguments:
        event_shape: Shape of one datum.
        latent_dim: Size of the code.
        contractive: :math:`\lambda`.
        squared: Whether the norm is squared.
        num_probes: Random directions for an estimate, for wide codes; None for the exact norm.
        weight_decay: :math:`\gamma`.
        penalties: Further ones.
        options: As in `ae`.

    Example:
        >>> [type(p).__name__ for p in contractive_ae(64, 8).guide.penalties]
        ['Contractive']
    """
    own = [Contractive(contractive, squared=squared, num_probes=num_probes)]
    decay = [WeightDecay(weight_decay, ("model",))] if weight_decay else []
    return ae(event_shape, latent_dim, penalties=_joined(*own, *decay, penalties), **options)


def denoising_ae(
    event_shape: int | Sequence[int],
    latent_dim: int,
    *,
    corruption: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> VAE:
    r"""A denoising autoencoder: it sees corrupted data and reconstructs the clean ones.

    .. math::
        L = \|x - d_\phi(e_\theta(\tilde x))\|^2, \qquad \tilde x = x + n \ \text{or}\ x \cdot m

    ===================  ====================================================  ================
    symbol               meaning                                               argument
    ===================  ====================================================  ================
    :math:`\tilde x`     what the encoder sees in training, drawn afresh       ``corruption``
    ===================  ====================================================  ================

    References:
        Stacked Denoising Autoencoders (Vincent et al., 2010),
        https://www.jmlr.org/papers/v11/vincent10a.html

    Arguments:
        event_shape: Shape of one datum.
        latent_dim: Size of the code.
        corruption: See `pvae.corruptions`; None for ``Noise(0.3)``.
        options: As in `ae`.

    Example:
        >>> denoising_ae(64, 8).guide.corruption
        Noise(sigma=0.3)
    """
    return ae(event_shape, latent_dim, corruption=corruption or Noise(0.3), **options)


def rae(
    event_shape: int | Sequence[int],
    latent_dim: int,
    *,
    weight_decay: float = 1e-3,
    penalties: Penalty | Sequence[Penalty] = (),
    **options: Any,
) -> VAE:
    r"""A regularised autoencoder, RAE-L2, to be sampled with an ex-post density.

    .. math::
        L = \|x - \hat x\|^2 + \tfrac12 \|z\|^2 + \gamma \|W_\phi\|^2

    ===================  ====================================================  ================
    symbol               meaning                                               argument
    ===================  ====================================================  ================
    :math:`\|z\|^2/2`    a standard normal prior under a point mass            ``prior``
    :math:`\gamma`       weight decay of the decoder                           ``weight_decay``
    ===================  ====================================================  ================

    References:
        From Variational to Deterministic Autoencoders (Ghosh et al., 2020),
        https://arxiv.org/abs/1903.12436

    Arguments:
        event_shape: Shape of one datum.
        latent_dim: Size of the code.
        weight_decay: :math:`\gamma`.
        penalties: Further ones.
        options: As in `ae`.

    Example:
        >>> rae(64, 8).reconstruct(torch.zeros(5, 64)).shape
        torch.Size([5, 64])
    """
    own = WeightDecay(weight_decay, ("model",))
    options = {"prior": priors.StandardNormal, **options}
    return ae(event_shape, latent_dim, penalties=_joined(own, penalties), **options)


def wae(
    event_shape: int | Sequence[int],
    latent_dim: int,
    *,
    mmd: float = 10.0,
    penalties: Penalty | Sequence[Penalty] = (),
    **options: Any,
) -> VAE:
    r"""A Wasserstein autoencoder, WAE-MMD: all codes together are to look like N(0, I).

    .. math::
        L = \|x - \hat x\|^2 + \lambda\, \mathrm{MMD}^2(q(z), N(0, I))

    To sample it, put the target in the flat prior's place: `pvae.latent.with_prior`.

    ===================  ====================================================  ================
    symbol               meaning                                               argument
    ===================  ====================================================  ================
    :math:`\lambda`      weight, in nats a datum                               ``mmd``
    ===================  ====================================================  ================

    References:
        Wasserstein Auto-Encoders (Tolstikhin et al., 2018), https://arxiv.org/abs/1711.01558

    Arguments:
        event_shape: Shape of one datum.
        latent_dim: Size of the code.
        mmd: :math:`\lambda`.
        penalties: Further ones.
        options: As in `ae`.

    Example:
        >>> wae(64, 8).encode(torch.zeros(5, 64)).shape
        torch.Size([5, 8])
    """
    return ae(event_shape, latent_dim, penalties=_joined(MMD(mmd), penalties), **options)


def vq_vae(
    event_shape: int | Sequence[int],
    latent_dim: int,
    *,
    num_latents: int = 8,
    num_codes: int = 64,
    commitment: float = 0.25,
    penalties: Penalty | Sequence[Penalty] = (),
    likelihood: Factory | None = None,
    **options: Any,
) -> VAE:
    r"""A VQ-VAE: each of M vectors of the code is the nearest of K learned ones.

    .. math::
        L = \|x - d_\phi(z)\|^2 + \lambda \|e_\theta(x) - \mathrm{sg}(z)\|^2, \qquad
        z_m = \arg\min_{e_k} \|e_\theta(x)_m - e_k\|

    ===================  ====================================================  ================
    symbol               meaning                                               argument
    ===================  ====================================================  ================
    M                    vectors of a code                                     ``num_latents``
    K                    size of the codebook                                  ``num_codes``
    :math:`\lambda`      weight of the commitment                              ``commitment``
    ===================  ====================================================  ================

    References:
        Neural Discrete Representation Learning (van den Oord et al., 2017),
        https://arxiv.org/abs/1711.00937

    Arguments:
        event_shape: Shape of one datum.
        latent_dim: Entries of each of the M vectors.
        num_latents: M.
        num_codes: K.
        commitment: :math:`\lambda`.
        penalties: Further ones.
        likelihood: As in `ae`.
        options: As in `ae`, but for prior, guide and labels.

    Example:
        >>> vq_vae(64, 2, num_latents=4).encode(torch.zeros(5, 64)).shape
        torch.Size([5, 4, 2])
    """
    for name in ("prior", "guide", "num_classes"):
        if options.get(name):
            raise ArgumentError(
                "vq_vae", f"no {name} of its own: it has a flat prior and a codebook", name, ["ae"]
            )
    options = {k: v for k, v in options.items() if k not in ("prior", "guide", "num_classes")}
    shape = (check_int("num_latents", num_latents), check_int("latent_dim", latent_dim))
    family = likelihood or _squared_error
    return ae(
        event_shape,
        math.prod(shape),
        prior=lambda _: priors.Flat(shape),
        guide=lambda network, _: guides.NearestCode(network, shape, num_codes),
        likelihood=lambda network, event: family(
            lambda p: nn.Sequential(nn.Flatten(-2), network(p)), event
        ),
        penalties=_joined(Commitment(commitment), penalties),
        **options,
    )


def _joined(*penalties: Penalty | Sequence[Penalty]) -> list[Penalty]:
    return [q for p in penalties for q in ([p] if isinstance(p, Penalty) else p)]


def _squared_error(network: Any, event_shape: Any) -> likelihoods.Gaussian:
    return likelihoods.Gaussian(network, event_shape, sigma=math.sqrt(0.5))
