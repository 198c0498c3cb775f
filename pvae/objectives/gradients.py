"""Other estimators of gradients: with less variance, or for draws that have none."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

import torch
from torch import Tensor

from pvae.objectives.base import Objective, TwoLosses
from pvae.objectives.settings import Weight
from pvae.objectives.state import ObjectiveState
from pvae.objectives.weighted import log_mean_exp, log_weights
from pvae.terms import Terms

__all__ = ["RWS", "STL", "TVO", "VIMCO"]


@dataclass(frozen=True)
class STL(Objective):
    r"""The evidence lower bound with a gradient that is exact at an exact guide.

    .. math::
        \nabla L = E\big[\nabla\big(\log p(x, z) - \beta \log \mathrm{sg}[q](z | x)\big)\big],
        \qquad z \sim q(z | x) \text{ reparametrised}

    Of the gradient of log q only the way through z is kept ("sticking the landing"). What is left
    out, the score function, has mean 0, and is all the variance where q is the posterior. It is
    the guide's parameters that are stopped, so that several latents and flows are right, too.

    References:
        Sticking the Landing (Roeder et al., 2017), https://arxiv.org/abs/1703.09194

    Arguments:
        beta: Weight of the rate, a number or a schedule.
        options: As in `Objective`.
    """

    needs = ("density", "gradient", "unscaled", "local")
    estimator = "pathwise, without the score function"
    pass_options = ("stop_guide",)

    _: KW_ONLY
    beta: Weight = 1.0

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        beta = self.value_at("beta", state)
        if self.beta == 1.0:
            return -self.total(terms, state, log_weights(terms).mean(0))
        assert terms.stopped_log_q is not None  # noqa: S101
        rate = terms.stopped_log_q - terms.log_prior
        return -self.total(terms, state, (terms.log_likelihood - beta * rate).mean(0))


@dataclass(frozen=True)
class VIMCO(Objective):
    r"""The importance-weighted bound for latents that can't be reparametrised.

    .. math::
        \nabla L_K = E\Big[\sum_k (\hat L - \hat L_{-k})\, \nabla \log q(z_k | x)
            + \sum_k \bar w_k \nabla \log w_k\Big]

    The signal of a draw is what it adds: :math:`\hat L_{-k}` is the bound with the geometric mean
    of the other weights in the place of its own.

    References:
        Variational Inference for Monte Carlo Objectives (Mnih & Rezende, 2016),
        https://arxiv.org/abs/1602.06725

    Arguments:
        num_particles: K, at least 2.
        options: As in `Objective`.
    """

    needs = ("density", "unscaled", "local")
    estimator = "score function, leave-one-out"
    pass_options = ("detach",)

    num_particles: Annotated[int, {"minimum": 2}] = 5

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        log_weight = terms.log_weight
        fixed = log_weight.detach()
        value, k = log_mean_exp(fixed), len(fixed)
        others = (fixed.sum(0) - fixed) / (k - 1)
        own = torch.eye(k, dtype=torch.bool, device=fixed.device)[..., None]
        replaced = torch.where(own, others[:, None], fixed[None])  # (K left out, K, N)
        signal = value - log_mean_exp(replaced.transpose(0, 1))
        score = (signal * terms.log_q).sum(0) + (fixed.softmax(0) * log_weight).sum(0)
        return -self.total(terms, state, value + score - score.detach())


@dataclass(frozen=True)
class RWS(TwoLosses):
    r"""Reweighted wake-sleep: the guide learns from weighted draws, not from a bound.

    .. math::
        \nabla_p = \sum_k \bar w_k \nabla \log p(x, z_k), \qquad
        \nabla_q = \sum_k \bar w_k \nabla \log q(z_k | x)

    The model's gradient is that of the importance-weighted bound. The guide's makes
    :math:`KL(p(z | x) \| q(z | x))` smaller, the other direction of the divergence, with a bias of
    order 1/K (the "wake" update; what the guide learns from dreams needs data drawn from the
    model, which a pair doesn't say where to put). No draw has to be reparametrised. There is no
    single loss: the value is minus the bound.

    References:
        Reweighted Wake-Sleep (Bornschein & Bengio, 2015), https://arxiv.org/abs/1406.2751
    """

    estimator = "self-normalised weights, two losses"
    pass_options = ("detach",)

    num_particles: int = 5

    def losses(self, terms: Terms, state: ObjectiveState) -> tuple[Tensor, Tensor, Tensor]:
        """Minus the bound, twice, and minus the weighted log q."""
        weight = terms.log_weight.detach().softmax(0)
        loss = -self.total(terms, state, log_mean_exp(terms.log_weight))
        return loss, loss, -self.total(terms, state, (weight * terms.log_q).sum(0))


@dataclass(frozen=True)
class TVO(Objective):
    r"""The thermodynamic variational objective: a lower Riemann sum of the evidence.

    .. math::
        \log p(x) = \int_0^1 E_{\pi_\beta}[\log w]\, d\beta \ge
            \sum_{j=0}^{J-1} (\beta_{j+1} - \beta_j)\, E_{\pi_{\beta_j}}[\log w],
        \qquad \pi_\beta \propto p(x, z)^\beta\, q(z | x)^{1 - \beta}

    :math:`J = 1` is the evidence lower bound. Expectations are by self-normalised weights
    :math:`w^\beta`, so that the bound holds as K grows; gradients are by covariances (divided by
    :math:`1 - 1/K`, so that they are unbiased at :math:`\beta = 0`), and no draw has to be
    reparametrised.

    References:
        The Thermodynamic Variational Objective (Masrani et al., 2019),
        https://arxiv.org/abs/1907.00031

    Arguments:
        num_particles: K, at least 2.
        num_partitions: J; the inner points are spread evenly in their logarithms.
        first: :math:`\beta_1`, the least of the inner points.
        options: As in `Objective`.
    """

    needs = ("density", "unscaled", "local")
    estimator = "covariances"
    pass_options = ("detach",)

    num_particles: Annotated[int, {"minimum": 2}] = 10
    _: KW_ONLY
    num_partitions: Annotated[int, {"minimum": 1}] = 5
    first: Annotated[float, {"above": 0, "below": 1}] = 0.03

    @property
    def partition(self) -> list[float]:
        """The points, from 0 to 1."""
        inner = self.num_partitions - 1
        return [0.0, *(self.first ** (1 - i / inner) for i in range(inner)), 1.0]

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        points = torch.stack([terms.like.new_full((), point) for point in self.partition])
        beta, width = points[:-1, None, None], points.diff()[:, None]
        log_weight = terms.log_weight
        fixed = log_weight.detach()
        weight = (beta * fixed).softmax(1)  # (J, K, N)
        mean = (weight * fixed).sum(1)
        log_path = beta * terms.log_joint + (1 - beta) * terms.log_q
        covariance = (weight * (fixed - mean[:, None]) * log_path).sum(1)
        covariance = covariance * (terms.num_particles / (terms.num_particles - 1))
        score = (width * ((weight * log_weight).sum(1) + covariance)).sum(0)
        return -self.total(terms, state, (width * mean).sum(0) + score - score.detach())
