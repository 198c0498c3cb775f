"""Sums over the particles of a pass, which come in chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Sums"]


class Sums:
    """Sums over each datum's particles, which come in any number of chunks."""

    def __init__(self, plus: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        self._plus = plus
        self._sums: dict[int, Tensor] = {}  # by a chunk's first row; the rows last

    def add(self, rows: slice, new: Tensor) -> None:
        """Takes in the sums of a chunk's particles."""
        before = self._sums.get(rows.start)
        self._sums[rows.start] = new if before is None else self._plus(before, new)

    @property
    def all(self) -> Tensor:
        """The sums of all data, in order."""
        return torch.cat(list(self._sums.values()), -1)
