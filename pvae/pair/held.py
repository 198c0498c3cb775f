"""What programs hold in Python: attributes, entries, closures and globals, remembered and put back.

A network's parameters and buffers are tensors, which a step may change as it likes. Everything
else that a program reads is Python's, and this is where it is found, compared and restored.
"""

from __future__ import annotations

import functools
import itertools
import operator
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pvae.code import names_in
from pvae.internals import network_parts
from pvae.origin import is_users

__all__ = [
    "MISSING",
    "Change",
    "Held",
    "Place",
    "is_plain",
    "is_same",
    "slots_of",
]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_LEAVES = (*_PLAIN, Tensor, types.BuiltinFunctionType, torch.dtype, torch.device)
_LONGEST = 1000  # of a list or a dictionary that is followed
_MOST = 20_000  # of things that are followed
Parts = Iterator[tuple[object, str]]
"""Things that are held, each with what it is called."""
Write = Callable[[Any, Any], None]


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()
_ALWAYS = itertools.repeat(MISSING)


def is_plain(value: object) -> bool:
    """Whether it is a number, a flag, a word or None."""
    return isinstance(value, _PLAIN)


class Place:
    """What is under some names: attributes, entries, closed-over variables, globals.

    Arguments:
        label: What it is, for messages.
        names: Its names.
        read: What is under each of them now, in order.
        write: Puts a value under a name; None where that isn't asked for.
        is_library: Whether the names are a library's, so that those with an underscore are its own.

    Attributes:
        values: What was there.
        ignored: Names that don't count.
    """

    def __init__(
        self,
        label: str,
        names: Sequence[object],
        read: Callable[[], Sequence[object]],
        write: Write | None = None,
        *,
        is_library: bool = False,
    ) -> None:
        self.label, self.names, self.read, self.write = label, [*names], read, write
        self.is_library, self.ignored, self.values = is_library, set[object](), [*read()]

    def called(self, name: object) -> str:
        """What is under a name, for messages."""
        return f"{self.label}.{name}" if self.label else str(name)

    def holds(self) -> bool:
        """Whether all is as it was."""
        now = self.read()
        return all(map(operator.is_, now, self.values)) or all(map(is_same, now, self.values))

    def accepts(self) -> bool:
        """Whether all is as it was but what doesn't count, which then is as it is now."""
        if not self.ignored or not self.ignored.issuperset(name for name, _, _ in self.changes()):
            return False
        self.values = [*self.read()]
        return True

    def changes(self) -> list[tuple[object, object, object]]:
        """The names under which something else is now, with what was there and what is."""
        rows = zip(self.names, self.values, self.read(), strict=True)
        return [(name, was, now) for name, was, now in rows if not is_same(was, now)]

    def restore(self, *, everything: bool) -> None:
        """Puts back numbers, flags, words and results; or everything."""
        for name, was, now in self.changes():
            if self.write and (everything or (_is_result(was) and _is_result(now))):
                self.write(name, was)


class Change(NamedTuple):
    """A name of a place, what was under it, and what is there now."""

    place: Place
    name: object
    was: object
    now: object

    def __str__(self) -> str:
        return f"{self.what}, from {_short(self.was)} to {_short(self.now)}"

    @property
    def what(self) -> str:
        """What has changed."""
        return self.place.called(self.name)

    @property
    def is_of_values(self) -> bool:
        """Whether it is one of numbers, words or tensors, or of what a list has."""
        if isinstance(self.place, _Items):
            return True
        return all(is_plain(v) or isinstance(v, Tensor) for v in (self.was, self.now))


class _Entries(Place):
    """All entries of a dictionary, which may get new ones; an object's attributes are one."""

    def __init__(
        self,
        label: str,
        entries: dict[Any, object],
        *,
        of_object: bool = False,
        is_library: bool = False,
    ) -> None:
        self.of_object = of_object
        self.entries, get = entries, entries.get
        names, write = [*entries], entries.__setitem__
        read = lambda: _get_all(get, self.names)  # noqa: E731
        self.names = names
        super().__init__(label, names, read, write, is_library=is_library)

    def called(self, name: object) -> str:
        """An attribute, or an entry."""
        return super().called(name) if self.of_object else f"{self.label}[{name!r}]"

    def holds(self) -> bool:
        """Whether all is as it was, and nothing new is there."""
        return len(self.entries) == len(self.names) and super().holds()

    def accepts(self) -> bool:
        """Whether all is as it was but what doesn't count, which then is as it is now."""
        if not super().accepts():
            return False
        self.names = [*self.entries]
        self.values = [*self.read()]
        return True

    def changes(self) -> list[tuple[object, object, object]]:
        """The same, with new entries."""
        known = {*self.names}
        new = [(name, MISSING, value) for name, value in self.entries.items() if name not in known]
        return super().changes() + new

    def restore(self, *, everything: bool) -> None:
        """Puts back numbers, flags, words and results; or everything, without new entries."""
        if not everything:
            super().restore(everything=False)
        elif not self.holds():
            self.entries.clear()
            self.entries.update(zip(self.names, self.values, strict=True))


