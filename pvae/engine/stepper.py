"""One training step, on the device alone: a pass, and the update that it asks for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypedDict, TypeVar, get_args

import pyro
import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pvae.devices import synchronize
from pvae.distributed import World
from pvae.engine.captured import CapturedStep
from pvae.engine.compiler import UncompilableError, has_compiler
from pvae.engine.graphs import CompiledPass, undoing
from pvae.engine.monitor import Failure, Measured, Monitor
from pvae.engine.optimizers import Backup, update
from pvae.engine.passes import Passes, PassResult
from pvae.engine.precision import Precision
from pvae.errors import ArgumentError, warn
from pvae.internals import can_skip_on_device
from pvae.modes import in_mode
from pvae.objectives import Objective, ObjectiveState
from pvae.pair import Structure

__all__ = ["ASKED", "ENGINES", "Asked", "Engine", "Stepper", "check_engine", "choose", "time_pass"]

Engine = Literal["eager", "compiled", "cudagraph"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
Asked = Literal["auto", "eager", "compiled", "cudagraph"]
ASKED: tuple[Asked, ...] = get_args(Asked)

WORTH_COMPILING = 180.0
"""Seconds of eager training from which compiling pays: it takes up to half a minute for each shape
of batch, and saves from a tenth of the time (large convolutions) to half of it (small networks)."""

Result = TypeVar("Result", PassResult, Measured)


class Seen(TypedDict):
    """What steps have shown of a pair: whether it has penalties, which parameters had gradients."""

    has_penalties: bool
    moved: list[str]


class Stepper:
    """Runs training steps of a pair and keeps sums of what they measured on the device.

    A step whose loss or gradient isn't finite changes nothing, and nor does any step after it,
    until the host looks and recovers, unless each step is to be judged by itself.

    Arguments:
        structure: What the pair is made of.
        objective: What to maximise; any of Pyro's ELBOs.
        optimizer: Over ``structure.parameters``.
        state: The objective's state; None for Pyro's own objectives.
        clip_norm: Largest norm of the whole gradient; None for no clipping.
        engine: ``"eager"``, or ``"compiled"``: loss, gradients and everything measured as one
            graph for each shape of batch. Its first step is compared with the eager one; where
            they differ, or there can be no graph, a warning says why, and steps are eager. What
            the step has read of Python (attributes, entries, closures, globals, settings) is
            compared before each further step; where it has changed, the step is recorded anew,
            and where it changes all the time, steps are eager. Not seen: what is read from files
            or by code in C, such as ``next`` of an iterator or the time, and what is in arrays of
            more than 1000 bytes or containers of more than 1000 things. Or
            ``"cudagraph"``: the whole step, update included, captured and replayed on CUDA, with
            the same guard; learning rates and schedules may change, other settings are captured
            anew.
        precision: ``"full"``, the pair's own type, or ``"bf16"``: networks in bfloat16.
        per_datum: Whether the loss is divided by the data plate's full size.
        each_by_itself: Whether steps after one that wasn't finite may be good.
        world: The processes that share each batch. Each computes loss and gradients on its own
            rows; their means over all rows are what every process then goes on with.
        late: Called with the name and the tensor of a parameter that a later batch announces
            first, which is trained from then on; None where such parameters stay as they are.

    Attributes:
        passes: A step but for its update.
        moved: Parameters, by identity, that have had a gradient.
        loss: Loss of the last step, on the device.
        sums: Sums of what steps measured since `reset`, on the device.
    """

    def __init__(
        self,
        structure: Structure,
        objective: PyroELBO,
        optimizer: torch.optim.Optimizer,
        state: ObjectiveState | None,
        clip_norm: float | None = None,
        engine: Engine = "eager",
        *,
        precision: Precision = "full",
        per_datum: bool = True,
        each_by_itself: bool = False,
        world: World | None = None,
        late: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.structure, self.objective, self.state = structure, objective, state
        self.optimizer, self.world = optimizer, world or World()
        self.moved: set[int] = set()
        self.monitor = Monitor(structure.device, each_by_itself=each_by_itself)
        self.loss, self.sums = self.monitor.loss, self.monitor.sums
        given = structure, objective, state, self.monitor, clip_norm
        self.passes = Passes(*given, precision, per_datum, self.world, late)
        self._whole = CompiledPass(self.passes, self.passes.run)
        self._own_rows = CompiledPass(self.passes, self.passes.measure)
        self._captured: CapturedStep | None = None
        self.engine = engine

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return list(self.structure.parameters.values())

    @property
    def engine(self) -> Engine:
        """How a step runs."""
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        check_engine(engine, self.structure.device, self.world)
        self._engine: Engine = engine
        self.monitor.may_look = engine == "eager"

    def __call__(self, batch: tuple[Tensor, ...], step: int) -> None:
        """Runs one step on a batch; ``step`` is its number, for a `Failure` to name.

        Of several processes each has its own rows of the batch; one without rows has an empty
        tuple, and takes part.
        """
        self.monitor.number.set(step)
        if not isinstance(self.objective, Objective):  # some of Pyro's add to what is there
            self.optimizer.zero_grad(set_to_none=True)
        self._step(batch)
        if self.state is not None:
            self.state.set_step(self.state.step + 1)

    def _step(self, batch: tuple[Tensor, ...]) -> PassResult:
        """The pass and all that follows it on the device, by the engine."""
        if self.engine == "cudagraph":
            try:
                if self._captured is None:
                    self._captured = CapturedStep(self.passes, self.optimizer, self._finish)
                return self._captured(batch)
            except UncompilableError as error:
                self._give_up("captured", error)
        if self.world.size > 1:
            return self._finish(
                self.passes.run_shared(batch, lambda own: self._run(self._own_rows, own))
            )
        return self._finish(self._run(self._whole, batch))

    def _run(self, compiled: CompiledPass[Result], batch: tuple[Tensor, ...]) -> Result:
        """A pass, or this process's part of one, compiled or as Python."""
        try:
            if self.engine == "compiled":
                return compiled(batch)
        except UncompilableError as error:
            self._give_up("compiled", error)
        return compiled.eager(*batch)

    def _finish(self, result: PassResult) -> PassResult:
        """The optimiser's step, and what the objective's state learns, where the pass is good."""
        self._update(result)
        if self.state is not None:
            self.state.measured = result.measured
            backup = Backup(list(self.state.tensors().values()))
            self.state.learn()
            backup.restore_unless(result.ok)
        self.monitor.number.advance()
        return result

    def _update(self, result: PassResult) -> None:
        announced = self.passes.announced
        for name, parameter in self.structure.parameters.items():
            gradient = result.gradients.get(name)
            if gradient is not None:
                self.moved.add(id(parameter))
            elif id(parameter) in announced and id(parameter) in self.moved:
                gradient = torch.zeros_like(parameter)  # as Pyro's SVI leaves it: momentum goes on
            parameter.grad = gradient
        update(self.optimizer, result.ok, self.parameters)

    def _give_up(self, what: str, error: UncompilableError) -> None:
        warn(f"Steps run as Python, not {what}: {error}. The numbers are the same.")
        self.engine = "eager"
        self.release()

    def release(self) -> None:
        """Drops the graphs on the device with their memory; steps to come make others."""
        if self._captured is not None:
            self._captured = None
            for parameter in self.parameters:
                parameter.grad = None

    def averages(self) -> dict[str, float]:
        """Averages over data since the last `reset`; waits for the device."""
        return self.monitor.averages()

    def reset(self) -> None:
        """Starts new averages."""
        self.sums.zero_()

    def look(self) -> Failure | None:
        """Waits for the device and says whether a step has failed."""
        failure = self.failure()
        if failure is None:
            return None
        for state in self.optimizer.state.values():  # counters on the host couldn't be masked
            count = None if can_skip_on_device(self.optimizer) else state.get("step")
            if isinstance(count, Tensor) and count.device != self.loss.device:
                count -= failure.steps
        sites = dict.fromkeys(name for own in self.world.gather(failure.sites) for name in own)
        return replace(failure, sites=tuple(sites))

    def failure(self) -> Failure | None:
        """The first step that failed, if one has, and what was wrong in this stepper's own."""
        return self.monitor.look()

    @property
    def has_penalties(self) -> bool:
        """Whether any step had penalties so far."""
        return self.passes.has_penalties

    def seen(self) -> Seen:
        """What steps have shown of the pair; what comes after depends on it."""
        named = self.structure.parameters.items()
        moved = [name for name, parameter in named if id(parameter) in self.moved]
        return {"has_penalties": self.has_penalties, "moved": moved}

    def restore_seen(self, seen: Seen) -> None:
        """Takes in what the steps before had shown."""
        self.passes.has_penalties = seen["has_penalties"]
        self.moved |= {id(self.structure.parameters[name]) for name in seen["moved"]}

    def share(self, first: Stepper, sums: Tensor) -> None:
        """Has with another stepper one record of what has failed and moved; and sums elsewhere."""
        self.monitor.share(first.monitor, sums)
        self.sums, self.moved = sums, first.moved

    def recover(self, step: int) -> None:
        """Makes itself ready to go on at ``step``, after a failure."""
        self.monitor.recover()
        if self.state is not None:
            self.state.set_step(step)


