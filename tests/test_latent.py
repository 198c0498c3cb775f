"""Codes, densities of codes, models with another prior, vector arithmetic and neighbours."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.mcmc.util import initialize_model
from scipy.spatial import geometric_slerp
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pvae import VAE, bounds, guides, latent, likelihoods, priors, randomness, recipes, testing
from pvae import terms as t
from pvae.data import LinearGaussian
from pvae.errors import (
    ArgumentError,
    DataError,
    PairError,
    PvaeError,
    TrainingError,
    UndefinedError,
)
from pvae.networks import MLP
from pvae.sites import penalty
from tests import pairs

D, Q = pairs.D, pairs.Q
STEPS = 5.5  # standard errors; two-sided, a false alarm in 2.6e7, and in 2.6e5 of 100 comparisons


def blobs(n: int = 400) -> Tensor:
    """Three clusters in the plane, of unequal size and shape."""
    centres = torch.tensor([[0.0, 0.0], [6.0, 1.0], [-3.0, 5.0]])
    which = torch.arange(n) % 5 % 3
    return centres[which] + torch.randn(n, 2) @ torch.tensor([[1.0, 0.6], [0.0, 0.5]])


# Codes


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "name", ["pyro_modules", "labels", "subsample_given", "subsample_drawn", "masked", "enumerated"]
)
def test_codes_are_the_encoders_means(name: str, device: torch.device) -> None:
    model, guide, batch = pairs.PAIRS[name](device)
    x = batch[0]
    if name == "labels":
        x = torch.cat([x, nn.functional.one_hot(batch[1], 3).to(x)], 1)
    expected = guide.encoder(x)[:, :Q]
    found = latent.codes((model, guide), batch, max_rows=7)
    torch.testing.assert_close(found, expected)
    assert found.device.type == device.type
    assert not found.requires_grad


@pytest.mark.usefixtures("store")
def test_codes_of_functions_and_beside_a_global_latent(device: torch.device) -> None:
    for build in (pairs.functions, pairs.global_latent):
        model, guide, batch = build(device)
        trace = poutine.trace(guide).get_trace(*batch)
        expected = trace.nodes["z"]["fn"].base_dist.loc
        torch.testing.assert_close(latent.codes((model, guide), batch), expected)


def test_a_points_code_is_the_point(device: torch.device) -> None:
    ae, x = recipes.ae(D, Q, hidden=(8,)).to(device), torch.randn(30, D)
    torch.testing.assert_close(latent.codes(ae, x), ae.encode(x))
    draws = latent.codes(ae, x, num_particles=3)
    torch.testing.assert_close(draws, ae.encode(x).expand(3, 30, Q))


def test_a_mean_that_depends_on_draws_is_averaged(device: torch.device) -> None:
    """In q(z1 | x) q(z2 | z1) all is linear: E[z2 | x] is the map of E[z1 | x]."""
    model, guide, batch = pairs.two_sites(device)
    loc, log_scale = guide.first(batch[0]).chunk(2, -1)
    weight, bias = guide.second.weight[:1], guide.second.bias[:1]
    torch.testing.assert_close(latent.codes((model, guide), batch, site="z1"), loc)
    k = 4000
    found = latent.codes((model, guide), batch, site="z2", num_particles_of_mean=k, max_rows=1000)
    error = ((log_scale.exp() * weight).square().sum(1, keepdim=True) / k).sqrt()
    assert bool(((found - (loc @ weight.T + bias)).abs() < STEPS * error).all())
    assert bool((found != loc @ weight.T + bias).all())  # an estimate


class Opaque(dist.Normal):
    """A normal distribution that doesn't tell its mean."""

    @property
    def mean(self) -> Tensor:
        raise NotImplementedError


@pytest.mark.usefixtures("store")
def test_an_unknown_mean_is_averaged(device: torch.device) -> None:
    model, _, batch = pairs.pyro_modules(device)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Opaque(x[:, :Q], x.new_tensor(0.5)).to_event(1))

    found = latent.codes((model, guide), batch, num_particles_of_mean=1000, max_rows=300)
    error = 0.5 / math.sqrt(1000)
    assert bool(((found - batch[0][:, :Q]).abs() < STEPS * error).all())


@pytest.mark.usefixtures("store")
def test_draws_have_the_guides_moments(device: torch.device) -> None:
    model, guide, batch = pairs.pyro_modules(device)
    s = 3000
    draws = latent.codes((model, guide), batch, num_particles=s, max_rows=500)
    assert draws.shape == (s, 12, Q)
    loc, log_scale = guide.encoder(batch[0]).detach().chunk(2, -1)
    w = (draws - loc) / log_scale.exp()
    assert float(w.mean(0).abs().max()) < STEPS / math.sqrt(s)
    assert float((w.var(0) - 1).abs().max()) < STEPS * math.sqrt(2 / s)
    again = latent.codes((model, guide), batch, num_particles=s, max_rows=500)
    other = latent.codes((model, guide), batch, num_particles=s, max_rows=500, seed=1)
    assert torch.equal(draws, again)
    assert not torch.equal(draws, other)


