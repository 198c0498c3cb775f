"""Importance-weighted bounds, which several draws of each datum make tighter."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from torch import Tensor

from pvae.objectives.base import Objective, TwoLosses
from pvae.objectives.state import ObjectiveState
from pvae.terms import Terms

__all__ = ["CIWAE", "CUBO", "IWAE", "PIWAE", "DReG", "MultiplyWeightedIWAE", "Renyi"]


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """Over the first axis."""
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def mean_of_bounds(log_weight: Tensor, num_means: int) -> Tensor:
    """The mean over groups of draws of their log mean weight, ``(M K, N)`` to ``(N,)``."""
    groups = log_weight.unflatten(0, (num_means, -1))
    return log_mean_exp(groups.transpose(0, 1)).mean(0)


def log_weights(terms: Terms) -> Tensor:
    """log p(x, z) - log q(z | x), with the guide's parameters stopped in q where they are."""
    log_q = terms.log_q if terms.stopped_log_q is None else terms.stopped_log_q
    return terms.log_joint - log_q


@dataclass(frozen=True)
class _Weighted(Objective):
    """The abstract bound that is a function of each datum's weights: define `bound_of`."""

    needs = ("density", "gradient", "unscaled", "own draws")
    pass_options = ("share_globals",)

    num_particles: int = 5

    def bound_of(self, log_weight: Tensor) -> Tensor:
        """From log weights, shape ``(K, N)``, to the bound of each datum, ``(N,)``."""
        raise NotImplementedError

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        return -self.total(terms, state, self.bound_of(terms.log_weight))


@dataclass(frozen=True)
class IWAE(_Weighted):
    r"""The importance-weighted bound with K draws of each datum.

    .. math::
        L_K = E\Big[\log \tfrac1K \sum_{k=1}^K w_k\Big], \qquad
        w_k = p(x, z_k) / q(z_k | x), \quad z_k \sim q(z | x)

    It doesn't fall as K grows, and goes to log p(x). The gradient of the guide gets noisier beside
    its mean as K grows: use a few draws, or `DReG`. With sites g outside the data plate it is
    :math:`E_{q(g)}[\log p(g) - \log q(g) + \tfrac NB \sum_n \log \tfrac1K \sum_k w_{nk}(g)]`,
    one draw of g for all: a bound for the data set.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Example:
        >>> IWAE(50)
        IWAE(num_particles=50)
    """

    def bound_of(self, log_weight: Tensor) -> Tensor:
        """The log mean weight."""
        return log_mean_exp(log_weight)


@dataclass(frozen=True)
class MultiplyWeightedIWAE(_Weighted):
    r"""The mean of M importance-weighted bounds with K draws each.

    .. math::
        L_{M,K} = \frac1M \sum_{m=1}^M \log \frac1K \sum_{k=1}^K w_{mk}

    The bound is that of `IWAE` with K draws; more M makes its gradient less noisy. (Rainforth et
    al. call it MIWAE, as Mattei & Frellsen call something else, for missing data.)

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
        https://arxiv.org/abs/1802.04537

    Arguments:
        num_means: M, each with ``num_particles`` = K draws.
        options: As in `Objective`.

    Example:
        >>> MultiplyWeightedIWAE(4, num_means=8)
        MultiplyWeightedIWAE(num_particles=4, num_means=8)
    """

    num_particles: int = 2
    _: KW_ONLY
    num_means: Annotated[int, {"minimum": 1}] = 4

    def bound_of(self, log_weight: Tensor) -> Tensor:
        """The mean over M of the log mean over K."""
        return mean_of_bounds(log_weight, self.num_means)


@dataclass(frozen=True)
class CIWAE(_Weighted):
    r"""Between the evidence lower bound and the importance-weighted one, of the same K draws.

    .. math:: L = \beta\, L_1 + (1 - \beta)\, L_K

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
        https://arxiv.org/abs/1802.04537

    Arguments:
        mix: :math:`\beta`, from 0 (`IWAE`) to 1 (`ELBO`).
        options: As in `Objective`.

    Example:
        >>> CIWAE(8, mix=0.2)
        CIWAE(num_particles=8, mix=0.2)
    """

    _: KW_ONLY
    mix: Annotated[float, {"minimum": 0, "maximum": 1}] = 0.5

    def bound_of(self, log_weight: Tensor) -> Tensor:
        """The mixture of both bounds."""
        return self.mix * log_weight.mean(0) + (1 - self.mix) * log_mean_exp(log_weight)


@dataclass(frozen=True)
class Renyi(_Weighted):
    r"""The variational Renyi bound, estimated with K draws of each datum.

    .. math::
        L_\alpha = \frac{1}{1 - \alpha}
            \log \frac1K \sum_{k=1}^K w_k^{1 - \alpha}

    :math:`\alpha = 1` is the evidence lower bound, 0 is `IWAE`, and more than 1 is below both and
    makes the guide narrower. Below 0 the exact quantity is an upper bound, but its estimate is
    biased down, so that it bounds nothing.

    References:
        Renyi Divergence Variational Inference (Li & Turner, 2016), https://arxiv.org/abs/1602.02311

    Arguments:
        alpha: The order.
        options: As in `Objective`.

    Example:
        >>> Renyi(10, alpha=0.5).bound, Renyi(alpha=-1.0).bound
        ('lower', 'none')
    """

    _: KW_ONLY
    alpha: float = 0.5

    @property
    def bound(self) -> Literal["lower", "upper", "none"]:  # type: ignore[override]
        """A lower bound from order 0 on."""
        return "lower" if self.alpha >= 0 else "none"

    def bound_of(self, log_weight: Tensor) -> Tensor:
        """The power mean of the weights, on the logarithmic scale."""
        if self.alpha == 1:
            return log_weight.mean(0)
        return log_mean_exp((1 - self.alpha) * log_weight) / (1 - self.alpha)


