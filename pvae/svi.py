"""Stochastic variational inference step by step, for those who write their own loop."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import pyro
import torch
from numpy.typing import DTypeLike
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO
from pyro.infer.util import torch_item
from torch import Tensor

from pvae.annotations import strict
from pvae.engine import Engine, OptimizerLike, OptimizerOfPyro, Stepper
from pvae.errors import ArgumentError, oxford, warn
from pvae.internals import guess_plates, network_state
from pvae.objectives import ELBO, Objective, ObjectiveState, as_objective
from pvae.objectives.refusals import check_of_pyro
from pvae.pair import Batch, Pair, Structure
from pvae.pair.home import moved
from pvae.pair.plates import PlateName
from pvae.pair.running import Spec, called_by, flatten, rebuild
from pvae.threads import alone
from pvae.types import Program

__all__ = ["SVI", "Loss"]

LOOK_EVERY = 50
"""Steps between looks at a GPU for one that wasn't finite, after the first ones."""

Optim: TypeAlias = pyro.optim.PyroOptim | torch.optim.Optimizer | OptimizerLike


class Loss(Tensor):
    """The loss of a step on a GPU: a scalar tensor in nats, which NumPy reads, too.

    Whatever reads it waits until the GPU has come to the end of that step.
    """

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:  # noqa: FBT001
        """The number, for NumPy and what is built on it, such as plots."""
        return np.asarray(self.item(), dtype)

    def __format__(self, spec: str) -> str:
        """The number, written as a number is."""
        return format(self.item(), spec)


