"""Bounds against closed forms: probabilistic PCA, known posteriors, known gaps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

import pvae
from pvae import VAE, bounds, guides, likelihoods, priors, recipes
from pvae.data import LinearGaussian, principal_components
from pvae.errors import PvaeWarning, UndefinedError
from pvae.networks import MLP
from pvae.pair import Pair
from tests import pairs

D, Q = 5, 2
STEPS = 4.5  # standard errors; two-sided, a false alarm in 1.5e5


def exact_pair(toy: LinearGaussian, device: torch.device, widen: float = 1.0) -> VAE:
    """The toy as a pair; the guide has the posterior's mean and, widened, its variances."""
    weight, bias = toy.weight, toy.bias
    _, covariance = toy.posterior(bias.unsqueeze(0))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

        def forward(self, z: Tensor) -> Tensor:
            return z @ self.weight.T + self.bias

    class Posterior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(covariance.diagonal().sqrt() * widen)

        def forward(self, x: Tensor) -> Any:
            mean, _ = toy.posterior(x.cpu())
            return dist.Normal(mean.to(x.device), self.scale).to_event(1)

    likelihood = likelihoods.Gaussian(Decoder(), D, sigma=toy.sigma)
    return VAE(priors.StandardNormal(Q), likelihood, Posterior()).to(device)


def orthogonal(sigma: float = 0.5) -> LinearGaussian:
    """A toy whose posterior is diagonal, so that a mean-field guide can be exact."""
    toy = LinearGaussian.random(D, Q, sigma)
    basis = torch.linalg.qr(toy.weight)[0]
    return LinearGaussian(basis * torch.tensor([2.0, 0.7]), toy.bias, sigma)


def test_closed_form_evidence_is_sklearns() -> None:
    """Probabilistic PCA by maximum likelihood, against scikit-learn's score_samples."""
    x = LinearGaussian.random(D, Q).sample(400)
    ours = principal_components(x, Q).log_evidence(x)
    pca = PCA(Q).fit(x.numpy())  # scikit-learn divides the covariance by N - 1
    pca.explained_variance_ *= (len(x) - 1) / len(x)
    pca.noise_variance_ *= (len(x) - 1) / len(x)
    np.testing.assert_allclose(ours.numpy(), pca.score_samples(x.numpy()), rtol=1e-10)


def test_closed_form_posterior_by_bayes_rule() -> None:
    """log p(x) = log p(z) + log p(x | z) - log p(z | x), at any z."""
    toy = LinearGaussian.random(D, Q)
    x, z = toy.sample(7), torch.randn(7, Q)
    mean, covariance = toy.posterior(x)
    posterior = torch.distributions.MultivariateNormal(mean, covariance).log_prob(z)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    likelihood = torch.distributions.Normal(z @ toy.weight.T + toy.bias, toy.sigma)
    ours = prior + likelihood.log_prob(x).sum(1) - posterior
    torch.testing.assert_close(ours, toy.log_evidence(x))


def test_with_the_exact_posterior_every_draw_is_the_evidence(device: torch.device) -> None:
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(50)
    exact = toy.log_evidence(x)
    lower = bounds.elbo(pair, x)
    torch.testing.assert_close(lower.values.cpu(), exact)
    found = bounds.evidence(pair, x, 10)
    torch.testing.assert_close(found.values.cpu(), exact)
    assert found.se_draws == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("widen", [0.6, 1.5])
def test_evidence_is_elbo_plus_the_gap(widen: float, device: torch.device) -> None:
    """log p(x) = ELBO + KL(q || p(z | x)), with the KL in closed form."""
    toy = orthogonal()
    pair, x = exact_pair(toy, device, widen), toy.sample(50)
    kl = Q * (0.5 * widen**2 - 0.5 - math.log(widen))
    lower = bounds.elbo(pair, x, 4000)
    gap = float(toy.log_evidence(x).mean()) - lower.mean
    assert abs(gap - kl) < STEPS * lower.se_draws
    assert gap > 0.1


