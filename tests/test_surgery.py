"""The parts of the ELBO against enumeration, quadrature and closed forms.

Estimates are compared within 4.5 standard errors: a false alarm in 1.5e5.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import bounds, diagnostics
from pvae.data import LinearGaussian
from pvae.diagnostics.mixture import draw, score_mixture, sum_of
from pvae.errors import ArgumentError, UndefinedError
from pvae.estimate import Estimate
from pvae.pair import Pair
from tests import linear, pairs

STEPS = 4.5


def close(part: Estimate | None, expected: float) -> None:
    assert part is not None
    assert abs(part.mean - expected) < STEPS * part.se_draws


def bernoulli_pair(probabilities: Tensor, prior: Tensor) -> tuple[Any, Any]:
    """Row i of the data is its number; q(z | x_i) is row i of a table, by entry."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(prior.expand(len(x), -1)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), x.new_tensor(1.0)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(probabilities[x.long()]).to_event(1))

    return model, guide


@pytest.mark.parametrize("max_rows", [65536, 4])
def test_every_part_by_enumeration(max_rows: int, device: torch.device) -> None:
    """All eight states of three binary entries, six data."""
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(6, 3, generator=generator).to(device)
    prior = torch.tensor([0.5, 0.2, 0.7], device=device)
    model, guide = bernoulli_pair(table, prior)
    x = torch.arange(6.0, device=device)
    k = 3000 if max_rows > 4 else 40
    found = diagnostics.surgery((model, guide), x, num_particles=k, max_rows=max_rows)

    states = torch.cartesian_prod(*[torch.arange(2.0)] * 3).to(device)  # (8, 3)
    each = torch.where(states[:, None] == 1, table, 1 - table)  # (8, 6, 3)
    q = each.prod(2)
    mixture, mixture_dims = q.mean(1), each.mean(1)
    p_dims = torch.where(states == 1, prior, 1 - prior)
    weight = mixture

    def mean(log_ratio: Tensor) -> float:
        return float((weight * log_ratio).sum())

    def error(ratio: Tensor) -> float:
        """Of the mean over data and draws of a function of z with these values by state."""
        variance = (q * ratio.square()[:, None]).sum(0) - (q * ratio[:, None]).sum(0).square()
        return math.sqrt(float(variance.sum()) / k) / 6

    information = float((q * (q / mixture[:, None]).log()).sum(0).mean())
    close(found.information, information)
    close(found.marginal_kl, mean((mixture / p_dims.prod(1)).log()))
    close(found.total_correlation, mean((mixture / mixture_dims.prod(1)).log()))
    without = (q.sum(1, keepdim=True) - q) / 5
    close(found.information_upper, float((q * (q / without).log()).sum(0).mean()))
    assert found.dimension_kl is not None
    for d in range(3):
        ratio = (mixture_dims[:, d] / p_dims[:, d]).log()
        value = float(found.dimension_kl[:, d].mean())
        assert abs(value - mean(ratio)) < STEPS * error(ratio)
        rate = float((table[:, d] * (table[:, d] / prior[d]).log()).mean())
        rate += float(((1 - table[:, d]) * ((1 - table[:, d]) / (1 - prior[d])).log()).mean())
        ones = (table[:, d] / (1 - table[:, d]) * (1 - prior[d]) / prior[d]).log()
        variance = table[:, d] * (1 - table[:, d]) * ones.square()  # log q - log p has two values
        value = float(found.rates_by_dimension["z"][:, d].mean())
        assert abs(value - rate) < STEPS * math.sqrt(float(variance.sum()) / k) / 6
    assert 0 < information < math.log(6)
    torch.testing.assert_close(found.activity["z"], table.var(0))


