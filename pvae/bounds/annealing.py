"""Annealed importance sampling, and its reverse from draws of the posterior."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from pvae.bounds.density import LatentDensity, densities, spread
from pvae.bounds.hmc import Ends, Path, State, adapt, pilot_length, transition
from pvae.errors import ArgumentError, check_choice, check_int, check_number
from pvae.pair import Batch
from pvae.terms import Evaluation

__all__ = ["AIS", "Annealed", "annealed"]


_APART = 20  # transitions that part the chains which start from one draw of the posterior


@dataclass(frozen=True)
class AIS:
    r"""Settings of annealing from the guide, or the prior, to p(x, z) by Hamiltonian Monte Carlo.

    .. math::
        \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1})
        \left(\log p(x, z_{t-1}) - \log p_0(z_{t-1})\right), \quad
        z_t \sim T_t(\cdot | z_{t-1})

    with :math:`z_0 \sim p_0` and transitions that leave :math:`p_0^{1 - \beta_t} p^{\beta_t}`
    invariant. E[w] = p(x) exactly, as step sizes are found on chains of their own and are then
    kept (Wu et al. adapt them on the same chains). Everything is in unconstrained coordinates;
    steps are in units of the standard deviations of :math:`p_0`, by datum and coordinate.

    References:
        Annealed Importance Sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017),
        https://arxiv.org/abs/1611.04273

    Arguments:
        start: The distribution that chains start from, ``"guide"`` or ``"prior"``. The prior needs
            no density of q; a good guide needs fewer temperatures.
        num_temperatures: T, the number of steps from the start to the posterior.
        schedule: ``"sigmoid"``, whose temperatures are denser at both ends, or ``"linear"``.
        num_leapfrog: Number of leapfrog steps of a trajectory; each takes one gradient.
        acceptance: Mean probability of acceptance that step sizes are set for.
        num_pilot: Number of chains of each datum by which step sizes are set.

    Example:
        >>> AIS(num_temperatures=4, schedule="linear").betas
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    start: Literal["guide", "prior"] = "guide"
    num_temperatures: int = 100
    schedule: Literal["sigmoid", "linear"] = "sigmoid"
    num_leapfrog: int = 10
    acceptance: float = 0.65
    num_pilot: int = 4

    def __post_init__(self) -> None:
        check_choice("AIS: start", self.start, ("guide", "prior"))
        check_choice("AIS: schedule", self.schedule, ("sigmoid", "linear"))
        for name in ("num_temperatures", "num_leapfrog", "num_pilot"):
            check_int(f"AIS: {name}", getattr(self, name))
        if check_number("AIS: acceptance", self.acceptance, above=0) >= 1:
            raise ArgumentError("AIS: acceptance", "a number below 1", f"{self.acceptance}")

    @property
    def betas(self) -> list[float]:
        """The T + 1 places on the path."""
        betas = torch.linspace(0, 1, self.num_temperatures + 1, dtype=torch.float64)
        if self.schedule == "sigmoid":
            raw = torch.sigmoid(4 * (2 * betas - 1))
            betas = (raw - raw[0]) / (raw[-1] - raw[0])
        return betas.tolist()


@dataclass(frozen=True)
class Annealed:
    """The weights of the annealed chains of one chunk of data.

    Attributes:
        rows: Rows of the data set that the chunk has.
        forward: log weights of the chains that end at the posterior, ``(K, n)``.
        reverse: log weights of the chains that start at the posterior, or None.
        acceptance: Mean probability of acceptance of each datum, ``(n,)``; NaN with one
            temperature, which has no transitions.
        batch: The batch that the pair was called with, observed data replaced by simulated ones if
            there are any.
    """

    rows: slice
    forward: Tensor
    reverse: Tensor | None
    acceptance: Tensor
    batch: Batch


def annealed(
    evaluation: Evaluation, ais: AIS, num_chains: int, *, simulate: bool = False
) -> Iterator[Annealed]:
    """Anneals all data, chunk by chunk, in evaluation mode.

    With ``simulate`` the data are drawn from the model, and chains are also sent the other way,
    from the posterior. Those of a datum start at the latents that it was drawn with, and are
    separated first by a few transitions that leave the posterior invariant.
    """
    with densities(evaluation, num_chains, "annealing") as (chunks, bar):
        for rows, density in chunks:
            exact = None
            if simulate:
                density, exact = density.simulated()
            share = (rows.stop - rows.start) / evaluation.num_rows
            yield _chunk(rows, density, exact, ais, num_chains, evaluation.max_rows, bar, share)


def _chunk(
    rows: slice,
    density: LatentDensity,
    exact: Tensor | None,
    ais: AIS,
    num_chains: int,
    max_rows: int,
    bar: tqdm,
    share: float,
) -> Annealed:
    betas = ais.betas
    inner = betas[1:-1]
    gaps = [after - before for before, after in itertools.pairwise(betas)]
    at_once = max(1, min(num_chains, max_rows // density.num_rows))
    groups = [min(at_once, num_chains - done) for done in range(0, num_chains, at_once)]
    transitions = pilot_length(len(inner)) + len(groups) * len(inner)
    if exact is not None and inner:
        transitions += len(groups) * (len(inner) + _APART)
    path, draw = _path(density, ais, lambda: bar.update(min(share / transitions, 1 - bar.n)))
    pilots = path.state(draw(ais.num_pilot))
    _, scale = spread(draw, at_once)
    steps = adapt(path, pilots, inner, scale, ais.acceptance)
    forward, reverse, chances = [], [], []
    for k in groups:
        log_weight, chance = _anneal(path, path.state(draw(k)), gaps, inner, steps)
        forward.append(log_weight)
        chances.append(chance * k)
        if exact is not None:
            start = path.state(exact.expand(k, *exact.shape[1:]))
            for step in steps[-1:] * _APART:
                start, _ = transition(path, start, 1.0, step)
            log_weight, _ = _anneal(path, start, gaps[::-1], inner[::-1], steps[::-1])
            reverse.append(log_weight)
    count = rows.stop - rows.start  # a chunk may be filled up
    return Annealed(
        rows,
        torch.cat(forward)[:, :count],
        torch.cat(reverse)[:, :count] if reverse else None,
        (torch.stack(chances).sum(0) / num_chains)[:count],
        tuple(b[:count] if isinstance(b, Tensor) else b for b in density.batch),
    )


def _path(
    density: LatentDensity, ais: AIS, tick: Callable[[], None]
) -> tuple[Path, Callable[[int], Tensor]]:
    """The path from the guide or the prior, and how its start is drawn from."""
    from_guide = ais.start == "guide"
    if from_guide:
        density.require_guide("annealing from the guide")

    def ends(u: Tensor) -> Ends:
        terms, log_det = density.terms(u), density.log_det(u)
        start = terms.log_q if from_guide else terms.log_prior
        return start + log_det, terms.log_joint + log_det

    path = Path(ends, ais.num_leapfrog, tick)
    return path, density.from_guide if from_guide else density.from_prior


def _anneal(
    path: Path, state: State, gaps: list[float], betas: list[float], steps: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """log weights of chains, ``(K, N)``, and their mean acceptance, ``(N,)``."""
    log_weight = gaps[0] * state.log_ratio
    total = torch.zeros_like(log_weight[0])
    for gap, beta, step in zip(gaps[1:], betas, steps, strict=True):
        state, chance = transition(path, state, beta, step)
        log_weight = log_weight + gap * state.log_ratio
        total = total + chance.mean(0)
    return log_weight, total / len(betas) if betas else total * math.nan
