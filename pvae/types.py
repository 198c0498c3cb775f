"""Types that parts and tools share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from pyro.distributions.torch_distribution import TorchDistributionMixin

__all__ = ["Dist", "Message", "Program", "Shape", "Site"]

Dist: TypeAlias = TorchDistributionMixin
"""A Pyro distribution."""

Program: TypeAlias = Callable[..., object]
"""A Pyro program: a function or a module that makes ``pyro.sample`` statements."""

Shape: TypeAlias = int | Sequence[int]
"""A shape; an integer is a vector of that length."""

Site: TypeAlias = Mapping[str, Any]
"""A site of a trace, as Pyro has it: its name, distribution (``"fn"``), value, plates, mask."""

Message: TypeAlias = dict[str, Any]
"""A site while the program runs, which handlers may change."""