def test_sums_are_exact(device: torch.device) -> None:
    vae = pvae.recipes.vae(6, 3, hidden=(8,)).to(device)
    x = torch.rand(40, 6, device=device).round()
    found = diagnostics.surgery(vae, x, max_rows=100)
    parts = (found.information, found.marginal_kl, found.total_correlation)
    information, marginal, correlation = (p.values for p in parts if p is not None)
    assert found.dimension_kl is not None
    torch.testing.assert_close(information + marginal, found.rate.values)
    torch.testing.assert_close(correlation + found.dimension_kl.sum(1), marginal)
    torch.testing.assert_close(found.rates_by_dimension["z"].sum(1), found.rate.values)
    torch.testing.assert_close(found.rates["z"].values, found.rate.values)
    torch.testing.assert_close(found.distortions["x"].values, found.distortion.values)
    assert float(information.mean()) <= math.log(40)


def test_it_is_the_elbo(device: torch.device) -> None:
    """With the same draws, the values of bounds.elbo."""
    vae = pvae.recipes.vae(6, 3, hidden=(8,)).to(device)
    x = torch.rand(40, 6, device=device).round()
    vae.inspect_source(pvae.data.as_source(x))  # looking draws
    found = diagnostics.surgery(vae, x, num_particles=50)
    lower = bounds.elbo(vae, x, 50)
    torch.testing.assert_close(-found.distortion.values - found.rate.values, lower.values)
    assert 0 < lower.se_draws < found.distortion.se_draws + found.rate.se_draws


@pytest.mark.parametrize("max_rows", [1, 4, 10, 35])
def test_small_chunks_give_the_same_numbers(max_rows: int, device: torch.device) -> None:
    """The same draws, scored in chunks of draws and of data."""
    vae = pvae.recipes.vae(6, 3, hidden=(8,)).to(device)
    x = torch.rand(10, 6, device=device).round()
    with pvae.terms.prepared(vae, x, {"progress": False}) as evaluation:
        own = draw(evaluation, 2)
        whole = score_mixture(evaluation, own, 65536)
        small = score_mixture(evaluation, own, max_rows)
    torch.testing.assert_close(small.log_prob, whole.log_prob)
    torch.testing.assert_close(small.without_own, whole.without_own)
    torch.testing.assert_close(small.log_prob_dims, whole.log_prob_dims)


def test_a_mixture_of_gaussians_by_quadrature(device: torch.device) -> None:
    toy = LinearGaussian(torch.tensor([[1.3]]), torch.zeros(1), 0.7)
    model, guide = linear.pair(toy, linear.scaled(0.8))
    x = toy.sample(12)
    found = diagnostics.surgery((model, guide), x.to(device), num_particles=3000)
    mean, covariance = toy.posterior(x)
    scale = 0.8 * covariance.sqrt().item()
    z = torch.linspace(-8, 8, 20001)[:, None]
    step = float(z[1] - z[0])
    q = torch.distributions.Normal(mean[:, 0], scale).log_prob(z).exp()  # (grid, 12)
    mixture = q.mean(1)
    p = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0]).exp()
    marginal = float((mixture * (mixture / p).log()).sum()) * step
    entropy = -float((mixture * mixture.log()).sum()) * step
    information = entropy - 0.5 * math.log(2 * math.pi * math.e * scale**2)
    close(found.marginal_kl, marginal)
    close(found.information, information)


def test_the_information_of_the_population_is_between(device: torch.device) -> None:
    """Linear-Gaussian: q(z) = p(z) = N(0, I), and I = -log det(posterior covariance) / 2.

    The two estimates are too low and too high on average; over 8 sets of 100 data, to 4.5
    standard errors of their means.
    """
    toy = LinearGaussian.random(4, 2, 0.5)
    model, guide = linear.pair(toy, linear.exact)
    truth = -0.5 * float(toy.posterior(toy.bias[None])[1].logdet())
    low, high, above = [], [], []
    for seed in range(8):
        found = diagnostics.surgery((model, guide), toy.sample(100, seed).to(device), seed=seed)
        assert found.information is not None
        assert found.information_upper is not None
        assert found.marginal_kl is not None
        low.append(float(found.information.mean))
        high.append(float(found.information_upper.mean))
        above.append(float(found.marginal_kl.mean))
    errors = [np.std(v, ddof=1) / math.sqrt(8) for v in (low, high, above)]
    assert np.mean(low) < truth + STEPS * errors[0]
    assert np.mean(high) > truth - STEPS * errors[1]
    assert np.mean(above) > -STEPS * errors[2]
    assert max(low) <= math.log(100)
    assert np.mean(low) == pytest.approx(truth, abs=1.0)


