"""A step captured as a CUDA graph and replayed: no launch of a kernel waits for Python."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from pvae.engine.capturable import Filling, Used, reason, refusing_waits
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
from pvae.engine.optimizers import count_on_device
from pvae.engine.passes import Passes, PassResult
from pvae.engine.watch import Watch, noting
from pvae.errors import oxford
from pvae.internals import Pool, abandon_capture, can_skip_on_device
from pvae.modes import capturing_graph, is_capturing_graph
from pvae.pair import Batch
from pvae.pair.held import is_plain, is_same

__all__ = ["CapturedStep", "Recorder"]

T = TypeVar("T")

WARM_UP = 3
"""Runs on a stream of their own before a capture, in which libraries set themselves up."""

MOST_CHANGES = 3
"""Steps in a row, each with other settings of the optimiser, after which there is no graph."""


class CapturedStep:
    """A whole step, pass and update: as Python a few times, from then on as a graph.

    There is a graph for each kind of batch; all have their memory in one pool. Draws go on as they
    would: torch moves its generators at each replay. Learning rates are on the device, and written
    where they have changed; every other number that isn't in a tensor there is what it was at the
    capture, and where one of the optimiser's changes, there is another graph.

    Arguments:
        passes: The passes.
        optimizer: Any of torch's that keeps what it counts on the device, as Adam does, and SGD.
        update: Does the rest of a step with the result of a pass.
    """

    def __init__(
        self,
        passes: Passes,
        optimizer: torch.optim.Optimizer,
        update: Callable[[PassResult], object],
    ) -> None:
        self.passes, self.update, self.optimizer = passes, update, optimizer
        self._device = passes.structure.device
        self._recorder = Recorder(self._device)
        self._last: tuple[Hashable, ...] = ()
        self._changes = 0
        self._start()

    def _start(self) -> None:
        """Has no graphs, and an optimiser that counts on the device."""
        self._runs: Counter[Hashable] = Counter()
        self._recordings: Recordings[PassResult] = Recordings()
        self._rates: list[Tensor] = []
        self._written: list[float] = []
        self._state = self.optimizer.state
        for state in self._state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(self._device)

    def __call__(self, batch: Batch) -> PassResult:
        """Runs a step, or replays it; the next call may write over the result's tensors.

        Raises:
            UncompilableError: If there can be no graph, or it gives other numbers.
        """
        if self.optimizer.state is not self._state:  # another was loaded, and graphs have the old
            self._start()
        self._write_rates()
        kind = (kind_of(self.passes, batch), self._settings())
        if self._runs[kind] < WARM_UP:
            self._runs[kind] += 1
            return self._recorder.run_aside(self._step, batch)
        recorded = self._recordings.find(kind, batch)
        if recorded is None:
            if not self._recordings.has_room(kind):
                return self._step(*batch)
            recorded = self._recordings.add(kind, self._capture(batch))
        self.passes.announced = recorded.announced
        return recorded.run(*tensors_of(batch))

    # What the optimiser is told

    def _settings(self) -> Hashable:
        """What a capture fixes of the optimiser: its numbers, and which learning rates are equal.

        Raises:
            UncompilableError: If they change from step to step.
        """
        groups = self.optimizer.param_groups
        now = (*_which_are_equal(groups), *(v for g in groups for _, v in _fixed(g)))
        self._changes = self._changes + 1 if self._last and now != self._last else 0
        if self._changes > MOST_CHANGES:
            names = [*("lr" for _ in groups), *(name for g in groups for name, _ in _fixed(g))]
            rows = zip(names, now, self._last, strict=False)
            what = oxford(sorted({name for name, new, old in rows if new != old}))
            raise UncompilableError(f"the optimiser's {what} changes from step to step")
        self._last = now
        return now

    def _write_rates(self) -> None:
        """Has the learning rates on the device; fused kernels read them in single precision."""
        groups = self.optimizer.param_groups
        if len(groups) > len(self._rates):
            count_on_device(self.optimizer)
        for group in groups[len(self._rates) :]:
            dtype = torch.float32 if group.get("fused") else self.passes.structure.dtype
            self._rates.append(torch.zeros((), dtype=dtype, device=self._device))
            self._written.append(math.nan)
        for i, group in enumerate(groups):
            if isinstance(group["lr"], Tensor) or group["lr"] != self._written[i]:
                self._rates[i].fill_(group["lr"])
                self._written[i] = math.nan if isinstance(group["lr"], Tensor) else group["lr"]

    @contextmanager
    def _rates_set(self) -> Iterator[None]:
        """Has the optimiser use the learning rates on the device, one for all that are equal."""
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        try:
            for group, first in zip(groups, _which_are_equal(groups), strict=True):
                group["lr"] = self._rates[first]
            yield
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate

    def _step(self, *batch: Tensor) -> PassResult:
        result = self.passes.run(*batch)
        is_as_captured = is_capturing_graph() or can_skip_on_device(self.optimizer)
        with self._rates_set() if is_as_captured else contextlib.nullcontext():
            self.update(result)
        return result

    # A capture

    def _capture(self, batch: Batch) -> Recorded[PassResult]:
        """The step as a graph, whose replay has given an eager pass's numbers and was undone."""
        passes, tensors = self.passes, tensors_of(batch)
        states = [v for s in self._state.values() for v in s.values() if isinstance(v, Tensor)]
        with undoing(passes, [*passes.parameters.values(), *states]) as undo:
            with self._in_python(), noting() as ran:
                expected, used = self._tried(batch)
            check_generators(undo.start)
            announced = {*passes.announced}
            undo()
            watch = Watch(passes.structure, ran, batch)
            try:
                with capturing_graph(), Filling():
                    replay = self._recorder.record(of_tensors(self._step, batch), tensors)
            except Exception as error:
                raise UncompilableError(f"the capture fails with {reason(error)}") from error
            watch.settle()
            watch.add(used.places())
            undo()
            check_numbers(passes, expected, numbers(passes, replay(*tensors)))
        return Recorded(replay, watch, announced)

    def _tried(self, batch: Batch) -> tuple[list[Tensor], Used]:
        """What a step gives that is run as it will be captured, but where a wait raises."""
        used = Used(self._device, tensors_of(batch))
        try:
            with capturing_graph(), refusing_waits(self._device), used, Filling():
                result = self._step(*batch)
        except Exception as error:
            raise UncompilableError(f"a step does what no graph can: {reason(error)}") from error
        return numbers(self.passes, result), used

    @contextmanager
    def _in_python(self) -> Iterator[None]:
        """Refuses a step in which the optimiser counts in Python, and takes the counting back."""
        kept = [(state, _plain_of(state)) for state in self._state.values()]
        kept += [(group, _plain_of(group)) for group in self.optimizer.param_groups]
        try:
            yield
            for holder, before in kept:
                if changed := [k for k, v in before.items() if not is_same(v, holder.get(k))]:
                    kind = type(self.optimizer).__name__
                    raise UncompilableError(f"{kind} keeps its '{changed[0]}' in Python")
        finally:
            for holder, before in kept:
                holder.update(before)


