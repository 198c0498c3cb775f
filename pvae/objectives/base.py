"""The abstract objective, its state, and what objectives refuse."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import pyro
import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor, nn

from pvae import terms as t
from pvae.errors import check_int, check_number
from pvae.objectives.refusals import REFUSALS, Need
from pvae.pair import Pair
from pvae.schedules import Constant, Schedule, as_schedule

__all__ = ["MovingAverage", "Objective", "ObjectiveState", "as_weight"]


class ObjectiveState(nn.Module):
    """What an objective keeps during one training: the step, and the value of its schedules there.

    Schedules are evaluated on the host and kept as tensors, so that nothing has to be traced or
    compiled anew when they change. Subclasses keep more, in buffers and parameters, which a
    checkpoint saves: `surrogate` leaves one tensor that it has measured in ``seen``, and `advance`,
    which training steps alone call, learns from it.

    Arguments:
        schedules: By name, lengths in steps.
        structure: What the pair is made of.
        num_data: Size of the data set; None if it isn't known.
    """

    def __init__(
        self, schedules: dict[str, Schedule], structure: t.Structure, num_data: int | None = None
    ) -> None:
        super().__init__()
        self.schedules, self.step, self.num_data = schedules, 0, num_data
        self.seen: Tensor | None = None
        self.like = torch.zeros((), dtype=structure.dtype, device=structure.device)
        for name in schedules:
            self.register_buffer(name, self.like.clone())
        self.set_step(0)

    def resolve(self, schedules: dict[str, Schedule], steps_per_epoch: int, total: int) -> None:
        """Takes schedules anew, for a training of another length."""
        self.schedules = {n: s.resolve(steps_per_epoch, total) for n, s in schedules.items()}
        self.set_step(self.step)

    def set_step(self, step: int) -> None:
        """Moves to a training step."""
        self.step = step
        for name, schedule in self.schedules.items():
            buffer: Tensor = getattr(self, name)
            buffer.fill_(schedule(step))

    def advance(self) -> None:
        """Moves to the next training step."""
        self.set_step(self.step + 1)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has of it beside the step."""
        return {k: v for k, v in self.state_dict().items() if k not in self.schedules}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Puts it where it was when `tensors` were taken."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])
        self.set_step(step)

    def report(self) -> dict[str, float]:
        """What the history has of it, beside schedules."""
        return {}

    def now(self, name: str) -> Tensor:
        """A schedule's value at this step, which later steps don't change."""
        return self.get_buffer(name).clone()


class MovingAverage(ObjectiveState):
    """A state with the moving average of a number that each step measures.

    Arguments:
        decay: What an older value counts, a step later.
        base: As in `ObjectiveState`.
    """

    average: Tensor
    started: Tensor

    def __init__(self, decay: float, *base: Any) -> None:
        super().__init__(*base)
        self.decay = decay
        for name in ("average", "started"):
            self.register_buffer(name, self.like.clone())

    def averaged(self, value: Tensor) -> Tensor:
        """The average with a new value in it."""
        mixed = self.decay * self.average + (1 - self.decay) * value
        return torch.where(self.started > 0, mixed, value)

    def advance(self) -> None:
        """Takes in what the step has measured, if that is finite."""
        if self.seen is not None:
            average = self.averaged(self.seen)
            ok = average.isfinite()
            self.average.copy_(torch.where(ok, average, self.average))
            self.started.copy_(torch.where(ok, 1.0, self.started))
            self.seen = None
        super().advance()


