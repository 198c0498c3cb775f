"""Objectives with one loss for the model and another for the guide."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pvae.objectives.base import Objective
from pvae.objectives.refusals import Need, refuse_shared
from pvae.objectives.state import ObjectiveState
from pvae.pair import Structure
from pvae.terms import Terms

__all__ = ["TwoLosses"]


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
            refuse_shared(type(self).__name__, structure)

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
