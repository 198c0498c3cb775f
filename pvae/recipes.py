r"""Recipes: functions that build a pair, ready to fit, from parts that are named by arguments.

`vae` is the variational autoencoder. The others are the deterministic autoencoders, which are the
same pair with a point-mass guide. They take the arguments of `vae`, which documents them, and some
of their own. A string stands for a part that has a name: ``vae(64, 2, prior="laplace")``.

A function under ``@_recipe`` or ``@_deterministic`` is a ``--recipe`` of the command line, and the
numbers that it takes are options there.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict, TypeVar, Unpack, cast

from torch import Tensor, nn

from pvae import guides, likelihoods, networks, priors
from pvae.annotations import strict
from pvae.corruptions import Noise
from pvae.errors import ArgumentError, as_shape, as_widths, check_int, check_number, quoted
from pvae.penalties import MMD, Activations, Commitment, Contractive, Penalty, WeightDecay
from pvae.shelf import Shelf
from pvae.types import Shape
from pvae.vae import VAE

__all__ = [
    "DETERMINISTIC",
    "NETWORKS",
    "PairOptions",
    "ae",
    "contractive_ae",
    "denoising_ae",
    "named",
    "rae",
    "rebuilt",
    "sparse_activations_ae",
    "sparse_ae",
    "vae",
    "vq_vae",
    "wae",
]

NETWORKS = ("mlp", "conv", "resnet")
Factory = Callable[..., Any]
Activation = Callable[[], nn.Module]
Network = Callable[[int], nn.Module]
Build = TypeVar("Build", bound=Callable[..., VAE])

named: Shelf[Callable[..., VAE]] = Shelf("recipe")
"""Recipes by name."""
DETERMINISTIC: list[str] = []
"""Names of the recipes whose guide is a point mass."""


def _recipe(build: Build) -> Build:
    """Gives a recipe its name; its pairs know what they were made with, where that is plain."""

    @functools.wraps(build)
    def recorded(*args: object, **options: object) -> VAE:
        pair = build(*args, **options)
        pair.recipe = _record(build, args, options)
        return pair

    return named.put(build.__name__)(cast("Build", recorded))


def _record(
    build: Callable[..., VAE], args: tuple[object, ...], options: dict[str, object]
) -> dict[str, object] | None:
    """A recipe and its arguments in words and numbers; None if they are more than that."""
    names = [*inspect.signature(build).parameters]
    given = dict(zip(names, args, strict=False)) | options
    try:
        return {"recipe": build.__name__, "arguments": {k: _plain(v) for k, v in given.items()}}
    except TypeError:
        return None


def _plain(value: object) -> object:
    """A number or a text, several of them, or the name of a part."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    name = value.__name__ if isinstance(value, type) else ""
    if name and getattr(nn, name, None) is value:
        return name
    for shelf in (priors.named, likelihoods.named, guides.named):
        if names := [name for name, part in shelf.items() if part is value]:
            return names[0]
    raise TypeError


@strict
def rebuilt(made: Mapping[str, Any]) -> VAE:
    """The pair that a recipe has made, by what the pair's ``recipe`` says.

    Raises:
        ArgumentError: If no recipe has that name, or it doesn't take these arguments.

    Example:
        >>> first = vae(6, 2, hidden=(8,), activation=nn.Tanh)
        >>> repr(rebuilt(first.recipe).model) == repr(first.model)
        True
    """
    if not {"recipe", "arguments"} <= made.keys():
        expected = "what a pair's recipe says: its name and its arguments"
        raise ArgumentError("made", expected, quoted(dict(made)), ["rebuilt(pair.recipe)"])
    name, arguments = str(made["recipe"]), made["arguments"]
    build = named(name)
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as error:
        raise ArgumentError(f"recipes.{name}", "arguments that it takes", str(error)) from error
    return build(**arguments)


def _deterministic(build: Build) -> Build:
    DETERMINISTIC.append(build.__name__)
    return _recipe(cast("Build", strict(build)))


class PairOptions(TypedDict, total=False):
    """The keywords that all recipes share; `vae` says what each of them is."""

    prior: str | Factory
    likelihood: str | Factory
    guide: str | Factory
    network: str
    hidden: Sequence[int]
    decoder_hidden: Sequence[int] | None
    activation: str | Activation
    code_activation: str | Activation | None
    num_classes: int
    levels: int | None
    in_scale: float
    unit_norm: bool
    corruption: Callable[[Tensor], Tensor] | None
    penalties: Penalty | Sequence[Penalty]


