"""What programs hold in Python: attributes, entries, closures and globals, remembered and put back.

A network's parameters and buffers are tensors, which a step may change as it likes. Everything
else that a program reads is Python's, and this is where it is found, compared and restored.
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pvae.internals import network_parts

__all__ = ["MISSING", "Change", "Held", "is_library", "is_plain", "names_in"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_LEAVES = (*_PLAIN, Tensor, types.BuiltinFunctionType, torch.dtype, torch.device)
_LONGEST = 1000  # of a list or a dictionary that is followed
_MOST = 20_000  # of things that are followed
_LIBRARIES = tuple(
    os.path.join(path, "")  # noqa: PTH118
    for path in {
        *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")),
        *(str(Path(str(package.__file__)).parents[1]) for package in (torch, pyro)),
        str(Path(__file__).parents[1]),
    }
)
Change = tuple[str, object, object]
"""A name, what was under it, and what is there now."""
Parts = Iterator[tuple[object, str]]
"""Things that are held, each with what it is called."""


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()
_ALWAYS = itertools.repeat(MISSING)


def is_plain(value: object) -> bool:
    """Whether it is a number, a flag, a word or None."""
    return isinstance(value, _PLAIN)


def is_library(file: str | None) -> bool:
    """Whether a file belongs to Python, an installed package or pvae, and not to a user."""
    return file is None or file.startswith((*_LIBRARIES, "<frozen"))


def names_in(code: types.CodeType) -> set[str]:
    """The names that code may read things under: globals, attributes, words."""
    inner = (names_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
    words = (c for c in code.co_consts if isinstance(c, str))
    return {*code.co_names, *words}.union(*inner)


class Place:
    """What is under some names: attributes, entries, closed-over variables, globals.

    Arguments:
        label: What it is, for messages.
        names: Its names.
        read: What is under each of them now, in order.
        write: Puts a value under a name.
    """

    def __init__(
        self,
        label: str,
        names: Sequence[Any],
        read: Callable[[], list[Any]],
        write: Callable[[Any, Any], None],
    ) -> None:
        self.label, self.names, self.read, self.write = label, names, read, write
        self.values = read()

    def holds(self) -> bool:
        """Whether all is as it was."""
        now = self.read()
        return all(map(operator.is_, now, self.values)) or all(map(_is_same, now, self.values))

    def changes(self) -> list[tuple[Any, object, object]]:
        """The names under which something else is now, with what was there and what is."""
        rows = zip(self.names, self.values, self.read(), strict=True)
        return [(name, was, now) for name, was, now in rows if not _is_same(was, now)]

    def restore(self, *, everything: bool) -> None:
        """Puts back numbers, flags and words; or everything."""
        for name, was, now in self.changes():
            if everything or (is_plain(was) and is_plain(now)):
                self.write(name, was)


class _Entries(Place):
    """All entries of a dictionary, which may get new ones; an object's attributes are one."""

    def __init__(self, label: str, entries: dict[Any, Any]) -> None:
        self.entries, names = entries, [*entries]
        read = functools.partial(_get_all, entries.get, names)
        super().__init__(label, names, read, entries.__setitem__)

    def holds(self) -> bool:
        """Whether all is as it was, and nothing new is there."""
        return len(self.entries) == len(self.names) and super().holds()

    def changes(self) -> list[tuple[Any, object, object]]:
        """The same, with new entries."""
        known = {*self.names}
        new = [(name, MISSING, value) for name, value in self.entries.items() if name not in known]
        return super().changes() + new

    def restore(self, *, everything: bool) -> None:
        """Puts back numbers, flags and words; or everything, without new entries."""
        if not everything:
            super().restore(everything=False)
        elif not self.holds():
            self.entries.clear()
            self.entries.update(zip(self.names, self.values, strict=True))


class _Items(Place):
    """The items of a list, which may grow."""

    def __init__(self, label: str, items: MutableSequence[Any]) -> None:
        self.items = items
        super().__init__(label, (), lambda: [*items], items.__setitem__)

    def holds(self) -> bool:
        """Whether all is as it was."""
        return len(self.items) == len(self.values) and super().holds()

    def changes(self) -> list[tuple[Any, object, object]]:
        """What is at each index that was something else."""
        rows = enumerate(itertools.zip_longest(self.values, [*self.items], fillvalue=MISSING))
        return [(i, was, now) for i, (was, now) in rows if not _is_same(was, now)]

    def restore(self, *, everything: bool) -> None:
        """Takes back what isn't a network's: numbers and results; or everything."""
        changes = self.changes()
        if changes and (everything or all(_is_result(now) for _, _, now in changes)):
            self.items.clear()
            self.items.extend(self.values)


