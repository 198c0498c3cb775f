"""Batches whose order is a function of (seed, epoch, step) and of nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor

from pvae.data.fetched import LoaderSource
from pvae.data.sources import ArraySource, Source, first_batch, num_rows_of
from pvae.distributed import World
from pvae.errors import check_int
from pvae.randomness import derive_seed

__all__ = ["Batches"]

_ORDER, _DRAW = 0, 1


class Batches:
    """Cuts a source into shuffled batches; shuffling and binarisation happen on the device.

    Arguments:
        source: The data.
        batch_size: Rows of a batch; the last of an epoch may have fewer. A ``DataLoader`` has
            a size and an order of its own.
        seed: With the number of the epoch, it fixes the order.
        shuffle: Whether each epoch has an order of its own.
        world: The processes that share each batch; ``batch_size`` counts the rows of all.

    Example:
        >>> from pvae.data import as_source
        >>> batches = Batches(as_source(torch.arange(5)), batch_size=2)
        >>> [batch[0].tolist() for batch in batches.epoch(0)]
        [[2, 1], [0, 3], [4]]
        >>> [batch[0].tolist() for batch in batches.epoch(0, start=1)]
        [[0, 3], [4]]
    """

    def __init__(
        self,
        source: Source,
        batch_size: int = 128,
        seed: int = 0,
        *,
        shuffle: bool = True,
        world: World | None = None,
    ) -> None:
        self.source, self.seed, self.shuffle = source, seed, shuffle
        self.world = world or World()
        if isinstance(source, LoaderSource):  # where they differ, as long as the first one
            batch_size = source.batch_size or num_rows_of(first_batch(source, 1), source.axes)
            self.shuffle = source.is_shuffled
        self.batch_size = min(check_int("batch_size", batch_size), source.num_rows)

    @property
    def num_rows(self) -> int:
        """Rows of the source."""
        return self.source.num_rows

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        if isinstance(self.source, LoaderSource):
            return self.source.num_batches
        return -(-self.source.num_rows // self.batch_size)

    @property
    def sizes(self) -> set[int]:
        """How many rows a process may get at once; not all are known of a ``DataLoader``."""
        source, last = self.source, self.source.num_rows % self.batch_size
        if isinstance(source, LoaderSource) and (source.drop_last or source.batch_size is None):
            last = 0
        return self.world.shares(self.batch_size) | self.world.shares(last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches of one epoch, from step ``start`` on.

        Arrays that aren't on the device are read, and sent there, a batch ahead.

        Of several processes each gets its own rows of every batch. The order is that of one
        process alone; a process without rows gets an empty tuple.
        """
        source = self.source
        if isinstance(source, LoaderSource):
            yield from itertools.islice(source.batches(), start, None)
        elif isinstance(source, ArraySource) and not source.resident:
            yield from _ahead(self._cut(epoch, start), source.device)
        else:
            yield from self._cut(epoch, start)

    def _cut(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        source, device = self.source, self.source.device
        generator = torch.Generator(device)
        if self.shuffle:
            generator.manual_seed(derive_seed(self.seed, epoch, _ORDER))
            order = torch.randperm(source.num_rows, generator=generator, device=device)
        else:
            order = torch.arange(source.num_rows, device=device)
        if source.indexed_on_host:
            order = order.cpu()  # once an epoch, not at each step
        for step in range(start, self.steps_per_epoch):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            index = index[self.world.share(len(index))]
            if source.random:
                own = () if self.world.is_first else (self.world.rank,)
                generator.manual_seed(derive_seed(self.seed, epoch, _DRAW, step, *own))
            yield source.rows(index, generator) if len(index) else ()


def _ahead(
    batches: Iterator[tuple[Tensor, ...]], device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """The same batches, each fetched by a thread while the one before is in use.

    They may draw from no global generator, which the thread would share. On CUDA the thread has a
    stream of its own, so that a transfer from pinned memory runs beside the step.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch() -> tuple[Tensor, ...] | None:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return next(batches, None)

    with ThreadPoolExecutor(1, "pvae-batches") as thread:
        coming = thread.submit(fetch)
        while (batch := coming.result()) is not None:
            if stream is not None:
                current = torch.cuda.current_stream(device)
                current.wait_stream(stream)
                for tensor in batch:
                    tensor.record_stream(current)
            coming = thread.submit(fetch)
            yield batch
