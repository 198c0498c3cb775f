"""Whether a guide's draws are as likely as they look: ranks by dimension, and jointly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor

from pvae import terms
from pvae.devices import double
from pvae.diagnostics.refits import Refit, ranks_of_refits
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import P_VALUE
from pvae.diagnostics.uniformity import Uniformity, ranked, uniformity
from pvae.errors import ArgumentError, check_int, check_number
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.simulate import draw_jointly

__all__ = ["SBC", "Ranks", "sbc"]


@dataclass(frozen=True, repr=False)
class Ranks(Result):
    """What both tests of ranks have."""

    ranks: Tensor
    num_particles: int
    names: tuple[str, ...]
    tests: Uniformity
    levels: Tensor
    coverage: Tensor

    @property
    def title(self) -> str:
        """How much was simulated."""
        name, size = type(self).__name__, len(self.ranks)
        return f"{name}: {size} simulations, {self.num_particles} draws of q each"


@dataclass(frozen=True, repr=False)
class SBC(Ranks):
    r"""Ranks of simulated latents among the guide's draws.

    Attributes:
        ranks: Number of the guide's draws below the latent, 0 to L, shape ``(S, D)``.
        num_particles: L.
        names: Names of the D dimensions.
        tests: Whether ranks are uniform.
        joint_ranks: Ranks of (z, x) among (z', x) with the guide's draws z', by `quantity`,
            shape ``(S,)``; None where one site of several is looked at.
        joint: Whether these are uniform, as one column.
        quantity: By what number pairs are ranked: log p(x, z) - log q(z | x); or log p(x, z), where
            log q of a given z isn't known.
        levels: What central intervals should cover, shape ``(C,)``. Their ends are draws, so that
            these are the nearest multiples of 2 / (L + 1) to what was asked for.
        coverage: What they do cover, shape ``(C, D)``.
        coverage_se: Its binomial standard error.
    """

    coverage_se: Tensor
    joint_ranks: Tensor | None = None
    joint: Uniformity | None = None
    quantity: str = ""
    refits: int | None = None  # how many there were to be, of guides fitted to each simulation

    @property
    def notes(self) -> tuple[str, ...]:
        """Whether guides were fitted anew, and to how many."""
        if self.refits is None:
            return ()
        early = f", interrupted before all {self.refits}" if len(self.ranks) < self.refits else ""
        return (f"a fresh guide was fitted to each simulated data set{early}",)

    @property
    def p_value(self) -> float:
        """That q is exact: the lesser p-value of both tests, times their number."""
        p_values = [test.p_value for test in (self.tests, self.joint) if test is not None]
        return min(1.0, len(p_values) * min(p_values))

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

    def findings(self) -> list[Finding]:
        """Uniformity by dimension and jointly, and the coverage that is furthest off."""
        tests, count = self.tests, len(self.names)
        several = 1 + (self.joint is not None)
        p_value, advice = min(1.0, several * tests.p_value), ""
        meaning = f"the ranks of {count} dimension(s) are as an exact q's"
        if P_VALUE.verdict(p_value) != "good":
            bad = int((tests.p_values <= P_VALUE.look).sum())
            worst = f"{self.names[tests.worst]}: {self.shape_of(tests.worst)}"
            meaning = f"{worst}; {bad} of {count} dimensions are off"
            advice = _ADVICE
        off = (self.coverage - self.levels[:, None]).abs() / self.coverage_se.clamp(min=1e-12)
        level, column = divmod(int(off.argmax()), count)
        covered = float(self.coverage[level, column]), float(self.coverage_se[level, column])
        interval = f"{float(self.levels[level]):.0%} of q({self.names[column]} | x)"
        return [
            Finding.of_test("SBC p-value", p_value, meaning, advice),
            *self._joint_finding(several),
            Finding("coverage", *covered, meaning=f"of z in the central {interval}, furthest off"),
        ]

    def _joint_finding(self, several: int) -> list[Finding]:
        if self.joint is None:
            return []
        p_value, advice = min(1.0, several * self.joint.p_value), ""
        meaning = f"the ranks by {self.quantity} are as an exact q's"
        if P_VALUE.verdict(p_value) != "good":
            meaning = "draws of q can be told from the posterior's"
            advice = _ADVICE
            if P_VALUE.verdict(min(1.0, several * self.tests.p_value)) == "good":
                meaning += ", perhaps by how dimensions depend on each other"
                advice = "a guide with dependence (a flow): diagnostics.gap says what that gains"
        return [Finding.of_test("joint SBC p-value", p_value, meaning, advice)]


_ADVICE = "a richer guide or encoder: diagnostics.gap says which"


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
    refits: int | None = None,
    refit: Refit | None = None,
    **options: Unpack[Options],
) -> SBC:
    r"""Simulation-based calibration of an amortised guide, or of one that is fitted again.

    Draws :math:`z, x \sim p(z) p(x | z)` from the model itself, and the rank of each entry of z
    among L draws of :math:`q(z | x)`. If q is the model's posterior, ranks are uniform on
    0, ..., L, for any model. The guide isn't fitted again. Ranks of single dimensions don't show
    that q is exact: the prior in q's place has uniform ones, and so has a q whose dimensions should
    be correlated and aren't. So pairs (z, x) are ranked, too, among the draws with the same x, by

    .. math:: \log p(x, z) - \log q(z | x)

    which is constant for an exact q, and for any other larger at draws of the posterior than at
    those of q. Of all test quantities this tells the two apart best, and idle dimensions don't
    enter it. Where log q of a given z isn't known (auxiliary sites, a flow without an inverse) it
    is log p(x, z).

    The question is whether q inverts the model, not whether the model fits the data. Of the data,
    the context alone is used (labels and whatever else isn't observed), a random row a simulation.
    Values that are equal, as of discrete latents, are ranked by chance.

    A guide of latents that all data share belongs to its data set. With ``refits=R`` a fresh copy
    of it is fitted to each of R data sets from the model, and what these share is ranked among the
    copy's draws; the parameters of the model stay. It tests guide and fit together, and R is what
    limits it: of guides half as wide as they should be, 20 find eight in ten ("look"), and 60 all.

    Ranks are tested by chi-squared over bins and by their distribution function with its
    simultaneous band. p-values are corrected for both tests and all D dimensions, those of the
    findings for both kinds of ranks, too (Bonferroni); the verdict is "look" up to 0.05 and "bad"
    up to 0.001, which is how often an exact q gets it.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration
        (Talts et al., 2018), https://arxiv.org/abs/1804.06788

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_simulations: S.
        num_particles: L, draws of q for each; L + 1 with many divisors makes even bins.
        levels: Levels of central intervals, whose coverage is counted.
        site: The latent; None for all of them.
        arguments: By observed site, the place of its data among the arguments; needed where the
            model changes its data before it observes them.
        refits: R, data sets to which the guide is fitted again, at least 10; None for one guide.
            An interruption ends it early, with those that there are.
        refit: How: ``lambda pair, x: pvae.fit(pair, x, epochs=500)``, which trains the model's
            parameters, too (these are put back); None for 1,000 steps of Adam on the guide's
            alone, seconds a data set.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: If a latent has a point-mass guide, an improper prior or a mask, if there
            are latents outside the data plate without refits, or none with them, or the model has
            factors.
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
        if refits is not None:
            found = ranks_of_refits(evaluation, refits, refit, num_particles, site, arguments)
            return _of_ranks(found.ranks, num_particles, found.names, cuts, refits=refits)
        scored = site is None or evaluation.structure.latents == (site,)
        drawn = draw_jointly(
            "sbc", evaluation, num_simulations, site=site, arguments=arguments, scored=scored
        )
        own = drawn.latents
        if drawn.scores is not None:
            own = torch.cat([own, drawn.scores[:, None]], 1)
        ranks = ranked(own, drawn.of_guide(num_particles))
    result = _of_ranks(ranks[:, : len(drawn.names)], num_particles, drawn.names, cuts)
    if drawn.score is None or not scored:
        return result
    joint = uniformity(ranks[:, -1:], num_particles)
    return replace(result, joint_ranks=ranks[:, -1], joint=joint, quantity=drawn.score.name)


def _of_ranks(
    ranks: Tensor,
    num_particles: int,
    names: tuple[str, ...],
    cuts: list[int],
    refits: int | None = None,
) -> SBC:
    """Tests and coverage of ranks ``(S, D)``."""
    inside = double(torch.stack([(ranks >= a) & (ranks <= num_particles - a) for a in cuts]))
    coverage = inside.mean(1).cpu()
    nominal = 1 - 2 * torch.tensor(cuts, dtype=torch.float64) / (num_particles + 1)
    error = (nominal * (1 - nominal) / len(ranks)).sqrt()[:, None].expand_as(coverage)
    tests = uniformity(ranks, num_particles)
    return SBC(ranks, num_particles, names, tests, nominal, coverage, error, refits=refits)


def _cuts(levels: Sequence[float], num_particles: int) -> list[int]:
    """How many ranks a central interval leaves out on each side."""
    if not len(levels):
        raise ArgumentError("levels", "at least one", "none", ["levels=(0.5, 0.9)"])
    for level in levels:
        check_number("levels", level, above=0, below=1)
    cuts = [round((1 - level) / 2 * (num_particles + 1)) for level in levels]
    return sorted({max(1, min(a, num_particles // 2)) for a in cuts}, reverse=True)