def test_codes_are_computed_in_bounded_memory(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(4,)).to(device)
    seen = []
    network = vae.guide.posterior.get_submodule("network")
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel() // D))
    latent.codes(vae, torch.rand(500, D).round(), max_rows=60)
    assert max(seen[-9:]) == 60  # the first passes are the probes


def test_codes_of_a_loaders_batches(device: torch.device) -> None:
    vae, x = recipes.vae(D, Q, hidden=(4,)).to(device), torch.rand(25, D).round()
    loader = DataLoader(TensorDataset(x), batch_size=10)
    found = latent.codes(vae, loader)
    torch.testing.assert_close(found, vae.encode(x))


@pytest.mark.parametrize("dim", [-1, -2])
def test_codes_come_datum_by_datum_wherever_the_data_plate_is(
    dim: int, device: torch.device
) -> None:
    """Beside a plate of 3 parts, to its right or left."""

    def frames(x: Tensor) -> tuple[Any, Any, Tensor]:
        other = -3 - dim
        loc = torch.stack([x[:, :Q], 2 * x[:, :Q], x[:, Q : 2 * Q]], other - 1)
        return pyro.plate("data", len(x), dim=dim), pyro.plate("parts", 3, dim=other), loc

    def model(x: Tensor) -> None:
        rows, parts, loc = frames(x)
        with rows, parts:
            z = pyro.sample("z", dist.Normal(torch.zeros_like(loc), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=loc)

    def guide(x: Tensor) -> None:
        rows, parts, loc = frames(x)
        with rows, parts:
            pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))

    x = torch.randn(7, D, device=device)
    expected = torch.stack([x[:, :Q], 2 * x[:, :Q], x[:, Q : 2 * Q]], 1)
    torch.testing.assert_close(latent.codes((model, guide), x, max_rows=2), expected)
    draws = latent.codes((model, guide), x, num_particles=5, max_rows=10)
    assert draws.shape == (5, 7, 3, Q)
    assert float((draws - expected).abs().max()) < 0.1 * 6  # 210 draws: a false alarm in 2.4e6