@_recipe
@strict
def vae(
    event_shape: Shape,
    latent_dim: int,
    *,
    prior: str | Factory = "standard_normal",
    likelihood: str | Factory = "bernoulli",
    guide: str | Factory = "mean_field",
    network: str = "mlp",
    hidden: Sequence[int] = (256, 256),
    decoder_hidden: Sequence[int] | None = None,
    activation: str | Activation = nn.ReLU,
    code_activation: str | Activation | None = None,
    num_classes: int = 0,
    levels: int | None = None,
    in_scale: float = 1.0,
    unit_norm: bool = False,
    corruption: Callable[[Tensor], Tensor] | None = None,
    penalties: Penalty | Sequence[Penalty] = (),
) -> VAE:
    r"""A variational autoencoder.

    .. math::
        L(\theta, \phi; x) = E_{q_\theta(z | x)}[\log p_\phi(x | z)] - KL(q_\theta(z | x) \| p(z))

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), https://arxiv.org/abs/1312.6114

    Arguments:
        event_shape: Shape of one datum.
        latent_dim: Number of entries of the latent z.
        prior: p(z): a name of ``priors.named``, a class of `pvae.priors`, or a function from
            ``latent_dim`` to a prior.
        likelihood: :math:`p_\phi(x | z)`, with the decoder inside: a name of
            ``likelihoods.named``, a class of `pvae.likelihoods`, or a function from (network,
            event_shape), such as ``functools.partial(likelihoods.Binomial, total_count=16)``.
        guide: :math:`q_\theta(z | x)`, with the encoder inside: a name of ``guides.named``, a class
            of `pvae.guides`, or a function from (network, latent_dim).
        network: ``"mlp"``, ``"conv"`` or ``"resnet"``; the last two for images.
        hidden: Widths of the encoder's layers, or channels.
        decoder_hidden: The decoder's; ``()`` for a linear map from latent to data, whatever the
            network, None for the encoder's in reverse.
        activation: Class of the activation, or its name in ``torch.nn``.
        code_activation: Class (or name) of an activation at the encoder's end, for a point mass:
            with ``nn.ReLU`` entries of the code can be exactly 0.
        num_classes: Classes of the labels that encoder and decoder get, too; 0 for no labels.
        levels: Number of values that an entry of x can have, for a likelihood given by name: 17
            for counts from 0 to 16; None for real numbers.
        in_scale: Factor on what the encoder sees, such as ``1 / 16`` for counts up to 16.
        unit_norm: Whether the columns of the decoder's weights have norm 1, see
            `pvae.networks.unit_norm`.
        corruption: What the guide sees of x in training, see `pvae.corruptions`.
        penalties: What training subtracts from the objective, see `pvae.penalties`.

    Raises:
        ArgumentError: If no part has the name that was given; the message lists those there are.

    Example:
        >>> vae((1, 28, 28), 20, network="conv", hidden=(8, 16)).sample(3).shape
        torch.Size([3, 1, 28, 28])
        >>> vae(64, 2, prior="laplace", likelihood="binomial", levels=17).sample(3).max() <= 16
        tensor(True)
    """
    shape = as_shape("event_shape", event_shape, least=1)
    check_int("latent_dim", latent_dim)
    if network not in NETWORKS:
        fixes = ['network="mlp"']
        raise ArgumentError("network", "'mlp', 'conv' or 'resnet'", repr(network), fixes)
    inner = networks.activation_named(activation)
    last = None if code_activation is None else networks.activation_named(code_activation)
    hidden = as_widths("hidden", hidden)
    widths = hidden[::-1] if decoder_hidden is None else as_widths("decoder_hidden", decoder_hidden)
    residual = network == "resnet"
    encode: Factory = networks.MLP
    if network != "mlp":
        encode = partial(networks.ConvEncoder, residual=residual)
    encode = partial(encode, activation=inner, out_activation=last, context_dim=num_classes)

    def encoder(num_params: int) -> nn.Module:
        return encode(shape, num_params * latent_dim, hidden, in_scale=in_scale)

    def decoder(num_params: int) -> nn.Module:
        size = (num_params * shape[0], *shape[1:])
        decode: Factory = networks.MLP  # without hidden layers, the linear map
        if network == "mlp" or not widths:
            size = (math.prod(size),)
        else:
            decode = partial(networks.ConvDecoder, residual=residual)
        built = decode(latent_dim, size, widths, activation=inner, context_dim=num_classes)
        return networks.unit_norm(built) if unit_norm else built

    pair = VAE(
        prior=priors.named(prior)(latent_dim),
        likelihood=_likelihood(likelihood, levels)(decoder, shape),
        guide=guides.named(guide)(encoder, latent_dim),
        corruption=corruption,
        penalties=penalties,
    )
    if last is not None and not pair.guide.posterior.is_point:
        expected = "a point mass, whose code is the encoder's output"
        actual = f"{type(pair.guide.posterior).__name__}, whose parameters it would all act on"
        raise ArgumentError("code_activation", expected, actual, ['guide="point"'])
    return pair


