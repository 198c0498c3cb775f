"""A pair in one dimension whose evidence, posterior and bounds are known by quadrature.

p(z) = N(0, 1), p(x | z) = N(w z, s^2), q(z | x) = N(a x + c, t^2), with s fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.sites import announce_parameters

SIGMA = 0.7


class GaussianModel(nn.Module):
    def __init__(self, w: float = 1.3) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x: Tensor) -> None:
        announce_parameters(self, "model")
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))
            pyro.sample("x", dist.Normal(self.w * z, x.new_tensor(SIGMA)), obs=x)


class GaussianGuide(nn.Module):
    def __init__(self, a: float = 0.3, c: float = 0.2, t: float = 0.6) -> None:
        super().__init__()
        self.a, self.c = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(c))
        self.log_t = nn.Parameter(torch.tensor(math.log(t)))

    def forward(self, x: Tensor) -> None:
        announce_parameters(self, "guide")
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.a * x + self.c, self.log_t.exp()))


def pair(device: torch.device) -> tuple[GaussianModel, GaussianGuide]:
    return GaussianModel().to(device), GaussianGuide().to(device)


def exact_guide(model: GaussianModel) -> GaussianGuide:
    """The posterior: precision 1 + w^2 / s^2, mean w x / (w^2 + s^2)."""
    w = float(model.w.detach())
    return GaussianGuide(w / (w**2 + SIGMA**2), 0.0, (1 + (w / SIGMA) ** 2) ** -0.5)


def log_evidence(model: GaussianModel, x: Tensor) -> Tensor:
    return dist.Normal(0.0, (model.w**2 + SIGMA**2).sqrt()).log_prob(x)


def log_weights(model: GaussianModel, guide: GaussianGuide, x: Tensor, z: Tensor) -> Tensor:
    """log p(x, z) - log q(z | x), written out."""

    def normal(value: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
        scale = torch.as_tensor(scale, dtype=value.dtype, device=value.device)
        return -0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)

    q = normal(z, guide.a * x + guide.c, guide.log_t.exp())
    return normal(z, 0.0, 1.0) + normal(x, model.w * z, SIGMA) - q


def expectation(
    model: GaussianModel,
    guide: GaussianGuide,
    x: Tensor,
    what: Callable[[Tensor], Tensor],
    num_draws: int,
    nodes: int = 40,
) -> Tensor:
    """E of a function of log weights ``(K, nodes^K)``, by Gauss-Hermite quadrature over K draws.

    Draws are reparametrised, so that it can be differentiated.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    grid = np.stack(np.meshgrid(*[points] * num_draws, indexing="ij")).reshape(num_draws, -1)
    mass = np.prod(
        np.stack(np.meshgrid(*[weights / weights.sum()] * num_draws)).reshape(num_draws, -1), 0
    )
    noise = torch.as_tensor(grid).to(x)
    z = guide.a * x + guide.c + guide.log_t.exp() * noise
    return (torch.as_tensor(mass).to(x) * what(log_weights(model, guide, x, z))).sum()
