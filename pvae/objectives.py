"""Objectives: what to maximise, each a few lines over terms.

An objective is a ``pyro.infer.ELBO``, so it runs in Pyro's own ``SVI`` and returns what Pyro's
ELBOs return there: the plate-scaled sum in nats. `pvae.fit` divides by the number of data. Its
configuration can't be changed; what changes during training (the step of a schedule) lives in an
`ObjectiveState` made for one pair and one training, which a checkpoint saves.
"""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO as PyroELBO
from pyro.infer.util import MultiFrameTensor, get_plate_stacks
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pvae import terms as t
from pvae.errors import PairError, check_int, check_number
from pvae.schedules import Constant, Schedule, as_schedule

__all__ = ["ELBO", "Objective", "ObjectiveState"]


class ObjectiveState(nn.Module):
    """What an objective keeps during one training: the step, and the value of its schedules there.

    Schedules are evaluated on the host and kept as tensors, so that nothing has to be traced or
    compiled anew when they change.

    Arguments:
        schedules: By name, lengths in steps.
        like: A tensor of the pair, for device and dtype.
    """

    def __init__(self, schedules: dict[str, Schedule], like: Tensor) -> None:
        super().__init__()
        self.schedules, self.step = schedules, 0
        for name in schedules:
            self.register_buffer(name, torch.zeros((), dtype=like.dtype, device=like.device))
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