class SVI(pyro.infer.SVI):
    """``pyro.infer.SVI`` with one fused optimiser, and with steps that can be compiled.

    A change of import in a loop that has Pyro's: what it takes, the losses, their gradients and
    the updates are the same. Pyro's validation is on for the first step and off after it. A step
    whose loss or gradient isn't finite is skipped, with a warning: at once on the CPU; on a GPU,
    where to look for one waits, after steps 1, 2, 4, 8 and so on, and after every 50th.
    Batches go where the pair is: `pvae.fit` may have moved that to a GPU.

    Arguments:
        model: A Pyro program.
        guide: Its guide.
        optim: One of Pyro's, such as ``pyro.optim.Adam({"lr": 1e-3})``, with clipping or a
            scheduler, too; a torch optimiser class with its settings,
            ``functools.partial(torch.optim.Adam, lr=1e-3)``; or a torch optimiser that has the
            pair's parameters.
        loss: One of Pyro's ELBOs, or of `pvae.objectives`; Pyro's ``Trace_ELBO`` is run as
            `pvae.objectives.ELBO`, particle by particle unless it says ``vectorize_particles``.
            Or a function of (model, guide, *batch), as Pyro's ``SVI`` takes it.
        loss_and_grads: With a function for ``loss``: what takes its gradients, too.
        num_samples, num_steps: For `run`, as in Pyro.
        engine: ``"eager"``, ``"compiled"`` or ``"cudagraph"``: see `pvae.engine.Stepper`, which
            says what of a change in Python such steps notice. A number that changes at each step,
            such as a weight of the KL, is best kept in a tensor: ``weight.fill_(0.5)``.
        plate: Name of the data plate, where the batch's length doesn't tell; False where none
            counts the data.

    Attributes:
        optimizer: The torch optimiser; None before the first step.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> from pvae import recipes
        >>> _ = torch.manual_seed(0)
        >>> vae = recipes.vae(16, latent_dim=2, hidden=(8,))
        >>> svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        >>> svi.step(torch.rand(32, 16).round()) > 0
        True
    """

    @strict
    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: Optim,
        loss: PyroELBO | Callable[..., Any],
        loss_and_grads: Callable[..., Any] | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
        *,
        engine: Engine = "eager",
        plate: PlateName = None,
        **options: Any,
    ) -> None:
        self.objective, self._given_loss = _as_loss(loss, loss_and_grads), loss
        of_pyro = _as_pyro_optim(optim)
        super().__init__(
            model, guide, of_pyro, loss, loss_and_grads, num_samples, num_steps, **options
        )
        self.optim: Optim = optim if isinstance(optim, torch.optim.Optimizer) else of_pyro
        self.engine: Engine = engine
        self.plate = getattr(self.objective, "plate", None) if plate is None else plate
        self.densities = getattr(self.objective, "densities", None) or ()
        self.optimizer: torch.optim.Optimizer | None = None
        self._updates: OptimizerOfPyro | _Given | None = None
        self._state: ObjectiveState | None = None
        self._pairs: dict[Spec, Pair] = {}
        self._steppers: dict[Hashable, tuple[Stepper, list[object]]] = {}
        self._parameters: dict[int, Tensor] = {}
        self._moved: set[int] = set()
        self._steps = 0

    def step(self, *args: object, **kwargs: object) -> Any:
        """Takes a gradient step and returns the loss in nats, scaled by the plate as Pyro's is.

        Parameters that first appear now are trained from now on.

        Arguments:
            *args: What model and guide are called with: tensors, and anything else.
            **kwargs: The same, by name.

        Returns:
            For a pair on the CPU the number, as Pyro's ``SVI`` gives it. For one on a GPU a
            `Loss`, a tensor there, so that the step waits for nothing: ``losses.append(loss)``,
            ``total += loss`` and ``loss / n`` don't wait either, while ``float(loss)``,
            ``f"{loss:.1f}"``, ``loss < best``, ``np.mean(losses)`` and a plot wait for the step.
            JSON wants ``float(loss)``. An objective of Pyro's that returns several losses, such as
            ``ReweightedWakeSleep``, has them returned as numbers: like all of Pyro's objectives
            it waits for the device itself.
        """
        with alone():
            return self._step(args, kwargs)

    def _step(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Any:
        stepper, batch = self._stepper_for(args, kwargs)
        with pyro.validation_enabled(is_validate=self._steps == 0):
            stepper(batch, self._steps)
        self._steps += 1
        for parameter in self._parameters.values():
            parameter.grad = None
        is_on_host = stepper.loss.device.type == "cpu"
        if is_on_host or self._steps % LOOK_EVERY == 0 or self._steps.bit_count() == 1:
            self._look([stepper] if is_on_host else [one for one, _ in self._steppers.values()])
        if isinstance(value := stepper.passes.value, tuple):
            return tuple(map(torch_item, value))
        return float(stepper.loss) if is_on_host else stepper.loss.clone().as_subclass(Loss)

    def _look(self, steppers: Sequence[Stepper]) -> None:
        """Warns of steps that weren't finite since the last look, which waits for the device."""
        for stepper in steppers:
            if (failure := stepper.look()) is None:
                continue
            stepper.recover(self._steps)
            what = failure.sites or failure.parameters
            where = f", at {oxford(what[:3])}" if what else ""
            more = f", as were {failure.steps - 1} after it" if failure.steps > 1 else ""
            warn(f"Step {failure.step} isn't finite{where}, and was skipped{more}.")

    def evaluate_loss(self, *args: object, **kwargs: object) -> float:
        """An estimate of the loss in nats, which trains nothing and advances nothing.

        Arguments:
            *args: What model and guide are called with.
            **kwargs: The same, by name.
        """
        with alone():
            if not isinstance(self.objective, Objective):
                home = Pair(self.model, self.guide).home(args)
                args, kwargs = moved((args, kwargs), home.device)
                return super().evaluate_loss(*args, **kwargs)
            stepper, batch = self._stepper_for(args, kwargs)
            assert stepper.state is not None  # noqa: S101
            with torch.no_grad():
                terms = self.objective.compute_terms(stepper.structure, batch)
                return float(self.objective.surrogate(terms, stepper.state))

    def _stepper_for(
        self, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[Stepper, Batch]:
        """What runs steps on arguments of this kind, and the arguments in a row."""
        leaves: list[Any] = []
        spec = flatten((args, kwargs), leaves)
        batch, kind = tuple(leaves), (spec, *map(_kind, leaves))
        stepper, networks = self._steppers.get(kind, (None, ()))
        if stepper is None or not _is_as(networks, stepper.structure):
            stepper = self._start(spec, batch)
            self._steppers[kind] = stepper, network_state(stepper.structure.modules)
            args, kwargs = rebuild(spec, iter(stepper.structure.place(batch)))
            _guess_as_pyro(self._given_loss, self.model, self.guide, args, kwargs)
        return stepper, stepper.structure.place(batch)

    def _start(self, spec: Spec, batch: Batch) -> Stepper:
        """What is to be known of the pair and its parameters, on arguments of a kind."""
        if spec not in self._pairs:
            programs = [self.model, self.guide]
            if not _is_flat(spec):
                programs = [called_by(spec, program) for program in programs]
            self._pairs[spec] = Pair(*programs, plate=self.plate, densities=self.densities)
        structure = self._pairs[spec].inspect(batch)
        known = {id(p) for p in structure.parameters.values()}
        frozen = {f"{i}": p for i, p in self._parameters.items() if i not in known}
        structure = replace(structure, parameters={**frozen, **structure.parameters})
        if isinstance(self.objective, Objective):
            self.objective.check(structure)
            if self._state is None:
                self.objective.warn_of_factors(structure)
                self._state = self.objective.make_state(structure)
        elif not isinstance(self.objective, _Function):
            check_of_pyro(self.objective, structure)
        self._prepare(structure)
        assert self.optimizer is not None  # noqa: S101
        stepper = Stepper(
            structure, self.objective, self.optimizer, self._state,
            engine=self.engine, per_datum=False, each_by_itself=True, late=self._take_up,
        )  # fmt: skip
        stepper.moved = self._moved
        return stepper

    def _prepare(self, structure: Structure) -> None:
        """Has an optimiser for the parameters of the pair."""
        if self._updates is None:
            if isinstance(self.optim, torch.optim.Optimizer):
                self._updates = _Given(self.optim, structure.parameters)
            else:
                self._updates = OptimizerOfPyro(self.optim, structure.parameters)
            self.optimizer = self._updates.optimizer
            self._parameters = {id(p): p for p in structure.parameters.values()}
        for name, parameter in structure.parameters.items():
            self._take_up(name, parameter)

    def _take_up(self, name: str, parameter: Tensor) -> None:
        """Trains a parameter from now on."""
        if id(parameter) not in self._parameters:
            self._parameters[id(parameter)] = parameter
            assert self._updates is not None  # noqa: S101
            self._updates.take_up(name, parameter)


class _Given:
    """A torch optimiser that has the pair's parameters already."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
        self.optimizer = optimizer
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if missing := [name for name, p in parameters.items() if id(p) not in theirs]:
            expected, actual = "an optimiser of all of the pair's parameters", oxford(missing[:3])
            fixes = ["its class, with functools.partial for the settings"]
            raise ArgumentError("optim", expected, f"one without {actual}", fixes)

    def take_up(self, _: str, parameter: Tensor) -> None:
        """Takes up a parameter that wasn't there before, with the optimiser's own settings."""
        self.optimizer.add_param_group({"params": [parameter]})


class _Function(PyroELBO):
    """A loss that is a function, as Pyro's own ``SVI`` takes it."""

    def __init__(self, loss: Callable[..., Any], loss_and_grads: Callable[..., Any] | None) -> None:
        super().__init__()
        self.loss, self.loss_and_grads = loss, loss_and_grads or self._differentiated

    def _differentiated(self, *args: object, **kwargs: object) -> object:
        value = self.loss(*args, **kwargs)
        if getattr(value, "requires_grad", False):
            value.backward(retain_graph=True)
        return value

    def _get_trace(self, *_: object) -> None:
        raise NotImplementedError


def _as_loss(loss: Any, loss_and_grads: Callable[..., Any] | None) -> PyroELBO:
    """What steps maximise; ``Trace_ELBO`` as our own ELBO, with Pyro's order of draws."""
    if type(loss) is Trace_ELBO:
        batched = loss.vectorize_particles
        return ELBO(loss.num_particles, states="drawn", vectorize_particles=batched)
    if isinstance(loss, PyroELBO) or not callable(loss) or isinstance(loss, type):
        return as_objective(loss)
    return _Function(loss, loss_and_grads)


def _guess_as_pyro(loss: Any, *programs_and_arguments: object) -> None:
    if type(loss) is Trace_ELBO and loss.vectorize_particles and math.isinf(loss.max_plate_nesting):
        guess_plates(loss, *programs_and_arguments)


def _as_pyro_optim(optim: Optim) -> pyro.optim.PyroOptim:
    """What Pyro's ``SVI`` asks for, of a torch optimiser, too."""
    if isinstance(optim, pyro.optim.PyroOptim):
        return optim
    if isinstance(optim, torch.optim.Optimizer):
        return pyro.optim.PyroOptim(type(optim), dict(optim.defaults))
    if isinstance(optim, pyro.optim.multi.MultiOptimizer) or not callable(optim):
        expected = "one of Pyro's optimisers, or a torch optimiser or its class"
        fixes = ['pyro.optim.Adam({"lr": 1e-3})', "functools.partial(torch.optim.Adam, lr=1e-3)"]
        raise ArgumentError("optim", expected, type(optim).__name__, fixes)
    return pyro.optim.PyroOptim(optim, {})


def _is_flat(spec: Spec) -> bool:
    """Whether arguments are by position alone, and none of them is a container."""
    assert spec is not None  # noqa: S101
    _, args, kwargs = spec
    return len(kwargs) == 2 and not any(args[1:])


def _is_as(networks: Sequence[object], structure: Structure) -> bool:
    """Whether networks have the modules and parameters that they had, and the same are trained."""
    now = network_state(structure.modules)
    return len(now) == len(networks) and all(map(operator.is_, now, networks))


def _kind(part: object) -> Hashable:
    """What of an argument a pair's sites may depend on: no sizes, and no numbers but flags."""
    if isinstance(part, Tensor):
        return part.dtype, part.dim()
    if isinstance(part, (bool, str, type(None))):
        return type(part), part
    return type(part).__name__
