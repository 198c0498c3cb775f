"""Sources: rows of data by index, as tuples of tensors on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.annotations import strict
from pvae.data.arrays import Array, Data, MappedRows, as_array
from pvae.devices import sent
from pvae.errors import DataError
from pvae.randomness import derive_seed

__all__ = [
    "ArraySource",
    "Axes",
    "Batch",
    "Source",
    "WholeSource",
    "check_length",
    "checked",
    "first_batch",
    "is_even",
    "num_rows_of",
]

Axes = tuple[int | None, ...]
"""The axis that counts the rows in each entry of a batch; None where all rows share the entry."""

Batch = tuple[Tensor, ...]
_BLOCK = 256  # rows whose fixed binarisation is drawn together


def num_rows_of(batch: Sequence[Any], axes: Axes | None = None) -> int:
    """Rows of a batch, whose first axes count them unless other axes are given.

    Where no entry has rows of its own, all of them together are one row.

    Example:
        >>> num_rows_of((torch.zeros(5, 40), torch.zeros(40)), (1, 0))
        40
    """
    axes = axes if axes is not None else (0,) * len(batch)
    pairs = zip(batch, axes, strict=False)
    return next((part.shape[axis] for part, axis in pairs if axis is not None), 1)


class Source(ABC):
    """The abstract source: ``rows(index)`` is a batch, a tuple of tensors on the device.

    To write one, define ``num_rows``, `rows`, and set ``exact`` if a row depends on its index
    alone (and, where ``random``, on the generator), which is what exact resume needs.
    """

    num_rows: int
    device: torch.device
    axes: Axes | None = None
    """Where the rows are in each entry of a batch; None for the first axis of each."""
    exact = True
    random = False
    """Whether `rows` draws from the generator it is given."""
    indexed_on_host = False
    """Whether `rows` takes an index on the host, where it reads rows: then nothing waits for it."""

    def along(self, axes: Axes) -> Source:
        """The same data with their rows along these axes, which a pair's data plate counts.

        Rows that are fetched by index stand first in a batch: all of them can be one row, that of
        a pair without a data plate, but no other axis can count them.

        Raises:
            DataError: If the rows can't be along other axes.
        """
        if axes and all(axis is None for axis in axes):
            return WholeSource(self)
        if all(axis in (0, None) for axis in axes):
            return self
        fixes = ["the data as arrays or tensors", "the plate's data first in each entry"]
        raise DataError("data", "rows along the first axis", f"rows along axes {axes}", fixes)

    @abstractmethod
    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The rows at ``index``, an integer tensor on the device, or else on the host."""

    def stored(self, index: Tensor) -> Batch:
        """The rows at ``index`` as they are kept: no draws are made of them, as `rows` may do."""
        return self.rows(index)

    def to(self, device: torch.device) -> Source:
        """The same data, whose batches are on another device."""
        return _Moved(self, device)

    def origin_of(self, row: int) -> int:
        """The number of a row where it came from, such as a file."""
        return row

    def all(self, chunk: int = 4096) -> Iterator[tuple[int, Batch]]:
        """All rows in order, in chunks, each with the number of its first row."""
        for start in range(0, self.num_rows, chunk):
            yield start, self.rows(self.numbers(start, min(start + chunk, self.num_rows)))

    def numbers(self, start: int, stop: int) -> Tensor:
        """An index of rows one after another, where `rows` takes it."""
        where = torch.device("cpu") if self.indexed_on_host else self.device
        return torch.arange(start, stop, device=where)


