"""How one training step runs: terms, loss, gradients, update, all without waiting for the device.

A step whose loss or gradient isn't finite changes nothing, and nor does any step after it: the
update is masked on the device. The host finds out when it looks, every so often.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor

from pvae import terms as t
from pvae.errors import ArgumentError
from pvae.objectives import Objective, ObjectiveState

__all__ = ["Failure", "Stepper", "make_optimizer"]

OptimizerLike = Callable[..., torch.optim.Optimizer]

PARTS = ("loss", "elbo", "log_likelihood", "rate", "penalty", "grad_norm")
"""What is summed over an epoch: per datum and in nats, but for the norm of the gradient."""


def make_optimizer(
    factory: OptimizerLike, parameters: Sequence[Tensor], lr: float
) -> torch.optim.Optimizer:
    """One optimiser over all parameters, fused where optimiser and device have that."""
    made: torch.optim.Optimizer | None = None
    with contextlib.suppress(TypeError, RuntimeError):
        made = factory(parameters, lr=lr, fused=True)
    try:
        made = made or factory(parameters, lr=lr)
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError("its step needs a closure that evaluates the loss again")
        return made
    except (TypeError, AttributeError) as error:
        raise ArgumentError(
            "optimizer",
            "a torch optimiser class, called with (parameters, lr=...)",
            f"{factory!r}: {error}",
            ["torch.optim.Adam", "functools.partial(torch.optim.SGD, momentum=0.9)"],
        ) from error


@dataclass(frozen=True)
class Failure:
    """The first step that wasn't finite: its number, and the sites or parameters at fault."""

    step: int
    sites: tuple[str, ...]
    parameters: tuple[str, ...]


