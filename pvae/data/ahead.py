"""Batches fetched while the one before is worked on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["ahead"]

Batch = tuple[Tensor, ...]


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, each fetched by a thread while the one before is in use.

    On CUDA the thread has a stream of its own, so that a transfer from pinned memory runs beside
    the step; two batches are in memory at a time.

    Arguments:
        batches: Draws from no global generator, which the thread would share.
        device: Where the batches go.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch() -> Batch | None:
        with torch.cuda.stream(stream):  # None does nothing
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