class ArraySource(Source):
    """Arrays: on the device as a whole where they fit there, otherwise gathered on the host.

    Half of the memory that is free is for them; tensors that are there already take none of it.
    """

    axes: Axes

    def __init__(
        self, data: Data, device: torch.device, dtype: torch.dtype, axes: Axes | None = None
    ) -> None:
        self.data = data.fixed() if data.binarize == "static" else data
        self.device, self.dtype = device, dtype
        self.axes = (0,) * len(data.arrays) if axes is None else axes
        self.num_rows = num_rows_of(data.arrays, self.axes)
        self.random = self.data.binarize == "dynamic"
        if self.random and self.axes[0] != 0:
            expected = "data whose first axis counts them, for binarize='dynamic'"
            raise DataError("data", expected, f"rows along axis {self.axes[0]}", ["'static'"])
        resident = not any(isinstance(a, MappedRows) for a in self.data.arrays)
        if device.type == "cuda" and resident:
            elsewhere = (a for a in map(_as_tensor, self.data.arrays) if a.device.type != "cuda")
            size = sum(a.nbytes for a in elsewhere)
            resident = size < 0.5 * torch.cuda.mem_get_info(device)[0]
        self.resident, self.indexed_on_host = resident, not resident
        on_device = self.data.arrays if resident else ()
        self._tensors = [a.to(device) for a in self._cast(map(_as_tensor, on_device))]

    def stored(self, index: Tensor) -> Batch:
        """The rows at ``index``, not yet scaled and binarised."""
        if self.resident:
            return tuple(
                x if axis is None else x.index_select(axis, index)
                for x, axis in zip(self._tensors, self.axes, strict=True)
            )
        host = index.cpu()
        pairs = zip(self.data.arrays, self.axes, strict=True)
        rows = self._cast(_rows_of(a, host, i) for a, i in pairs)
        return tuple(sent(x, self.device) for x in rows)

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The rows at ``index``; the first array scaled and binarised."""
        batch = self.stored(index)
        if not batch:
            return ()
        x = batch[0]
        if x.dtype in (torch.uint8, torch.bool):
            x = x.to(self.dtype)
        if self.data.scale != 1.0:
            x = x * self.data.scale
        if self.data.binarize == "threshold":
            x = (x > 0.5).to(self.dtype)
        elif self.data.binarize == "dynamic":
            x = (self._uniform(x, index, generator) < x).to(self.dtype)
        return (x, *batch[1:])

    def origin_of(self, row: int) -> int:
        """The number of a row where it came from."""
        return row if self.data.origin is None else int(self.data.origin[row])

    def _uniform(self, x: Tensor, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform numbers for dynamic binarisation; fixed ones for each row without a generator."""
        options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        if generator is not None:
            return torch.rand(x.shape, generator=generator, **options)
        index = index.to(x.device)
        uniform, block_of = torch.empty_like(x), index // _BLOCK
        for block in block_of.unique().tolist():
            seeded = torch.Generator(x.device).manual_seed(derive_seed(self.data.seed, block))
            drawn = torch.rand((_BLOCK, *x.shape[1:]), generator=seeded, **options)
            here = block_of == block
            uniform[here] = drawn[index[here] % _BLOCK]
        return uniform

    def along(self, axes: Axes) -> Source:
        """The same arrays, with their rows along these axes."""
        if axes == self.axes:
            return self
        return ArraySource(checked(self.data, axes), self.device, self.dtype, axes)

    def to(self, device: torch.device) -> Source:
        """The same arrays, on another device."""
        return ArraySource(self.data, device, self.dtype, self.axes)

    def _cast(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        floats = [x.to(self.dtype) if x.is_floating_point() else x for x in tensors]
        labels = [x.long() if x.dtype == torch.uint8 else x for x in floats[1:]]
        return floats[:1] + labels


def _rows_of(array: Array, index: Tensor, axis: int | None) -> Tensor:
    """Rows of an array along an axis, where the array is."""
    if isinstance(array, MappedRows) or (axis == 0 and isinstance(array, np.ndarray)):
        return _as_tensor(array[index.numpy()])  # of a memory map another axis is read whole
    tensor = _as_tensor(array)
    return tensor if axis is None else tensor.index_select(axis, sent(index, tensor.device))


class WholeSource(Source):
    """All rows of a source as one, for a pair whose data no plate counts."""

    num_rows = 1
    indexed_on_host = True

    def __init__(self, source: Source) -> None:
        self.source, self.device, self.exact = source, source.device, source.exact
        self.axes = (None,) * len(first_batch(source, 1))

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        """All of them, whatever the index, which can be nothing but 0."""
        return self.source.rows(self.source.numbers(0, self.source.num_rows), generator)

    def along(self, axes: Axes) -> Source:
        """Back to the source that this is of."""
        return self if axes == self.axes else self.source.along(axes)

    def to(self, device: torch.device) -> Source:
        """All rows as one, on another device."""
        return WholeSource(self.source.to(device))


class _Moved(Source):
    """A source whose batches are sent to another device."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device, self.num_rows = source, device, source.num_rows
        self.axes, self.exact, self.random = source.axes, source.exact, source.random

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The rows at ``index``, drawn where the source draws them."""
        own = self.source.device
        if generator is not None and generator.device.type != own.type:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            generator = torch.Generator(own).manual_seed(seed)
        batch = self.source.rows(index.to(own), generator)
        return tuple(part.to(self.device) for part in batch)

    def stored(self, index: Tensor) -> Batch:
        """The rows at ``index`` as the source keeps them."""
        batch = self.source.stored(index.to(self.source.device))
        return tuple(part.to(self.device) for part in batch)

    def origin_of(self, row: int) -> int:
        """The number of a row where it came from."""
        return self.source.origin_of(row)


@strict
def first_batch(source: Source, num_rows: int) -> Batch:
    """The first rows of a source; a ``DataLoader``'s first batch."""
    return next(source.all(min(num_rows, source.num_rows)))[1]


def _as_tensor(array: Array) -> Tensor:
    if isinstance(array, Tensor):
        return array
    array = np.asarray(array)
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:  # torch computes with no such type
        array = array.astype(np.int32 if array.dtype.itemsize == 2 else np.int64)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def is_even(data: Data) -> bool:
    """Whether there are arrays, all with a first axis of one length."""
    shapes = [tuple(np.shape(a)) for a in data.arrays]
    return len({shape[:1] for shape in shapes}) == 1 and shapes[0] != ()


def checked(data: Data, axes: Axes | None) -> Data:
    """The data with arrays of numbers, whose rows are along the axes; refuses what is none."""
    rows = None if data.arrays or axes is not None else 0
    axes = (0,) * len(data.arrays) if axes is None else axes
    names = [f"data[{i}]" if len(data.arrays) > 1 else "data" for i in range(len(data.arrays))]
    arrays = tuple(map(_as_array, names, data.arrays, axes))
    for name, array, axis in zip(names, arrays, axes, strict=True):
        if axis is None:
            continue
        if array.ndim <= axis:
            fixes = ["x[None], for one datum"]
            raise DataError(name, "an array with one row a datum", "a single number", fixes)
        rows = array.shape[axis] if rows is None else rows
        if array.shape[axis] != rows:
            fixes = ["arrays of one length"]
            raise DataError(name, f"{rows} rows, like data[0]", f"{array.shape[axis]} rows", fixes)
    check_length(1 if rows is None else rows)
    if data.binarize != "none":
        low, high = float(arrays[0].min()) * data.scale, float(arrays[0].max()) * data.scale
        if not (low >= 0 and high <= 1):
            expected = f"values in [0, 1] after scaling by {data.scale:g}, to binarise them"
            got = f"values from {low:g} to {high:g}"
            raise DataError("data", expected, got, ["scale=1 / 255, for bytes"])
    return replace(data, arrays=arrays)


def _as_array(name: str, array: object, axis: int | None) -> Array:
    if isinstance(array, np.memmap) and array.ndim and axis == 0 and array.dtype.kind in "biuf":
        return MappedRows(array)
    return array if isinstance(array, MappedRows) else as_array(name, array)


def check_length(num_rows: int) -> int:
    """Returns a number of rows, or raises a `DataError` if there are none."""
    if num_rows == 0:
        raise DataError("data", "at least one row", "no rows", ["is the path or the filter right?"])
    return num_rows
