"""What each observed site of a pair observes: which entry of the batch, and under which mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro.poutine import Trace
from torch import Tensor

from pvae.errors import ArgumentError, UndefinedError, oxford
from pvae.pair.messages import is_factor, mask_of, sample_sites
from pvae.pair.probe import Batch
from pvae.pair.structure import Structure
from pvae.types import Site

__all__ = ["DATA", "Observed", "data_of", "is_inside", "observed_sites", "put_back"]

DATA = "pvae_data"
"""Key in the ``infer`` of an observed site whose value was drawn: the data that it observes."""


@dataclass(frozen=True)
class Observed:
    """What one observed site observes.

    Attributes:
        name: The site.
        data: What it observes, the data's axis first, shape ``(N, ...)``.
        axis: The axis of the data in the program; None for a site outside the data plate.
        mask: Which entries count, of the shape that a value has in the program; None if all do.
        places: Where in the batch the data stand: as they are, reshaped, or of another type.
        is_itself: Whether they are that entry of the batch itself, and not only equal to it.
        rows: Which rows of the entry they are, where the pair draws a subsample itself.
    """

    name: str
    data: Tensor
    axis: int | None
    mask: Tensor | None
    places: tuple[int, ...]
    is_itself: bool
    rows: Tensor | None

    @property
    def place(self) -> int | None:
        """The place in the batch; None where no entry, or more than one, is these data."""
        return self.places[0] if len(self.places) == 1 else None

    def as_entry(self, value: Tensor, like: Tensor) -> Tensor:
        """A value that the site might have observed, as the entry of the batch would have it."""
        value = value if self.axis is None else value.movedim(self.axis, 0)
        return value.reshape(like.shape).to(like.dtype)


def observed_sites(structure: Structure, trace: Trace, batch: Batch) -> dict[str, Observed]:
    """What the observed sites of a model's trace observe, by name; factors aren't among them.

    Arguments:
        structure: The pair, as `Pair.inspect` found it.
        trace: Of one run of its model on the batch, with or without data drawn by `DATA`.
        batch: What the model was called with.
    """
    rows = None
    if structure.subsample_size is not None and structure.plate in trace.nodes:
        rows = trace.nodes[structure.plate]["value"]
    sites = {}
    for site in sample_sites(trace):
        if not site["is_observed"] or is_factor(site):
            continue
        data, axis = data_of(site), None
        if is_inside(structure, site):
            axis = max(0, data.dim() - len(site["fn"].event_shape) + structure.dim)
            data = data.movedim(axis, 0) if data.dim() else data
        itself = tuple(i for i, part in enumerate(batch) if _is_view(part, data))
        equal = tuple(i for i, part in enumerate(batch) if _is_equal(part, data, rows))
        sites[site["name"]] = Observed(
            site["name"], data, axis, mask_of(site), itself or equal, bool(itself), rows
        )
    return sites


def is_inside(structure: Structure, site: Site) -> bool:
    """Whether a site is inside the data plate."""
    return any(frame.name in structure.plates for frame in site["cond_indep_stack"])


def data_of(site: Site) -> Tensor:
    """What an observed site observes, also where its value was drawn."""
    return torch.as_tensor((site["infer"] or {}).get(DATA, site["value"]))


def put_back(
    where: str,
    observed: Mapping[str, Observed],
    values: Mapping[str, Tensor],
    batch: Batch,
    places: Mapping[str, int] | None = None,
) -> Batch:
    """The batch with other data: each site's value in place of what the site observes.

    Arguments:
        where: The tool, for error messages.
        observed: From `observed_sites`.
        values: By observed site, as the program has them.
        batch: What the pair was called with.
        places: The user's ``arguments=``: places in the batch that can't be told; None where the
            tool has no such option.

    Raises:
        ArgumentError: If there is no such site or place.
        UndefinedError: If some data are no entry of the batch, or share one.
    """
    filled, asked = list(batch), dict[str, int | None](places or {})
    for name, index in (places or {}).items():
        if name not in observed or not 0 <= index < len(batch):
            known = f"places from 0 to {len(batch) - 1}, of {oxford(observed)}"
            raise ArgumentError("arguments", known, f"{index} for '{name}'")
    for name, site in observed.items():
        place = asked.get(name, site.place)
        if place is None or site.rows is not None or batch[place].numel() != values[name].numel():
            equal = f"arguments {', '.join(map(str, site.places))}, which are equal"
            by_hand = f"arguments={{'{name}': 0}}, the place of the argument"
            raise UndefinedError(
                f"{where}: data of site '{name}'",
                "one argument of the pair that is these data, as it is or reshaped",
                equal if len(site.places) > 1 else "none",
                ["obs=x, with x as the model was given it", *([] if places is None else [by_hand])],
            )
        if filled[place] is not batch[place]:
            what = f"'{name}' and another, which share argument {place}"
            raise UndefinedError(where, "observed sites with an argument each", what)
        filled[place] = site.as_entry(values[name], batch[place])
    return tuple(filled)


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
