"""From data to sources: whatever a user has, read, checked, joined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal

import torch
from torch.utils.data import DataLoader, Dataset

from pvae.annotations import strict
from pvae.data.arrays import Data, as_arrays
from pvae.data.checks import RowCheck, Support
from pvae.data.fetched import DatasetSource, Fetched, LoaderSource
from pvae.data.sources import ArraySource, Axes, Batch, Source, checked, is_even
from pvae.devices import as_device, same_device
from pvae.errors import DataError

__all__ = ["as_source", "check_rows", "in_memory", "joined"]


@strict
def as_source(
    data: object,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    axes: Axes | Literal["any"] | None = None,
) -> Source:
    """Turns data into a `Source`.

    Arguments:
        data: A `Data`; an array, tensor or ``np.memmap``; a tuple of them with a common first
            axis; a map-style torch ``Dataset``; a ``DataLoader``; a `Source`.
        device: Where batches are wanted; those of a `Source`, too.
        dtype: What floating numbers are cast to; bytes and booleans in the first array, too.
            Bytes in other arrays are labels and become integers; all else stays as it is.
        axes: The axis that counts the rows in each array, None for one that all rows share; left
            out, the first axis of each. ``"any"`` is for a look at what a pair makes of them: where
            first axes differ, all arrays together are one row.

    Raises:
        DataError: If the data are empty, of unequal lengths, or not numbers.
    """
    device = as_device(device)
    known = None if axes == "any" else axes
    if isinstance(data, Source):
        data = data if same_device(data.device, device) else data.to(device)
        return data if known is None else data.along(known)
    if isinstance(data, DataLoader):
        return LoaderSource(data, device, dtype, known)
    if isinstance(data, Dataset):
        source = DatasetSource(data, device, dtype)
        return source if known is None else source.along(known)
    if hasattr(data, "train") and hasattr(data, "valid"):
        raise DataError("data", "one part of a data set", type(data).__name__, ["data.train"])
    if isinstance(data, dict):
        names = [f"data['{name}']" for name in data]
        actual = f"a dictionary of {', '.join(names) or 'nothing'}"
        raise DataError("data", "one data set", actual, names[:2] or ["x, an array"])
    if not isinstance(data, Data):
        data = Data(as_arrays(data))
    if axes == "any" and not is_even(data):
        known = (None,) * len(data.arrays)
    return ArraySource(checked(data, known), device, dtype, known)


@strict
def in_memory(source: Source) -> Source:
    """The same data, to be read more than once in one order: a ``DataLoader`` is read out."""
    if not isinstance(source, LoaderSource):
        return source
    data = Data(joined(source.ordered().batches(), source.axes))
    return as_source(data, source.device, source.dtype, source.axes)


def joined(batches: Iterable[Batch], axes: Axes | None = None) -> Batch:
    """One batch with the rows of several; what all rows share is the first one's."""
    columns = [*zip(*batches, strict=True)]
    parts = zip(columns, axes or (0,) * len(columns), strict=True)
    return tuple(c[0] if axis is None else torch.cat(c, axis) for c, axis in parts)


@strict
def check_rows(
    source: Source, supports: Mapping[int, Support] | None = None, where: str = "data"
) -> None:
    """Refuses data with NaN, infinity or values outside a support, naming the first row.

    Arguments:
        source: The data. A ``DataLoader`` isn't read ahead: its batches are checked as they come,
            from now on. So are the items of a ``Dataset``, which may be others each time.
        supports: What values are possible, by place in the batch.
        where: What the data are called.

    Raises:
        DataError: Naming the array, the first offending row, and its value.
    """
    check, is_fetched = RowCheck(supports or {}, where), isinstance(source, Fetched)
    if isinstance(source, Fetched):
        source.check = check  # which it makes as it reads
    for start, batch in source.all():
        if isinstance(source, LoaderSource):
            return
        if not is_fetched:
            check(batch, partial(_row_of, source, start), source.axes)


def _row_of(source: Source, start: int, row: int) -> str:
    return f"row {source.origin_of(start + row)}"
