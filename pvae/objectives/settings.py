"""Settings of an objective: checked as their annotations say, and written so that they compare."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Annotated, get_type_hints

from pvae.annotations import Expected, as_annotated
from pvae.schedules import Constant, Schedule

__all__ = ["AtLeastZero", "Positive", "Weight", "as_setting", "hints", "written"]

AtLeastZero = Annotated[float, {"minimum": 0}]
Positive = Annotated[float, {"above": 0}]
Weight = Annotated[float | Schedule, {"minimum": 0}]


@functools.lru_cache
def hints(kind: type) -> Mapping[str, Expected]:
    """A class's annotations; those of its base where they name what a function alone knows."""
    for base in kind.__mro__:
        with contextlib.suppress(NameError):
            found = get_type_hints(base, include_extras=True)
            return {name: Expected.of(hint) for name, hint in found.items()}
    return {}


def as_setting(name: str, value: object, expected: Expected | None) -> object:
    """A setting as its annotation has it, see `pvae.annotations.as_annotated`.

    A constant schedule becomes its number.
    """
    if expected is None:
        return value
    return as_annotated(name, value.number if isinstance(value, Constant) else value, expected)


def written(value: object) -> str:
    """A value as it would be given; functions by module and name, the same in every process."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)
