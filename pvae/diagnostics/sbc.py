"""Whether a guide's draws are as likely as they look: SBC by dimension, TARP jointly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from torch import Tensor

from pvae import terms
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import P_VALUE
from pvae.diagnostics.uniformity import Uniformity, ranked, uniformity
from pvae.errors import ArgumentError, check_choice, check_int, check_number
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.simulate import JointDraws, draw_jointly

__all__ = ["SBC", "TARP", "sbc", "tarp"]


@dataclass(frozen=True, repr=False)
class _Ranks(Result):
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
class SBC(_Ranks):
    r"""Ranks of simulated latents among the guide's draws.

    Attributes:
        ranks: Number of the guide's draws below the latent, 0 to L, shape ``(S, D)``.
        num_particles: L.
        names: Names of the D dimensions.
        tests: Whether ranks are uniform.
        levels: What central intervals should cover, shape ``(C,)``. Their ends are draws, so that
            these are the nearest multiples of 2 / (L + 1) to what was asked for.
        coverage: What they do cover, shape ``(C, D)``.
        coverage_se: Its binomial standard error.
    """

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

    def findings(self) -> list[Finding]:
        """Uniformity over all dimensions, and the coverage that is furthest off."""
        tests, count = self.tests, len(self.names)
        verdict = P_VALUE.verdict(tests.p_value)
        meaning, advice = f"the ranks of {count} dimension(s) are as an exact q's", ""
        if verdict != "good":
            bad = int((tests.p_values <= P_VALUE.look).sum())
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


@dataclass(frozen=True, repr=False)
class TARP(_Ranks):
    """Coverage of the joint posterior, in balls around reference points.

    Attributes:
        ranks: Number of the guide's draws nearer to the reference than the latent is, 0 to L,
            shape ``(S,)``.
        num_particles: L.
        names: Names of the tests' only column.
        tests: Whether the coverage is the level at all of them, as one column.
        levels: Credibility levels, shape ``(P,)``.
        coverage: How often the latent is within the ball that has so much of q, shape ``(P,)``.
    """

    def findings(self) -> list[Finding]:
        """The test, and the coverage that is furthest from its level."""
        tests, worst = self.tests, int((self.coverage - self.levels).abs().argmax())
        verdict, level = P_VALUE.verdict(tests.p_value), float(self.levels[worst])
        meaning, advice = "balls around reference points cover what they should", ""
        if verdict != "good":
            meaning = self._shape(float(tests.shift[0]), float(tests.spread[0]))
            advice = "diagnostics.sbc; where it finds nothing, a guide with dependence (a flow)"
        covered, error = float(self.coverage[worst]), (level * (1 - level) / len(self.ranks)) ** 0.5
        balls = f"of z in balls that hold {level:.0%} of q, furthest off"
        return [
            Finding("TARP p-value", tests.p_value, None, "", verdict, meaning, advice),
            Finding("joint coverage", covered, error, meaning=balls),
        ]

    @staticmethod
    def _shape(shift: float, spread: float) -> str:
        if abs(shift) > max(3, abs(spread)):
            return "q is too narrow, or off" if shift > 0 else "q is too wide"
        if abs(spread) > 3:
            return f"q is too {'narrow' if spread > 0 else 'wide'}, in some directions at least"
        return "q and the posterior differ, perhaps in how dimensions depend on each other"


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
        levels: Levels of central intervals, whose coverage is counted.
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
        ranks = ranked(joint.latents, joint.of_guide(num_particles))
    inside = torch.stack([(ranks >= a) & (ranks <= num_particles - a) for a in cuts]).double()
    coverage = inside.mean(1).cpu()
    nominal = 1 - 2 * torch.tensor(cuts, dtype=torch.float64) / (num_particles + 1)
    error = (nominal * (1 - nominal) / len(ranks)).sqrt()[:, None].expand_as(coverage)
    tests = uniformity(ranks, num_particles)
    return SBC(ranks, num_particles, joint.names, tests, nominal, coverage, error)


def _cuts(levels: Sequence[float], num_particles: int) -> list[int]:
    """How many ranks a central interval leaves out on each side."""
    if not len(levels):
        raise ArgumentError("levels", "at least one", "none")
    for level in levels:
        check_number("levels", level, above=0, below=1)
    cuts = [round((1 - level) / 2 * (num_particles + 1)) for level in levels]
    return sorted({max(1, min(a, num_particles // 2)) for a in cuts}, reverse=True)


@tool
def tarp(
    pair: PairLike,
    data: object,
    *,
    num_simulations: int = 1000,
    num_particles: int = 99,
    reference: Literal["data", "prior"] = "data",
    site: str | None = None,
    arguments: Mapping[str, int] | None = None,
    **options: Unpack[Options],
) -> TARP:
    r"""Tests of accuracy with random points: expected coverage of the joint posterior.

    For :math:`z, x \sim p(z) p(x | z)` from the model, a reference point r and L draws
    :math:`z_l \sim q(z | x)`, it counts how many draws are nearer to r than z is. If q is the
    model's posterior, this rank is uniform, whatever r is, as long as z and r are independent
    given x. If it is uniform for every r that may depend on x, q is the posterior; so the
    reference matters for what is found, never for how often an exact q is blamed.

    - ``"data"``: r is the latent of another, independent simulation, the one whose x is nearest.
      It depends on x, so that a guide that ignores x is found.
    - ``"prior"``: r is any other latent of the model. The prior in q's place then passes.

    Distances are Euclidean, of latents divided by their standard deviations under the model.

    References:
        Sampling-Based Accuracy Testing of Posterior Estimators for General Inference
        (Lemos et al., 2023), https://arxiv.org/abs/2302.03026

    Arguments:
        pair: A model and its guide.
        data: As in `sbc`.
        num_simulations: S; as many again are made for reference points.
        num_particles: L, draws of q for each.
        reference: Where reference points come from.
        site: The latent; None for all of them together.
        arguments: As in `sbc`.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: As in `sbc`.
        PairError: If x can't be put back into the batch.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> tarp(vae, torch.zeros(1, 4), num_simulations=50, num_particles=9).ranks.shape
        torch.Size([50])
    """
    check_int("num_particles", num_particles, minimum=2)
    check_choice("reference", reference, ("data", "prior"))
    with terms.prepared(pair, data, options, "tarp") as evaluation:
        joint, others = (
            draw_jointly("tarp", evaluation, num_simulations, site=site, arguments=arguments)
            for _ in range(2)
        )
        scale = others.latents.std(0)
        scale = torch.where(scale > 0, scale, 1.0)
        points = others.latents
        if reference == "data":
            points = points[_nearest(joint, others, evaluation.max_rows)]
        own = _distance(joint.latents, points, scale)
        drawn = joint.of_guide(num_particles)
        ranks = ranked(own, ((rows, _distance(z, points[rows], scale)) for rows, z in drawn))
    tests = uniformity(ranks[:, None], num_particles)
    names = ("all latents together",)
    return TARP(ranks, num_particles, names, tests, tests.points, tests.ecdf[:, 0])


def _distance(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return ((a - b) / scale).square().sum(-1)


def _nearest(joint: JointDraws, others: JointDraws, max_rows: int) -> Tensor:
    """For each simulation, which of the others has the nearest data."""
    rows = max(1, max_rows // len(others.observed))
    parts = [torch.cdist(x, others.observed).argmin(1) for x in joint.observed.split(rows)]
    return torch.cat(parts)