class _Items(Place):
    """The items of a list, which may grow."""

    def __init__(self, label: str, items: MutableSequence[object]) -> None:
        self.items = items
        super().__init__(label, (), lambda: [*items], items.__setitem__)

    def called(self, name: object) -> str:
        """An item."""
        return f"{self.label}[{name}]"

    def holds(self) -> bool:
        """Whether all is as it was."""
        return len(self.items) == len(self.values) and super().holds()

    def changes(self) -> list[tuple[object, object, object]]:
        """What is at each index that was something else."""
        rows = enumerate(itertools.zip_longest(self.values, [*self.items], fillvalue=MISSING))
        return [(i, was, now) for i, (was, now) in rows if not is_same(was, now)]

    def restore(self, *, everything: bool) -> None:
        """Takes back numbers and results; or everything."""
        changes = self.changes()
        results = (_is_result(now) or now is MISSING for _, _, now in changes)
        if changes and (everything or all(results)):
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

    Attributes:
        places: What was under each name.
        tensors: All tensors that are reached, which may be more than once.
        words: Names and words in the code of functions that are reached.
    """

    def __init__(self, programs: Iterable[object], names: set[str] | None = None) -> None:
        self._names, self._visited = names, dict[int, object]()
        self.tensors: list[Tensor] = []
        self.words = set[str]()
        self.places: list[Place] = []
        self._empty: list[object] = []
        for program in programs:
            self._follow(deque([(program, _called(program))]))

    def _follow(self, queue: deque[tuple[object, str]]) -> None:
        while queue and len(self._visited) < _MOST:
            thing, label = queue.popleft()
            if isinstance(thing, Tensor):
                self.tensors.append(thing)
            if not isinstance(thing, _LEAVES) and id(thing) not in self._visited:
                self._visited[id(thing)] = thing
                queue.extend(self._parts(thing, label))

    def found(self, kinds: type | tuple[type, ...]) -> list[Any]:
        """All things of some kinds that are reached, in the order of that."""
        return [thing for thing in self._visited.values() if isinstance(thing, kinds)]

    @property
    def modules(self) -> list[nn.Module]:
        """All networks that are reached, with the modules in them."""
        return self.found(nn.Module)

    def holds(self) -> bool:
        """Whether everything that counts is as it was."""
        is_any_filled = any(self._empty)  # of the containers that had nothing, which are many
        return all(p.holds() or p.accepts() for p in self.places if p.values or is_any_filled)

    def changes(self) -> list[Change]:
        """What isn't as it was; not what libraries keep for themselves."""
        return [
            Change(place, name, was, now)
            for place in self.places
            for name, was, now in place.changes()
            if not (place.is_library and str(name).startswith("_"))
        ]

    def has_other_parts(self) -> bool:
        """Whether programs may take another course: by another network, number, flag or word.

        Also where a tensor is on another device. Results that a list has got, and modes, are no
        reason to look at a pair again.
        """
        return not self.holds() and any(
            isinstance(c.was, nn.Module)
            or isinstance(c.now, nn.Module)
            or _is_moved(c.was, c.now)
            or (_is_setting(c.was) and _is_setting(c.now) and c.name != "training")
            for c in self.changes()
        )

    def restore(self, *, everything: bool) -> None:
        """Puts back numbers, flags, words, results and lists of them; or everything.

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
            given = [*thing.args, thing.keywords]
            return iter([(thing.func, label), *((part, _called(thing.func)) for part in given)])
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
        if isinstance(place, (_Entries, _Items)):
            if not place.values:
                self._empty.append(place.entries if isinstance(place, _Entries) else place.items)
            self.places.append(place)
        elif place.names:
            self.places.append(place)
        names = place.names or range(len(place.values))
        return zip(place.values, map(place.called, names), strict=True)

    def _parts_of_function(self, function: types.FunctionType) -> Parts:
        code, label = function.__code__, function.__name__
        self.words |= names_in(code)
        cells = function.__closure__ or ()
        contents = functools.partial(_contents, cells)
        yield from self._note(Place("", code.co_freevars, contents, _fill(code, cells)))
        defaults = ("__defaults__", "__kwdefaults__", "__code__")
        values = functools.partial(_attributes, function, defaults)
        self._note(Place(label, defaults, values, functools.partial(setattr, function)))
        yield from [(function.__defaults__, label), (function.__kwdefaults__, label)]
        if vars(function):
            yield from self._note(_Entries(label, vars(function), of_object=True))
        if is_users(function.__globals__.get("__name__", "")):
            names = names_in(code)
            yield from self._named(function.__globals__, names, "")
            for value in map(function.__globals__.get, names & {*function.__globals__}):
                if isinstance(value, types.ModuleType) and is_users(value.__name__):
                    yield from ((vars(value)[n], n) for n in names & {*vars(value)})

    def _named(self, values: dict[str, object], names: Iterable[str], label: str) -> Parts:
        """What a dictionary has under names, of those that count."""
        names = sorted(n for n in names if self._names is None or n in self._names)
        names = [n for n in names if n in values]
        read = functools.partial(_get_all, values.get, names)
        return self._note(Place(label, names, read, values.__setitem__))

    def _parts_of_object(self, thing: Any) -> Parts:
        label, kind = _called(thing), thing if isinstance(thing, type) else type(thing)
        own = [base for base in kind.__mro__ if is_users(base.__module__)]
        if isinstance(thing, types.ModuleType):
            if self._names is not None and is_users(thing.__name__):
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
        slots = [n for base in own for n in slots_of(base)]
        read = functools.partial(_attributes, thing, slots)
        yield from self._note(Place(label, slots, read, functools.partial(setattr, thing)))

    def _parts_of_attributes(self, values: dict[str, object], own: list[type], label: str) -> Parts:
        if self._names is None:
            return self._note(_Entries(label, values, of_object=True, is_library=not own))
        if own:  # also names that a class has, and the object may get
            names = ({n for base in own for n in vars(base)} | {*values}) & self._names
        else:
            names = {n for n in values if not n.startswith("_")}
        read, write = functools.partial(_get_all, values.get, [*names]), values.__setitem__
        return self._note(Place(label, [*names], read, write, is_library=not own))

    def _parts_of_class(self, kind: type) -> Parts:
        self._visited[id(kind)] = kind
        names = [n for n in vars(kind) if not n.startswith("__") or n == "__call__"]
        names = [n for n in names if self._names is None or n in self._names]
        read = functools.partial(_get_all, vars(kind).get, names)
        return self._note(Place(kind.__name__, names, read, functools.partial(setattr, kind)))


def _get_all(get: Callable[..., object], names: Sequence[object]) -> list[object]:
    return [*map(get, names, _ALWAYS)]


def _attributes(thing: object, names: Sequence[str]) -> list[object]:
    return [getattr(thing, name, MISSING) for name in names]


def _contents(cells: Sequence[types.CellType]) -> list[object]:
    try:
        return [cell.cell_contents for cell in cells]
    except ValueError:  # one isn't assigned yet
        return [MISSING for _ in cells]


def _fill(code: types.CodeType, cells: Sequence[types.CellType]) -> Write:
    def fill(name: str, value: object) -> None:
        cells[code.co_freevars.index(name)].cell_contents = value

    return fill


def _fill_array(array: np.ndarray, _: str, content: bytes) -> None:
    array[...] = np.frombuffer(content, array.dtype).reshape(array.shape)


def slots_of(kind: type) -> list[str]:
    """Names that a class keeps attributes under without a dictionary."""
    slots = vars(kind).get("__slots__", ())
    return [n for n in ([slots] if isinstance(slots, str) else slots) if not n.startswith("__")]


def _called(thing: object) -> str:
    """What a thing is called in messages."""
    named = thing if isinstance(thing, (type, types.FunctionType)) else type(thing)
    return named.__name__


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if not is_plain(value) and value is not MISSING:
        return f"a {type(value).__name__}"
    text = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    return text if len(text) < 30 else f"{text[:30]}..."


def is_same(was: object, now: object) -> bool:
    """Whether it is one thing, or two equal numbers, flags or words."""
    if was is now:
        return True
    if isinstance(was, tuple) and isinstance(now, tuple):
        return len(was) == len(now) and all(map(is_same, was, now))
    if type(was) is not type(now) or not is_plain(was):
        return False
    return bool(was == now) or (was != was and now != now)


def _is_moved(was: object, now: object) -> bool:
    """Whether there was a tensor, and is one on another device."""
    return isinstance(was, Tensor) and isinstance(now, Tensor) and was.device != now.device


def _is_setting(value: object) -> bool:
    """Whether it is a number, a flag or a word, or a tuple of them."""
    return is_plain(value) or (isinstance(value, tuple) and all(map(_is_setting, value)))


def _is_result(value: object) -> bool:
    """Whether it is a number, or a tensor that isn't trained; nothing that is set up once."""
    is_trained = isinstance(value, Tensor) and value.is_leaf and value.requires_grad
    return (isinstance(value, Tensor) and not is_trained) or is_plain(value)
