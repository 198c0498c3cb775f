"""The evidence lower bound."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO
from pyro.infer.util import MultiFrameTensor, get_plate_stacks
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pvae.distributions import log_density_of_delta
from pvae.errors import ArgumentError, PairError, check_int, oxford
from pvae.objectives.base import Objective
from pvae.objectives.refusals import check_needs
from pvae.objectives.settings import Weight
from pvae.objectives.state import MovingAverage, ObjectiveState, Training
from pvae.pair import Structure, is_penalty
from pvae.terms import Terms, compute
from pvae.types import Site

__all__ = ["ELBO", "as_objective"]


@dataclass(frozen=True)
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
        beta: Weight of the rate; a number, or a schedule such as
            ``schedules.Warmup(10, "epochs")``. Where it isn't 1 the loss isn't the ELBO; the ELBO
            is logged beside it.
        analytic_kl: The rate of a site in closed form where torch knows it, as in Pyro's
            ``TraceMeanField_ELBO``; others are sampled. Less noise, the same expectation.
        baseline: What is subtracted from the signal of score-function gradients, datum by datum:
            ``"leave_one_out"``, the mean over the other particles; ``"moving_average"``, over
            earlier steps; None for Pyro's way, without any.
        states: What becomes of discrete sites that the guide marks with ``infer={"enumerate":
            "parallel"}``: ``"averaged"``, the expectation over their states is exact, as in
            Pyro's ``TraceEnum_ELBO``; ``"drawn"``, as in its ``Trace_ELBO``.
        options: As in `Objective`; ``penalty_weight`` is c.

    Example:
        >>> from pvae.schedules import Warmup
        >>> ELBO(beta=Warmup(10, "epochs"))
        ELBO(beta=Warmup(length=10, unit='epochs', start=0.0, end=1.0))
    """

    estimator = "pathwise, or score function where a site has no other"

    _: KW_ONLY
    beta: Weight = 1.0
    analytic_kl: bool = False
    baseline: Literal["leave_one_out", "moving_average", None] = None
    states: Literal["averaged", "drawn"] = "averaged"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline == "leave_one_out":
            check_int(f"num_particles with baseline='{self.baseline}'", self.num_particles, 2)

    @property
    def refuses_batches(self) -> bool:
        """With the closed form, or a weight on the rate."""
        return self.analytic_kl or self.beta != 1.0

    def check(self, structure: Structure) -> None:
        """Also refuses pairs for which these options aren't defined."""
        super().check(structure)
        drawn = [n for n in structure.not_reparametrised if n not in structure.guide_states]
        if self.states == "averaged" and structure.guide_states and drawn:
            expected = (
                f"a mark for all discrete sites of the guide, as {oxford(structure.guide_states)}"
            )
            fixes = ["objectives.ELBO(states='drawn')", "objective=pyro.infer.TraceEnum_ELBO()"]
            raise PairError("ELBO", expected, f"{oxford(drawn)} without one", fixes)
        if self.analytic_kl:
            check_needs("ELBO(analytic_kl=True)", structure, "gradient")
        if self.baseline is not None:
            check_needs(f"ELBO(baseline='{self.baseline}')", structure, "local", "unscaled")

    def new_state(self, training: Training) -> ObjectiveState:
        """With a moving average, if that is the baseline."""
        return (MovingAverage if self.baseline == "moving_average" else ObjectiveState)(training)

    def compute_terms(self, structure: Structure, batch: tuple[Tensor, ...]) -> Terms:
        """The terms that this objective needs."""
        k, vectorize = self.num_particles, self.vectorize_particles
        return compute(structure, batch, num_particles=k, vectorize=vectorize, states=self.states)

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        beta, factor = self.value_at("beta", state), self.value_at("penalty_weight", state)
        if self.beta != 1.0 and terms.is_joint:
            terms.require_split()
        rate = terms.scaled("q") - terms.scaled("prior")
        if self.analytic_kl:
            rate = rate + sum(map(_analytic_less_sampled, terms.passes)) / terms.num_particles
        value = terms.scaled("likelihood") - (rate if self.beta == 1.0 else beta * rate)
        if terms.has_penalties:
            value = value + factor * terms.scaled("penalty") + terms.scaled("training")
        loss = -value.mean()
        if self.baseline is not None:
            return loss - self._signal(terms, state, beta, factor)
        if any(_needs_score(p) for p in terms.passes):
            score = torch.stack([_score_function(p, beta, factor) for p in terms.passes]).sum()
            score = score / terms.num_particles
            return loss.detach() - (score - score.detach())
        return loss

    def _signal(
        self, terms: Terms, state: ObjectiveState, beta: Tensor | float, factor: Tensor | float
    ) -> Tensor:
        """The score function times the signal less its baseline; its value is 0."""
        score = terms.like.new_zeros(terms.num_particles, terms.num_rows)
        for name in terms.structure.not_reparametrised:
            site = terms.sites[name]
            if site.draws is not None:  # not averaged over
                assert site.log_q is not None  # noqa: S101
                score = score + site.log_q
        with torch.no_grad():
            signal = terms.log_joint - beta * terms.log_q
            if self.beta != 1.0:
                signal = signal + (beta - 1) * terms.log_prior
            for weight, beside in ((factor, terms.penalties), (1.0, terms.training)):
                for added in beside.values():
                    signal = signal + weight * (added if added.dim() == 2 else added[:, None])
            if isinstance(state, MovingAverage):
                advantage = signal - state.average
                state.measured = signal.mean() if score.requires_grad else None
            else:
                k = terms.num_particles
                advantage = signal - (signal.sum(0) - signal) / (k - 1)
        product = (advantage * score).sum() / terms.num_particles
        scale = terms.data_scale
        return scale * (product - product.detach())


