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

    Attributes:
        group: Its group.
        name: Its name there.
        pick: From the draws for a chunk of rows to values, shape ``(K, N, ...)`` or ``(K, ...)``.
        num_draws: S; None where it is the same for all draws.
        num_rows: N; None where it isn't of single data.
        dims: Names of its other dimensions.
        sizes: Their sizes.
        dtype: Of its array.
        outside: For a sum over the data set of what is picked, shape ``(K, N)``: what is added to
            that once, shape ``(K,)``.
    """

    group: str
    name: str
    pick: Pick
    num_draws: int | None
    num_rows: int | None
    dims: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
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
    """How many draws and rows an export has, and how dimensions are called.

    Attributes:
        structure: What the pair is made of.
        num_draws: S.
        num_rows: N.
        dims: The user's names of event dimensions, by site.
    """

    structure: Structure
    num_draws: int
    num_rows: int
    dims: Mapping[str, Sequence[str]]

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
            raise ArgumentError(
                f"dims[{name!r}]",
                f"{event_dim} names, for event_shape {tuple(node['fn'].event_shape)}",
                f"{list(event)}",
            )
        return (*own, *event)


def fill(
    variables: Iterable[Variable], passes: Iterable[tuple[slice, slice, Simulation]]
) -> dict[tuple[str, str], np.ndarray]:
    """Arrays of all variables, by group and name, from one run over the draws."""
    variables = tuple(variables)
    arrays = {(v.group, v.name): torch.zeros(v.shape, dtype=v.dtype) for v in variables}
    for draws, rows, run in passes:
        for v in variables:
            if v.num_draws is None and draws.start > 0:
                continue
            value, array = v.pick(run), arrays[v.group, v.name]
            if v.outside is not None:
                value = value.double().sum(1)
                value = value + v.outside(run) if rows.start == 0 else value
            value = value.to("cpu", v.dtype)
            place = () if v.num_rows is None else (rows,)
            if v.num_draws is not None:
                here = array[(draws, *place)]
                value = value[: len(here)]  # a point mass has one draw
            else:
                here, value = array[place], value[0]
            if v.outside is not None:
                value = here + value
            here.copy_(value)
    return {key: array.numpy() for key, array in arrays.items()}