def _fixed(group: Mapping[str, object]) -> list[tuple[str, Hashable]]:
    """What a capture fixes of a group."""
    others = ((k, v) for k, v in group.items() if k not in ("params", "lr"))
    return [(k, v) for k, v in others if isinstance(v, Hashable)]


def _which_are_equal(groups: Sequence[Mapping[str, object]]) -> list[int]:
    """For each group, the first one that has the same learning rate."""
    rates = [id(lr) if isinstance(lr := group["lr"], Tensor) else lr for group in groups]
    return [*map(rates.index, rates)]


def _plain_of(holder: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in holder.items() if is_plain(value)}


class Recorder:
    """Makes graphs, which have one stream and one pool of memory: one of them runs at a time.

    Arguments:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Pool | None = None

    @functools.cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def record(self, function: Callable[..., T], example: Batch) -> Callable[..., T]:
        """The function as a graph with inputs and outputs of its own.

        What other threads do, such as to pin and send batches, doesn't end the capture. After one
        that failed, streams, generators and memory are usable.
        """
        inputs = [x.clone() for x in example]
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        if self._pool is None:
            with contextlib.suppress(RuntimeError):  # a build of torch without CUDA has no pools
                self._pool = torch.cuda.graph_pool_handle()
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with torch.cuda.stream(current), capture:
                outputs = function(*inputs)
        except BaseException:
            abandon_capture(graph, self._device, self._pool)
            _revive_generator(self._device)
            raise

        def replay(*batch: Tensor) -> T:
            for place, x in zip(inputs, batch, strict=True):
                place.copy_(x, non_blocking=True)
            graph.replay()
            return outputs

        return replay

    def run_aside(self, function: Callable[..., T], batch: Batch) -> T:
        """Runs it on the stream, as libraries set themselves up for each."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = function(*batch)
        current.wait_stream(self._stream)
        return results


def _revive_generator(device: torch.device) -> None:
    """Takes the device's generator out of a capture that couldn't be ended."""
    try:
        torch.rand((), device=device)
    except RuntimeError:
        generator = torch.cuda.default_generators[device.index or 0]
        fresh = torch.Generator(device)
        fresh.set_state(generator.get_state())
        generator.graphsafe_set_state(fresh)
