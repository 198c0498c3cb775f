"""One torch optimiser that does what a ``PyroOptim`` does with one optimiser for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.params.param_store import (
    module_from_param_with_module_name,
    normalize_param_name,
    user_param_name,
)
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from pvae.engine.optimizers import make_optimizer
from pvae.internals import count_as_stepped, waiting_states

__all__ = ["OptimizerOfPyro"]


class OptimizerOfPyro:
    """A ``PyroOptim`` as one torch optimiser, with all that Pyro's own does.

    Each parameter has a group, and in ``optim.optim_objs`` an optimiser of its own, as Pyro has
    it, which shares the group and the state: ``get_state``, ``save``, a loaded state, schedulers
    and learning rates that are set there mean what they mean in Pyro.

    Arguments:
        optim: One of Pyro's optimisers.
        parameters: By name.

    Attributes:
        optimizer: The torch optimiser.
    """

    def __init__(self, optim: PyroOptim, parameters: Mapping[str, Tensor]) -> None:
        self.optim = optim
        groups = [{"params": [p], **self._settings(name, p)} for name, p in parameters.items()]
        nothing = [] if groups else [torch.zeros(())]  # torch's optimisers ask for something
        self.optimizer = make_optimizer(optim.pt_optim_constructor, groups or nothing)
        if nothing:
            self.optimizer.param_groups.clear()
        for name, parameter in parameters.items():
            self._adopt(name, parameter)
        if optim.pt_clip_args:
            self.optimizer.register_step_pre_hook(lambda *_: self._clip())

    def take_up(self, name: str, parameter: Tensor) -> None:
        """Takes up a parameter that wasn't there before."""
        group = {"params": [parameter], **self._settings(name, parameter)}
        self.optimizer.add_param_group(group)
        self._adopt(name, parameter)

    def _adopt(self, name: str, parameter: Tensor) -> None:
        """Gives the newest parameter what Pyro keeps for each."""
        optim, state = self.optim, self.optimizer.state
        group = next(g for g in self.optimizer.param_groups if g["params"][0] is parameter)
        own = optim.pt_optim_constructor([parameter], **self._settings(name, parameter))
        own.param_groups = [group]
        own.state[parameter] = state[parameter]
        made = own
        if isinstance(optim, PyroLRScheduler):
            made = optim.pt_scheduler_constructor(own, **optim.kwargs)
            count_as_stepped(own)
        saved = waiting_states(optim).pop(_stored_name(name, parameter), None)
        if parameter in optim.optim_objs:  # it has been used before, and goes on
            saved = _saved(optim.optim_objs[parameter])
        if saved is not None:
            self._load(made, own, parameter, saved)
        optim.optim_objs[parameter] = made
        optim.grad_clip[parameter] = self._clipping(name, parameter)

    def _load(self, made: Any, own: torch.optim.Optimizer, parameter: Tensor, saved: Any) -> None:
        """Goes on from a state that Pyro's optimiser was given."""
        if made is not own:
            made.load_state_dict(saved["scheduler"])
            saved = saved["optimizer"]
        group = own.param_groups[0]
        kept = {name: group.get(name) for name in ("params", "fused", "foreach", "capturable")}
        own.load_state_dict(saved)
        group.update({k: v for k, v in own.param_groups[0].items() if k not in kept})
        own.param_groups = [group]
        self.optimizer.state[parameter] = state = own.state[parameter]
        if group.get("fused") and isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device)

    def _settings(self, name: str, parameter: Tensor) -> dict[str, Any]:
        """The constructor's arguments for a parameter."""
        settings = self.optim.pt_optim_args
        if not callable(settings):
            return settings
        stored = _stored_name(name, parameter)
        if self.optim.pt_optim_args_argc == 1:
            return settings(normalize_param_name(stored))
        return settings(module_from_param_with_module_name(stored), user_param_name(stored))

    def _clipping(self, name: str, parameter: Tensor) -> Any:
        """What clips a parameter's gradient; None where nothing does."""
        limits = self.optim.pt_clip_args
        if callable(limits):
            stored = _stored_name(name, parameter)
            limits = limits(module_from_param_with_module_name(stored), user_param_name(stored))

        def clip(parameter: Tensor) -> None:
            if limits.get("clip_norm") is not None:
                clip_grad_norm_(parameter, limits["clip_norm"])
            if limits.get("clip_value") is not None:
                clip_grad_value_(parameter, limits["clip_value"])

        return clip if limits else None

    def _clip(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                clip = self.optim.grad_clip.get(parameter)
                if clip is not None and parameter.grad is not None:
                    clip(parameter)


def _saved(made: Any) -> dict[str, Any]:
    """The state of what Pyro keeps for a parameter: an optimiser, or a scheduler of one."""
    if hasattr(made, "optimizer"):
        return {"scheduler": made.state_dict(), "optimizer": made.optimizer.state_dict()}
    return made.state_dict()


def _stored_name(name: str, parameter: Tensor) -> str:
    """The parameter's name in Pyro's store, which Pyro's settings go by, if it is there."""
    return pyro.get_param_store().param_name(parameter) or name
