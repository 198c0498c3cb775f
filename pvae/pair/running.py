"""Running a pair: on which batch, with which networks, in which mode; its runs as traces."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pvae import randomness
from pvae.devices import is_of_devices
from pvae.errors import PairError, PvaeError, is_out_of_memory
from pvae.internals import version
from pvae.origin import first_error, first_line, line_of_user
from pvae.pair.held import Held
from pvae.threads import alone
from pvae.types import Program

__all__ = [
    "ON_ONE_DEVICE",
    "Batch",
    "Networks",
    "as_batch",
    "called_by",
    "first_floating",
    "flatten",
    "modules_reached",
    "networks_of",
    "probing",
    "put_back",
    "rebuild",
    "root_of",
    "run_pair",
    "tensors_of",
]

ON_ONE_DEVICE = "x.new_zeros(2) for torch.zeros(2), and buffers for a module's constants"
Batch = tuple[Any, ...]
Spec = tuple[Any, ...] | None
R = TypeVar("R")


def as_batch(batch: object) -> Batch:
    """What a pair is called with, as a tuple; one tensor is a batch of one."""
    if isinstance(batch, Iterable) and not isinstance(batch, Tensor):
        return tuple(batch)
    return (batch,)


def flatten(part: object, leaves: list[object]) -> Spec:
    """Appends what is in containers, and returns how it was contained: None for a leaf.

    Example:
        >>> leaves = []
        >>> spec = flatten((1, {"a": [2, 3]}), leaves)
        >>> leaves, rebuild(spec, iter(leaves))
        ([1, 2, 3], (1, {'a': [2, 3]}))
    """
    if isinstance(part, (tuple, list)) and type(part) in (tuple, list):
        return type(part).__name__, *(flatten(inner, leaves) for inner in part)
    if isinstance(part, dict) and type(part) is dict:
        return "dict", tuple(part), *(flatten(inner, leaves) for inner in part.values())
    leaves.append(part)
    return None


def rebuild(spec: Spec, leaves: Iterator[object]) -> Any:
    """What `flatten` took apart, of other leaves."""
    if spec is None:
        return next(leaves)
    kind, *inner = spec
    if kind == "dict":
        names, *inner = inner
        return dict(zip(names, (rebuild(s, leaves) for s in inner), strict=True))
    parts = [rebuild(s, leaves) for s in inner]
    return tuple(parts) if kind == "tuple" else parts


def called_by(spec: Spec, program: Program) -> Program:
    """The program, called with the leaves of its arguments: of a tuple and a dictionary."""
    return functools.partial(_call, spec, program)


def _call(spec: Spec, program: Program, *leaves: object) -> object:
    args, kwargs = rebuild(spec, iter(leaves))
    return program(*args, **kwargs)


def root_of(program: object) -> object:
    """The function or module itself, of a program in handlers of Pyro's or with arguments set."""
    while True:
        inner = poutine.unwrap(program)
        inner = inner.func if isinstance(inner, functools.partial) else inner
        if inner is program:
            return program
        program = inner


def run_pair(
    model: Program, guide: Program, batch: Batch, *, model_too: bool = True
) -> tuple[Trace, Trace]:
    """Traces of the guide and of the model replayed against it; errors say which one failed."""
    unwrapped, versions = poutine.unwrap(guide), _versions(batch)
    if isinstance(unwrapped, poutine.messenger.Messenger):  # an AutoMessenger runs both itself
        _named("guide", lambda: guide(*batch), batch)
        model_trace, guide_trace = unwrapped.get_traces()
        return guide_trace, model_trace
    guide_trace = _named("guide", lambda: poutine.trace(guide).get_trace(*batch), batch)
    _check_unchanged("guide", batch, versions)
    if not model_too:
        return guide_trace, None
    replayed = poutine.replay(model, trace=guide_trace)
    model_trace = _named("model", lambda: poutine.trace(replayed).get_trace(*batch), batch)
    _check_unchanged("model", batch, versions)
    return guide_trace, model_trace


