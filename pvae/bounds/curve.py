"""The importance-weighted bound as the number of draws grows, and where it goes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from pvae import terms as t
from pvae.errors import ArgumentError, UndefinedError, check_int, oxford
from pvae.options import Options, tool
from pvae.pair import PairLike

__all__ = ["Curve", "iwae_curve"]


@dataclass(frozen=True)
class Curve:
    r"""Importance-weighted bounds for K = 1, 2, 4, ..., from one set of draws.

    Attributes:
        num_particles: The K of each point, length S, powers of 2.
        values: Each datum's bounds in nats, shape ``(S, N)``.
        variances: Their variances over draws, shape ``(S, N)``.
        ess: Effective sample size of each datum's draws at the largest K, shape ``(N,)``.
    """

    num_particles: tuple[int, ...]
    values: Tensor
    variances: Tensor
    ess: Tensor

    @property
    def num_data(self) -> int:
        """N."""
        return self.values.shape[1]

    @property
    def means(self) -> Tensor:
        """The curve: means over data, shape ``(S,)``."""
        return self.values.mean(1)

    @property
    def se_draws(self) -> Tensor:
        """Its standard errors over draws, data held fixed, shape ``(S,)``.

        The last point's is by the delta method, which is low where weights have heavy tails, and at
        least the one before, which two groups of draws have shown.
        """
        total = self.variances.sum(1)
        return torch.cat([total[:-1], total[-2:].amax(0, keepdim=True)]).sqrt() / self.num_data

    @property
    def se_data(self) -> Tensor:
        """Its standard errors over data, shape ``(S,)``; NaN of one datum."""
        if self.num_data == 1:
            return torch.full_like(self.means, math.nan)
        return self.values.std(1) / math.sqrt(self.num_data)

    @property
    def extrapolated(self) -> float:
        r"""Where the curve goes as 1/K goes to 0, :math:`2 L_K - L_{K/2}`, in nats per datum.

        That takes the term of order 1/K off the bias, as Nowozin (2018) does. It is no bound.
        """
        return float(2 * self.means[-1] - self.means[-2])

    @property
    def se_extrapolated(self) -> float:
        """Its standard error over data, with the noise of draws in it."""
        per_datum = 2 * self.values[-1] - self.values[-2]
        return float(per_datum.std()) / math.sqrt(self.num_data) if self.num_data > 1 else math.nan

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the extrapolation is a guess; empty if nothing speaks against it.

        The bias falls as 1/K only if weights have a finite variance, and K is large enough for
        it: then four times the draws add a quarter of what the same has added before, and no
        datum rests on a few draws. Draws can't show the tail that they have not reached.
        """
        ends = [i for i in (-1, -3) if len(self.means) + i >= 4]
        found = [doubt for doubt in map(self._slow, ends) if doubt][:1]
        limit = min(_ENOUGH, self.num_particles[-1] / 2)
        few = int((self.ess < limit).sum())
        if few:
            found.append(f"{few} of {self.num_data} data rest on fewer than {limit:g} draws")
        return tuple(found)

    def _slow(self, end: int) -> str:
        """Says so if a bias falls more slowly than as 1/K, by two standard errors over draws."""
        low, middle, high = (float(self.means[end - back]) for back in (4, 2, 0))
        before, last = middle - low, high - middle
        if last - _SLOW * before <= 2 * float(self.se_draws[end]) + 1e-6:
            return ""
        return (
            f"four times the draws add {last:.2g} nats after {before:.2g}, where a quarter of "
            "that was to be expected"
        )

    def __str__(self) -> str:
        lines = [f"IWAE by K, nats per datum, N = {self.num_data}"]
        for k, mean, over_data, over_draws in zip(
            self.num_particles,
            self.means.tolist(),
            self.se_data.tolist(),
            self.se_draws.tolist(),
            strict=True,
        ):
            error = f" +- {over_data:.2g}" if self.num_data > 1 else ""
            lines.append(f"  {k:>6}: {mean:.3f}{error} (over draws {over_draws:.2g})")
        to = f"{self.extrapolated:.3f}"
        to += f" +- {self.se_extrapolated:.2g}" if self.num_data > 1 else ""
        if self.doubts:
            lines += [f"  1/K -> 0: {to}, a guess:", *(f"    {doubt}" for doubt in self.doubts)]
            lines.append("  next: bounds.evidence(..., method='ais')")
        else:
            lines.append(f"  1/K -> 0: {to}, if weights have a finite variance; no bound")
        return "\n".join(lines)

    __repr__ = __str__


_ENOUGH = 20
_SLOW = 0.35


@tool
def iwae_curve(
    pair: PairLike,
    data: Any,
    num_particles: int = 1024,
    **options: Unpack[Options],
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
        UndefinedError: If a latent has a point-mass guide or an improper prior, or there are
            sites outside the data plate.

    Example:
        >>> pair, x = pvae.recipes.vae(64, 2), torch.zeros(3, 64)
        >>> iwae_curve(pair, x, 16).num_particles
        (1, 2, 4, 8, 16)
    """
    if check_int("num_particles", num_particles, minimum=16).bit_count() != 1:
        raise ArgumentError("num_particles", "a power of 2", f"{num_particles}")
    with t.prepared(pair, data, options, "iwae_curve") as evaluation:
        structure = evaluation.structure
        structure.require_density("evidence by importance sampling")
        structure.require_proper("evidence")
        if structure.global_sites:
            raise UndefinedError(
                "the curve of importance-weighted bounds",
                "a pair whose sites are all inside the data plate",
                f"global site {oxford(structure.global_sites)}",
                ["bounds.evidence, for the data set"],
            )
        chunks = _log_weights(evaluation, num_particles)
        values, variances, sizes = zip(*map(_points, chunks), strict=True)
    steps = tuple(2**i for i in range(num_particles.bit_length()))
    return Curve(steps, torch.cat(values, 1), torch.cat(variances, 1), torch.cat(sizes))


def _log_weights(
    evaluation: t.Evaluation,
    num_particles: int,
) -> Iterator[Tensor]:
    """log weights ``(K, n)``, a chunk of data after the other."""
    passes = t.stream(evaluation, num_particles)
    for _, same in itertools.groupby(passes, key=lambda part: part[0].start):
        yield torch.cat([terms.log_weight.double() for _, terms in same])


def _points(log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each datum's curve and its variances, ``(S, n)``, and effective sample sizes ``(n,)``.

    A variance is that of a mean over groups; of the one group of all draws by the delta method.
    """
    share = log_weight.softmax(0).square().sum(0)
    values, variances = [], []
    groups = log_weight
    while True:
        values.append(groups.mean(0))
        if len(groups) == 1:
            break
        variances.append(groups.var(0) / len(groups))
        groups = torch.logaddexp(groups[0::2], groups[1::2]) - math.log(2)
    variances.append((share - 1 / len(log_weight)).clamp(min=0))
    return torch.stack(values), torch.stack(variances), 1 / share
