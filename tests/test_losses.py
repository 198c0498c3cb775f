"""docs/losses.md: each weighting of squared error and KL is a Gaussian's sigma."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae import VAE, guides, likelihoods, priors
from pvae import terms as t
from pvae.networks import MLP
from pvae.objectives import ELBO

D, Q, N = 6, 2, 8
LAMBDA, BETA, SIGMA = 0.3, 4.0, 0.7

ROWS: dict[str, tuple[Any, float, float]] = {
    # loss of (sse, kl), sigma^2, factor
    "SSE + KL": (lambda s, k: s + k, 1 / 2, 1.0),
    "SSE / 2 + KL": (lambda s, k: s / 2 + k, 1.0, 1.0),
    "SSE / D + KL": (lambda s, k: s / D + k, D / 2, 1.0),
    "SSE + lambda KL": (lambda s, k: s + LAMBDA * k, LAMBDA / 2, LAMBDA),
    "SSE / D + lambda KL": (lambda s, k: s / D + LAMBDA * k, LAMBDA * D / 2, LAMBDA),
    "beta-VAE": (lambda s, k: s / (2 * SIGMA**2) + BETA * k, BETA * SIGMA**2, BETA),
}


def gradients(loss: Tensor, vae: VAE) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(vae.parameters())))


@pytest.mark.parametrize("row", ROWS)
def test_a_weighting_is_a_sigma(row: str, device: torch.device) -> None:
    """Loss and -ELBO, times the factor, differ by a constant: their gradients are the same."""
    loss_of, variance, factor = ROWS[row]
    vae = VAE(
        priors.StandardNormal(Q),
        likelihoods.Gaussian(MLP(Q, D, (8,)), D, sigma=math.sqrt(variance)),
        guides.MeanField(MLP(D, 2 * Q, (8,)), Q),
    ).to(device)
    x = torch.randn(N, D, device=device)
    terms = t.compute(vae.inspect((x,)), (x,))
    z = terms.guide_trace.nodes["z"]["value"]
    squared = (x - vae.model.likelihood.get_submodule("network")(z)).square().sum(1)
    sampled_kl = (terms.log_q - terms.log_prior)[0]
    loss = loss_of(squared, sampled_kl).sum()
    objective = ELBO()
    elbo_loss = objective.surrogate(terms, objective.make_state(terms.structure))
    ours = torch.autograd.grad(loss, list(vae.parameters()), retain_graph=True)
    theirs = gradients(factor * elbo_loss, vae)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("divisor", "factor"), [(1, 1.0), (D, 1 / D)])
def test_an_l1_weight_is_a_laplace_rate(divisor: int, factor: float, device: torch.device) -> None:
    vae = VAE(
        priors.Laplace(Q, rate=LAMBDA * divisor),
        likelihoods.Gaussian(MLP(Q, D, (8,)), D, sigma=math.sqrt(0.5)),
        guides.Point(MLP(D, Q, (8,)), Q),
    ).to(device)
    x = torch.randn(N, D, device=device)
    code = vae.guide.posterior.get_submodule("network")(x)
    squared = (x - vae.model.likelihood.get_submodule("network")(code)).square().sum(1)
    loss = (squared / divisor + LAMBDA * code.abs().sum(1)).sum()
    terms = t.compute(vae.inspect((x,)), (x,))
    ours = gradients(loss, vae)
    theirs = gradients(-factor * terms.log_joint.sum(), vae)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_page_has_these_rows() -> None:
    page = (Path(pvae.__file__).parent.parent / "docs" / "losses.md").read_text()
    for row in ROWS:
        assert row in page
