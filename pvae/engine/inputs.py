"""Numbers among a step's arguments that change all the time: as inputs of its graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pvae.errors import is_out_of_memory
from pvae.pair import Batch

__all__ = ["as_tensors", "type_of_numbers"]

Measure = Callable[[Batch], Sequence[Tensor]]
"""From arguments to the loss and the gradients of a step that is undone."""


def as_tensors(batch: Batch, dtype: torch.dtype, device: torch.device) -> Batch:
    """The arguments with each float as a tensor without axes."""
    return tuple(
        torch.full((), part, dtype=dtype, device=device) if type(part) is float else part
        for part in batch
    )


def type_of_numbers(
    batches: Sequence[Batch], measure: Measure, dtype: torch.dtype, device: torch.device
) -> torch.dtype | None:
    """The type of tensors with which a step gives the very numbers that floats give.

    None if there is no such type, as where a float is turned into another Python number, or a
    program takes another course.

    Arguments:
        batches: Arguments with the floats of several steps.
        measure: What is compared, to the last bit.
        dtype: What the pair computes in.
        device: Where the pair is.
    """
    double = [torch.float64] if device.type != "mps" else []
    for kind in dict.fromkeys([*double, dtype]):
        if all(_are_same(measure, batch, as_tensors(batch, kind, device)) for batch in batches):
            return kind
    return None


def _are_same(measure: Measure, batch: Batch, other: Batch) -> bool:
    try:
        ours, theirs = measure(batch), measure(other)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    pairs = list(zip(ours, theirs, strict=False))
    are_alike = len(ours) == len(theirs) and all(a.dtype == b.dtype for a, b in pairs)
    return are_alike and all(torch.equal(a, b) for a, b in pairs)