def test_total_correlation_of_a_full_rank_guide_is_not_defined(device: torch.device) -> None:
    """Dimensions that depend on each other have no density apiece; the rest is there."""
    toy = LinearGaussian.random(4, 2, 0.5)
    model, guide = linear.pair(toy, linear.exact)
    found = diagnostics.surgery((model, guide), toy.sample(20).to(device))
    assert found.total_correlation is None
    assert not found.rates_by_dimension
    assert found.information is not None
    assert "parts by dimension: not defined" in str(found)


def test_errors_are_honest(device: torch.device) -> None:
    """The stated error over draws against the scatter of 60 repeats, within a factor of 1.6.

    The scatter's own relative error is 9%, so that is more than six of them.
    """
    vae = pvae.recipes.vae(6, 2, hidden=(8,)).to(device)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(3)
    x = torch.rand(15, 6, device=device).round()
    runs = [diagnostics.surgery(vae, x, num_particles=4, seed=s) for s in range(60)]
    for name in ("rate", "information", "marginal_kl", "total_correlation"):
        parts = [getattr(run, name) for run in runs]
        scatter = np.std([p.mean for p in parts], ddof=1)
        stated = np.mean([p.se_draws for p in parts])
        assert 1 / 1.6 < scatter / stated < 1.6


# --- several latents ------------------------------------------------------------------------------


def test_a_hierarchy_is_scored_as_one(device: torch.device) -> None:
    """q(z1 | x) q(z2 | z1): the joint mixture, by hand at the same draws."""
    model, guide, (x,) = pairs.two_sites(device, 5)
    found = diagnostics.surgery((model, guide), x, num_particles=3)
    with pvae.terms.prepared((model, guide), x, {}) as evaluation, torch.no_grad():
        own = draw(evaluation, 3)
        z1, z2 = (own.values[name].flatten(0, 1) for name in ("z1", "z2"))
        loc, log_scale = guide.first(x).chunk(2, -1)
        first = dist.Normal(loc, log_scale.exp()).to_event(1).log_prob(z1[:, None])  # (15, 5)
        loc, log_scale = guide.second(z1).chunk(2, -1)
        second = dist.Normal(loc, log_scale.exp()).to_event(1).log_prob(z2)
    log_q = first + second[:, None]
    row = torch.arange(15, device=device) % 5
    mine = log_q[torch.arange(15, device=device), row] - log_q.logsumexp(1) + math.log(5)
    assert found.information is not None
    torch.testing.assert_close(found.information.values, mine.reshape(3, 5).mean(0))
    assert set(found.rates) == {"z1", "z2"}
    total = found.rates["z1"].values + found.rates["z2"].values
    torch.testing.assert_close(total, found.rate.values)
    assert set(found.rates_by_dimension) == {"z1", "z2"}
    assert found.undefined["total correlation"] == "several latents"


