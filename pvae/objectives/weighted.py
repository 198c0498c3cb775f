"""Importance-weighted bounds, which several draws of each datum make tighter."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from pvae import terms as t
from pvae.errors import ArgumentError, check_int, check_number
from pvae.objectives.base import Objective, ObjectiveState
from pvae.objectives.two_losses import TwoLosses

__all__ = ["CIWAE", "IWAE", "PIWAE", "DReG", "MultiplyWeightedIWAE", "Renyi"]


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """Over the first axis."""
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def mean_of_bounds(log_weight: Tensor, num_means: int) -> Tensor:
    """The mean over groups of draws of their log mean weight, ``(M K, N)`` to ``(N,)``."""
    groups = log_weight.unflatten(0, (num_means, -1))
    return log_mean_exp(groups.transpose(0, 1)).mean(0)


def log_weights(terms: t.Terms) -> Tensor:
    """log p(x, z) - log q(z | x), with the guide's parameters stopped in q where they are."""
    log_q = terms.log_q if terms.stopped_log_q is None else terms.stopped_log_q
    return terms.log_joint - log_q


class _Weighted(Objective):
    """The abstract bound that is a function of each datum's weights: define `bound_of`."""

    needs = ("density", "gradient", "unscaled", "own draws")
    pass_options = MappingProxyType({"share_globals": True})

    def bound_of(self, log_weight: Tensor) -> Tensor:
        """From log weights, shape ``(K, N)``, to the bound of each datum, ``(N,)``."""
        raise NotImplementedError

    def surrogate(self, terms: t.Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        return -self.total(terms, state, self.bound_of(terms.log_weight))


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

    Arguments:
        num_particles: K.
        options: ``penalty_weight``, ``vectorize_particles``, ``plate``, as in `ELBO`.

    Example:
        >>> IWAE(50)
        IWAE(num_particles=50)
    """

    source = "Burda et al. 2016, https://arxiv.org/abs/1509.00519"

    def __init__(self, num_particles: int = 5, **options: Any) -> None:
        super().__init__(num_particles, **options)

    def bound_of(self, log_weight: Tensor) -> Tensor:
        """The log mean weight."""
        return log_mean_exp(log_weight)


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
        num_means: M.
        num_particles: K.
        options: As in `IWAE`.

    Example:
        >>> MultiplyWeightedIWAE(8, 4)
        MultiplyWeightedIWAE(num_means=8, num_particles=4)
    """

    source = "Rainforth et al. 2018, https://arxiv.org/abs/1802.04537"

    def __init__(self, num_means: int = 4, num_particles: int = 2, **options: Any) -> None:
        self.num_means = check_int("num_means", num_means)
        self.draws_each = check_int("num_particles", num_particles)
        super().__init__(num_means * num_particles, **options)

    def _shown(self, name: str) -> object:
        return self.draws_each if name == "num_particles" else super()._shown(name)

    def bound_of(self, log_weight: Tensor) -> Tensor:
        """The mean over M of the log mean over K."""
        return mean_of_bounds(log_weight, self.num_means)


class CIWAE(_Weighted):
    r"""Between the evidence lower bound and the importance-weighted one, of the same K draws.

    .. math:: L = \beta\, L_1 + (1 - \beta)\, L_K

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
        https://arxiv.org/abs/1802.04537

    Arguments:
        num_particles: K.
        mix: :math:`\beta`, from 0 (`IWAE`) to 1 (`ELBO`).
        options: As in `IWAE`.

    Example:
        >>> CIWAE(8, mix=0.2)
        CIWAE(num_particles=8, mix=0.2)
    """

    source = "Rainforth et al. 2018, https://arxiv.org/abs/1802.04537"

    def __init__(self, num_particles: int = 5, mix: float = 0.5, **options: Any) -> None:
        self.mix = check_number("mix", mix, minimum=0)
        if self.mix > 1:
            raise ArgumentError("mix", "a number from 0 to 1", f"{mix}")
        super().__init__(num_particles, **options)

    def bound_of(self, log_weight: Tensor) -> Tensor:
        """The mixture of both bounds."""
        return self.mix * log_weight.mean(0) + (1 - self.mix) * log_mean_exp(log_weight)


class Renyi(_Weighted):
    r"""The variational Renyi bound, estimated with K draws of each datum.

    .. math::
        L_\alpha = \frac{1}{1 - \alpha}
            \log \frac1K \sum_{k=1}^K w_k^{1 - \alpha}

    :math:`\alpha = 1` is the evidence lower bound, 0 is `IWAE`, and more than 1 is below both and
    makes the guide narrower. Below 0 the exact quantity is an upper bound, but its estimate is
    biased down, so that it bounds nothing.

    References:
        Renyi Divergence Variational Inference (Li & Turner, 2016),
        https://arxiv.org/abs/1602.02311

    Arguments:
        alpha: The order.
        num_particles: K.
        options: As in `IWAE`.

    Example:
        >>> Renyi(0.5, num_particles=10).bound, Renyi(-1.0).bound
        ('lower', 'none')
    """

    source = "Li & Turner 2016, https://arxiv.org/abs/1602.02311"

    def __init__(self, alpha: float = 0.5, num_particles: int = 5, **options: Any) -> None:
        self.alpha = check_number("alpha", alpha)
        super().__init__(num_particles, **options)

    @property
    def bound(self) -> Literal["lower", "upper", "none"]:  # type: ignore[override]
        """A lower bound from order 0 on."""
        return "lower" if self.alpha >= 0 else "none"

    def bound_of(self, log_weight: Tensor) -> Tensor:
        """The power mean of the weights, on the logarithmic scale."""
        if self.alpha == 1:
            return log_weight.mean(0)
        return log_mean_exp((1 - self.alpha) * log_weight) / (1 - self.alpha)


class PIWAE(TwoLosses):
    r"""The model by the bound of M K draws, the guide by M bounds of K draws each.

    The tightest bound for :math:`p`, and for :math:`q` one whose gradient is less noisy. There is
    no single loss: the value is minus the bound of M K draws, and the gradients are of two.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
        https://arxiv.org/abs/1802.04537

    Arguments:
        num_means: M.
        num_particles: K.
        shared: Whose loss moves parameters that model and guide share: ``"model"``, ``"guide"``,
            or None to refuse them.
        options: As in `IWAE`.
    """

    needs = ("density", "gradient", "unscaled", "local")
    estimator = "pathwise, two losses"
    source = "Rainforth et al. 2018, https://arxiv.org/abs/1802.04537"

    def __init__(
        self,
        num_means: int = 4,
        num_particles: int = 2,
        **options: Any,
    ) -> None:
        self.num_means = check_int("num_means", num_means)
        self.draws_each = check_int("num_particles", num_particles)
        super().__init__(num_means * num_particles, **options)

    def _shown(self, name: str) -> object:
        return self.draws_each if name == "num_particles" else super()._shown(name)

    def losses(self, terms: t.Terms, state: ObjectiveState) -> tuple[Tensor, Tensor, Tensor]:
        """Minus the bound of all draws, twice, and minus the mean of the others."""
        loss = -self.total(terms, state, log_mean_exp(terms.log_weight))
        means = mean_of_bounds(terms.log_weight, self.num_means)
        return loss, loss, -self.total(terms, state, means)


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

    Arguments:
        num_particles: K.
        shared: Whose loss moves parameters that model and guide share: ``"model"``, ``"guide"``,
            or None to refuse them.
        options: As in `IWAE`.
    """

    needs = ("density", "gradient", "unscaled", "local")
    estimator = "doubly reparametrised, two losses"
    source = "Tucker et al. 2019, https://arxiv.org/abs/1810.04152"
    pass_options = MappingProxyType({"stop_guide": True})

    def __init__(self, num_particles: int = 5, **options: Any) -> None:
        super().__init__(num_particles, **options)

    def losses(self, terms: t.Terms, state: ObjectiveState) -> tuple[Tensor, Tensor, Tensor]:
        """Minus the bound, twice, and what has its doubly reparametrised gradient."""
        log_weight = log_weights(terms)
        weight = log_weight.detach().softmax(0)
        loss = -self.total(terms, state, log_mean_exp(terms.log_weight))
        return loss, loss, -self.total(terms, state, (weight.square() * log_weight).sum(0))
