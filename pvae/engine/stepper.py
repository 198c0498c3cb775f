"""One training step, on the device alone.

A step whose loss or gradient isn't finite changes nothing, and nor does any step after it: the
update is masked on the device. The host finds out when it looks, every so often.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pvae import randomness
from pvae import terms as t
from pvae.distributed import World
from pvae.engine.captured import Captured, Fixed
from pvae.engine.compiled import UncompilableError, compile_function
from pvae.engine.optimizers import Backup, is_fused, update
from pvae.engine.precision import PRECISIONS, Precision, check_densities, mixed
from pvae.errors import ArgumentError, PairError, PvaeWarning, oxford
from pvae.objectives import Objective, ObjectiveState
from pvae.sites import without_announcements

__all__ = ["ENGINES", "PARTS", "Engine", "Failure", "Stepper"]

Engine = Literal["eager", "compiled", "cudagraph"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

PARTS = ("loss", "elbo", "log_likelihood", "rate", "penalty", "grad_norm")
"""What is summed over an epoch: per datum and in nats, but for the norm of the gradient."""

MAX_SHAPES = 4
"""Shapes of a batch that are compiled; others run as Python."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Of the norm of the gradient's change against the norm of the gradient."""


@dataclass(frozen=True)
class Failure:
    """The first step that wasn't finite: its number, and the sites or parameters at fault."""

    step: int
    sites: tuple[str, ...]
    parameters: tuple[str, ...]


