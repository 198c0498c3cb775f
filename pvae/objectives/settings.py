"""Settings of an objective: checked as their annotations say, and written so that they compare."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pvae.errors import ArgumentError, as_shape, check_int, check_number
from pvae.schedules import Constant, Schedule

__all__ = ["AtLeastZero", "Positive", "Weight", "as_annotated", "hints", "written"]

AtLeastZero = Annotated[float, {"minimum": 0}]
Positive = Annotated[float, {"above": 0}]
Weight = Annotated[float | Schedule, {"minimum": 0}]


def hints(kind: type) -> Mapping[str, object]:
    """A class's annotations; those of its base where they name what a function alone knows."""
    for base in kind.__mro__:
        with contextlib.suppress(NameError):
            return get_type_hints(base, include_extras=True)
    return {}


def as_annotated(name: str, value: Any, hint: Any) -> Any:
    """A value as its annotation has it, or an `ArgumentError`.

    Checked are choices (``Literal``, ``bool``), numbers with their limits
    (``Annotated[float, {"minimum": 0}]``, see `pvae.errors.check_number`), and tuples of integers;
    any of them may be None where the annotation says so. A constant schedule becomes its number.
    """
    hint, limits = get_args(hint) if get_origin(hint) is Annotated else (hint, {})
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if bool in kinds:
        choices = (True, False, None) if NoneType in kinds else (True, False)
    if choices and value not in choices:
        first, last = ", ".join(map(repr, choices[:-1])), repr(choices[-1])
        raise ArgumentError(name, f"{first} or {last}", repr(value))
    if Schedule in kinds and isinstance(value, Schedule):
        if not isinstance(value, Constant):
            return value
        value = value.number
    if value is None and NoneType in kinds:
        return None
    if float in kinds:
        return check_number(name, value, **limits)
    if int in kinds and limits:
        return check_int(name, value, **limits)
    return as_shape(name, value) if hint == tuple[int, ...] else value


def written(value: object) -> str:
    """A value as it would be given; functions by module and name, the same in every process."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)
