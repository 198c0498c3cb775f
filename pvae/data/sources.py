"""Sources: rows of data by index, as tuples of tensors on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from pvae.errors import ArgumentError, DataError
from pvae.randomness import derive_seed

__all__ = [
    "Axes",
    "Data",
    "LoaderSource",
    "Source",
    "as_source",
    "check_rows",
    "first_batch",
    "in_memory",
    "joined",
    "num_rows_of",
]

Axes = tuple[int | None, ...]
"""The axis that counts the rows in each entry of a batch; None where all rows share the entry."""

Binarize = Literal["none", "threshold", "static", "dynamic"]
BINARIZE: tuple[Binarize, ...] = get_args(Binarize)
Index = slice | np.ndarray | list[int]
Batch = tuple[Tensor, ...]
_BLOCK = 256  # rows whose fixed binarisation is drawn together
_FILL = [
    "drop the row",
    "fill it with 0, and leave it out with a mask in model and guide (poutine.mask)",
]


class MappedRows:
    """Some rows of a memory map, in any order, read only when asked for."""

    def __init__(self, array: np.memmap, index: np.ndarray | None = None) -> None:
        self.array = array
        self.index = np.arange(len(array)) if index is None else index
        self.dtype, self.ndim = array.dtype, array.ndim

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.array.shape[1:])

    def __getitem__(self, index: Index) -> MappedRows:
        return MappedRows(self.array, self.index[index])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:  # noqa: FBT001
        return np.asarray(self.array[self.index], dtype)

    def reshape(self, *shape: int) -> MappedRows:
        array = self.array.reshape(len(self.array), *shape[1:])
        return MappedRows(array, self.index)  # type: ignore[arg-type]

    def min(self) -> float:
        return float(self.array.min())

    def max(self) -> float:
        return float(self.array.max())


Array = np.ndarray | Tensor | MappedRows


def check_binarize(kind: str) -> None:
    """Refuses what is no kind of binarisation."""
    if kind not in BINARIZE:
        raise ArgumentError("binarize", f"one of {', '.join(BINARIZE)}", repr(kind))


@dataclass(frozen=True)
class Data:
    """Arrays with a common first axis, and how the first one becomes a batch.

    Arguments:
        arrays: Data, or a tuple of data, labels and the like; arrays, tensors or memory maps.
        scale: Factor on the first array.
        binarize: ``"none"``; ``"threshold"`` at one half; ``"static"``, each value drawn once as
            Bernoulli(scaled value); ``"dynamic"``, drawn anew for every training batch, and fixed
            for evaluation.
        seed: Seed of the fixed draws.
        origin: Numbers of the rows where they came from, for error messages; None if they are
            numbered as they are.

    Example:
        >>> grey = Data((np.full((4, 2), 0.5),), binarize="static")
        >>> sorted(np.unique(grey.fixed().arrays[0]).tolist())
        [0.0, 1.0]
    """

    arrays: Any
    scale: float = 1.0
    binarize: Binarize = "none"
    seed: int = field(default=0, kw_only=True)
    origin: np.ndarray | None = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        if hasattr(self.arrays, "shape"):  # an array alone is no tuple of its rows
            object.__setattr__(self, "arrays", (self.arrays,))
        check_binarize(self.binarize)

    def __len__(self) -> int:
        return len(self.arrays[0])

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return tuple(self.arrays[0].shape[1:])

    def take(self, index: Index) -> Data:
        """The rows at ``index`` (a slice or integers)."""
        origin = None if self.origin is None else self.origin[index]
        return replace(self, arrays=tuple(a[index] for a in self.arrays), origin=origin)

    def reshape(self, event_shape: Sequence[int]) -> Data:
        """The same data with events of another shape."""
        first, *rest = self.arrays
        return replace(self, arrays=(first.reshape(len(first), *event_shape), *rest))

    def unlabelled(self) -> Data:
        """The first array alone."""
        return replace(self, arrays=self.arrays[:1])

    def fixed(self) -> Data:
        """The same data, scaled and (also where that is dynamic) binarised once, as arrays."""
        first, *rest = self.arrays
        x = np.asarray(first, dtype=np.float32) * np.float32(self.scale)
        if self.binarize == "threshold":
            x = (x > 0.5).astype(np.float32)
        elif self.binarize != "none":
            uniform = np.random.default_rng(self.seed).random(x.shape, dtype=np.float32)
            x = (uniform < x).astype(np.float32)
        return Data((x, *rest), origin=self.origin)


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
        """The rows at ``index``, an integer tensor on the device."""

    def origin_of(self, row: int) -> int:
        """The number of a row where it came from, such as a file."""
        return row

    def all(self, chunk: int = 4096) -> Iterator[tuple[int, Batch]]:
        """All rows in order, in chunks, each with the number of its first row."""
        for start in range(0, self.num_rows, chunk):
            index = torch.arange(start, min(start + chunk, self.num_rows), device=self.device)
            yield start, self.rows(index)


class ArraySource(Source):
    """Arrays: on the device as a whole where they fit there, otherwise gathered on the host."""

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
            size = sum(a.nbytes for a in self.data.arrays)
            resident = size < 0.5 * torch.cuda.mem_get_info(device)[0]
        self.resident = resident
        on_device = self.data.arrays if resident else ()
        self._tensors = self._cast(_as_tensor(a).to(device) for a in on_device)

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The rows at ``index``; the first array scaled and binarised."""
        if not self.data.arrays:
            return ()
        if self.resident:
            batch = [
                x if axis is None else x.index_select(axis, index)
                for x, axis in zip(self._tensors, self.axes, strict=True)
            ]
        else:
            host = index.cpu()
            pairs = zip(self.data.arrays, self.axes, strict=True)
            batch = self._cast(self._send(a, host, axis) for a, axis in pairs)
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
        return as_source(self.data, self.device, self.dtype, axes)

    def _send(self, array: Array, index: Tensor, axis: int | None) -> Tensor:
        if axis == 0 or isinstance(array, MappedRows):  # of which another axis is read whole
            tensor = _as_tensor(array[index] if isinstance(array, Tensor) else array[index.numpy()])
        else:
            tensor = _as_tensor(array)
            tensor = tensor if axis is None else tensor.index_select(axis, index)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def _cast(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        floats = [x.to(self.dtype) if x.is_floating_point() else x for x in tensors]
        labels = [x.long() if x.dtype == torch.uint8 else x for x in floats[1:]]
        return floats[:1] + labels


class DatasetSource(Source):
    """A map-style torch ``Dataset``: items are fetched one by one and collated."""

    def __init__(self, dataset: Dataset, device: torch.device, dtype: torch.dtype) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            fixes = ["a DataLoader around it"]
            raise DataError("data", "a map-style dataset", type(dataset).__name__, fixes)
        self.dataset, self.device, self.dtype = dataset, device, dtype
        self.num_rows = _check_length(len(dataset))

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The items at ``index``, collated."""
        fetch = getattr(self.dataset, "__getitems__", lambda rows: [self.dataset[i] for i in rows])
        return _as_batch(default_collate(fetch(index.tolist())), self.device, self.dtype)


class WholeSource(Source):
    """All rows of a source as one, for a pair whose data no plate counts."""

    num_rows = 1

    def __init__(self, source: Source) -> None:
        self.source, self.device, self.exact = source, source.device, source.exact
        self.axes = (None,) * len(first_batch(source, 1))

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        """All of them, whatever the index, which can be nothing but 0."""
        return self.source.rows(torch.arange(self.source.num_rows, device=self.device), generator)

    def along(self, axes: Axes) -> Source:
        """Back to the source that this is of."""
        return self if axes == self.axes else self.source.along(axes)


class LoaderSource(Source):
    """A user's own ``DataLoader``: its batches, in its order, epoch by epoch."""

    exact = False

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        dtype: torch.dtype,
        axes: Axes | None = None,
    ) -> None:
        if not hasattr(loader.dataset, "__len__"):
            raise DataError("data", "a dataset with a length", type(loader.dataset).__name__)
        self.loader, self.device, self.dtype, self.axes = loader, device, dtype, axes
        self.num_batches, self.num_rows = len(loader), len(loader.dataset)
        if axes and all(axis is None for axis in axes):
            self.num_rows = 1
            if self.num_batches > 1:
                expected = "one batch of all data, for a pair whose data no plate counts"
                fixes = ["pass loader.dataset", "a data plate: with pyro.plate('data', len(x))"]
                raise DataError("data", expected, f"{self.num_batches} batches", fixes)

    def along(self, axes: Axes) -> Source:
        """The same loader, in whose batches the rows are along these axes."""
        if axes == (self.axes or (0,) * len(axes)):
            return self
        return LoaderSource(self.loader, self.device, self.dtype, axes)

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Raises: a DataLoader has an order of its own."""
        raise ArgumentError("data", "rows by index", "a DataLoader", ["pass loader.dataset"])

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """One pass over the loader."""
        for batch in self.loader:
            yield _as_batch(batch, self.device, self.dtype)

    def all(self, chunk: int = 4096) -> Iterator[tuple[int, Batch]]:
        """One pass over the loader, whatever the chunk."""
        start = 0
        for batch in self.batches():
            yield start, batch
            start += num_rows_of(batch, self.axes)


def first_batch(source: Source, num_rows: int) -> Batch:
    """The first rows of a source; a ``DataLoader``'s first batch."""
    return next(source.all(min(num_rows, source.num_rows)))[1]


