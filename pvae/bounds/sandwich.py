"""Bidirectional Monte Carlo: a lower and an upper bound, on data that the model has simulated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from pvae.bounds.annealing import AIS, annealed
from pvae.bounds.weights import WeightSums, require_evidence
from pvae.errors import check_int
from pvae.estimate import Estimate
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.terms import prepared

__all__ = ["Sandwich", "bdmc"]


@dataclass(frozen=True, repr=False)
class Sandwich:
    """Both bounds of the evidence of simulated data.

    Attributes:
        lower: The estimate from chains that end at the posterior.
        upper: The estimate from chains that start at a draw of the posterior. All chains of a
            datum start at the same draw, so that its error over draws isn't known by itself; the
            error over data has it in it.
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
        low = self.lower
        shown = [
            f"{bound.mean:{digits}}" + ("" if low.num_data < 2 else f" +- {bound.se_data:.2g}")
            for bound, digits in ((low, ".2f"), (self.upper, ".2f"), (self.gap, ".2g"))
        ]
        return "\n".join(
            (
                f"BDMC, {low.name.split(', ')[-1]}, on {low.num_data} simulated data, "
                f"K = {low.num_particles}",
                f"  lower: {shown[0]} nats per datum",
                f"  upper: {shown[1]}",
                f"  gap:   {shown[2]}, which bounds the bias of both on",
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

    with :math:`w'` the weights of the chains that are sent back. The gap between the bounds is, on
    average over data of this kind, at least what AIS with these settings misses of log p(x).

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
        for chunk in annealed(evaluation, how, k, simulate=True):
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
    return Sandwich(lower, upper, tuple(map(torch.cat, zip(*batches, strict=True))))