class Objective(PyroELBO):
    """The abstract objective over terms. To write one, define `surrogate`, and what it `needs`.

    Needs are named after what they refuse:

    - ``"density"``: local latents with a point-mass guide, improper priors;
    - ``"gradient"``: draws that can't be reparametrised;
    - ``"local"``: sites outside the data plate;
    - ``"own draws"``: latents of data that are drawn outside the data plate, all together;
    - ``"unscaled"``: ``poutine.scale``, where a weight isn't a sum of log densities;
    - ``"split"``: data and latents summed out together, so that no rate is known.

    Attributes:
        bound: ``"lower"``, ``"upper"``, or ``"none"``: what the value is of the evidence.
        couples_data: Whether the loss of a batch isn't the mean of its data's, so that several
            processes can't compute it in parts.
        estimator: How its gradient is estimated.
        source: Paper, year, URL.

    Arguments:
        num_particles: K, draws from the guide for each datum.
        penalty_weight: A factor on the pair's penalties, a number or a schedule.
        vectorize_particles: Whether they go through the networks at once; None to find out.
        plate: Name of the data plate, where the batch's length doesn't tell.
    """

    needs: tuple[Need, ...] = ()
    bound: Literal["lower", "upper", "none"] = "lower"
    couples_data = False
    estimator = "pathwise"
    source = ""
    pass_options: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        num_particles: int = 1,
        *,
        penalty_weight: float | Schedule = 1.0,
        vectorize_particles: bool | None = None,
        plate: str | None = None,
    ) -> None:
        super().__init__(num_particles=check_int("num_particles", num_particles))
        self.penalty_weight = as_weight("penalty_weight", penalty_weight)
        self.vectorize_particles = vectorize_particles
        self.plate = plate
        self._runs: dict[tuple[Any, Any], Any] = {}

    def __setattr__(self, name: str, value: object) -> None:
        if "_runs" in self.__dict__:
            raise AttributeError(f"an objective can't be changed; make a new one with {name}=...")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        config = []
        for name, parameter in _arguments(type(self)).items():
            value, default = self._shown(name), parameter.default
            if isinstance(value, Schedule) and isinstance(default, (int, float)):
                default = Constant(default)
            if value != default:
                config.append(f"{name}={_written(value)}")
        return f"{type(self).__name__}({', '.join(config)})"

    def _shown(self, name: str) -> object:
        """What was given for an argument."""
        return getattr(self, name)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Schedules by name."""
        return {"penalty_weight": self.penalty_weight}

    @property
    def refuses_batches(self) -> bool:
        """Whether a pair may be refused for what only a batch shows, so that `fit` tries one."""
        return True

    def check(self, structure: t.Structure) -> None:
        """Refuses a pair that this objective can't be used with, and says why."""
        for need in self.needs:
            REFUSALS[need](type(self).__name__, structure)

    @abstractmethod
    def surrogate(self, terms: t.Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""

    def make_state(
        self,
        structure: t.Structure,
        num_data: int | None = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
    ) -> ObjectiveState:
        """The state for one training; without lengths, for schedules that are in steps."""
        schedules = self.schedules
        if steps_per_epoch is not None and total_steps is not None:
            schedules = {
                name: s.resolve(steps_per_epoch, total_steps) for name, s in schedules.items()
            }
        return self.new_state(schedules, structure, num_data)

    def new_state(
        self, schedules: dict[str, Schedule], structure: t.Structure, num_data: int | None
    ) -> ObjectiveState:
        """A state of the kind that this objective has."""
        return ObjectiveState(schedules, structure, num_data)

    def compute_terms(
        self,
        structure: t.Structure,
        batch: tuple[Tensor, ...],
    ) -> t.Terms:
        """The terms that this objective needs."""
        return t.compute(
            structure,
            batch,
            num_particles=self.num_particles,
            vectorize=self.vectorize_particles,
            **self.pass_options,
        )

    def value_at(self, name: str, state: ObjectiveState) -> Tensor | float:
        """A schedule's value; the number 1, where it is that, which costs nothing."""
        return 1.0 if getattr(self, name) == Constant(1.0) else state.now(name)

    def total(self, terms: t.Terms, state: ObjectiveState, local: Tensor) -> Tensor:
        """The plate-scaled sum of what each datum has, ``(N,)``, and of global sites; a scalar.

        The pair's penalties are subtracted.
        """
        scale = terms.data_scale
        outside = (terms.global_log_p - terms.global_log_q).mean()
        return scale * local.sum() + outside + self.penalty(terms, state)

    def penalty(self, terms: t.Terms, state: ObjectiveState) -> Tensor:
        """What the pair's penalties add, plate-scaled, a scalar.

        Where draws have no gradient, what penalties have of them comes by the score function, with
        the other particles as the baseline: those that are the same for all draws get no noise.
        """
        each = terms.scaled("penalty")
        if terms.has_penalties and self.pass_options.get("detach"):
            signal, k = each.detach(), len(each)
            if k > 1:
                signal = signal - (signal.sum() - signal) / (k - 1)
            score = signal * terms.log_q.sum(1)
            each = each + score - score.detach()
        return self.value_at("penalty_weight", state) * each.mean()

    def total_of_mean(self, terms: t.Terms, state: ObjectiveState, mean: Tensor) -> Tensor:
        """The same of a mean over data, a scalar."""
        return self.total(terms, state, mean.expand(terms.num_rows))

    # What Pyro's SVI, and the objective as a module, call

    def differentiable_loss(self, model: Any, guide: Any, *batch: Any, **kwargs: Any) -> Tensor:
        """The plate-scaled loss as a scalar to differentiate.

        Schedules advance by one step when it is differentiated, and by nothing else.
        """
        run = self._run_for(model, guide, batch, kwargs)
        loss = self.surrogate(self.compute_terms(run.structure, batch), run.state)
        if loss.requires_grad:
            loss.register_hook(lambda _: run.state.advance())
        return loss

    def loss(self, model: Any, guide: Any, *batch: Any, **kwargs: Any) -> float:
        """The plate-scaled loss in nats; doesn't advance schedules."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *batch, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *batch: Any, **kwargs: Any) -> float:
        """The plate-scaled loss in nats; adds gradients, and so advances schedules."""
        loss = self.differentiable_loss(model, guide, *batch, **kwargs)
        loss.backward()
        return float(loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Traces of model and guide, scored, as Pyro's tools expect them."""
        guide_trace, model_trace = t.run_pair(*_bound(model, guide, kwargs), args)
        model_trace.compute_log_prob()
        guide_trace.compute_score_parts()
        return model_trace, guide_trace

    def _run_for(self, model: Any, guide: Any, batch: Any, kwargs: dict[str, Any]) -> _Run:
        """What is known of a pair outside `fit`, found out at its first batch."""
        programs = _bound(model, guide, kwargs)
        known = self._runs.get((model, guide))
        live = None if known is None else _live(known[0], model, guide)
        if known is None or live != {id(p) for p in known[0].parameters.values()}:
            structure = Pair(*programs, plate=self.plate).inspect(batch)
            self.check(structure)
            now = {id(p) for p in structure.parameters.values()}
            is_same = known is not None and bool(now & (live or set()))  # some frozen, or freed
            state = known[1] if known is not None and is_same else self.make_state(structure)
            self._runs[model, guide] = structure, state
        return _Run(programs, *self._runs[model, guide])


def _live(structure: t.Structure, model: Any, guide: Any) -> set[int]:
    """Trainable parameters that a pair has now, as far as it is known where they are."""
    roots = [p for p in (model, guide) if isinstance(p, nn.Module)]
    found = {id(p) for root in roots for p in root.parameters() if p.requires_grad}
    store = dict(pyro.get_param_store().named_parameters())
    stored = [store.get(name) for name in structure.parameters]
    return found | {id(p) for p in stored if p is not None and p.requires_grad}


@dataclass(frozen=True)
class _Run:
    """A pair outside `fit`: its programs with keyword arguments bound, structure and state."""

    programs: tuple[Callable[..., Any], Callable[..., Any]]
    structure: t.Structure
    state: ObjectiveState


def _arguments(kind: type) -> dict[str, inspect.Parameter]:
    """The arguments of an objective, with those that it passes on."""
    found: dict[str, inspect.Parameter] = {}
    for one in kind.__mro__:
        own = dict(inspect.signature(one).parameters)
        passes_on = own.pop("options", None) is not None
        found = {**own, **found}
        if not passes_on:
            break
    return {k: found[k] for k in (*inspect.signature(kind).parameters, *found) if k in found}


def _written(value: object) -> str:
    """A value as it would be given."""
    if isinstance(value, Constant):
        return repr(value.number)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def _bound(model: Any, guide: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    if not kwargs:
        return model, guide
    return functools.partial(model, **kwargs), functools.partial(guide, **kwargs)


def as_weight(name: str, value: float | Schedule) -> Schedule:
    """A weight of at least 0 as a schedule."""
    if not isinstance(value, Schedule):
        check_number(name, value, minimum=0)
    return as_schedule(name, value)
