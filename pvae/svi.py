"""Stochastic variational inference step by step, for those who write their own loop."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import TypeAlias

import pyro
import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pvae.engine import Engine, OptimizerLike, Stepper, make_optimizer
from pvae.errors import ArgumentError, oxford, warn
from pvae.objectives import Objective, as_objective
from pvae.pair import Pair
from pvae.types import Program

__all__ = ["SVI"]

Optim: TypeAlias = pyro.optim.PyroOptim | torch.optim.Optimizer | OptimizerLike


class SVI:
    """``pyro.infer.SVI`` with one fused optimiser, and with steps that can be compiled.

    A change of import in a loop that has Pyro's: the losses, their gradients and the updates are
    the same. Parameters are those of the first batch. Pyro's validation is on for the first step
    and off after it. A step whose loss or gradient isn't finite is skipped, with a warning.

    Arguments:
        model: A Pyro program.
        guide: Its guide.
        optim: One of Pyro's, such as ``pyro.optim.Adam({"lr": 1e-3})``; a torch optimiser class
            with its settings, ``functools.partial(torch.optim.Adam, lr=1e-3)``; or a torch
            optimiser that has the pair's parameters.
        loss: One of Pyro's ELBOs, or of `pvae.objectives`; Pyro's ``Trace_ELBO`` is run as
            `pvae.objectives.ELBO`.
        engine: ``"eager"``, ``"compiled"`` or ``"cudagraph"``: see `pvae.engine.Stepper`.
        plate: Name of the data plate, where the batch's length doesn't tell.

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

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: Optim,
        loss: PyroELBO,
        *,
        engine: Engine = "eager",
        plate: str | None = None,
    ) -> None:
        self.model, self.guide, self.optim, self.engine = model, guide, optim, engine
        self.objective = as_objective(loss)
        self.pair = Pair(model, guide, plate=plate or getattr(self.objective, "plate", None))
        self.optimizer: torch.optim.Optimizer | None = None
        self._stepper: Stepper | None = None
        self._steps = 0

    def step(self, *batch: Tensor) -> float:
        """Takes a gradient step and returns the loss in nats, scaled by the plate as Pyro's is.

        Arguments:
            batch: What model and guide are called with.
        """
        stepper = self._stepper or self._start(batch)
        with pyro.validation_enabled(is_validate=self._steps == 0):
            stepper(batch, self._steps)
        self._steps += 1
        loss = float(stepper.loss)
        failure = stepper.look(self._steps - 1)
        if failure is not None:
            stepper.recover(self._steps)
            what = failure.sites or failure.parameters
            where = f", at {oxford(what[:3])}" if what else ""
            warn(f"Step {failure.step} isn't finite{where}, and was skipped.")
        return loss

    def evaluate_loss(self, *batch: Tensor) -> float:
        """An estimate of the loss in nats, which trains nothing and advances nothing."""
        if not isinstance(self.objective, Objective):
            with torch.no_grad():
                return float(self.objective.loss(self.model, self.guide, *batch))
        stepper = self._stepper or self._start(batch)
        assert stepper.state is not None  # noqa: S101
        with torch.no_grad():
            terms = self.objective.compute_terms(stepper.structure, batch)
            return float(self.objective.surrogate(terms, stepper.state))

    def _start(self, batch: tuple[Tensor, ...]) -> Stepper:
        """What is to be known of the pair and its parameters."""
        structure = self.pair.inspect(batch)
        state = None
        if isinstance(self.objective, Objective):
            self.objective.check(structure)
            state = self.objective.make_state(structure)
        self.optimizer = _torch_optimizer(self.optim, structure.parameters)
        self._stepper = Stepper(
            structure, self.objective, self.optimizer, state, engine=self.engine, per_datum=False
        )
        return self._stepper


def _torch_optimizer(optim: Optim, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """One optimiser over all parameters, whatever kind was given."""
    if isinstance(optim, pyro.optim.PyroOptim):
        return _from_pyro(optim, parameters)
    if not isinstance(optim, torch.optim.Optimizer):
        return make_optimizer(optim, list(parameters.values()))
    theirs = {id(p) for group in optim.param_groups for p in group["params"]}
    if missing := [name for name, p in parameters.items() if id(p) not in theirs]:
        expected, actual = "an optimiser of all of the pair's parameters", oxford(missing[:3])
        fixes = ["its class, with functools.partial for the settings"]
        raise ArgumentError("optim", expected, f"one without {actual}", fixes)
    return optim


def _from_pyro(
    optim: pyro.optim.PyroOptim, parameters: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """Pyro keeps an optimiser for each tensor; this is one that does the same for all."""
    if optim.pt_clip_args or isinstance(optim, pyro.optim.PyroLRScheduler):
        what = "clip_args" if optim.pt_clip_args else "a learning rate scheduler"
        raise ArgumentError(
            "optim",
            "an optimiser without clipping of single tensors and without a scheduler",
            f"{type(optim).__name__} with {what}",
            ["pvae.fit(..., clip_norm=, lr_schedule=)", "a torch optimiser and its scheduler"],
        )
    kind, settings = optim.pt_optim_constructor, optim.pt_optim_args
    if not callable(settings):
        return make_optimizer(functools.partial(kind, **settings), [*parameters.values()])
    if len(inspect.signature(settings).parameters) != 1:
        raise ArgumentError("optim", "settings by the parameter's name", "by module and name")
    groups = [{"params": [p], **settings(name)} for name, p in parameters.items()]
    return make_optimizer(kind, groups)
