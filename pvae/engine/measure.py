"""The loss of a batch, its gradients, and what else a step measures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pvae import terms as t
from pvae.engine.precision import PRECISIONS, Precision, check_densities, mixed
from pvae.errors import ArgumentError
from pvae.internals import norms
from pvae.objectives import Objective, ObjectiveState
from pvae.sites import without_announcements

__all__ = ["PARTS", "Measure", "Measured", "gradient_norms", "refuse_sparse"]

PARTS = ("loss", "elbo", "log_likelihood", "rate", "penalty", "grad_norm")
"""What is summed over an epoch: per datum and in nats, but for the norm of the gradient."""


class Measured(NamedTuple):
    """What is measured on a batch.

    Attributes:
        parts: All of `PARTS` but the last, per datum.
        num_rows: How many data these are of.
        gradients: Of the loss, by the name of the parameter; those that have one.
        densities: Sites' log densities by name, which aren't all finite where the loss isn't.
    """

    parts: list[Tensor]
    num_rows: int | Tensor
    gradients: dict[str, Tensor]
    densities: tuple[tuple[str, Tensor], ...] = ()


class Measure:
    """Measures an objective and its gradients on a batch.

    Arguments:
        model: A Pyro program.
        guide: Its guide.
        objective: What to maximise; any of Pyro's ELBOs.
        structure: What `inspect_pair` found.
        state: The objective's state; None for Pyro's own objectives.
        precision: ``"full"``, the pair's own type, or ``"bf16"``: networks in bfloat16.
        per_datum: Whether the loss is divided by the data plate's full size.

    Attributes:
        has_penalties: Whether the last batch had any.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        objective: PyroELBO,
        structure: t.Structure,
        state: ObjectiveState | None,
        precision: Precision,
        *,
        per_datum: bool,
    ) -> None:
        if precision not in PRECISIONS:
            raise ArgumentError("precision", f"one of {', '.join(PRECISIONS)}", repr(precision))
        if precision == "bf16" and not isinstance(objective, Objective):
            raise ArgumentError(
                "precision", "an objective of pvae's with 'bf16'", type(objective).__name__
            )
        self.model, self.guide, self.objective = model, guide, objective
        self.structure, self.state = structure, state
        self.precision, self.per_datum = precision, per_datum
        self.has_penalties = False

    def __call__(self, batch: tuple[Tensor, ...]) -> Measured:
        """The loss, its parts and its gradients."""
        if not isinstance(self.objective, Objective):
            return self._of_pyro(batch)
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
            densities = tuple(
                (name, density.detach())
                for name, site in terms.sites.items()
                for density in (site.scaled_log_p, site.scaled_log_q)
                if density is not None
            )
            elbo, likelihood = terms.elbo_per_datum()
            self.has_penalties = terms.has_penalties
            penalty = -terms.scaled("penalty").mean() / divisor
            parts = [loss.detach(), elbo, likelihood, likelihood - elbo, penalty]
            return Measured(parts, terms.num_rows, gradients, densities)

    def _of_pyro(self, batch: tuple[Tensor, ...]) -> Measured:
        """The same of one of Pyro's objectives, of which the loss alone is known.

        Some add their gradients to those that parameters have, which are none before a step.
        """
        rows = self.structure.subsample_size or len(batch[0])
        divisor = self.structure.divisor(rows) if self.per_datum else 1
        if hasattr(self.objective, "differentiable_loss"):
            loss = self.objective.differentiable_loss(self.model, self.guide, *batch) / divisor
            gradients = self._differentiate(loss)
        else:
            value = self.objective.loss_and_grads(self.model, self.guide, *batch)
            if not isinstance(value, (float, int, Tensor)):
                raise ArgumentError(
                    "objective",
                    "one that returns one loss",
                    f"{type(self.objective).__name__}, which returns a {type(value).__name__}",
                    ["pyro.infer.SVI with it, and a loop of your own"],
                )
            loss = torch.as_tensor(value, dtype=torch.float64) / divisor
            given = {n: p.grad for n, p in self.structure.parameters.items()}
            gradients = {n: g.div_(divisor) for n, g in given.items() if g is not None}
        loss = loss.detach().to(self.structure.device)
        unknown = torch.full_like(loss, float("nan"))
        return Measured([loss, unknown, unknown, unknown, unknown], rows, gradients)

    def _differentiate(self, loss: Tensor) -> dict[str, Tensor]:
        """Gradients of the parameters that have one, by name."""
        names, parameters = list(self.structure.parameters), [*self.structure.parameters.values()]
        if not loss.requires_grad or not parameters:
            return {}
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def gradient_norms(gradients: Mapping[str, Tensor], *, is_fused: bool = False) -> Tensor:
    """The norm of each parameter's gradient.

    Arguments:
        gradients: By the name of the parameter.
        is_fused: Whether they are taken one by one, for a compiler to fuse.

    Raises:
        ArgumentError: If there is none, or a sparse one.
    """
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
    refuse_sparse(gradients)
    if is_fused:
        return torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()])
    return norms([*gradients.values()])


def refuse_sparse(gradients: Mapping[str, Tensor]) -> None:
    """Refuses gradients that neither clipping nor fused optimisers know."""
    sparse = [name for name, g in gradients.items() if g.is_sparse]
    if sparse:
        raise ArgumentError(
            "pair",
            "dense gradients",
            f"sparse ones, of {', '.join(sparse)}",
            ["nn.Embedding(..., sparse=False)"],
        )
