"""Local fits of q and the gaps they show, against closed forms, conjugacy and quadrature.

Fits end where the ELBO has stood still, which leaves a few thousandths of a nat beside the noise.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from pvae import bounds, diagnostics, priors, recipes
from pvae.data import LinearGaussian
from pvae.errors import ArgumentError, UndefinedError
from pvae.estimate import Estimate
from tests import pairs

STEPS = 4.5  # standard errors; two-sided, a false alarm in 1.5e5
FIT = 0.01  # nats that a fit may be short of the best

CORRELATED = LinearGaussian(
    torch.tensor([[1.0, 0.8], [0.4, 0.7], [-1.0, -0.6]]), torch.tensor([0.3, -0.2, 0.1]), 0.5
)
ORTHOGONAL = LinearGaussian(
    torch.tensor([[1.0, 0.0], [0.0, 0.7], [0.0, 0.0]]), torch.tensor([0.3, -0.2, 0.1]), 0.5
)


class Toy(nn.Module):
    """p(x, z) of a `LinearGaussian`."""

    def __init__(self, toy: LinearGaussian) -> None:
        super().__init__()
        self.weight = nn.Parameter(toy.weight.double())
        self.bias = nn.Parameter(toy.bias.double())
        self.sigma = toy.sigma

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
            loc = z @ self.weight.T + self.bias
            pyro.sample("x", dist.Normal(loc, x.new_tensor(self.sigma)).to_event(1), obs=x)


class Gaussian(nn.Module):
    """q(z | x), mean-field or full-rank, with means and scales that are computed outside."""

    def __init__(self, encode: Any, scale: Tensor) -> None:
        super().__init__()
        self.encode, self.scale = encode, nn.Parameter(scale.double())

    def forward(self, x: Tensor) -> None:
        loc = self.encode(x)
        with pyro.plate("data", len(x)):
            if self.scale.dim() == 2:
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.scale))
            else:
                pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))


def posterior(toy: LinearGaussian, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and precision, in double precision."""
    weight, bias = toy.weight.to(x), toy.bias.to(x)
    precision = torch.eye(2).to(x) + weight.T @ weight / toy.sigma**2
    return (x - bias) @ weight @ torch.linalg.inv(precision) / toy.sigma**2, precision


def log_evidence(toy: LinearGaussian, x: Tensor) -> Tensor:
    weight = toy.weight.to(x)
    covariance = weight @ weight.T + toy.sigma**2 * torch.eye(3).to(x)
    return dist.MultivariateNormal(toy.bias.to(x), covariance).log_prob(x)


def data(toy: LinearGaussian, n: int, device: torch.device) -> Tensor:
    double = LinearGaussian(toy.weight.double(), toy.bias.double(), toy.sigma)
    return double.sample(n).to(device)


def near(bound: Estimate, expected: float, short: float = FIT) -> None:
    """Within 4.5 errors over draws, and what a fit may be short of."""
    assert abs(bound.mean - expected) < STEPS * bound.se_draws + short


def test_the_best_mean_field_q_of_a_correlated_posterior(device: torch.device) -> None:
    r"""Its variances are 1 / Lambda_ii: KL = (sum log Lambda_ii - log det Lambda) / 2."""
    x = data(CORRELATED, 4, device)
    _, precision = posterior(CORRELATED, x)
    best = 0.5 * float(precision.diagonal().log().sum() - precision.logdet())
    assert best > 0.5
    guide = Gaussian(lambda x: posterior(CORRELATED, x)[0], precision.diagonal().rsqrt()).to(device)
    found = diagnostics.gap((Toy(CORRELATED).to(device), guide), x, progress=False)
    near(found.amortisation, 0.0)
    near(found.approximation, best)
    near(found.total, best)
    near(found.gain("full_rank", "own"), best)
    near(found.gain("flow", "full_rank"), 0.0)
    exact = log_evidence(CORRELATED, x)
    torch.testing.assert_close(found.evidence.per_datum, exact, atol=FIT, rtol=0.0)
    assert found.verdict == "family"
    assert found.unsettled == ()
    assert found.instead == ""
    amortisation, approximation, *_ = found.findings()
    assert amortisation.verdict == "good"
    assert not amortisation.advice
    assert approximation.verdict != "good"
    assert "a full-rank q gains" in approximation.advice