class Looped(nn.Module):
    """A guide's network that can't take leading dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, z: Tensor) -> Tensor:
        return torch.softmax(self.linear(z), 1) if z.dim() == 2 else self.linear(z)


@pytest.mark.filterwarnings("ignore:Particles are looped")
@pytest.mark.filterwarnings("ignore:The pair uses")
def test_a_guide_that_cant_be_vectorised_is_looped(device: torch.device) -> None:
    """The same scores as of the same program with a network that can."""
    inner = Looped().to(device)

    class Right(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = inner.linear

        def forward(self, z: Tensor) -> Tensor:
            return torch.softmax(self.linear(z), -1)

    def pair_of(net: nn.Module) -> tuple[Any, Any]:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
                b = pyro.sample("b", dist.Normal(a, x.new_ones(2)).to_event(1))
                pyro.sample("x", dist.Normal(b, x.new_ones(2)).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(x, x.new_ones(2)).to_event(1))
                pyro.sample("b", dist.Normal(net(a), x.new_ones(2)).to_event(1))

        return model, guide

    batch = (torch.randn(6, 2, device=device),)
    values = {"a": torch.randn(4, 2, device=device), "b": torch.randn(4, 2, device=device)}
    scores = []
    for net in (inner, Right()):
        model, guide = pair_of(net)
        structure = Pair(model, guide).inspect(batch)
        with torch.no_grad():
            sites = pvae.terms.score_guide(structure, batch, values)
        assert bool(structure.notes["looped_because"]) == (net is inner)
        scores.append(sum_of(site.log_q for site in sites.values()))
    torch.testing.assert_close(scores[0], scores[1])
    assert scores[0].shape == (4, 6)


def test_a_flow_is_scored_under_every_datum(device: torch.device) -> None:
    """The guide's own log density, a draw and a datum at a time."""
    zuko = pytest.importorskip("zuko")
    flow = zuko.flows.MAF(2, 4, transforms=1, hidden_features=(8,))
    vae = pvae.VAE(
        pvae.priors.StandardNormal(2),
        pvae.likelihoods.Bernoulli(nn.Linear(2, 4), 4),
        flow,
    ).to(device)
    x = torch.rand(6, 4, device=device).round()
    found = diagnostics.surgery(vae, x)
    assert found.information is not None
    structure = vae.inspect((x,))
    z = torch.randn(3, 2, device=device)
    with torch.no_grad():
        sites = pvae.terms.score_guide(structure, (x,), {"z": z})
        for k in range(3):
            for n in range(6):
                expected = flow(x[n]).log_prob(z[k])
                score = sites["z"].log_q
                assert score is not None
                torch.testing.assert_close(score[k, n], expected)


