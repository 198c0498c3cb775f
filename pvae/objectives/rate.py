r"""Control of the rate KL(q(z | x) || p(z)), beside its weight: floors, targets, constraints."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from pvae.distributions import log_density_of_delta
from pvae.errors import PairError
from pvae.objectives.base import Objective, PassOption
from pvae.objectives.settings import AtLeastZero, Positive, Weight
from pvae.objectives.state import MovingAverage, ObjectiveState, Training
from pvae.terms import Terms

__all__ = ["GECO", "Capacity", "FreeBits"]


@dataclass(frozen=True)
class FreeBits(Objective):
    r"""The evidence lower bound, with a floor under the rate that costs nothing to reach.

    .. math::
        L = E[\log p(x | z)] - \sum_j \max(\lambda, \overline{R}_j)

    :math:`\overline{R}_j` is the mean over the batch of the rate of one dimension, or of one site.
    Below the floor nothing pulls the posterior towards the prior. The value is at most the
    evidence lower bound.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        https://arxiv.org/abs/1606.04934

    Arguments:
        floor: :math:`\lambda`, in nats, for each dimension or site; a number or a schedule.
        per: ``"dimension"`` or ``"site"``.
        options: As in `Objective`.

    Example:
        >>> FreeBits(floor=0.25, per="site")
        FreeBits(floor=0.25, per='site')
    """

    needs = ("density", "gradient", "local", "unscaled", "split")
    couples_data = True

    _: KW_ONLY
    floor: Weight = 0.1
    per: Literal["dimension", "site"] = "dimension"

    @property
    def pass_options(self) -> tuple[PassOption, ...]:  # type: ignore[override]
        """Terms by dimension, if they are wanted."""
        return ("per_dimension",) if self.per == "dimension" else ()

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        rest = terms.log_q - terms.log_prior  # in the end, of auxiliary sites
        floored = terms.like.new_zeros(())
        floor = floored + self.value_at("floor", state)
        for site in terms.sites.values():
            if site.kind != "latent" or site.log_p is None or site.log_q is None:
                continue
            if log_density_of_delta(site.guide) is not None:
                got = "a Delta, set to what another site has drawn, as autoguides do"
                fixes = ["a guide of your own", "objectives.ELBO(beta=Warmup(...))"]
                where = f"FreeBits at site '{site.name}'"
                raise PairError(where, "a density of q at that site", got, fixes)
            rest = rest - (site.log_q - site.log_p)
            rate = (site.log_q - site.log_p).mean()
            if site.log_q_dims is not None and site.log_p_dims is not None:
                rate = (site.log_q_dims - site.log_p_dims).mean((0, 1))
            floored = floored + torch.maximum(rate, floor).sum()
        mean = terms.log_likelihood.mean() - rest.mean() - floored
        return -self.total(terms, state, mean)


@dataclass(frozen=True)
class Capacity(Objective):
    r"""The evidence lower bound, with the rate drawn to a target that grows.

    .. math::
        L = E[\log p(x | z)] - \gamma\, |\overline{R} - C|

    References:
        Understanding disentangling in beta-VAE (Burgess et al., 2018),
        https://arxiv.org/abs/1804.03599

    Arguments:
        capacity: C, in nats a datum; usually ``schedules.Warmup(length, end=25.0)``.
        gamma: :math:`\gamma`.
        options: As in `Objective`.
    """

    needs = ("density", "gradient", "local", "unscaled", "split")
    bound = "none"
    couples_data = True

    _: KW_ONLY
    capacity: Weight
    gamma: AtLeastZero = 100.0

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        rate = (terms.log_q - terms.log_prior).mean()
        off = (rate - self.value_at("capacity", state)).abs()
        return -self.total(terms, state, terms.log_likelihood.mean() - self.gamma * off)


class _Multiplier(MovingAverage):
    """A Lagrange multiplier that follows the average of its constraint."""

    log_multiplier: Tensor

    largest, limit = 0.01, 10.0  # change, and size, of the logarithm

    def __init__(self, training: Training, speed: float, decay: float) -> None:
        super().__init__(training, decay)
        self.speed = speed
        self.register_buffer("log_multiplier", self.like.clone())

    def report(self) -> dict[str, float]:
        """The multiplier."""
        return {"multiplier": float(self.log_multiplier.exp())}

    def learn(self) -> None:
        """Moves the multiplier after what the step has measured."""
        has_measured = self.measured is not None
        super().learn()
        if has_measured:
            change = (self.speed * self.average).clamp(-self.largest, self.largest)
            self.log_multiplier.add_(change).clamp_(-self.limit, self.limit)


@dataclass(frozen=True)
class GECO(Objective):
    r"""The least rate whose distortion is at most a tolerance, by a Lagrange multiplier.

    .. math::
        \min R + \lambda\, (D - \kappa), \qquad
        \lambda \leftarrow \lambda \exp(\nu\, \mathrm{avg}(D - \kappa))

    The multiplier rises while the distortion :math:`D = -E[\log p(x | z)]` is above the tolerance,
    and falls below it, by at most 1 % a step, so that a start far off doesn't carry it away. It is
    the objective's state: saved, logged, and moved by training steps alone.

    References:
        Taming VAEs (Rezende & Viola, 2018), https://arxiv.org/abs/1810.00597

    Arguments:
        tolerance: :math:`\kappa`, in nats a datum.
        speed: :math:`\nu`, for a nat and a step.
        decay: Decay of the constraint's moving average.
        options: As in `Objective`.
    """

    needs = ("density", "gradient", "local", "unscaled", "split")
    bound = "none"

    _: KW_ONLY
    tolerance: float
    speed: Positive = 1e-3
    decay: Annotated[float, {"minimum": 0, "below": 1}] = 0.99

    def new_state(self, training: Training) -> ObjectiveState:
        """One with the multiplier."""
        return _Multiplier(training, self.speed, self.decay)

    def surrogate(self, terms: Terms, state: ObjectiveState) -> Tensor:
        """The plate-scaled loss in nats, a scalar to differentiate."""
        assert isinstance(state, _Multiplier)  # noqa: S101
        constraint = -terms.log_likelihood.mean() - self.tolerance
        if torch.is_grad_enabled():
            state.measured = constraint.detach()
        averaged = state.averaged(constraint.detach())
        value = constraint + (averaged - constraint).detach()
        rate = (terms.log_q - terms.log_prior).mean()
        weighted = state.log_multiplier.exp() * value
        return -self.total(terms, state, -rate - weighted)
