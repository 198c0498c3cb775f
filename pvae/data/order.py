"""In which order a ``DataLoader`` gives rows, and the same rows in one order that repeats."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sized

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pvae.described import description
from pvae.errors import DataError

__all__ = [
    "in_order",
    "is_by_row",
    "is_shuffled",
    "num_rows_of_loader",
    "order_in_words",
    "refuse_once_only",
    "repeats",
    "rows_left_out",
    "rows_per_batch",
]

_LOOK = 64  # rows of an unknown sampler that two passes are compared by
_FIXED = (SequentialSampler, range, list, tuple)
_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
Picks = Iterable[object]


def _picks(loader: DataLoader) -> tuple[Picks | None, int | None]:
    """What picks the rows, and how many make a batch; None for a stream, and where it can't tell.

    A sampler picks rows or, without a size, whole batches of them.
    """
    if isinstance(loader.dataset, IterableDataset):
        return None, loader.batch_size
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(batches, BatchSampler):
        return batches.sampler, batches.batch_size
    return batches, None


def rows_per_batch(loader: DataLoader) -> tuple[int | None, bool]:
    """Rows of a batch, None if only reading tells; and whether a shorter last one is dropped."""
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return _picks(loader)[1], bool(getattr(batches, "drop_last", loader.drop_last))


def num_rows_of_loader(loader: DataLoader) -> int | None:
    """How many rows a pass over a loader gives; None if only reading tells."""
    picks, size = _picks(loader)
    if size is None:
        return None
    rows = picks if isinstance(picks, Sized) else loader.dataset
    if not isinstance(rows, Sized):
        fixes = ["a method __len__ of the dataset, which says how many rows an epoch has"]
        raise DataError("data", "a dataset with a length", type(loader.dataset).__name__, fixes)
    drops = rows_per_batch(loader)[1] and not is_shuffled(loader)
    return len(rows) // size * size if drops else len(rows)


def repeats(loader: DataLoader) -> bool:
    """Whether the order of a pass is sure to depend on generators at its start alone."""
    picks, _ = _picks(loader)
    has_memory = loader.num_workers > 0 and loader.persistent_workers
    return type(picks) in (*_FIXED, *_SHUFFLING) and not has_memory


def order_in_words(loader: DataLoader) -> str:
    """What picks the rows of a loader, with its settings, and how many make a batch."""
    picks, size = _picks(loader)
    names = ("replacement", "num_samples", "indices", "weights")
    kept = {name: description(getattr(picks, name)) for name in names if hasattr(picks, name)}
    settings = ", ".join(f"{name}={text}" for name, text in kept.items())
    return f"{type(picks).__name__}({settings}), batches of {size}"


def rows_left_out(loader: DataLoader) -> int:
    """How many rows ``drop_last`` leaves out of each pass, always the same ones."""
    picks, size = _picks(loader)
    is_known = size is not None and isinstance(picks, Sized) and rows_per_batch(loader)[1]
    return len(picks) % size if is_known else 0  # type: ignore[arg-type, operator]


def is_shuffled(loader: DataLoader) -> bool:
    """Whether a pass may have another order than the one before.

    Of samplers that torch doesn't have, and of streams, two passes are compared.
    """
    picks, _ = _picks(loader)
    if isinstance(picks, _FIXED):
        return False
    if isinstance(picks, _SHUFFLING):
        return True
    if picks is None:
        one, other = (next(iter(loader), None) for _ in range(2))
        return not _is_same(one, other)
    return _first(picks) != _first(picks)


def _first(picks: Picks) -> list[object]:
    return [torch.as_tensor(i).tolist() for i in itertools.islice(iter(picks), _LOOK)]


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(((one == other) | (one != one)).all())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return one is other


def in_order(loader: DataLoader) -> DataLoader:
    """A loader of the same rows whose passes have one order.

    That is the loader itself where its order repeats, the data set's order for a loader that
    shuffles all of it, and the order of the indices for a ``SubsetRandomSampler``.

    Raises:
        DataError: If rows are drawn, with weights or more than once, or an unknown sampler or
            stream has another order in each pass: results couldn't be told apart by row.
    """
    if not is_shuffled(loader):
        return loader
    picks, size = _picks(loader)
    if isinstance(picks, SubsetRandomSampler):
        rows: list[int] | range = [int(i) for i in picks.indices]
    elif _is_permutation(picks, loader):
        rows = range(len(loader.dataset))  # type: ignore[arg-type]
    else:
        who = type(loader.dataset if picks is None else picks).__name__
        expected = "rows whose order is the same at each pass, as results are told apart by row"
        fixes = ["DataLoader(loader.dataset, batch_size=128)", "loader.dataset"]
        if picks is None:
            fixes = ["a stream that starts anew, in the same order, at each pass", "arrays"]
        raise DataError("data", expected, f"a DataLoader whose {who} has another each time", fixes)
    made = functools.partial(
        DataLoader,
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
    )
    if loader.batch_sampler is None:  # the sampler of items picks batches
        assert size is not None  # noqa: S101
        return made(batch_size=None, sampler=BatchSampler(rows, size, drop_last=False))
    return made(batch_size=size, sampler=rows)


def _is_permutation(picks: Picks | None, loader: DataLoader) -> bool:
    """Whether a pass is all of the data set, each row once."""
    is_plain = isinstance(picks, RandomSampler) and not picks.replacement
    return is_plain and picks.num_samples == len(loader.dataset)  # type: ignore[union-attr, arg-type]


def refuse_once_only(dataset: object) -> None:
    """Refuses a stream that can be read once: a second pass would go on where the first stopped."""
    if isinstance(dataset, IterableDataset) and (one := iter(dataset)) is iter(dataset):
        expected = "a stream that starts anew at each pass, as every epoch is one"
        actual = f"{type(dataset).__name__}, whose __iter__ returns one {type(one).__name__}"
        fixes = [
            "an __iter__ that makes a new iterator",
            "DataLoader(list(dataset), batch_size=128)",
        ]
        raise DataError("data", expected, actual, fixes)


def is_by_row(loader: DataLoader) -> bool:
    """Whether the loader gives the rows of its data set one by one, without an axis of rows."""
    picks, size = _picks(loader)
    if size is not None or loader.batch_size is not None or loader.batch_sampler is not None:
        return False
    return picks is not None and not isinstance(next(iter(picks), None), list | tuple)
