"""One training step, on the device alone: a pass, and the update that it asks for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pvae import terms as t
from pvae.distributed import World
from pvae.engine.compiler import UncompilableError
from pvae.engine.graphs import CapturedStep, CompiledPass
from pvae.engine.measure import Measure
from pvae.engine.monitor import Failure, Monitor
from pvae.engine.optimizers import Backup, update
from pvae.engine.passes import LocalResult, Passes, PassResult
from pvae.engine.precision import Precision
from pvae.errors import ArgumentError, PvaeWarning
from pvae.internals import can_skip_on_device
from pvae.objectives import Objective, ObjectiveState

__all__ = ["ENGINES", "Engine", "Stepper", "check_engine"]

Engine = Literal["eager", "compiled", "cudagraph"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


class Stepper:
    """Runs training steps of a pair and keeps sums of what they measured on the device.

    A step whose loss or gradient isn't finite changes nothing, and nor does any step after it,
    until the host looks and recovers.

    Arguments:
        model: A Pyro program.
        guide: Its guide.
        objective: What to maximise; any of Pyro's ELBOs.
        structure: What `inspect_pair` found.
        optimizer: Over ``structure.parameters``.
        state: The objective's state; None for Pyro's own objectives.
        clip_norm: Largest norm of the whole gradient; None for no clipping.
        engine: ``"eager"``, or ``"compiled"``: loss, gradients and everything measured as one
            graph for each shape of batch. Its first step is compared with the eager one; where
            they differ, or there can be no graph, a warning says why, and steps are eager. Or
            ``"cudagraph"``: the whole step, update included, captured and replayed on CUDA, with
            the same guard; learning rates and schedules may change, other settings are captured
            anew.
        precision: ``"full"``, the pair's own type, or ``"bf16"``: networks in bfloat16.
        per_datum: Whether the loss is divided by the data plate's full size.
        world: The processes that share each batch. Each computes loss and gradients on its own
            rows; their means over all rows are what every process then goes on with.

    Attributes:
        parameters: What is trained.
        passes: A step but for its update.
        loss: Of the last step, on the device.
        sums: Of what steps measured since `reset`, on the device.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        objective: PyroELBO,
        structure: t.Structure,
        optimizer: torch.optim.Optimizer,
        state: ObjectiveState | None,
        clip_norm: float | None = None,
        engine: Engine = "eager",
        *,
        precision: Precision = "full",
        per_datum: bool = True,
        world: World | None = None,
    ) -> None:
        self.objective, self.structure, self.state = objective, structure, state
        self.optimizer, self.world = optimizer, world or World()
        self.parameters = list(structure.parameters.values())
        measure = Measure(model, guide, objective, structure, state, precision, per_datum=per_datum)
        self._monitor = Monitor(structure.device)
        self.loss, self.sums = self._monitor.loss, self._monitor.sums
        self.passes = Passes(measure, self._monitor, clip_norm, self.world)
        self._compiled = CompiledPass(self.passes, self.passes.run)
        self._local = CompiledPass(self.passes, self.passes.run_local)
        self._captured: CapturedStep | None = None
        self.engine = engine

    @property
    def engine(self) -> Engine:
        """How a step runs."""
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        check_engine(engine, self.structure.device, self.world)
        self._engine: Engine = engine
        self.passes.may_look = engine == "eager"

    def __call__(self, batch: tuple[Tensor, ...], step: int) -> None:
        """Runs one step on a batch; ``step`` is its number, for a `Failure` to name.

        Of several processes each has its own rows of the batch; one without rows has an empty
        tuple, and takes part.
        """
        self._monitor.number.fill_(step)
        if not isinstance(self.objective, Objective):  # some of Pyro's add to what is there
            self.optimizer.zero_grad(set_to_none=True)
        result = self._step(batch)
        if self.state is not None:
            self.state.measured = result.measured
            kept = Backup(list(self.state.tensors().values()))
            self.state.advance()
            kept.restore_unless(result.ok)

    def _step(self, batch: tuple[Tensor, ...]) -> PassResult:
        """The pass and the update, by the engine."""
        try:
            if self.engine == "cudagraph":
                if self._captured is None:
                    self._captured = CapturedStep(self.passes, self.optimizer, self._update)
                return self._captured(batch)
            if self.engine == "compiled" and self.world.size == 1:
                return self._update(self._compiled(batch))
        except UncompilableError as error:
            self._give_up(error)
        if self.world.size > 1:
            return self._update(self.passes.run_shared(batch, self._run_local))
        return self._update(self.passes.run(*batch))

    def _run_local(self, batch: tuple[Tensor, ...]) -> LocalResult:
        """What this one of several processes does by itself, by the engine."""
        try:
            if self.engine == "compiled":
                return self._local(batch)
        except UncompilableError as error:
            self._give_up(error)
        return self.passes.run_local(*batch)

    def _update(self, result: PassResult) -> PassResult:
        """The optimiser's step, where the pass is good."""
        for name, parameter in self.structure.parameters.items():
            parameter.grad = result.gradients.get(name)
        update(self.optimizer, result.ok, self.parameters)
        return result

    def _give_up(self, error: UncompilableError) -> None:
        what = "captured" if self.engine == "cudagraph" else "compiled"
        warnings.warn(
            f"Steps run as Python, not {what}: {error}. The numbers are the same.",
            PvaeWarning,
            stacklevel=5,
        )
        self.engine = "eager"

    def averages(self) -> dict[str, float]:
        """Averages over data since the last `reset`; waits for the device."""
        return self._monitor.averages()

    def reset(self) -> None:
        """Starts new averages."""
        self._monitor.reset()

    def look(self, step: int) -> Failure | None:
        """Waits for the device and says whether a step has failed; ``step`` is the last one."""
        failure = self._monitor.look(self.passes.names)
        if failure is None:
            return None
        for state in self.optimizer.state.values():  # counters on the host couldn't be masked
            count = None if can_skip_on_device(self.optimizer) else state.get("step")
            if isinstance(count, Tensor) and count.device != self.loss.device:
                count -= step - failure.step + 1
        sites = dict.fromkeys(name for own in self.world.gather(failure.sites) for name in own)
        return replace(failure, sites=tuple(sites))

    def recover(self, step: int) -> None:
        """Makes itself ready to go on at ``step``, after a failure."""
        self._monitor.recover()
        if self.state is not None:
            self.state.set_step(step)

    @property
    def has_penalties(self) -> bool:
        """Whether the last batch had any."""
        return self.passes.measure.has_penalties


def check_engine(engine: Engine, device: torch.device, world: World) -> None:
    """Refuses an engine that isn't known, or can't run there."""
    if engine not in ENGINES:
        raise ArgumentError("engine", f"one of {', '.join(ENGINES)}", repr(engine))
    if engine == "cudagraph" and (device.type != "cuda" or world.size > 1):
        raise ArgumentError(
            "engine",
            "a pair on one CUDA device, for 'cudagraph'",
            device.type if world.size == 1 else "several processes",
            ["engine='compiled'", "device='cuda', where there is one"],
        )
