"""Types that parts and tools share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from pyro.distributions.torch_distribution import TorchDistributionMixin

__all__ = ["Dist", "Program", "Shape"]

Dist: TypeAlias = TorchDistributionMixin
"""A Pyro distribution."""

Program: TypeAlias = Callable[..., object]
"""A Pyro program: a function or a module that makes ``pyro.sample`` statements."""

Shape: TypeAlias = int | Sequence[int]
"""A shape; an integer is a vector of that length."""