@dataclass(frozen=True)
class PIWAE(TwoLosses):
    r"""The model by the bound of M K draws, the guide by M bounds of K draws each.

    The tightest bound for :math:`p`, and for :math:`q` one whose gradient is less noisy. There is
    no single loss: the value is minus the bound of M K draws, and the gradients are of two.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
        https://arxiv.org/abs/1802.04537

    Arguments:
        num_means: M, each with ``num_particles`` = K draws.
        options: As in `TwoLosses`.
    """

    needs = ("density", "gradient", "unscaled", "local")
    estimator = "pathwise, two losses"

    num_particles: int = 2
    _: KW_ONLY
    num_means: Annotated[int, {"minimum": 1}] = 4

    def losses(self, terms: Terms, state: ObjectiveState) -> tuple[Tensor, Tensor, Tensor]:
        """Minus the bound of all draws, twice, and minus the mean of the others."""
        loss = -self.total(terms, state, log_mean_exp(terms.log_weight))
        means = mean_of_bounds(terms.log_weight, self.num_means)
        return loss, loss, -self.total(terms, state, means)


@dataclass(frozen=True)
class DReG(TwoLosses):
    r"""The importance-weighted bound, with a gradient of the guide that more draws make better.

    .. math::
        \nabla_q L_K = E\Big[\sum_k \bar w_k^2\,
            \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial q}\Big],
        \qquad \bar w_k = w_k / \textstyle\sum_j w_j

    The same expectation as `IWAE`'s, by reparametrising the score function; at an exact guide it
    has no variance. Inside log w the guide's parameters are stopped, so that only draws carry
    them. There is no single loss: the value is minus the bound, the model's gradient is the
    bound's, and the guide's is the above.

    References:
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al.,
        2019), https://arxiv.org/abs/1810.04152
    """

    needs = ("density", "gradient", "unscaled", "local")
    estimator = "doubly reparametrised, two losses"
    pass_options = ("stop_guide",)

    num_particles: int = 5

    def losses(self, terms: Terms, state: ObjectiveState) -> tuple[Tensor, Tensor, Tensor]:
        """Minus the bound, twice, and what has its doubly reparametrised gradient."""
        log_weight = log_weights(terms)
        weight = log_weight.detach().softmax(0)
        loss = -self.total(terms, state, log_mean_exp(terms.log_weight))
        return loss, loss, -self.total(terms, state, (weight.square() * log_weight).sum(0))


@dataclass(frozen=True)
class CUBO(TwoLosses):
    r"""The chi upper bound, which the guide makes smaller; the model has the lower bound.

    .. math::
        \log p(x) \le C_n = \frac1n \log E_q[w^n], \qquad
        \nabla_q E_q[w^n] = (1 - n)\, E_q[w^n \nabla \log q(z | x)]

    Its guide covers the posterior where `ELBO`'s stays inside. Of K draws, the logarithm is biased
    down, by much where weights vary: no bound. ``form="exp"`` is unbiased, but isn't in nats,
    overflows unless ``reference`` is near log p(x), and counts rows that are masked out. Gradients
    are by the score function: the way through the draws would lower the estimate by taking them
    where weights are small. The model learns by the importance-weighted bound of the same draws.

    References:
        Variational Inference via Chi Upper Bound Minimization (Dieng et al., 2017),
        https://arxiv.org/abs/1611.00328

    Arguments:
        order: n, above 1.
        form: ``"log"``, the value in nats, biased down; ``"exp"``, unbiased.
        reference: c, in nats: with ``form="exp"`` the loss of a datum is
            :math:`E[\exp(n (\log w - c))]`.
        options: As in `TwoLosses`.
    """

    bound = "upper"
    estimator = "score function, two losses"
    pass_options = ("detach",)

    num_particles: int = 10
    _: KW_ONLY
    order: Annotated[float, {"above": 1}] = 2.0
    form: Literal["log", "exp"] = "log"
    reference: float = 0.0

    def losses(self, terms: Terms, state: ObjectiveState) -> tuple[Tensor, Tensor, Tensor]:
        """The upper bound (in nats with ``form="log"``), minus the lower, and the guide's."""
        n, log_weight = self.order, terms.log_weight
        fixed = log_weight.detach()
        if self.form == "log":
            upper = log_mean_exp(n * fixed) / n
            score = (1 - n) / n * ((n * fixed).softmax(0) * terms.log_q).sum(0)
        else:
            power = (n * (fixed - self.reference)).exp()
            upper = power.mean(0)
            score = (1 - n) * (power * terms.log_q).mean(0)
        scale = terms.data_scale
        penalty = self.penalty(terms, state)
        lower = -self.total(terms, state, log_mean_exp(log_weight))
        return scale * upper.sum() - penalty, lower, scale * score.sum() - penalty
