"""Where in a batch the rows are that a data plate counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from pyro.poutine import Trace
from torch import Tensor

from pvae import randomness
from pvae.data import Axes
from pvae.errors import PairError, PvaeError
from pvae.pair.messages import is_factor, log_prob_of, sample_sites
from pvae.pair.plates import DataPlate, Sites
from pvae.pair.running import Batch
from pvae.types import Site

__all__ = ["find_rows"]

Run = Callable[[Batch], Trace]
_AT_MOST = 32  # runs


def find_rows(sites: Sites, batch: Batch, run: Run) -> tuple[Axes, Trace | None]:
    """The axis of the rows in each entry of a batch; the model's trace on one row fewer.

    An entry whose axes all have other lengths than the plate is shared by all rows. Where several
    axes have it, the one along which the pair runs on one row fewer counts the rows. The trace is
    None where the pair runs on no other number of rows, as with parameters for each row.

    Arguments:
        sites: The sites of the pair and its data plate.
        batch: The batch that they were traced on.
        run: Gives the model's trace on another batch.

    Raises:
        PairError: If no axis has the plate's length, or it can't be told which one.
    """
    plate = sites.data_plate
    if plate is None:
        return (None,) * len(batch), None
    size, length = plate.size, plate.rows
    options = [_axes_of(part, length) for part in batch]
    if not any(options):
        expected = f"an axis of the batch of the plate's length {length}"
        fixes = ["plate=NAME, of another plate", "plate=False, where no plate counts the data"]
        actual = f"shapes {', '.join(str(tuple(p.shape)) for p in batch if isinstance(p, Tensor))}"
        raise PairError(f"data plate '{plate.name}'", expected, actual, fixes)
    before = randomness.get_state()

    def fewer(axes: Axes) -> Trace | None:
        with randomness.forked():
            randomness.set_state(before)
            trace = _fewer(run, batch, axes, length)
        is_cut = trace is not None and (size != length or _size_of(plate, trace) == size - 1)
        same = is_cut and {s["name"] for s in sample_sites(trace)} == {*sites.in_model}
        return trace if same else None

    for axes in itertools.islice(_choices(options), _AT_MOST) if length > 1 else ():
        if (trace := fewer(axes)) is not None:
            _check_shared(axes, trace, fewer, plate)
            return axes, trace
    return _by_looking(sites, plate, batch, options), None


def _check_shared(
    axes: Axes, trace: Trace, fewer: Callable[[Axes], Trace | None], plate: DataPlate
) -> None:
    """Refuses an entry that may be of rows or shared by all, and counts for something."""
    counted = [i for i, axis in enumerate(axes) if axis is not None]
    for i in counted if len(counted) > 1 else ():
        other = fewer((*axes[:i], None, *axes[i + 1 :]))
        if other is not None and not _is_same(trace, other):
            expected = f"rows of the data in argument {i}, or another length where all share it"
            actual = f"the plate's length {plate.rows}, and a pair that runs either way"
            fixes = ["a batch of another length", "what all rows share outside of the batch"]
            raise PairError(f"data plate '{plate.name}'", expected, actual, fixes)


def _is_same(one: Trace, other: Trace) -> bool:
    """Whether two traces score the same."""
    both = zip(sample_sites(one), sample_sites(other), strict=False)
    return all(torch.equal(log_prob_of(a), log_prob_of(b)) for a, b in both)


def _axes_of(part: object, length: int) -> list[int]:
    shape = part.shape if isinstance(part, Tensor) else ()
    return [axis for axis, size in enumerate(shape) if size == length]


def _choices(options: list[list[int]]) -> Iterator[Axes]:
    """The first axis of each entry that has the length, then others, then entries without rows."""
    rows_or_none: list[list[int | None]] = [[*axes, None] for axes in options]
    every = itertools.product(*rows_or_none)
    yield from (axes for axes in every if any(axis is not None for axis in axes))


def _fewer(run: Run, batch: Batch, axes: Axes, length: int) -> Trace | None:
    """The model's trace on one row fewer; None if the pair doesn't run on them."""
    cut = zip(batch, axes, strict=True)
    fewer = tuple(b if axis is None else b.narrow(axis, 0, length - 1) for b, axis in cut)
    try:
        trace = run(fewer)
    except PvaeError:
        return None
    return trace if all(map(_fills_its_plates, sample_sites(trace))) else None


def _fills_its_plates(site: Site) -> bool:
    shape = site["value"].shape if isinstance(site["value"], Tensor) else ()
    batch = tuple(shape)[: len(shape) - len(site["fn"].event_shape)]
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and -f.dim <= len(batch)]
    return all(batch[f.dim] in (1, f.size) or f.size < 0 for f in frames)


def _size_of(plate: DataPlate, trace: Trace) -> int | None:
    """The data plate's size in a trace; of one that has no size, that of what stands in it."""
    found = None
    for site in sample_sites(trace):
        for frame in site["cond_indep_stack"]:
            if frame.name in plate.plates:
                shape = site["fn"].batch_shape
                filled = shape[frame.dim] if len(shape) >= -frame.dim else 1
                found = max(found or 1, int(frame.size) if frame.size != -1 else filled)
    return found


def _by_looking(sites: Sites, plate: DataPlate, batch: Batch, options: list[list[int]]) -> Axes:
    """The axes of rows where the pair can't be run on fewer: those of the data in their sites."""
    seen: dict[int, int] = {}
    for site in sites.in_model.values():
        if site["is_observed"] and not is_factor(site) and sites.is_inside(site):
            for i, part in enumerate(batch):
                if part is site["value"]:
                    seen[i] = part.dim() - len(site["fn"].event_shape) + plate.dim
    first = 0 in seen.values() or all(0 in axes for axes in options if axes)
    axes: list[int | None] = []
    for i, own in enumerate(options):
        if i in seen and seen[i] in own:
            axes.append(seen[i])
        elif len(own) > 1 and not (first and 0 in own):
            expected = f"one axis of the plate's length {plate.rows} in argument {i} of the pair"
            actual = f"axes {', '.join(map(str, own))} of shape {tuple(batch[i].shape)}"
            fixes = ["a batch of another length", "the rows as the first axis of each argument"]
            raise PairError(f"data plate '{plate.name}'", expected, actual, fixes)
        else:
            axes.append(own[0] if own else None)
    return tuple(axes)
