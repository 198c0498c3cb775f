"""The networks of a pair: which its programs hold, and in which mode they run."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pvae import randomness

__all__ = ["Found", "modules_held", "probing"]


class Found:
    """The networks of a pair, as far as they are known while its programs run.

    Attributes:
        roots: The programs that are modules.
        held: Modules that a program reaches in another way: in a closure, as a method's owner.
        ran: Modules that were called, by identity.
    """

    def __init__(self, programs: Iterable[object]) -> None:
        programs = list(programs)
        self.roots = [p for p in programs if isinstance(p, nn.Module)]
        held = {id(m): m for p in programs for m in modules_held(p)}
        self.held = [m for m in held.values() if not any(m is root for root in self.roots)]
        self.ran: dict[int, nn.Module] = {}
        self._modes: dict[int, tuple[nn.Module, bool]] = {}
        for root in (*self.roots, *self.held):
            for module in root.modules():
                self._switch(module)

    def note(self, module: nn.Module, *_: object) -> None:
        """Called before a module runs."""
        self.ran.setdefault(id(module), module)
        self._switch(module)

    def restore(self) -> None:
        """Gives every module its own mode back."""
        for module, training in self._modes.values():
            module.training = training

    def _switch(self, module: nn.Module) -> None:
        self._modes.setdefault(id(module), (module, module.training))
        module.training = False


@contextmanager
def probing(programs: Iterable[object]) -> Iterator[Found]:
    """Evaluation mode, copies of the generators, validation on; notes every module that runs."""
    found = Found(programs)
    handle = register_module_forward_pre_hook(found.note)
    try:
        with randomness.forked(), torch.no_grad(), pyro.validation_enabled(is_validate=True):
            yield found
    finally:
        handle.remove()
        found.restore()


def modules_held(program: object) -> list[nn.Module]:
    """The modules that a function reaches: in closures, as a method's owner, as defaults, globals.

    Example:
        >>> network = torch.nn.Linear(2, 1)
        >>> modules_held(lambda x: network.forward(x))
        [Linear(in_features=2, out_features=1, bias=True)]
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def visit(thing: object) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
            if thing is not program:
                return
            thing = type(thing).forward
        for part in _parts_of(thing):
            visit(part)

    visit(program)
    return [module for module in found.values() if module is not program]


def _parts_of(thing: object) -> Iterator[object]:
    """What a function, a method, a partial or a container of them holds."""
    if isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
        if not isinstance(thing.__self__, nn.Module):
            yield from vars(thing.__self__).values() if hasattr(thing.__self__, "__dict__") else ()
    elif isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not yet assigned
                continue
        yield from thing.__defaults__ or ()
        yield from (thing.__kwdefaults__ or {}).values()
        yield from _globals_of(thing.__code__, thing.__globals__)
    elif isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, list | tuple):
        yield from thing


def _globals_of(code: types.CodeType, names: dict[str, object]) -> Iterator[object]:
    """Modules, and functions of the same file, that a function's code names."""
    for name in code.co_names:
        value = names.get(name)
        if isinstance(value, nn.Module) or (
            isinstance(value, types.FunctionType) and value.__globals__ is names
        ):
            yield value
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant, names)