def test_which_site_has_codes(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    with pytest.raises(UndefinedError, match=r"'z2' and 'z1'(.|\n)*site='z2'"):
        latent.codes((model, guide), batch)
    with pytest.raises(UndefinedError, match="'x'; there are: 'z2' and 'z1'"):
        latent.codes((model, guide), batch, site="x")


def test_a_latent_without_a_mean_has_draws_alone(device: torch.device) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(x.new_ones(3)))
            pyro.sample("x", dist.Normal(z.to(x), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(x.new_ones(len(x), 3)))

    x = torch.randn(9, device=device)
    with pytest.raises(UndefinedError, match=r"mean of q at site 'z'(.|\n)*num_particles=1"):
        latent.codes((model, guide), x)
    assert set(latent.codes((model, guide), x, num_particles=50).flatten().tolist()) == {0, 1, 2}


# Densities of codes


def test_the_gaussian_is_the_best_one(device: torch.device) -> None:
    z = blobs().to(device)
    density = latent.fit_density(z, ridge=1e-10)
    fn = density()
    torch.testing.assert_close(fn.mean, z.mean(0))
    torch.testing.assert_close(fn.covariance_matrix, torch.cov(z.T, correction=0))
    testing.check_conditional(density)


def test_the_mixture_is_scikit_learns(device: torch.device) -> None:
    z = blobs()
    spread = float(z.var(0, correction=0).mean())
    theirs = GaussianMixture(3, reg_covar=1e-6 * spread, random_state=5, max_iter=1000).fit(z)
    density = latent.fit_density(z.to(device), "gmm", num_components=3, seed=5)
    points = torch.randn(50, 2) * 4
    ours = density().log_prob(points.to(device)).cpu()
    np.testing.assert_allclose(ours, theirs.score_samples(points.numpy()), atol=1e-8, rtol=1e-8)
    testing.check_conditional(density)
    draws = density().expand([20_000])()
    error = z.std(0) / math.sqrt(20_000)
    assert bool(((draws.mean(0).cpu() - z.mean(0)).abs() < STEPS * error).all())


class LaplaceFamily(nn.Module):
    """Its best fit is at the median, with the mean absolute deviation from it as its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self) -> Any:
        return dist.Laplace(self.loc, self.log_scale.exp()).to_event(1)


def test_a_trained_density_reaches_the_maximum_likelihood(device: torch.device) -> None:
    z = (torch.randn(301, 2).exp() * torch.tensor([1.0, 50.0]) + 10).to(device)
    family = LaplaceFamily()
    density = latent.fit_density(z, family, num_steps=400, lr=2e-2, progress=False)
    median = z.median(0).values
    best = dist.Laplace(median, (z - median).abs().mean(0)).to_event(1).log_prob(z).mean()
    found = density().log_prob(z).mean()
    assert float(best) - 1e-3 < float(found) < float(best) + 1e-6
    assert torch.equal(family.loc, torch.zeros(2))  # a copy is trained
    assert not any(p.requires_grad for p in density.parameters())
    testing.check_conditional(density)


def test_a_flow_is_trained_in_batches(device: torch.device) -> None:
    """A banana: an affine autoregressive flow after one with a network has it in its family."""
    torch.manual_seed(2)
    u = torch.randn(3000, 2)
    z = torch.stack([u[:, 0] * 3, u[:, 1] * 0.5 + u[:, 0].square() + 20], 1).to(device)
    truth = dist.Normal(torch.zeros(2), torch.tensor([3.0, 0.5])).to_event(1)
    exact = truth.log_prob(torch.stack([z[:, 0], z[:, 1] - (z[:, 0] / 3).square() - 20], 1).cpu())
    flow = zuko.flows.MAF(2, transforms=1, hidden_features=(32,))
    density = latent.fit_density(z, flow, num_steps=500, lr=1e-2, batch_size=256, progress=False)
    with torch.no_grad():
        gap = float(exact.mean() - density().log_prob(z).mean())
        gaussian = float(exact.mean() - latent.fit_density(z)().log_prob(z).mean())
    assert gap < 0.1
    assert gaussian > 0.5
    assert density().expand([7])().shape == (7, 2)


@pytest.mark.parametrize("kind", ["gaussian", "gmm", "module"])
def test_a_direction_without_variance_has_a_density(kind: str, device: torch.device) -> None:
    """That of the ridge: the standard deviation is 1e-3 of the others' mean square."""
    flat = torch.cat([blobs(), torch.full((400, 1), 3.0)], 1).to(device)

    class Family(LaplaceFamily):
        def __init__(self) -> None:
            super().__init__()
            self.loc, self.log_scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    chosen: Any = Family() if kind == "module" else kind
    density = latent.fit_density(
        flat, chosen, num_components=3, num_steps=200, lr=1e-2, progress=False
    )
    draws = density().expand([5000])()
    assert bool(density().log_prob(flat).isfinite().all())
    width = 1e-3 * math.sqrt(float(flat.var(0, correction=0).mean()))
    assert float((draws[:, 2] - 3).square().mean().sqrt()) == pytest.approx(width, rel=0.2)
    same = latent.fit_density(torch.ones(5, 2, device=device))
    assert bool((same().expand([9])() - 1).abs().max() < 1e-6)
    assert bool(latent.fit_density(torch.zeros(5, 2))().log_prob(torch.zeros(2)).isfinite())


def test_densities_move_and_have_the_codes_type(device: torch.device) -> None:
    z = blobs().to(device)
    flow = zuko.flows.MAF(2, transforms=1, hidden_features=(4,))
    for kind in ("gaussian", "gmm", flow):
        options: dict[str, Any] = {"num_components": 3, "num_steps": 2, "progress": False}
        single = latent.fit_density(z.float(), kind, **options)
        draw = single()()
        assert draw.dtype == torch.float32
        assert draw.device.type == device.type
        double = copy.deepcopy(single).double()
        expected = double().log_prob(z[:9])
        torch.testing.assert_close(
            single().log_prob(z[:9].float()).double(), expected, rtol=1e-4, atol=1e-4
        )
        other = latent.fit_density(z + 1, kind, **options)
        other.load_state_dict(double.state_dict())
        torch.testing.assert_close(other().log_prob(z[:9]), expected)


def test_fitting_is_reproducible_and_leaves_the_generators_alone() -> None:
    z = blobs()
    flow = zuko.flows.MAF(2, transforms=1, hidden_features=(4,))
    before = randomness.get_state()
    for kind in ("gmm", flow):
        options: dict[str, Any] = {"num_components": 4, "num_steps": 3, "progress": False}
        options["batch_size"] = 16
        first, second, other = (
            latent.fit_density(z, kind, seed=s, **options)().log_prob(z) for s in (0, 0, 1)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
    after = randomness.get_state()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("codes", "options", "error", "message"),
    [
        (torch.zeros(4), {}, DataError, r"shape \(N, d\); got shape \(4,\)"),
        (torch.zeros(4, 2).long(), {}, DataError, "floating"),
        (np.zeros((4, 2)), {}, DataError, "ndarray"),
        (torch.tensor([[0.0, 1.0], [0.0, math.nan]]), {}, DataError, "codes, row 1"),
        (torch.zeros(0, 2), {}, DataError, "at least one row"),
        (torch.zeros(20, 2), {"kind": "gmm"}, DataError, "1 among 20"),
        (torch.randn(4, 2), {"kind": "gmm"}, DataError, "num_components=4"),
        (torch.randn(4, 2), {"kind": "kde"}, ArgumentError, "'gaussian', 'gmm'"),
        (torch.randn(4, 2), {"ridge": 0}, ArgumentError, "ridge"),
        (torch.randn(4, 2), {"kind": priors.StandardNormal(2)}, ArgumentError, "parameters"),
        (torch.randn(4, 2), {"kind": priors.Normal(3)}, ArgumentError, r"event_shape \(2,\)"),
        (
            torch.randn(4, 2),
            {"kind": priors.Normal(2), "lr": 1e30, "num_steps": 3},
            TrainingError,
            "lr=",
        ),
    ],
)
def test_what_has_no_density_is_refused(
    codes: Any, options: dict[str, Any], error: type[PvaeError], message: str
) -> None:
    with pytest.raises(error, match=message):
        latent.fit_density(codes, **options, progress=False)


def test_an_autoencoder_with_a_density_is_a_generative_model(device: torch.device) -> None:
    """The module's example; its samples are those of the density, decoded."""
    ae, x = recipes.ae(D, Q, hidden=(8,)).to(device), torch.randn(300, D)
    z = latent.codes(ae, x)
    for kind in ("gmm", zuko.flows.MAF(Q, transforms=1, hidden_features=(4,))):
        density = latent.fit_density(z, kind, num_components=3, num_steps=2, progress=False)
        vae = VAE(density, ae.model.likelihood, ae.guide.posterior)
        samples = vae.sample(4000, mean=True)
        moved = ae.decode(density().expand([4000])())
        error = (samples.std(0) + moved.std(0)) / math.sqrt(4000)
        assert bool(((samples.mean(0) - moved.mean(0)).abs() < STEPS * error).all())
        lower = bounds.elbo(vae, x)
        assert lower.name == "log joint"


# Models with another prior


class Linear(nn.Module):
    """A linear decoder whose parameters the test knows."""

    def __init__(self, toy: LinearGaussian) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(toy.weight.clone()), nn.Parameter(toy.bias.clone())

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.bias


def shifted(toy: LinearGaussian, device: torch.device) -> tuple[Any, Any, Any, Any]:
    """A linear model with the prior N(m, S), its exact guide, and the marginal of x."""
    mean, factor = torch.tensor([1.0, -2.0]), torch.tensor([[0.8, 0.0], [0.5, 1.5]])
    covariance = factor @ factor.T
    likelihood = likelihoods.Gaussian(Linear(toy), len(toy.bias), sigma=toy.sigma)
    flat = VAE(priors.Flat(2), likelihood, guides.MeanField(MLP(5, 4), 2)).to(device)
    model = latent.with_prior(flat, dist.MultivariateNormal(mean, scale_tril=factor)).model
    precision = covariance.inverse() + toy.weight.T @ toy.weight / toy.sigma**2
    posterior = precision.inverse()

    def guide(x: Tensor) -> None:
        pull = (x.cpu() - toy.bias) @ toy.weight / toy.sigma**2 + covariance.inverse() @ mean
        with pyro.plate("data", len(x)):
            fn = dist.MultivariateNormal((pull @ posterior).to(x), posterior.to(x))
            pyro.sample("z", fn)

    marginal = dist.MultivariateNormal(
        toy.weight @ mean + toy.bias,
        toy.weight @ covariance @ toy.weight.T + toy.sigma**2 * torch.eye(len(toy.bias)),
    )
    return model.to(device), guide, marginal, (mean, factor)


def test_the_evidence_under_another_prior_is_the_closed_form(device: torch.device) -> None:
    """The flat prior has none; with N(m, S) and the exact guide every draw is log p(x)."""
    toy = LinearGaussian.random(5, 2)
    model, guide, marginal, _ = shifted(toy, device)
    x = toy.sample(30)
    found = bounds.evidence((model, guide), x, 7)
    torch.testing.assert_close(found.per_datum.cpu(), marginal.log_prob(x))
    assert bounds.elbo((model, guide), x).mean == pytest.approx(float(marginal.log_prob(x).mean()))


def test_samples_under_another_prior_have_the_marginals_moments(device: torch.device) -> None:
    toy = LinearGaussian.random(5, 2)
    model, guide, marginal, (mean, factor) = shifted(toy, device)
    pair, n = (model, guide), 20_000
    draws = latent.sample(pair, torch.zeros(3, 5), n).cpu()
    white = torch.linalg.solve(marginal.scale_tril, (draws - marginal.mean).T).T
    assert float(white.mean(0).abs().max()) < STEPS / math.sqrt(n)
    off = white.T @ white / n - torch.eye(5)
    assert float(off.abs().max()) < STEPS * math.sqrt(2 / n)
    z = latent.sample(pair, torch.zeros(3, 5), n, site="z").cpu()
    white = torch.linalg.solve(factor, (z - mean).T).T
    assert float(white.mean(0).abs().max()) < STEPS / math.sqrt(n)
    means = latent.sample(pair, torch.zeros(3, 5), n, mean=True).cpu()
    torch.testing.assert_close(means, z @ toy.weight.T + toy.bias)  # one seed, one run


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "name",
    [
        "functions",
        "pyro_modules",
        "two_sites",
        "subsample_given",
        "subsample_drawn",
        "global_latent",
        "masked",
        "enumerated",
    ],
)
def test_the_prior_that_was_there_changes_nothing(name: str, device: torch.device) -> None:
    """Plates, particles, masks, scales, enumeration: all as before; another prior differs."""
    model, guide, batch = pairs.PAIRS[name](device)
    site, size = ("z2", 1) if name == "two_sites" else ("z", Q)
    pair = (model, guide)
    same = latent.with_prior(pair, priors.StandardNormal(size).to(device), site)
    other = latent.with_prior(pair, priors.Laplace(size).to(device), site)
    for estimate in (bounds.elbo, bounds.evidence):
        before = estimate(pair, batch, 5).total
        assert estimate(same, batch, 5).total == pytest.approx(before, rel=1e-12)
        assert estimate(other, batch, 5).total != pytest.approx(before, rel=1e-3)
    if name != "enumerated":
        loss = Trace_ELBO()
        torch.manual_seed(1)
        before = loss.loss(model, guide, *batch)
        torch.manual_seed(1)
        assert loss.loss(same.model, guide, *batch) == pytest.approx(before, rel=1e-12)


