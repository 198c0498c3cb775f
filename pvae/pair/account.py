"""What a pair is, in words that are the same wherever it is built again, and how two differ.

A pair that goes on where another stopped has to be the same in every number that matters. Found
are the settings of networks and parts, the code of functions and of the methods that they call,
and what these read: closed-over values, globals, attributes, defaults. Not found are parameters,
which training changes, hooks, generators, and what no code reads by name.
"""

from __future__ import annotations

import enum
import functools
import itertools
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroSample
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

from pvae.code import digest_of, globals_in, names_in, source_of
from pvae.described import Described, description
from pvae.distributions import arguments_of
from pvae.internals import Norm, pyro_attributes
from pvae.origin import is_users
from pvae.pair.held import is_plain, slots_of

__all__ = ["Account", "Entry"]

Entry = str | dict[str, str | None]
"""A value in words; of a function its code's digest, and its source where there is one."""

_MOST = 20_000  # of things that are followed
_LONGEST = 1000  # of a container whose items are told one by one
_SAMPLED = 2**26  # bytes from which blocks of an array stand for all of it
_BLOCK = 4096
_MADE = (Distribution, Transform, Constraint)
_WHOLE = (*_MADE, Messenger, ELBO)  # whose public attributes all count
_NO_SETTINGS = (
    *(types.ModuleType, torch.Generator, torch.device, np.random.Generator, np.random.RandomState),
    *(PurePath, types.GeneratorType),
)
_ABSTRACT = (
    *("builtins", "abc", "typing", "torch.nn.modules.module", "pyro.nn.module"),
    *("pvae.described", "pvae.conditional"),
)
_CALLED = (  # by syntax, without a name
    *("__call__", "__getitem__", "__len__", "__iter__", "__getattr__", "__matmul__"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
)
Parts = Iterable[tuple[str, object]]
"""Things that belong to one, each with what it is called."""


@dataclass(frozen=True)
class Account:
    """What things are, each fact under the name of its place.

    Attributes:
        entries: A value in words, by place: ``model.prior.rate``, or ``model, sigma`` for what the
            function ``model`` reads under the name ``sigma``.
        restored: Places of buffers, which a checkpoint puts back.

    Example:
        >>> Account.of({"layer": nn.Dropout(0.5)}).entries
        {'layer': 'Dropout', 'layer.p': '0.5', 'layer.inplace': 'False'}
    """

    entries: dict[str, Entry]
    restored: set[str]

    @classmethod
    def of(cls, roots: Mapping[str, object]) -> Account:
        """The account of things by name, such as a pair's programs."""
        walk = _Walk(roots)
        return cls(walk.entries, walk.restored)


class _Walk:
    """A walk through all that roots reach, which writes down what it finds."""

    def __init__(self, roots: Mapping[str, object]) -> None:
        self.entries: dict[str, Entry] = {}
        self.restored: set[str] = set()
        self._visited: dict[int, object] = {}
        self._names = {*_CALLED, "forward"}
        self._waiting: dict[str, list[tuple[str, object]]] = {}
        self._queue: deque[tuple[str, object]] = deque(roots.items())
        while self._queue and len(self._visited) < _MOST:
            self._take(*self._queue.popleft())

    def _take(self, label: str, thing: object) -> None:
        if isinstance(thing, Tensor | np.ndarray):
            if not (isinstance(thing, Tensor) and thing.requires_grad):
                self.entries[label] = _numbers(thing)
        elif is_plain(thing) or isinstance(thing, torch.dtype | range | slice | enum.Enum):
            self.entries[label] = description(thing)
        elif not isinstance(thing, _NO_SETTINGS) and id(thing) not in self._visited:
            self._visited[id(thing)] = thing
            take = next(take for kinds, take in _TAKES if isinstance(thing, kinds))
            self._queue.extend(take(self, label, thing))

    def _offer(self, label: str, named: Parts) -> Iterator[tuple[str, object]]:
        """What a thing has under names that occur in code that was found; others wait for it."""
        for name, value in named:
            part = f"{label}.{name}", value
            if name in self._names:
                yield part
            else:
                self._waiting.setdefault(name, []).append(part)

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, object]]:
        """What has waited for these names."""
        for name in sorted({*names} - self._names):
            self._names.add(name)
            yield from self._waiting.pop(name, ())

    # Functions

    def function(self, label: str, function: types.FunctionType) -> Parts:
        code, cells = function.__code__, function.__closure__ or ()
        closed = [(n, c) for n, c in zip(code.co_freevars, cells, strict=True) if n != "__class__"]
        yield from ((f"{label}, {name}", _content(cell)) for name, cell in closed)
        if not is_users(function.__globals__.get("__name__") or "__main__"):
            self.entries[label] = function.__name__
            return
        self.entries[label] = {"code": digest_of(code), "source": source_of(code)}
        defaults = function.__defaults__ or ()
        names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
        given = {**dict(zip(names, defaults, strict=True)), **(function.__kwdefaults__ or {})}
        read = {n: function.__globals__[n] for n in globals_in(code) if n in function.__globals__}
        yield from (
            (f"{label}, {name}", value) for name, value in sorted({**read, **given}.items())
        )
        for module in [*read.values(), *(_content(cell) for _, cell in closed)]:
            if isinstance(module, types.ModuleType) and is_users(module.__name__):
                label = module.__name__.rpartition(".")[2]
                yield from self._offer(label, [*vars(module).items()])
        yield from self._read(names_in(code))

    def method(self, label: str, method: types.MethodType) -> Parts:
        return [(label, method.__self__), (f"{label}.{method.__name__}", method.__func__)]

    def partial(self, label: str, partial: functools.partial[object]) -> Parts:
        self.entries[label] = "partial"
        arguments = ((f"{label}, argument {i}", value) for i, value in enumerate(partial.args))
        keywords = ((f"{label}, {name}", value) for name, value in sorted(partial.keywords.items()))
        return [(f"{label}, function", partial.func), *arguments, *keywords]

    def inner(self, label: str, wrapper: Any) -> Parts:
        if isinstance(wrapper, property):
            return [(label, wrapper.fget)]
        is_cached = isinstance(wrapper, functools.cached_property)
        return [(label, wrapper.func if is_cached else wrapper.__func__)]

    # Containers

    def mapping(self, label: str, mapping: Mapping[object, object]) -> Parts:
        """Entries under words that code reads; all, where it reads none of them by name."""
        if len(mapping) > _LONGEST:
            self.entries[label] = f"{len(mapping)} entries"
            return
        named = [(key, value) for key, value in mapping.items() if isinstance(key, str)]
        others = [(f"{label}[{k!r}]", v) for k, v in mapping.items() if not isinstance(k, str)]
        self.entries[label] = f"{len(others)} items and words"
        yield from others
        if self._names.isdisjoint(name for name, _ in named):
            yield from _under(label, named)
        else:
            yield from self._offer(label, named)

    def sequence(self, label: str, items: Collection[object]) -> Parts:
        if _is_flat(items):
            self.entries[label] = description(list(items))
            return []
        if len(items) > _LONGEST:
            self.entries[label] = f"{len(items)} items, of which the first ones are compared"
            items = list(itertools.islice(items, _LONGEST))
            return _under(label, [(str(i), item) for i, item in enumerate(items)])
        self.entries[label] = f"{len(items)} items"
        return [(f"{label}[{i}]", item) for i, item in enumerate(items)]

    def of_set(self, label: str, items: Iterable[object]) -> Parts:
        self.entries[label] = f"{{{', '.join(sorted(map(description, items)))}}}"
        return []

    # Classes and objects

    def of_class(self, label: str, kind: type) -> Parts:
        """A class: its name, and methods that its users' code or a library's class may call."""
        self.entries[label] = kind.__name__
        own = _users_bases(kind)
        others = [base for base in kind.__mro__ if base not in own]
        for base in own:
            named = [(n, v) for n, v in [*vars(base).items()] if n in _CALLED or n[:2] != "__"]
            called = [(n, v) for n, v in named if any(n in vars(other) for other in others)]
            yield from _under(base.__name__, called)
            yield from self._offer(base.__name__, [part for part in named if part not in called])

    def of_object(self, label: str, thing: Any) -> Parts:
        """An object: its class, and attributes under names that code reads, or all public ones."""
        if hasattr(thing, "__wrapped__") or isinstance(thing, types.BuiltinFunctionType):
            self.entries[label] = thing.__name__  # in C
            yield from [(f"{label}, function", getattr(thing, "__wrapped__", None))]
            return
        kind = type(thing)
        yield from self.of_class(label, kind)
        own = _attributes(thing)
        own += [(n, getattr(thing, n, None)) for base in _users_bases(kind) for n in slots_of(base)]
        is_whole = isinstance(thing, _WHOLE) or any(map(_is_ours, kind.__mro__))
        whole = [(name, value) for name, value in own if is_whole and name[0] != "_"]
        yield from _under(label, whole)
        yield from self._offer(label, [part for part in own if part[0] not in dict(whole)])

    def made(self, label: str, thing: Distribution | Transform | Constraint) -> Parts:
        """A distribution, a transform or a constraint: what it was made with."""
        try:
            arguments = arguments_of(thing)
        except AttributeError:
            return self.of_object(label, thing)
        return [*self.of_class(label, type(thing)), *_under(label, arguments.items())]

    def module(self, label: str, module: nn.Module) -> Parts:
        """A network: its class, its settings, its modules, and buffers that are its own."""
        kind = type(module)
        own = _users_bases(kind)
        yield from self.of_class(label, kind)
        if isinstance(module, Described):
            self.entries |= {f"{label}.{name}": text for name, text in module.said().items()}
        if not isinstance(module, AutoGuide):  # which keeps what its first batch has shown
            attributes = _attributes(module)
            is_bare = bool(own) and all(map(_is_abstract, {*kind.__mro__} - {*own}))
            whole = [] if is_bare else [(n, value) for n, value in attributes if n[0] != "_"]
            yield from _under(label, [*whole, *pyro_attributes(module).items()])
            if own:
                others = [part for part in attributes if part[0] not in dict(whole)]
                yield from self._offer(label, others)
        if (own or isinstance(module, Described)) and not isinstance(module, Norm):
            self._buffers(label, module)
        yield from _under(label, module.named_children())

    def _buffers(self, label: str, module: nn.Module) -> None:
        """Buffers and frozen parameters, which are either constants or what training has moved."""
        frozen = [(n, p) for n, p in module.named_parameters(recurse=False) if not p.requires_grad]
        for name, tensor in (*module.named_buffers(recurse=False), *frozen):
            self.entries[f"{label}.{name}"] = _numbers(tensor.detach())
            self.restored.add(f"{label}.{name}")


