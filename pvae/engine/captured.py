"""A function captured as a CUDA graph and replayed: no launch of a kernel waits for Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pvae.engine.compiler import UncompilableError
from pvae.modes import capturing_graph, is_capturing_graph

__all__ = ["Captured", "Fixed", "record", "run_aside"]

T = TypeVar("T")
Batch = tuple[Tensor, ...]

WARM_UP = 3
"""Runs on a stream of their own before a capture, in which libraries set themselves up."""

MAX_GRAPHS = 4
"""Kinds of batch that are captured; others run as Python."""


class Captured(Generic[T]):
    """Runs a function as Python a few times and from then on as a graph, for each kind of batch.

    Draws go on as they would: torch moves its generators at each replay. Every other number that
    isn't in a tensor is what it was at the capture; those that may change are to be in ``kind``.

    Arguments:
        function: Of tensors, to tensors in any container; all it does is done on the device.
        check: Called with a replay and what it is to be given, after a capture; raises where the
            graph doesn't do what the function does, and leaves everything as it was.

    Raises:
        UncompilableError: When it is called, where there can be no capture.
    """

    def __init__(
        self, function: Callable[..., T], check: Callable[[Callable[..., T], Batch], None]
    ) -> None:
        self.function, self.check = function, check
        self._runs: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, Callable[..., T]] = {}

    def __call__(self, kind: Hashable, batch: Batch) -> T:
        """The function's results on a batch, in tensors that the next call may write over."""
        if kind not in self._graphs:
            done = self._runs[kind] = self._runs.get(kind, 0) + 1
            if done <= WARM_UP:
                return run_aside(self.function, batch)
            if len(self._graphs) >= MAX_GRAPHS:
                return self.function(*batch)
            try:
                with capturing_graph():
                    replay = record(self.function, batch)
            except Exception as error:
                first, *_ = (str(error).strip() or type(error).__name__).splitlines()
                raise UncompilableError(f"the capture fails with {first}") from error
            self.check(replay, batch)
            self._graphs[kind] = replay
        return self._graphs[kind](*batch)


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


class Fixed:
    """An optimiser whose step can be captured: its counters and learning rates are on the device.

    Arguments:
        optimizer: Any of torch's that can be captured; Adam can, and SGD.
        device: Where its parameters are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.groups, self.states = optimizer.param_groups, optimizer.state
        self.rates = [torch.zeros((), device=device) for _ in self.groups]
        for group in self.groups:
            if "capturable" in group:
                group["capturable"] = True
        for state in self.states.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device)

    @property
    def kind(self) -> Hashable:
        """The numbers that a capture fixes: all but the learning rates."""
        others = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.groups]
        return tuple(tuple((k, v) for k, v in g.items() if isinstance(v, Hashable)) for g in others)

    @property
    def tensors(self) -> list[Tensor]:
        """What a step changes beside the parameters."""
        return [v for s in self.states.values() for v in s.values() if isinstance(v, Tensor)]

    def set_rates(self) -> None:
        """Gives a graph the learning rates of now."""
        for rate, group in zip(self.rates, self.groups, strict=True):
            rate.fill_(group["lr"])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Learning rates are tensors, where a step is captured."""
        before = [group["lr"] for group in self.groups]
        if is_capturing_graph():
            for rate, group in zip(self.rates, self.groups, strict=True):
                group["lr"] = rate
        try:
            yield
        finally:
            for value, group in zip(before, self.groups, strict=True):
                group["lr"] = value


def run_aside(function: Callable[..., T], batch: Batch) -> T:
    """Runs it on a stream of its own."""
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        results = function(*batch)
    current.wait_stream(stream)
    return results