@pytest.mark.parametrize(("shift", "factor"), [(0.0, 1.0), (0.8, 0.5), (0.0, 2.5)])
def test_a_bad_encoder_of_the_right_family(
    shift: float, factor: float, device: torch.device
) -> None:
    """KL of Gaussians whose means and scales are off: shifted and narrow, or wide, or exact."""
    x = data(ORTHOGONAL, 4, device)
    _, precision = posterior(ORTHOGONAL, x)
    best = precision.diagonal().rsqrt()
    guide = Gaussian(lambda x: posterior(ORTHOGONAL, x)[0] + shift * x[:, :1], factor * best).to(
        device
    )
    found = diagnostics.gap((Toy(ORTHOGONAL).to(device), guide), x, flow=False, progress=False)
    moved = (shift * x[:, :1] / best).square().sum(1)
    kl = 0.5 * moved + factor**2 - 1 - 2 * math.log(factor)
    near(found.amortisation, float(kl.mean()))
    near(found.approximation, 0.0)
    near(found.total, float(kl.mean()))
    assert found.amortisation.variances is not None
    error = found.amortisation.variances.sqrt()
    assert bool(((found.amortisation.per_datum - kl).abs() < STEPS * error + FIT).all())
    assert found.verdict == ("fine" if factor == 1.0 else "encoder")
    assert "flow" not in found.log_weights
    assert ("method='local'" in str(found)) == (factor != 1.0)
    assert not bool(found.is_worse.any())


def test_a_full_rank_family_is_its_own(device: torch.device) -> None:
    """It starts diagonal and finds the correlated posterior: no approximation gap is left."""
    x = data(CORRELATED, 4, device)
    _, precision = posterior(CORRELATED, x)
    guide = Gaussian(lambda x: posterior(CORRELATED, x)[0], torch.eye(2).double()).to(device)
    found = diagnostics.gap((Toy(CORRELATED).to(device), guide), x, flow=False, progress=False)
    kl = 0.5 * float(precision.diagonal().sum() - 2 - precision.logdet())
    near(found.amortisation, kl)
    near(found.approximation, 0.0)
    near(found.gain("full_rank", "own"), 0.0)
    assert found.instead == ""
    assert found.verdict == "encoder"


class Coins(nn.Module):
    """z ~ Beta(1, 1), x of 10 tosses are heads: the posterior is Beta(1 + x, 11 - x)."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(x.new_tensor(1.0), x.new_tensor(1.0)))
            pyro.sample("x", dist.Binomial(10, z), obs=x)


class CoinsGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.4).double())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Beta(1 + self.scale * x, 3 + self.scale * (10 - x)))


def test_a_family_with_another_support(device: torch.device) -> None:
    """Beta, where the posterior is one, too: 1 / 11 each, whatever x. Gaussians of its logit lose.

    The amortisation gap is the divergence of two Betas, which torch has in closed form.
    """
    x = torch.tensor([0.0, 3.0, 9.0], dtype=torch.float64, device=device)
    model, guide = Coins().to(device), CoinsGuide().to(device)
    found = diagnostics.gap((model, guide), x, flow=False, progress=False)
    with torch.no_grad():
        q = dist.Beta(1 + 0.4 * x, 3 + 0.4 * (10 - x))
        kl = torch.distributions.kl_divergence(q, dist.Beta(1 + x, 11 - x))
    near(found.amortisation, float(kl.mean()))
    near(found.approximation, 0.0)
    assert found.evidence.mean == pytest.approx(-math.log(11), abs=1e-3)
    assert -0.2 < found.gain("full_rank", "own").mean < -0.01
    assert found.instead == ""


def _square(observed: bool) -> Any:
    """z ~ N(0, 1), x ~ N(z^2, 1): two modes. q is a Gaussian."""

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if not observed:
                pyro.sample("z", dist.Normal(0.1 * x, x.new_tensor(0.6)))
                return
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), x.new_tensor(1.0)))
            pyro.sample("x", dist.Normal(z**2, x.new_tensor(1.0)), obs=x)

    return program


def _log_joint(z: Any, x: float) -> Any:
    return -0.5 * z**2 - 0.5 * (x - z**2) ** 2 - math.log(2 * math.pi)


def test_a_flow_is_better_than_a_gaussian(device: torch.device) -> None:
    """Evidence and the best Gaussian's ELBO by quadrature; the flow comes near the evidence."""
    x = torch.tensor([0.0, 1.0, 1.5], dtype=torch.float64, device=device)
    grid = np.linspace(-8, 8, 20_001)
    nodes, mass = np.polynomial.hermite_e.hermegauss(80)
    mass = mass / mass.sum()
    evidence, gaussian = [], []
    for datum in x.tolist():
        evidence.append(np.log(np.exp(_log_joint(grid, datum)).sum() * (grid[1] - grid[0])))

        def loss(q: Any, datum: float = datum) -> float:
            z = q[0] + np.exp(q[1]) * nodes
            return float(-mass @ _log_joint(z, datum) - q[1] - 0.5 * math.log(2 * math.pi * math.e))

        gaussian.append(-minimize(loss, [0.0, -0.3], method="Nelder-Mead").fun)
    found = diagnostics.gap(
        (_square(observed=True), _square(observed=False)), x, num_particles=4000, progress=False
    )
    torch.testing.assert_close(
        found.evidence.per_datum.cpu(), torch.as_tensor(evidence), atol=0.02, rtol=0.0
    )
    lost = float(np.mean(evidence) - np.mean(gaussian))
    assert lost > 0.08
    for q in ("own", "full_rank"):
        near(found.elbo(q), float(np.mean(gaussian)))
    near(found.approximation, lost)
    left = found.evidence.mean - found.elbo("flow").mean
    assert -0.01 < left < 0.25 * lost
    assert found.gain("flow", "full_rank").mean > 0.7 * lost


