"""Annealed importance sampling, and bidirectional Monte Carlo, which also sends chains back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Unpack

import torch
from torch import Tensor
from tqdm import tqdm

from pvae.annotations import check_fields
from pvae.bounds.density import LatentDensity, densities, groups_of, moments, spread
from pvae.bounds.hmc import Ends, Path, State, adapt, pilot_length, transition
from pvae.bounds.possible import Possible
from pvae.bounds.weights import WeightSums, require_evidence
from pvae.data import joined
from pvae.devices import double
from pvae.errors import check_choice, check_int, check_number
from pvae.estimate import Estimate, with_error
from pvae.options import Options, tool
from pvae.pair import Batch, PairLike
from pvae.terms import Evaluation, prepared

__all__ = ["AIS", "Annealed", "Sandwich", "annealed", "bdmc"]

_APART = 20  # transitions that part the chains which start from one draw of the posterior


@dataclass(frozen=True)
class AIS:
    r"""Settings of annealing from the guide, or the prior, to p(x, z) by Hamiltonian Monte Carlo.

    .. math::
        \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1})
        \left(\log p(x, z_{t-1}) - \log p_0(z_{t-1})\right), \quad
        z_t \sim T_t(\cdot | z_{t-1})

    with :math:`z_0 \sim p_0` and transitions that leave :math:`p_0^{1 - \beta_t} p^{\beta_t}`
    invariant. E[w] = p(x) exactly, as step sizes are set on chains of their own (Wu et al. adapt
    them on the same chains). Everything is in unconstrained coordinates; steps are in units of the
    standard deviations of :math:`p_0`, by datum and coordinate.

    References:
        Annealed Importance Sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017),
        https://arxiv.org/abs/1611.04273

    Arguments:
        start: The distribution that chains start from, ``"guide"`` or ``"prior"``. The prior needs
            no density of q; a good guide needs fewer temperatures. A guide that makes its latents
            of auxiliary draws, as autoguides do, is replaced by the Gaussian, in unconstrained
            coordinates, that has the moments of its draws.
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
        check_fields(self, "AIS")
        check_choice("AIS.start", self.start, ("guide", "prior"))
        check_choice("AIS.schedule", self.schedule, ("sigmoid", "linear"))
        for name in ("num_temperatures", "num_leapfrog", "num_pilot"):
            check_int(f"AIS.{name}", getattr(self, name))
        check_number("AIS.acceptance", self.acceptance, above=0, below=1)

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
    """The weights of the annealed chains of one chunk of data."""

    rows: slice  # of the data set
    forward: Tensor  # log weights of the chains that end at the posterior, (K, n)
    reverse: Tensor | None  # of the chains that start at it, where data are simulated
    acceptance: Tensor  # mean of each datum, (n,); NaN without transitions
    batch: Batch  # what the pair was called with, simulated data in the place of observed ones