def _analytic_less_sampled(terms: Terms) -> Tensor:
    """What the rate of a pass changes by, summed over particles, where it is in closed form."""
    of_guide, of_model = terms.guide_trace.nodes, terms.model_trace.nodes
    latents = [n for n, s in terms.sites.items() if s.kind == "latent" and s.guide is not None]
    order = [n for n in of_model if n in latents]
    if [n for n in of_guide if n in latents] != order:
        expected = "latents in the same order in model and guide, each given those before it"
        got = f"{', '.join(order)} in the model and {', '.join(latents)} in the guide"
        raise PairError("ELBO(analytic_kl=True)", expected, got, ["analytic_kl=False"])
    change = terms.like.new_zeros(())
    for name in latents:
        exact, site = _exact_rate(of_guide[name], of_model[name]), terms.sites[name]
        if exact is not None:
            assert site.scaled_log_q is not None  # noqa: S101
            assert site.scaled_log_p is not None  # noqa: S101
            change = change + exact - (site.scaled_log_q - site.scaled_log_p).sum()
    return change


def _exact_rate(q: Site, p: Site) -> Tensor | None:
    """The rate of a site, scaled and masked; None without a closed form or a common scale."""
    numbers = not isinstance(q["scale"], Tensor) and not isinstance(p["scale"], Tensor)
    same = q["scale"] is p["scale"] or (numbers and q["scale"] == p["scale"])
    if not same or q["mask"] is not p["mask"] or log_density_of_delta(q["fn"]) is not None:
        return None
    try:
        kl = torch.distributions.kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None
    return scale_and_mask(kl, scale=q["scale"], mask=q["mask"]).sum()


def _needs_score(terms: Terms) -> bool:
    """Whether a guide site can't be reparametrised."""
    drawn = [
        site for site in terms.sites.values() if site.guide is not None and site.draws is not None
    ]
    return not all(site.guide.has_rsample for site in drawn)


def _score_function(terms: Terms, beta: Tensor | float, factor: Tensor | float) -> Tensor:
    """The ELBO of one pass with score-function terms, as ``Trace_ELBO`` has it, summed over K.

    References:
        Automated Variational Inference in Probabilistic Programming (Wingate & Weber, 2013),
        https://arxiv.org/abs/1301.1299
        Black Box Variational Inference (Ranganath et al., 2014), https://arxiv.org/abs/1401.0118
    """
    if terms.structure.enumerated:
        expected = "a guide that can be reparametrised beside latents that the model sums out"
        names = ", ".join(terms.structure.enumerated)
        got = f"score-function sites in the guide, and enumerated {names}"
        raise PairError("ELBO", expected, got, ["objective=pyro.infer.TraceEnum_ELBO()"])
    model_trace = prune_subsample_sites(terms.model_trace)
    guide_trace = prune_subsample_sites(terms.guide_trace)
    model_trace.compute_log_prob()
    guide_trace.compute_score_parts()
    training = terms.training
    log_r, surrogate = MultiFrameTensor(), terms.like.new_zeros(())
    for name, stack in get_plate_stacks(model_trace).items():
        site = model_trace.nodes[name]
        weight = factor if is_penalty(site) else 1.0 if site["is_observed"] else beta
        log_r.add((stack, weight * site["log_prob"].detach()))
        surrogate = surrogate + weight * site["log_prob_sum"]
    scores = []
    for name, stack in get_plate_stacks(guide_trace).items():
        site = guide_trace.nodes[name]
        weight = factor if is_penalty(site) else 1.0 if name in training else beta
        if name not in training:  # as Pyro has it
            log_r.add((stack, -weight * site["log_prob"].detach()))
        _, score, entropy = site["score_parts"]
        if isinstance(entropy, Tensor):
            surrogate = surrogate - weight * entropy.sum()
        if isinstance(score, Tensor):
            scores.append((stack, score))
    return surrogate + sum((log_r.sum_to(stack) * score).sum() for stack, score in scores)


def as_objective(objective: PyroELBO | None) -> PyroELBO:
    """Exactly ``Trace_ELBO`` runs as our own ELBO: the same numbers, and the parts logged."""
    if objective is None:
        return ELBO()
    if type(objective) is Trace_ELBO:
        vectorize = True if objective.vectorize_particles else None
        return ELBO(objective.num_particles, states="drawn", vectorize_particles=vectorize)
    if not isinstance(objective, PyroELBO):
        expected = "an instance of one of pyro.infer's ELBOs or of pvae.objectives"
        fixes = ["objectives.ELBO(beta=0.5)", "pyro.infer.TraceMeanField_ELBO()"]
        raise ArgumentError("objective", expected, repr(objective), fixes)
    return objective