@_deterministic
def ae(event_shape: Shape, latent_dim: int, **options: Unpack[PairOptions]) -> VAE:
    r"""A plain autoencoder: the same pair with a flat prior and a point-mass guide.

    .. math::
        \hat x = d_\phi(e_\theta(x)), \qquad L = \|x - \hat x\|^2 = -\log p(x | e(x)) + c

    The likelihood is Gaussian with :math:`\sigma^2 = 1/2`, for which minus the log density is the
    squared error, up to :math:`c = -\tfrac D2 \log \pi`; it can be swapped, but not for one whose
    scale adapts. There is no evidence lower bound: what is maximised is log p(x | e(x)).

    References:
        From Variational to Deterministic Autoencoders (Ghosh et al., 2020),
        https://arxiv.org/abs/1903.12436

    Example:
        >>> autoencoder = ae(64, 2)
        >>> autoencoder.reconstruct(torch.zeros(5, 64)).shape
        torch.Size([5, 64])
    """
    family = _likelihood(options.get("likelihood", "gaussian"), options.get("levels"), point=True)
    merged = _merged({"prior": "flat", "guide": "point"}, options)
    return vae(event_shape, latent_dim, **(merged | {"likelihood": family}))


@_deterministic
def sparse_ae(
    event_shape: Shape, latent_dim: int, *, l1: float | None = None, **options: Unpack[PairOptions]
) -> VAE:
    r"""A sparse autoencoder: an L1 penalty on the code, which is a Laplace prior.

    By default the decoder is a dictionary: data are sums of a few of its columns, one an entry of
    the code, and entries that aren't used are exactly 0, as the encoder ends in a ReLU. That is
    ``decoder_hidden=()``, ``code_activation="ReLU"`` and ``unit_norm=True``. Another sparse prior
    may stand in the Laplace's place: ``prior="student_t"``.

    .. math::
        L = \|x - d_\phi(e_\theta(x))\|^2 + \lambda \|e_\theta(x)\|_1
          = -\log p(x | z) - \log p(z) + c, \qquad z = e_\theta(x)

    The constant has the prior's share :math:`N_z \log(\lambda / 2)`. The decoder's columns have
    norm 1: otherwise a code that shrinks, and a decoder that grows, lower the penalty and change
    nothing. That fixes the gain of a linear decoder, and only bounds that of one with hidden
    layers.

    References:
        Emergence of simple-cell receptive field properties by learning a sparse code for natural
        images (Olshausen & Field, 1996), https://doi.org/10.1038/381607a0

    Arguments:
        l1: Rate :math:`\lambda` of the Laplace prior, which is the weight of the L1 norm of the
            code; None for 0.1.

    Example:
        >>> sparse = sparse_ae(64, 100, l1=0.3)
        >>> type(sparse.model.prior).__name__, bool((sparse.encode(torch.zeros(5, 64)) == 0).any())
        ('Laplace', True)
    """
    if l1 is not None and "prior" in options:
        raise ArgumentError("sparse_ae", "either l1, for a Laplace prior, or another prior", "both")
    rate = check_number("l1", 0.1 if l1 is None else l1, above=0)
    own: PairOptions = {"prior": partial(priors.Laplace, rate=rate), "decoder_hidden": ()}
    own |= {"code_activation": nn.ReLU, "unit_norm": True}
    return ae(event_shape, latent_dim, **_merged(own, options))