class Held:
    """What programs reach, and what was under every name of it.

    Functions are followed through their closures, defaults and globals; objects through their
    attributes; containers through what is in them. Code of libraries isn't followed, nor are
    containers of more than a thousand things.

    Arguments:
        programs: Functions, methods, modules, and other things to start from.
        names: Of attributes and globals: those that count; None for all, which can be put back.
    """

    def __init__(self, programs: Iterable[object], names: set[str] | None = None) -> None:
        self._names, self._visited = names, dict[int, object]()
        self.places: list[Place] = []
        queue = deque((program, _called(program)) for program in programs)
        while queue and len(self._visited) < _MOST:
            thing, label = queue.popleft()
            if not isinstance(thing, _LEAVES) and id(thing) not in self._visited:
                self._visited[id(thing)] = thing
                queue.extend(self._parts(thing, label))

    @property
    def modules(self) -> list[nn.Module]:
        """All networks that are reached, with the modules in them."""
        return [thing for thing in self._visited.values() if isinstance(thing, nn.Module)]

    def holds(self) -> bool:
        """Whether everything is as it was."""
        return all(place.holds() for place in self.places)

    def changes(self) -> list[Change]:
        """What isn't as it was."""
        return [
            (_words(place.label, name), was, now)
            for place in self.places
            for name, was, now in place.changes()
        ]

    def has_other_modules(self) -> bool:
        """Whether a network has come, gone, or been replaced by another."""
        if self.holds():
            return False
        changes = (each for place in self.places for each in place.changes())
        return any(isinstance(part, nn.Module) for _, was, now in changes for part in (was, now))

    def restore(self, *, everything: bool) -> None:
        """Puts back numbers, flags, words and lists of results; or everything.

        Where not everything is put back, what programs set up when they first run stays, such as
        the parameters of an autoguide.
        """
        for place in self.places:
            place.restore(everything=everything)

    def _parts(self, thing: Any, label: str) -> Parts:
        """Notes what is under a thing's names, and gives what is to be followed."""
        if isinstance(thing, types.FunctionType):
            return self._parts_of_function(thing)
        if isinstance(thing, types.MethodType):
            return iter([(thing.__self__, ""), (thing.__func__, "")])
        if isinstance(thing, functools.partial):
            return iter([(thing.func, ""), *((a, label) for a in thing.args), (thing.keywords, "")])
        if isinstance(thing, property):
            return iter([(thing.fget, "")])
        if isinstance(thing, (staticmethod, classmethod)):
            return iter([(thing.__func__, "")])
        if isinstance(thing, dict):
            return self._note(_Entries(label, thing)) if len(thing) <= _LONGEST else iter(())
        if isinstance(thing, (list, deque)):
            return self._note(_Items(label, thing)) if len(thing) <= _LONGEST else iter(())
        if isinstance(thing, (tuple, set, frozenset)):
            return iter([(part, label) for part in thing] if len(thing) <= _LONGEST else [])
        return self._parts_of_object(thing)

    def _note(self, place: Place) -> Parts:
        """Keeps a place; what is there is to be followed."""
        if isinstance(place, (_Entries, _Items)) or place.names:
            self.places.append(place)
        names = place.names or range(len(place.values))
        return zip(place.values, [_words(place.label, name) for name in names], strict=True)

    def _parts_of_function(self, function: types.FunctionType) -> Parts:
        code, label = function.__code__, function.__name__
        cells = function.__closure__ or ()
        contents = functools.partial(_contents, cells)
        yield from self._note(Place("", code.co_freevars, contents, _fill(code, cells)))
        defaults = ("__defaults__", "__kwdefaults__", "__code__")
        values = functools.partial(_attributes, function, defaults)
        self._note(Place(label, defaults, values, functools.partial(setattr, function)))
        yield from [(function.__defaults__, label), (function.__kwdefaults__, label)]
        if vars(function):
            yield vars(function), label
        if not is_library(code.co_filename):
            names = names_in(code)
            yield from self._named(function.__globals__, names, "")
            for value in map(function.__globals__.get, names & {*function.__globals__}):
                if isinstance(value, types.ModuleType) and not is_library(value.__file__):
                    yield from ((vars(value)[n], n) for n in names & {*vars(value)})

    def _named(self, values: dict[str, Any], names: Iterable[str], label: str) -> Parts:
        """What a dictionary has under names, of those that count."""
        names = sorted(n for n in names if self._names is None or n in self._names)
        names = [n for n in names if n in values]
        read = functools.partial(_get_all, values.get, names)
        return self._note(Place(label, names, read, values.__setitem__))

    def _parts_of_object(self, thing: Any) -> Parts:
        label, kind = _called(thing), thing if isinstance(thing, type) else type(thing)
        own = [base for base in kind.__mro__ if not is_library(_file_of(base))]
        if isinstance(thing, types.ModuleType):
            if self._names is not None and not is_library(getattr(thing, "__file__", None)):
                yield from self._named(vars(thing), self._names, thing.__name__)
            return
        if isinstance(thing, np.ndarray):
            if thing.nbytes <= _LONGEST:
                write = functools.partial(_fill_array, thing)
                self._note(Place("", [label], lambda: [thing.tobytes()], write))
            return
        for base in own:
            yield from self._parts_of_class(base)
        attributes = None if isinstance(thing, type) else getattr(thing, "__dict__", None)
        if isinstance(attributes, dict):
            yield from self._parts_of_attributes(attributes, own, label)
        if isinstance(thing, nn.Module):
            yield from ((part, label) for part in network_parts(thing))
        slots = [n for base in own for n in _slots_of(base)]
        read = functools.partial(_attributes, thing, slots)
        yield from self._note(Place(label, slots, read, functools.partial(setattr, thing)))

    def _parts_of_attributes(self, values: dict[str, Any], own: list[type], label: str) -> Parts:
        if self._names is None:
            return self._note(_Entries(label, values))
        if own:  # also names that a class has, and the object may get
            names = ({n for base in own for n in vars(base)} | {*values}) & self._names
        else:
            names = {n for n in values if not n.startswith("_")}
        read = functools.partial(_get_all, values.get, [*names])
        return self._note(Place(label, [*names], read, values.__setitem__))

    def _parts_of_class(self, kind: type) -> Parts:
        self._visited[id(kind)] = kind
        names = [n for n in vars(kind) if not n.startswith("__") or n == "__call__"]
        names = [n for n in names if self._names is None or n in self._names]
        read = functools.partial(_get_all, vars(kind).get, names)
        return self._note(Place(kind.__name__, names, read, functools.partial(setattr, kind)))