class Objective(PyroELBO):
    """The abstract objective over terms. To write one, define `surrogate`.

    Arguments:
        num_particles: K, draws from the guide for each datum.
        vectorize_particles: Whether they go through the networks at once; None to find out.
        plate: Name of the data plate, where the batch's length doesn't tell.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        vectorize_particles: bool | None = None,
        plate: str | None = None,
    ) -> None:
        super().__init__(num_particles=check_int("num_particles", num_particles))
        self.vectorize_particles = vectorize_particles
        self.plate = plate
        self._runs: dict[tuple[Any, Any], Any] = {}

    def __setattr__(self, name: str, value: object) -> None:
        if "_runs" in self.__dict__:
            raise AttributeError(f"an objective can't be changed; make a new one with {name}=...")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        names = inspect.signature(type(self)).parameters
        default = {n: p.default for n, p in names.items()}
        config = [
            f"{n}={value!r}"
            for n in names
            if (value := getattr(self, n)) != default[n] and value != Constant(1.0)
        ]
        return f"{type(self).__name__}({', '.join(config)})"

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Schedules by name; an objective without any has none."""
        return {}

    @abstractmethod
    def surrogate(self, terms: t.Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""

    def make_state(
        self, like: Tensor, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> ObjectiveState:
        """The state for one training; without lengths, for schedules that are in steps."""
        schedules = self.schedules
        if steps_per_epoch is not None and total_steps is not None:
            schedules = {
                name: s.resolve(steps_per_epoch, total_steps) for name, s in schedules.items()
            }
        return ObjectiveState(schedules, like)

    def compute_terms(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        batch: tuple[Tensor, ...],
        structure: t.Structure,
    ) -> t.Terms:
        """The terms that this objective needs."""
        return t.compute(
            model,
            guide,
            batch,
            structure=structure,
            num_particles=self.num_particles,
            vectorize=self.vectorize_particles,
        )

    # What Pyro's SVI, and the objective as a module, call

    def differentiable_loss(self, model: Any, guide: Any, *batch: Any, **kwargs: Any) -> Tensor:
        """The plate-scaled loss as a scalar to differentiate.

        Schedules advance by one step when it is differentiated, and by nothing else.
        """
        run = self._run_for(model, guide, batch, kwargs)
        loss = self.surrogate(self.compute_terms(*run.programs, batch, run.structure), run.state)
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
        if (model, guide) not in self._runs:
            structure = t.inspect_pair(*programs, batch, self.plate)
            like = next(iter(structure.parameters.values()), torch.zeros(()))
            self._runs[model, guide] = structure, self.make_state(like)
        return _Run(programs, *self._runs[model, guide])


@dataclass(frozen=True)
class _Run:
    """A pair outside `fit`: its programs with keyword arguments bound, structure and state."""

    programs: tuple[Callable[..., Any], Callable[..., Any]]
    structure: t.Structure
    state: ObjectiveState


def _bound(model: Any, guide: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    if not kwargs:
        return model, guide
    return functools.partial(model, **kwargs), functools.partial(guide, **kwargs)


class ELBO(Objective):
    r"""The evidence lower bound, with a weight on its rate, less the pair's penalties.

    .. math::
        L = E_q[\log p(x | z)] - \beta\, E_q[\log q(z | x) - \log p(z)] - c \sum_j \lambda_j R_j

    With :math:`\beta = 1` the numbers and gradients are those of ``pyro.infer.Trace_ELBO``: sites
    that can be reparametrised get pathwise gradients, others score-function gradients with Pyro's
    Rao-Blackwellisation. Unlike it, nothing here waits for the device, and the parts are logged.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), https://arxiv.org/abs/1312.6114
        beta-VAE (Higgins et al., 2017), https://openreview.net/forum?id=Sy2fzU9gl

    Arguments:
        num_particles: K, draws from the guide for each datum.
        beta: Weight of the rate; a number, or a schedule such as
            ``schedules.Warmup(10, "epochs")``. Where it isn't 1 the loss isn't the ELBO; the ELBO
            is logged beside it.
        penalty_weight: c, a factor on all penalties, a number or a schedule.
        vectorize_particles: Whether particles go through the networks at once; None to find out.
        plate: Name of the data plate, where the batch's length doesn't tell.

    Example:
        >>> from pvae.schedules import Warmup
        >>> ELBO(beta=Warmup(10, "epochs"))
        ELBO(beta=Warmup(length=10, unit='epochs', start=0.0, end=1.0))
    """

    def __init__(
        self,
        num_particles: int = 1,
        beta: float | Schedule = 1.0,
        penalty_weight: float | Schedule = 1.0,
        *,
        vectorize_particles: bool | None = None,
        plate: str | None = None,
    ) -> None:
        self.beta = _weight("beta", beta)
        self.penalty_weight = _weight("penalty_weight", penalty_weight)
        super().__init__(num_particles, vectorize_particles=vectorize_particles, plate=plate)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Those of the two weights."""
        return {"beta": self.beta, "penalty_weight": self.penalty_weight}

    def surrogate(self, terms: t.Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        beta, factor = self._now("beta", state), self._now("penalty_weight", state)
        if self.beta != Constant(1.0) and "joint" in terms.notes:
            terms.require_split()
        rate = terms.scaled("q") - terms.scaled("prior")
        loss = -(terms.scaled("likelihood") - beta * rate + factor * terms.scaled("penalty")).mean()
        if any(_needs_score(p) for p in terms.passes):
            score = torch.stack([_score_function(p, beta, factor) for p in terms.passes]).sum()
            score = score / terms.num_particles
            return loss.detach() - (score - score.detach())
        return loss

    def _now(self, name: str, state: ObjectiveState) -> Tensor | float:
        if getattr(self, name) == Constant(1.0):
            return 1.0
        return state.get_buffer(name).clone()  # it may advance during backward


def _weight(name: str, value: float | Schedule) -> Schedule:
    if not isinstance(value, Schedule):
        check_number(name, value, minimum=0)
    return as_schedule(name, value)


def _needs_score(terms: t.Terms) -> bool:
    """Whether a guide site can't be reparametrised."""
    return any(
        not site.guide.has_rsample for site in terms.sites.values() if site.guide is not None
    )


def _score_function(terms: t.Terms, beta: Tensor | float, factor: Tensor | float) -> Tensor:
    """The ELBO of one pass with score-function terms, as ``Trace_ELBO`` has it, summed over K.

    References:
        Automated Variational Inference in Probabilistic Programming (Wingate & Weber, 2013),
        https://arxiv.org/abs/1301.1299
        Black Box Variational Inference (Ranganath et al., 2014), https://arxiv.org/abs/1401.0118
    """
    if terms.structure.enumerated:
        raise PairError(
            "ELBO",
            "a guide that can be reparametrised beside latents that the model sums out",
            "score-function sites in the guide, and enumerated "
            + ", ".join(terms.structure.enumerated),
            ["objective=pyro.infer.TraceEnum_ELBO()"],
        )
    model_trace = prune_subsample_sites(terms.model_trace)
    guide_trace = prune_subsample_sites(terms.guide_trace)
    model_trace.compute_log_prob()
    guide_trace.compute_score_parts()
    model_stacks, guide_stacks = get_plate_stacks(model_trace), get_plate_stacks(guide_trace)
    log_r, surrogate = MultiFrameTensor(), terms.like.new_zeros(())
    for name, stack in model_stacks.items():
        site = model_trace.nodes[name]
        weight = factor if t.is_penalty(site) else 1.0 if site["is_observed"] else beta
        log_r.add((stack, weight * site["log_prob"].detach()))
        surrogate = surrogate + weight * site["log_prob_sum"]
    for name, stack in guide_stacks.items():
        site = guide_trace.nodes[name]
        weight = factor if t.is_penalty(site) else beta
        log_r.add((stack, -weight * site["log_prob"].detach()))
    for name, stack in guide_stacks.items():
        site = guide_trace.nodes[name]
        weight = factor if t.is_penalty(site) else beta
        _, score, entropy = site["score_parts"]
        if isinstance(entropy, Tensor):
            surrogate = surrogate - weight * entropy.sum()
        if isinstance(score, Tensor):
            surrogate = surrogate + (log_r.sum_to(stack) * score).sum()
    return surrogate