def _versions(batch: Batch) -> list[int | None]:
    """How often each entry of a batch was written to; None where that isn't counted."""
    counted = [isinstance(b, Tensor) and not b.is_inference() for b in batch]
    return [version(b) if is_so else None for b, is_so in zip(batch, counted, strict=True)]


def _check_unchanged(what: str, batch: Batch, before: list[int | None]) -> None:
    """Refuses a program that changes its arguments: what it ran on isn't what is scored."""
    changed = [i for i, (then, now) in enumerate(zip(before, _versions(batch), strict=True))
               if then != now]  # fmt: skip
    if changed:
        fixes = ["x = x - m, which makes another tensor, for x -= m and x.sub_(m)"]
        fixes.append("inplace=False in the first layer, such as nn.ReLU or nn.Dropout")
        expected = "arguments that it leaves as they are, as the other program and loss read them"
        raise PairError(what, expected, f"argument {changed[0]} changed in place", fixes)


def _named(what: str, run: Callable[[], R], batch: Batch) -> R:
    try:
        return run()
    except Exception as error:
        arguments = f"({', '.join(map(_words, batch))})"
        if is_out_of_memory(error):
            error.add_note(f"The {what} was called with {arguments}.")
            raise
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        for cause in reversed(chain):  # the first error; the others are Pyro's additions to it
            if isinstance(cause, PvaeError):
                raise cause from None
        cause = first_error(error)
        fixes = [f"{what}(*batch) on one batch by hand, to see the whole traceback"]
        if is_of_devices(cause):
            fixes.insert(0, ON_ONE_DEVICE)
        if "plate" in first_line(cause):
            fixes.insert(0, ".to_event(k) at the site, so that batch_shape is the plates' sizes")
        actual, line = f"{type(cause).__name__}: {first_line(cause)}", line_of_user(cause)
        actual = f"{actual} ({line})" if line else actual
        raise PairError(what, f"to run when called with {arguments}", actual, fixes) from error


def _words(part: object) -> str:
    if isinstance(part, Tensor):
        return f"{str(part.dtype).removeprefix('torch.')} of shape {tuple(part.shape)}"
    return type(part).__name__


# Networks


class Networks:
    """The networks of a pair, as far as they are known while its programs run.

    Attributes:
        roots: The programs that are modules.
        reached: Modules that a program reaches in another way: in a closure, as a method's owner.
        ran: Modules that were called, by identity.
        asked: Modules whose mode was asked for while the programs ran, however they were run.
        parameters: Those of all modules known before the programs ran.
    """

    def __init__(self, programs: Iterable[object]) -> None:
        programs = list(programs)
        self.roots = [p for p in map(root_of, programs) if isinstance(p, nn.Module)]
        reached = {id(m): m for p in (*programs, *self.roots) for m in modules_reached(p)}
        self.reached = [m for m in reached.values() if not any(m is root for root in self.roots)]
        self.ran: dict[int, nn.Module] = {}
        self.asked: dict[int, nn.Module] = {}
        self._num_known = 0
        self._thread = threading.get_ident()
        self._modes: dict[int, tuple[nn.Module, bool]] = {}
        self._mode = False
        self._frozen: list[nn.Parameter] = []
        for root in (*self.roots, *self.reached):
            for module in root.modules():
                self._switch(module)
        self.parameters = [p for m, _ in self._modes.values() for p in m.parameters(recurse=False)]

    def note(self, module: nn.Module, *_: object) -> None:
        """Called before a module runs, in whatever thread."""
        if threading.get_ident() == self._thread:
            self.ran.setdefault(id(module), module)
            self._switch(module)

    def ask(self, module: nn.Module) -> None:
        """Called before a module's mode is read."""
        if threading.get_ident() == self._thread and id(module) not in self.asked:
            self.asked[id(module)] = module
            self._switch(module)

    def note_first_run(self) -> None:
        """Called when the programs have run once: what comes up later is made anew in each run."""
        self._num_known = len(self.asked)
        self.freeze()

    @property
    def made_anew(self) -> list[nn.Module]:
        """Modules that a later run has asked for their mode, and the first one hadn't."""
        known = {id(m) for root in (*self.roots, *self.reached) for m in root.modules()}
        return [m for m in [*self.asked.values()][self._num_known :] if id(m) not in known]

    def freeze(self) -> None:
        """Freezes again what was frozen: Pyro's store trains what a module's attribute puts in."""
        for parameter in self._frozen:
            parameter.requires_grad_(False)  # noqa: FBT003

    def restore(self) -> None:
        """Gives every module its own mode back, and freezes again what was frozen."""
        for module, training in self._modes.values():
            module.training = training
        self.freeze()

    @contextmanager
    def in_training(self) -> Iterator[None]:
        """Training mode for a while; buffers, such as running means, are as before after it."""
        modules = [module for module, _ in self._modes.values()]
        buffers = [(m, n, b, b.clone()) for m in modules for n, b in m.named_buffers(recurse=False)]
        self._mode = True
        for module in modules:
            self._switch(module)
        try:
            yield
        finally:
            self._mode = False
            for module, _ in self._modes.values():
                module.training = False
            for module, name, buffer, before in buffers:
                setattr(module, name, buffer.copy_(before))

    def _switch(self, module: nn.Module) -> None:
        if id(module) not in self._modes:
            self._modes[id(module)] = module, module.training
            own = module.parameters(recurse=False)
            self._frozen += [p for p in own if not p.requires_grad]
        module.training = self._mode


