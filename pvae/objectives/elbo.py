"""The evidence lower bound."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO
from pyro.infer.util import MultiFrameTensor, get_plate_stacks
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pvae import terms as t
from pvae.distributions import log_density_of_delta
from pvae.errors import ArgumentError, PairError, check_int
from pvae.objectives.base import (
    MovingAverage,
    Objective,
    ObjectiveState,
    as_weight,
)
from pvae.objectives.refusals import REFUSALS
from pvae.pair.messages import is_penalty
from pvae.schedules import Constant, Schedule

__all__ = ["ELBO", "as_objective"]


class ELBO(Objective):
    r"""The evidence lower bound, with a weight on its rate, less the pair's penalties.

    .. math::
        L = E_q[\log p(x | z)] - \beta\, E_q[\log q(z | x) - \log p(z)] - c \sum_j \lambda_j R_j

    With :math:`\beta = 1` the numbers and gradients are those of ``pyro.infer.Trace_ELBO``: sites
    that can be reparametrised get pathwise gradients, others score-function gradients with Pyro's
    Rao-Blackwellisation; ``fn.has_rsample_(False)`` makes a site one of the latter. Unlike it,
    nothing here waits for the device, and the parts are logged.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), https://arxiv.org/abs/1312.6114
        beta-VAE (Higgins et al., 2017), https://openreview.net/forum?id=Sy2fzU9gl
        Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool et al., 2019),
        https://openreview.net/forum?id=r1lgTGL5DE

    Arguments:
        num_particles: K, draws from the guide for each datum.
        beta: Weight of the rate; a number, or a schedule such as
            ``schedules.Warmup(10, "epochs")``. Where it isn't 1 the loss isn't the ELBO; the ELBO
            is logged beside it.
        penalty_weight: c, a factor on all penalties, a number or a schedule.
        analytic_kl: The rate of a site in closed form where torch knows it, as in Pyro's
            ``TraceMeanField_ELBO``; others are sampled. Less noise, the same expectation.
        baseline: What is subtracted from the signal of score-function gradients, datum by datum:
            ``"leave_one_out"``, the mean over the other particles; ``"moving_average"``, over
            earlier steps; None for Pyro's way, without any.
        vectorize_particles: Whether particles go through the networks at once; None to find out.
        plate: Name of the data plate, where the batch's length doesn't tell.

    Example:
        >>> from pvae.schedules import Warmup
        >>> ELBO(beta=Warmup(10, "epochs"))
        ELBO(beta=Warmup(length=10, unit='epochs', start=0.0, end=1.0))
    """

    estimator = "pathwise, or score function where a site has no other"
    source = "Kingma & Welling 2014, https://arxiv.org/abs/1312.6114"

    def __init__(
        self,
        num_particles: int = 1,
        beta: float | Schedule = 1.0,
        penalty_weight: float | Schedule = 1.0,
        *,
        analytic_kl: bool = False,
        baseline: Literal["leave_one_out", "moving_average"] | None = None,
        vectorize_particles: bool | None = None,
        plate: str | None = None,
    ) -> None:
        self.beta = as_weight("beta", beta)
        self.analytic_kl, self.baseline = analytic_kl, baseline
        if not isinstance(analytic_kl, bool):
            raise ArgumentError("analytic_kl", "True or False", repr(analytic_kl))
        if baseline not in (None, "leave_one_out", "moving_average"):
            raise ArgumentError(
                "baseline", "'leave_one_out', 'moving_average' or None", repr(baseline)
            )
        if baseline == "leave_one_out":
            check_int("num_particles with baseline='leave_one_out'", num_particles, minimum=2)
        super().__init__(
            num_particles,
            penalty_weight=penalty_weight,
            vectorize_particles=vectorize_particles,
            plate=plate,
        )

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Those of the two weights."""
        return {"beta": self.beta, **super().schedules}

    @property
    def refuses_batches(self) -> bool:
        """With the closed form, or a weight on the rate."""
        return self.analytic_kl or self.beta != Constant(1.0)

    def check(self, structure: t.Structure) -> None:
        """Refuses pairs for which these options aren't defined."""
        if self.analytic_kl:
            REFUSALS["gradient"]("ELBO(analytic_kl=True)", structure)
        if self.baseline is not None:
            REFUSALS["local"](f"ELBO(baseline='{self.baseline}')", structure)
            REFUSALS["unscaled"](f"ELBO(baseline='{self.baseline}')", structure)

    def new_state(self, *base: Any) -> ObjectiveState:
        """With a moving average, if that is the baseline."""
        if self.baseline == "moving_average":
            return MovingAverage(0.9, *base)
        return super().new_state(*base)

    def surrogate(self, terms: t.Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        beta, factor = self.value_at("beta", state), self.value_at("penalty_weight", state)
        if self.beta != Constant(1.0) and terms.is_joint:
            terms.require_split()
        rate = terms.scaled("q") - terms.scaled("prior")
        if self.analytic_kl:
            rate = rate + sum(map(_analytic_less_sampled, terms.passes)) / terms.num_particles
        value = terms.scaled("likelihood") - (rate if isinstance(beta, float) else beta * rate)
        if terms.has_penalties:
            value = value + factor * terms.scaled("penalty")
        loss = -value.mean()
        if self.baseline is not None:
            return loss - self._signal(terms, state, beta, factor)
        if any(_needs_score(p) for p in terms.passes):
            score = torch.stack([_score_function(p, beta, factor) for p in terms.passes]).sum()
            score = score / terms.num_particles
            return loss.detach() - (score - score.detach())
        return loss

    def _signal(
        self, terms: t.Terms, state: ObjectiveState, beta: Tensor | float, factor: Tensor | float
    ) -> Tensor:
        """The score function times the signal less its baseline; its value is 0."""
        score = terms.like.new_zeros(terms.num_particles, terms.num_rows)
        for name in terms.structure.not_reparametrised:
            log_q = terms.sites[name].log_q
            assert log_q is not None  # noqa: S101
            score = score + log_q
        with torch.no_grad():
            signal = terms.log_joint - beta * terms.log_q + (beta - 1) * self._prior(terms, beta)
            for penalty in terms.penalties.values():
                signal = signal + factor * (penalty if penalty.dim() == 2 else penalty[:, None])
            if isinstance(state, MovingAverage):
                advantage = signal - state.average
                state.seen = signal.mean() if score.requires_grad else None
            else:
                k = terms.num_particles
                advantage = signal - (signal.sum(0) - signal) / (k - 1)
        product = (advantage * score).sum() / terms.num_particles
        scale = terms.data_scale
        return scale * (product - product.detach())

    @staticmethod
    def _prior(terms: t.Terms, beta: Tensor | float) -> Tensor | float:
        return 0.0 if isinstance(beta, float) else terms.log_prior


def _analytic_less_sampled(terms: t.Terms) -> Tensor:
    """What the rate of a pass changes by, summed over particles, where it is in closed form."""
    of_guide, of_model = terms.guide_trace.nodes, terms.model_trace.nodes
    latents = [n for n, s in terms.sites.items() if s.kind == "latent" and s.guide is not None]
    order = [n for n in of_model if n in latents]
    if [n for n in of_guide if n in latents] != order:
        raise PairError(
            "ELBO(analytic_kl=True)",
            "latents in the same order in model and guide, each given those before it",
            f"{', '.join(order)} in the model and {', '.join(latents)} in the guide",
            ["analytic_kl=False"],
        )
    change = terms.like.new_zeros(())
    for name in latents:
        q, p, site = of_guide[name], of_model[name], terms.sites[name]
        numbers = not isinstance(q["scale"], Tensor) and not isinstance(p["scale"], Tensor)
        same = q["scale"] is p["scale"] or (numbers and q["scale"] == p["scale"])
        try:
            kl = torch.distributions.kl_divergence(q["fn"], p["fn"])
        except NotImplementedError:
            continue
        if not same or q["mask"] is not p["mask"] or log_density_of_delta(q["fn"]) is not None:
            continue
        assert site.scaled_log_q is not None  # noqa: S101
        assert site.scaled_log_p is not None  # noqa: S101
        exact = scale_and_mask(kl, scale=q["scale"], mask=q["mask"]).sum()
        change = change + exact - (site.scaled_log_q - site.scaled_log_p).sum()
    return change


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
        weight = factor if is_penalty(site) else 1.0 if site["is_observed"] else beta
        log_r.add((stack, weight * site["log_prob"].detach()))
        surrogate = surrogate + weight * site["log_prob_sum"]
    for name, stack in guide_stacks.items():
        site = guide_trace.nodes[name]
        weight = factor if is_penalty(site) else beta
        log_r.add((stack, -weight * site["log_prob"].detach()))
    for name, stack in guide_stacks.items():
        site = guide_trace.nodes[name]
        weight = factor if is_penalty(site) else beta
        _, score, entropy = site["score_parts"]
        if isinstance(entropy, Tensor):
            surrogate = surrogate - weight * entropy.sum()
        if isinstance(score, Tensor):
            surrogate = surrogate + (log_r.sum_to(stack) * score).sum()
    return surrogate


def as_objective(objective: PyroELBO | None, plate: str | None = None) -> PyroELBO:
    """Exactly ``Trace_ELBO`` runs as our own ELBO: the same numbers, and the parts logged."""
    if objective is None:
        return ELBO(plate=plate)
    if type(objective) is Trace_ELBO:
        return ELBO(
            objective.num_particles,
            vectorize_particles=True if objective.vectorize_particles else None,
            plate=plate,
        )
    if not isinstance(objective, PyroELBO):
        raise ArgumentError(
            "objective",
            "an instance of one of pyro.infer's ELBOs or of pvae.objectives",
            repr(objective),
            ["objectives.ELBO(beta=0.5)", "pyro.infer.TraceMeanField_ELBO()"],
        )
    own = getattr(objective, "plate", None)
    if None not in (own, plate) and own != plate:
        raise ArgumentError(
            "plate", f"the objective's, '{own}'", repr(plate), ["one of the two arguments"]
        )
    return objective
