"""The linear-Gaussian pair with guides that are right, or wrong in one known way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.data import LinearGaussian

Make = Callable[[Tensor, Tensor], Any]
"""From the posterior's means, shape (N, Q), and covariance to the guide's distribution."""


def pair(toy: LinearGaussian, make: Make) -> tuple[Any, Any]:
    """Model and guide of a toy; ``make`` says what the guide does with the exact posterior."""
    q = toy.weight.shape[1]

    def model(x: Tensor) -> None:
        weight, bias = toy.weight.to(x.device), toy.bias.to(x.device)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(q), x.new_ones(q)).to_event(1))
            sigma = x.new_tensor(toy.sigma)
            pyro.sample("x", dist.Normal(z @ weight.T + bias, sigma).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        mean, covariance = toy.posterior(x.cpu())
        with pyro.plate("data", len(x)):
            pyro.sample("z", make(mean.to(x.device), covariance.to(x.device)))

    return model, guide


def exact(mean: Tensor, covariance: Tensor) -> Any:
    return dist.MultivariateNormal(mean, covariance)


def scaled(factor: float) -> Make:
    """The posterior with standard deviations that are all off by a factor."""
    return lambda mean, covariance: dist.MultivariateNormal(mean, covariance * factor**2)


def shifted(by: float) -> Make:
    """The posterior, moved by so many standard deviations."""
    return lambda mean, covariance: dist.MultivariateNormal(
        mean + by * covariance.diagonal().sqrt(), covariance
    )


def marginals(mean: Tensor, covariance: Tensor) -> Any:
    """The posterior's marginals, as if they were independent."""
    return dist.Normal(mean, covariance.diagonal().sqrt()).to_event(1)


def ignorant(mean: Tensor, covariance: Tensor) -> Any:
    """The prior, whatever x is."""
    return dist.Normal(torch.zeros_like(mean), torch.ones_like(mean)).to_event(1)


def correlated() -> LinearGaussian:
    """Two latents that the data hardly tell apart: their posterior correlation is -0.9."""
    weight = torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.1, -0.1]])
    return LinearGaussian(weight, torch.zeros(3), 0.3)
