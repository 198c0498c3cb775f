"""Hamiltonian Monte Carlo on the way from one density to another, for all data at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.devices import double
from pvae.errors import UndefinedError

__all__ = ["Ends", "Path", "State", "adapt", "pilot_length", "transition"]

Ends = tuple[Tensor, Tensor]
"""log densities of where a path starts, and of where it ends, each ``(K, N)``."""


@dataclass(frozen=True)
class State:
    """Positions of chains, ``(K, N, D)``, and the log densities of both ends there, ``(K, N)``."""

    u: Tensor
    log_start: Tensor
    log_end: Tensor

    def log_density(self, beta: float) -> Tensor:
        """The log density of the path at beta, ``(K, N)``."""
        return (1 - beta) * self.log_start + beta * self.log_end

    @property
    def log_ratio(self) -> Tensor:
        """log end - log start, in double precision."""
        return double(self.log_end) - double(self.log_start)


@dataclass(frozen=True)
class Path:
    r"""The geometric path :math:`f_0^{1 - \beta} f_1^\beta` between two densities."""

    ends: Callable[[Tensor], Ends]  # both log densities at u, differentiable
    num_leapfrog: int  # steps of a trajectory
    tick: Callable[[], None] = lambda: None  # called after each trajectory, for a progress bar

    def state(self, u: Tensor) -> State:
        """Chains at u, where log densities have to be numbers."""
        state = State(u, *self.ends(u))
        wrong = state.log_ratio.isnan().nonzero()
        if len(wrong):
            expected = "log densities that are numbers where chains start"
            actual = f"NaN at row {int(wrong[0, 1])} of a chunk of data"
            fixes = ["draws of the guide, or of the prior, at which the model can be scored"]
            raise UndefinedError("annealing", expected, actual, fixes)
        return state

    def gradient(self, u: Tensor, beta: float) -> tuple[State, Tensor]:
        """Chains at u, and the gradient of the path's log density in u."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            state = State(u, *self.ends(u))
            (slope,) = torch.autograd.grad(state.log_density(beta).sum(), u)
        return State(u.detach(), state.log_start.detach(), state.log_end.detach()), slope


def transition(path: Path, state: State, beta: float, step: Tensor) -> tuple[State, Tensor]:
    """One trajectory from fresh momenta, accepted or rejected; leaves the path's density as it is.

    The step is multiplied by a number from 0.8 to 1.2, drawn for each chain, so that no trajectory
    can be the period of an orbit. A trajectory whose energy isn't finite is rejected.

    References:
        MCMC Using Hamiltonian Dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901

    A step is of each coordinate of each datum, ``(N, D)``. Returns the K chains for each of the N
    data, and each one's probability of acceptance, ``(K, N)``.
    """
    step = step * (0.8 + 0.4 * torch.rand_like(state.log_end)).unsqueeze(-1)
    momentum = torch.randn_like(state.u)
    before = state.log_density(beta) - 0.5 * momentum.square().sum(-1)
    proposal, slope = path.gradient(state.u, beta)
    for _ in range(path.num_leapfrog):
        momentum = momentum + 0.5 * step * slope
        proposal, slope = path.gradient(proposal.u + step * momentum, beta)
        momentum = momentum + 0.5 * step * slope
    after = proposal.log_density(beta) - 0.5 * momentum.square().sum(-1)
    finite = after.isfinite() & proposal.log_start.isfinite() & proposal.log_end.isfinite()
    chance = torch.where(finite, (after - before).clamp(max=0).exp(), 0.0).nan_to_num(0.0)
    accept = torch.rand_like(chance) < chance
    moved = State(
        torch.where(accept.unsqueeze(-1), proposal.u, state.u),
        torch.where(accept, proposal.log_start, state.log_start),
        torch.where(accept, proposal.log_end, state.log_end),
    )
    path.tick()
    return moved, chance


def adapt(
    path: Path, state: State, betas: list[float], scale: Tensor, acceptance: float
) -> list[Tensor]:
    """Step sizes ``(N, D)`` for each place on the path, from chains that are sent along it.

    A datum's step, in units of ``scale``, ``(N, D)``, grows where its chains accept more than
    ``acceptance`` on average, and shrinks where they accept less. Where places are few, chains
    make several transitions at each.
    """
    log_step = torch.full_like(scale[:, 0], -1.0)
    steps = []
    for i, beta in enumerate(betas):
        for _ in range(_repeats(i, len(betas))):
            state, chance = transition(path, state, beta, log_step.exp().unsqueeze(-1) * scale)
            log_step = log_step + _RATE * (chance.mean(0) - acceptance)
        steps.append(log_step.exp().unsqueeze(-1) * scale)
    return steps


_RATE = 0.3  # of change in log step per trajectory, times how far off the acceptance is


def _repeats(place: int, num_places: int) -> int:
    """Trajectories at a place: some to begin with, and fifty in all if places are few."""
    return -(-50 // num_places) + (20 if place == 0 else 0)


def pilot_length(num_places: int) -> int:
    """How many trajectories `adapt` takes."""
    return sum(_repeats(i, num_places) for i in range(num_places))
