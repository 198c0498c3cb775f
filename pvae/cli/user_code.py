"""Code of a user's that the command line names as ``module:function``, and nothing else runs.

No file of a run folder leads to an import: only what was typed does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from pvae.errors import ArgumentError

__all__ = ["made_by", "names_code"]

_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_FORM = re.compile(rf"(?P<module>{_NAME}|.*\.py):(?P<names>{_NAME}(?:,{_NAME})?)")
_EXAMPLES = ("mymodel:build", "path/to/mymodel.py:build")


def names_code(text: str) -> bool:
    """Whether a text has the form of ``module:function``.

    Example:
        >>> names_code("mymodel:build"), names_code("dir/train.py:model,guide"), names_code("x.npy")
        (True, True, False)
    """
    return _FORM.fullmatch(text) is not None


def made_by(where: str, text: str) -> object:
    """What a function returns that is named as ``module:function``, or the object of that name.

    ``module:model,guide`` is the tuple of two objects. The folder at hand is searched after all
    others.

    Arguments:
        where: The option, for messages.
        text: The name. A module may be a file, ``path/to/module.py``.

    Raises:
        ArgumentError: If there is no such module or name, or its code fails.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise ArgumentError(where, "module:function", repr(text), [f"{where} {_EXAMPLES[0]}"])
    with _at_hand(), _telling(where, text):
        module = _imported(where, found["module"])
        named = [_attribute(where, module, name) for name in found["names"].split(",")]
        return tuple(named) if len(named) > 1 else _made(where, text, named[0])


@contextmanager
def _at_hand() -> Iterator[None]:
    """Lets imports find modules in the folder at hand, unless there are others of that name."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(folder)
        sys.path.reverse()


@contextmanager
def _telling(where: str, text: str) -> Iterator[None]:
    try:
        yield
    except ArgumentError:
        raise
    except Exception as error:
        from pvae.origin import first_line, line_of_user  # which imports Pyro

        line = line_of_user(error)
        actual = f"{type(error).__name__}: {first_line(error)}{f' ({line})' if line else ''}"
        raise ArgumentError(where, f"code of {text} that runs", actual) from error


def _imported(where: str, name: str) -> ModuleType:
    if name.endswith(".py"):
        if not os.path.isfile(name):  # noqa: PTH113  which raises nothing, whatever the name
            raise ArgumentError(where, "a file of Python code", f"'{name}', which is none")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None  # noqa: S101
        assert spec.loader is not None  # noqa: S101
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        fixes = [f"{where} {_EXAMPLES[1]}", "the folder that it is in as the one at hand"]
        raise ArgumentError(where, "a module that is there", f"'{name}'", fixes) from error


def _attribute(where: str, module: ModuleType, name: str) -> object:
    thing: object = module
    for part in name.split("."):
        if not hasattr(thing, part):
            raise ArgumentError(where, f"a name that {module.__name__} has", f"'{name}'")
        thing = getattr(thing, part)
    return thing


def _made(where: str, text: str, thing: object) -> object:
    """What a function or a class makes without being given anything; another object itself."""
    if not (inspect.isroutine(thing) or isinstance(thing, (type, functools.partial))):
        return thing
    try:
        inspect.signature(thing).bind()
    except TypeError as error:
        expected, actual = "a function that needs no arguments", f"{text}, {error}"
        raise ArgumentError(where, expected, actual) from error
    return thing()
