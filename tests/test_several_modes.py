"""Mixtures, flows without an inverse, and posteriors with several modes: log p(x) by quadrature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae import Pair, bounds, diagnostics
from pvae.errors import ArgumentError

STEPS = 4.5  # standard errors; two-sided, a false alarm in 1.5e5
GRID = torch.linspace(-8, 8, 20_001, dtype=torch.float64)


def by_quadrature(log_prior: Tensor, log_likelihood: Callable[[Tensor], Tensor]) -> Tensor:
    """log p(x) of each datum, of log densities on the grid."""
    return (log_prior + log_likelihood(GRID)).logsumexp(-1) + (GRID[1] - GRID[0]).log()


def mixture(means: Tensor, scale: float) -> dist.TorchDistribution:
    """With equal weights."""
    return dist.MixtureSameFamily(
        dist.Categorical(torch.ones(len(means))), dist.Normal(means, scale)
    )


def pair_of(prior: Any, q: Callable[[Tensor], Any], loc: Callable[[Tensor], Tensor]) -> Pair:
    """x normal around a function of one latent."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(loc(z), 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    return Pair(model, guide)


FEW = bounds.AIS(num_temperatures=30, num_leapfrog=4)
PRIOR = bounds.AIS(start="prior", num_temperatures=30, num_leapfrog=4)


@pytest.mark.parametrize("q", ["normal", "mixture"])
def test_a_mixture_for_a_prior_and_for_a_guide(q: str) -> None:
    """Its support is that of its components: annealing and fits have coordinates."""
    centres = torch.tensor([-1.0, 1.0])

    def guide(x: Tensor) -> Any:
        if q == "normal":
            return dist.Normal(0.8 * x, 0.6)
        weights = dist.Categorical(torch.ones(len(x), 2))
        return dist.MixtureSameFamily(weights, dist.Normal(0.8 * x[:, None] + centres, 0.6))

    pair, x = pair_of(lambda: mixture(centres, 0.4), guide, lambda z: z), torch.randn(20)
    noise = lambda z: dist.Normal(z, 0.5).log_prob(x[:, None])  # noqa: E731
    exact = by_quadrature(mixture(centres, 0.4).log_prob(GRID), noise)
    for ais in (FEW, PRIOR):
        found = bounds.evidence(pair, x, 32, method="ais", ais=ais, progress=False)
        assert abs(found.mean - float(exact.mean())) < STEPS * found.se_draws + 0.03
    found = bounds.evidence(pair, x, 4000, method="importance", progress=False)
    assert abs(found.mean - float(exact.mean())) < STEPS * found.se_draws + 5e-3


class Flowing(nn.Module):
    """A guide by a planar flow, which scores its own draws alone."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = dist.transforms.Planar(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[:, None] / 1.25, 0.5).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


def linear(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.squeeze(-1), 0.5), obs=x)


def test_a_guide_whose_flow_has_no_inverse() -> None:
    """Draws keep their own density; fits and annealing have the model's alone, with no warning."""
    pair, x = Pair(linear, Flowing()), torch.randn(12)
    exact = float(dist.Normal(0.0, 1.25**0.5).log_prob(x).mean())
    found = bounds.evidence(pair, x, 4000, progress=False)
    assert abs(found.mean - exact) < STEPS * found.se_draws + 2e-3
    for ais in (FEW, PRIOR):
        found = bounds.evidence(pair, x, 32, method="ais", ais=ais, progress=False)
        assert found.kind == "lower"
        assert abs(found.mean - exact) < STEPS * found.se_draws + 0.03
    apart = diagnostics.gap(
        pair, x, num_particles=200, flow=False, local=bounds.LocalFit(max_steps=300), progress=False
    )
    assert abs(apart.evidence.mean - exact) < 0.02
    assert apart.instead
    parts = diagnostics.surgery(pair, x)
    assert "no inverse" in str(parts) or "score their own draws alone" in str(parts)


def one_mode(x: Tensor) -> Any:
    return dist.Normal(x.sqrt(), 0.2)


def test_modes_that_fits_have_missed_are_found() -> None:
    """x = z^2 and noise: half of each posterior is at -z, log 2 nats in all."""
    pair = pair_of(lambda: dist.Normal(0.0, 1.0), one_mode, lambda z: z**2)
    x = torch.linspace(2.0, 3.0, 16)
    exact = by_quadrature(
        dist.Normal(0.0, 1.0).log_prob(GRID), lambda z: dist.Normal(z**2, 0.5).log_prob(x[:, None])
    )
    how = bounds.LocalFit(max_steps=200)
    found = bounds.evidence(pair, x, 200, method="local", local=how, progress=False)
    assert float(exact.mean()) - found.mean == pytest.approx(0.69, abs=0.05)
    assert "annealing from the prior finds" in str(found)
    assert "start='prior'" in str(found)
    apart = diagnostics.gap(pair, x, num_particles=200, flow=False, local=how, progress=False)
    assert apart.missed is not None
    assert apart.missed.mean == pytest.approx(0.69, abs=STEPS * apart.missed.se_draws)
    line = next(line for line in apart.findings() if line.name == "missed by fits")
    assert line.verdict == "bad"
    typed = bounds.evidence(pair, x, 64, method="ais", ais=PRIOR, progress=False)
    told = diagnostics.gap(
        pair, x, num_particles=200, flow=False, local=how, evidence=typed, progress=False
    )
    assert told.approximation.mean > 0.5
    assert told.missed is None


def test_one_mode_is_no_alarm() -> None:
    """A wrong guide of a posterior with one mode: fits miss nothing."""
    pair, x = pair_of(lambda: dist.Normal(0.0, 1.0), one_mode, lambda z: z), torch.rand(30)
    for seed in range(3):
        found = bounds.evidence(
            pair, x, 100, method="local", local=bounds.LocalFit(max_steps=200), seed=seed,
            progress=False,
        )  # fmt: skip
        assert "annealing" not in str(found)


def test_fits_start_where_they_are_asked_to() -> None:
    """A guide in the wrong mode: from the prior, which is nearer to the other one, it is found."""
    pair = pair_of(
        lambda: dist.Normal(2.0, 0.5), lambda x: dist.Normal(-2.0 * torch.ones(len(x)), 0.1),
        lambda z: z**2,
    )  # fmt: skip
    x = torch.full((4,), 4.0)
    how = bounds.LocalFit(max_steps=200, start="prior")
    right = bounds.evidence(pair, x, 100, method="local", local=how, progress=False)
    exact = by_quadrature(
        dist.Normal(2.0, 0.5).log_prob(GRID), lambda z: dist.Normal(z**2, 0.5).log_prob(x[:, None])
    )
    assert right.mean == pytest.approx(float(exact.mean()), abs=0.02)
    with pytest.raises(ArgumentError, match=r"LocalFit\.start"):
        bounds.LocalFit(start="posterior")  # type: ignore[arg-type]