def check_engine(engine: Engine, device: torch.device, world: World) -> None:
    """Refuses an engine that isn't known, or can't run there."""
    if engine not in ENGINES:
        raise ArgumentError("engine", f"one of {', '.join(ENGINES)}", repr(engine))
    if engine == "cudagraph" and (device.type != "cuda" or world.size > 1):
        where = device.type if world.size == 1 else "several processes"
        fixes = ["engine='compiled'", "device='cuda', where there is one"]
        raise ArgumentError("engine", "a pair on one CUDA device, for 'cudagraph'", where, fixes)


def choose(stepper: Stepper, batch: Callable[[], tuple[Tensor, ...]], steps: int) -> Engine:
    """The engine for so many steps on such a batch, by the time that an eager one takes.

    Leaves everything as it was. Only long trainings are measured at all.
    """
    if not isinstance(stepper.objective, Objective) or steps < WORTH_COMPILING / 0.2:
        return "eager"
    if not has_compiler(stepper.structure.device):
        return "eager"
    return "compiled" if steps * time_pass(stepper, batch()) > WORTH_COMPILING else "eager"


def time_pass(stepper: Stepper, batch: tuple[Tensor, ...]) -> float:
    """What a pass takes as in training, without its update."""
    seconds = []
    with (
        undoing(stepper.passes),
        in_mode(stepper.structure.modules, training=True),
        pyro.validation_enabled(is_validate=False),
    ):
        for _ in range(4):
            started = time.perf_counter()
            stepper.passes.run(*batch)
            synchronize(stepper.structure.device)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
