"""The variables of an export: dimensions, sizes, and how terms fill them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pvae.errors import ArgumentError
from pvae.pair import Structure, is_inside
from pvae.simulate import Simulation
from pvae.types import Site

__all__ = ["Layout", "Pick", "Variable", "fill"]

Pick = Callable[[Simulation], Tensor]


@dataclass(frozen=True)
class Variable:
    """One variable of an export.

    With ``outside`` it is the sum over the data set of what is picked, shape ``(K, N)``, and of
    what ``outside`` picks, shape ``(K,)``, once.
    """

    group: str
    name: str
    pick: Pick  # from the draws for a chunk of rows to values, (K, N, ...) or (K, ...)
    num_draws: int | None  # S; None where it is the same for all draws
    num_rows: int | None  # N; None where it isn't of single data
    dims: tuple[str, ...] = ()  # names of its other dimensions
    sizes: tuple[int, ...] = ()  # their sizes
    dtype: torch.dtype = torch.float64
    outside: Pick | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its array, ``([S], [N], ...)``."""
        return (*(n for n in (self.num_draws, self.num_rows) if n is not None), *self.sizes)

    @property
    def num_bytes(self) -> int:
        """What its array takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """How many draws and rows an export has, and how dimensions are called."""

    structure: Structure
    num_draws: int  # S
    num_rows: int  # N
    dims: Mapping[str, Sequence[str]]  # the user's names of event dimensions, by site

    def site(
        self, group: str, name: str, run: Simulation, pick: Pick, *, num_draws: int | None
    ) -> Variable:
        """A site's values; ``num_draws`` None for one without draws."""
        example, node = pick(run), run.site(name)
        is_local = is_inside(self.structure, node)
        sizes = tuple(example.shape[2 if is_local else 1 :])
        rows = self.num_rows if is_local else None
        dims = self._dims_of(node, len(sizes), is_local=is_local)
        return Variable(group, name, pick, num_draws, rows, dims, sizes, example.dtype)

    def _dims_of(self, node: Site, rank: int, *, is_local: bool) -> tuple[str, ...]:
        """Names of what follows draws and rows: of other plates, then of the event."""
        name = node["name"]
        event_dim = len(node["fn"].event_shape)
        depth = rank - event_dim + is_local
        places = [d for d in range(-depth, 0) if not (is_local and d == self.structure.dim)]
        plates = {f.dim: f.name for f in node["cond_indep_stack"] if f.vectorized}
        own = [plates.get(d, f"{name}_plate_{-d}") for d in places]
        event = self.dims.get(name, [f"{name}_dim_{i}" for i in range(event_dim)])
        if len(event) != event_dim:
            expected = f"{event_dim} names, for event_shape {tuple(node['fn'].event_shape)}"
            raise ArgumentError(f"dims[{name!r}]", expected, f"{list(event)}")
        return (*own, *event)


def fill(
    variables: Iterable[Variable], passes: Iterable[tuple[slice, slice, Simulation]]
) -> dict[tuple[str, str], np.ndarray]:
    """Arrays of all variables, by group and name, from one run over the draws."""
    arrays = {v: torch.zeros(v.shape, dtype=v.dtype) for v in variables}
    for draws, rows, run in passes:
        for v, array in arrays.items():
            if v.num_draws is not None or draws.start == 0:
                _fill(v, array, draws, rows, run)
    return {(v.group, v.name): array.numpy() for v, array in arrays.items()}


def _fill(v: Variable, array: Tensor, draws: slice, rows: slice, run: Simulation) -> None:
    """Fills in what some draws for a chunk of rows have."""
    place = () if v.num_rows is None else (rows,)
    here = array[place] if v.num_draws is None else array[(draws, *place)]
    value = v.pick(run)
    if v.outside is not None:
        value = value.double().sum(1)
        value = value + v.outside(run) if rows.start == 0 else value
    value = value.to("cpu", v.dtype)
    value = value[0] if v.num_draws is None else value[: len(here)]  # a point mass has one draw
    here.copy_(value if v.outside is None else here + value)
