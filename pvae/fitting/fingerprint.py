"""Fingerprints of data: whether a training that goes on has the rows that it began with."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from pvae.data import LoaderSource, Source, as_source
from pvae.data.fetched import DatasetSource
from pvae.data.order import order_in_words
from pvae.data.sources import ArraySource, Axes, WholeSource
from pvae.fitting.generators import own_generators
from pvae.randomness import forked

__all__ = ["digest_of", "fingerprint"]

LIMIT = 2**28
"""Bytes of data up to which all rows are read; of more, blocks of rows that are spread evenly."""

ITEMS = 2048
"""Rows up to which all are read where a user's code makes each one."""

Rows = Callable[[Tensor], Iterable[Tensor]]
Read = Callable[[Callable[[], str]], str]
_BLOCKS = 64
_BATCHES = 4  # of a stream, which can't be read by index
_CHUNK = 4096
_TWICE = 16  # rows that are read twice


def fingerprint(source: Source) -> str:
    """A digest of the rows in words, which say how many were read where not all were.

    Where a user's code makes the rows it may draw, and does so from generators of one seed, which
    are put back. Rows that are others at each read all the same are told by their number alone.
    """
    if isinstance(source, WholeSource):
        return fingerprint(source.source)
    own = own_generators(source)

    def read(make: Callable[[], str]) -> str:
        with forked(seed=0, own=own):
            return make()

    if isinstance(source, LoaderSource):
        return _of_loader(source, read) + f", {order_in_words(source.loader)}"
    if isinstance(source, DatasetSource):
        if type(source.dataset) is TensorDataset:
            return _of_tensors(source.dataset, source.dtype)
        return _of_items(source.num_rows, source.rows, read)
    return _of_rows(source.num_rows, source.stored, source) + _manner(source)


def _of_rows(
    num_rows: int, rows: Rows, source: Source | None = None, most: int | None = None
) -> str:
    """Of rows that are read by index: all, or blocks where they are large or many."""
    axes, device = (None, None) if source is None else (source.axes, source.device)
    size = sum(part.nbytes for part in rows(torch.arange(1, device=device)))
    asked = min(most or num_rows, max(LIMIT // max(size, 1), _BLOCKS))
    length, starts = num_rows, [0]
    if asked < num_rows:
        length = -(-asked // _BLOCKS)
        starts = [(num_rows - length) * block // (_BLOCKS - 1) for block in range(_BLOCKS)]
    spans = [range(s, s + length)[i : i + _CHUNK] for s in starts for i in range(0, length, _CHUNK)]
    indices = (torch.arange(span.start, span.stop, device=device) for span in spans)
    text = digest_of(map(rows, indices), axes)
    if asked < num_rows:
        return f"{text} of {length * _BLOCKS} of {num_rows} rows, in {_BLOCKS} blocks"
    return f"{text} of all {num_rows} rows"


def _of_tensors(dataset: TensorDataset, dtype: torch.dtype) -> str:
    return fingerprint(as_source(dataset.tensors, dtype=dtype))


def _of_items(num_rows: int, rows: Rows, read: Read) -> str:
    """Of rows that a user's code makes, if it makes the same ones twice."""
    few = torch.arange(min(_TWICE, num_rows))
    one, other = (read(lambda: digest_of([rows(few)])) for _ in range(2))
    if one != other:
        return f"{num_rows} rows that are others at each read"
    return read(lambda: _of_rows(num_rows, rows, most=ITEMS))


def _of_loader(source: LoaderSource, read: Read) -> str:
    """Of the rows behind a loader, by index where they have one, and else of its first batches."""
    loader, dataset = source.loader, source.loader.dataset
    if type(dataset) is TensorDataset:
        return _of_tensors(dataset, source.dtype)
    if not isinstance(dataset, IterableDataset) and loader.batch_sampler is not None:
        fetch = getattr(dataset, "__getitems__", lambda rows: [dataset[i] for i in rows])
        rows = lambda index: _tensors(loader.collate_fn(fetch(index.tolist())))  # noqa: E731
        with contextlib.suppress(LookupError, TypeError):  # of keys that are no numbers
            return _of_items(len(dataset), rows, read)  # type: ignore[arg-type]
    first = lambda: digest_of(map(_tensors, itertools.islice(iter(loader), _BATCHES)))  # noqa: E731
    one, other = read(first), read(first)
    return f"first {_BATCHES} batches " + (one if one == other else "are others at each read")


def _manner(source: Source) -> str:
    """How stored rows become those of a batch."""
    if not isinstance(source, ArraySource):
        return ""
    data = source.data
    scale = "" if data.scale == 1.0 else f", scale={data.scale}"
    drawn = "" if data.binarize == "none" else f", binarize={data.binarize}, seed={data.seed}"
    return scale + drawn


def digest_of(batches: Iterable[Iterable[Tensor]], axes: Axes | None = None) -> str:
    """A digest of all numbers of batches; of what all rows share once."""
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        for place, part in enumerate(batch):
            if number == 0 or axes is None or axes[place] is not None:
                flat = part.detach().cpu().contiguous().reshape(-1)
                digest.update(f"{part.dtype} {tuple(part.shape[1:])}".encode())
                digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _tensors(batch: object) -> list[Tensor]:
    """All numbers of a batch, however it is laid out."""
    if isinstance(batch, Mapping):
        batch = [*batch.values()]
    if isinstance(batch, list | tuple):
        return [tensor for part in batch for tensor in _tensors(part)]
    if isinstance(batch, bool | int | float | np.ndarray | np.generic):
        return [torch.as_tensor(batch)]
    return [batch] if isinstance(batch, Tensor) else []
