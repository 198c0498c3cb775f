"""Functions that are called often on tensors of the same shapes: compiled where that pays."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from pvae import randomness
from pvae.devices import synchronize
from pvae.engine.compiler import UncompilableError, compile_function, has_compiler
from pvae.engine.stepper import Asked
from pvae.errors import ArgumentError, warn

__all__ = ["Repeated"]

Tensors = tuple[Tensor, ...]

WORTH = 60.0
"""Seconds of eager calls that are to come, from which compiling them pays."""

TRIALS = 3
"""Eager calls on the same shapes before that is decided."""

_ENGINES = ("auto", "eager", "compiled")
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


class Repeated:
    """A function of tensors to one tensor, which has no effects but draws.

    Where it is compiled, the graph is compared with the function first, on the same draws, row
    by row of the tensor's last axis.

    Arguments:
        function: A function of a hashable value, which the graph takes as it is, and of tensors.
        calls: How many calls there will be.
        dtype: What it computes in.
        engine: ``"eager"``, ``"compiled"``, or ``"auto"``.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        calls: int,
        dtype: torch.dtype,
        engine: Asked = "auto",
    ) -> None:
        if engine not in _ENGINES:
            raise ArgumentError("engine", f"one of {', '.join(_ENGINES)}", repr(engine))
        self.function, self.left, self.engine = function, calls, engine
        self.tolerance = _TOLERANCE.get(dtype, 1e-2)
        self._graphs: dict[Hashable, Callable[..., Tensor]] = {}
        self._seconds: dict[Hashable, list[float]] = {}

    def __call__(self, static: Hashable, *tensors: Tensor) -> Tensor:
        """Calls the function, or its graph."""
        key = (static, *((x.shape, x.dtype) for x in tensors))
        if key in self._graphs:
            self.left -= 1
            return self._graphs[key](*tensors)
        before = randomness.get_state() if self.engine != "eager" else {}
        started = time.perf_counter()
        result = self.function(static, *tensors)
        if self.engine == "auto":
            synchronize(result.device)
        self._seconds.setdefault(key, []).append(time.perf_counter() - started)
        self.left -= 1
        if self._pays(key, tensors):
            try:
                self._graphs[key] = self._compile(static, tensors, result, before)
            except UncompilableError as error:
                self.engine = "eager"
                warn(f"Runs as Python, not compiled: {error}. The numbers are the same.")
        return result

    def _pays(self, key: Hashable, tensors: Tensors) -> bool:
        if self.engine != "auto":
            return self.engine == "compiled"
        seconds = self._seconds[key]
        is_long = len(seconds) >= TRIALS and min(seconds[1:]) * self.left > WORTH
        return is_long and has_compiler(tensors[0].device)

    def _compile(
        self, static: Hashable, tensors: Tensors, expected: Tensor, before: dict[str, Tensor]
    ) -> Callable[..., Tensor]:
        """The graph, which has given the same numbers for the last call."""
        with randomness.forked():
            graph = compile_function(functools.partial(self.function, static), tensors)
            randomness.set_state(before)
            try:
                ours = graph(*tensors)
            except Exception as error:
                raise UncompilableError(f"the graph fails with {error}") from error
        off = torch.where(ours == expected, 0.0, (ours - expected).abs())  # infinities may be equal
        size = expected.abs().nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True).clamp(min=1.0)
        worst = float((off / size).max())
        if not worst <= self.tolerance:
            raise UncompilableError(f"the numbers differ from the eager ones, by {worst:.2g}")
        return graph
