"""The options that every tool takes, declared, checked and documented once."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypedDict, TypeVar, cast

import torch
from tqdm import tqdm

from pvae.annotations import check_call
from pvae.errors import ArgumentError, check_choice, check_int, telling_memory
from pvae.modes import with_gradients
from pvae.threads import alone, check_outside

__all__ = ["DELAY", "Options", "checked_options", "progress_bar", "tool"]


class Options(TypedDict, total=False):
    """What every tool that takes a pair and data also takes, as keywords.

    Attributes:
        max_rows: Bound on the rows that go through the pair's networks at once, counting each
            draw of a datum as one, so that memory doesn't grow with the number of data or draws;
            8192.
        seed: Seed of all draws; 0. The caller's generators are left as they are.
        progress: Whether work that takes long shows a progress bar; True.
        device: Where to compute, such as ``"cuda"``; the pair's modules are moved there first.
            None, the default, is where the pair is.
    """

    max_rows: int
    seed: int
    progress: bool
    device: str | torch.device | None


_DEFAULTS: Options = {"max_rows": 8192, "seed": 0, "progress": True, "device": None}


def checked_options(given: Mapping[str, object]) -> Options:
    """All of `Options`: what a tool was given, checked, and defaults.

    Raises:
        TypeError: If a name isn't one of `Options`, as Python does for other arguments.
        ArgumentError: If a value can't be used.

    Example:
        >>> checked_options({"seed": 3})["max_rows"]
        8192
    """
    for name in given:
        if name not in _DEFAULTS:
            near = difflib.get_close_matches(name, _DEFAULTS, 1)
            advice = f"did you mean {near[0]}=?" if near else f"options are {', '.join(_DEFAULTS)}"
            if name == "plate":
                advice = "the pair says it: pvae.Pair(model, guide, plate=...)"
            raise TypeError(f"unexpected keyword argument '{name}': {advice}")
    options = cast("Options", {**_DEFAULTS, **given})
    check_int("max_rows", options["max_rows"])
    check_int("seed", options["seed"], minimum=0)
    check_choice("progress", options["progress"], (True, False))
    return options


def progress_bar(
    steps: Iterable[Any] | None = None, *, title: str | None, shown: bool, **settings: object
) -> tqdm:
    """The bar of work that takes longer than a second; it goes away when the work is done."""
    return tqdm(steps, desc=title, disable=not shown, leave=False, delay=DELAY, **settings)


DELAY = 1.0
"""Seconds of work after which a progress bar comes up."""

P = ParamSpec("P")
R = TypeVar("R")


def tool(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function that takes a pair first a tool: alone, outside of programs, told of memory.

    While it runs, other threads wait (see `pvae.threads`).

    What it computes is the same where the caller has switched gradients off, or is in
    ``torch.inference_mode``.

    Raises:
        ArgumentError: If the first two arguments are two programs, as Pyro's own order has them.
        PairError: If it is called inside a Pyro program, a plate or another handler.
        OutOfMemoryError: If memory is full.

    Example:
        >>> @tool
        ... def count(pair, data):
        ...     return len(data)
        >>> count(print, repr, [])
        Traceback (most recent call last):
        ...
        pvae.errors.ArgumentError: count: expected a pair as the first argument; got a model and ...
          Try: count((model, guide), ...)
           or: count(vae, ...), as a VAE is a pair
    """
    known = inspect.signature(function).parameters
    bound = "batch_size" if "batch_size" in known else "max_rows"
    default = known[bound].default if bound in known else _DEFAULTS["max_rows"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > 1 and all(map(_is_program, args[:2])):
            name = function.__name__
            fixes = [f"{name}((model, guide), ...)", f"{name}(vae, ...), as a VAE is a pair"]
            expected, actual = (
                "a pair as the first argument",
                "a model and its guide as two arguments",
            )
            raise ArgumentError(name, expected, actual, fixes)
        check_call(function, args, kwargs)
        rows = cast("int | None", kwargs.get(bound, default))
        with alone(), telling_memory(function.__name__, rows, bound), with_gradients():
            check_outside(function.__name__)
            return function(*args, **kwargs)

    return checked


def _is_program(thing: object) -> bool:
    is_pair = hasattr(thing, "model") and hasattr(thing, "guide")
    return callable(thing) and not is_pair and not isinstance(thing, type)
