r"""Penalties :math:`\lambda R` on a pair, as factors marked as such: optimised, but no density.

A penalty acts in training mode alone, so that no evidence, bound or validation value counts it.
Its weight is a number; for a schedule, ``objectives.ELBO(penalty_weight=schedule)`` multiplies all
of them. What is a log density of the code belongs in the prior instead: the L1 norm of the code is
`pvae.priors.Laplace`, its square `pvae.priors.StandardNormal`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pvae import sites
from pvae.conditional import Conditional
from pvae.described import Described
from pvae.errors import ArgumentError, PairError, check_int, check_number
from pvae.internals import BatchNorm, Norm
from pvae.jacobian import squared_norm_of
from pvae.mmd import Kernel, mmd
from pvae.shelf import Shelf
from pvae.types import Dist

__all__ = [
    "MMD",
    "Activations",
    "Commitment",
    "Contractive",
    "Custom",
    "Penalty",
    "SideOutputs",
    "WeightDecay",
    "named",
    "on_side",
    "penalise",
    "recorded_activations",
]

Side = Literal["guide", "model"]
Target = Callable[[int], Tensor]
KernelLike = Literal["imq", "rbf"] | Kernel
named: Shelf[Callable[[float], Penalty]] = Shelf("penalty")
"""Penalties by name: each is built from its weight alone."""


@dataclass(frozen=True)
class SideOutputs:
    """What one side of a pair has computed on a batch, which penalties are functions of.

    Attributes:
        side: ``"guide"`` or ``"model"``.
        part: The guide family, or the likelihood.
        x: Data, as this side sees them: in a guide, corrupted ones.
        z: The latent, shape ``(..., N, *latent_shape)``.
        context: Labels and the like.
        fn: The distribution that ``part`` returned.
        activations: Outputs of the activations inside ``part``, in the order of their calls.
    """

    side: Side
    part: Conditional
    x: Tensor
    z: Tensor
    context: tuple[Tensor, ...]
    fn: Dist
    activations: Sequence[Tensor]


class Penalty(Described, ABC):
    r"""The abstract penalty: ``forward(outputs)`` returns R, one value a datum.

    To write one as a class, say in ``sides`` which sides of the pair it is computed on, call
    ``super().__init__(weight)``, and return R of shape ``fn.batch_shape``, or one that broadcasts
    to it. A function of (x, z) needs no class: `Custom`.

    With several particles z is of shape ``(K, N, ...)``: write R for any leading axes.

    Arguments:
        weight: :math:`\lambda`, in nats per unit of R.

    Attributes:
        sides: The sides of the pair that R is computed on, ``"guide"`` or ``"model"`` or both.
        records_activations: Whether R needs the outputs of activations inside the network.
        differentiates_x: Whether R needs derivatives with respect to x.
        couples_data: Whether R of a datum depends on the other data of the batch.
    """

    sides: tuple[Side, ...] = ("model",)
    records_activations = False
    differentiates_x = False
    couples_data = False
    weight: Tensor

    def __init__(self, weight: float) -> None:
        super().__init__()
        number = check_number(f"{type(self).__name__}.weight", weight, minimum=0)
        self.register_buffer("weight", torch.tensor(number))

    @abstractmethod
    def forward(self, outputs: SideOutputs) -> Tensor:
        """R for each datum, without the weight."""


def _check_sides(penalty: Penalty) -> None:
    if not penalty.sides or set(penalty.sides) - {"guide", "model"}:
        where = f"{type(penalty).__name__}.sides"
        fixes = ['sides=("guide", "model")']
        raise ArgumentError(where, "'guide', 'model' or both", repr(penalty.sides), fixes)


class Custom(Penalty):
    r"""A penalty of your own, :math:`\lambda R(x, z, y, \dots)`.

    Arguments:
        function: From x, z and what context the pair has to one value a datum, shape ``(..., N)``;
            a function or a module, whose parameters are then trained, too.
        weight: :math:`\lambda`.

    Example:
        >>> ridge = Custom(lambda x, z: z.square().sum(-1), weight=0.5)
        >>> ridge.sides
        ('model',)
    """

    def __init__(self, function: Callable[..., Tensor], weight: float) -> None:
        super().__init__(weight)
        if not callable(function):
            raise ArgumentError("Custom.function", "a function of (x, z)", repr(function))
        self.function = function

    def forward(self, outputs: SideOutputs) -> Tensor:
        """R(x, z, ...)."""
        return self.function(outputs.x, outputs.z, *outputs.context)


@named.put("l1_activations")
class Activations(Penalty):
    r"""The L1 norm of all activations of encoder and decoder, :math:`\sum_j \|a^{[j]}\|_1`.

    Activations are the outputs of the torch modules that are activations (``nn.ReLU``, ...),
    whatever the network; by default also the code, which is the encoder's last one, and not the
    output, which is the data's own.

    Arguments:
        weight: :math:`\lambda`.
        code: Whether the code (the mean of a stochastic guide) counts; False where the encoder ends
            in an activation, whose output it is.
        output: Whether the mean of p(x | z) counts.

    References:
        Sparse autoencoder (Ng, 2011), lecture notes of CS294A,
        https://web.stanford.edu/class/cs294a/sparseAutoencoder_2011new.pdf
    """

    sides = ("guide", "model")
    records_activations = True

    def __init__(self, weight: float, *, code: bool = True, output: bool = False) -> None:
        super().__init__(weight)
        self.code, self.output = code, output

    def forward(self, outputs: SideOutputs) -> Tensor:
        """The sum of absolute values for each datum, on this side."""
        counted = list(outputs.activations)
        if not counted and sum(1 for _ in _weights(outputs.part)) > 1:
            where, fixes = f"Activations in the {outputs.side}", ["nn.ReLU(), not torch.relu"]
            actual = f"several layers and no such module in {type(outputs.part).__name__}"
            raise PairError(where, "a network with activations that are modules", actual, fixes)
        if self.code if outputs.side == "guide" else self.output:
            counted.append(_mean(outputs))
        batch = tuple(outputs.fn.batch_shape)
        return sum((_per_datum(a, batch) for a in counted), outputs.z.new_zeros(()))


@named.put("contractive")
class Contractive(Penalty):
    r"""The sensitivity of the code, :math:`\|\partial z / \partial x\|_F`.

    z is the code, or the mean of a stochastic guide, at the x that the guide sees. The norm's
    gradient at 0 is taken as 0.

    Arguments:
        weight: :math:`\lambda`.
        squared: The squared norm, as Rifai et al. have it.
        num_probes: Random directions for an estimate, where the code is wide (see
            `pvae.jacobian.squared_jacobian_norm`): unbiased for the squared norm; the norm itself
            is estimated too low. None for the exact norm.
        max_entries: The most entries of the Jacobian that are in memory at once.

    References:
        Contractive Auto-Encoders (Rifai et al., 2011),
        https://icml.cc/2011/papers/455_icmlpaper.pdf
    """

    sides = ("guide",)
    differentiates_x = True

    def __init__(
        self,
        weight: float,
        *,
        squared: bool = False,
        num_probes: int | None = None,
        max_entries: int = 2**24,
    ) -> None:
        super().__init__(weight)
        self.squared, self.max_entries = squared, check_int("max_entries", max_entries)
        self.num_probes = None if num_probes is None else check_int("num_probes", num_probes)

    def forward(self, outputs: SideOutputs) -> Tensor:
        """The (squared) norm for each datum."""
        for name, module in outputs.part.named_modules():
            if isinstance(module, BatchNorm) and module.training:
                expected, kind = "codes that depend on their own datum alone", type(module).__name__
                actual = f"{kind} at {name} in training mode: each code depends on the whole batch"
                fixes = ["nn.LayerNorm, or no norm, in the encoder"]
                raise PairError("Contractive", expected, actual, fixes)
        square = squared_norm_of(
            _mean(outputs),
            outputs.x,
            num_probes=self.num_probes,
            max_entries=self.max_entries,
            create_graph=torch.is_grad_enabled(),
        )
        if self.squared:
            return square
        positive = square > 0
        return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


class Commitment(Penalty):
    r"""How far the encoder is from its codes, :math:`\|e_\theta(x) - \mathrm{sg}(e_k)\|^2`.

    Arguments:
        weight: :math:`\lambda`; 0.25 in the paper (see `pvae.guides.NearestCode`), beside the
            squared error.
    """

    sides = ("guide",)

    def forward(self, outputs: SideOutputs) -> Tensor:
        """The squared distance for each datum."""
        if not hasattr(outputs.fn, "quantised"):
            name, fixes = type(outputs.part).__name__, ["guides.NearestCode"]
            raise PairError("Commitment", "a guide with a codebook", name, fixes)
        gap = outputs.fn.encoded - outputs.fn.quantised.detach()
        return gap.square().flatten(len(outputs.fn.batch_shape)).sum(-1)


@named.put("weight_decay")
class WeightDecay(Penalty):
    r"""The squared norm of weights, :math:`\|W\|^2`.

    Weights are the parameters of that name with at least two axes, as they act (after a
    parametrisation such as `pvae.networks.unit_norm`); biases and norms are left out. The sum is
    the same for each datum, so that the loss per datum has it once.

    Arguments:
        weight: :math:`\lambda`.
        sides: Whose: ``("model",)`` for the decoder, ``("guide",)`` for the encoder, or both.
    """

    def __init__(self, weight: float, sides: Sequence[Side] = ("guide", "model")) -> None:
        super().__init__(weight)
        self.sides = tuple(sides)
        _check_sides(self)

    def forward(self, outputs: SideOutputs) -> Tensor:
        """The sum over all weights."""
        squares = [weight.square().sum() for weight in _weights(outputs.part)]
        return sum(squares, outputs.z.new_zeros(()))


@named.put("mmd")
class MMD(Penalty):
    r"""The discrepancy between the batch's codes and a target, :math:`\mathrm{MMD}^2(q(z), p(z))`.

    The same for each datum, so that the loss per datum has it once; the estimate is unbiased for
    what infinite batches would give. With a point guide and a flat prior this is the WAE-MMD, whose
    model is then sampled with the target as its prior (`pvae.latent.with_prior`).

    Arguments:
        weight: :math:`\lambda`.
        target: From the number of draws to draws, shape ``(M, *latent_shape)``; None for N(0, I).
        kernel: See `pvae.mmd.mmd`.

    References:
        Wasserstein Auto-Encoders (Tolstikhin et al., 2018), https://arxiv.org/abs/1711.01558
    """

    couples_data = True

    def __init__(
        self, weight: float, target: Target | None = None, kernel: KernelLike = "imq"
    ) -> None:
        super().__init__(weight)
        self.target, self.kernel = target, kernel

    def forward(self, outputs: SideOutputs) -> Tensor:
        """The estimate, for each particle, on all data alike."""
        batch = outputs.fn.batch_shape
        if not batch or batch[-1] < 2:
            raise PairError("MMD", "batches of at least two data", f"batch shape {tuple(batch)}")
        z = outputs.z.reshape(*batch, -1)
        drawn = torch.randn_like(z[0] if z.dim() > 2 else z)
        if self.target is not None:
            drawn = self.target(batch[-1]).to(z).reshape(batch[-1], -1)
        return mmd(z, drawn, self.kernel)[..., None]


_NORMS = (Norm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NAMES = set(nn.modules.activation.__all__) - {"MultiheadAttention"}
_ACTIVATIONS = tuple(getattr(nn.modules.activation, name) for name in _NAMES)


def _weights(part: nn.Module) -> Iterator[Tensor]:
    for module in part.modules():
        if isinstance(module, _NORMS):
            continue
        if parametrize.is_parametrized(module, "weight"):
            yield getattr(module, "weight")  # noqa: B009
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("weight") and parameter.dim() > 1:
                yield parameter


def _mean(outputs: SideOutputs) -> Tensor:
    try:
        return outputs.fn.mean
    except (NotImplementedError, AttributeError):
        where, actual = f"penalty on the {outputs.side}", type(outputs.fn).__name__
        fixes = ["guides.MeanField or guides.Point", "penalties.Custom, on draws of z"]
        raise PairError(where, "a distribution whose mean is known", actual, fixes) from None


def _per_datum(activation: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Sums of absolute values; networks may have merged the axes of particles and data."""
    lead, shape = math.prod(batch), tuple(activation.shape)
    if activation.numel() % max(lead, 1) or shape[:1] not in {batch[:1], (lead,)}:
        expected = f"activations with the axes of particles and data, {batch}, first"
        fixes = ["a network that keeps these axes in their place"]
        raise PairError("Activations", expected, f"shape {shape}", fixes)
    return activation.reshape(*batch, -1).abs().sum(-1)