def test_the_density_is_scored_site_by_site(device: torch.device) -> None:
    """z1, whose prior depended on z2's draws, no longer does."""
    model, guide, batch = pairs.two_sites(device)
    density = latent.fit_density(blobs().to(device), "gmm", num_components=3)
    wrapped = latent.with_prior((model, guide), density, "z1")
    after = t.compute(wrapped.inspect(batch), batch, num_particles=4).sites
    assert after["z1"].value is not None
    torch.testing.assert_close(after["z1"].log_p, density().log_prob(after["z1"].value))
    assert after["z1"].model.batch_shape == (4, 12)


def test_a_mask_in_the_distribution_and_a_plate_without_a_size_stay(device: torch.device) -> None:
    keep = torch.tensor([True, False, True], device=device)
    z = torch.randn(3, 2, device=device)

    def model(x: Tensor) -> None:
        with pyro.plate("data"):
            fn = dist.Normal(x.new_zeros(3, 2), 1.0).to_event(1).mask(keep)
            pyro.sample("z", fn)

    density = dist.Normal(z.new_full((2,), 0.3), 0.7).to_event(1)
    wrapped = poutine.condition(latent.with_prior((model, model), density).model, {"z": z})
    trace = poutine.trace(wrapped).get_trace(z)
    assert trace.nodes["z"]["is_observed"]
    torch.testing.assert_close(trace.log_prob_sum(), density.log_prob(z)[keep].sum())


