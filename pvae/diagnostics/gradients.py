"""How noisy a training's gradients are: variance and signal-to-noise, by side, site, parameter."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Unpack

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pvae import terms
from pvae.devices import double, synchronize
from pvae.diagnostics.result import Finding, Result
from pvae.engine import Backup
from pvae.errors import ArgumentError, UndefinedError, check_int
from pvae.modes import in_mode
from pvae.objectives import ELBO, Objective, as_objective
from pvae.options import Options, progress_bar, tool
from pvae.pair import PairLike, Structure, as_pair

__all__ = ["GradientNoise", "ObjectiveComparison", "compare_objectives", "gradient_noise"]


@dataclass(frozen=True)
class Moments:
    """Mean and variance over draws of the gradient of some parameters, as one vector.

    Attributes:
        mean: Shape ``(P,)``.
        variance: Variance of one draw, ``(P,)``.
        traces: `total_variance` from each of G groups of R / G draws alone, ``(G,)``.
        num_repeats: R.
    """

    mean: Tensor
    variance: Tensor
    traces: Tensor
    num_repeats: int

    @property
    def total_variance(self) -> float:
        """The trace of the gradient's covariance."""
        return float(self.variance.sum())

    @property
    def se_total_variance(self) -> float:
        """Its standard error, by what the groups of draws have each; NaN with fewer than two."""
        count = len(self.traces)
        return math.nan if count < 2 else float(self.traces.std()) / math.sqrt(count)

    @property
    def snr(self) -> float:
        r"""The mean over entries of :math:`|E g| / \mathrm{sd}(g)`, of those that vary.

        Infinite where none varies, but one isn't 0; NaN where all are 0.
        """
        moves = self.variance > 0
        if not bool(moves.any()):
            return math.inf if bool(self.mean.any()) else math.nan
        return float((self.mean.abs()[moves] / self.variance[moves].sqrt()).mean())

    @property
    def floor(self) -> float:
        r"""What `snr` is on average where there is no signal at all, :math:`\sqrt{2 / (\pi R)}`."""
        return math.sqrt(2 / (math.pi * self.num_repeats))

    def finding(self, name: str, meaning: str) -> Finding:
        """A line of the total variance."""
        value, error = self.total_variance, self.se_total_variance
        return Finding(name, value, error, "nats^2", meaning=meaning)


@dataclass(frozen=True, repr=False)
class GradientNoise(Result):
    """The gradient of one objective on fixed data, over its draws.

    Attributes:
        objective: Its name.
        parameters: By name.
        sides: Moments of all parameters of ``"model"`` and of ``"guide"``.
        sites: Moments of the parameters that a site's distribution has, by ``"site (side)"``.
        seconds: Time of a gradient, median: processor time, or on a GPU the clock's.
        step_ratio: The same over the first objective's, where several are compared.
    """

    objective: str
    parameters: dict[str, Moments]
    sides: dict[str, Moments]
    sites: dict[str, Moments]
    seconds: float
    step_ratio: float = 1.0

    @property
    def title(self) -> str:
        """Whose gradients these are."""
        return f"Gradients of {self.objective}"

    def findings(self) -> list[Finding]:
        """Signal-to-noise by side, and variance by site."""
        signals = [
            Finding(f"gradient SNR, {side}", of_side.snr, meaning=_signal(of_side))
            for side, of_side in self.sides.items()
        ]
        meaning = "variance over draws of the gradient of this site's parameters"
        return signals + [
            of_site.finding(f"var {name}", meaning) for name, of_site in self.sites.items()
        ]


@dataclass(frozen=True, repr=False)
class ObjectiveComparison(Result, Mapping[str, GradientNoise]):
    """The gradients of several objectives at one pair and batch, by name.

    Attributes:
        by_name: The first is what others' times are measured by.
    """

    by_name: dict[str, GradientNoise]

    def __getitem__(self, name: str) -> GradientNoise:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    @property
    def title(self) -> str:
        """How many gradients each objective has."""
        moments = next(iter(next(iter(self.values())).sides.values()))
        return (
            f"Gradient variance of {len(self)} objectives, {moments.num_repeats} gradients of "
            f"each; SNR without any signal {moments.floor:.2g}"
        )

    def findings(self) -> list[Finding]:
        """Variance by side and objective, with signal-to-noise ratio and time."""
        return [
            moments.finding(
                f"{name}, {side}", f"SNR {moments.snr:.3g}; {noise.step_ratio:.2f}x the time"
            )
            for side in dict.fromkeys(side for noise in self.values() for side in noise.sides)
            for name, noise in self.items()
            if (moments := noise.sides.get(side)) is not None
        ]