def test_elbo_below_iwae_below_evidence_and_growing(device: torch.device) -> None:
    """In expectation; each comparison to 4.5 standard errors of its difference."""
    toy = LinearGaussian.random(D, Q, sigma=0.4)
    pair, x = exact_pair(toy, device, widen=1.3), toy.sample(40)
    exact = float(toy.log_evidence(x).mean())
    repeats = 60
    means, errors = [], []
    for k in (1, 2, 5, 20, 100):
        values = torch.tensor(
            [bounds.evidence(pair, x, k, seed=1000 * k + r).mean for r in range(repeats)]
        )
        means.append(float(values.mean()))
        errors.append(float(values.std()) / math.sqrt(repeats))
    lower = bounds.elbo(pair, x, 2000)
    assert abs(lower.mean - means[0]) < STEPS * math.hypot(lower.se_draws, errors[0])
    for i in range(4):
        assert means[i] < means[i + 1] + STEPS * math.hypot(errors[i], errors[i + 1])
    assert means[0] < exact - 0.1
    for mean, error in zip(means, errors, strict=True):
        assert mean < exact + STEPS * error
    assert means[-1] == pytest.approx(exact, abs=0.02)


def test_the_standard_error_over_draws_is_honest(device: torch.device) -> None:
    """The stated error against the scatter of repeated estimates, within a factor of 1.5.

    With 80 repeats the scatter's own relative error is 8%, so 1.5 is more than five of them.
    """
    toy = orthogonal()
    pair, x = exact_pair(toy, device, widen=1.2), toy.sample(30)
    for estimate in (bounds.elbo, bounds.evidence):
        results = [estimate(pair, x, 50, seed=s) for s in range(80)]
        scatter = float(torch.tensor([r.mean for r in results]).std())
        stated = sum(r.se_draws for r in results) / len(results)
        assert 1 / 1.5 < stated / scatter < 1.5


def test_the_standard_error_over_data_is_the_usual_one(device: torch.device) -> None:
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(30)
    found = bounds.evidence(pair, x, 10)
    exact = toy.log_evidence(x)
    assert found.se_data == pytest.approx(float(exact.std()) / math.sqrt(30))