_TAKES: list[tuple[Any, Callable[[_Walk, str, Any], Parts]]] = [
    (types.FunctionType, _Walk.function),
    (types.MethodType, _Walk.method),
    (functools.partial, _Walk.partial),
    ((property, staticmethod, classmethod, functools.cached_property), _Walk.inner),
    (type, _Walk.of_class),
    (Mapping, _Walk.mapping),
    ((list, tuple, deque), _Walk.sequence),
    ((set, frozenset), _Walk.of_set),
    (nn.Module, _Walk.module),
    (_MADE, _Walk.made),
    (PyroSample, lambda _, label, sample: [(label, sample.prior)]),
    (object, _Walk.of_object),
]


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it isn't assigned yet
        return None


def _under(label: str, named: Parts) -> Parts:
    return [(f"{label}.{name}", value) for name, value in named]


def _users_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if is_users(base.__module__)]


def _attributes(thing: object) -> list[tuple[str, object]]:
    """What an object keeps under names; of a network not what torch keeps for it."""
    kept: dict[str, object] = getattr(thing, "__dict__", {})
    skipped = {"training", *vars(_EMPTY)} if isinstance(thing, nn.Module) else ()
    return [(name, value) for name, value in kept.items() if name not in skipped]


_EMPTY = nn.Module()


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "pvae"


def _is_abstract(kind: type) -> bool:
    """Whether a library's class is there to be extended, and has no settings of its own."""
    return kind.__module__ in _ABSTRACT


def _is_flat(items: Iterable[Any]) -> bool:
    """Whether items are numbers and words, or sequences of them."""
    return all(
        is_plain(item) or (type(item) in (list, tuple, torch.Size) and _is_flat(item))
        for item in items
    )


def _numbers(array: Tensor | np.ndarray) -> str:
    """Numbers in words; of a very large array those of blocks of it."""
    if isinstance(array, Tensor) and array.layout is not torch.strided:
        array = array.to_dense()
    if array.nbytes <= _SAMPLED:
        return description(array)
    flat = array.reshape(-1)
    step = min(-(-array.nbytes // _SAMPLED), len(flat) // _BLOCK)
    rows = flat[: len(flat) // (step * _BLOCK) * step * _BLOCK].reshape(-1, step * _BLOCK)
    words = description(rows[:, :_BLOCK])
    return f"shape {tuple(array.shape)}, one block of {_BLOCK} numbers in {step}: {words}"
