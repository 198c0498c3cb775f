"""The abstract objectives: with one loss, and with one for the model and one for the guide."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from dataclasses import KW_ONLY, MISSING, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pyro.infer import ELBO as PyroELBO
from pyro.poutine import Trace
from torch import Tensor

from pvae.errors import ArgumentError, check_count, check_int, oxford, warn
from pvae.objectives.refusals import Need, check_needs
from pvae.objectives.settings import Weight, as_setting, hints, written
from pvae.objectives.state import ObjectiveState, Training
from pvae.pair import Pair, Structure, run_pair
from pvae.pair.home import moved
from pvae.schedules import Schedule
from pvae.terms import Terms, compute
from pvae.types import Program

__all__ = ["Objective", "PassOption", "TwoLosses"]

PassOption = Literal["per_dimension", "stop_guide", "detach", "share_globals"]
_Known = dict[tuple[Program, Program], tuple[Pair, ObjectiveState | None, set[int]]]
_REMEMBERED = "_remembered"  # of each pair in Pyro's own SVI: structure and state


@dataclass(frozen=True)
class Objective(PyroELBO):
    """The abstract objective: a frozen dataclass of its settings. To write one, define `surrogate`.

    Settings are fields, which give the constructor, the repr (what isn't the default) and
    equality. What a field accepts is said by its annotation, see `pvae.objectives.settings`. Where
    it is a schedule, `value_at` has its value at the training step.

    Attributes:
        needs: What a pair must have, of the table `pvae.objectives.refusals.NEEDS`.
        bound: ``"lower"``, ``"upper"``, or ``"none"``: what the value is of the evidence.
        couples_data: Whether the loss of a batch isn't the mean of its data's, so that several
            processes can't compute it in parts.
        estimator: How its gradient is estimated.
        pass_options: What is asked of `pvae.terms.compute`, of which these are arguments.

    Arguments:
        num_particles: K, draws from the guide for each datum.
        penalty_weight: A factor on the pair's penalties, a number or a schedule.
        vectorize_particles: Whether they go through the networks at once; None to find out.
        plate: Name of the data plate in Pyro's own ``SVI``, where the batch's length doesn't tell;
            elsewhere the pair says it.
        densities: Names of factors in the guide that are densities, such as a Jacobian's, likewise;
            ``()`` says that none is, and None leaves it to a warning where it matters.

    Example:
        >>> @dataclass(frozen=True)
        ... class Tempered(Objective):
        ...     temperature: float = 1.0
        ...
        ...     def surrogate(self, terms, state):
        ...         bound = terms.log_likelihood / self.temperature + terms.log_prior - terms.log_q
        ...         return -self.total(terms, state, bound.mean(0))
        >>> Tempered(temperature=0.5)
        Tempered(temperature=0.5)
    """

    needs: ClassVar[tuple[Need, ...]] = ()
    bound: ClassVar[Literal["lower", "upper", "none"]] = "lower"
    couples_data: ClassVar[bool] = False
    estimator: ClassVar[str] = "pathwise"
    pass_options: ClassVar[tuple[PassOption, ...]] = ()
    max_plate_nesting: ClassVar[float] = math.inf  # as Pyro's own have it when they are made

    num_particles: int = 1
    _: KW_ONLY
    penalty_weight: Weight = 1.0
    vectorize_particles: bool | None = None
    plate: str | None = None
    densities: str | tuple[str, ...] | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]  # else dataclass() makes another

    def __post_init__(self) -> None:
        annotations = hints(type(self))  # type: ignore[arg-type]  # of a class, which has a hash
        kept = {n: as_setting(n, v, annotations.get(n)) for n, v in self.__getstate__().items()}
        kept["num_particles"] = check_int("num_particles", self.num_particles)
        check_count("num_particles", self.num_draws, 1024)
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        given = {name: written(value) for name, value in self.__getstate__().items()}
        default = {name: written(getattr(type(self), name, MISSING)) for name in given}
        shown = [f"{name}={text}" for name, text in given.items() if text != default[name]]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != _REMEMBERED}

    @property
    def num_draws(self) -> int:
        """Draws from the guide for each datum, all together: K, or M K with M means of K."""
        return self.num_particles * getattr(self, "num_means", 1)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Those of its settings that are schedules."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Schedule)}

    @property
    def refuses_batches(self) -> bool:
        """Whether a pair may be refused for what only a batch shows, so that `fit` tries one."""
        return True

    def check(self, structure: Structure) -> None:
        """Refuses a pair that this objective can't be used with, and says why."""
        if self.plate is not None and self.plate not in structure.plates:
            expected = f"the pair's data plate, '{structure.plate}'"
            raise ArgumentError("plate", expected, repr(self.plate))
        if self.densities is not None and _names(self.densities) != structure.densities:
            expected = f"the pair's, {structure.densities!r}"
            fixes = [f"pvae.Pair(model, guide, densities={self.densities!r})"]
            raise ArgumentError("densities", expected, repr(self.densities), fixes)
        check_needs(type(self).__name__, structure, *self.needs)

    @abstractmethod
    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""

    def warn_of_factors(self, structure: Structure) -> None:
        """Warns of factors of the guide where it matters to the loss whether they are densities.

        That is under a logarithm of several draws; elsewhere both are in the loss alike.
        """
        terms, is_weighted = structure.training_terms, "unscaled" in self.needs
        if terms and is_weighted and self.num_draws > 1 and self.densities is None:
            warn(
                f"Factor {oxford(terms)} of the guide is taken for a term of the training, and for "
                f"no part of the weights. densities={terms!r} in {type(self).__name__} says that "
                "it is a density, such as a Jacobian's, and densities=() that it isn't."
            )

    def make_state(
        self,
        structure: Structure,
        num_data: int | None = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
    ) -> ObjectiveState:
        """The state for one training; without lengths, for schedules that are in steps."""
        schedules = self.schedules
        if steps_per_epoch is not None and total_steps is not None:
            lengths = steps_per_epoch, total_steps
            schedules = {name: s.resolve(*lengths) for name, s in schedules.items()}
        return self.new_state(Training(schedules, structure, num_data))

    def new_state(self, training: Training) -> ObjectiveState:
        """A state of the kind that this objective has."""
        return ObjectiveState(training)

    def compute_terms(self, structure: Structure, batch: tuple[Tensor, ...]) -> Terms:
        """The terms that this objective needs."""
        k, vectorize = self.num_draws, self.vectorize_particles
        options: dict[str, Any] = dict.fromkeys(self.pass_options, True)
        return compute(structure, batch, num_particles=k, vectorize=vectorize, **options)

    def value_at(self, name: str, state: ObjectiveState) -> Tensor | float:
        """A setting at this step: a schedule's value, which later steps don't change; a number."""
        scheduled = isinstance(getattr(self, name), Schedule)
        return state.get_buffer(name).clone() if scheduled else getattr(self, name)

    def total(self, terms: Terms, state: ObjectiveState, local: Tensor) -> Tensor:
        """The plate-scaled sum over data and global sites, less penalties and the like; a scalar.

        Arguments:
            terms: The terms.
            state: The objective's state.
            local: What each datum has, ``(N,)``, or the mean over data, a scalar.
        """
        local = local.expand(terms.num_rows).sum()
        outside = (terms.global_log_p - terms.global_log_q).mean()
        return terms.data_scale * local + outside + self.penalty(terms, state)

    def penalty(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """What the pair's penalties and its guide's training terms add, plate-scaled, a scalar.

        Where draws have no gradient, what these have of them comes by the score function, with
        the other particles as the baseline: those that are the same for all draws get no noise.
        """
        weight = self.value_at("penalty_weight", state)
        each = weight * terms.scaled("penalty") + terms.scaled("training")
        if terms.has_penalties and "detach" in self.pass_options:
            signal, k = each.detach(), len(each)
            if k > 1:
                signal = signal - (signal.sum() - signal) / (k - 1)
            score = signal * terms.log_q.sum(1)
            each = each + score - score.detach()
        return each.mean()

    # What Pyro's SVI, and the objective as a module, call

    def differentiable_loss(
        self, model: Program, guide: Program, *batch: Tensor, **kwargs: object
    ) -> Tensor:
        """The plate-scaled loss as a scalar to differentiate.

        Schedules advance by one step when it is differentiated, and by nothing else.
        """
        structure, state = self._recall(model, guide, batch, kwargs)
        loss = self.surrogate(self.compute_terms(structure, batch), state)
        if loss.requires_grad:
            loss.register_hook(lambda _: state.advance())
        return loss

    def loss(self, model: Program, guide: Program, *batch: Tensor, **kwargs: object) -> float:
        """The plate-scaled loss in nats; doesn't advance schedules."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *batch, **kwargs))

    def loss_and_grads(
        self, model: Program, guide: Program, *batch: Tensor, **kwargs: object
    ) -> float:
        """The plate-scaled loss in nats; adds gradients, and so advances schedules."""
        loss = self.differentiable_loss(model, guide, *batch, **kwargs)
        loss.backward()
        return float(loss.detach())

    def state_of(
        self, model: Program, guide: Program, *batch: Tensor, **kwargs: object
    ) -> ObjectiveState:
        """The state of a pair's training in Pyro's own ``SVI``: its step, schedules, multiplier."""
        return self._recall(model, guide, batch, kwargs)[1]

    def _recall(
        self, model: Program, guide: Program, batch: tuple[Tensor, ...], kwargs: dict[str, object]
    ) -> tuple[Structure, ObjectiveState]:
        """What a pair is made of, and the state of its training, both remembered.

        The state is kept while some of the pair's parameters are those of before.
        """
        known: _Known = self.__dict__.setdefault(_REMEMBERED, {})
        programs = model, guide
        if kwargs:
            programs = _with(kwargs, model, guide, Pair(model, guide).home(batch).device)
        if (model, guide) not in known:
            pair = Pair(*programs, plate=self.plate, densities=_names(self.densities))
            known[model, guide] = pair, None, set()
        pair, state, before = known[model, guide]
        structure = pair.inspect(batch)
        parameters = {id(p) for p in structure.parameters.values()}
        if state is None or parameters != before:
            self.check(structure)
            if state is None or not parameters & before:
                self.warn_of_factors(structure)
                state = self.make_state(structure)
            known[model, guide] = pair, state, parameters
        if kwargs or pair.model != model:
            structure = replace(structure, model=programs[0], guide=programs[1])
        return structure, state

    def _get_trace(
        self, model: Program, guide: Program, args: tuple[Tensor, ...], kwargs: dict[str, object]
    ) -> tuple[Trace, Trace]:
        """Traces of model and guide, scored, as Pyro's tools expect them."""
        device = Pair(model, guide).home(args).device
        programs = _with(kwargs, model, guide, device)
        guide_trace, model_trace = run_pair(*programs, moved(args, device))
        model_trace.compute_log_prob()
        guide_trace.compute_score_parts()
        return model_trace, guide_trace


def _names(densities: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (densities,) if isinstance(densities, str) else tuple(densities or ())


def _with(
    kwargs: dict[str, object], model: Program, guide: Program, device: torch.device
) -> tuple[Program, Program]:
    """Both programs with the keyword arguments that they are called with, brought to a device."""
    if not kwargs:
        return model, guide
    (kwargs,) = moved((kwargs,), device)
    return functools.partial(model, **kwargs), functools.partial(guide, **kwargs)


@dataclass(frozen=True)
class TwoLosses(Objective):
    """The abstract objective with one loss for the model and another for the guide.

    Define `losses`.

    Arguments:
        shared: Whose loss moves parameters that model and guide share: ``"model"``, ``"guide"``,
            or None to refuse them.
        options: As in `Objective`.
    """

    needs: ClassVar[tuple[Need, ...]] = ("density", "unscaled", "local")

    _: KW_ONLY
    shared: Literal["model", "guide", None] = None

    def check(self, structure: Structure) -> None:
        """Also refuses parameters that both sides have, unless one is named."""
        super().check(structure)
        if self.shared is None:
            check_needs(type(self).__name__, structure, "own parameters")

    @abstractmethod
    def losses(self, terms: Terms, state: ObjectiveState) -> tuple[Tensor, Tensor, Tensor]:
        """The plate-scaled value, and the losses of model and guide; all scalars."""

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The value, with the gradient of each side's loss for that side's parameters."""
        value, of_model, of_guide = self.losses(terms, state)
        if not torch.is_grad_enabled():
            return value
        structure = terms.structure
        parameters: list[Tensor] = []
        gradients: list[Tensor | None] = []
        for side, loss in {"model": of_model, "guide": of_guide}.items():
            own = [
                structure.parameters[name]
                for name, sides in structure.sides.items()
                if (side in sides if len(sides) == 1 else side == self.shared)
            ]
            if own and loss.requires_grad:
                gradients += torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
                parameters += own
        return _WithGradients.apply(value.detach(), gradients, *parameters)


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else outer * g for g in ctx.gradients)
