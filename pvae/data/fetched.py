"""Sources of rows that a user's code makes: data sets, loaders, streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    default_collate,
)

from pvae.annotations import check_dense
from pvae.data import order
from pvae.data.checks import RowCheck
from pvae.data.sources import Axes, Batch, Source, check_length, num_rows_of
from pvae.devices import sent
from pvae.errors import ArgumentError, DataError, warn

__all__ = ["DatasetSource", "Fetched", "LoaderSource"]


class Fetched(Source):
    """The abstract source of rows that a user's code makes, perhaps other ones each time.

    Attributes:
        check: What rows have to be, looked at as they are read and before they are sent.
    """

    dtype: torch.dtype
    check: RowCheck | None = None

    def _ready(self, batch: object, named: Callable[[int], str]) -> Batch:
        """A batch checked, on the device; ``named`` has the words for a row of it."""
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        if not all(isinstance(p, Tensor) for p in parts):
            kinds = ", ".join(sorted({type(p).__name__ for p in parts}))
            fixes = ["return (x, y) from the dataset", "a collate_fn that returns a tuple"]
            expected, got = "items that are tensors, or tuples of tensors", type(batch).__name__
            raise DataError("data", expected, f"{got} of {kinds}", fixes)
        for part in parts:
            check_dense("data", part)
        if any(p.dim() == 0 for p in parts) and self.axes is None:
            fixes = ["DataLoader(dataset, batch_size=128)"]
            raise DataError("data", "batches with a row for each datum", "a single number", fixes)
        if self.check is not None:
            self.check(parts, named, self.axes)
        dtypes = [self.dtype if p.is_floating_point() else p.dtype for p in parts]
        typed = zip(parts, dtypes, strict=True)
        moved = (sent(p.to(d), self.device) for p, d in typed)
        return tuple(p.clone() if p.is_inference() else p for p in moved)


class DatasetSource(Fetched):
    """A map-style torch ``Dataset``: items are fetched one by one and collated."""

    indexed_on_host = True

    def __init__(self, dataset: Dataset, device: torch.device, dtype: torch.dtype) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            fixes = ["a DataLoader around it"]
            raise DataError("data", "a map-style dataset", type(dataset).__name__, fixes)
        self.dataset, self.device, self.dtype = dataset, device, dtype
        self.num_rows = check_length(len(dataset))

    def to(self, device: torch.device) -> Source:
        """The same items, sent to another device."""
        return DatasetSource(self.dataset, device, self.dtype)

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        """The items at ``index``, collated."""
        fetch = getattr(self.dataset, "__getitems__", lambda rows: [self.dataset[i] for i in rows])
        numbers = index.tolist()
        return self._ready(default_collate(fetch(numbers)), lambda row: f"row {numbers[row]}")


class LoaderSource(Fetched):
    """A user's own ``DataLoader``: its batches, in its order, epoch by epoch.

    Attributes:
        num_batches: Batches of an epoch.
        batch_size: Rows of a batch; None if only reading tells.
        drop_last: Whether a shorter last batch is left out.
    """

    exact = False

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        dtype: torch.dtype,
        axes: Axes | None = None,
    ) -> None:
        if not hasattr(loader.dataset, "__len__"):
            expected, kind = "a dataset with a length", type(loader.dataset).__name__
            fixes = ["a method __len__ of the dataset, which says how many rows an epoch has"]
            raise DataError("data", expected, kind, fixes)
        check_length(len(loader.dataset))
        order.refuse_once_only(loader.dataset)
        self.loader, self.device, self.dtype, self.axes = loader, device, dtype, axes
        self.num_batches = len(loader)
        self.batch_size, self.drop_last = order.rows_per_batch(loader)
        if not self.num_batches:
            raise _no_batch(self)
        if self.batch_size is None and isinstance(loader.dataset, TensorDataset):
            _refuse_single_rows(loader)
        if self._is_whole and self.num_batches > 1:
            expected = "one batch of all data, for a pair whose data no plate counts"
            fixes = ["pass loader.dataset", "a data plate: with pyro.plate('data', len(x))"]
            raise DataError("data", expected, f"{self.num_batches} batches", fixes)

    @property
    def _is_whole(self) -> bool:
        """Whether no plate counts the rows."""
        return bool(self.axes) and all(axis is None for axis in self.axes or ())

    @cached_property
    def num_rows(self) -> int:  # type: ignore[override]
        """Rows of an epoch; counted, where the loader's batches have lengths of their own."""
        if self._is_whole:
            return 1
        known = order.num_rows_of_loader(self.loader)
        if known is None:
            return sum(num_rows_of(batch, self.axes) for batch in self.batches())
        return known

    @cached_property
    def is_shuffled(self) -> bool:
        """Whether a pass may have another order than the one before."""
        return order.is_shuffled(self.loader)

    def ordered(self) -> LoaderSource:
        """The same rows in one order, which repeats; see `pvae.data.order.in_order`."""
        loader = order.in_order(self.loader)
        if lost := order.rows_left_out(loader):
            warn(
                f"The DataLoader has drop_last=True: results are of {self.num_rows} rows, without "
                f"the last {lost}. With drop_last=False they are of all."
            )
        if loader is self.loader:
            return self
        return LoaderSource(loader, self.device, self.dtype, self.axes)

    def along(self, axes: Axes) -> Source:
        """The same loader, in whose batches the rows are along these axes."""
        if axes == (self.axes or (0,) * len(axes)):
            return self
        return LoaderSource(self.loader, self.device, self.dtype, axes)

    def to(self, device: torch.device) -> Source:
        """The same batches, sent to another device."""
        return LoaderSource(self.loader, device, self.dtype, self.axes)

    def rows(self, index: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Raises: a DataLoader has an order of its own."""
        raise ArgumentError("data", "rows by index", "a DataLoader", ["pass loader.dataset"])

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """One pass over the loader."""
        number = -1
        for number, batch in enumerate(self.loader):
            yield self._ready(batch, partial("row {1} of batch {0}".format, number))
        if number < 0:
            raise _no_batch(self)

    def all(self, chunk: int = 4096) -> Iterator[tuple[int, Batch]]:
        """One pass over the loader, whatever the chunk."""
        start = 0
        for batch in self.batches():
            yield start, batch
            start += num_rows_of(batch, self.axes)


def _no_batch(source: LoaderSource) -> DataError:
    actual, fixes = "none", ["is the path or the filter right?"]
    if source.drop_last and source.batch_size is not None:
        rows = len(source.loader.dataset)  # type: ignore[arg-type]
        actual = f"none: {rows} rows, batches of {source.batch_size}, and drop_last=True"
        fixes = ["drop_last=False", f"batch_size={rows}"]
    elif isinstance(source.loader.dataset, IterableDataset):
        fixes = ["a stream that starts anew at each pass, as every epoch is one"]
    return DataError("data", "a DataLoader with at least one batch in each epoch", actual, fixes)


def _refuse_single_rows(loader: DataLoader) -> None:
    if order.is_by_row(loader):
        fixes = ["DataLoader(loader.dataset, batch_size=128)", "loader.dataset"]
        expected = "batches, with a row for each datum"
        raise DataError("data", expected, "single rows, of a DataLoader(batch_size=None)", fixes)
