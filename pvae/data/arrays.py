"""Arrays: what a user has for one, memory maps, and `Data`, which says how one becomes a batch.

What is no array of numbers is read as one, or refused with the line that makes it one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from pvae.annotations import check_dense, check_fields
from pvae.errors import ArgumentError, DataError, check_number

__all__ = [
    "BINARIZE",
    "Array",
    "Binarize",
    "Data",
    "Index",
    "as_array",
    "as_arrays",
    "check_binarize",
]

Binarize = Literal["none", "threshold", "static", "dynamic"]
BINARIZE: tuple[Binarize, ...] = get_args(Binarize)
Index = slice | np.ndarray | list[int]

_NUMBERS = (bool, int, float, np.generic)


def as_arrays(data: object) -> tuple[object, ...]:
    """The arrays that data are: a tuple or list of arrays, or one array, also as nested lists.

    Example:
        >>> len(as_arrays([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])), len(as_arrays(([1, 2], [3, 4])))
        (1, 2)
    """
    if isinstance(data, list) and not data:
        fixes = ["is the path or the filter right?"]
        raise DataError("data", "at least one row", "an empty list", fixes)
    if isinstance(data, list) and all(map(_is_nested, data)):
        return (data,)
    return tuple(data) if isinstance(data, (tuple, list)) else (data,)


def _is_nested(item: object) -> bool:
    """Whether it is a number, or lists of them."""
    if isinstance(item, (list, tuple)):
        return all(map(_is_nested, item))
    return isinstance(item, _NUMBERS)


def as_array(name: str, thing: Any) -> np.ndarray | Tensor:
    """One array of real numbers with rows.

    Raises:
        DataError: If it isn't one, or means more than an array can say: entries that are missing,
            a sparse layout.
    """
    if isinstance(thing, Tensor):
        check_dense(name, thing)
        return thing
    _refuse_others(name, thing)
    try:
        array = np.asarray(thing)
    except ValueError as error:
        raise DataError(name, "rows of one shape", str(error), ["rows of equal lengths"]) from error
    if array.dtype.kind not in "biuf":
        raise DataError(name, "real numbers", f"dtype {array.dtype}", _numbers_of(thing, array))
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:  # torch has no such type
        return array.astype(np.float64)
    return array


def _refuse_others(name: str, thing: Any) -> None:
    kind = type(thing)
    if isinstance(thing, np.ma.MaskedArray) and np.ma.is_masked(thing):
        missing = int(np.ma.getmaskarray(thing).sum())
        raise _masked(name, f"a masked array, {missing} of whose {thing.size} entries are missing")
    if kind.__module__.startswith("scipy.sparse"):
        raise DataError(name, "a dense array", f"a SciPy {kind.__name__}", ["x.toarray()"])
    if hasattr(thing, "data_vars"):
        names = [f"x['{variable}'].values" for variable in thing.data_vars][:2]
        raise DataError(name, "one array", f"an xarray {kind.__name__} of several", names)
    if hasattr(thing, "__next__"):
        fixes = ["list(x), for rows that fit in memory", "a DataLoader, for those that don't"]
        expected = "data that can be read more than once"
        raise DataError(name, expected, f"a {kind.__name__}, which is read once", fixes)


def _masked(name: str, actual: str) -> DataError:
    fixes = [
        "(x.filled(0), ~np.ma.getmaskarray(x)), for a model(x, seen) with dist.Normal(...)"
        ".mask(seen).to_event(1)",
        "x[~np.ma.getmaskarray(x).any(1)], the rows that are complete",
        "x.filled(0), if 0 is what was seen",
    ]
    return DataError(name, "entries that all have a value", actual, fixes)


def _numbers_of(thing: Any, array: np.ndarray) -> list[str]:
    """Lines that make numbers of what isn't."""
    if array.dtype.kind == "c":
        return ["x.real"]
    if array.dtype.kind in "US" and _all_parse(array):
        return ["x.astype(float)"]
    if any(isinstance(value, str) for value in array.flat):
        return ["np.unique(x, return_inverse=True)[1], for names of classes"]
    if hasattr(thing, "to_numpy"):  # pandas
        return ["x.to_numpy(float, na_value=float('nan'))"]
    return ["x.astype(float)"]


