"""A step captured as a CUDA graph and replayed: no launch of a kernel waits for Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pvae.engine.compiler import UncompilableError
from pvae.engine.graphs import (
    Recorded,
    Recordings,
    check_generators,
    check_numbers,
    kind_of,
    numbers,
    of_tensors,
    tensors_of,
    undoing,
)
from pvae.engine.passes import Passes, PassResult
from pvae.engine.watch import Watch, noting
from pvae.modes import capturing_graph, is_capturing_graph
from pvae.origin import first_line, site_and_line

__all__ = ["CapturedStep", "record", "run_aside"]

T = TypeVar("T")
Batch = tuple[Any, ...]

WARM_UP = 3
"""Runs on a stream of their own before a capture, in which libraries set themselves up."""


class CapturedStep:
    """A whole step, pass and update: as Python a few times, from then on as a graph.

    There is a graph for each kind of batch. Draws go on as they would: torch moves its generators
    at each replay. The optimiser's counters and learning rates are on the device; every other
    number that isn't in a tensor is what it was at the capture, and where one of the optimiser's
    changes, there is another graph.

    Arguments:
        passes: The passes.
        optimizer: Any of torch's that can be captured; Adam can, and SGD.
        update: Updates the parameters with the result of a pass.
    """

    def __init__(
        self,
        passes: Passes,
        optimizer: torch.optim.Optimizer,
        update: Callable[[PassResult], object],
    ) -> None:
        self.passes, self.update, device = passes, update, passes.structure.device
        self._groups, self._states = optimizer.param_groups, optimizer.state
        self._rates = [torch.zeros((), device=device) for _ in self._groups]
        for group in self._groups:
            if "capturable" in group:
                group["capturable"] = True
        for state in self._states.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device)
        self._runs: Counter[Hashable] = Counter()
        self._recordings: Recordings[PassResult] = Recordings()

    def __call__(self, batch: Batch) -> PassResult:
        """Runs a step, or replays it; the next call may write over the result's tensors.

        Raises:
            UncompilableError: If there can be no graph, or it gives other numbers.
        """
        kind = (kind_of(self.passes, batch), self._settings())
        for rate, group in zip(self._rates, self._groups, strict=True):
            rate.fill_(group["lr"])
        if self._runs[kind] < WARM_UP:
            self._runs[kind] += 1
            return run_aside(self._step, batch)
        recorded = self._recordings.find(kind, batch)
        if recorded is None:
            if not self._recordings.has_room(kind):
                return self._step(*batch)
            recorded = self._recordings.add(kind, self._capture(batch))
        self.passes.announced = recorded.announced
        return recorded.run(*tensors_of(batch))

    def _settings(self) -> Hashable:
        """The optimiser's numbers that a capture fixes: all but the learning rates."""
        groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self._groups]
        return tuple(tuple((k, v) for k, v in g.items() if isinstance(v, Hashable)) for g in groups)

    def _step(self, *batch: Tensor) -> PassResult:
        result, before = self.passes.run(*batch), [group["lr"] for group in self._groups]
        try:
            if is_capturing_graph():  # of the learning rates as tensors
                self._set_rates(self._rates)
            self.update(result)
        finally:
            self._set_rates(before)
        return result

    def _set_rates(self, rates: Sequence[float | Tensor]) -> None:
        for group, rate in zip(self._groups, rates, strict=True):
            group["lr"] = rate

    def _capture(self, batch: Batch) -> Recorded[PassResult]:
        """The step as a graph, whose replay has given an eager pass's numbers and was undone."""
        passes, tensors = self.passes, tensors_of(batch)
        states = [v for s in self._states.values() for v in s.values() if isinstance(v, Tensor)]
        with undoing(passes, [*passes.parameters.values(), *states]) as undo:
            with noting() as ran:
                expected = numbers(passes, passes.run(*batch))
            check_generators(undo.start)
            announced = {*passes.announced}
            undo()
            watch = Watch(passes.structure, ran, batch)
            try:
                with capturing_graph():
                    replay = record(of_tensors(self._step, batch), tensors)
            except Exception as error:
                raise UncompilableError(
                    f"the capture fails with {first_line(error)}{site_and_line(error)}"
                ) from error
            watch.settle()
            undo()
            check_numbers(passes, expected, numbers(passes, replay(*tensors)))
        return Recorded(replay, watch, announced)


def record(function: Callable[..., T], example: Batch) -> Callable[..., T]:
    """The function as a graph with inputs and outputs of its own."""
    inputs = [x.clone() for x in example]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(*inputs)

    def replay(*batch: Tensor) -> T:
        for place, x in zip(inputs, batch, strict=True):
            place.copy_(x, non_blocking=True)
        graph.replay()
        return outputs

    return replay


def run_aside(function: Callable[..., T], batch: Batch) -> T:
    """Runs it on a stream of its own."""
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        results = function(*batch)
    current.wait_stream(stream)
    return results
