"""Compiled passes; and the guard of every graph of a step: it has to give the eager numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from pvae import randomness
from pvae.engine.compiler import UncompilableError, compile_function
from pvae.engine.monitor import Measured
from pvae.engine.optimizers import Backup
from pvae.engine.passes import Passes, PassResult
from pvae.objectives import Objective

__all__ = ["CompiledPass", "check_numbers", "kind_of", "numbers", "undoing"]

Batch = tuple[Tensor, ...]
Result = TypeVar("Result", PassResult, Measured)

MAX_GRAPHS = 4
"""Kinds of batch that are compiled or captured; others run as Python."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Of the norm of the gradient's change against the norm of the gradient; 0.05 for bfloat16."""


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
        kind = kind_of(self.passes, batch)
        if kind not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                return self.eager(*batch)
            self._graphs[kind] = self._compile(batch)
        return self._graphs[kind](*batch)

    def _compile(self, batch: Batch) -> Callable[..., Result]:
        """The pass as a graph, which has given the same numbers on this batch."""
        passes, modules = self.passes, self.passes.structure.modules
        with undoing(passes) as undo:
            before, placed = Backup(passes.buffers), _buffers(modules)
            expected = numbers(passes, self.eager(*batch))
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
                ours = numbers(passes, graph(*batch))
            except Exception as error:
                raise UncompilableError(f"the graph fails with {error}") from error
        check_numbers(passes, expected, ours)
        return graph


def kind_of(passes: Passes, batch: Batch) -> Hashable:
    """What a graph is for: modes of modules, and shapes.

    Raises:
        UncompilableError: If there can be none, as of Pyro's objectives.
    """
    if not isinstance(passes.objective, Objective):
        raise UncompilableError(f"{type(passes.objective).__name__} is one of Pyro's objectives")
    modes = tuple(m.training for m in passes.structure.modules)
    return (modes, *((x.shape, x.dtype) for x in batch))


@contextmanager
def undoing(passes: Passes, others: Sequence[Tensor] = ()) -> Iterator[Callable[[], None]]:
    """Undoes what passes did, and changes to other tensors, at the end and at each call.

    Generators are put back, too.
    """
    modules, tensors = passes.structure.modules, [*passes.changing(), *others]
    with randomness.forked():
        start, backup, placed = randomness.get_state(), Backup(tensors), _buffers(modules)

        def undo() -> None:
            randomness.set_state(start)
            for (module, name), buffer in _buffers(modules).items():
                if buffer is not placed.get((module, name)):
                    setattr(module, name, placed.get((module, name)))
            backup.restore()
            if passes.state is not None:
                passes.state.measured = None

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
        right = [x.nan_to_num().double() for x in expected]
        change = [x.nan_to_num().double() - y for x, y in zip(graphs, right, strict=True)]
        of_loss = float(change[0].abs() / right[0].abs().clamp(min=1.0))
        worst = max(of_loss, _norm(change[1:]) / max(_norm(right[1:]), 1e-12))
    dtype = torch.bfloat16 if passes.precision == "bf16" else passes.structure.dtype
    if not worst <= _TOLERANCE.get(dtype, 5e-2):
        raise UncompilableError(f"loss or gradient differ from the eager ones, by {worst:.2g}")


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([x.norm() for x in tensors]).norm())
