"""What a row of the table of pairs has, and helpers that several rows share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["ROWS", "Row", "gaussian_evidence", "mlp", "noise", "row"]


@dataclass
class Row:
    """A pair as a modeller writes it, the data, and what is known about it.

    Attributes:
        pair: Model and guide, or a `pvae.Pair`.
        batch: What both are called with.
        exact: log p(data) in nats at the pair's parameters as they are when it is called.
        oracle: Where that is from.
        objective: What Pyro trains it with; None for ``Trace_ELBO``.
        options: Of `pvae.fit`.
        evidence: Options of `pvae.bounds.evidence`.
    """

    pair: Any
    batch: tuple[Any, ...]
    exact: Callable[[], float] | None = None
    oracle: str = ""
    objective: Callable[[], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)


ROWS: dict[str, Callable[[], Row]] = {}
"""Kind of pair -> what makes it; seeded by the caller."""


def row(kind: str) -> Callable[[Callable[[], Row]], Callable[[], Row]]:
    """Puts a constructor into the table."""

    def put(make: Callable[[], Row]) -> Callable[[], Row]:
        ROWS[kind] = make
        return make

    return put


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that don't depend on the generators' state."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(num_in: int, num_out: int, hidden: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(num_in, hidden), nn.Tanh(), nn.Linear(hidden, num_out))


def gaussian_evidence(x: Tensor, loc: Tensor, weight: Tensor, sigma: Tensor | float) -> float:
    """log p(x) of rows of a linear Gaussian model, x = loc + weight z + sigma e."""
    covariance = weight @ weight.T + torch.as_tensor(sigma) ** 2 * torch.eye(len(weight))
    return float(dist.MultivariateNormal(loc, covariance).log_prob(x).sum())


def grid(low: float, high: float, count: int = 4001) -> tuple[Tensor, float]:
    """Points of a quadrature, and the logarithm of their distance."""
    points = torch.linspace(low, high, count)
    return points, math.log((high - low) / (count - 1))
