"""Bidirectional Monte Carlo: a lower and an upper bound, on data that the model has simulated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from pvae import terms as t
from pvae.bounds.annealing import AIS, annealed
from pvae.bounds.result import Bound
from pvae.bounds.sums import WeightSums
from pvae.errors import check_int
from pvae.options import Options, tool
from pvae.pair import PairLike

__all__ = ["Sandwich", "bdmc"]


@dataclass(frozen=True)
class Sandwich:
    """Both bounds of the evidence of simulated data.

    Attributes:
        lower: From chains to the posterior; its values have shape ``(N,)``.
        upper: From chains that start at draws of the posterior. Those of one datum come from the
            same draw, so that there is no error over draws apart from that over data.
        batch: The simulated data, and what the model was given beside them.
    """

    lower: Bound
    upper: Bound
    batch: tuple[Tensor, ...]

    @property
    def gaps(self) -> Tensor:
        """Upper minus lower, in nats, shape ``(N,)``; by chance one may be below 0."""
        return self.upper.per_datum - self.lower.per_datum

    @property
    def gap(self) -> float:
        """Mean of the gaps: on average the sum of what both bounds are off by."""
        return float(self.gaps.mean())

    @property
    def se_gap(self) -> float:
        """Standard error of the gap, over data and all draws."""
        count = self.lower.num_data
        return float(self.gaps.std()) / math.sqrt(count) if count > 1 else math.nan

    def __str__(self) -> str:
        low, high = self.lower, self.upper
        errors = [low.se_data, high.se_data, self.se_gap]
        shown = ["" if math.isnan(error) else f" +- {error:.2g}" for error in errors]
        return "\n".join(
            (
                f"BDMC, {low.name.split(', ')[-1]}, on {low.num_data} simulated data, "
                f"K = {low.num_particles}",
                f"  lower: {low.mean:.2f}{shown[0]} nats per datum",
                f"  upper: {high.mean:.2f}{shown[1]}",
                f"  gap:   {self.gap:.2g}{shown[2]}, which bounds the bias of both on",
                "  average; on real data only as far as they are like the model's own",
            )
        )

    __repr__ = __str__


@tool
def bdmc(
    pair: PairLike,
    data: Any,
    num_particles: int = 16,
    *,
    ais: AIS | None = None,
    **options: Unpack[Options],
) -> Sandwich:
    r"""A lower and an upper bound of the evidence of data that are drawn from the model.

    Each datum is drawn together with its latents, which are a draw from its exact posterior. From
    there the chains get apart by a few transitions that leave the posterior as it is, and are then
    sent back along the way that `AIS` has come, with the same transitions:

    .. math::
        E[\log \bar w] \le E[\log p(x)] \le E\left[-\log \tfrac1K \sum_k 1 / w_k'\right]

    with :math:`w'` the weights of the chains that are sent back. The gap between both bounds what
    AIS with these settings misses, on average over data of this kind.

    References:
        Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse et al., 2015),
        https://arxiv.org/abs/1511.02543
        Measuring the Reliability of MCMC Inference with Bidirectional Monte Carlo
        (Grosse et al., 2016), https://arxiv.org/abs/1606.02275

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source: what the model doesn't observe
            of it (labels) is kept, and there is one simulated datum for each of its rows.
        num_particles: K, chains for each datum, there and back.
        ais: How to anneal; None for what `AIS` is by itself.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: As `evidence`; and if the model has factors, or observes anything but a
            tensor of the batch as it is.

    Example:
        >>> pair, x = pvae.recipes.vae(64, 2), torch.zeros(3, 64)
        >>> found = bdmc(pair, x, 8, ais=AIS(num_temperatures=3), progress=False)
        >>> found.gaps.shape
        torch.Size([3])
    """
    check_int("num_particles", num_particles)
    how = ais or AIS()
    with t.prepared(pair, data, options, "bdmc") as evaluation:
        structure = evaluation.structure
        structure.require_proper("simulated data")
        forward, reverse, acceptance, batches = WeightSums(), WeightSums(), [], []
        for chunk in annealed(evaluation, how, num_particles, simulate=True):
            assert chunk.reverse is not None  # noqa: S101
            forward.add(chunk.rows, forward.reduce(chunk.forward))
            reverse.add(chunk.rows, reverse.reduce(-chunk.reverse))
            acceptance.append(chunk.acceptance)
            batches.append(chunk.batch)
    name = f"evidence of simulated data, AIS-{how.num_temperatures}"
    scales = structure.removed_scales
    lower = forward.bound(
        name, num_particles, acceptance=torch.cat(acceptance), removed_scales=scales
    )
    inverse, _, size = reverse.values(num_particles)
    upper = Bound(
        f"{name} reversed",
        -inverse,
        -float(inverse.sum()),
        None,
        lower.num_data,
        num_particles,
        kind="upper",
        ess=size,
        removed_scales=scales,
    )
    return Sandwich(lower, upper, tuple(map(torch.cat, zip(*batches, strict=True))))
