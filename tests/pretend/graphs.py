"""CUDA graphs on the pretend device: a capture writes down operations, a replay does them again."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NOT_PERMITTED = "operation not permitted when stream is capturing"
pools = itertools.count(1)
current: list[CUDAGraph] = []
"""The graph of the capture under way, if there is one."""


def forbid(call: str) -> None:
    """Raises if a capture forbids this thread a call that waits or allocates for the host."""
    for graph in current:
        if graph.mode == "global" or graph.captures_here():
            graph.spoilt = True
            raise RuntimeError(f"CUDA error: {NOT_PERMITTED} ({call})")


def names(library: ctypes.CDLL) -> dict[str, Any]:
    CUDAGraph.library = library
    return {
        "CUDAGraph": CUDAGraph,
        "is_current_stream_capturing": lambda: any(g.captures_here() for g in current),
        "graph_pool_handle": lambda: (0, next(pools)),
    }


def on_device(tree: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.device.type == "cuda":
            yield leaf


def whole(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cuda").set_(x.untyped_storage())


class Tape(TorchDispatchMode):
    """Writes down each operation on the device, and what memory held before the first."""

    def __init__(self, graph: CUDAGraph) -> None:
        super().__init__()
        self.graph = graph
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for x in on_device((args, kwargs)):
            key = x.untyped_storage().data_ptr()
            if key and key not in self.made and key not in self.before:
                self.before[key] = (whole(x), whole(x).clone())
        out = self.run(function, args, kwargs)
        if any(True for _ in on_device((args, kwargs, out))):
            # The launch has numbers of the host as they are now.
            args, kwargs = pytree.tree_map_only(
                Tensor, lambda x: x if x.device.type == "cuda" else x.clone(), (args, kwargs)
            )
            self.graph.tape.append((function, args, kwargs, out))
        for x in on_device(out):
            key = x.untyped_storage().data_ptr()
            if key and key not in self.before:
                self.made.setdefault(key, whole(x))
        return out

    def run(self, function: Any, args: Any, kwargs: Any) -> Any:
        self.graph.library.pretend_set_capturing(1)
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            self.graph.spoilt |= NOT_PERMITTED in str(error)
            raise
        finally:
            self.graph.library.pretend_set_capturing(0)

    def undo(self) -> None:
        """A capture runs nothing: what was there is as it was, what is new holds no numbers."""
        for memory, content in self.before.values():
            memory.copy_(content)
        for memory in self.made.values():
            memory.fill_(0xFF)


class CUDAGraph:
    """In place of ``torch.cuda.CUDAGraph``; ``torch.cuda.graph`` is torch's own."""

    library: ctypes.CDLL

    def __init__(self, **_: Any) -> None:
        self.tape: list[tuple[Any, Any, Any, Any]] = []
        self.generators = [torch.cuda.default_generators[0]]
        self.captured = self.spoilt = False
        self.mode = "global"
        self.handle = (0, 0)

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def captures_here(self) -> bool:
        return self in current and torch.cuda.current_stream() is self.stream

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        if self.captured:
            raise RuntimeError("This CUDAGraph instance already owns a captured graph.")
        if torch.cuda.current_stream() is torch.cuda.default_stream():
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.stream = torch.cuda.current_stream()
        self.mode = capture_error_mode
        self.handle = pool or torch.cuda.graph_pool_handle()
        for generator in self.generators:
            torch.ops.pretend.put_in_graph(generator, on=True)
        self.states = [g.get_state() for g in self.generators]
        self.library.pretend_set_nobody_else(capture_error_mode == "global")
        self.recorder = Tape(self)
        current.append(self)
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)
        current.remove(self)
        self.library.pretend_set_nobody_else(0)
        with torch.no_grad():
            self.recorder.undo()
        if self.spoilt:  # as in torch, the generators stay in the graph
            self.tape.clear()
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
            torch.ops.pretend.put_in_graph(generator, on=False)
        self.captured = True

    def replay(self) -> None:
        if not self.captured:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        debug = self.library.pretend_get_sync_debug()
        self.library.pretend_set_sync_debug(0)
        with torch.no_grad():
            for function, args, kwargs, out in self.tape:
                again = function(*args, **kwargs)
                for old, new in zip(on_device(out), on_device(again), strict=True):
                    if old is not new and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        self.library.pretend_set_sync_debug(debug)

    def reset(self) -> None:
        self.tape.clear()
        self.captured = False

    def pool(self) -> Any:
        return self.handle
