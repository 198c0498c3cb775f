"""Compiled passes; and the guard of every graph of a step: it has to give the eager numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from pvae import randomness
from pvae.devices import double
from pvae.engine.compiler import UncompilableError, compile_function
from pvae.engine.inputs import as_tensors, type_of_numbers
from pvae.engine.monitor import Measured
from pvae.engine.optimizers import Backup
from pvae.engine.passes import Passes, PassResult
from pvae.engine.watch import Watch, noting
from pvae.objectives import Objective
from pvae.pair import Batch
from pvae.pair.held import Held, is_plain

__all__ = [
    "CompiledPass",
    "Recorded",
    "Recordings",
    "check_generators",
    "check_numbers",
    "kind_of",
    "numbers",
    "of_tensors",
    "tensors_of",
    "undoing",
]

T = TypeVar("T")
Result = TypeVar("Result", PassResult, Measured)

MAX_GRAPHS = 4
"""Kinds of batch that are compiled or captured; others run as Python."""

WORTH_A_GRAPH = 20
"""Steps that a graph has to serve before what it has read changes, for another to be made."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Of the norm of the gradient's change against the norm of the gradient; 0.05 for bfloat16."""


@dataclass(eq=False)
class Recorded(Generic[T]):
    """A graph.

    Attributes:
        run: Runs it on the tensors of a batch.
        watch: What it has read of Python.
        announced: Parameters that the step announced, by identity.
        served: How often it was run.
    """

    run: Callable[..., T]
    watch: Watch
    announced: set[int]
    served: int = 0


class Recordings(Generic[T]):
    """The graphs of a step: for each kind of batch, and for what Python held, as long as few."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[Recorded[T]]] = {}

    def find(self, kind: Hashable, batch: Batch) -> Recorded[T] | None:
        """The graph for a batch, if there is one."""
        for recorded in self._known.get(kind, ()):
            if recorded.watch.holds(batch):
                recorded.served += 1
                return recorded
        return None

    def has_room(self, kind: Hashable) -> bool:
        """Whether another graph may be made.

        Raises:
            UncompilableError: If what the step reads of Python changes all the time.
        """
        known = self._known.get(kind, [])
        if len(known) > 1 and min(r.served for r in known[-2:]) < WORTH_A_GRAPH:
            raise UncompilableError(
                f"what a step reads changes from step to step: {known[-1].watch.change()}. A "
                "number in a tensor where the pair is, such as torch.tensor(0.5), changed by "
                ".fill_(), is read at each step"
            )
        return sum(map(len, self._known.values())) < MAX_GRAPHS

    def floats_before(self, kind: Hashable) -> dict[int, float]:
        """The floats that the last graph was made with, where others are what is in its way."""
        known = self._known.get(kind, [])
        return known[-1].watch.floats if known and known[-1].watch.is_of_other_floats else {}

    def add(self, kind: Hashable, recorded: Recorded[T]) -> Recorded[T]:
        """Keeps a graph."""
        self._known.setdefault(kind, []).append(recorded)
        return recorded


class CompiledPass(Generic[Result]):
    """A pass as a compiled graph for each kind of batch, as long as these are few.

    Arguments:
        passes: What a pass changes.
        eager: The pass as Python.
    """

    def __init__(self, passes: Passes, eager: Callable[..., Result]) -> None:
        self.passes: Passes = passes
        self.eager: Callable[..., Result] = eager
        self._recordings: Recordings[Result] = Recordings()
        self._floats: dict[Hashable, torch.dtype | None] = {}  # of tensors in their place

    def __call__(self, batch: Batch) -> Result:
        """Runs the graph, compiled if need be; a batch of one kind too many runs as Python.

        Floats among the arguments become inputs of the graph when they change, if that is right.

        Raises:
            UncompilableError: If there can be no graph, or it gives other numbers.
        """
        kind, recorded = kind_of(self.passes, batch), None
        dtype = self._floats.get(kind)
        if dtype is None:
            recorded = self._recordings.find(kind, batch)
            is_new = recorded is None and kind not in self._floats
            before = self._recordings.floats_before(kind) if is_new else {}
            if before:
                dtype = self._floats[kind] = self._type_of_floats(batch, before)
        if dtype is not None:
            other = as_tensors(batch, dtype, self.passes.structure.device)
            with_inputs = kind_of(self.passes, other)
            try:
                return self._run(with_inputs, other, self._recordings.find(with_inputs, other))
            except UncompilableError:
                self._floats[kind] = None
                recorded = self._recordings.find(kind, batch)
        return self._run(kind, batch, recorded)

    def _type_of_floats(self, batch: Batch, before: dict[int, float]) -> torch.dtype | None:
        """Of what type floats can be inputs: with these and those before, numbers are the same."""
        earlier = tuple(before.get(i, part) for i, part in enumerate(batch))
        structure = self.passes.structure
        with undoing(self.passes) as undo:

            def measure(batch: Batch) -> list[Tensor]:
                found = numbers(self.passes, self.eager(*batch))
                undo()
                return found

            return type_of_numbers([batch, earlier], measure, structure.dtype, structure.device)

    def _run(self, kind: Hashable, batch: Batch, recorded: Recorded[Result] | None) -> Result:
        if recorded is None:
            if not self._recordings.has_room(kind):
                return self.eager(*batch)
            recorded = self._recordings.add(kind, self._compile(batch))
        self.passes.announced = recorded.announced
        return recorded.run(*tensors_of(batch))

    def _compile(self, batch: Batch) -> Recorded[Result]:
        """The pass as a graph, which has given the same numbers on this batch."""
        passes: Passes = self.passes
        modules = passes.structure.modules
        function, tensors = of_tensors(self.eager, batch), tensors_of(batch)
        with undoing(passes) as undo:
            before, placed = Backup(passes.buffers), _buffers(modules)
            with noting() as ran:
                expected = numbers(passes, self.eager(*batch))
            check_generators(undo.start)
            moving, now = before.changed(), _buffers(modules)
            announced = {*passes.announced}
            undo()
            if rebound := [name for (m, name), b in now.items() if placed.get((m, name)) is not b]:
                raise UncompilableError(f"buffer '{rebound[0]}' is a new tensor after each step")
            watch = Watch(passes.structure, ran, batch)
            passes.moving = moving
            try:
                graph = compile_function(function, tensors)
            finally:
                passes.moving = None
                watch.settle()  # which knows better why there may be no graph
            undo()
            try:
                ours = numbers(passes, graph(*tensors))
            except Exception as error:
                raise UncompilableError(f"the graph fails with {error}") from error
        check_numbers(passes, expected, ours)
        return Recorded(graph, watch, announced)


def kind_of(passes: Passes, batch: Batch) -> Hashable:
    """What a graph is for: modes of modules, and shapes.

    Raises:
        UncompilableError: If there can be none, as of Pyro's objectives.
    """
    if not isinstance(passes.objective, Objective):
        raise UncompilableError(f"{type(passes.objective).__name__} is one of Pyro's objectives")
    for i, part in enumerate(batch):
        if not isinstance(part, Tensor) and not is_plain(part):
            name = type(part).__name__
            raise UncompilableError(f"argument {i} of the pair is a {name}, and not a tensor")
    modes = tuple(m.training for m in passes.structure.modules)
    return (modes, *((x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in batch))


def tensors_of(batch: Batch) -> tuple[Tensor, ...]:
    """The tensors of a batch, which may have numbers and words beside them."""
    return tuple(part for part in batch if isinstance(part, Tensor))


def of_tensors(function: Callable[..., T], batch: Batch) -> Callable[..., T]:
    """The function of a batch's tensors alone, all else as it is in this batch."""

    def run(*tensors: Tensor) -> T:
        left = iter(tensors)
        return function(*(next(left) if isinstance(part, Tensor) else part for part in batch))

    return run


