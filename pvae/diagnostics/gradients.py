"""How noisy a training's gradients are: variance and signal-to-noise, by side, site, parameter."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor
from tqdm.auto import trange

from pvae import terms
from pvae.diagnostics.result import Finding, Result
from pvae.engine import Backup
from pvae.errors import ArgumentError, UndefinedError, check_int
from pvae.modes import in_mode
from pvae.objectives import ELBO, Objective, as_objective
from pvae.options import Options, tool
from pvae.pair import PairLike, Structure, as_pair

__all__ = ["GradientNoise", "ObjectiveComparison", "compare_objectives", "gradient_noise"]


@dataclass(frozen=True)
class Moments:
    """Mean and variance over draws of the gradient of some parameters, as one vector.

    Attributes:
        mean: Shape ``(P,)``.
        variance: Of one draw, ``(P,)``.
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


@dataclass(frozen=True, repr=False)
class GradientNoise(Result):
    """The gradient of one objective on fixed data, over its draws.

    Attributes:
        objective: Its name.
        parameters: By name.
        sides: Of all parameters of ``"model"`` and of ``"guide"``.
        sites: Of the parameters that a site's distribution has, by ``"site (side)"``.
        seconds: Time of a gradient, median: processor time, or on CUDA the clock's.
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
        lines = [
            Finding(f"gradient SNR, {side}", found.snr, meaning=self._meaning(found))
            for side, found in self.sides.items()
        ]
        what = "variance over draws of the gradient of this site's parameters"
        for site, found in self.sites.items():
            value, error = found.total_variance, found.se_total_variance
            lines.append(Finding(f"var {site}", value, error, "nats^2", meaning=what))
        return lines

    def _meaning(self, found: Moments) -> str:
        if math.isnan(found.snr):
            return "the gradient is 0"
        if math.isinf(found.snr):
            return "draws don't matter: the gradient has no noise"
        return f"|mean| / sd of an entry, on average; {found.floor:.2g} without any signal"


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
            Finding(
                f"{name}, {side}",
                moments.total_variance,
                moments.se_total_variance,
                "nats^2",
                meaning=f"SNR {moments.snr:.3g}; {found.step_ratio:.2f}x the time",
            )
            for side in dict.fromkeys(side for found in self.values() for side in found.sides)
            for name, found in self.items()
            if (moments := found.sides.get(side)) is not None
        ]


@tool
def gradient_noise(
    pair: PairLike,
    data: Any,
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
        >>> found = gradient_noise(vae, torch.zeros(5, 4), num_repeats=10)
        >>> sorted(found.sides), sorted(found.sites)
        (['guide', 'model'], ['x (model)', 'z (guide)'])
    """
    named = {"": objective or ELBO()}
    compared = _compared(pair, data, named, num_repeats, options)
    return next(iter(compared.values()))