@tool
def gradient_noise(
    pair: PairLike,
    data: object,
    objective: PyroELBO | None = None,
    *,
    num_repeats: int = 100,
    **options: Unpack[Options],
) -> GradientNoise:
    r"""The mean and the variance over draws of an objective's gradient, the data held fixed.

    Gradients are those of a training step, per datum: of the loss divided by the data plate's
    size, in training mode. The signal-to-noise ratio of an entry is
    :math:`|E g| / \mathrm{sd}(g)`; where it is below 1 one step moves the entry more by chance
    than by purpose.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
        https://arxiv.org/abs/1802.04537

    Arguments:
        pair: A model and its guide.
        data: One batch: an array, tensor, tuple of them or source; all rows are in each gradient.
        objective: One of `pvae.objectives`; None for `pvae.objectives.ELBO`.
        num_repeats: R, gradients that are taken.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: If no parameter has a gradient.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> noise = gradient_noise(vae, torch.zeros(5, 4), num_repeats=10)
        >>> sorted(noise.sides), sorted(noise.sites)
        (['guide', 'model'], ['x (model)', 'z (guide)'])
    """
    compared = _compared(pair, data, {"": objective or ELBO()}, num_repeats, options)
    return next(iter(compared.values()))


@tool
def compare_objectives(
    pair: PairLike,
    data: object,
    objectives: Mapping[str, PyroELBO],
    *,
    num_repeats: int = 100,
    **options: Unpack[Options],
) -> ObjectiveComparison:
    """`gradient_noise` of several objectives at the same pair and data, taken in turn.

    Their variances compare where the objectives' expected gradients are the same, as those of
    ELBO and STL are; signal-to-noise ratios compare anyway.

    Arguments:
        pair: A model and its guide.
        data: One batch.
        objectives: By name; ``step_ratio`` is each one's median time over the first one's.
        num_repeats: R, gradients of each.
        options: As in `pvae.options.Options`.

    Raises:
        ArgumentError: Without an objective, or if one isn't of `pvae.objectives`.
        UndefinedError: If no parameter has a gradient.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> several = {"ELBO": pvae.objectives.ELBO(), "IWAE-5": pvae.objectives.IWAE(5)}
        >>> list(compare_objectives(vae, torch.ones(5, 4), several, num_repeats=10))
        ['ELBO', 'IWAE-5']
    """
    if not isinstance(objectives, Mapping) or not objectives:
        got = "none" if not objectives else type(objectives).__name__
        fixes = ["{'IWAE-5': objectives.IWAE(5)}"]
        raise ArgumentError("objectives", "a dictionary of at least one, by name", got, fixes)
    return _compared(as_pair(pair, "compare_objectives"), data, objectives, num_repeats, options)


def _compared(
    pair: PairLike,
    data: object,
    objectives: Mapping[str, PyroELBO],
    num_repeats: int,
    options: Options,
) -> ObjectiveComparison:
    check_int("num_repeats", num_repeats, minimum=2)
    ours: dict[str, Objective] = {}
    for name, given in objectives.items():
        made, got = as_objective(given), type(given).__name__
        if not isinstance(made, Objective):
            raise ArgumentError("objective", "one of pvae.objectives", got, ["objectives.ELBO()"])
        ours[name or repr(made)] = made
    with terms.prepared(pair, data, options, "gradient_noise") as evaluation:
        structure, source = evaluation.structure, evaluation.source
        batch = source.rows(torch.arange(source.num_rows, device=source.device))
        takers = {name: _Gradients(made, structure, batch) for name, made in ours.items()}
        backup = Backup([b for m in structure.modules for b in m.buffers(recurse=False)])
        with contextlib.ExitStack() as undo:
            undo.callback(backup.restore)
            undo.enter_context(in_mode(structure.modules, training=True))
            owners = _owners(batch, structure)
            shown = evaluation.progress
            for _ in progress_bar(range(num_repeats), title="gradients", shown=shown):
                for taker in takers.values():
                    taker.take(num_repeats)
    first = statistics.median(next(iter(takers.values())).times)
    return ObjectiveComparison(
        {name: taker.noise(name, owners, first) for name, taker in takers.items()}
    )