@contextmanager
def recorded_activations(part: nn.Module, penalties: Iterable[Penalty]) -> Iterator[list[Tensor]]:
    """Collects the outputs of activations in a network as it runs, if a penalty needs them."""
    outputs: list[Tensor] = []
    watched = part.modules() if any(p.records_activations for p in penalties) else ()

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs.append(output.clone())

    with ExitStack() as hooks:
        for module in watched:
            if isinstance(module, _ACTIVATIONS):
                hooks.enter_context(module.register_forward_hook(keep))
        yield outputs


class Penalties(nn.ModuleList):
    """A list of penalties."""

    def __iter__(self) -> Iterator[Penalty]:
        """The penalties in their order."""
        yield from cast("Iterator[Penalty]", super().__iter__())


def on_side(side: Side, penalties: Penalty | Sequence[Penalty]) -> Penalties:
    """The penalties that are computed on one side of a pair, ``"guide"`` or ``"model"``."""
    several: tuple[object, ...] = (penalties,)
    if isinstance(penalties, Iterable) and not isinstance(penalties, (Penalty, Iterator)):
        several = tuple(penalties)  # an iterator would be empty for the other side
    for penalty in several:
        if not isinstance(penalty, Penalty):
            fixes = ["penalties.Custom(function, weight)"]
            raise ArgumentError("penalties", "penalties", type(penalty).__name__, fixes)
        _check_sides(penalty)
    return Penalties(p for p in several if isinstance(p, Penalty) and side in p.sides)


def penalise(outputs: SideOutputs, penalties: Iterable[Penalty]) -> None:
    """Subtracts the penalties from the objective, each as a site of its own in the data plate."""
    batch = tuple(outputs.fn.batch_shape)
    for i, penalty in enumerate(penalties):
        value = torch.as_tensor(penalty(outputs))
        name = f"{type(penalty).__name__.lower()}{i or ''}_{outputs.side}"
        try:
            value = value.expand(batch)
        except RuntimeError:
            expected, actual = (
                f"one value for each datum, shape {batch}",
                f"shape {tuple(value.shape)}",
            )
            fixes = [".sum(-1) over the axes of one datum"]
            raise PairError(f"penalty {name}", expected, actual, fixes) from None
        sites.penalty(name, penalty.weight * value, in_guide=outputs.side == "guide")
