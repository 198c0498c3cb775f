"""``encode``, ``decode``, ``sample`` and ``reconstruct`` inside other programs: their gradients.

A trained decoder as the prior of an inverse problem is the use that depends on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor, nn

import pvae
from pvae import VAE, guides, likelihoods, priors, schedules

D, Q, N = 6, 2, 5
NOISE = 0.3


def vae() -> VAE:
    """A linear Gaussian one: probabilistic PCA."""
    return VAE(
        priors.Normal(Q),
        likelihoods.Gaussian(nn.Linear(Q, D), D, sigma=NOISE),
        guides.MeanField(nn.Linear(D, 2 * Q), Q),
    )


def by_hand(pair: VAE) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]]:
    model, guide = pair.model, pair.guide

    def drawn(z: Tensor) -> Tensor:
        prior = model.prior()
        return model.likelihood(prior.expand([len(z)]).rsample()).mean

    return {
        "encode": (pair.encode, lambda x: guide.posterior(x).mean),
        "encode, draws": (
            lambda x: pair.encode(x, num_particles=3),
            lambda x: guide.posterior(x).rsample(torch.Size([3])),
        ),
        "decode": (lambda x: pair.decode(x[:, :Q]), lambda x: model.likelihood(x[:, :Q]).mean),
        "decode, draws": (
            lambda x: pair.decode(x[:, :Q], num_particles=2),
            lambda x: model.likelihood(x[:, :Q]).rsample(torch.Size([2])),
        ),
        "reconstruct": (
            pair.reconstruct,
            lambda x: model.likelihood(guide.posterior(x).mean).mean,
        ),
        "sample": (lambda x: pair.sample(len(x), mean=True), drawn),
    }


@pytest.mark.parametrize("name", [*by_hand(vae())])
def test_gradients_are_those_of_the_distributions(name: str) -> None:
    pair = vae()
    pair.model.prior.loc.data.normal_()
    found = []
    for function in by_hand(pair)[name]:
        torch.manual_seed(1)
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
        value = function(x).square().sum()
        inputs = [x, *pair.parameters()]
        found.append((value, *torch.autograd.grad(value, inputs, allow_unused=True)))
    ours, theirs = found
    assert any(gradient is not None for gradient in theirs[1:])
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_rows_in_parts_have_the_same_gradient() -> None:
    pair, z = vae(), torch.randn(7, Q).requires_grad_()
    whole = torch.autograd.grad(pair.decode(z).square().sum(), z)
    parts = torch.autograd.grad(pair.decode(z, max_rows=3).square().sum(), z)
    torch.testing.assert_close(parts, whole)


def test_without_gradients_where_that_is_asked_for() -> None:
    pair, x = vae(), torch.randn(N, D)
    with torch.no_grad():
        results = pair.encode(x), pair.decode(x[:, :Q]), pair.sample(3), pair.reconstruct(x)
    assert not any(result.requires_grad for result in results)
    frozen = vae().requires_grad_(requires_grad=False)
    assert not frozen.encode(x).requires_grad
    assert frozen.decode(x[:, :Q].clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("training", [False, True])
def test_they_run_in_evaluation_mode_and_leave_the_callers(training: bool) -> None:
    """Also where a part is a function, which the pair's own modules don't tell of."""
    hidden = nn.Sequential(nn.Linear(Q, D), nn.Dropout(0.5))
    hidden.train(training)
    pair = VAE(
        priors.StandardNormal(Q),
        lambda z: dist.Normal(hidden.forward(z), 1.0).to_event(1),
        guides.MeanField(nn.Sequential(nn.Linear(D, 2 * Q), nn.Dropout(0.5)), Q),
    ).train(training)
    x = torch.randn(N, D)
    expected = hidden[0](pair.guide.posterior.network[0](x)[:, :Q])
    torch.testing.assert_close(pair.reconstruct(x), expected)
    modes = {m.training for root in (pair, hidden) for m in root.modules()}
    assert modes == {training}


def inverse(decode: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
    """Every second entry of x, with noise, and its program."""

    def program(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(Q), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decode(z)[..., ::2], NOISE).to_event(1), obs=y)

    return program, torch.tensor([[1.0, -0.5, 0.3]])


def posterior(pair: VAE, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of z, in closed form."""
    network = pair.model.likelihood.network
    weight, bias = network.weight.detach()[::2], network.bias.detach()[::2]
    covariance = torch.linalg.inv(torch.eye(Q) + weight.T @ weight / NOISE**2)
    return covariance @ weight.T @ (y[0] - bias) / NOISE**2, covariance


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("epochs", [10, pytest.param(800, marks=pytest.mark.slow)])
def test_variational_inference_of_a_latent_through_the_decoder(epochs: int) -> None:
    pair = vae().requires_grad_(requires_grad=False)
    found = []
    for decode in (pair.decode, lambda z: pair.model.likelihood(z).mean):
        pyro.clear_param_store()
        program, y = inverse(decode)
        guide = AutoMultivariateNormal(program)
        how: dict[str, Any] = {"lr": 0.05, "lr_schedule": schedules.Cosine(), "progress": False}
        pvae.fit((program, guide), y, epochs=epochs, **how)
        found.append(guide.get_posterior())
    ours, theirs = found
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=0)
    torch.testing.assert_close(ours.covariance_matrix, theirs.covariance_matrix, rtol=0, atol=0)
    if epochs > 100:
        mean, covariance = posterior(pair, y)
        torch.testing.assert_close(ours.mean.detach(), mean, rtol=0, atol=0.1)
        torch.testing.assert_close(
            ours.covariance_matrix.detach(), covariance, rtol=0.15, atol=0.02
        )


@pytest.mark.slow
def test_nuts_through_the_decoder_finds_the_posterior() -> None:
    pair = vae().requires_grad_(requires_grad=False)
    program, y = inverse(pair.decode)
    mcmc = MCMC(NUTS(program), num_samples=400, warmup_steps=200, disable_progbar=True)
    mcmc.run(y)
    z, (mean, covariance) = mcmc.get_samples()["z"].reshape(-1, Q), posterior(pair, y)
    effective = mcmc.diagnostics()["z"]["n_eff"].reshape(Q)
    assert bool((effective > 50).all())
    off = (z.mean(0) - mean).abs() / (covariance.diagonal() / effective).sqrt()
    assert bool((off < 6).all()), off
    torch.testing.assert_close(z.T.cov(), covariance, rtol=0.5, atol=0.05)