def test_rate_and_distortion_add_up(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(20, D).round()
    found = bounds.elbo(vae, x, 3)
    assert found.distortion is not None
    assert found.rate is not None
    assert found.mean == pytest.approx(-found.distortion.mean - found.rate.mean)
    assert found.distortion.values.shape == found.values.shape == (20,)


def test_estimates_are_reproducible_and_leave_the_generators_alone(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(20, D).round()
    before = torch.get_rng_state()
    first = bounds.evidence(vae, x, 7, seed=5)
    torch.manual_seed(99)
    torch.rand(3)
    second = bounds.evidence(vae, x, 7, seed=5)
    other = bounds.evidence(vae, x, 7, seed=6)
    assert first.total == second.total != other.total
    torch.set_rng_state(before)
    bounds.elbo(vae, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert vae.training


@pytest.mark.parametrize("max_rows", [1, 7, 10_000])
def test_chunks_dont_change_an_exact_estimate(max_rows: int, device: torch.device) -> None:
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(9)
    found = bounds.evidence(pair, x, 20, max_rows=max_rows)
    torch.testing.assert_close(found.values.cpu(), toy.log_evidence(x))


def test_a_point_mass_has_no_evidence(device: torch.device) -> None:
    ae = recipes.ae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(20, D)
    with pytest.raises(UndefinedError, match=r"point mass \(Delta\) at site 'z'"):
        bounds.evidence(ae, x)
    found = bounds.elbo(ae, x)
    assert found.name == "log joint"
    assert found.rate is None
    assert found.distortion is not None
    squared = (x.to(device) - ae.reconstruct(x)).square().sum(1)
    expected = squared + D / 2 * math.log(math.pi)
    torch.testing.assert_close(found.distortion.values, expected)


# Global latents


class SharedMean(nn.Module):
    """mu ~ N(0, 1), x_n ~ N(mu, 1): evidence and posterior of the data set in closed form."""

    def forward(self, x: Tensor) -> None:
        one = x.new_tensor(1.0)
        mu = pyro.sample("mu", dist.Normal(0 * one, one))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0 * one, one))
            pyro.sample("x", dist.Normal(mu + z, one), obs=x[:, 0])


class SharedMeanGuide(nn.Module):
    """q(mu) exact; q(z | x, mu = its mean), which is narrower than the truth given nothing."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        n = len(x)
        variance = 1 / (1 + n / 2)
        self.loc = nn.Parameter(torch.tensor(variance * float(x.sum()) / 2))
        self.scale = nn.Parameter(torch.tensor(math.sqrt(variance)))

    def forward(self, x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(self.loc, self.scale))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x[:, 0] - mu) / 2, x.new_tensor(math.sqrt(0.5))))


def test_the_data_sets_bound_with_a_global_latent(device: torch.device) -> None:
    """With exact guides every draw of the bound is log p(x_1, ..., x_N)."""
    x = torch.randn(6, 1) + 0.7
    covariance = torch.ones(6, 6) + 2 * torch.eye(6)
    exact = torch.distributions.MultivariateNormal(torch.zeros(6), covariance).log_prob(x[:, 0])
    model, guide = SharedMean().to(device), SharedMeanGuide(x).to(device)
    for estimate in (bounds.elbo, bounds.evidence):
        found = estimate((model, guide), x, 20)
        assert found.total == pytest.approx(float(exact), rel=1e-6)
        assert "a bound for the data set of 6, with global site(s) mu" in str(found)
        with pytest.raises(UndefinedError, match=r"global site\(s\) mu"):
            _ = found.per_datum


def test_one_global_draw_is_shared_by_all_data(device: torch.device) -> None:
    """In chunks of one row the bound is the same: g isn't drawn anew for each."""
    x = torch.randn(6, 1)
    model, guide = SharedMean().to(device), SharedMeanGuide(x).to(device)
    whole = bounds.evidence((model, guide), x, 5, num_global=4)
    parts = bounds.evidence((model, guide), x, 5, num_global=4, max_rows=5)
    assert whole.total == pytest.approx(parts.total, rel=1e-6)


# Pairs that pvae did not build


@pytest.mark.usefixtures("store")
def test_terms_of_a_scaled_pair_are_per_datum(device: torch.device) -> None:
    """subsample= scales the loss up, and leaves the evidence of a datum alone."""
    model, guide, (x,) = pairs.subsample_given(device)
    toy = LinearGaussian(model.decoder.weight.detach(), model.decoder.bias.detach(), 1.0)
    found = bounds.evidence((model, guide), x, 20_000)
    with torch.random.fork_rng():
        exact = toy.log_evidence(x.cpu() if device.type == "cpu" else x)
    assert abs(found.mean - float(exact.mean())) < STEPS * found.se_draws + 1e-3


def test_linear_vae_reaches_the_exact_evidence(device: torch.device) -> None:
    """Trained from scratch on probabilistic-PCA data, within 0.05 nats of the closed form.

    Its ELBO never exceeds the evidence of its own parameters by more than 4 standard errors.
    """
    toy = LinearGaussian.random(D, Q, sigma=0.7, seed=3)
    x = toy.sample(1000)
    best = principal_components(x, Q).log_evidence(x).mean()
    vae = VAE(
        priors.StandardNormal(Q),
        likelihoods.Gaussian(MLP(Q, D, ()), D, sigma="shared"),
        guides.MeanField(MLP(D, 2 * Q, ()), Q),
    )
    excesses = []

    for stage in range(4):
        pvae.fit(
            vae,
            x,
            epochs=60,
            batch_size=100,
            lr=(2e-2, 5e-3, 1e-3, 2e-4)[stage],
            seed=stage,
            device=device,
            progress=False,
        )
        likelihood = vae.model.likelihood
        decoder = likelihood.network.layers[0]
        sigma = likelihood(torch.zeros(1, Q, device=device)).base_dist.scale.flatten()[0]
        own = LinearGaussian(
            decoder.weight.detach().cpu(),
            decoder.bias.detach().cpu(),
            float(sigma.detach()),
        ).log_evidence(x)
        lower = bounds.elbo(vae, x, 50, seed=stage)
        excesses.append((lower.mean - float(own.mean())) / lower.se_draws)
    assert max(excesses) < 4
    assert lower.mean == pytest.approx(float(best), abs=0.05)
    assert bounds.evidence(vae, x, 100).mean == pytest.approx(float(best), abs=0.05)


def test_it_prints_itself(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(20, D).round()
    text = str(bounds.evidence(vae, x, 10))
    assert text.startswith("evidence, IWAE-10: ")
    assert "nats per datum, N = 20, K = 10" in text


# Found by trying to break them


@pytest.mark.usefixtures("store")
def test_a_joint_autoguide_counts_in_the_total(device: torch.device) -> None:
    """Its density is at an auxiliary site outside the plate, over all local latents at once."""
    x = torch.randn(8, device=device)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), x.new_tensor(1.0)))
            pyro.sample("x", dist.Normal(z, x.new_tensor(0.5)), obs=x)

    guide = pyro.infer.autoguide.AutoMultivariateNormal(model)
    lower = bounds.elbo((model, guide), x, 200)
    better = bounds.evidence((model, guide), x, 3, num_global=200)
    exact = float(dist.Normal(0.0, math.sqrt(1.25)).log_prob(x).sum())
    trace_elbo = [-pyro.infer.Trace_ELBO().loss(model, guide, x) for _ in range(200)]
    mean, error = np.mean(trace_elbo), np.std(trace_elbo) / math.sqrt(200)
    assert abs(lower.total - mean) < STEPS * math.hypot(error, lower.se_total)
    assert better.total < exact
    with pytest.raises(UndefinedError, match="_AutoMultivariateNormal_latent"):
        _ = lower.per_datum