def annealed(
    evaluation: Evaluation,
    ais: AIS,
    num_chains: int,
    *,
    simulate: bool = False,
    possible: Possible | None = None,
) -> Iterator[Annealed]:
    """Anneals all data, chunk by chunk, in evaluation mode.

    With ``simulate`` the data are drawn from the model, and chains are also sent the other way.
    Those of a datum start at the latents that it was drawn with, and are separated first by a few
    transitions that leave the posterior invariant. ``possible`` takes in where chains start.
    """
    inner, num_inner = ais.betas[1:-1], ais.num_temperatures - 1
    with densities(evaluation, num_chains, "annealing") as (chunks, bar):
        for rows, density in chunks:
            exact = None
            if simulate:
                density, exact = density.simulated()
            groups = groups_of(num_chains, evaluation.max_rows // density.num_rows)
            transitions = pilot_length(num_inner) + len(groups) * num_inner
            if simulate and inner:
                transitions += len(groups) * (num_inner + _APART)
            count = rows.stop - rows.start  # a chunk may be filled up
            tick = partial(_advance, bar, count / evaluation.num_rows / max(1, transitions))
            path, draw = _path(density, ais, tick)
            if possible is not None:
                of_guide = ais.start == "guide" and density.has_log_q
                of_guide &= not simulate  # some start at the posterior
                density.watch = partial(possible.take, rows, of_guide=of_guide)
            pilots = path.state(draw(ais.num_pilot))
            _, scale = spread(draw, groups[0])
            steps = adapt(path, pilots, inner, scale, ais.acceptance)
            parts = [_one_group(path, draw(k), exact, ais.betas, steps) for k in groups]
            density.watch = None
            forward, reverse, chances = zip(*parts, strict=True)
            yield Annealed(
                rows,
                torch.cat(forward)[:, :count],
                torch.cat(reverse)[:, :count] if simulate else None,
                torch.cat(chances).mean(0)[:count],
                tuple(b[:count] if isinstance(b, Tensor) else b for b in density.batch),
            )


def _advance(bar: tqdm, share: float) -> None:
    bar.update(min(share, 1 - bar.n))


def _one_group(
    path: Path, start: Tensor, exact: Tensor | None, betas: list[float], steps: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """log weights of chains there, and back from the exact draws, and their acceptance there."""
    gaps, inner = [after - before for before, after in itertools.pairwise(betas)], betas[1:-1]
    forward, chance = _anneal(path, path.state(start), gaps, inner, steps)
    if exact is None:
        return forward, forward[:0], chance
    state = path.state(exact.expand(len(start), *exact.shape[1:]))
    for step in steps[-1:] * _APART:
        state, _ = transition(path, state, 1.0, step)
    reverse, _ = _anneal(path, state, gaps[::-1], inner[::-1], steps[::-1])
    return forward, reverse, chance


def _path(
    density: LatentDensity, ais: AIS, tick: Callable[[], None]
) -> tuple[Path, Callable[[int], Tensor]]:
    """The path from the guide or the prior, and how its start is drawn from."""
    from_guide = ais.start == "guide"
    if from_guide:
        density.structure.require_density("annealing from the guide")
    has_moments = from_guide and not density.has_log_q
    gaussian = moments(density.from_guide, density.num_dims) if has_moments else None

    def ends(u: Tensor) -> Ends:
        terms, log_det = density.terms(u), density.log_det(u)
        end = terms.log_joint + log_det
        if gaussian is not None:
            return gaussian.log_prob(u), end
        return (terms.log_q if from_guide else terms.log_prior) + log_det, end

    path = Path(ends, ais.num_leapfrog, tick)
    if gaussian is not None:
        return path, lambda count: gaussian.sample((count,))
    return path, density.from_guide if from_guide else density.from_prior


def _anneal(
    path: Path, state: State, gaps: list[float], betas: list[float], steps: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """log weights of chains, and the acceptance of each (NaN without transitions), ``(K, N)``."""
    log_weight = gaps[0] * state.log_ratio
    total = torch.zeros_like(log_weight)
    for gap, beta, step in zip(gaps[1:], betas, steps, strict=True):
        state, chance = transition(path, state, beta, step)
        log_weight = log_weight + gap * state.log_ratio
        total = total + double(chance)
    return log_weight, total / len(betas) if betas else total * math.nan


@dataclass(frozen=True, repr=False)
class Sandwich:
    """Both bounds of the evidence of simulated data.

    Attributes:
        lower: The estimate from chains that end at the posterior.
        upper: The estimate from chains that start at a draw of the posterior. All chains of a
            datum start at the same draw: the error over draws isn't known, that over data has it.
        batch: The simulated data, and what the model was given beside them.
    """

    lower: Estimate
    upper: Estimate
    batch: tuple[Tensor, ...]

    @property
    def gap(self) -> Estimate:
        """Upper minus lower: on average the sum of what both bounds are off by.

        By chance one datum's may be below 0. The error over data has that of all draws in it.
        """
        return (self.upper - self.lower).named("gap")

    def __str__(self) -> str:
        low, method = self.lower, self.lower.name.split(", ")[-1]
        shown = [with_error(bound.mean, bound.se_data) for bound in (low, self.upper, self.gap)]
        wrong = "".join(f"\n  impossible: {reason}" for reason in low.reasons)
        return (
            f"BDMC, {method}, on {low.num_data} simulated data, K = {low.num_particles}\n"
            f"  lower: {shown[0]} nats per datum\n"
            f"  upper: {shown[1]}\n"
            f"  gap:   {shown[2]}, which bounds the bias of both on\n"
            f"  average; on real data only as far as they are like the model's own{wrong}"
        )

    __repr__ = __str__


@tool
def bdmc(
    pair: PairLike,
    data: object,
    num_particles: int = 16,
    *,
    ais: AIS | None = None,
    **options: Unpack[Options],
) -> Sandwich:
    r"""A lower and an upper bound of the evidence of data that are drawn from the model.

    Each datum is drawn together with its latents, which are a draw from its exact posterior. From
    there chains are sent back along the way that `AIS` has come, with the same transitions:

    .. math::
        E[\log \bar w] \le E[\log p(x)] \le E\left[-\log \tfrac1K \sum_k 1 / w_k'\right]

    with :math:`w'` the weights of the chains that are sent back. The gap between the bounds is, on
    average over data of this kind, at least what AIS with these settings misses of log p(x).

    References:
        Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse et al., 2015),
        https://arxiv.org/abs/1511.02543
        Measuring the Reliability of MCMC Inference with Bidirectional Monte Carlo
        (Grosse et al., 2016), https://arxiv.org/abs/1606.02275

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source: one datum is simulated for each
            row, with what the model doesn't observe of it (labels).
        num_particles: K, chains for each datum, there and back.
        ais: Settings of the annealing; None for the defaults of `AIS`.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: As `evidence`; and if the model has factors, or observes anything but a
            tensor of the batch as it is.

    Example:
        >>> pair, x = pvae.recipes.vae(64, 2), torch.zeros(3, 64)
        >>> found = bdmc(pair, x, 8, ais=AIS(num_temperatures=3), progress=False)
        >>> found.gap.values.shape
        torch.Size([3])
    """
    k, how = check_int("num_particles", num_particles), ais or AIS()
    with prepared(pair, data, options, "bdmc") as evaluation:
        structure = evaluation.structure
        require_evidence(structure, "simulated data", by_datum=False, density=False)
        forward, reverse, acceptance, batches = WeightSums(), WeightSums(), [], []
        possible = Possible(structure)
        for chunk in annealed(evaluation, how, k, simulate=True, possible=possible):
            assert chunk.reverse is not None  # noqa: S101
            forward.add(chunk.rows, forward.reduce(chunk.forward))
            reverse.add(chunk.rows, reverse.reduce(-chunk.reverse))
            acceptance.append(chunk.acceptance)
            batches.append(chunk.batch)
    name = f"evidence of simulated data, AIS-{how.num_temperatures}"
    lower = replace(
        forward.estimate(name, k, structure), kind="lower", acceptance=torch.cat(acceptance)
    )
    inverse = reverse.estimate(f"{name} reversed", k, structure)
    upper = replace(inverse, values=-inverse.values, variances=None, kind="upper")
    lower = possible.mark(lower, is_limited=possible.has_one_limit)
    upper = possible.mark(upper, is_limited=False)
    return Sandwich(lower, upper, joined(batches, structure.axes))