def test_a_guide_that_cant_be_read_is_replaced_and_it_says_so(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device, 4)
    quick = bounds.LocalFit(max_steps=60)
    found = diagnostics.gap(
        (model, guide), batch, num_particles=100, local=quick, flow=False, progress=False
    )
    assert "depends on what the guide has drawn before" in found.instead
    assert "a full-rank Gaussian instead" in str(found)
    assert found.unsettled == ("own", "full_rank")
    assert "was still getting better" in str(found)

    def transformed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            base = dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1)
            flow = dist.transforms.AffineTransform(0.1, 0.5, event_dim=1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    x = data(CORRELATED, 4, device)
    found = diagnostics.gap(
        (Toy(CORRELATED).to(device), transformed), x, num_particles=100, local=quick,
        flow=False, progress=False,
    )  # fmt: skip
    assert found.instead == "TransformedDistribution at site 'z' has no parameters to read"
    assert "best full-rank Gaussian (not its own family) for each datum" in str(found)


def test_no_fit_ends_below_its_start(device: torch.device) -> None:
    """With a rate that is far too large, from the exact posterior on: it goes back there."""
    x = data(ORTHOGONAL, 4, device)
    _, precision = posterior(ORTHOGONAL, x)
    guide = Gaussian(lambda x: posterior(ORTHOGONAL, x)[0], precision.diagonal().rsqrt()).to(device)
    wild = bounds.LocalFit(lr=2.0, max_steps=3)
    found = diagnostics.gap((Toy(ORTHOGONAL).to(device), guide), x, local=wild, progress=False)
    near(found.amortisation, 0.0, short=1e-4)
    near(found.approximation, 0.0, short=1e-4)
    near(found.gain("flow", "full_rank"), 0.0, short=1e-4)


def test_without_the_guides_own_family_nothing_is_told_apart() -> None:
    weights = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double()
    q = {"guide": weights, "own": weights + 2, "full_rank": weights + 2}
    exact = Estimate("exact", weights.mean(0) + 2, num_particles=None)
    assert diagnostics.Gap(q, exact).verdict == "encoder"
    instead = diagnostics.Gap(q, exact, "its scale has no name")
    assert instead.verdict == "both"
    assert "encoder or family lose, which can't be told apart here" in str(instead)


def test_a_fit_below_the_guide_is_told(device: torch.device) -> None:
    """As where the mean over data rises, and a datum's own ELBO falls."""
    weights = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double().to(device)
    moved = weights + torch.tensor([2.0, -1.0, 0.0], device=device)
    exact = Estimate("exact", moved.mean(0) + 3, num_particles=None)
    found = diagnostics.Gap({"guide": weights, "own": moved, "full_rank": moved}, exact)
    assert found.is_worse.tolist() == [False, True, False]
    assert "fits below guide" in str(found)


def test_evidence_by_other_means(device: torch.device) -> None:
    x = data(CORRELATED, 4, device)
    _, precision = posterior(CORRELATED, x)
    guide = Gaussian(lambda x: posterior(CORRELATED, x)[0], precision.diagonal().rsqrt()).to(device)
    exact = log_evidence(CORRELATED, x)
    known = Estimate("exact", exact, num_particles=None)
    quick = bounds.LocalFit(max_steps=20)
    options: dict[str, Any] = {"local": quick, "flow": False, "progress": False}
    model = Toy(CORRELATED).to(device)
    found = diagnostics.gap((model, guide), x, evidence=known, **options)
    best = 0.5 * float(precision.diagonal().log().sum() - precision.logdet())
    near(found.approximation, best)
    near(found.total, best)
    assert found.approximation.se_draws == pytest.approx(found.elbo("own").se_draws)
    other = Estimate("other", exact[:3], num_particles=None)
    with pytest.raises(ArgumentError, match="the same 4 data"):
        diagnostics.gap((model, guide), x, evidence=other, **options)


# evidence by local fits


def test_local_evidence_of_a_hopeless_guide(device: torch.device) -> None:
    """Ten standard deviations off, importance sampling finds nothing; the fit finds it all."""
    x = data(CORRELATED, 5, device)
    guide = Gaussian(
        lambda x: posterior(CORRELATED, x)[0] + 3.0, torch.full((2,), 0.2).double()
    ).to(device)
    model, exact = Toy(CORRELATED).to(device), log_evidence(CORRELATED, x)
    before, state = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    options: dict[str, Any] = {"progress": False, "max_rows": 48}
    found = bounds.evidence((model, guide), x, 500, method="local", **options)
    torch.testing.assert_close(found.per_datum, exact, atol=1e-3, rtol=0.0)
    assert found.ess is not None
    assert float(found.ess.min()) > 490
    assert found.kind == "lower"
    assert bounds.evidence((model, guide), x, 500).mean < float(exact.mean()) - 1
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), state, strict=True))
    again = bounds.evidence((model, guide), x, 500, method="local", **options)
    assert torch.equal(again.per_datum, found.per_datum)


