"""Weights of draws, summed up chunk by chunk."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pvae.bounds.result import Bound

__all__ = ["WeightSums"]


class WeightSums:
    r"""log-sum-exp of a power of weights and of its square; particles in any number of chunks.

    Of these, for each datum: :math:`\frac1n \log \frac1K \sum_k w_k^n` with n the power, its
    variance over draws (delta method), and the effective sample size
    :math:`(\sum_k w_k^n)^2 / \sum_k w_k^{2n}`.
    """

    def __init__(self, power: float = 1.0) -> None:
        self.power = power
        self.sums: dict[int, Tensor] = {}  # by a chunk's first row; (2, rows)

    def reduce(self, log_weight: Tensor) -> Tensor:
        """What is kept of log weights ``(K, n)``: ``(2, n)``."""
        powers = self.power * log_weight.double()
        return torch.stack([powers.logsumexp(0), (2 * powers).logsumexp(0)])

    def add(self, rows: slice, new: Tensor) -> None:
        """Takes in what `reduce` has kept of a chunk."""
        known = self.sums.get(rows.start)
        self.sums[rows.start] = new if known is None else torch.logaddexp(known, new)

    def values(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each datum's value, its variance over draws, and its effective sample size."""
        first, second = torch.cat(list(self.sums.values()), 1)
        nothing = first == -math.inf  # no draw has any weight: none counts, and no error is known
        inverse_size = torch.where(nothing, math.inf, (second - 2 * first).exp())
        variance = (inverse_size - 1 / k).clamp(min=0) / self.power**2
        return (first - math.log(k)) / self.power, variance, 1 / inverse_size

    def bound(self, name: str, k: int, **options: Any) -> Bound:
        """The result; ``options`` are further fields of it."""
        values, variance, size = self.values(k)
        return Bound(
            name,
            values,
            float(values.sum()),
            math.sqrt(float(variance.sum())) if k > 1 else None,
            len(values),
            k,
            ess=size,
            **options,
        )
