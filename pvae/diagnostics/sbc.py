"""Whether a guide's draws are as likely as they look, dimension by dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from pvae import terms
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import P_VALUE
from pvae.diagnostics.uniformity import Uniformity, uniformity
from pvae.errors import ArgumentError, check_int, check_number
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.simulate import JointDraws, draw_jointly, random_rank

__all__ = ["SBC", "ranks_among_draws", "sbc"]


@dataclass(frozen=True, repr=False)
class SBC(Result):
    r"""Ranks of simulated latents among the guide's draws.

    Attributes:
        ranks: Number of the guide's draws below the latent, 0 to L, shape ``(S, D)``.
        num_particles: L.
        names: Of the D dimensions.
        tests: Whether ranks are uniform.
        levels: What central intervals should cover, shape ``(C,)``. Their ends are draws, so that
            these are the nearest multiples of 2 / (L + 1) to what was asked for.
        coverage: What they do cover, shape ``(C, D)``.
        coverage_se: Its binomial standard error.
    """

    ranks: Tensor
    num_particles: int
    names: tuple[str, ...]
    tests: Uniformity
    levels: Tensor
    coverage: Tensor
    coverage_se: Tensor

    def pit(self, seed: int = 0) -> Tensor:
        """Ranks as numbers that are uniform on (0, 1) if q is exact, shape ``(S, D)``.

        Their place within a rank is random. For ArviZ's ``plot_ecdf_pit``, in a group
        ``prior_sbc`` of one chain and S draws: ``{"z": result.pit()[None].numpy()}``.
        """
        generator = torch.Generator().manual_seed(seed)
        place = torch.rand(self.ranks.shape, generator=generator, dtype=torch.float64)
        return (self.ranks.cpu() + place) / (self.num_particles + 1)

    def shape_of(self, column: int) -> str:
        """What the ranks of a dimension say about q, in words."""
        shift, spread = float(self.tests.shift[column]), float(self.tests.spread[column])
        if max(abs(shift), abs(spread)) < 3:
            return "the shape of q is off"
        if abs(spread) >= abs(shift):
            return "q is too narrow" if spread > 0 else "q is too wide"
        return "q is too low" if shift > 0 else "q is too high"

    @property
    def title(self) -> str:
        """How much was simulated."""
        return f"SBC: {len(self.ranks)} simulations, {self.num_particles} draws of q each"

    def findings(self) -> list[Finding]:
        """Uniformity over all dimensions, and the coverage that is furthest off."""
        tests, count = self.tests, len(self.names)
        verdict = P_VALUE.verdict(tests.p_value)
        meaning, advice = f"the ranks of {count} dimension(s) are as an exact q's", ""
        if verdict != "good":
            bad = int((tests.p_values < 0.05).sum())
            worst = f"{self.names[tests.worst]}: {self.shape_of(tests.worst)}"
            meaning = f"{worst}; {bad} of {count} dimensions are off"
            advice = "a richer guide or encoder; train it longer"
        off = (self.coverage - self.levels[:, None]).abs() / self.coverage_se.clamp(min=1e-12)
        level, column = divmod(int(off.argmax()), count)
        covered = float(self.coverage[level, column]), float(self.coverage_se[level, column])
        interval = f"{float(self.levels[level]):.0%} of q({self.names[column]} | x)"
        return [
            Finding("SBC p-value", tests.p_value, None, "", verdict, meaning, advice),
            Finding("coverage", *covered, meaning=f"of z in the central {interval}, furthest off"),
        ]


@tool
def sbc(
    pair: PairLike,
    data: object,
    *,
    num_simulations: int = 1000,
    num_particles: int = 99,
    levels: Sequence[float] = (0.5, 0.8, 0.9),
    site: str | None = None,
    arguments: Mapping[str, int] | None = None,
    **options: Unpack[Options],
) -> SBC:
    r"""Simulation-based calibration of an amortised guide.

    Draws :math:`z, x \sim p(z) p(x | z)` from the model itself, and the rank of each entry of z
    among L draws of :math:`q(z | x)`. If q is the model's posterior, ranks are uniform on
    0, ..., L, for any model. The guide isn't fitted again. That ranks are uniform doesn't show
    that q is exact: the prior in q's place passes, and so does a q whose dimensions should be
    correlated and aren't; `tarp` is for these.

    The question is whether q inverts the model, not whether the model fits the data. Of the data,
    the context alone is used (labels and whatever else isn't observed), a random row a simulation.
    Values that are equal, as of discrete latents, are ranked by chance.

    Ranks are tested by chi-squared over bins and by their distribution function with its
    simultaneous band. p-values are corrected for both tests and all D dimensions (Bonferroni); the
    verdict is "look" up to 0.05 and "bad" up to 0.001, which is how often an exact q gets it.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration
        (Talts et al., 2018), https://arxiv.org/abs/1804.06788

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_simulations: S.
        num_particles: L, draws of q for each; L + 1 with many divisors makes even bins.
        levels: Of central intervals, whose coverage is counted.
        site: The latent; None for all of them.
        arguments: By observed site, the place of its data among the arguments; needed where the
            model changes its data before it observes them.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: If a latent has a point-mass guide, an improper prior or a mask, if there
            are latents outside the data plate, or the model has factors.
        PairError: If x can't be put back into the batch.

    Example:
        >>> vae = pvae.recipes.vae(4, 1, hidden=(8,))
        >>> result = sbc(vae, torch.zeros(1, 4), num_simulations=100, num_particles=9)
        >>> result.ranks.shape, result.levels
        (torch.Size([100, 1]), tensor([0.6000, 0.8000], dtype=torch.float64))
    """
    check_int("num_particles", num_particles, minimum=2)
    cuts = _cuts(levels, num_particles)
    with terms.prepared(pair, data, options, "sbc") as evaluation:
        joint = draw_jointly("sbc", evaluation, num_simulations, site=site, arguments=arguments)
        ranks = ranks_among_draws(joint, num_particles, lambda latents, _: latents)
    inside = torch.stack([(ranks >= a) & (ranks <= num_particles - a) for a in cuts]).double()
    coverage = inside.mean(1).cpu()
    nominal = 1 - 2 * torch.tensor(cuts, dtype=torch.float64) / (num_particles + 1)
    error = (nominal * (1 - nominal) / len(ranks)).sqrt()[:, None].expand_as(coverage)
    tests = uniformity(ranks, num_particles)
    return SBC(ranks, num_particles, joint.names, tests, nominal, coverage, error)


def ranks_among_draws(
    joint: JointDraws, num_particles: int, measure: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """How many of the guide's draws measure less than the simulated latents; ties by chance."""
    own = measure(joint.latents, slice(None))
    less = torch.zeros(own.shape, dtype=torch.long, device=own.device)
    equal = less.clone()
    for rows, draws in joint.of_guide(num_particles):
        each = measure(draws, rows)
        less[rows] += (each < own[rows]).sum(0)
        equal[rows] += (each == own[rows]).sum(0)
    return random_rank(less, equal)


def _cuts(levels: Sequence[float], num_particles: int) -> list[int]:
    """How many ranks a central interval leaves out on each side."""
    if not len(levels):
        raise ArgumentError("levels", "at least one", "none")
    for level in levels:
        check_number("levels", level, above=0, below=1)
    cuts = [round((1 - level) / 2 * (num_particles + 1)) for level in levels]
    return sorted({max(1, min(a, num_particles // 2)) for a in cuts}, reverse=True)