def in_memory(source: Source) -> Source:
    """The same data, to be read more than once in one order: a ``DataLoader`` is read out."""
    if not isinstance(source, LoaderSource):
        return source
    data = Data(joined(source.batches(), source.axes))
    return as_source(data, source.device, source.dtype, source.axes)


def joined(batches: Iterable[Batch], axes: Axes | None = None) -> Batch:
    """One batch with the rows of several; what all rows share is the first one's."""
    columns = [*zip(*batches, strict=True)]
    parts = zip(columns, axes or (0,) * len(columns), strict=True)
    return tuple(c[0] if axis is None else torch.cat(c, axis) for c, axis in parts)


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


def _as_batch(batch: object, device: torch.device, dtype: torch.dtype) -> Batch:
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    if not all(isinstance(p, Tensor) for p in parts):
        got = f"{type(batch).__name__} of {', '.join(sorted({type(p).__name__ for p in parts}))}"
        fixes = ["return (x, y) from the dataset", "a collate_fn that returns a tuple"]
        raise DataError("data", "items that are tensors, or tuples of tensors", got, fixes)
    dtypes = [dtype if p.is_floating_point() else p.dtype for p in parts]
    return tuple(p.to(device, d, non_blocking=True) for p, d in zip(parts, dtypes, strict=True))


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
        device: Where batches are wanted.
        dtype: What floating numbers are cast to; bytes and booleans in the first array, too.
            Bytes in other arrays are labels and become integers; all else stays as it is.
        axes: The axis that counts the rows in each array, None for one that all rows share; left
            out, the first axis of each. ``"any"`` is for a look at what a pair makes of them: where
            first axes differ, all arrays together are one row.

    Raises:
        DataError: If the data are empty, of unequal lengths, or not numbers.
    """
    device = torch.device(device)
    known = None if axes == "any" else axes
    if isinstance(data, Source):
        return data if known is None else data.along(known)
    if isinstance(data, DataLoader):
        return LoaderSource(data, device, dtype, known)
    if isinstance(data, Dataset):
        source = DatasetSource(data, device, dtype)
        return source if known is None else source.along(known)
    if hasattr(data, "train") and hasattr(data, "valid"):
        raise DataError("data", "one part of a data set", type(data).__name__, ["data.train"])
    if not isinstance(data, Data):
        data = Data(tuple(data) if isinstance(data, (tuple, list)) else (data,))
    if axes == "any" and not _is_even(data):
        known = (None,) * len(data.arrays)
    return ArraySource(_checked(data, known), device, dtype, known)


def _is_even(data: Data) -> bool:
    """Whether there are arrays, all with a first axis of one length."""
    shapes = [tuple(np.shape(a)) for a in data.arrays]
    return len({shape[:1] for shape in shapes}) == 1 and shapes[0] != ()


def _checked(data: Data, axes: Axes | None) -> Data:
    rows = None if data.arrays or axes is not None else 0
    axes = (0,) * len(data.arrays) if axes is None else axes
    arrays = tuple(_as_array(a, axis) for a, axis in zip(data.arrays, axes, strict=True))
    for i, (array, axis) in enumerate(zip(arrays, axes, strict=True)):
        name = "data" if len(arrays) == 1 else f"data[{i}]"
        _check_real(name, array)
        if axis is None:
            continue
        if array.ndim <= axis:
            raise DataError(name, "an array with one row a datum", "a single number")
        rows = array.shape[axis] if rows is None else rows
        if array.shape[axis] != rows:
            raise DataError(name, f"{rows} rows, like data[0]", f"{array.shape[axis]} rows")
    _check_length(1 if rows is None else rows)
    if data.binarize != "none":
        low, high = float(arrays[0].min()) * data.scale, float(arrays[0].max()) * data.scale
        if not (low >= 0 and high <= 1):
            expected = f"values in [0, 1] after scaling by {data.scale:g}, to binarise them"
            got = f"values from {low:g} to {high:g}"
            raise DataError("data", expected, got, ["scale=1 / 255, for bytes"])
    return replace(data, arrays=arrays)


def _check_real(name: str, array: Array) -> None:
    if isinstance(array, Tensor):
        is_real, fixes = not array.is_complex(), ["x.real"]
    else:
        is_real, fixes = array.dtype.kind in "biuf", ["array.astype(float)"]
    if not is_real:
        raise DataError(name, "real numbers", f"dtype {array.dtype}", fixes)


def _as_array(array: object, axis: int | None) -> Array:
    if isinstance(array, np.memmap) and array.ndim and axis == 0:
        return MappedRows(array)
    return array if isinstance(array, (Tensor, np.ndarray, MappedRows)) else np.asarray(array)


def _check_length(num_rows: int) -> int:
    if num_rows == 0:
        raise DataError("data", "at least one row", "no rows", ["is the path or the filter right?"])
    return num_rows


def check_rows(
    source: Source,
    support: Callable[[Tensor], Tensor] | None = None,
    describe: str = "",
    fixes: Sequence[str] = (),
    where: str = "data",
) -> None:
    """Refuses data with NaN, infinity or values outside a support, naming the first row.

    Arguments:
        source: The data; a DataLoader isn't read ahead, only its first batch is checked.
        support: From a batch of data to true where a value is possible; None for all values.
        describe: The support in words.
        fixes: What to try where the support is violated.
        where: What the data are called.

    Raises:
        DataError: Naming the array, the first offending row, and its value.
    """
    for start, batch in source.all():
        axes = source.axes or (0,) * len(batch)
        for i, (part, axis) in enumerate(zip(batch, axes, strict=True)):
            at = (source, start, where if len(batch) == 1 else f"{where}[{i}]", axis)
            if part.is_floating_point():
                _refuse(part, part.isfinite(), at, "finite values", _FILL)
            if i == 0 and support is not None:
                _refuse(part, support(part), at, describe, fixes)
        if isinstance(source, LoaderSource):
            return


def _refuse(
    part: Tensor,
    good: Tensor,
    at: tuple[Source, int, str, int | None],
    expected: str,
    fixes: Sequence[str],
) -> None:
    """Names the first row where ``good`` is false.

    ``at``: the source, its first row, the entry's name, and the axis of its rows.
    """
    if bool(good.all()):
        return
    source, start, name, axis = at
    good = good.reshape(good.shape + (1,) * (part.dim() - good.dim())).expand(part.shape)
    if axis is None:
        got = f"{part[~good][0].item():g} ({int((~good).sum())} such value(s))"
        raise DataError(name, expected, got, fixes)
    bad, part = (~good).movedim(axis, 0), part.movedim(axis, 0)
    bad, part = bad.reshape(len(bad), -1), part.reshape(len(part), -1)
    row = int(bad.any(1).nonzero()[0])
    got = f"{part[row][bad[row]][0].item():g} ({int(bad[row].sum())} such value(s) in this row)"
    raise DataError(f"{name}, row {source.origin_of(start + row)}", expected, got, fixes)
