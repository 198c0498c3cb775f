"""An upper bound, to fit a guide that covers the posterior."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from pvae import terms as t
from pvae.errors import ArgumentError, check_number
from pvae.objectives.base import ObjectiveState
from pvae.objectives.two_losses import TwoLosses
from pvae.objectives.weighted import log_mean_exp

__all__ = ["CUBO"]


class CUBO(TwoLosses):
    r"""The chi upper bound, which the guide makes smaller; the model has the lower bound.

    .. math::
        \log p(x) \le C_n = \frac1n \log E_q[w^n], \qquad
        \nabla_q E_q[w^n] = (1 - n)\, E_q[w^n \nabla \log q(z | x)]

    Its guide covers the posterior where `ELBO`'s stays inside. Of K draws, the logarithm is biased
    down, and by much where weights vary: no bound. ``form="exp"`` is unbiased, in value and
    gradient, but it isn't in nats, overflows unless ``reference`` is near log p(x), and counts
    rows that are masked out. Gradients are by the score function (self-normalised in the
    logarithm): the way through the draws would lower the estimate by taking them where weights
    are small. The model learns by the importance-weighted bound of the same draws, as an upper
    bound can't be maximised.

    References:
        Variational Inference via Chi Upper Bound Minimization (Dieng et al., 2017),
        https://arxiv.org/abs/1611.00328

    Arguments:
        num_particles: K.
        order: n, above 1.
        form: ``"log"``, the value in nats, biased down; ``"exp"``, unbiased.
        reference: c, in nats: with ``form="exp"`` the loss of a datum is
            :math:`E[\exp(n (\log w - c))]`.
        shared: Whose loss moves parameters that model and guide share: ``"model"``, ``"guide"``,
            or None to refuse them.
        options: As in `IWAE`.
    """

    needs = ("density", "unscaled", "local")
    bound = "upper"
    estimator = "score function, two losses"
    pass_options = MappingProxyType({"detach": True})
    source = "Dieng et al. 2017, https://arxiv.org/abs/1611.00328"

    def __init__(
        self,
        num_particles: int = 10,
        order: float = 2.0,
        form: Literal["log", "exp"] = "log",
        reference: float = 0.0,
        **options: Any,
    ) -> None:
        self.order = check_number("order", order, above=1)
        if form not in ("log", "exp"):
            raise ArgumentError("form", "'log' or 'exp'", repr(form))
        self.form, self.reference = form, check_number("reference", reference)
        super().__init__(num_particles, **options)

    def losses(self, terms: t.Terms, state: ObjectiveState) -> tuple[Tensor, Tensor, Tensor]:
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
