"""The sites of a pair that have a density, and the plate that counts its data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame as Frame
from torch import Tensor

from pvae.errors import PairError, oxford
from pvae.pair.messages import in_plates, infer_of, is_factor, is_penalty, sample_sites
from pvae.pair.running import Batch
from pvae.types import Site

__all__ = ["DataPlate", "PlateName", "Sites"]

PlateName = str | Literal[False] | None
"""Of the plate that counts the data: its name, False where none does, None to find it out."""


@dataclass(frozen=True)
class DataPlate:
    """The plate that counts the data; model and guide may call it by different names.

    ``rows`` is the number of rows that it has in the batch: its size, or, where it draws a
    subsample by itself, its full size.
    """

    name: str
    plates: frozenset[str]
    dim: int
    size: int
    full_size: int
    rows: int


class Sites:
    """The sites of a traced pair that have a density, and its data plate.

    Attributes:
        in_model: The model's, by name.
        in_guide: The guide's.
        guided: Those of the guide that it draws.
        all: The guide's and then the model's.
        training: Names of the guide's factors that are no part of a density.
        latents: Names of those that the model draws, and the guide too.
        imputed: Names of those that the model alone draws as ``obs_mask=`` says that they miss.
        unguided: Names of all others that the model alone draws.
        data_plate: The plate that is named, or else the only one that has the batch's length; None
            where no plate counts the data, or all share a state that is summed out. They are one
            datum then.
    """

    def __init__(
        self,
        model_trace: Trace,
        guide_trace: Trace,
        batch: Batch,
        plate: PlateName,
        densities: tuple[str, ...] = (),
    ) -> None:
        self.in_model = {s["name"]: s for s in sample_sites(model_trace)}
        self.in_guide = {s["name"]: s for s in sample_sites(guide_trace)}
        self.guided = {n: s for n, s in self.in_guide.items() if not s["is_observed"]}
        self.all = [*self.in_guide.values(), *self.in_model.values()]
        unmarked = [n for n, s in self.in_guide.items() if is_factor(s) and not is_penalty(s)]
        self.training = tuple(name for name in unmarked if name not in densities)
        drawn = [n for n, s in self.in_model.items() if not s["is_observed"]]
        self.latents = [name for name in drawn if name in self.guided]
        alone = [name for name in drawn if name not in self.guided]
        self.imputed = [name for name in alone if self._is_imputed(name)]
        self.unguided = [name for name in alone if name not in self.imputed]
        self.data_plate = None if plate is False else _data_plate(self, batch, plate)
        shared = [name for name in self.unguided if not self.is_inside(self.in_model[name])]
        if shared and plate:
            expected = f"states of each datum in the plate '{plate}': under shared ones no datum is"
            fixes = ["pvae.Pair(model, guide, plate=False), where all data are one datum"]
            actual = f"{oxford(shared)} outside of it"
            raise PairError("data plate", f"{expected} a term by itself", actual, fixes)
        if shared:
            self.data_plate = None

    def _is_imputed(self, name: str) -> bool:
        """Whether a site has what is missing of another, as Pyro calls the two of an obs_mask."""
        whole, _, end = name.rpartition("_")
        seen = self.in_model.get(f"{whole}_observed")
        is_listed = infer_of(self.in_model[name]).get("enumerate") == "parallel"
        return end == "unobserved" and seen is not None and seen["is_observed"] and not is_listed

    def is_inside(self, site: Site) -> bool:
        """Whether a site is inside the data plate; without one all are of the one datum."""
        return self.data_plate is None or in_plates(self.data_plate.plates, site)

    @property
    def nesting(self) -> int:
        """Number of dimensions that plates take, that of the one datum included."""
        frames = (f for s in self.all for f in s["cond_indep_stack"] if f.vectorized)
        return max((-f.dim for f in frames), default=0) + (self.data_plate is None)

    @property
    def with_density(self) -> list[str]:
        """Names of the sites that are part of a density: no penalties, no training terms."""
        names = [site["name"] for site in self.all if not is_penalty(site)]
        return [name for name in names if name not in (*self.training, *self.imputed)]

    def outside(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the names whose sites, in model and guide, are outside the data plate."""
        inside = {site["name"] for site in self.all if self.is_inside(site)}
        return tuple(dict.fromkeys(name for name in names if name not in inside))


def _data_plate(sites: Sites, batch: Batch, plate: str | None) -> DataPlate | None:
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
        candidates = _of_length(frames, batch)
        candidates.sort(key=lambda f: f.name not in in_model)
        if not candidates and not _with_a_length_in(frames, batch):
            return None
        if len(candidates) != 1 and not (len(candidates) == 2 and is_same(*candidates)):
            raise _undecided(candidates, frames, batch)
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
    size, full_size = chosen.size, chosen.full_size
    rows = full_size if _draws_its_rows(chosen, batch) else size
    return DataPlate(chosen.name, frozenset(names), chosen.dim, size, full_size, rows)


def _draws_its_rows(frame: Frame, batch: Batch) -> bool:
    """Whether a plate draws a subsample of the batch, which has its full size and not its size."""
    first = _shapes(batch)[:1]
    if first and first[0][0] in (frame.size, frame.full_size):
        return first[0][0] != frame.size
    sizes = {size for shape in _shapes(batch) for size in shape}
    return frame.size not in sizes and frame.full_size in sizes


def _shapes(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in batch if isinstance(part, Tensor) and part.dim()]


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


def _of_length(frames: dict[str, Frame], batch: Batch) -> list[Frame]:
    """The plates of the length of the first entry, or else of another, that has one."""
    for length in dict.fromkeys(shape[0] for shape in _shapes(batch)):
        by_size = [f for f in frames.values() if f.size == length]
        found = by_size or [f for f in frames.values() if f.full_size == length]
        if found:
            return found
    return []


def _with_a_length_in(frames: dict[str, Frame], batch: Batch) -> bool:
    """Whether some plate has the length of some axis, and so may count the data along it."""
    sizes = {size for shape in _shapes(batch) for size in shape}
    return any(not sizes.isdisjoint({f.size, f.full_size}) for f in frames.values())


def _words(frames: dict[str, Frame]) -> str:
    return ", ".join(f"'{name}' of size {f.size}" for name, f in frames.items()) or "none"


def _undecided(candidates: list[Frame], frames: dict[str, Frame], batch: Batch) -> PairError:
    rows = len(next(part for part in batch if isinstance(part, Tensor) and part.dim()))
    if candidates:
        fixes = [f"plate='{candidates[0].name}'", "a batch of another length"]
        names = oxford(f.name for f in candidates)
        return PairError("data plate", f"one plate with the batch's length {rows}", names, fixes)
    name = next(iter(frames))
    fixes = [
        f"pvae.Pair(model, guide, plate='{name}'), where it counts the data along another axis",
        "pvae.Pair(model, guide, plate=False), where no plate counts them: all are one datum",
        "with pyro.plate('data', len(x)): z = pyro.sample('z', ...), in model and guide",
    ]
    actual = f"plates: {_words(frames)}"
    return PairError(
        "data plate", f"a vectorised plate of the batch's length {rows}", actual, fixes
    )
