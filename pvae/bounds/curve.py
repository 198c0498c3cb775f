"""The importance-weighted bound as the number of draws grows, and where it goes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor

from pvae.bounds.possible import Possible
from pvae.bounds.weights import require_evidence, weights_by_chunk
from pvae.errors import ArgumentError, check_int
from pvae.estimate import Estimate, with_error
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.terms import prepared

__all__ = ["Curve", "iwae_curve"]

_ENOUGH = 20  # draws that a datum's estimate should rest on
_SLOW = 0.35  # of what four times the draws added before


@dataclass(frozen=True, repr=False)
class Curve:
    r"""Importance-weighted bounds for K = 1, 2, 4, ..., from one set of draws.

    Attributes:
        estimates: One for each K; that of the largest K has the effective sample sizes.

    Example:
        >>> curve = Curve.of_weights([torch.zeros(16, 3)])  # log weights of 3 data
        >>> list(curve.estimates), curve[8].mean
        ([1, 2, 4, 8, 16], 0.0)
    """

    estimates: dict[int, Estimate]

    @classmethod
    def of_weights(cls, chunks: Iterable[Tensor]) -> Curve:
        """The curve of log weights ``(K, n)``, given for one chunk of data after another.

        A point's error over draws is from the spread of its groups of draws. The last has one
        group: its error is by the delta method, which is low where weights have heavy tails, and
        at least that of the point before.
        """
        parts = [_points(chunk) for chunk in chunks]
        values, variances, ess = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        if variances[-1].sum() < variances[-2].sum():
            variances[-1] = variances[-2]
        points = {
            2**i: Estimate(f"evidence, IWAE-{2**i}", v, s, num_particles=2**i, kind="lower")
            for i, (v, s) in enumerate(zip(values, variances, strict=True))
        }
        last = max(points)
        return cls({**points, last: replace(points[last], ess=ess)})

    def __getitem__(self, num_particles: int) -> Estimate:
        return self.estimates[num_particles]

    @property
    def _points(self) -> list[Estimate]:
        return list(self.estimates.values())

    @property
    def extrapolated(self) -> Estimate:
        r"""Where the curve goes as 1/K goes to 0, :math:`2 L_K - L_{K/2}`, in nats per datum.

        That takes the term of order 1/K off the bias, as Nowozin (2018) does. It is no bound. Its
        error over data has the noise of draws in it.
        """
        before, last = self._points[-2:]
        values = 2 * last.values - before.values
        return Estimate("1/K -> 0", values, num_particles=last.num_particles)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the extrapolation is a guess; empty if nothing speaks against it.

        The bias falls as 1/K only if weights have a finite variance, and K is large enough: then
        four times the draws add a quarter of what the same has added before, and no datum rests on
        a few draws. Draws can't show the tail that they have not reached.
        """
        last = self._points[-1]
        assert last.ess is not None  # noqa: S101
        ends = [i for i in (-1, -3) if len(self.estimates) + i >= 4]
        doubts = [f"impossible: {reason}" for reason in last.reasons]
        doubts += [doubt for doubt in map(self._slow, ends) if doubt][:1]
        limit = min(_ENOUGH, max(self.estimates) / 2)
        if few := int((last.ess < limit).sum()):
            doubts.append(f"{few} of {last.num_data} data rest on fewer than {limit:g} draws")
        return tuple(doubts)

    def _slow(self, end: int) -> str:
        """Says so if a bias falls more slowly than as 1/K, by two standard errors over draws."""
        low, middle, high = (self._points[end - back] for back in (4, 2, 0))
        before, last = middle.mean - low.mean, high.mean - middle.mean
        if last - _SLOW * before <= 2 * high.se_draws + 1e-6:
            return ""
        shown = f"four times the draws add {last:.2g} nats after {before:.2g}"
        return f"{shown}, where a quarter of that was to be expected"

    def __str__(self) -> str:
        lines = [f"IWAE by K, nats per datum, N = {self._points[0].num_data}"]
        for k, point in self.estimates.items():
            shown = with_error(point.mean, point.se_data)
            lines.append(f"  {k:>6}: {shown} (over draws {point.se_draws:.2g})")
        to = with_error(self.extrapolated.mean, self.extrapolated.se_data)
        if self.doubts:
            lines += [f"  1/K -> 0: {to}, a guess:", *(f"    {doubt}" for doubt in self.doubts)]
            lines.append("  next: bounds.evidence(..., method='ais')")
        else:
            lines.append(f"  1/K -> 0: {to}, if weights have a finite variance; no bound")
        return "\n".join(lines)

    __repr__ = __str__


@tool
def iwae_curve(
    pair: PairLike, data: object, num_particles: int = 1024, **options: Unpack[Options]
) -> Curve:
    r"""The importance-weighted bound at K = 1 (the ELBO), 2, 4, ..., from one set of draws.

    .. math::
        L_k = \frac{k}{K} \sum_{g=1}^{K/k} \log \frac1k \sum_{i \in g} w_i
        \quad\text{over disjoint groups } g

    Each is a lower bound on average, and they rise with k. If the weights have a finite variance,
    :math:`\log p(x) - L_k = \mathrm{Var}(w / p(x)) / 2k + O(k^{-2})`, which is what
    `Curve.extrapolated` goes by.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
        Filtering Variational Objectives (Maddison et al., 2017), https://arxiv.org/abs/1705.09279
        Debiasing Evidence Approximations: On Importance-weighted Autoencoders and Jackknife
        Variational Inference (Nowozin, 2018), https://openreview.net/forum?id=HyZoi-WRb

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: The largest K, a power of 2, at least 16.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: As `log_weights`.

    Example:
        >>> pair, x = pvae.recipes.vae(64, 2), torch.zeros(3, 64)
        >>> iwae_curve(pair, x, 16)[4].values.shape
        torch.Size([3])
    """
    if check_int("num_particles", num_particles, minimum=16).bit_count() != 1:
        raise ArgumentError("num_particles", "a power of 2", f"{num_particles}")
    with prepared(pair, data, options, "iwae_curve") as evaluation:
        require_evidence(evaluation.structure, "the curve of importance-weighted bounds")
        possible = Possible(evaluation.structure)
        curve = Curve.of_weights(weights_by_chunk(evaluation, num_particles, possible))
        return Curve({k: possible.mark(point) for k, point in curve.estimates.items()})


def _points(log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each datum's curve and its variances, ``(S, n)``, and effective sample sizes ``(n,)``.

    A variance is that of a mean over groups; of the one group of all draws by the delta method.
    """
    share = log_weight.softmax(0).square().sum(0)
    values, variances, groups = [], [], log_weight
    while len(groups) > 1:
        values.append(groups.mean(0))
        variances.append(groups.var(0) / len(groups))
        groups = torch.logaddexp(groups[0::2], groups[1::2]) - math.log(2)
    last = (share - 1 / len(log_weight)).clamp(min=0)
    return torch.stack([*values, groups[0]]), torch.stack([*variances, last]), 1 / share
