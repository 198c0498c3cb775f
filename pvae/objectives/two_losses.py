"""Objectives with one loss for the model and another for the guide."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pvae import terms as t
from pvae.errors import ArgumentError
from pvae.objectives.base import Objective, ObjectiveState
from pvae.objectives.refusals import refuse_shared

__all__ = ["TwoLosses"]


class TwoLosses(Objective):
    """The abstract objective with one loss for the model and another for the guide.

    Define `losses`.

    Arguments:
        num_particles: K, draws from the guide for each datum.
        shared: Whose loss moves parameters that model and guide share: ``"model"``, ``"guide"``,
            or None to refuse them.
        options: As in `Objective`.
    """

    def __init__(
        self,
        num_particles: int,
        *,
        shared: Literal["model", "guide"] | None = None,
        **options: Any,
    ) -> None:
        if shared not in (None, "model", "guide"):
            raise ArgumentError("shared", "'model', 'guide' or None", repr(shared))
        self.shared = shared
        super().__init__(num_particles, **options)

    def check(self, structure: t.Structure) -> None:
        """Also refuses parameters that both sides have, unless one is named."""
        super().check(structure)
        if self.shared is None:
            refuse_shared(type(self).__name__, structure)

    @abstractmethod
    def losses(self, terms: t.Terms, state: ObjectiveState) -> tuple[Tensor, Tensor, Tensor]:
        """The plate-scaled value, and the losses of model and guide; all scalars."""

    def surrogate(self, terms: t.Terms, state: ObjectiveState) -> Tensor:
        """The value, with the gradient of each side's loss for that side's parameters."""
        value, of_model, of_guide = self.losses(terms, state)
        losses = {"model": of_model, "guide": of_guide}
        return _with_gradients(value, losses, terms.structure, self.shared)


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Any, *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        return None, None, *(None if g is None else outer[0] * g for g in ctx.gradients)


def _with_gradients(
    value: Tensor,
    losses: Mapping[str, Tensor],
    structure: t.Structure,
    shared: Literal["model", "guide"] | None = None,
) -> Tensor:
    """The value, with the gradient of each side's own loss for each side's parameters.

    Arguments:
        value: What is returned, a scalar.
        losses: By side: ``"model"`` and ``"guide"``.
        structure: Whose parameters they are.
        shared: The side whose loss moves what both have.
    """
    if not torch.is_grad_enabled():
        return value
    value = value.detach()
    parameters: list[Tensor] = []
    gradients: list[Tensor | None] = []
    for side, loss in losses.items():
        mine = [
            structure.parameters[name]
            for name, sides in structure.sides.items()
            if (side in sides if len(sides) == 1 else side == shared)
        ]
        if mine and loss.requires_grad:
            gradients += torch.autograd.grad(loss, mine, retain_graph=True, allow_unused=True)
            parameters += mine
    return _WithGradients.apply(value, gradients, *parameters)