def test_a_factor_outside_the_plate_counts_in_the_total(device: torch.device) -> None:
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(12).to(device)

    def model(x: Tensor) -> None:
        pyro.factor("prior_of_weights", x.new_tensor(-1000.0))
        pair.model(x)

    found = bounds.elbo((model, pair.guide), x)
    assert found.total == pytest.approx(float(toy.log_evidence(x.cpu()).sum()) - 1000.0)
    assert "prior_of_weights" in str(found)


def test_rows_that_a_loader_doesnt_yield_dont_count(device: torch.device) -> None:
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(25)
    rows = torch.utils.data.TensorDataset(x)
    loader = torch.utils.data.DataLoader(rows, batch_size=10, drop_last=True)
    with pytest.warns(PvaeWarning, match="results are of 20 rows, without the last 5"):
        found = bounds.elbo(pair, loader)
    assert found.num_data == 20
    assert found.mean == pytest.approx(float(toy.log_evidence(x[:20]).mean()))
    with pytest.warns(PvaeWarning, match="results are of 20 rows"):
        assert bounds.evidence(pair, loader, 5).mean == pytest.approx(found.mean)


def test_an_improper_prior_has_no_evidence(device: torch.device) -> None:
    vae = recipes.vae(D, Q, prior=priors.Flat, hidden=(8,)).to(device)
    x = torch.rand(20, D).round()
    with pytest.raises(UndefinedError, match="an improper prior at site 'z'"):
        bounds.evidence(vae, x)
    found = bounds.elbo(vae, x)
    assert found.name == "unnormalised ELBO"
    assert found.rate is None


@pytest.mark.usefixtures("store")
def test_a_global_point_mass_makes_no_bound(device: torch.device) -> None:
    x = torch.randn(50, device=device)

    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), x.new_tensor(1e-4)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, x.new_tensor(1.0)), obs=x)

    guide = pyro.infer.autoguide.AutoDelta(model)
    assert bounds.elbo((model, guide), x).name == "log joint"
    assert bounds.evidence((model, guide), x, 2).name.startswith("log joint")


def test_out_of_support_data_are_named(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    with pytest.raises(pvae.errors.DataError, match=r"row 0: expected values in the support"):
        bounds.elbo(vae, torch.full((20, D), 0.5))


@pytest.mark.usefixtures("store")
def test_a_pair_of_one_length_is_evaluated_at_that_length(device: torch.device) -> None:
    """A guide with parameters for each row, of more rows than a chunk has."""
    x = torch.randn(1500, device=device)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), x.new_tensor(1.0)))
            pyro.sample("x", dist.Normal(z, x.new_tensor(1.0)), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: x / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, x.new_tensor(math.sqrt(0.5))))

    pair = Pair(model, guide)
    pair.inspect(x)  # makes the parameter, of all rows
    found = bounds.evidence(pair, x, 3)
    torch.testing.assert_close(found.per_datum, dist.Normal(0.0, math.sqrt(2.0)).log_prob(x))
