"""The data plate of a pair."""

from __future__ import annotations

from dataclasses import dataclass

from pyro.poutine.indep_messenger import CondIndepStackFrame as Frame

from pvae.errors import PairError, oxford
from pvae.types import Site

__all__ = ["DataPlate", "find_data_plate"]


@dataclass(frozen=True)
class DataPlate:
    """The plate that counts the data; model and guide may call it by different names."""

    name: str
    names: frozenset[str]
    dim: int
    size: int
    full_size: int

    def holds(self, site: Site) -> bool:
        """Whether a site is inside it."""
        return any(frame.name in self.names for frame in site["cond_indep_stack"])


def find_data_plate(
    of_model: list[Site], of_guide: list[Site], rows: int | None, plate: str | None
) -> DataPlate:
    """The plate that is named, or else the only one that has the batch's length.

    Raises:
        PairError: If there is none, or more than one, or the two programs scale it differently.
    """
    sites = [*of_model, *of_guide]
    in_model, in_guide = _frames(of_model), _frames(of_guide)
    frames = {**in_guide, **in_model}
    known = ", ".join(f"'{n}' of size {_size(f, sites)}" for n, f in frames.items()) or "none"
    if plate is not None:
        if plate not in frames:
            raise PairError(
                "plate",
                "the name of a vectorised plate of the pair",
                f"{plate!r}; the plates are: {known}",
            )
        chosen = frames[plate]
    elif rows is None:
        raise PairError(
            "batch",
            "a tensor with a row for each datum, or plate=NAME",
            "no tensor with rows",
            ["the data as the first argument of model and guide"],
        )
    else:
        chosen = _only(_candidates(frames, sites, rows), in_model, in_guide, sites, rows, known)
    names = {chosen.name} | {
        f.name for f in frames.values() if _is_same(f, chosen, in_model, in_guide, sites)
    }
    found = DataPlate(
        chosen.name, frozenset(names), chosen.dim, _size(chosen, sites), _full_size(chosen, sites)
    )
    for frame in (*in_model.values(), *in_guide.values()):
        if frame.name in names and _full_size(frame, sites) != found.full_size:
            raise PairError(
                f"data plate '{frame.name}'",
                "one full size in model and guide, by which both are scaled",
                f"{found.full_size} and {_full_size(frame, sites)}",
                [f"pyro.plate('{frame.name}', N, subsample_size=len(x)) in both"],
            )
    return found


def _frames(sites: list[Site]) -> dict[str, Frame]:
    return {f.name: f for s in sites for f in s["cond_indep_stack"] if f.vectorized}


def _size(frame: Frame, sites: list[Site]) -> int:
    """A plate's size; a plate written without one has the size of what stands in it."""
    if frame.size != -1:
        return int(frame.size)
    sizes = [1]
    for site in sites:
        if any(f.name == frame.name for f in site["cond_indep_stack"]):
            shape = site["fn"].batch_shape
            sizes.append(shape[frame.dim] if len(shape) >= -frame.dim else 1)
    return max(sizes)


def _full_size(frame: Frame, sites: list[Site]) -> int:
    full = frame.full_size
    return _size(frame, sites) if full in (None, -1) else int(full)


def _candidates(frames: dict[str, Frame], sites: list[Site], rows: int) -> list[Site]:
    by_size = [f for f in frames.values() if _size(f, sites) == rows]
    return by_size or [f for f in frames.values() if _full_size(f, sites) == rows]


def _is_same(
    a: Frame, b: Frame, in_model: dict[str, Frame], in_guide: dict[str, Frame], sites: list[Site]
) -> bool:
    """Whether two frames are one plate, which model and guide call by different names."""
    apart = (a.name in in_model) != (b.name in in_model) and (a.name in in_guide) != (
        b.name in in_guide
    )
    return apart and a.dim == b.dim and _size(a, sites) == _size(b, sites)


def _only(
    found: list[Frame],
    in_model: dict[str, Frame],
    in_guide: dict[str, Frame],
    sites: list[Site],
    rows: int,
    known: str,
) -> Frame:
    found = sorted(found, key=lambda f: f.name not in in_model)
    two_names = len(found) == 2 and _is_same(found[0], found[1], in_model, in_guide, sites)
    if len(found) == 1 or two_names:
        return found[0]
    if found:
        raise PairError(
            "data plate",
            f"one plate with the batch's length {rows}",
            oxford(f.name for f in found),
            [f"plate='{found[0].name}'", "a batch of another length"],
        )
    vectorised = "with pyro.plate('data', len(x)): z = pyro.sample('z', ...)"
    sequential = {f.name for s in sites for f in s["cond_indep_stack"] if not f.vectorized}
    fixes = [f"{vectorised}, in model and guide"]
    if sequential:
        fixes = [f"{vectorised}, instead of 'for i in pyro.plate(...)'"]
    elif known != "none":
        fixes = ["plate=NAME, for a plate of another length", *fixes]
    raise PairError(
        "data plate",
        f"a vectorised plate of the batch's length {rows}",
        f"only the sequential plate(s) {oxford(sequential)}"
        if sequential
        else f"plates: {known}"
        if known != "none"
        else "no plate at all",
        fixes,
    )