@_deterministic
def sparse_activations_ae(
    event_shape: Shape,
    latent_dim: int,
    *,
    l1_activations: float = 0.01,
    code: bool | None = None,
    output: bool = False,
    **options: Unpack[PairOptions],
) -> VAE:
    r"""A sparse autoencoder: an L1 penalty on all activations of encoder and decoder.

    .. math::
        L = \|x - \hat x\|^2
          + \lambda \big(\sum_j \|a_e^{[j]}\|_1 + \sum_j \|a_d^{[j]}\|_1\big)

    Here :math:`a^{[j]}` are the outputs of the activation layers. The decoder's columns have norm 1
    (``unit_norm=True``).

    References:
        Sparse autoencoder (Ng, 2011), lecture notes of CS294A,
        https://web.stanford.edu/class/cs294a/sparseAutoencoder_2011new.pdf

    Arguments:
        l1_activations: Weight :math:`\lambda` of the L1 norm of all activations.
        code: Whether the code counts; None for yes, unless it is counted as the output of a
            ``code_activation``.
        output: Whether the output counts.

    Example:
        >>> len(sparse_activations_ae(64, 100).model.penalties)
        1
    """
    code = options.get("code_activation") is None if code is None else code
    own = Activations(l1_activations, code=code, output=output)
    return ae(event_shape, latent_dim, **_merged({"unit_norm": True}, options, own))


@_deterministic
def contractive_ae(
    event_shape: Shape,
    latent_dim: int,
    *,
    contractive: float = 0.1,
    squared: bool = False,
    num_probes: int | None = None,
    weight_decay: float = 1e-3,
    **options: Unpack[PairOptions],
) -> VAE:
    r"""A contractive autoencoder: codes that change little with the data.

    .. math::
        L = \|x - \hat x\|^2 + \lambda \|\partial e_\theta(x) / \partial x\|_F
          + \gamma \|W_\phi\|^2

    The weight decay on the decoder is there because a code that shrinks, and a decoder that grows,
    lower the penalty and change nothing.

    References:
        Contractive Auto-Encoders (Rifai et al., 2011),
        https://icml.cc/2011/papers/455_icmlpaper.pdf

    Arguments:
        contractive: Weight :math:`\lambda` of the norm of the code's Jacobian.
        squared: Whether the norm is squared, as in the paper.
        num_probes: Number of random directions in which the norm of the Jacobian is estimated, for
            wide codes; None for the exact norm.
        weight_decay: Weight :math:`\gamma` of the squared norm of the decoder's weights.

    Example:
        >>> [type(p).__name__ for p in contractive_ae(64, 8).guide.penalties]
        ['Contractive']
    """
    own: list[Penalty] = [Contractive(contractive, squared=squared, num_probes=num_probes)]
    if weight_decay:
        own.append(WeightDecay(weight_decay, ("model",)))
    return ae(event_shape, latent_dim, **_merged({}, options, *own))


@_deterministic
def denoising_ae(event_shape: Shape, latent_dim: int, **options: Unpack[PairOptions]) -> VAE:
    r"""A denoising autoencoder: it sees corrupted data and reconstructs the clean ones.

    .. math::
        L = \|x - d_\phi(e_\theta(\tilde x))\|^2, \qquad \tilde x = x + n \ \text{or}\ x \cdot m

    What the encoder sees in training is drawn afresh for every batch, by ``corruption``, which is
    ``Noise(0.3)`` by default.

    References:
        Stacked Denoising Autoencoders (Vincent et al., 2010),
        https://www.jmlr.org/papers/v11/vincent10a.html

    Example:
        >>> denoising_ae(64, 8).guide.corruption
        Noise(sigma=0.3)
    """
    return ae(event_shape, latent_dim, **_merged({"corruption": Noise(0.3)}, options))


@_deterministic
def rae(
    event_shape: Shape,
    latent_dim: int,
    *,
    weight_decay: float = 1e-3,
    **options: Unpack[PairOptions],
) -> VAE:
    r"""A regularised autoencoder, RAE-L2, to be sampled with an ex-post density.

    .. math::
        L = \|x - \hat x\|^2 + \tfrac12 \|z\|^2 + \gamma \|W_\phi\|^2

    The square of the code is a standard normal prior under a point mass.

    References:
        From Variational to Deterministic Autoencoders (Ghosh et al., 2020),
        https://arxiv.org/abs/1903.12436

    Arguments:
        weight_decay: Weight :math:`\gamma` of the squared norm of the decoder's weights.

    Example:
        >>> rae(64, 8).reconstruct(torch.zeros(5, 64)).shape
        torch.Size([5, 64])
    """
    own = WeightDecay(weight_decay, ("model",))
    return ae(event_shape, latent_dim, **_merged({"prior": "standard_normal"}, options, own))