def test_an_enumerated_latent_before_the_site(device: torch.device) -> None:
    """z's prior depended on a class that is summed out; now only x does."""
    density = dist.Normal(torch.tensor([0.5, -1.0], device=device), 0.8).to_event(1)
    centres = torch.tensor([[2.0, 0.0], [-2.0, 1.0], [0.0, 3.0]], device=device)

    def model(x: Tensor, prior: Any = None) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(x.new_tensor([0.2, 0.3, 0.5])))
            z = pyro.sample("z", prior or dist.Normal(centres[c], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + centres[c], 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = torch.randn(6, 2, device=device)
    wrapped = latent.with_prior((config_enumerate(model), guide), density)
    found = bounds.elbo(wrapped, x, 4)
    expected = bounds.elbo((config_enumerate(partial(model, prior=density)), guide), x, 4)
    torch.testing.assert_close(found.per_datum, expected.per_datum)
    assert found.distortion is not None  # log p(x | z) and log r(z) stay apart
    assert bounds.elbo((config_enumerate(model), guide), x, 4).distortion is None


@pytest.mark.parametrize("kind", ["gaussian", "gmm", "flow"])
def test_hmc_sees_the_density(kind: str, device: torch.device) -> None:
    """Its potential is -log p(x | z) - log r(z), as z is unconstrained."""
    toy = LinearGaussian.random(5, 2)
    flow = zuko.flows.MAF(2, transforms=1, hidden_features=(4,))
    density = latent.fit_density(
        blobs().to(device),
        flow if kind == "flow" else kind,
        num_components=3,
        num_steps=2,
        progress=False,
    )
    likelihood = likelihoods.Gaussian(Linear(toy), 5, sigma=toy.sigma).to(device)
    model = latent.with_prior(VAE(priors.Flat(2), likelihood, MLP(5, 4)), density).model
    x, z = toy.sample(4).to(device), torch.randn(4, 2, device=device)
    _, potential, _, _ = initialize_model(model, model_args=(x,))
    expected = -(density().log_prob(z) + likelihood(z).log_prob(x)).sum()
    torch.testing.assert_close(potential({"z": z}), expected)


@pytest.mark.usefixtures("store")
def test_parameters_of_a_density_are_found_and_trained(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    first = latent.with_prior((model, guide), priors.Normal(1), "z2")
    pair = latent.with_prior(first, priors.Normal(Q), "z1")
    both = pair.model.to(device)
    names = {n for n, _ in both.named_parameters()}
    assert {"density.loc", "model.density.loc", "model.model.decoder.weight"} <= names
    old = {n: p.detach().clone() for n, p in both.named_parameters() if "density" in n}
    torch.manual_seed(0)
    SVI(both, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO()).step(*batch)
    assert all(bool((both.get_parameter(n) != p).any()) for n, p in old.items())
    assert len(pyro.get_param_store()) == 0
    structure = pair.inspect(batch)
    assert len(structure.parameters) == len([*guide.parameters(), *both.parameters()])


def test_a_model_that_has_no_such_latent_is_refused(device: torch.device) -> None:
    vae, x = recipes.vae(D, Q, hidden=(4,)).to(device), torch.rand(3, D, device=device).round()
    for site in ("y", "x"):  # x is observed
        with pytest.raises(PairError, match=rf"a latent '{site}' in the model; got latents: 'z'"):
            latent.with_prior(vae, priors.StandardNormal(Q), site).model(x)
    with pytest.raises(PairError, match=r"event_shape \(2,\)(.|\n)*got event_shape \(3,\)"):
        latent.with_prior(vae, priors.StandardNormal(3)).model(x)
    with pytest.raises(ArgumentError, match="density"):
        latent.with_prior(vae, torch.zeros(2))


# Samples of any model


def test_samples_are_those_of_the_vae(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(4, D).round()
    torch.manual_seed(7)
    expected = vae.sample(10)
    before = torch.get_rng_state()
    torch.testing.assert_close(latent.sample(vae, x, 10, seed=7), expected)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    expected = vae.sample(10, mean=True)
    torch.testing.assert_close(latent.sample(vae, x, 10, mean=True, seed=7), expected)
    assert latent.sample(vae, x).shape == (4, D)
    assert vae.training


def test_samples_are_for_the_labels_given(device: torch.device) -> None:
    model, guide, (x, y) = pairs.labels(device)
    z = latent.sample((model, guide), (x, y), 3000, site="z")
    label = y[torch.arange(3000, device=device) % len(y)]
    off = z - model.prior(label).detach()
    assert float(off.mean(0).abs().max()) < STEPS / math.sqrt(3000)
    assert float((off.var(0) - 1).abs().max()) < STEPS * math.sqrt(2 / 3000)


def test_penalties_dont_matter_for_samples(device: torch.device) -> None:
    vae, x = recipes.vae(D, Q, hidden=(8,)).to(device), torch.rand(4, D, device=device).round()

    def model(x: Tensor) -> None:
        penalty("r", x.new_tensor(3.0))
        vae.model(x)

    for mean in (False, True):
        expected = latent.sample(vae, x, mean=mean)
        torch.testing.assert_close(latent.sample((model, vae.guide), x, mean=mean), expected)


def test_what_cant_be_sampled_is_refused(device: torch.device) -> None:
    ae = recipes.ae(D, Q, hidden=(4,)).to(device)
    with pytest.raises(UndefinedError, match="ex-post density"):
        latent.sample(ae, torch.zeros(3, D))

    def model(x: Tensor, weight: float, name: str = "y") -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if weight:
                pyro.factor("f", weight * z)
            else:
                pyro.sample("y", Opaque(z, 1.0), obs=x)
            pyro.deterministic("twice", 2 * z)

    x = torch.zeros(3, device=device)
    with pytest.raises(UndefinedError, match="factor 'f'"):
        latent.sample((lambda x: model(x, 1.0), ae.guide), x)
    with pytest.raises(UndefinedError, match=r"exactly one observed site; got 'x' and 'y'"):
        latent.sample((lambda x: model(x, 0.0), ae.guide), x)
    assert latent.sample((lambda x: model(x, 0.0), ae.guide), x, site="y").shape == (3,)
    with pytest.raises(UndefinedError, match="whose mean is known; got Opaque"):
        latent.sample((lambda x: model(x, 0.0), ae.guide), x, site="y", mean=True)


# Vector arithmetic


def test_spherical_interpolation_is_scipys() -> None:
    a, b = (v / v.norm(dim=1, keepdim=True) for v in torch.randn(2, 6, 10))
    ours = latent.interpolate(a, b, 7, "spherical")
    for i in range(6):
        theirs = geometric_slerp(a[i].numpy(), b[i].numpy(), np.linspace(0, 1, 7))
        np.testing.assert_allclose(ours[:, i], theirs, atol=1e-12)


def test_spherical_interpolation_keeps_the_norm_and_turns_evenly() -> None:
    a, b = (5 * v / v.norm(dim=1, keepdim=True) for v in torch.randn(2, 6, 10))
    path = latent.interpolate(a, b, 9, "spherical")
    torch.testing.assert_close(path.norm(dim=-1), torch.full((9, 6), 5.0))
    cosines = (path[1:] * path[:-1]).sum(-1) / 25
    turned = cosines.arccos() * 8
    torch.testing.assert_close(turned, ((a * b).sum(-1) / 25).arccos().expand(8, 6))
    assert float(latent.interpolate(a, b, 9)[4].norm(dim=-1).max()) < 4.9


def test_spherical_interpolation_is_whites_formula_with_unequal_norms() -> None:
    a, b = torch.randn(4) * 3, torch.randn(4)
    angle = torch.arccos(a @ b / a.norm() / b.norm())
    for i, code in enumerate(latent.interpolate(a, b, 5, "spherical")):
        first, second = torch.sin((1 - i / 4) * angle), torch.sin(i / 4 * angle)
        torch.testing.assert_close(code, (first * a + second * b) / angle.sin())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_interpolation_where_there_is_no_angle(dtype: torch.dtype) -> None:
    """Parallel, opposite and zero vectors: the straight line; and near those, no jump."""
    a = torch.randn(100, 8).to(dtype)
    for b in (2 * a, -a, -1.1 * a, torch.zeros_like(a), a * (1 + 1e-7)):
        for first, second in ((a, b), (b, a)):
            path = latent.interpolate(first, second, 5, "spherical")
            torch.testing.assert_close(path, latent.interpolate(first, second, 5))
    for small in (1e-3, 1e-5, 1e-9):
        b = a + small * torch.randn(100, 8).to(dtype)
        near = latent.interpolate(a, b, 5, "spherical")
        torch.testing.assert_close(near, latent.interpolate(a, b, 5), rtol=0, atol=2 * small)
    with pytest.raises(ArgumentError, match="'linear' or 'spherical'"):
        latent.interpolate(a, a, 5, "cubic")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="steps"):
        latent.interpolate(a, a, 1)


def test_the_ends_of_an_interpolation_are_the_codes() -> None:
    a, b = torch.randn(2, 3, 4)
    for kind in ("linear", "spherical"):
        path = latent.interpolate(a, b[0], 4, kind)
        assert path.shape == (4, 3, 4)
        torch.testing.assert_close(path[0], a)
        torch.testing.assert_close(path[-1], b[0].expand(3, 4))
    linear = latent.interpolate(a, b, 5)
    torch.testing.assert_close(linear[1], 0.75 * a + 0.25 * b)


def test_attributes_and_analogies() -> None:
    z = torch.randn(50, 2, 3)
    has = torch.arange(50) % 3 == 0
    direction = latent.attribute_vector(z + 4.0 * has[:, None, None], has.numpy())
    plain = latent.attribute_vector(z, has)
    torch.testing.assert_close(direction, plain + 4.0)
    array = z.numpy()
    expected = array[has.numpy()].mean(0) - array[~has.numpy()].mean(0)
    np.testing.assert_allclose(plain, expected)
    a, b, c = torch.randn(3, 7, 4)
    d = latent.analogy(a, b, c)
    torch.testing.assert_close(d - c, b - a)
    torch.testing.assert_close(latent.analogy(a, c, b), d)  # the parallelogram has two names
    with pytest.raises(DataError, match="50 with it"):
        latent.attribute_vector(z, torch.ones(50).bool())
    with pytest.raises(ArgumentError, match="labels == 3"):
        latent.attribute_vector(z, torch.ones(50))


def test_a_traversal_changes_one_dimension() -> None:
    z, values = torch.randn(4), [-1.0, 0.5, 2.0]
    found = latent.traverse(z, [3, 1], values)
    assert found.shape == (2, 3, 4)
    for i, dim in enumerate((3, 1)):
        assert found[i, :, dim].tolist() == values
        others = [d for d in range(4) if d != dim]
        assert torch.equal(found[i][:, others], z[others].expand(3, 3))
    with pytest.raises(ArgumentError, match="from 0 to 3; got 4"):
        latent.traverse(z, [4], values)
    with pytest.raises(ArgumentError, match=r"\(d,\)"):
        latent.traverse(z[None], [0], values)


# Neighbours


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("max_rows", [7, 1000])
def test_neighbours_are_scikit_learns(metric: Any, max_rows: int, device: torch.device) -> None:
    z, gallery = torch.randn(20, 5), torch.randn(60, 5)
    theirs = NearestNeighbors(n_neighbors=9, metric=metric).fit(gallery.numpy())
    expected, order = theirs.kneighbors(z.numpy())
    indices, distances = latent.nearest(
        z.to(device), gallery.to(device), 9, metric=metric, max_rows=max_rows
    )
    np.testing.assert_array_equal(indices.cpu(), order)
    np.testing.assert_allclose(distances.cpu(), expected, atol=1e-12)


def test_a_code_is_its_own_nearest_far_from_the_origin() -> None:
    """Distances aren't computed as a^2 - 2ab + b^2, which cancels."""
    z = (torch.randn(30, 4) + 1000).float()
    indices, distances = latent.nearest(z, z, 1)
    assert torch.equal(indices[:, 0], torch.arange(30))
    assert torch.equal(distances, torch.zeros(30, 1, dtype=torch.float32))


def test_what_has_no_neighbours_is_refused() -> None:
    z = torch.randn(5, 3)
    with pytest.raises(ArgumentError, match="at most 5"):
        latent.nearest(z, z, 6)
    with pytest.raises(DataError, match="gallery: expected codes of 3 dimensions; got 2"):
        latent.nearest(z, z[:, :2], 1)
    with pytest.raises(DataError, match="codes, row 0"):
        latent.nearest(z / 0 * 0, z, 1)
    with pytest.raises(ArgumentError, match="'euclidean' or 'cosine'"):
        latent.nearest(z, z, 1, metric="manhattan")  # type: ignore[arg-type]


def test_precision_at_k_counts_labels() -> None:
    labels, gallery = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1, 1, 2])
    indices = torch.tensor([[0, 1, 4], [0, 2, 4], [0, 1, 2]])
    found = latent.precision_at_k(labels, gallery.numpy(), indices)
    torch.testing.assert_close(found, torch.tensor([2 / 3, 1 / 3, 0.0]))
    with pytest.raises(DataError, match="one for each of the 3 codes"):
        latent.precision_at_k(labels[:2], gallery, indices)
    with pytest.raises(DataError, match="one for each of the gallery"):
        latent.precision_at_k(labels, gallery[:3], indices)


def test_jeffreys_divergence_is_the_closed_form(device: torch.device) -> None:
    """Of normals: half the sum of (s + d^2) / s' + (s' + d^2) / s - 2 over dimensions."""
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x, y = torch.randn(4, D, device=device), torch.randn(3, D, device=device)
    with torch.no_grad():
        q_a, q_b = vae.guide.posterior(x.unsqueeze(1)), vae.guide.posterior(y)
        found = latent.jeffreys(q_a, q_b)
    s, v = q_a.variance, q_b.variance
    d = (q_a.mean - q_b.mean).square()
    assert found.shape == (4, 3)
    torch.testing.assert_close(found, 0.5 * ((s + d) / v + (v + d) / s - 2).sum(-1))
    torch.testing.assert_close(found, latent.jeffreys(q_b, q_a))
    assert bool((latent.jeffreys(q_b, q_b) == 0).all())


def test_point_masses_have_no_divergence(device: torch.device) -> None:
    q = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    ae = recipes.ae(D, 2, hidden=(4,))
    with pytest.raises(UndefinedError, match=r"q_b(.|\n)*point mass(.|\n)*euclidean"):
        latent.jeffreys(q, ae.guide.posterior(torch.zeros(1, D)))
    with pytest.raises(UndefinedError, match="q_a"):
        latent.jeffreys(dist.Delta(torch.zeros(2)).to_event(1), q)
    mixture = latent.fit_density(blobs(), "gmm", num_components=2)()
    with pytest.raises(UndefinedError, match="closed form; got _Mixture and MultivariateNormal"):
        latent.jeffreys(mixture, latent.fit_density(blobs())())