@tool
def compare_objectives(
    pair: PairLike,
    data: Any,
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
        objectives: By name.
        num_repeats: R, gradients of each.
        options: As in `pvae.options.Options`.

    Returns:
        By name, as a mapping that prints itself; ``step_ratio`` is each one's time over the
        first one's, both medians of R.

    Raises:
        ArgumentError: Without an objective, or if one isn't of `pvae.objectives`.
        UndefinedError: If no parameter has a gradient.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> several = {"ELBO": pvae.objectives.ELBO(), "IWAE-5": pvae.objectives.IWAE(5)}
        >>> found = compare_objectives(vae, torch.ones(5, 4), several)
        >>> found["IWAE-5"].sides["model"].num_repeats
        100
    """
    if not isinstance(objectives, Mapping) or not objectives:
        got = "none" if not objectives else type(objectives).__name__
        raise ArgumentError("objectives", "a dictionary of at least one, by name", got)
    return _compared(as_pair(pair, "compare_objectives"), data, objectives, num_repeats, options)


def _compared(
    pair: PairLike,
    data: Any,
    objectives: Mapping[str, PyroELBO],
    num_repeats: int,
    options: Options,
) -> ObjectiveComparison:
    check_int("num_repeats", num_repeats, minimum=2)
    ours: dict[str, Objective] = {}
    for name, given in objectives.items():
        made = as_objective(given)
        if not isinstance(made, Objective):
            raise ArgumentError(
                "objective", "one of pvae.objectives", type(given).__name__, ["objectives.ELBO()"]
            )
        ours[name or repr(made)] = made
    with terms.prepared(pair, data, options, "gradient_noise") as evaluation:
        structure, source = evaluation.structure, evaluation.source
        batch = source.rows(torch.arange(source.num_rows, device=source.device))
        states = {}
        for name, objective in ours.items():
            objective.check(structure)
            states[name] = objective.make_state(structure, source.num_rows)
        buffers = [b for m in structure.modules for b in m.buffers(recurse=False)]
        backup = Backup(buffers)
        sums: dict[str, dict[str, Sums]] = {name: {} for name in ours}
        times: dict[str, list[float]] = {name: [] for name in ours}
        with contextlib.ExitStack() as undo:
            undo.callback(backup.restore)
            undo.enter_context(in_mode(structure.modules, training=True))
            owners = _owners(batch, structure)
            for _ in trange(
                num_repeats, desc="gradients", disable=not evaluation.progress, leave=False
            ):
                for name, objective in ours.items():
                    started = _clock(structure.device)
                    found = _gradient(batch, objective, states[name], structure)
                    times[name].append(_clock(structure.device) - started)
                    for key, g in found.items():
                        sums[name].setdefault(key, Sums(g, num_repeats)).add(g)
    first = statistics.median(next(iter(times.values())))
    results = {}
    for name, of in sums.items():
        if not of:
            raise UndefinedError("gradient noise", "a loss that depends on parameters", "none")
        moments = {key: value.moments() for key, value in of.items()}
        seconds = statistics.median(times[name])
        groups = {
            side: [key for key in moments if side in structure.sides[key]]
            for side in ("guide", "model")
        }
        sides, sites = (
            {
                name: _joined([moments[key] for key in keys if key in moments])
                for name, keys in by.items()
                if any(key in moments for key in keys)
            }
            for by in (groups, owners)
        )
        results[name] = GradientNoise(name, moments, sides, sites, seconds, seconds / first)
    return ObjectiveComparison(results)


def _gradient(
    batch: tuple[Tensor, ...], objective: Objective, state: Any, structure: Structure
) -> dict[str, Tensor]:
    """Of the loss per datum, by parameter, flat and in double precision."""
    evaluated = objective.compute_terms(structure, batch)
    loss = objective.surrogate(evaluated, state) / structure.divisor(evaluated.num_rows)
    state.measured = None
    parameters = list(structure.parameters.values())
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    rows = zip(structure.parameters, found, strict=True)
    return {name: g.detach().flatten().double() for name, g in rows if g is not None}


def _owners(batch: tuple[Tensor, ...], structure: Structure) -> dict[str, list[str]]:
    """The parameters that each site's own distribution has, given the values before it."""
    evaluated = terms.compute(structure, batch, detach=True)
    names, parameters = list(structure.parameters), list(structure.parameters.values())
    owners: dict[str, list[str]] = {}
    for name, site in evaluated.sites.items():
        for side, part in (("guide", site.log_q), ("model", site.log_p)):
            if part is None or not part.requires_grad:
                continue
            found = torch.autograd.grad(
                part.sum(), parameters, allow_unused=True, retain_graph=True
            )
            keys = [key for key, g in zip(names, found, strict=True) if g is not None]
            owners[f"{name} ({side})"] = keys
    return owners


GROUPS = 10


class Sums:
    """Of gradients and their squares: of all R, and of the present group of R / G."""

    def __init__(self, like: Tensor, num_repeats: int) -> None:
        self.size = max(2, math.ceil(num_repeats / GROUPS))
        self.whole, self.group = torch.zeros(
            2, 2, *like.shape, dtype=like.dtype, device=like.device
        )
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
    """Seconds: of the processor, or on CUDA of the clock with all work done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
