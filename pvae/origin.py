"""Whose code something is: a user's, or a library's; and at which line of a user's it failed."""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
from pathlib import Path

import pyro

__all__ = [
    "builder",
    "first_error",
    "first_line",
    "is_users",
    "line_of_user",
    "module_named",
    "site_and_line",
]


@functools.lru_cache(maxsize=1024)
def is_users(module: str) -> bool:
    """Whether a module of this name is a user's: no library's, Python's or pvae's.

    Example:
        >>> is_users("__main__"), is_users("torch.nn"), is_users("functools"), is_users("pvae.vae")
        (True, False, False, False)
    """
    root = module.partition(".")[0]
    if root == "__main__":  # a script, a notebook, or what python -m runs
        return True
    if not root or root == "pvae" or root in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(root), "__file__", None)
    return file is None or not {"site-packages", "dist-packages"} & {*Path(file).parts}


def builder() -> str:
    """The user's function that is running, as ``module:function``; empty if there is none.

    Of functions inside of others it is the outer one, which alone can be called from elsewhere. A
    script's module is its file.

    Example:
        >>> mine = {"__name__": "mine", "builder": builder}
        >>> exec("def build(): return builder()", mine)
        >>> mine["build"]()
        'mine:build'
    """
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        function = frame.f_code.co_qualname.partition(".<locals>")[0]
        if is_users(module) and not function.startswith("<"):
            return f"{module_named(module)}:{function}"
        frame = frame.f_back
    return ""


def module_named(name: str) -> str:
    """How a module is imported: by its name, or the name of a script's file."""
    if name != "__main__":
        return name
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:  # of python -m
        return str(spec.name)
    return Path(getattr(main, "__file__", None) or "__main__").name


def first_error(error: BaseException) -> BaseException:
    """The error that a program raised: Pyro raises it anew, with shapes, or fails at doing so."""
    while (inner := error.__cause__ or error.__context__) is not None:
        is_anew = type(inner) is type(error) and str(error).startswith(str(inner))
        *_, last = [None, *traceback.extract_tb(error.__traceback__)]
        if not is_anew and (last is None or not last.filename.endswith("trace_messenger.py")):
            break
        error = inner
    return error


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def line_of_user(error: BaseException) -> str:
    """Where in a user's code an error came up, as ``file:line, in function``; empty if nowhere."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if is_users(frame.f_globals.get("__name__", "")):
            found = f"{frame.f_code.co_filename}:{line}, in {frame.f_code.co_name}"
    return found


def site_and_line(error: BaseException) -> str:
    """The same in short, with the site: `` at site 'z', model.py:12``; empty if nowhere."""
    line, site = "", ""
    cause: BaseException | None = error
    while cause is not None:
        for frame, number in traceback.walk_tb(cause.__traceback__):
            if is_users(frame.f_globals.get("__name__", "")):
                line = f"{Path(frame.f_code.co_filename).name}:{number}"
            if frame.f_code is pyro.sample.__code__:
                site = f"site '{frame.f_locals['name']}'"
        cause = cause.__cause__
    return " at " + ", ".join(filter(None, (site, line))) if site or line else ""
