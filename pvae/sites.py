"""Names and marks that parts and tools agree on: sites, the data plate, penalties, parameters.

A pair that a modeller writes needs none of these names; tools find its sites by tracing it.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from contextvars import ContextVar

import pyro
import pyro.distributions as dist
from pyro.distributions import constraints
from pyro.poutine.runtime import am_i_wrapped, apply_stack
from torch import Tensor, nn

from pvae.modes import flag_set

__all__ = [
    "DATA_PLATE",
    "LATENT",
    "OBSERVED",
    "PENALTY",
    "announce_parameters",
    "penalty",
    "without_announcements",
]

DATA_PLATE = "data"
LATENT = "z"
OBSERVED = "x"

PENALTY = "pvae_penalty"
"""Key in a site's ``infer`` that marks a factor as a penalty: optimised, but no part of a density.
"""


def penalty(name: str, value: Tensor, *, in_guide: bool = False) -> None:
    r"""Subtracts ``value`` from the objective, as a factor marked as a penalty.

    In a model the factor is :math:`-\lambda R`. In a guide, whose log density is subtracted, it is
    :math:`+\lambda R`, and it must say ``has_rsample=True``: without that the loss is right and
    the gradient wrong.

    Arguments:
        name: The site's name.
        value: The penalty :math:`\lambda R` in nats, shape ``(N,)`` inside the data plate (one
            value a datum) or ``()`` outside it.
        in_guide: Whether the statement stands in a guide.
    """
    unit = dist.Unit(value if in_guide else -value, has_rsample=True if in_guide else None)
    pyro.sample(name, unit, obs=unit.sample(), infer={"is_auxiliary": True, PENALTY: True})


_silent: ContextVar[bool] = ContextVar("pvae_silent", default=False)


def without_announcements() -> AbstractContextManager[None]:
    """Lets pairs run without `announce_parameters`, for a caller that knows the parameters."""
    return flag_set(_silent)


def announce_parameters(module: nn.Module, prefix: str) -> None:
    """Issues one ``param`` message for each trainable parameter of a module.

    This is what makes a plain ``nn.Module`` visible to `pyro.infer.SVI`, which otherwise trains
    nothing and says nothing. No value goes through Pyro's global parameter store, so two pairs in
    one process can't meet there.

    Arguments:
        module: The module whose parameters are announced.
        prefix: First part of the names; model and guide must use different ones.
    """
    if not am_i_wrapped() or _silent.get():
        return
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        value = parameter.detach()
        value.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
        message: dict[str, object] = {"type": "param", "name": f"{prefix}.{name}", "value": value}
        message |= {"fn": None, "args": (), "kwargs": {"constraint": constraints.real}}
        message |= {"infer": {}, "scale": 1.0, "mask": None, "cond_indep_stack": ()}
        message |= {"done": True, "stop": False, "continuation": None, "is_observed": False}
        apply_stack(message)
