"""Toy problems whose evidence and posterior are known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.annotations import Finite, check_fields, strict
from pvae.errors import ArgumentError, check_int, check_number

__all__ = ["LinearGaussian", "principal_components"]


@dataclass(frozen=True)
class LinearGaussian:
    r"""Probabilistic PCA: :math:`z \sim N(0, I),\ x | z \sim N(W z + b, \sigma^2 I)`.

    .. math::
        \log p(x) &= \log N(x; b, W W^T + \sigma^2 I) \\
        p(z | x) &= N(M^{-1} W^T (x - b), \sigma^2 M^{-1}), \quad M = W^T W + \sigma^2 I

    References:
        Probabilistic Principal Component Analysis (Tipping & Bishop, 1999)

    Draws and densities are where the weights are, and so go the data that are given.

    Arguments:
        weight: W, shape ``(D, Q)``.
        bias: b, shape ``(D,)``.
        sigma: The noise's standard deviation.

    Example:
        >>> toy = LinearGaussian.random(num_features=5, latent_dim=2)
        >>> toy.log_evidence(toy.sample(100)).shape
        torch.Size([100])
    """

    weight: Tensor
    bias: Tensor
    sigma: float

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("sigma", self.sigma, above=0)

    @classmethod
    def random(
        cls, num_features: int, latent_dim: int, sigma: float = 0.5, seed: int = 0
    ) -> LinearGaussian:
        """A problem with weights and biases drawn from N(0, 1), in the default dtype."""
        generator = torch.Generator().manual_seed(seed)
        check_int("num_features", num_features)
        check_number("sigma", sigma, above=0)
        weight = torch.randn(num_features, latent_dim, generator=generator)
        return cls(weight, torch.randn(num_features, generator=generator), sigma)

    def sample(self, num_samples: int, seed: int = 0) -> Tensor:
        """Draws of x, shape ``(num_samples, D)``."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(num_samples, self.weight.shape[1], generator=generator).to(self.weight)
        noise = torch.randn(num_samples, len(self.bias), generator=generator).to(self.bias)
        return z @ self.weight.T + self.bias + self.sigma * noise

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) of each row in nats, shape ``(N,)``."""
        d = len(self.bias)
        covariance = self.weight @ self.weight.T + self.sigma**2 * torch.eye(d).to(self.weight)
        factor = torch.linalg.cholesky(covariance)
        white = torch.linalg.solve_triangular(factor, (x.to(self.bias) - self.bias).T, upper=False)
        log_det = 2 * factor.diagonal().log().sum()
        return -0.5 * (white.square().sum(0) + log_det + d * math.log(2 * math.pi))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, shape ``(N, Q)``, and covariance, shape ``(Q, Q)``, of p(z | x)."""
        q = self.weight.shape[1]
        precision = self.weight.T @ self.weight + self.sigma**2 * torch.eye(q).to(self.weight)
        inverse = torch.linalg.inv(precision)
        return (x.to(self.bias) - self.bias) @ self.weight @ inverse, self.sigma**2 * inverse


@strict
def principal_components(x: Finite, latent_dim: int) -> LinearGaussian:
    r"""The probabilistic PCA that maximises the likelihood of x, in closed form.

    .. math::
        \sigma^2 = \tfrac{1}{D - Q} \sum_{i > Q} \lambda_i, \quad
        W = U_Q (\Lambda_Q - \sigma^2 I)^{1/2}

    with the eigenvalues :math:`\lambda` of the covariance (divided by N).

    References:
        Probabilistic Principal Component Analysis (Tipping & Bishop, 1999)

    Arguments:
        x: Data, shape ``(N, D)``.
        latent_dim: Q, less than D.
    """
    if x.dim() != 2 or len(x) < 2 or not 1 <= latent_dim < x.shape[1]:
        expected = "at least two rows (N, D) and latent_dim less than D"
        actual = f"x of shape {tuple(x.shape)} and latent_dim={latent_dim}"
        raise ArgumentError("principal_components", expected, actual, ["latent_dim=1"])
    bias = x.mean(0)
    values, vectors = torch.linalg.eigh((x - bias).T @ (x - bias) / len(x))
    values, vectors = values.flip(0), vectors.flip(1)
    variance = values[latent_dim:].mean()
    weight = vectors[:, :latent_dim] * (values[:latent_dim] - variance).sqrt()
    return LinearGaussian(weight, bias, float(variance.sqrt()))
