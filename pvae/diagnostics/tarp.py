"""Tests of accuracy with random points (TARP): the coverage of the joint posterior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from scipy.stats import ks_2samp
from torch import Tensor

from pvae import terms
from pvae.diagnostics.result import Finding
from pvae.diagnostics.sbc import Ranks
from pvae.diagnostics.thresholds import P_VALUE
from pvae.diagnostics.uniformity import ranked, uniformity
from pvae.errors import check_choice, check_int
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.simulate import JointDraws, draw_jointly

__all__ = ["TARP", "tarp"]


@dataclass(frozen=True, repr=False)
class TARP(Ranks):
    """Coverage of the joint posterior, in balls around reference points.

    Attributes:
        ranks: Number of the guide's draws nearer to the reference than the latent is, 0 to L,
            shape ``(S,)``.
        num_particles: L.
        names: Names of the tests' only column.
        tests: Whether the coverage is the level at all of them, as one column.
        levels: Credibility levels, shape ``(P,)``.
        coverage: How often the latent is within the ball that has so much of q, shape ``(P,)``.
        idle: Names of the dimensions that distances leave out.
    """

    idle: tuple[str, ...] = ()

    def findings(self) -> list[Finding]:
        """The test, and the coverage that is furthest from its level."""
        tests, worst = self.tests, int((self.coverage - self.levels).abs().argmax())
        level = float(self.levels[worst])
        meaning, advice = "balls around reference points cover what they should", ""
        if P_VALUE.verdict(tests.p_value) != "good":
            meaning = self._shape(float(tests.shift[0]), float(tests.spread[0]))
            advice = "diagnostics.sbc; where it finds nothing, a guide with dependence (a flow)"
        covered, error = float(self.coverage[worst]), (level * (1 - level) / len(self.ranks)) ** 0.5
        balls = f"of z in balls that hold {level:.0%} of q, furthest off"
        if self.idle:
            balls += f"; without {len(self.idle)} idle dimension(s)"
        return [
            Finding.of_test("TARP p-value", tests.p_value, meaning, advice),
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

    Distances are Euclidean, of latents divided by the standard deviation of q(z_d | x), averaged
    over x, and without idle dimensions, which would only blur them: those whose draws from q have
    the prior's distribution and, as the model's own latents, nothing to do with x. Scales and
    idleness are measured on the other simulations, so that ranks of an exact q stay uniform.

    A ball around r hardly notices that q is shifted by a part of its width, which may be towards r
    or away from it: `sbc` is for shifts.

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
        points, max_rows = others.latents, evaluation.max_rows
        weights = _weights(others, max_rows)
        if reference == "data":
            points = points[_nearest(joint.observed, others.observed, max_rows)]
        own = _distance(joint.latents, points, weights)
        drawn = joint.of_guide(num_particles)
        ranks = ranked(own, ((rows, _distance(z, points[rows], weights)) for rows, z in drawn))
    tests = uniformity(ranks[:, None], num_particles)
    idle = tuple(n for n, weight in zip(joint.names, weights.tolist(), strict=True) if not weight)
    names = ("all latents together",)
    return TARP(ranks, num_particles, names, tests, tests.points, tests.ecdf[:, 0], idle)


def _distance(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    return ((a - b).square() * weights).sum(-1)


_FEW, _ACTIVE = 8, 0.05  # draws of q, and the share of variance that an idle dimension has less of


def _weights(others: JointDraws, max_rows: int) -> Tensor:
    """One over the mean variance of q(z_d | x), and 0 for idle dimensions, ``(D,)``."""
    z = others.latents
    draws = z.new_empty(_FEW, *z.shape)
    filled = [0] * len(z)
    for rows, some in others.of_guide(_FEW):
        done = filled[rows.start]
        draws[done : done + len(some), rows] = some
        filled[rows] = [done + len(some)] * (rows.stop - rows.start)
    within, total = draws.var(0).mean(0), z.var(0)
    between = (draws.mean(0).var(0) - within / _FEW).clamp(min=0)
    neighbours = z[_nearest(others.observed, others.observed, max_rows, but_itself=True)]
    both = (z - z.mean(0)) * (neighbours - neighbours.mean(0))
    alike = both.mean(0) / total.clamp(min=1e-300)  # how much neighbours in x have in common
    pairs = zip(draws[0].T.cpu().numpy(), z.T.cpu().numpy(), strict=True)
    p_values = [ks_2samp(q, p, method="asymp").pvalue for q, p in pairs]
    is_prior = torch.tensor(p_values, device=z.device) > 0.01
    is_idle = is_prior & (between < _ACTIVE * (between + within)) & (alike < 3.5 / len(z) ** 0.5)
    within = torch.where(within > 0, within, torch.where(total > 0, total, 1.0))
    return 1 / within if bool(is_idle.all()) else torch.where(is_idle, 0.0, 1 / within)


def _nearest(x: Tensor, others: Tensor, max_rows: int, *, but_itself: bool = False) -> Tensor:
    """For each row of x, which of the others is the nearest, itself left out if it is one."""
    rows, found, start = max(1, max_rows // len(others)), [], 0
    for part in x.split(rows):
        distance = torch.cdist(part, others)
        if but_itself:
            distance.diagonal(start).fill_(torch.inf)
        found.append(distance.argmin(1))
        start += len(part)
    return torch.cat(found)