@pytest.mark.parametrize("family", bounds.FAMILIES)
def test_local_evidence_by_family(family: bounds.Family, device: torch.device) -> None:
    """However short the fit, draws are weighted: near the closed form, from the exact guide on."""
    x = data(ORTHOGONAL, 3, device)
    _, precision = posterior(ORTHOGONAL, x)
    guide = Gaussian(lambda x: posterior(ORTHOGONAL, x)[0], precision.diagonal().rsqrt()).to(device)
    found = bounds.evidence(
        (Toy(ORTHOGONAL).to(device), guide), x, 400, method="local", family=family,
        local=bounds.LocalFit(max_steps=20), progress=False,
    )  # fmt: skip
    near(found, float(log_evidence(ORTHOGONAL, x).mean()))
    assert found.name == f"evidence, local {family.replace('_', '-')} IWAE-400"
    assert found.num_particles == 400


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("name", ["functions", "two_sites"])
def test_the_parts_add_up(name: str, device: torch.device) -> None:
    """Where a site depends on what was drawn before, its own family isn't known, which is said."""
    model, guide, batch = pairs.PAIRS[name](device, 6)
    quick = bounds.LocalFit(num_particles=4, max_steps=3)
    found = diagnostics.gap(
        (model, guide), batch, num_particles=20, local=quick, progress=False, seed=4
    )
    expected = bounds.elbo((model, guide), batch, 20, seed=4)
    torch.testing.assert_close(found.elbo("guide").per_datum, expected.per_datum)
    torch.testing.assert_close(
        found.total.per_datum, found.amortisation.per_datum + found.approximation.per_datum
    )
    assert bool(found.instead) == (name == "two_sites")
    assert found.worst(3).shape == (3,)


def test_gap_refuses(device: torch.device) -> None:
    x = torch.rand(20, 5).round()
    ae = recipes.ae(5, 2, hidden=(8,)).to(device)
    flat = recipes.vae(5, 2, prior=priors.Flat, hidden=(8,)).to(device)
    for run in (diagnostics.gap, functools.partial(bounds.evidence, method="local")):
        with pytest.raises(UndefinedError, match="point mass"):
            run(ae, x, progress=False)
        with pytest.raises(UndefinedError, match="improper prior"):
            run(flat, x, progress=False)
    with pytest.raises(ArgumentError, match="num_particles"):
        diagnostics.gap(ae, x, num_particles=1)
    for wrong in ({"num_particles": 0}, {"max_steps": 0}, {"lr": 0.0}):
        with pytest.raises(ArgumentError, match="LocalFit"):
            bounds.LocalFit(**wrong)
