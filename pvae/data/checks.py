"""What every row of data has to be, checked as rows are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pvae.errors import DataError

__all__ = ["RowCheck", "Support"]

_FILL = [
    "drop the row",
    "fill it with 0, and leave it out with a mask in model and guide (poutine.mask)",
]


@dataclass(frozen=True)
class Support:
    """Which values of a batch's entry are possible.

    Arguments:
        check: From the entry to true where a value is possible.
        words: What is expected, in words.
        fixes: What to try where a value isn't.
    """

    check: Callable[[Tensor], Tensor]
    words: str
    fixes: Sequence[str] = ()


@dataclass(frozen=True)
class RowCheck:
    """Refuses rows with NaN, infinity or values outside a support.

    Arguments:
        supports: By place in the batch.
        where: What the data are called.
    """

    supports: Mapping[int, Support] = field(default_factory=dict)
    where: str = "data"

    def __call__(
        self,
        batch: Sequence[Any],
        named: Callable[[int], str],
        axes: Sequence[int | None] | None = None,
    ) -> None:
        """Checks a batch; ``named`` has the words for one of its rows, which are along the axes.

        Raises:
            DataError: Naming the entry, its first offending row, and the value.
        """
        axes = (0,) * len(batch) if axes is None else axes
        for place, (part, axis) in enumerate(zip(batch, axes, strict=True)):
            name = self.where if len(batch) == 1 else f"{self.where}[{place}]"
            at = name, named, axis
            if part.is_floating_point():
                _refuse(part, part.isfinite(), at, "finite values", _FILL)
            if (support := self.supports.get(place)) is not None:
                _refuse(part, support.check(part), at, support.words, support.fixes)


def _refuse(
    part: Tensor,
    good: Tensor,
    at: tuple[str, Callable[[int], str], int | None],
    expected: str,
    fixes: Sequence[str],
) -> None:
    """Names the first row where ``good`` is false.

    ``at``: the entry's name, the words for a row, and the axis of its rows.
    """
    if bool(good.all()):
        return
    name, named, axis = at
    good = good.reshape(good.shape + (1,) * (part.dim() - good.dim())).expand(part.shape)
    if axis is None:
        got = f"{part[~good][0].item():g} ({int((~good).sum())} such value(s))"
        raise DataError(name, expected, got, fixes)
    bad, part = (~good).movedim(axis, 0), part.movedim(axis, 0)
    bad, part = bad.reshape(len(bad), -1), part.reshape(len(part), -1)
    row = int(bad.any(1).nonzero()[0])
    got = f"{part[row][bad[row]][0].item():g} ({int(bad[row].sum())} such value(s) in this row)"
    raise DataError(f"{name}, {named(row)}", expected, got, fixes)