def _get_all(get: Callable[..., Any], names: Sequence[Any]) -> list[Any]:
    return [*map(get, names, _ALWAYS)]


def _attributes(thing: object, names: Sequence[str]) -> list[Any]:
    return [getattr(thing, name, MISSING) for name in names]


def _contents(cells: Sequence[types.CellType]) -> list[Any]:
    try:
        return [cell.cell_contents for cell in cells]
    except ValueError:  # one isn't assigned yet
        return [MISSING for _ in cells]


def _fill(code: types.CodeType, cells: Sequence[types.CellType]) -> Callable[[Any, Any], None]:
    def fill(name: str, value: object) -> None:
        cells[code.co_freevars.index(name)].cell_contents = value

    return fill


def _fill_array(array: Any, _: str, content: bytes) -> None:
    array[...] = np.frombuffer(content, array.dtype).reshape(array.shape)


def _file_of(kind: type) -> str | None:
    module = sys.modules.get(kind.__module__)
    return "" if kind.__module__ == "__main__" else getattr(module, "__file__", None)


def _slots_of(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    return [n for n in ([slots] if isinstance(slots, str) else slots) if not n.startswith("__")]


def _called(thing: object) -> str:
    """What a thing is called in messages."""
    named = thing if isinstance(thing, (type, types.FunctionType)) else type(thing)
    return named.__name__


def _words(label: str, name: object) -> str:
    if isinstance(name, str) and name.isidentifier():
        return f"{label}.{name}" if label else name
    return f"{label}[{name!r}]" if label else str(name)


def _is_same(was: object, now: object) -> bool:
    """Whether it is one thing, or two equal numbers, flags or words."""
    if was is now:
        return True
    if type(was) is not type(now) or not is_plain(was):
        return False
    return bool(was == now) or (was != was and now != now)


def _is_result(value: object) -> bool:
    """Whether it is a number, or a tensor that isn't a parameter; nothing that is set up."""
    is_data = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return is_data or is_plain(value) or value is MISSING
