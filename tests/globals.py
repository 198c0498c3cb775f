"""Pairs with global latents whose evidence and posterior are known."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pvae import Pair


class Regression:
    """y = X w + noise of 0.5 with w ~ N(0, I): conjugate.

    ``centre`` is where the slopes' inputs lie: far from 0, intercept and slopes are correlated.
    Not ``inside`` the model's product takes no leading dimensions, so that particles are looped.
    """

    sigma = 0.5

    def __init__(self, *, inside: bool, centre: float = 0.0) -> None:
        self.inside = inside
        generator = torch.Generator().manual_seed(0)
        slopes = centre + torch.randn(40, 2, generator=generator, dtype=torch.float64)
        x = torch.cat([torch.ones(40, 1), slopes], 1)
        noise = torch.randn(40, generator=generator, dtype=torch.float64)
        y = x @ torch.tensor([1.0, -2.0, 0.5]) + self.sigma * noise
        self.batch = (x, y)
        self.covariance = torch.linalg.inv(torch.eye(3) + x.T @ x / self.sigma**2)
        self.mean = self.covariance @ x.T @ y / self.sigma**2
        self.mean_field_scale = torch.linalg.inv(self.covariance).diagonal() ** -0.5
        whole = x @ x.T + self.sigma**2 * torch.eye(40)
        self.log_evidence = float(dist.MultivariateNormal(torch.zeros(40), whole).log_prob(y))

    def model(self, x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            loc = (x * w).sum(-1) if self.inside else x @ w
            pyro.sample("y", dist.Normal(loc, self.sigma), obs=y)

    def pair(self, width: float = 1.0) -> Pair:
        """A guide that has the posterior's covariance, but for its width."""

        def guide(x: Tensor, y: Tensor) -> None:
            pyro.sample("w", dist.MultivariateNormal(self.mean, width**2 * self.covariance))

        return Pair(self.model, guide)

    def mean_field(self) -> tuple[Any, Any]:
        """The independent normals that are the best in KL(q || p): precisions of the posterior."""

        def guide(x: Tensor, y: Tensor) -> None:
            pyro.sample("w", dist.Normal(self.mean, self.mean_field_scale).to_event(1))

        return self.model, guide


class Counted:
    """A pair that counts the runs of its model."""

    def __init__(self, pair: Pair) -> None:
        self.runs = 0

        def model(*batch: Tensor) -> None:
            self.runs += 1
            pair.model(*batch)

        self.pair = Pair(model, pair.guide)


EIGHT = (
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64),
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64),
)
"""Effects of coaching in eight schools, and their standard errors (Rubin, 1981)."""


def eight_schools(width: float) -> Pair:
    """mu ~ N(0, 5), tau ~ LogNormal(1, 1), theta_j ~ N(mu, tau), y_j ~ N(theta_j, sigma_j).

    The guide of theta given mu and tau is the posterior, but for its width.
    """

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
        tau = pyro.sample("tau", dist.LogNormal(y.new_tensor(1.0), 1.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def guide(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_tensor(4.4), 4.0))
        tau = pyro.sample("tau", dist.LogNormal(y.new_tensor(1.0), 1.0))
        with pyro.plate("schools", len(y)):
            precision = 1 / sigma**2 + 1 / tau**2
            loc = (y / sigma**2 + mu / tau**2) / precision
            pyro.sample("theta", dist.Normal(loc, width * precision**-0.5))

    return Pair(model, guide)


def eight_schools_evidence() -> float:
    """By quadrature over log tau; theta and mu are integrated out."""
    y, sigma = EIGHT
    log_tau = torch.linspace(1 - 8, 1 + 8, 4001, dtype=torch.float64)
    noise = torch.diag_embed(sigma**2 + (2 * log_tau).exp()[:, None])
    whole = dist.MultivariateNormal(torch.zeros(8, dtype=torch.float64), noise + 25.0)
    log_density = whole.log_prob(y) + dist.Normal(1.0, 1.0).log_prob(log_tau)
    return float(log_density.logsumexp(0)) + math.log(16 / 4000)