class Stepper:
    """Runs training steps of a pair and keeps sums of what they measured on the device.

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
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        objective: PyroELBO,
        structure: t.Structure,
        optimizer: torch.optim.Optimizer,
        state: ObjectiveState | None,
        clip_norm: float | None,
        engine: Engine = "eager",
        *,
        precision: Precision = "full",
        per_datum: bool = True,
        world: World | None = None,
    ) -> None:
        self.model, self.guide, self.objective = model, guide, objective
        self.structure, self.optimizer, self.state = structure, optimizer, state
        self.clip_norm, self.per_datum = clip_norm, per_datum
        self.world = world or World()
        if precision not in PRECISIONS:
            raise ArgumentError("precision", f"one of {', '.join(PRECISIONS)}", repr(precision))
        if precision == "bf16" and not isinstance(objective, Objective):
            raise ArgumentError(
                "precision", "an objective of pvae's with 'bf16'", type(objective).__name__
            )
        self.engine = engine
        self.precision = precision
        self.parameters = list(structure.parameters.values())
        device = structure.device
        self.sums = torch.zeros(len(PARTS) + 1, dtype=torch.float64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.failed = torch.zeros((), dtype=torch.bool, device=device)
        self.failed_at = torch.full((), -1, dtype=torch.int64, device=device)
        self._good = torch.ones((), dtype=torch.bool, device=device)
        self.bad_sites = self.bad_parameters = self.failed.new_zeros(0)
        self._suspects: list[tuple[str, Tensor]] = []
        """Sites of a pass, and the log densities that may not be finite."""
        self.site_names: tuple[str, ...] = ()
        self.with_grad: list[str] = []
        """Names of parameters with a gradient, in the pass of this process."""
        self._agreed: list[str] | None = None
        """The same in any process, once there has been a step of several."""
        self.has_penalties = self.seen = False
        self.buffers = [b for m in structure.modules for b in m.buffers(recurse=False)]
        self._moving: list[Tensor] | None = None
        """Buffers that a pass changes, while one is traced."""
        self._compiled: dict[Any, Callable[..., Sequence[Tensor]]] = {}
        self._captured: Captured | None = None

    @property
    def engine(self) -> Engine:
        """How a step runs."""
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        if engine not in ENGINES:
            raise ArgumentError("engine", f"one of {', '.join(ENGINES)}", repr(engine))
        if engine == "cudagraph" and (self.structure.device.type != "cuda" or self.world.size > 1):
            where = self.structure.device.type if self.world.size == 1 else "several processes"
            raise ArgumentError(
                "engine",
                "a pair on one CUDA device, for 'cudagraph'",
                where,
                ["engine='compiled'", "device='cuda', where there is one"],
            )
        self._engine: Engine = engine

    def __call__(self, batch: tuple[Tensor, ...], step: int) -> None:
        """Runs one step on a batch; ``step`` is its number, for a `Failure` to name.

        Of several processes each has its own rows of the batch; one without rows has an empty
        tuple, and takes part.
        """
        self.number.fill_(step)
        if self.world.size > 1:
            ok, *rest = self._shared_pass(batch)
            self._update(ok, rest)
        elif self.engine == "cudagraph":
            ok, *rest = self._replay(batch)
        else:
            ok, *rest = self._runner(batch)(*batch)
            self._update(ok, rest)
        if self.state is not None:
            self.state.seen = rest[0] if self.seen else None
            kept = Backup(list(self.state.tensors().values()))
            self.state.advance()
            kept.restore_unless(ok)

    def _update(self, ok: Tensor, rest: Sequence[Tensor]) -> None:
        """The optimiser's step, where the pass is good."""
        found = dict(zip(self.differentiated, rest[self.seen :], strict=True))
        for name, parameter in self.structure.parameters.items():
            parameter.grad = found.get(name)
        update(self.optimizer, ok, self.parameters)

    def averages(self) -> dict[str, float]:
        """Averages over data since the last `reset`; waits for the device."""
        *sums, rows = self.sums.tolist()
        return {name: total / max(rows, 1.0) for name, total in zip(PARTS, sums, strict=True)}

    def recover(self, step: int) -> None:
        """Makes itself ready to go on at ``step``, after a failure."""
        self.failed.zero_()
        self.failed_at.fill_(-1)
        if self.state is not None:
            self.state.set_step(step)

    def reset(self) -> None:
        """Starts new averages."""
        self.sums.zero_()

    def look(self, step: int) -> Failure | None:
        """Waits for the device and says whether a step has failed; ``step`` is the last one."""
        if not bool(self.failed):
            return None
        at = int(self.failed_at)
        for state in self.optimizer.state.values():  # counters on the host couldn't be masked
            count = None if is_fused(self.optimizer) else state.get("step")
            if isinstance(count, Tensor) and count.device != self.failed.device:
                count -= step - at + 1
        names = zip(self.site_names, self.bad_sites.tolist(), strict=False)
        sites = self.world.gather([name for name, bad in names if bad])
        parameters = zip(self.differentiated, self.bad_parameters.tolist(), strict=False)
        return Failure(
            at,
            tuple(dict.fromkeys(name for own in sites for name in own)),
            tuple(name for name, bad in parameters if bad),
        )

    @property
    def differentiated(self) -> list[str]:
        """Names of the parameters that a step has gradients of."""
        return self.with_grad if self._agreed is None else self._agreed

    # A step but for its update: a function of tensors, which may be compiled

    def run_pass(self, *batch: Tensor) -> list[Tensor]:
        """A step but for its update.

        Returns:
            Whether it is good, what the objective's state has seen, if any, and the gradients.
        """
        buffers = Backup(self.buffers if self._moving is None else self._moving)
        measured, rows, gradients = self._measure(batch)
        return self._judge(buffers, measured, rows, gradients)

    def local_pass(self, *batch: Tensor) -> list[Tensor]:
        """What a process has to do by itself: what is measured, as one tensor, and gradients."""
        measured, _, gradients = self._measure(batch)
        self._refuse_sparse(gradients)
        with torch.no_grad():
            self._note_sites()
        return [torch.stack(measured), *gradients]

    def _shared_pass(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """What `run_pass` does, by all processes together, each on its own rows."""
        buffers, first = Backup(self.buffers), self.parameters[0]
        measured, gradients = first.new_zeros(len(PARTS) - 1), dict[str, Tensor]()
        if batch:
            measured, *own = self._runner(batch)(*batch)
            gradients = dict(zip(self.with_grad, own, strict=True))
        if self._agreed is None:
            anywhere = {name for names in self.world.gather([*gradients]) for name in names}
            self._agreed = [name for name in self.structure.parameters if name in anywhere]
        if late := gradients.keys() - self._agreed:
            raise PairError(
                f"gradient of {oxford(sorted(late)[:3])}",
                "the same parameters in each step of several processes",
                "one more than in the first step",
            )
        parameters = [self.structure.parameters[name] for name in self._agreed]
        names = zip(self._agreed, parameters, strict=True)
        own = [gradients[n] if n in gradients else torch.zeros_like(p) for n, p in names]
        with torch.no_grad():
            rows = len(batch[0]) if batch else 0
            total, [measured, *shared] = self.world.mean(rows, [measured, *own])
        return self._judge(buffers, list(measured), total, shared)

    def _judge(
        self, buffers: Backup, measured: list[Tensor], rows: int | Tensor, gradients: list[Tensor]
    ) -> list[Tensor]:
        """Says whether a step is good, clips its gradients, and adds to the sums."""
        with torch.no_grad():
            norms = self._gradient_norms(gradients)
            norm = torch.linalg.vector_norm(norms)
            values = torch.stack([*measured, norm]).to(torch.float64)
            row = torch.cat([values, values.new_ones(1)]) * rows
            self.loss.copy_(values[0])
            ok = self._good if self._is_good(values) else self._mask(buffers, values, row, norms)
            if ok is self._good:
                self.sums.add_(row)
            if self.clip_norm is not None:
                factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
                gradients = list(torch._foreach_mul(gradients, factor))
        seen = None if self.state is None else self.state.seen
        self.seen = seen is not None
        return [ok, *([] if seen is None else [seen]), *gradients]

    def _is_good(self, values: Tensor) -> bool:
        """Whether there is nothing to mask; False also where that may not be looked at."""
        if self.engine != "eager" or values.device.type != "cpu" or bool(self.failed):
            return False
        return bool((values[0] + values[-1]).isfinite())  # of the loss, and of the gradient's norm

    def _mask(self, buffers: Backup, values: Tensor, row: Tensor, norms: Tensor) -> Tensor:
        """Whether the step is good, as a tensor, by which what it did is undone where it isn't."""
        finite = values[0].isfinite() & values[-1].isfinite()
        ok = finite & ~self.failed
        self._note_sites()
        self.bad_parameters = self._first_bad(self.bad_parameters, ~norms.isfinite())
        self.failed_at.copy_(torch.where(finite | self.failed, self.failed_at, self.number))
        buffers.restore_unless(ok, may_wait=self._moving is None)
        self.failed.copy_(~ok)
        self.sums.add_(torch.where(ok, row, torch.zeros_like(row)))
        return ok

    def _measure(self, batch: tuple[Tensor, ...]) -> tuple[list[Tensor], int, list[Tensor]]:
        """What is measured per datum, of how many, and the gradients of the loss."""
        if not isinstance(self.objective, Objective):
            return self._measure_pyro(batch)
        assert self.state is not None  # noqa: S101
        narrow = mixed(self.structure) if self.precision == "bf16" else contextlib.nullcontext()
        with without_announcements(), narrow:
            terms = self.objective.compute_terms(self.structure, batch)
        if self.precision == "bf16":
            check_densities(terms)
        divisor = self.structure.divisor(terms.num_rows)
        loss = self.objective.surrogate(terms, self.state)
        loss = loss / divisor if self.per_datum else loss
        gradients = self._differentiate(loss)
        with torch.no_grad():
            self._suspects = [
                (name, part.detach())
                for name, site in terms.sites.items()
                for part in (site.scaled_log_p, site.scaled_log_q)
                if part is not None
            ]
            elbo, likelihood = terms.elbo_per_datum()
            self.has_penalties = terms.has_penalties
            penalty = -terms.scaled("penalty").mean() / divisor
            parts = [loss.detach(), elbo, likelihood, likelihood - elbo, penalty]
            return parts, terms.num_rows, gradients

    def _measure_pyro(self, batch: tuple[Tensor, ...]) -> tuple[list[Tensor], int, list[Tensor]]:
        """The same of one of Pyro's objectives, of which the loss alone is known."""
        rows = self.structure.subsample_size or len(batch[0])
        divisor = self.structure.divisor(rows) if self.per_datum else 1
        if hasattr(self.objective, "differentiable_loss"):
            loss = self.objective.differentiable_loss(self.model, self.guide, *batch) / divisor
            gradients = self._differentiate(loss)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            value = self.objective.loss_and_grads(self.model, self.guide, *batch)
            if not isinstance(value, (float, int, Tensor)):
                raise ArgumentError(
                    "objective",
                    "one that returns one loss",
                    f"{type(self.objective).__name__}, which returns a {type(value).__name__}",
                    ["pyro.infer.SVI with it, and a loop of your own"],
                )
            loss = torch.as_tensor(value, dtype=torch.float64) / divisor
            found = {n: p.grad for n, p in self.structure.parameters.items() if p.grad is not None}
            self.with_grad, gradients = list(found), list(found.values())
            if gradients:
                torch._foreach_div_(gradients, divisor)
        loss = loss.detach().to(self.sums.device)
        unknown = torch.full_like(loss, float("nan"))
        return [loss, unknown, unknown, unknown, unknown], rows, gradients

    def _differentiate(self, loss: Tensor) -> list[Tensor]:
        """Gradients of the parameters that have one."""
        found: Sequence[Tensor | None] = [None] * len(self.parameters)
        if loss.requires_grad and self.parameters:
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        names = self.structure.parameters
        self.with_grad = [n for n, g in zip(names, found, strict=False) if g is not None]
        return [g for g in found if g is not None]

    def _gradient_norms(self, gradients: list[Tensor]) -> Tensor:
        """The norm of each parameter's gradient."""
        if not gradients:
            raise ArgumentError(
                "pair",
                "a loss that depends on its parameters",
                "no parameter with a gradient",
                [
                    "does the guide sample from a distribution made of its parameters?",
                    "pyro.clear_param_store(), if pyro.module had other modules by these names",
                ],
            )
        self._refuse_sparse(gradients)
        if self._moving is not None:  # in a graph, which fuses these
            return torch.stack([torch.linalg.vector_norm(g) for g in gradients])
        return torch.stack(torch._foreach_norm(gradients))

    def _refuse_sparse(self, gradients: list[Tensor]) -> None:
        if any(g.is_sparse for g in gradients):
            sparse = [n for n, g in zip(self.with_grad, gradients, strict=False) if g.is_sparse]
            raise ArgumentError(
                "pair",
                "dense gradients",
                f"sparse ones, of {', '.join(sparse)}",
                ["nn.Embedding(..., sparse=False)"],
            )

    def _note_sites(self) -> None:
        """Which sites of the last pass aren't finite."""
        if not self._suspects:
            return
        self.site_names = tuple(name for name, _ in self._suspects)
        sums = torch.stack([part.sum() for _, part in self._suspects])
        self.bad_sites = self._first_bad(self.bad_sites, ~sums.isfinite())
        self._suspects = []

    def _first_bad(self, known: Tensor, bad: Tensor) -> Tensor:
        """What was bad at the first failure, once there was one; written where it is known."""
        if known.shape != bad.shape:
            return bad
        return known.copy_(torch.where(self.failed, known, bad))

    # Compiling it

    def _runner(self, batch: tuple[Tensor, ...]) -> Callable[..., Sequence[Tensor]]:
        """The pass (of several processes, this one's part), or its compiled graph."""
        eager = self.run_pass if self.world.size == 1 else self.local_pass
        if self.engine != "compiled":
            return eager
        shapes = self._kind(batch)
        if shapes not in self._compiled:
            if len(self._compiled) >= MAX_SHAPES:
                return eager
            try:
                self._compiled[shapes] = self._compile(eager, batch)
            except UncompilableError as error:
                self._give_up("compiled", error)
                return eager
        return self._compiled[shapes]

    def _kind(self, batch: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """What a graph is for: modes of modules, and shapes."""
        modes = tuple(m.training for m in self.structure.modules)
        return (modes, *((x.shape, x.dtype) for x in batch))

    def _give_up(self, what: str, error: UncompilableError) -> None:
        warnings.warn(
            f"Steps run as Python, not {what}: {error}. The numbers are the same.",
            PvaeWarning,
            stacklevel=5,
        )
        self.engine = "eager"

    def _compile(
        self, eager: Callable[..., Sequence[Tensor]], batch: tuple[Tensor, ...]
    ) -> Callable[..., Sequence[Tensor]]:
        """The pass as a graph, which has given the same numbers on this batch."""
        if not isinstance(self.objective, Objective):
            raise UncompilableError(f"{type(self.objective).__name__} is one of Pyro's objectives")
        with randomness.forked():
            start, backup = randomness.get_state(), Backup(self.changing())
            placed = self._placed_buffers()

            def rewind() -> None:
                randomness.set_state(start)
                for (module, name), buffer in placed.items():
                    module._buffers[name] = buffer
                backup.restore()
                if self.state is not None:
                    self.state.seen = None

            buffers = Backup(self.buffers)
            expected = self._numbers(eager, batch)
            moving, now = buffers.changed(), self._placed_buffers()
            rewind()
            rebound = [name for (_, name), b in now.items() if placed.get((_, name)) is not b]
            if rebound:
                raise UncompilableError(f"buffer '{rebound[0]}' is a new tensor after each step")
            self._moving = moving
            try:
                compiled = compile_function(eager, batch)
            finally:
                self._moving = None
                rewind()
            try:
                found = self._numbers(compiled, batch)
            except Exception as error:
                raise UncompilableError(f"the graph fails with {error}") from error
            finally:
                rewind()
        self._compare(expected, found)
        return compiled

    def _compare(self, expected: list[Tensor], found: list[Tensor]) -> None:
        """Refuses a graph whose loss or gradients aren't the eager ones."""
        worst = _difference(expected, found)
        dtype = torch.bfloat16 if self.precision == "bf16" else self.structure.dtype
        if not worst <= _TOLERANCE.get(dtype, 5e-2):
            raise UncompilableError(f"loss or gradient differ from the eager ones, by {worst:.2g}")

    def changing(self) -> list[Tensor]:
        """What a pass may change."""
        of_state = [] if self.state is None else list(self.state.tensors().values())
        return [*self.buffers, *of_state, self.sums, self.loss, self.failed, self.failed_at]

    def _placed_buffers(self) -> dict[tuple[Any, str], Tensor | None]:
        return {(m, n): b for m in self.structure.modules for n, b in m._buffers.items()}

    def _numbers(
        self, function: Callable[..., Sequence[Tensor]], batch: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """The loss and the gradients that a pass gives."""
        result = function(*batch)
        if self.world.size > 1:
            measured, *gradients = result
            return [measured[0].clone(), *(x.detach().clone() for x in gradients)]
        return [self.loss.clone(), *(x.detach().clone() for x in result[1 + self.seen :])]

    # Capturing it

    def _replay(self, batch: tuple[Tensor, ...]) -> Sequence[Tensor]:
        """A whole step by a CUDA graph."""
        if self._captured is None:
            self._fixed = Fixed(self.optimizer, self.structure.device)
            self._captured = Captured(self._whole, self._check_capture)
        self._fixed.set_rates()
        try:
            if not isinstance(self.objective, Objective):
                name = type(self.objective).__name__
                raise UncompilableError(f"{name} is one of Pyro's objectives")
            return self._captured((self._kind(batch), self._fixed.kind), batch)
        except UncompilableError as error:
            self._give_up("captured", error)
            return self._whole(*batch)

    def _whole(self, *batch: Tensor) -> list[Tensor]:
        """The pass and the update."""
        ok, *rest = self.run_pass(*batch)
        with self._fixed.recording():
            self._update(ok, rest)
        return [ok, *rest]

    def _check_capture(
        self, replay: Callable[..., Sequence[Tensor]], batch: tuple[Tensor, ...]
    ) -> None:
        """Compares a replay with an eager pass, and undoes both."""
        with randomness.forked():
            start = randomness.get_state()
            backup = Backup([*self.parameters, *self._fixed.tensors, *self.changing()])
            found = []
            for function in (self.run_pass, replay):
                found.append(self._numbers(function, batch))
                randomness.set_state(start)
                backup.restore()
                if self.state is not None:
                    self.state.seen = None
        self._compare(*found)


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
