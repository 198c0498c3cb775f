"""Arguments checked as their annotations say: each kind once, for every function and part."""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
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
    as_shape,
    check_count,
    check_int,
    check_number,
    is_out_of_memory,
    quoted,
)

__all__ = [
    "Extended",
    "Finite",
    "as_annotated",
    "check_arguments",
    "check_call",
    "check_fields",
    "hints_of",
    "strict",
]

P = ParamSpec("P")
R = TypeVar("R")

_LEAST = -(2**63)
_SKIPPED = {
    *("corruption", "data", "device", "estimates", "objective", "objectives", "optimizer", "pair"),
    *("penalties", "self"),
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
    signature = inspect.signature(function)
    runs_others = "self" in signature.parameters or "Callable" in str(hints_of(function))

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        given = check_call(function, signature, args, kwargs)
        if given is None or runs_others:
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except _DEEP as error:
            if isinstance(error, PvaeError) or is_out_of_memory(error):
                raise
            raise _mismatch(function.__name__, given, error) from error

    return wrapper


def check_call(
    function: Callable[..., object],
    signature: inspect.Signature,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> Mapping[str, object] | None:
    """The arguments of a call, checked; None where they have names that there aren't.

    That Python itself says, when the function is called.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return None
    check_arguments(function, bound.arguments)
    return bound.arguments


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
    hints, parameters = hints_of(function), _parameters_of(function)
    for name, value in arguments.items():
        default = parameters[name].default if name in parameters else value
        if name in _SKIPPED or name not in hints or value is default:
            continue
        where = f"{owner}.{name}" if owner else name
        as_annotated(where, value, hints[name])
        if type(value) is int and (least := _least(name, default)) is not None:
            check_int(where, value, least)
        if name.startswith("num_") and name not in _BOUNDS and isinstance(value, int):
            check_count(where, value, _EACH)


def _least(name: str, default: object) -> int | None:
    """The least that an integer of this name can be: 1 for a count, unless none is usual."""
    if name == "seed" or default == 0:
        return 0
    is_count = name.startswith(("num_", "max_")) or name in _COUNTS
    return 1 if is_count else None


def check_fields(thing: object, owner: str = "") -> None:
    """The same for a dataclass that has just been made: its fields are what its constructor got."""
    check_arguments(type(thing).__init__, vars(thing), owner)


@functools.cache
def hints_of(function: Callable[..., object]) -> Mapping[str, object]:
    """The annotations that can be resolved, with their limits; a name for mypy alone can't be."""
    inner = inspect.unwrap(function)
    space = {**vars(sys.modules[inner.__module__]), **getattr(inner, "__globals__", {})}
    found: dict[str, object] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        with contextlib.suppress(NameError, TypeError, AttributeError):
            found |= get_type_hints(alone, space, include_extras=True)
    found.pop("return", None)
    return found


@functools.cache
def _parameters_of(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """The parameters that have one value each."""
    every = inspect.signature(function).parameters
    return {n: p for n, p in every.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def as_annotated(name: str, value: Any, hint: Any) -> Any:
    """A value as its annotation has it, or an `ArgumentError`.

    Checked are truth values, choices (``Literal``), text, numbers with their limits
    (``Annotated[float, {"minimum": 0}]``, see `pvae.errors.check_number`), tuples of integers,
    tensors, functions, mappings, and instances of a class; any of them may be None where the
    annotation says so. Where an annotation says more than can be looked at, anything will do.
    """
    kinds, limits = _kinds_of(hint)
    if limits.get("finite") and isinstance(value, Tensor):
        _check_finite(name, _dense(name, value))
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if any(
        value is choice or (type(value) is type(choice) and value == choice) for choice in choices
    ):
        return value
    others = [kind for kind in kinds if get_origin(kind) is not Literal]
    if any(_fits(value, kind) for kind in others if kind not in (int, float)):
        return as_shape(name, value) if hint == tuple[int, ...] else _dense(name, value)
    is_text = isinstance(value, str) and (choices or str in others)
    if float in others and not is_text:
        if limits == {"finite": False}:
            return value if isinstance(value, float) else check_number(name, value)
        return check_number(name, value, **limits)
    if int in others and not is_text:
        return check_int(name, value, **(limits or {"minimum": _LEAST}))
    raise _refusal(name, value, others, choices)


def _kinds_of(hint: Any) -> tuple[list[Any], dict[str, Any]]:
    """The kinds that an annotation joins by ``|``, and the limits of its number."""
    if get_origin(hint) is Annotated:
        inner, limits, *_ = get_args(hint)
        return _kinds_of(inner)[0], limits if isinstance(limits, dict) else {}
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_kinds_of(part) for part in get_args(hint)]
        return [k for kinds, _ in parts for k in kinds], {
            n: v for _, limits in parts for n, v in limits.items()
        }
    return [hint], {}


def _fits(value: object, kind: Any) -> bool:
    """Whether a value is of a kind that is no number; of one that can't be looked at, it is."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    parts, kind = get_args(kind), get_origin(kind) or kind
    if kind is None or kind is types.NoneType:
        return value is None
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


def _dense(name: str, value: Any) -> Any:
    """The value; of tensors those alone that hold real numbers, all of them, in memory."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            fixes = ["x.to_dense()"]
            raise DataError(name, "a dense tensor", f"one of layout {value.layout}", fixes)
        if value.is_complex():
            raise DataError(name, "real numbers", f"dtype {value.dtype}", ["x.real"])
        if value.is_meta:
            fixes = ["x = torch.zeros(x.shape)"]
            raise DataError(name, "a tensor with values", "one on the device meta", fixes)
    return value


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

_WORDS = {str: "text", Tensor: "a tensor", Path: "a path"}
_EXAMPLES: dict[Any, str] = {Tensor: "torch.zeros(3, 2)", collections.abc.Mapping: "{}"}


def _refusal(name: str, value: object, kinds: list[Any], choices: list[Any]) -> PvaeError:
    origins = [get_origin(kind) or kind for kind in kinds if kind is not types.NoneType]
    if Tensor in origins and isinstance(value, np.ndarray):
        fixes = as_given(name, "torch.as_tensor(x)")
        return DataError(name, "a tensor", f"an ndarray of shape {value.shape}", fixes)
    choices = [*choices, *([True, False] if bool in origins else [])]
    if types.NoneType in kinds and None not in choices:
        choices.append(None)
    words = [_WORDS.get(kind) or _words_of(kind) for kind in origins if kind is not bool]
    words += map(repr, choices)
    expected = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    examples = [_EXAMPLES[kind] for kind in origins if kind in _EXAMPLES]
    examples += map(repr, choices[:2])
    fixes = [fix for example in examples for fix in as_given(name, example)]
    return ArgumentError(name, expected, quoted(value), fixes or [f"another {name}"])


def _words_of(kind: Any) -> str:
    if kind is collections.abc.Callable:
        return "a function"
    if kind in (*_ROWS, tuple, list):
        return "a sequence"
    if kind is collections.abc.Mapping:
        return "a mapping"
    return f"an instance of {getattr(kind, '__name__', kind)}"
