"""A training step but for its update: a function of tensors, which may be compiled.

A pass whose loss or gradient isn't finite changes nothing, and nor does any pass after it: what it
did is undone on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.poutine import Trace
from torch import Tensor

from pvae.devices import floats
from pvae.distributed import World
from pvae.engine.monitor import PARTS, Measured, Monitor
from pvae.engine.optimizers import Backup
from pvae.engine.precision import PRECISIONS, Precision, check_densities, mixed
from pvae.errors import ArgumentError, PairError, oxford
from pvae.internals import multiply, norms
from pvae.objectives import Objective, ObjectiveState
from pvae.pair import Structure
from pvae.pair.parameters import unconstrained
from pvae.sites import without_announcements

__all__ = ["PassResult", "Passes"]


class PassResult(NamedTuple):
    """What a pass gives.

    Attributes:
        ok: Whether it is good, and so may be followed by an update.
        measured: What the objective's state is to learn from, if anything.
        gradients: Gradients of the loss by the name of the parameter, clipped.
    """

    ok: Tensor
    measured: Tensor | None
    gradients: dict[str, Tensor]


@dataclass(eq=False)
class Passes:
    """Runs passes of a pair, and keeps track of what they change.

    Attributes:
        structure, objective, state, clip_norm, precision, per_datum, world, late: As of `Stepper`.
        monitor: Judges each pass.
        moving: The buffers that a pass changes, where it is known, as while one is recorded.
        has_penalties: Whether any pass had some so far.
        announced: Parameters, by identity, that a pass announces: the last, with ``late``; or set.
        value: What one of Pyro's objectives returned, a number or a tuple of them.
    """

    structure: Structure
    objective: PyroELBO
    state: ObjectiveState | None
    monitor: Monitor
    clip_norm: float | None
    precision: Precision
    per_datum: bool
    world: World
    late: Callable[[str, Tensor], None] | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            expected = f"one of {', '.join(PRECISIONS)}"
            raise ArgumentError("precision", expected, repr(self.precision))
        if self.precision == "bf16" and not isinstance(self.objective, Objective):
            kind = type(self.objective).__name__
            raise ArgumentError("precision", "an objective of pvae's with 'bf16'", kind)
        self.parameters, modules = self.structure.parameters, self.structure.modules
        self.buffers = [b for m in modules for b in m.buffers(recurse=False)]
        self.moving: list[Tensor] | None = None
        self.has_penalties, self._num_rows = False, 0
        self.announced: set[int] = set()
        self.value: object = None
        self._agreed: list[str] | None = None  # parameters with a gradient in any process

    def run(self, *batch: Tensor) -> PassResult:
        """A whole pass, by one process alone."""
        buffers = Backup(self.buffers if self.moving is None else self.moving)
        return self._judge(buffers, self.measure(*batch), self._num_rows)

    def run_shared(
        self, batch: tuple[Tensor, ...], measure: Callable[[tuple[Tensor, ...]], Measured]
    ) -> PassResult:
        """What `run` does, by all processes, each on its own rows, of which there may be none."""
        buffers, first = Backup(self.buffers), next(iter(self.parameters.values()))
        own = measure(batch) if batch else Measured(first.new_zeros(len(PARTS) - 1), {}, {})
        with torch.no_grad():
            gradients = self._complete(own.gradients)
            rows = self.structure.num_rows_of(batch) if batch else 0
            total, [parts, *means] = self.world.mean(rows, [own.parts, *gradients.values()])
        shared = Measured(parts, dict(zip(gradients, means, strict=True)), own.densities)
        return self._judge(buffers, shared, total)

    def measure(self, *batch: Tensor) -> Measured:
        """The loss, its parts and its gradients, without judging them."""
        if isinstance(self.objective, Objective):
            measured = self._measure(self.objective, batch)
        else:
            measured = self._measure_pyro(self.objective, batch)
        if sparse := [name for name, g in measured.gradients.items() if g.is_sparse]:
            actual = f"sparse ones, of {', '.join(sparse)}"
            fixes = ["nn.Embedding(..., sparse=False)"]
            raise ArgumentError("pair", "dense gradients", actual, fixes)
        return measured

    def _measure(self, objective: Objective, batch: tuple[Tensor, ...]) -> Measured:
        assert self.state is not None  # noqa: S101
        is_narrow = self.precision == "bf16"
        narrow = mixed(self.structure) if is_narrow else contextlib.nullcontext()
        with without_announcements(), narrow:
            terms = objective.compute_terms(self.structure, batch)
        if self.late is not None:
            traces = [(p.guide_trace, p.model_trace) for p in terms.passes]
            self._note({"guide": [g for g, _ in traces], "model": [m for _, m in traces]})
        if is_narrow:
            check_densities(terms)
        self._num_rows = terms.num_rows
        self.has_penalties = self.has_penalties or terms.has_penalties
        divisor = self.structure.divisor(terms.num_rows)
        loss = objective.surrogate(terms, self.state)
        loss = loss / divisor if self.per_datum else loss
        gradients = self._differentiate(loss)
        with torch.no_grad():
            elbo, likelihood = terms.elbo_per_datum()
            beside = terms.scaled("penalty") + terms.scaled("training")
            penalty = -beside.mean() / divisor
            parts = torch.stack([loss.detach(), elbo, likelihood, likelihood - elbo, penalty])
            densities = {
                (name, program): density.detach()
                for name, site in terms.sites.items()
                for program, density in (("model", site.scaled_log_p), ("guide", site.scaled_log_q))
                if density is not None
            }
        return Measured(parts, gradients, densities)

    def _measure_pyro(self, objective: PyroELBO, batch: tuple[Tensor, ...]) -> Measured:
        """The same of one of Pyro's objectives, of which the loss alone is known.

        Some add their gradients to those that parameters have, which are none before a step.
        """
        model, guide = self.structure.model, self.structure.guide
        self._num_rows = self.structure.subsample_size or self.structure.num_rows_of(batch)
        divisor = self.structure.divisor(self._num_rows) if self.per_datum else 1
        with poutine.trace(param_only=True) as capture:
            self.value = objective.loss_and_grads(model, guide, *batch)
        if self.late is not None:
            self._note({"guide": [capture.trace]})
        loss = self._one_loss(objective, self.value) / divisor
        given = {n: p.grad for n, p in self.parameters.items()}
        gradients = {n: g.div_(divisor) for n, g in given.items() if g is not None}
        device = self.structure.device
        parts = torch.full((len(PARTS) - 1,), torch.nan, dtype=floats(device), device=device)
        parts[0] = loss
        return Measured(parts, gradients, {})

    def _one_loss(self, objective: PyroELBO, value: object) -> Tensor:
        """What is one number of a loss: the sum of several, which only Pyro's own interface has."""
        several = value if isinstance(value, tuple) and self.late is not None else (value,)
        if not all(isinstance(one, (float, int, Tensor)) for one in several):
            actual = f"{type(objective).__name__}, which returns a {type(value).__name__}"
            fixes = ["pvae.SVI or pyro.infer.SVI with it, and a loop of your own"]
            raise ArgumentError("objective", "one that returns one loss", actual, fixes)
        tensors = [torch.as_tensor(one).detach() for one in several]
        return torch.stack([one.to(floats(one.device)) for one in tensors]).sum()

    def _note(self, traces: Mapping[str, Iterable[Trace]]) -> None:
        """Takes up the parameters that programs announced and that weren't known."""
        assert self.late is not None  # noqa: S101
        known, self.announced = {*map(id, self.parameters.values())}, set()
        for side, own in traces.items():
            for site in (site for trace in own for site in trace.nodes.values()):
                if site["type"] != "param":
                    continue
                parameter = unconstrained(site["value"])
                self.announced.add(id(parameter))
                if id(parameter) not in known and parameter.requires_grad:
                    known.add(id(parameter))
                    self.structure.take_up(site["name"], parameter, side)
                    self.late(site["name"], parameter)

    def _differentiate(self, loss: Tensor) -> dict[str, Tensor]:
        """Gradients of the parameters that have one, by name."""
        asked = {name: p for name, p in self.parameters.items() if p.requires_grad}
        if not loss.requires_grad or not asked:
            return {}
        gradients = torch.autograd.grad(loss, [*asked.values()], allow_unused=True)
        named = zip(asked, gradients, strict=True)
        return {name: g for name, g in named if g is not None}

    def _complete(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the same parameters in every process, zero where it has none."""
        if self._agreed is None:
            anywhere = {name for names in self.world.gather([*gradients]) for name in names}
            self._agreed = [name for name in self.parameters if name in anywhere]
        if late := gradients.keys() - self._agreed:
            where = f"gradient of {oxford(sorted(late)[:3])}"
            expected = "the same parameters in each step of several processes"
            raise PairError(where, expected, "one more than in the first step")
        own = {n: torch.zeros_like(self.parameters[n]) for n in self._agreed if n not in gradients}
        own |= gradients
        return {name: own[name] for name in self._agreed}

    @torch.no_grad()
    def _judge(self, buffers: Backup, measured: Measured, num_rows: int | Tensor) -> PassResult:
        """Says whether a pass is good, undoes it if not, clips its gradients, adds to the sums."""
        gradients, is_recorded = measured.gradients, self.moving is not None
        is_trained = self.late is None or any(p.requires_grad for p in self.parameters.values())
        if not gradients and is_trained:
            fixes = [
                "does the guide sample from a distribution made of its parameters?",
                "pyro.clear_param_store(), if pyro.module had other modules by these names",
            ]
            expected = "a loss that depends on its parameters"
            raise ArgumentError("pair", expected, "no parameter with a gradient", fixes)
        if not gradients:  # as where nothing is to be trained
            each = measured.parts.new_zeros(0)
        elif is_recorded:  # one by one, for a compiler to fuse
            each = torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()])
        else:
            each = norms([*gradients.values()])
        norm = torch.linalg.vector_norm(each)
        ok = self.monitor.judge(measured, num_rows, each, norm)
        buffers.restore_unless(ok, may_wait=not is_recorded)
        if self.clip_norm is not None and gradients:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            clipped = multiply([*gradients.values()], factor)
            gradients = dict(zip(gradients, clipped, strict=True))
        return PassResult(ok, None if self.state is None else self.state.measured, gradients)

    def changing(self) -> list[Tensor]:
        """What a pass may change."""
        of_state = [] if self.state is None else list(self.state.tensors().values())
        return [*self.buffers, *of_state, *self.monitor.tensors()]
