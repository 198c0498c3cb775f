"""What each observed site of a pair observes: which entry of the batch, and under which mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pvae.data import Axes
from pvae.errors import ArgumentError, UndefinedError, oxford
from pvae.pair.messages import infer_of, is_factor, mask_of, sample_sites
from pvae.pair.running import Batch
from pvae.pair.structure import Structure, is_inside

__all__ = ["DATA", "Observed", "observed_sites", "put_back"]

DATA = "pvae_data"
"""Key in the ``infer`` of an observed site whose value was drawn: the data that it observes."""


@dataclass(frozen=True)
class Observed:
    """What one observed site observes.

    Attributes:
        name: The site.
        data: What it observes, the data's axis first, shape ``(N, ...)``.
        axis: The axis of the data in the program; None for a site outside the data plate, and
            where there is none.
        mask: Which entries count, of the shape that a value has in the program; None if all do.
        places: Where in the batch the data stand: as they are, reshaped, or of another type.
        is_itself: Whether they are that entry of the batch itself, and not only equal to it.
        rows: Which rows of the entry they are, where the pair draws a subsample itself.
        part: Where they are a part of one entry, as a column is: its place, and which of its
            numbers they are, counted in its own order, shape ``(N, ...)``.
    """

    name: str
    data: Tensor
    axis: int | None
    mask: Tensor | None
    places: tuple[int, ...]
    is_itself: bool
    rows: Tensor | None
    part: tuple[int, Tensor] | None = None

    @property
    def place(self) -> int | None:
        """The place in the batch; None where no entry, or more than one, is these data."""
        return self.places[0] if len(self.places) == 1 else None


def observed_sites(structure: Structure, trace: Trace, batch: Batch) -> dict[str, Observed]:
    """What the observed sites of a trace of the model observe, by name; no factors.

    Their values may have been drawn: `DATA` then says what the data are.
    """
    rows = None
    if structure.subsample_size is not None and structure.plate in trace.nodes:
        rows = trace.nodes[structure.plate]["value"]
    observed = {}
    for site in sample_sites(trace):
        if not site["is_observed"] or is_factor(site):
            continue
        data, axis = torch.as_tensor(infer_of(site).get(DATA, site["value"])), None
        if structure.has_plate and is_inside(structure, site):
            axis = max(0, structure.axis_in(data.dim() - len(site["fn"].event_shape)) or 0)
            data = data.movedim(axis, 0) if data.dim() else data
        parts = [_rows_first(part, at) for part, at in zip(batch, structure.axes, strict=False)]
        itself = tuple(i for i, part in enumerate(parts) if _is_view(part, data))
        equal = tuple(i for i, part in enumerate(parts) if _is_equal(part, data, rows))
        known, part = itself or equal, None
        if not known and rows is None and structure.has_plate:
            part = _part_of(batch, data)
        data = data if structure.has_plate else data.unsqueeze(0)
        observed[site["name"]] = Observed(
            site["name"], data, axis, mask_of(site), known, bool(itself), rows, part
        )
    return observed


def put_back(
    where: str,
    observed: Mapping[str, Observed],
    values: Mapping[str, Tensor],
    batch: Batch,
    axes: Axes,
    places: Mapping[str, int] | None = None,
) -> Batch:
    """The batch with other data: each site's value in place of what the site observes.

    ``values`` are as the program has them, and ``axes`` count the rows in the batch. ``places``
    are the user's ``arguments=``, the places in the batch that can't be told, and None where the
    tool has no such option.

    Raises:
        ArgumentError: If there is no such site or place.
        UndefinedError: If some data are no entry of the batch, or share one.
    """
    filled, asked = list(batch), places or {}
    for name, place in asked.items():
        if name not in observed or not 0 <= place < len(batch):
            known = f"places from 0 to {len(batch) - 1}, of {oxford(observed)}"
            raise ArgumentError("arguments", known, f"{place} for '{name}'")
    taken: dict[int, Tensor] = {}
    for name, site in observed.items():
        value = values[name] if site.axis is None else values[name].movedim(site.axis, 0)
        at, numbers = asked.get(name, site.place), None
        if name not in asked and site.part is not None:
            at, numbers = site.part
        if at is None or site.rows is not None:
            raise _unplaced(where, site, can_ask=places is not None)
        rows_first = _rows_first(torch.arange(batch[at].numel()).reshape(batch[at].shape), axes[at])
        numbers = rows_first if numbers is None else numbers
        if numbers.numel() != value.numel():
            raise _unplaced(where, site, can_ask=places is not None)
        is_taken = taken.setdefault(at, torch.zeros(batch[at].numel(), dtype=torch.bool))
        if bool(is_taken[numbers].any()):
            shared = f"'{name}' and another, which share argument {at}"
            raise UndefinedError(where, "observed sites with an argument each", shared)
        is_taken[numbers] = True
        whole = filled[at].clone().flatten()
        whole[numbers.flatten().to(whole.device)] = value.flatten().to(whole.dtype)
        filled[at] = whole.reshape(batch[at].shape)
    return tuple(filled)


def _part_of(batch: Batch, data: Tensor) -> tuple[int, Tensor] | None:
    """Of which entry data are a part, and which numbers of it, if that can be told.

    They are where they share the entry's memory, as ``x[:, t]`` does; or, where they don't, the one
    place along an axis at which the entry has the same values.
    """
    tensors = [(i, part) for i, part in enumerate(batch) if isinstance(part, Tensor)]
    for find in (_by_memory, _by_value):
        found = [(i, numbers) for i, part in tensors if (numbers := find(part, data)) is not None]
        if len(found) == 1:
            return found[0]
    return None


def _by_memory(part: Tensor, data: Tensor) -> Tensor | None:
    own, its = part.untyped_storage(), data.untyped_storage()
    if own.data_ptr() != its.data_ptr() or part.dtype != data.dtype or not part.numel():
        return None
    numbers = torch.full((own.nbytes() // part.element_size(),), -1)
    view = numbers.as_strided(part.shape, part.stride(), part.storage_offset())
    view.copy_(torch.arange(part.numel()).reshape(part.shape))
    found = numbers.as_strided(data.shape, data.stride(), data.storage_offset()).clone()
    is_inside = bool((found >= 0).all()) and len(found.unique()) == found.numel()
    return found if is_inside else None


def _by_value(part: Tensor, data: Tensor) -> Tensor | None:
    found = []
    numbers = torch.arange(part.numel()).reshape(part.shape)
    for axis, size in enumerate(part.shape):
        rest = part.shape[:axis] + part.shape[axis + 1 :]
        if part.dim() < 2 or rest.numel() != data.numel() or part.device != data.device:
            continue
        found += [
            numbers.select(axis, i).reshape(data.shape)
            for i in range(size)
            if torch.equal(part.select(axis, i).reshape(data.shape).to(data.dtype), data)
        ]
    return found[0] if len(found) == 1 else None


def _unplaced(where: str, site: Observed, *, can_ask: bool) -> UndefinedError:
    expected = "one argument that is these data, as it is or reshaped, or a column of one"
    equal = f"arguments {', '.join(map(str, site.places))}, which are equal"
    by_hand = f"arguments={{'{site.name}': 0}}, the place of the argument"
    fixes = ["obs=x, with x as the model was given it", by_hand][: 1 + can_ask]
    actual = equal if len(site.places) > 1 else "none"
    return UndefinedError(f"{where}: data of site '{site.name}'", expected, actual, fixes)


def _rows_first(part: Any, axis: int | None) -> Any:
    """An entry of a batch with the axis of its rows first."""
    return part.movedim(axis, 0) if axis else part


def _is_view(part: object, data: Tensor) -> bool:
    """Whether the data are the entry itself, or the same memory in another shape."""
    if part is data:
        return True
    if not isinstance(part, Tensor) or part.numel() != data.numel() or not part.numel():
        return False
    view = part.reshape(data.shape)
    is_same = view.dtype == data.dtype and view.stride() == data.stride()
    return is_same and view.data_ptr() == data.data_ptr()


def _is_equal(part: object, data: Tensor, rows: Tensor | None) -> bool:
    if not isinstance(part, Tensor) or not part.dim() or part.device != data.device:
        return False
    if rows is not None:
        part = part[rows] if int(rows.max()) < len(part) else part
    same_size = part.numel() == data.numel()
    return same_size and torch.equal(part.reshape(data.shape).to(data.dtype), data)