def test_scores_that_there_arent(device: torch.device) -> None:
    """Auxiliary sites, latents set to them, and plates inside: the rate is there, q(z) isn't."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), x.new_tensor(1.0)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            fn = dist.Normal(x, x.new_tensor(1.0))
            u = pyro.sample("u", fn, infer={"is_auxiliary": True})
            loc = u.unsqueeze(-1).expand(*u.shape, 2)
            pyro.sample("z", dist.Normal(loc, x.new_tensor(1.0)).to_event(1))

    x = torch.randn(8, device=device)
    found = diagnostics.surgery((model, guide), x)
    assert found.information is None
    assert "other sites: 'u'" in found.undefined["parts of q(z)"]
    assert set(found.rates) == {"u", "z"}
    assert "parts of q(z): not defined" in str(found)
    structure = Pair(model, guide).inspect((x,))
    sites = pvae.terms.draw_guide(structure, (x,), num_particles=3)
    assert [(n, s.kind) for n, s in sites.items()] == [("u", "auxiliary"), ("z", "latent")]
    assert sites["z"].value is not None
    assert sites["z"].value.shape == (3, 8, 2)


# --- collapse ---------------------------------------------------------------------------------


def test_a_collapsed_latent(device: torch.device) -> None:
    toy = LinearGaussian.random(4, 3, 0.5)
    model, guide = linear.pair(toy, linear.ignorant)
    found = diagnostics.surgery((model, guide), toy.sample(50).to(device))
    assert found.information is not None
    assert float(found.information.mean) == pytest.approx(0.0, abs=1e-12)
    assert bool(found.collapsed["z"].all())
    verdicts = {f.name: f.verdict for f in found.findings()}
    assert verdicts["information"] == verdicts["collapsed units"] == "bad"
    assert "the whole latent has collapsed" in str(found)


def test_a_dimension_that_collapsed(device: torch.device) -> None:
    """One of four weights is 0, so that its posterior is the prior; the others are used."""
    basis = torch.linalg.qr(torch.randn(6, 4))[0]
    toy = LinearGaussian(basis * torch.tensor([2.0, 1.0, 0.0, 1.5]), torch.zeros(6), 0.3)
    model, guide = linear.pair(toy, linear.marginals)
    found = diagnostics.surgery((model, guide), toy.sample(200).to(device))
    assert found.collapsed["z"].tolist() == [False, False, True, False]
    (line,) = [f for f in found.findings() if f.name == "collapsed units"]
    assert (line.value, line.verdict) == (1, "good")
    used = diagnostics.active_units((model, guide), toy.sample(200).to(device))
    assert used.tolist() == [True, True, False, True]


def test_all_alike_but_not_the_prior_is_collapsed_too(device: torch.device) -> None:
    """q(z | x) = N(2, 1) for all x: a rate of 2 nats, and no information."""
    toy = LinearGaussian.random(4, 1, 0.5)

    def away(mean: Tensor, covariance: Tensor) -> Any:
        return dist.Normal(torch.full_like(mean, 2.0), torch.ones_like(mean)).to_event(1)

    found = diagnostics.surgery(linear.pair(toy, away), toy.sample(50).to(device))
    verdicts = {f.name: f.verdict for f in found.findings()}
    assert verdicts["information"] == "bad"
    assert verdicts["marginal KL"] == "look"
    close(found.marginal_kl, 2.0)


def test_a_good_fit_is_good(device: torch.device) -> None:
    toy = LinearGaussian.random(4, 1, 0.5)
    model, guide = linear.pair(toy, linear.exact)
    found = diagnostics.surgery((model, guide), toy.sample(400).to(device))
    assert {f.verdict for f in found.findings()} == {"good", "none"}


# --- any pair -------------------------------------------------------------------------------------

WITHOUT = {
    "labels": "a prior at site 'z' that differs between data",
    "masked": "a mask at site 'z'",
    "subsample_drawn": "one that picks its rows",
}


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("kind", WITHOUT)
def test_parts_of_the_aggregated_posterior_that_are_not_defined(
    kind: str, device: torch.device
) -> None:
    model, guide, batch = pairs.PAIRS[kind](device)
    found = diagnostics.surgery((model, guide), batch, max_rows=50)
    assert len(found.rate.values) == 12
    assert found.information is None
    assert WITHOUT[kind] in found.undefined["parts of q(z)"]
    assert "distortion" in str(found)


def test_refusals(device: torch.device) -> None:
    toy = linear.correlated()
    x = toy.sample(10).to(device)

    def point(mean: Tensor, covariance: Tensor) -> Any:
        return dist.Delta(mean).to_event(1)

    with pytest.raises(UndefinedError, match="point mass"):
        diagnostics.surgery(linear.pair(toy, point), x)
    pair = linear.pair(toy, linear.exact)
    with pytest.raises(ArgumentError, match="num_particles"):
        diagnostics.surgery(pair, x, num_particles=0)
    with pytest.raises(ArgumentError, match="rows of data"):
        diagnostics.surgery(pair, x[:1])
    with pytest.raises(ArgumentError, match="threshold"):
        diagnostics.surgery(pair, x, threshold=-1)


def test_the_callers_state_stays(device: torch.device) -> None:
    vae = pvae.recipes.vae(6, 2, hidden=(8,)).to(device).train()
    x = torch.rand(10, 6, device=device).round()
    before = torch.get_rng_state()
    first = diagnostics.surgery(vae, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in vae.modules())
    again = diagnostics.surgery(vae, x)
    torch.testing.assert_close(first.rate.values, again.rate.values)