def check_generators(start: dict[str, Tensor]) -> None:
    """Refuses a step that draws from generators that aren't torch's."""
    now = randomness.get_state()
    for name, library in (("python", "Python"), ("numpy", "NumPy")):
        keys = [key for key in start if key.startswith(name)]
        if not all(torch.equal(start[key], now[key]) for key in keys):
            raise UncompilableError(f"it draws from {library}'s generator, not from torch's")


class Undo:
    """Undoes what passes did, and changes to other tensors, when it is called.

    Generators are put back, too, and what the pair's programs count in Python.

    Attributes:
        start: The generators' states.
    """

    def __init__(self, passes: Passes, others: Sequence[Tensor]) -> None:
        structure = passes.structure
        self.start, self._passes = randomness.get_state(), passes
        self._backup = Backup([*passes.changing(), *others])
        self._placed = _buffers(structure.modules)
        self._held = Held((structure.model, structure.guide))

    def __call__(self) -> None:
        randomness.set_state(self.start)
        for (module, name), buffer in _buffers(self._passes.structure.modules).items():
            if buffer is not self._placed.get((module, name)):
                setattr(module, name, self._placed.get((module, name)))
        self._held.restore(everything=False)
        self._backup.restore()
        if self._passes.state is not None:
            self._passes.state.measured = None


@contextmanager
def undoing(passes: Passes, others: Sequence[Tensor] = ()) -> Iterator[Undo]:
    """Undoes what passes did at the end, and whenever what it gives is called."""
    with randomness.forked():
        undo = Undo(passes, others)
        try:
            yield undo
        finally:
            undo()


def _buffers(modules: Sequence[nn.Module]) -> dict[tuple[nn.Module, str], Tensor]:
    """Buffers by where they are."""
    each = {m: m.named_buffers(recurse=False, remove_duplicate=False) for m in modules}
    return {(module, name): buffer for module, own in each.items() for name, buffer in own}


def numbers(passes: Passes, result: PassResult | Measured) -> list[Tensor]:
    """Copies of the loss and the gradients that the last pass gave."""
    loss = result.parts[0] if isinstance(result, Measured) else passes.monitor.loss
    return [loss.clone(), *(g.detach().clone() for g in result.gradients.values())]


def check_numbers(passes: Passes, expected: list[Tensor], graphs: list[Tensor]) -> None:
    """Refuses a graph whose loss, or whose gradients as one vector, aren't the eager ones."""
    worst = float("inf")
    if [x.shape for x in expected] == [x.shape for x in graphs]:
        right = [double(x.nan_to_num()) for x in expected]
        change = [double(x.nan_to_num()) - y for x, y in zip(graphs, right, strict=True)]
        of_loss = float(change[0].abs() / right[0].abs().clamp(min=1.0))
        worst = max(of_loss, _norm(change[1:]) / max(_norm(right[1:]), 1e-12))
    dtype = torch.bfloat16 if passes.precision == "bf16" else passes.structure.dtype
    if not worst <= _TOLERANCE.get(dtype, 5e-2):
        raise UncompilableError(f"loss or gradient differ from the eager ones, by {worst:.2g}")


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([x.norm() for x in tensors]).norm())