class Stepper:
    """Runs training steps of a pair and keeps sums of what they measured on the device.

    Arguments:
        model: A Pyro program.
        guide: Its guide.
        objective: What to maximise; any of Pyro's ELBOs.
        structure: What `inspect_pair` found.
        optimizer: Over ``structure.parameters``.
        state: The objective's state; None for Pyro's own objectives.
        clip_norm: Largest norm of the whole gradient; None for no clipping.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        objective: PyroELBO,
        structure: t.Structure,
        optimizer: torch.optim.Optimizer,
        state: ObjectiveState | None,
        clip_norm: float | None,
    ) -> None:
        self.model, self.guide, self.objective = model, guide, objective
        self.structure, self.optimizer, self.state = structure, optimizer, state
        self.clip_norm = clip_norm
        self.parameters = list(structure.parameters.values())
        device = structure.device
        self.sums = torch.zeros(len(PARTS) + 1, dtype=torch.float64, device=device)
        self.failed = torch.zeros((), dtype=torch.bool, device=device)
        self.failed_at = torch.full((), -1, dtype=torch.int64, device=device)
        self.bad_sites: Tensor | None = None
        self.bad_parameters: Tensor | None = None
        self.site_names: tuple[str, ...] = ()
        self.with_grad: list[str] = []
        self.has_penalties = False
        self.buffers = [b for m in structure.modules for b in m.buffers(recurse=False)]
        self.is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)

    def __call__(self, batch: tuple[Tensor, ...], step: int) -> None:
        """Runs one step on a batch; ``step`` is its number, for a `Failure` to name."""
        self.optimizer.zero_grad(set_to_none=True)
        buffers = _Backup(self.buffers)
        measured, rows = self._backward(batch)
        norm = self._gradient_norm()
        finite = measured[0].isfinite() & norm.isfinite()
        self._note_failure(finite, step)
        ok = finite & ~self.failed
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        self._update(ok)
        buffers.restore_unless(ok)
        self.failed = ~ok
        if self.state is not None:
            kept = _Backup(list(self.state.tensors().values()))
            self.state.advance()
            kept.restore_unless(ok)
        with torch.no_grad():
            values = torch.stack([*measured, norm]).to(torch.float64)
            row = torch.cat([values * rows, values.new_full((1,), rows)])
            self.sums += torch.where(ok, row, torch.zeros_like(row))

    def averages(self) -> dict[str, float]:
        """Averages over data since the last `reset`; waits for the device."""
        *sums, rows = self.sums.tolist()
        return {name: total / max(rows, 1.0) for name, total in zip(PARTS, sums, strict=True)}

    def recover(self, step: int) -> None:
        """Makes itself ready to go on at ``step``, after a failure."""
        self.failed.zero_()
        self.failed_at.fill_(-1)
        self.bad_sites = self.bad_parameters = None
        if self.state is not None:
            self.state.set_step(step)

    def reset(self) -> None:
        """Starts new averages."""
        self.sums.zero_()

    def look(self, step: int) -> Failure | None:
        """Waits for the device and says whether a step has failed; ``step`` is the last one."""
        if not bool(self.failed):
            return None
        at = int(self.failed_at)
        for state in self.optimizer.state.values():  # counters on the host couldn't be masked
            count = None if self.is_fused else state.get("step")
            if isinstance(count, Tensor) and count.device != self.failed.device:
                count -= step - at + 1
        sites = [] if self.bad_sites is None else self.bad_sites.tolist()
        parameters = [] if self.bad_parameters is None else self.bad_parameters.tolist()
        return Failure(
            at,
            tuple(dict.fromkeys(n for n, bad in zip(self.site_names, sites, strict=False) if bad)),
            tuple(n for n, bad in zip(self.with_grad, parameters, strict=False) if bad),
        )

    def _backward(self, batch: tuple[Tensor, ...]) -> tuple[list[Tensor], int]:
        """Gradients of the loss per datum; returns what was measured per datum, and how many."""
        if not isinstance(self.objective, Objective):
            return self._backward_of_pyro(batch)
        assert self.state is not None  # noqa: S101
        terms = self.objective.compute_terms(self.model, self.guide, batch, self.structure)
        divisor = self.structure.divisor(terms.num_rows)
        loss = self.objective.surrogate(terms, self.state) / divisor
        loss.backward()
        with torch.no_grad():
            self._note_sites(terms)
            elbo, likelihood = terms.elbo_per_datum()
            self.has_penalties = any(s.kind == "penalty" for s in terms.sites.values())
            penalty = -terms.scaled("penalty").mean() / divisor
            return [loss.detach(), elbo, likelihood, likelihood - elbo, penalty], terms.num_rows

    def _backward_of_pyro(self, batch: tuple[Tensor, ...]) -> tuple[list[Tensor], int]:
        rows = self.structure.subsample_size or len(batch[0])
        divisor = self.structure.divisor(rows)
        if hasattr(self.objective, "differentiable_loss"):
            loss = self.objective.differentiable_loss(self.model, self.guide, *batch) / divisor
            loss.backward()
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
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], divisor)
        loss = loss.detach().to(self.sums.device)
        unknown = torch.full_like(loss, float("nan"))
        return [loss, unknown, unknown, unknown, unknown], rows

    def _gradient_norm(self) -> Tensor:
        names = [n for n, p in self.structure.parameters.items() if p.grad is not None]
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if not grads:
            raise ArgumentError(
                "pair",
                "a loss that depends on its parameters",
                "no parameter with a gradient",
                ["does the guide sample from a distribution made of its parameters?"],
            )
        if any(g.is_sparse for g in grads):
            sparse = [n for n, g in zip(names, grads, strict=True) if g.is_sparse]
            raise ArgumentError(
                "pair",
                "dense gradients",
                f"sparse ones, of {', '.join(sparse)}",
                ["nn.Embedding(..., sparse=False)"],
            )
        self.with_grad = names
        norms = torch.stack(torch._foreach_norm(grads))
        bad = ~norms.isfinite()
        self.bad_parameters = self._first_bad(self.bad_parameters, bad)
        return torch.linalg.vector_norm(norms)

    def _note_sites(self, terms: t.Terms) -> None:
        names, sums = [], []
        for name, site in terms.sites.items():
            for part in (site.scaled_log_p, site.scaled_log_q):
                if part is not None:
                    names.append(name)
                    sums.append(part.sum())
        bad = ~torch.stack(sums).isfinite()
        self.bad_sites = self._first_bad(self.bad_sites, bad)
        self.site_names = tuple(names)

    def _first_bad(self, known: Tensor | None, bad: Tensor) -> Tensor:
        """What was bad at the first failure, once there was one."""
        if known is None or known.shape != bad.shape:
            return bad
        return torch.where(self.failed, known, bad)

    def _note_failure(self, finite: Tensor, step: int) -> None:
        first = ~finite & ~self.failed
        self.failed_at = torch.where(first, step, self.failed_at)

    def _update(self, ok: Tensor) -> None:
        """The optimiser's step where ``ok``, and nothing where not."""
        optimizer: Any = self.optimizer
        if self.is_fused:
            optimizer.found_inf = (~ok).to(torch.float32)
            optimizer.step()
        elif ok.device.type == "cpu":  # nothing to wait for
            if bool(ok):
                optimizer.step()
        else:
            states = optimizer.state.values()
            tensors = [v for s in states for v in s.values() if isinstance(v, Tensor)]
            backup = _Backup([*self.parameters, *(v for v in tensors if v.device == ok.device)])
            optimizer.step()
            backup.restore_unless(ok)


class _Backup:
    """Copies of tensors, to be put back where a step turns out to have failed."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.copies = [tensor.detach().clone() for tensor in tensors]

    def restore_unless(self, ok: Tensor) -> None:
        """Puts the copies back where not ``ok``."""
        if ok.device.type == "cpu" and bool(ok):  # nothing to wait for
            return
        with torch.no_grad():
            for tensor, copy in zip(self.tensors, self.copies, strict=True):
                tensor.copy_(torch.where(ok, tensor, copy))
