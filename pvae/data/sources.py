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

__all__ = ["Data", "LoaderSource", "Source", "as_source", "check_rows", "first_batch", "in_memory"]

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


class Source(ABC):
    """The abstract source: ``rows(index)`` is a batch, a tuple of tensors on the device.

    To write one, define ``num_rows``, `rows`, and set ``exact`` if a row depends on its index
    alone (and, where ``random``, on the generator), which is what exact resume needs.
    """

    num_rows: int
    device: torch.device
    exact = True
    random = False
    """Whether `rows` draws from the generator it is given."""

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

    def __init__(self, data: Data, device: torch.device, dtype: torch.dtype) -> None:
        self.data = data.fixed() if data.binarize == "static" else data
        self.num_rows, self.device, self.dtype = len(data), device, dtype
        self.random = self.data.binarize == "dynamic"
        resident = not any(isinstance(a, MappedRows) for a in self.data.arrays)
        if device.type == "cuda" and resident:
            size = sum(a.nbytes for a in self.data.arrays)
            resident = size < 0.5 * torch.cuda.mem_get_info(device)[0]
        self.resident = resident
        on_device = self.data.arrays if resident else ()
        self._tensors = self._cast(_as_tensor(a).to(device) for a in on_device)

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The rows at ``index``; the first array scaled and binarised."""
        if self.resident:
            batch = [x.index_select(0, index) for x in self._tensors]
        else:
            host = index.cpu()
            batch = self._cast(self._send(a, host) for a in self.data.arrays)
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

    def _send(self, array: Array, index: Tensor) -> Tensor:
        tensor = _as_tensor(array[index] if isinstance(array, Tensor) else array[index.numpy()])
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


class LoaderSource(Source):
    """A user's own ``DataLoader``: its batches, in its order, epoch by epoch."""

    exact = False

    def __init__(self, loader: DataLoader, device: torch.device, dtype: torch.dtype) -> None:
        if not hasattr(loader.dataset, "__len__"):
            raise DataError("data", "a dataset with a length", type(loader.dataset).__name__)
        self.loader, self.device, self.dtype = loader, device, dtype
        self.num_batches, self.num_rows = len(loader), len(loader.dataset)

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
            start += len(batch[0])


def first_batch(source: Source, num_rows: int) -> Batch:
    """The first rows of a source; a ``DataLoader``'s first batch."""
    return next(source.all(min(num_rows, source.num_rows)))[1]


def in_memory(source: Source) -> Source:
    """The same data, to be read more than once in one order: a ``DataLoader`` is read out."""
    if not isinstance(source, LoaderSource):
        return source
    columns = zip(*source.batches(), strict=True)
    data = Data(tuple(torch.cat(column) for column in columns))
    return as_source(data, source.device, source.dtype)


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
    data: object, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Source:
    """Turns data into a `Source`.

    Arguments:
        data: A `Data`; an array, tensor or ``np.memmap``; a tuple of them with a common first
            axis; a map-style torch ``Dataset``; a ``DataLoader``; a `Source`.
        device: Where batches are wanted.
        dtype: What floating numbers are cast to; bytes and booleans in the first array, too.
            Bytes in other arrays are labels and become integers; all else stays as it is.

    Raises:
        DataError: If the data are empty, of unequal lengths, or not numbers.
    """
    device = torch.device(device)
    if isinstance(data, Source):
        return data
    if isinstance(data, DataLoader):
        return LoaderSource(data, device, dtype)
    if isinstance(data, Dataset):
        return DatasetSource(data, device, dtype)
    if hasattr(data, "train") and hasattr(data, "valid"):
        raise DataError("data", "one part of a data set", type(data).__name__, ["data.train"])
    if not isinstance(data, Data):
        data = Data(tuple(data) if isinstance(data, (tuple, list)) else (data,))
    return ArraySource(_checked(data), device, dtype)


def _checked(data: Data) -> Data:
    arrays = tuple(_as_array(a) for a in data.arrays)
    for i, array in enumerate(arrays):
        name = "data" if len(arrays) == 1 else f"data[{i}]"
        _check_real(name, array)
        if array.ndim == 0:
            raise DataError(name, "an array with one row a datum", "a single number")
        if len(array) != len(arrays[0]):
            raise DataError(name, f"{len(arrays[0])} rows, like data[0]", f"{len(array)} rows")
    _check_length(len(arrays[0]) if arrays else 0)
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


def _as_array(array: object) -> Array:
    if isinstance(array, np.memmap) and array.ndim:
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
        for i, part in enumerate(batch):
            name = where if len(batch) == 1 else f"{where}[{i}]"
            if part.is_floating_point():
                _refuse(part, part.isfinite(), (source, start, name), "finite values", _FILL)
            if i == 0 and support is not None:
                _refuse(part, support(part), (source, start, name), describe, fixes)
        if isinstance(source, LoaderSource):
            return


def _refuse(
    part: Tensor, good: Tensor, at: tuple[Source, int, str], expected: str, fixes: Sequence[str]
) -> None:
    """Names the first row where ``good`` is false; ``at``: its source, first row, and name."""
    if bool(good.all()):
        return
    good = good.reshape(good.shape + (1,) * (part.dim() - good.dim()))
    bad = ~good.expand(part.shape).reshape(len(part), -1)
    row = int(bad.any(1).nonzero()[0])
    value = part.reshape(len(part), -1)[row][bad[row]][0].item()
    got = f"{value:g} ({int(bad[row].sum())} such value(s) in this row)"
    source, start, name = at
    raise DataError(f"{name}, row {source.origin_of(start + row)}", expected, got, fixes)
