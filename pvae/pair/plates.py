"""The sites of a pair that have a density, and the plate that counts its data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame as Frame

from pvae.errors import PairError, oxford
from pvae.pair.messages import in_plates, sample_sites
from pvae.types import Site

__all__ = ["DataPlate", "Sites"]


@dataclass(frozen=True)
class DataPlate:
    """The plate that counts the data; model and guide may call it by different names."""

    name: str
    plates: frozenset[str]
    dim: int
    size: int
    full_size: int


class Sites:
    """The sites of a traced pair that have a density, and its data plate.

    Attributes:
        in_model: The model's, by name.
        in_guide: The guide's.
        guided: Those of the guide that it draws.
        all: The guide's and then the model's.
        latents: Names of those that the model draws, and the guide too.
        unguided: Names of those that the model alone draws.
        data_plate: The plate that is named, or else the only one that has the batch's length.
    """

    def __init__(
        self, model_trace: Trace, guide_trace: Trace, rows: int | None, plate: str | None
    ) -> None:
        self.in_model = {s["name"]: s for s in sample_sites(model_trace)}
        self.in_guide = {s["name"]: s for s in sample_sites(guide_trace)}
        self.guided = {n: s for n, s in self.in_guide.items() if not s["is_observed"]}
        self.all = [*self.in_guide.values(), *self.in_model.values()]
        drawn = [n for n, s in self.in_model.items() if not s["is_observed"]]
        self.latents = [name for name in drawn if name in self.guided]
        self.unguided = [name for name in drawn if name not in self.guided]
        self.data_plate = _data_plate(self, rows, plate)

    def is_inside(self, site: Site) -> bool:
        """Whether a site is inside the data plate."""
        return in_plates(self.data_plate.plates, site)

    def outside(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the names whose sites, in model and guide, are outside the data plate."""
        inside = {site["name"] for site in self.all if self.is_inside(site)}
        return tuple(dict.fromkeys(name for name in names if name not in inside))


def _data_plate(sites: Sites, rows: int | None, plate: str | None) -> DataPlate:
    in_model = _frames(sites.in_model.values(), sites.all)
    in_guide = _frames(sites.in_guide.values(), sites.all)
    frames = in_guide | in_model

    def is_same(a: Frame, b: Frame) -> bool:
        """Whether two frames are one plate, which model and guide call by different names."""
        apart = all((a.name in own) != (b.name in own) for own in (in_model, in_guide))
        return apart and (a.dim, a.size) == (b.dim, b.size)

    if plate is not None:
        if plate not in frames:
            expected = "the name of a vectorised plate of the pair"
            raise PairError("plate", expected, f"{plate!r}; the plates are: {_words(frames)}")
        chosen = frames[plate]
    else:
        candidates = _of_length(frames, rows)
        candidates.sort(key=lambda f: f.name not in in_model)
        if len(candidates) != 1 and not (len(candidates) == 2 and is_same(*candidates)):
            raise _undecided(candidates, frames, sites.all, rows)
        chosen = candidates[0]
    names = {chosen.name} | {f.name for f in frames.values() if is_same(f, chosen)}
    for frame in (*in_model.values(), *in_guide.values()):
        if frame.name in names and frame.full_size != chosen.full_size:
            raise PairError(
                f"data plate '{frame.name}'",
                "one full size in model and guide, by which both are scaled",
                f"{chosen.full_size} and {frame.full_size}",
                [f"pyro.plate('{frame.name}', N, subsample_size=len(x)) in both"],
            )
    return DataPlate(chosen.name, frozenset(names), chosen.dim, chosen.size, chosen.full_size)


def _frames(of_program: Iterable[Site], sites: list[Site]) -> dict[str, Frame]:
    """A program's vectorised plates; one without a size has the size of what stands in it."""
    frames = {f.name: f for s in of_program for f in s["cond_indep_stack"] if f.vectorized}
    for name, frame in frames.items():
        size = _filled_size(frame, sites) if frame.size == -1 else int(frame.size)
        full_size = size if frame.full_size in (None, -1) else int(frame.full_size)
        frames[name] = frame._replace(size=size, full_size=full_size)
    return frames


def _filled_size(frame: Frame, sites: list[Site]) -> int:
    shapes = [s["fn"].batch_shape for s in sites if in_plates(frozenset({frame.name}), s)]
    return max([1, *(shape[frame.dim] for shape in shapes if len(shape) >= -frame.dim)])


def _of_length(frames: dict[str, Frame], rows: int | None) -> list[Frame]:
    if rows is None:
        expected = "a tensor with a row for each datum, or plate=NAME"
        fixes = ["the data as the first argument of model and guide"]
        raise PairError("batch", expected, "no tensor with rows", fixes)
    by_size = [f for f in frames.values() if f.size == rows]
    return by_size or [f for f in frames.values() if f.full_size == rows]


def _words(frames: dict[str, Frame]) -> str:
    return ", ".join(f"'{name}' of size {f.size}" for name, f in frames.items()) or "none"


def _undecided(
    candidates: list[Frame], frames: dict[str, Frame], sites: list[Site], rows: int | None
) -> PairError:
    if candidates:
        fixes = [f"plate='{candidates[0].name}'", "a batch of another length"]
        names = oxford(f.name for f in candidates)
        return PairError("data plate", f"one plate with the batch's length {rows}", names, fixes)
    vectorised = "with pyro.plate('data', len(x)): z = pyro.sample('z', ...)"
    fixes, actual = [f"{vectorised}, in model and guide"], "no plate at all"
    if sequential := {f.name for s in sites for f in s["cond_indep_stack"] if not f.vectorized}:
        fixes = [f"{vectorised}, instead of 'for i in pyro.plate(...)'"]
        actual = f"only the sequential plate(s) {oxford(sequential)}"
    elif frames:
        fixes.insert(0, "plate=NAME, for a plate of another length")
        actual = f"plates: {_words(frames)}"
    return PairError(
        "data plate", f"a vectorised plate of the batch's length {rows}", actual, fixes
    )