class _Gradients:
    """The gradients of one objective on one batch: their sums by parameter, and their times."""

    def __init__(
        self, objective: Objective, structure: Structure, batch: tuple[Tensor, ...]
    ) -> None:
        objective.check(structure)
        self.objective, self.structure, self.batch = objective, structure, batch
        self.state = objective.make_state(structure, structure.num_rows_of(batch))
        self.sums: dict[str, Sums] = {}
        self.times: list[float] = []

    def take(self, num_repeats: int) -> None:
        """One more, of the loss per datum; each parameter's is flat and in double precision."""
        structure = self.structure
        started = _clock(structure.device)
        evaluated = self.objective.compute_terms(structure, self.batch)
        loss = self.objective.surrogate(evaluated, self.state)
        gradients = _gradients(loss / structure.divisor(evaluated.num_rows), structure)
        self.state.measured = None
        flat = {name: double(g.detach().flatten()) for name, g in gradients.items()}
        self.times.append(_clock(structure.device) - started)
        for name, g in flat.items():
            self.sums.setdefault(name, Sums(g, num_repeats)).add(g)

    def noise(self, name: str, owners: dict[str, list[str]], first: float) -> GradientNoise:
        """What they say, with time over that of the first objective."""
        if not self.sums:
            raise UndefinedError("gradient noise", "a loss that depends on parameters", "none")
        moments = {key: sums.moments() for key, sums in self.sums.items()}

        def joined(groups: dict[str, list[str]]) -> dict[str, Moments]:
            parts = {name: [k for k in keys if k in moments] for name, keys in groups.items()}
            return {name: _joined([moments[k] for k in ks]) for name, ks in parts.items() if ks}

        of = self.structure.sides
        sides = {side: [key for key in moments if side in of[key]] for side in ("guide", "model")}
        seconds = statistics.median(self.times)
        return GradientNoise(name, moments, joined(sides), joined(owners), seconds, seconds / first)


def _gradients(value: Tensor, structure: Structure) -> dict[str, Tensor]:
    """Of a number, by each parameter that it depends on."""
    if not value.requires_grad:
        return {}
    parameters = list(structure.parameters.values())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    rows = zip(structure.parameters, gradients, strict=True)
    return {name: g for name, g in rows if g is not None}


def _owners(batch: tuple[Tensor, ...], structure: Structure) -> dict[str, list[str]]:
    """The parameters that each site's own distribution has, given the values before it."""
    owners: dict[str, list[str]] = {}
    for name, site in terms.compute(structure, batch, detach=True).sites.items():
        for side, part in (("guide", site.log_q), ("model", site.log_p)):
            if part is not None and part.requires_grad:
                owners[f"{name} ({side})"] = list(_gradients(part.sum(), structure))
    return owners


def _signal(moments: Moments) -> str:
    if math.isnan(moments.snr):
        return "the gradient is 0"
    if math.isinf(moments.snr):
        return "draws don't matter: the gradient has no noise"
    return f"|mean| / sd of an entry, on average; {moments.floor:.2g} without any signal"


GROUPS = 10


class Sums:
    """Of gradients and their squares: of all R, and of the present group of R / G."""

    def __init__(self, like: Tensor, num_repeats: int) -> None:
        self.size = max(2, math.ceil(num_repeats / GROUPS))
        self.whole, self.group = like.new_zeros(2, 2, *like.shape)
        self.num_repeats, self.count = num_repeats, 0
        self.traces: list[Tensor] = []

    def add(self, gradient: Tensor) -> None:
        new = torch.stack([gradient, gradient.square()])
        self.whole, self.group = self.whole + new, self.group + new
        self.count += 1
        if self.count % self.size == 0:
            self.traces.append(_variance(self.group, self.size).sum())
            self.group = torch.zeros_like(new)

    def moments(self) -> Moments:
        # A step without this gradient is one in which it is 0.
        variance = _variance(self.whole, self.num_repeats)
        traces = torch.stack(self.traces) if self.traces else variance.new_zeros(0)
        return Moments(self.whole[0] / self.num_repeats, variance, traces, self.num_repeats)


def _variance(sums: Tensor, count: int) -> Tensor:
    mean, square = sums / count
    spread = (square - mean.square()) * count / (count - 1)
    rounding = 1e-14 * square  # of the difference of two equal numbers
    return torch.where(spread > rounding, spread, 0.0)


def _joined(parts: list[Moments]) -> Moments:
    return Moments(
        torch.cat([p.mean for p in parts]),
        torch.cat([p.variance for p in parts]),
        torch.stack([p.traces for p in parts]).sum(0),
        parts[0].num_repeats,
    )


def _clock(device: torch.device) -> float:
    """Seconds: of the processor, or on a GPU of the clock with all work done."""
    if device.type == "cpu":
        return time.process_time()
    synchronize(device)
    return time.perf_counter()