@contextmanager
def _asking(ask: Callable[[nn.Module], None]) -> Iterator[None]:
    """Calls a function before each read of a module's mode.

    That finds the modules that have one to any effect, also those that no program is seen to reach
    and that run by a method of their own, which no hook of torch's notices.
    """

    def read(module: nn.Module) -> bool:
        ask(module)
        try:
            mode: bool = vars(module)["training"]
        except KeyError:  # a scripted module has it elsewhere, and is asked there
            raise AttributeError("training") from None
        return mode

    before = vars(nn.Module).get("training")
    attribute = property(
        read,
        lambda module, mode: vars(module).__setitem__("training", mode),
        lambda module: vars(module).__delitem__("training"),
    )
    setattr(nn.Module, "training", attribute)  # noqa: B010
    try:
        yield
    finally:
        if before is None:
            delattr(nn.Module, "training")
        else:
            setattr(nn.Module, "training", before)  # noqa: B010


@contextmanager
def probing(programs: Iterable[object]) -> Iterator[Networks]:
    """Evaluation mode, copies of the generators, validation on; notes every module that runs.

    Counters, lists of results and the like are put back. What the programs set up as they first
    run stays, unless they fail.
    """
    programs = list(programs)
    with alone():
        held, networks = Held(programs), Networks(programs)
        handle = register_module_forward_pre_hook(networks.note)
        failed = True
        try:
            validated = pyro.validation_enabled(is_validate=True)
            with _asking(networks.ask), randomness.forked(), torch.no_grad(), validated:
                yield networks
            failed = False
        finally:
            handle.remove()
            networks.restore()
            held.restore(everything=failed)


@contextmanager
def put_back(programs: Iterable[object]) -> Iterator[None]:
    """Puts back all that the programs hold, as if they hadn't run."""
    held = Held(programs)
    try:
        yield
    finally:
        held.restore(everything=True)


def tensors_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Parameters and buffers."""
    for module in modules:
        yield from (*module.parameters(), *module.buffers())


def first_floating(things: Iterable[object]) -> Tensor:
    """The first floating tensor; a number of torch's default type where there is none."""
    tensors = (thing for thing in things if isinstance(thing, Tensor))
    return next((t for t in tensors if t.is_floating_point()), torch.zeros(()))


def modules_reached(program: object) -> list[nn.Module]:
    """The modules that a function reaches: in closures, as a method's owner, as defaults, globals.

    Example:
        >>> network = torch.nn.Linear(2, 1)
        >>> modules_reached(network.forward)
        [Linear(in_features=2, out_features=1, bias=True)]
    """
    own = {*program.modules()} if isinstance(program, nn.Module) else set()
    return [module for module in networks_of((program,)) if module not in own]


def networks_of(programs: Iterable[object]) -> list[nn.Module]:
    """All modules of programs: their own, and those that they reach."""
    return Held(programs).modules
