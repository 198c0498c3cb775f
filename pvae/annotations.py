"""Arguments checked as their annotations say: each kind once, for every function and part."""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import torch
from torch import Tensor

from pvae.errors import (
    ArgumentError,
    DataError,
    PvaeError,
    as_given,
    as_widths,
    check_count,
    check_int,
    check_number,
    is_one_of,
    is_out_of_memory,
    quoted,
)

__all__ = [
    "Expected",
    "Extended",
    "Finite",
    "as_annotated",
    "check_arguments",
    "check_call",
    "check_dense",
    "check_fields",
    "hints_of",
    "strict",
]

P = ParamSpec("P")
R = TypeVar("R")

_LEAST = -(2**63)
_SKIPPED = {
    *("corruption", "data", "device", "estimates", "objective", "objectives", "optimizer", "pair"),
    *("loss", "optim", "penalties", "self"),
}
"""What has a check of its own, which says more."""
_BOUNDS = {"num_data", "num_rows"}  # of which there are no more than there are data
_COUNTS = {"batch_size", "bins", "columns", "latent_dim", "num", "steps"}
_EACH = 1024
"""Bytes that what is counted takes at the least: a draw, its densities, what leads there."""
_ROWS = (collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)


def strict(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function refuse arguments that aren't what its annotations say, before it runs.

    Arguments that don't fit each other, such as shapes, may be found where it computes; that is
    told as well, unless it runs a user's code, whose errors are its own.

    Raises:
        ArgumentError: Naming the argument.
        OutOfMemoryError: If a number of things, called ``num_...``, can't fit into memory.

    Example:
        >>> @strict
        ... def twice(number: float, times: int = 2) -> float:
        ...     return times * number
        >>> twice("3")
        Traceback (most recent call last):
        ...
        pvae.errors.ArgumentError: number: expected a finite number; got '3'.
          Try: number=1
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        given = check_call(function, args, kwargs)
        try:
            return function(*args, **kwargs)
        except _DEEP as error:
            is_ours = isinstance(error, PvaeError) or is_out_of_memory(error)
            if is_ours or _runs_others(function) or not _fits_signature(function, args, kwargs):
                raise
            raise _mismatch(function.__name__, given, error) from error

    return wrapper


def check_call(
    function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Mapping[str, object]:
    """The arguments of a call by name, checked.

    Of names that there aren't, or that are missing, Python itself tells when it is called.
    """
    names = _positional_of(function)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    check_arguments(function, given)
    return given


@functools.cache
def _positional_of(function: Callable[..., object]) -> tuple[str, ...]:
    every = inspect.signature(function).parameters
    return tuple(
        n for n, p in every.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )


def _fits_signature(
    function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _runs_others(function: Callable[..., object]) -> bool:
    """Whether it may run a user's code: is a method of a pair, or takes a function."""
    hints = hints_of(function).values()
    takes_function = any(get_origin(k) is collections.abc.Callable for h in hints for k in h.kinds)
    return takes_function or "self" in inspect.signature(function).parameters


_DEEP = (TypeError, ValueError, IndexError, RuntimeError, AttributeError, OverflowError)


def _mismatch(name: str, arguments: Mapping[str, object], error: Exception) -> ArgumentError:
    shapes = [
        f"{key} of shape {tuple(value.shape)}"
        if hasattr(value, "shape")
        else f"{key}={quoted(value)}"
        for key, value in arguments.items()
    ]
    first, *_ = str(error).splitlines() or [type(error).__name__]
    actual = f"{', '.join(shapes)}: {first}"
    return ArgumentError(name, "arguments that fit each other", actual, [f"help({name})"])


def check_arguments(
    function: Callable[..., object], arguments: Mapping[str, object], owner: str = ""
) -> None:
    """Refuses arguments of another kind than a function's annotations say.

    Arguments:
        function: The function, or the constructor of a class.
        arguments: What it is given, by name.
        owner: Of which class they are arguments, for messages.
    """
    checks = _checks_of(function)
    for name, value in arguments.items():
        check = checks.get(name)
        if check is None or value is check.default:
            continue
        where = f"{owner}.{name}" if owner else name
        as_annotated(where, value, check.expected)
        if type(value) is int and check.least is not None:
            check_int(where, value, check.least)
        if check.is_counted and isinstance(value, int):
            check_count(where, value, _EACH)


@dataclass(frozen=True)
class _Check:
    """How one parameter is checked."""

    expected: Expected
    default: object
    least: int | None
    is_counted: bool


@functools.cache
def _checks_of(function: Callable[..., object]) -> Mapping[str, _Check]:
    """By name, for the parameters that have one value each and no check of their own."""
    hints, found = hints_of(function), {}
    for name, p in inspect.signature(function).parameters.items():
        if name in hints.keys() - _SKIPPED and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            is_counted = name.startswith("num_") and name not in _BOUNDS
            least = None if float in hints[name].kinds else _least(name, p.default)
            found[name] = _Check(hints[name], p.default, least, is_counted)
    return found


def _least(name: str, default: object) -> int | None:
    """The least that an integer of this name can be: 1 for a count, unless none is usual."""
    if name == "seed" or default == 0:
        return 0
    is_count = name.startswith(("num_", "max_")) or name in _COUNTS
    return 1 if is_count else None


def check_fields(thing: object, owner: str = "") -> None:
    """The same for a dataclass that has just been made: its fields are what its constructor got."""
    check_arguments(type(thing).__init__, vars(thing), owner)


@dataclass(frozen=True)
class Expected:
    """What an annotation allows, read once.

    Attributes:
        kinds: The kinds that it joins by ``|``, without choices.
        choices: The values of its ``Literal``.
        limits: Those of its number.
        is_widths: Whether it is a tuple of integers, which are widths.
    """

    kinds: tuple[object, ...]
    choices: tuple[object, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    is_widths: bool = False

    @classmethod
    def of(cls, hint: object) -> Expected:
        """What an annotation allows; ``Annotated[float, {"above": 0}]`` has a limit."""
        if get_origin(hint) is Annotated:
            inner, limits, *_ = get_args(hint)
            return replace(cls.of(inner), limits=limits if isinstance(limits, dict) else {})
        if get_origin(hint) is Literal:
            return cls((), get_args(hint))
        if get_origin(hint) in (Union, types.UnionType):
            parts = [cls.of(part) for part in get_args(hint)]
            return cls(
                tuple(kind for part in parts for kind in part.kinds),
                tuple(choice for part in parts for choice in part.choices),
                {name: limit for part in parts for name, limit in part.limits.items()},
            )
        return cls((hint,), is_widths=hint == tuple[int, ...])

    @functools.cached_property
    def others(self) -> tuple[object, ...]:
        """The kinds that are no numbers."""
        return tuple(kind for kind in self.kinds if kind not in (int, float))

    @functools.cached_property
    def classes(self) -> tuple[type, ...]:
        """The kinds that `isinstance` alone tells."""
        others = (bool, tuple, Any, *_ROWS)
        plain = [k for k in self.others if isinstance(k, type) and k not in others]
        return tuple(k for k in plain if not (get_origin(k) or hasattr(k, "_is_protocol")))


@functools.cache
def hints_of(function: Callable[..., object]) -> Mapping[str, Expected]:
    """The annotations that can be resolved; a name for mypy alone can't be."""
    inner = inspect.unwrap(function)
    space = {**vars(sys.modules[inner.__module__]), **getattr(inner, "__globals__", {})}
    found: dict[str, object] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        with contextlib.suppress(NameError, TypeError, AttributeError):
            found |= get_type_hints(alone, space, include_extras=True)
    return {name: Expected.of(hint) for name, hint in found.items() if name != "return"}


def as_annotated(name: str, value: object, expected: Expected) -> object:
    """A value as its annotation has it, or an `ArgumentError`.

    Checked are truth values, choices (``Literal``), text, numbers with their limits
    (``Annotated[float, {"minimum": 0}]``, see `pvae.errors.check_number`), tuples of integers,
    tensors, functions, mappings, and instances of a class; any of them may be None where the
    annotation says so. Where an annotation says more than can be looked at, anything will do.
    """
    kinds, limits = expected.kinds, expected.limits
    if limits.get("finite") and isinstance(value, Tensor):
        check_dense(name, value)
        _check_finite(name, value)
    if expected.choices and is_one_of(value, expected.choices):
        return value
    if expected.is_widths:
        return as_widths(name, value)  # type: ignore[arg-type]
    if isinstance(value, expected.classes) or any(_fits(value, k) for k in expected.others):
        if isinstance(value, Tensor):
            check_dense(name, value)
        return value
    is_text = isinstance(value, str) and (expected.choices or str in kinds)
    if float in kinds and not is_text:
        if limits == {"finite": False}:
            return value if isinstance(value, float) else check_number(name, value)
        return check_number(name, value, **limits)
    if int in kinds and not is_text:
        return check_int(name, value, int(limits.get("minimum", _LEAST)))
    raise _refusal(name, value, expected)


def _fits(value: object, kind: object) -> bool:
    """Whether a value is of a kind that is no number; of one that can't be looked at, it is."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    parts, kind = get_args(kind), get_origin(kind) or kind
    if kind is None or kind is types.NoneType:
        return value is None
    if kind is bool:
        return is_one_of(value, (True, False))
    if kind is collections.abc.Callable:
        return callable(value)
    if kind in _ROWS:
        if not hasattr(value, "__iter__") or isinstance(value, (str, bytes, Mapping)):
            return False
        is_list = isinstance(value, (list, tuple)) and parts and parts[0] not in (int, float)
        return not is_list or all(_fits(item, parts[0]) for item in value)
    if kind is tuple:
        return isinstance(value, (tuple, list))
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    return isinstance(value, kind)


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuses tensors but for those that hold real numbers, all of them, in memory.

    Raises:
        DataError: If it is sparse, nested, complex or without values.
    """
    if tensor.layout is not torch.strided:
        words = str(tensor.layout).removeprefix("torch.")
        raise DataError(name, "a dense tensor", f"one of layout {words}", ["x.to_dense()"])
    if tensor.is_meta:
        fixes = ["torch.zeros(x.shape), or the data themselves"]
        raise DataError(name, "numbers in memory", "a tensor on the device 'meta'", fixes)
    if tensor.is_nested:
        fixes = ["x.to_padded_tensor(0.0), and a mask in model and guide"]
        raise DataError(name, "rows of one shape", "a nested tensor", fixes)
    if tensor.is_complex():
        raise DataError(name, "real numbers", f"dtype {tensor.dtype}", ["x.real"])


def _check_finite(name: str, value: Tensor) -> None:
    if not value.dim() or not value.numel():
        shape = f"shape {tuple(value.shape)}"
        raise DataError(name, "at least one axis and one row", shape, ["x[None], for one number"])
    if value.is_floating_point() and not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        fixes = ["x[x.isfinite().flatten(1).all(1)], the rows that are complete"]
        raise DataError(name, "finite numbers", f"{bad} that aren't, NaN or infinite", fixes)


Finite = Annotated[Tensor, {"finite": True}]
"""A tensor with rows, all of whose entries are finite; checked where a function is `strict`."""

Extended = Annotated[float, {"finite": False}]
"""A number, an infinity, or NaN where it isn't known."""

_WORDS: dict[object, str] = {str: "text", Tensor: "a tensor", Path: "a path"}
_EXAMPLES: dict[object, str] = {Tensor: "torch.zeros(3, 2)", collections.abc.Mapping: "{}"}


def _refusal(name: str, value: object, allowed: Expected) -> PvaeError:
    origins = [get_origin(kind) or kind for kind in allowed.kinds if kind is not types.NoneType]
    if Tensor in origins and isinstance(value, np.ndarray):
        fixes = as_given(name, "torch.as_tensor(x)")
        return DataError(name, "a tensor", f"an ndarray of shape {value.shape}", fixes)
    choices = [*allowed.choices, *([True, False] if bool in origins else [])]
    if types.NoneType in allowed.kinds and None not in choices:
        choices.append(None)
    words = [_WORDS.get(kind) or _words_of(kind) for kind in origins if kind is not bool]
    words += map(repr, choices)
    expected = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    examples = [_EXAMPLES[kind] for kind in origins if kind in _EXAMPLES]
    examples += map(repr, choices[:2])
    fixes = [fix for example in examples for fix in as_given(name, example)]
    return ArgumentError(name, expected, quoted(value), fixes or [f"another {name}"])


def _words_of(kind: object) -> str:
    if kind is collections.abc.Callable:
        return "a function"
    if kind in (*_ROWS, tuple, list):
        return "a sequence"
    if kind is collections.abc.Mapping:
        return "a mapping"
    return f"an instance of {getattr(kind, '__name__', kind)}"