@_deterministic
def wae(
    event_shape: Shape, latent_dim: int, *, mmd: float = 10.0, **options: Unpack[PairOptions]
) -> VAE:
    r"""A Wasserstein autoencoder, WAE-MMD: all codes together are to look like N(0, I).

    .. math::
        L = \|x - \hat x\|^2 + \lambda\, \mathrm{MMD}^2(q(z), N(0, I))

    To sample it, put the target in the flat prior's place: `pvae.latent.with_prior`.

    References:
        Wasserstein Auto-Encoders (Tolstikhin et al., 2018), https://arxiv.org/abs/1711.01558

    Arguments:
        mmd: Weight :math:`\lambda` of the discrepancy (MMD) between all codes and N(0, I), in nats
            a datum.

    Example:
        >>> wae(64, 8).encode(torch.zeros(5, 64)).shape
        torch.Size([5, 8])
    """
    return ae(event_shape, latent_dim, **_merged({}, options, MMD(mmd)))


@_deterministic
def vq_vae(
    event_shape: Shape,
    latent_dim: int,
    *,
    num_latents: int = 8,
    num_codes: int = 64,
    commitment: float = 0.25,
    **options: Unpack[PairOptions],
) -> VAE:
    r"""A VQ-VAE: each of M vectors of the code is the nearest of K learned ones.

    .. math::
        L = \|x - d_\phi(z)\|^2 + \lambda \|e_\theta(x) - \mathrm{sg}(z)\|^2, \qquad
        z_m = \arg\min_{e_k} \|e_\theta(x)_m - e_k\|

    References:
        Neural Discrete Representation Learning (van den Oord et al., 2017),
        https://arxiv.org/abs/1711.00937

    Arguments:
        latent_dim: Number of entries of each of the M vectors.
        num_latents: Number M of vectors in the code of a datum.
        num_codes: Number K of code vectors in the codebook.
        commitment: Weight :math:`\lambda` of the squared distance from the encoder's output to its
            nearest code vectors.
        options: As in `vae`, but for prior, guide and num_classes.

    Example:
        >>> vq_vae(64, 2, num_latents=4).encode(torch.zeros(5, 64)).shape
        torch.Size([5, 4, 2])
    """
    for name in ("prior", "guide", "num_classes"):
        if options.get(name):
            expected = f"no {name} of its own: it has a flat prior and a codebook"
            raise ArgumentError("vq_vae", expected, name, ["ae"])
    shape = (check_int("num_latents", num_latents), check_int("latent_dim", latent_dim))
    family = _likelihood(options.get("likelihood", "gaussian"), options.get("levels"), point=True)

    def likelihood(network: Network, event: tuple[int, ...]) -> nn.Module:
        return family(lambda p: nn.Sequential(nn.Flatten(-2), network(p)), event)

    own: PairOptions = {"prior": lambda _: priors.Flat(shape), "likelihood": likelihood}
    own["guide"] = lambda network, _: guides.NearestCode(network, shape, num_codes)
    merged = _merged({}, options, Commitment(commitment)) | own
    return ae(event_shape, math.prod(shape), **merged)


def _merged(defaults: PairOptions, options: PairOptions, *penalties: Penalty) -> PairOptions:
    """What was asked for over a recipe's defaults, with its own penalties before further ones."""
    asked = options.get("penalties", ())
    several = [asked] if isinstance(asked, Penalty) else [*asked]
    return defaults | options | {"penalties": [*penalties, *several]}


def _likelihood(likelihood: str | Factory, levels: int | None, *, point: bool = False) -> Factory:
    """The likelihood of a name; beside a point mass ``"gaussian"`` is the squared error."""
    if not isinstance(likelihood, str):
        return likelihood
    if point and likelihood.lower() == "gaussian":
        return partial(likelihoods.Gaussian, sigma=math.sqrt(0.5))
    return likelihoods.named(likelihood).for_levels(levels)
