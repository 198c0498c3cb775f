"""Graphs of a step, compiled or captured: each is used once it has given the eager numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from pvae import randomness
from pvae.engine.captured import Captured, Fixed
from pvae.engine.compiler import UncompilableError, compile_function
from pvae.engine.optimizers import Backup
from pvae.engine.passes import LocalResult, Passes, PassResult
from pvae.objectives import Objective, ObjectiveState

__all__ = ["CapturedStep", "CompiledPass", "undoing"]

Batch = tuple[Tensor, ...]
Result = TypeVar("Result", PassResult, LocalResult)

MAX_SHAPES = 4
"""Shapes of a batch that are compiled; others run as Python."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Of the norm of the gradient's change against the norm of the gradient."""


class CompiledPass(Generic[Result]):
    """A pass as a compiled graph for each kind of batch, as long as these are few.

    Arguments:
        passes: What a pass changes.
        eager: The pass as Python.
    """

    def __init__(self, passes: Passes, eager: Callable[..., Result]) -> None:
        self.passes = passes
        self.eager: Callable[..., Result] = eager
        self._graphs: dict[Hashable, Callable[..., Result]] = {}

    def __call__(self, batch: Batch) -> Result:
        """Runs the graph, compiled if need be; a batch of one kind too many runs as Python.

        Raises:
            UncompilableError: If there can be no graph, or it gives other numbers.
        """
        kind = _kind(self.passes, batch)
        if kind not in self._graphs:
            if len(self._graphs) >= MAX_SHAPES:
                return self.eager(*batch)
            self._graphs[kind] = self._compile(batch)
        return self._graphs[kind](*batch)

    def _compile(self, batch: Batch) -> Callable[..., Result]:
        """The pass as a graph, which has given the same numbers on this batch."""
        passes, modules = self.passes, self.passes.measure.structure.modules
        _refuse_pyro(passes)
        with undoing(passes.changing(), passes.state, modules) as undo:
            before, placed = Backup(passes.buffers), _buffers(modules)
            expected = passes.numbers(self.eager(*batch))
            moving, now = before.changed(), _buffers(modules)
            undo()
            if rebound := [name for (m, name), b in now.items() if placed.get((m, name)) is not b]:
                raise UncompilableError(f"buffer '{rebound[0]}' is a new tensor after each step")
            passes.moving = moving
            try:
                graph = compile_function(self.eager, batch)
            finally:
                passes.moving = None
            undo()
            try:
                found = passes.numbers(graph(*batch))
            except Exception as error:
                raise UncompilableError(f"the graph fails with {error}") from error
        _compare(passes, expected, found)
        return graph


class CapturedStep:
    """A whole step, pass and update, as a CUDA graph for each kind of batch.

    Arguments:
        passes: The passes.
        optimizer: Updates the parameters.
        update: Does so with the result of a pass.
    """

    def __init__(
        self,
        passes: Passes,
        optimizer: torch.optim.Optimizer,
        update: Callable[[PassResult], object],
    ) -> None:
        self.passes, self.update = passes, update
        self._fixed = Fixed(optimizer, passes.measure.structure.device)
        self._captured = Captured(self._step, self._check)

    def __call__(self, batch: Batch) -> PassResult:
        """Runs a step, or replays it.

        Raises:
            UncompilableError: If there can be no graph, or it gives other numbers.
        """
        _refuse_pyro(self.passes)
        self._fixed.set_rates()
        return self._captured((_kind(self.passes, batch), self._fixed.kind), batch)

    def _step(self, *batch: Tensor) -> PassResult:
        result = self.passes.run(*batch)
        with self._fixed.recording():
            self.update(result)
        return result

    def _check(self, replay: Callable[..., PassResult], batch: Batch) -> None:
        """Compares a replay with an eager pass, and undoes both."""
        passes = self.passes
        tensors = [*passes.parameters.values(), *self._fixed.tensors, *passes.changing()]
        with undoing(tensors, passes.state) as undo:
            expected = passes.numbers(passes.run(*batch))
            undo()
            found = passes.numbers(replay(*batch))
        _compare(passes, expected, found)


@contextmanager
def undoing(
    tensors: Sequence[Tensor], state: ObjectiveState | None, modules: Sequence[nn.Module] = ()
) -> Iterator[Callable[[], None]]:
    """Undoes what passes did, at the end and whenever the function that it gives is called.

    Arguments:
        tensors: What passes may change; generators are among it anyhow.
        state: The objective's state.
        modules: Those whose buffers may be replaced by others.
    """
    with randomness.forked():
        start, backup, placed = randomness.get_state(), Backup(tensors), _buffers(modules)

        def undo() -> None:
            randomness.set_state(start)
            for (module, name), buffer in _buffers(modules).items():
                if buffer is not placed.get((module, name)):
                    setattr(module, name, placed.get((module, name)))
            backup.restore()
            if state is not None:
                state.measured = None

        try:
            yield undo
        finally:
            undo()


def _buffers(modules: Sequence[nn.Module]) -> dict[tuple[nn.Module, str], Tensor]:
    """Buffers by where they are."""
    each = {m: m.named_buffers(recurse=False, remove_duplicate=False) for m in modules}
    return {(module, name): buffer for module, own in each.items() for name, buffer in own}


def _kind(passes: Passes, batch: Batch) -> Hashable:
    """What a graph is for: modes of modules, and shapes."""
    modes = tuple(m.training for m in passes.measure.structure.modules)
    return (modes, *((x.shape, x.dtype) for x in batch))


def _refuse_pyro(passes: Passes) -> None:
    objective = passes.measure.objective
    if not isinstance(objective, Objective):
        raise UncompilableError(f"{type(objective).__name__} is one of Pyro's objectives")


def _compare(passes: Passes, expected: list[Tensor], found: list[Tensor]) -> None:
    """Refuses a graph whose loss or gradients aren't the eager ones."""
    is_narrow = passes.measure.precision == "bf16"
    dtype = torch.bfloat16 if is_narrow else passes.measure.structure.dtype
    worst = _difference(expected, found)
    if not worst <= _TOLERANCE.get(dtype, 5e-2):
        raise UncompilableError(f"loss or gradient differ from the eager ones, by {worst:.2g}")


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Of the loss, and of the gradients as one vector, the greater relative difference."""
    if [x.shape for x in expected] != [x.shape for x in found]:
        return float("inf")

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.stack([x.double().norm() for x in tensors]).norm())

    pairs = [(a.nan_to_num(), b.nan_to_num()) for a, b in zip(expected, found, strict=True)]
    changes = [b - a for a, b in pairs]
    of_loss = float(changes[0].abs()) / max(1.0, float(pairs[0][0].abs()))
    return max(of_loss, norm(changes[1:]) / max(norm([a for a, _ in pairs[1:]]), 1e-12))