def _all_parse(array: np.ndarray) -> bool:
    try:
        array.astype(float)
    except ValueError:
        return False
    return True


class MappedRows:
    """Some rows of a memory map, in any order, read only when asked for."""

    def __init__(self, array: np.memmap, index: np.ndarray | None = None) -> None:
        self.array = array
        self.index = np.arange(len(array)) if index is None else index
        self.dtype, self.ndim = array.dtype, array.ndim

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), *self.array.shape[1:])

    def __getitem__(self, index: Index) -> MappedRows:
        return MappedRows(self.array, self.index[index])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:  # noqa: FBT001
        return np.asarray(self.array[self.index], dtype)

    def reshape(self, *shape: int) -> MappedRows:
        array = self.array.reshape(len(self.array), *shape[1:])
        return MappedRows(array, self.index)  # type: ignore[arg-type]

    def min(self) -> float:
        return float(self.array.min())

    def max(self) -> float:
        return float(self.array.max())


Array = np.ndarray | Tensor | MappedRows


def check_binarize(kind: str) -> None:
    """Refuses what is no kind of binarisation."""
    if kind not in BINARIZE:
        raise ArgumentError("binarize", f"one of {', '.join(BINARIZE)}", repr(kind))


@dataclass(frozen=True)
class Data:
    """Arrays with a common first axis, and how the first one becomes a batch.

    Arguments:
        arrays: Data, or a tuple of data, labels and the like; arrays, tensors or memory maps.
        scale: Factor on the first array.
        binarize: ``"none"``; ``"threshold"`` at one half; ``"static"``, each value drawn once as
            Bernoulli(scaled value); ``"dynamic"``, drawn anew for every training batch, and fixed
            for evaluation.
        seed: Seed of the fixed draws.
        origin: Numbers of the rows where they came from, for error messages; None if they are
            numbered as they are.

    Example:
        >>> grey = Data((np.full((4, 2), 0.5),), binarize="static")
        >>> sorted(np.unique(grey.fixed().arrays[0]).tolist())
        [0.0, 1.0]
    """

    arrays: Any
    scale: float = 1.0
    binarize: Binarize = "none"
    seed: int = field(default=0, kw_only=True)
    origin: np.ndarray | None = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if hasattr(self.arrays, "shape"):  # an array alone is no tuple of its rows
            object.__setattr__(self, "arrays", (self.arrays,))
        check_binarize(self.binarize)
        check_number("scale", self.scale)

    def __len__(self) -> int:
        return len(self.arrays[0])

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return tuple(self.arrays[0].shape[1:])

    def take(self, index: Index) -> Data:
        """The rows at ``index`` (a slice or integers)."""
        origin = None if self.origin is None else self.origin[index]
        return replace(self, arrays=tuple(a[index] for a in self.arrays), origin=origin)

    def reshape(self, event_shape: Sequence[int]) -> Data:
        """The same data with events of another shape."""
        first, *rest = self.arrays
        return replace(self, arrays=(first.reshape(len(first), *event_shape), *rest))

    def unlabelled(self) -> Data:
        """The first array alone."""
        return replace(self, arrays=self.arrays[:1])

    def fixed(self) -> Data:
        """The same data, scaled and (also where that is dynamic) binarised once, as arrays."""
        first, *rest = self.arrays
        first = first.detach().float().cpu() if isinstance(first, Tensor) else first
        x = np.asarray(first, dtype=np.float32) * np.float32(self.scale)
        if self.binarize == "threshold":
            x = (x > 0.5).astype(np.float32)
        elif self.binarize != "none":
            uniform = np.random.default_rng(self.seed).random(x.shape, dtype=np.float32)
            x = (uniform < x).astype(np.float32)
        return Data((x, *rest), origin=self.origin)
