"""Whether a guide's draws are as likely as they look, all dimensions together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Unpack

import torch
from torch import Tensor

from pvae import terms
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.sbc import ranks_among_draws
from pvae.diagnostics.thresholds import P_VALUE
from pvae.diagnostics.uniformity import Uniformity, uniformity
from pvae.errors import check_choice, check_int
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.simulate import JointDraws, draw_jointly

__all__ = ["TARP", "tarp"]


@dataclass(frozen=True, repr=False)
class TARP(Result):
    """Coverage of the joint posterior, in balls around reference points.

    Attributes:
        ranks: Number of the guide's draws nearer to the reference than the latent is, 0 to L,
            shape ``(S,)``.
        num_particles: L.
        levels: Credibility levels, shape ``(P,)``.
        coverage: How often the latent is within the ball that has so much of q, shape ``(P,)``.
        tests: Whether the coverage is the level at all of them, as one column.
    """

    ranks: Tensor
    num_particles: int
    levels: Tensor
    coverage: Tensor
    tests: Uniformity

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tests' only column."""
        return ("all latents together",)

    @property
    def title(self) -> str:
        """How much was simulated."""
        return f"TARP: {len(self.ranks)} simulations, {self.num_particles} draws of q each"

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
        data: An array, tensor, tuple of them, data set or source; see `sbc`.
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
        ranks = ranks_among_draws(
            joint, num_particles, lambda z, rows: ((z - points[rows]) / scale).square().sum(-1)
        )
    tests = uniformity(ranks[:, None], num_particles)
    return TARP(ranks, num_particles, tests.points, tests.ecdf[:, 0], tests)


def _nearest(joint: JointDraws, others: JointDraws, max_rows: int) -> Tensor:
    """For each simulation, which of the others has the nearest data."""
    rows = max(1, max_rows // len(others.observed))
    parts = [torch.cdist(x, others.observed).argmin(1) for x in joint.observed.split(rows)]
    return torch.cat(parts)
