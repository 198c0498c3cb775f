"""A pair's densities as functions of unconstrained latents, against densities written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae import guides, likelihoods, priors, recipes
from pvae.bounds.density import LatentDensity, densities
from pvae.data import LinearGaussian, as_source
from pvae.errors import PairError, PvaeWarning, UndefinedError
from pvae.pair import Pair
from pvae.terms import Evaluation
from pvae.vae import VAE
from tests import pairs

N, K = 7, 4


def density_of(model: Any, guide: Any, *batch: Tensor) -> LatentDensity:
    return LatentDensity(Pair(model, guide).inspect(batch), batch)


def log_prior(density: LatentDensity, u: Tensor) -> Tensor:
    return density.terms(u).log_prior + density.log_det(u)


def log_q(density: LatentDensity, u: Tensor) -> Tensor:
    density.structure.require_density("log q(z | x)")
    return density.terms(u).log_q + density.log_det(u)


def normal(value: Tensor, loc: Any, scale: Any) -> Tensor:
    scale = torch.as_tensor(scale)
    return -0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


class _Positive(nn.Module):
    """z ~ Gamma(2, 1.5), x | z ~ N(z, 1); q is log-normal."""

    def __init__(self, guide: bool) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if self.guide:
                pyro.sample("z", dist.LogNormal(0.1 * x, x.new_tensor(0.7)))
            else:
                z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), x.new_tensor(1.5)))
                pyro.sample("x", dist.Normal(z, x.new_tensor(1.0)), obs=x)


def test_linear_gaussian() -> None:
    toy = LinearGaussian.random(5, 2)
    x = toy.sample(N)
    decoder, encoder = nn.Linear(2, 5), nn.Linear(5, 2)
    decoder.weight.data, decoder.bias.data = toy.weight, toy.bias
    guide = guides.MeanField(nn.Linear(5, 4), 2)
    pair = VAE(priors.StandardNormal(2), likelihoods.Gaussian(decoder, 5, sigma=0.5), guide)
    density = density_of(pair.model, pair.guide, x)
    u = torch.randn(K, N, 2, requires_grad=True)
    joint = normal(u, 0.0, 1.0).sum(-1) + normal(x, u @ toy.weight.T + toy.bias, 0.5).sum(-1)
    torch.testing.assert_close(density.log_joint(u), joint)
    torch.testing.assert_close(log_prior(density, u), normal(u, 0.0, 1.0).sum(-1))
    q = guide(x)
    torch.testing.assert_close(log_q(density, u), q.log_prob(u))
    ours = torch.autograd.grad(density.log_joint(u).sum(), u)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(joint.sum(), u)[0])
    assert all(p.grad is None for p in (*pair.parameters(), *encoder.parameters()))
    mean, covariance = toy.posterior(x)  # Bayes' rule, with the posterior in closed form
    posterior = dist.MultivariateNormal(mean, covariance).log_prob(u)
    torch.testing.assert_close(density.log_joint(u) - posterior, toy.log_evidence(x).expand(K, N))


def test_a_positive_latent_has_its_jacobian() -> None:
    x = torch.randn(N)
    density = density_of(_Positive(guide=False), _Positive(guide=True), x)
    u = torch.randn(K, N, 1)
    z = u[..., 0].exp()
    prior = math.log(1.5**2) + z.log() - 1.5 * z
    torch.testing.assert_close(log_prior(density, u), prior + z.log())
    torch.testing.assert_close(density.log_joint(u), prior + z.log() + normal(x, z, 1.0))
    torch.testing.assert_close(log_q(density, u), normal(u[..., 0], 0.1 * x, 0.7))
    torch.testing.assert_close(density.values(u)["z"], z)
    torch.testing.assert_close(density.flatten(density.values(u)), u)


def _dirichlet(x: Tensor, observed: bool) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(x.new_tensor([2.0, 1.0, 3.0])))
        if observed:
            pyro.sample("x", dist.Normal(z[..., 0], x.new_tensor(1.0)), obs=x)


@pytest.mark.parametrize("kind", ["gamma", "dirichlet", "uniform"])
def test_densities_integrate_to_one(kind: str) -> None:
    """log p(u) over the real line or plane, by the trapezoidal rule on a wide grid."""

    def uniform(x: Tensor, observed: bool) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x.new_tensor(-1.0), x.new_tensor(3.0)))
            if observed:
                pyro.sample("x", dist.Normal(z, x.new_tensor(1.0)), obs=x)

    x = torch.randn(2)
    if kind == "gamma":
        density = density_of(_Positive(guide=False), _Positive(guide=True), x)
    else:
        program = _dirichlet if kind == "dirichlet" else uniform
        density = density_of(
            lambda x: program(x, observed=True), lambda x: program(x, observed=False), x
        )
    axis = torch.linspace(-30, 30, 301 if density.num_dims == 2 else 6001)
    grid = torch.cartesian_prod(*[axis] * density.num_dims).reshape(-1, 1, density.num_dims)
    u = grid.expand(-1, 2, -1)
    cell = float(axis[1] - axis[0]) ** density.num_dims
    for log_density in (log_prior(density, u), log_q(density, u)):
        total = log_density.exp().sum(0) * cell
        np.testing.assert_allclose(total.numpy(), 1.0, atol=1e-6)


def test_two_sites_written_out(device: torch.device) -> None:
    model, guide, (x,) = pairs.two_sites(device, N)
    density = density_of(model, guide, x)
    assert density.sites == ("z2", "z1")
    assert density.num_dims == 3
    u = torch.randn(K, N, 3, device=device)
    z2, z1 = u[..., :1], u[..., 1:]
    prior = normal(z2, 0.0, 1.0).sum(-1) + normal(z1, model.middle(z2), 0.7).sum(-1)
    torch.testing.assert_close(log_prior(density, u), prior)
    joint = prior + normal(x, model.decoder(z1), 1.0).sum(-1)
    torch.testing.assert_close(density.log_joint(u), joint)
    loc, log_scale = guide.first(x).chunk(2, -1)
    q = normal(z1, loc, log_scale.exp()).sum(-1)
    loc, log_scale = guide.second(z1).chunk(2, -1)
    torch.testing.assert_close(log_q(density, u), q + normal(z2, loc, log_scale.exp()).sum(-1))


REFUSED = {"global_latent": "global site", "autoguide": "global site", "discrete": "discrete"}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", pairs.PAIRS)
def test_weights_are_those_of_terms_for_any_pair(
    name: str, k: int, device: torch.device, store: None
) -> None:
    """log p(x, u) - log q(u): the determinants cancel, and the programs are run at the draws."""
    model, guide, batch = pairs.PAIRS[name](device)
    structure = Pair(model, guide).inspect(batch)
    if name in REFUSED:
        with pytest.raises(UndefinedError, match=REFUSED[name]):
            LatentDensity(structure, batch)
        return
    source = as_source(batch, device, torch.float64)
    count = 0
    evaluation = Evaluation(Pair(model, guide), structure, source)
    with densities(evaluation) as (chunks, _):
        drawn = [(rows, density, density.from_guide(k)) for rows, density in chunks]
    for rows, density, u in drawn:
        assert u.shape == (k, density.num_rows, density.num_dims)
        values = density.values(u)
        terms = density.terms(u)
        for site in density.sites:
            torch.testing.assert_close(terms.sites[site].value, values[site])
        expected = terms.log_weight
        torch.testing.assert_close(density.log_joint(u) - log_q(density, u), expected)
        again = density.terms(density.flatten(values))
        torch.testing.assert_close(again.log_weight, expected)
        count += rows.stop - rows.start
    assert count == len(batch[0])


@pytest.mark.parametrize("outer", [True, False])
def test_a_plate_inside_the_data_plate(outer: bool) -> None:
    """Latents of three parts a datum, and a shared one; the data axis is -1 or -2."""
    data_dim, part_dim = (-2, -1) if outer else (-1, -2)

    def spread(v: Tensor) -> Tensor:  # of one number a datum, over parts
        return v.unsqueeze(part_dim) if v.dim() < 2 else v

    def program(x: Tensor, observed: bool) -> None:
        data, part = pyro.plate("data", N, dim=data_dim), pyro.plate("part", 3, dim=part_dim)
        with data:
            a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), x.new_tensor(1.0)))
            with part:
                b = pyro.sample("b", dist.LogNormal(a, x.new_tensor(0.5)))
                if observed:
                    value = x if outer else x.T
                    pyro.sample("x", dist.Normal(a + b, x.new_tensor(1.0)), obs=value)

    x = torch.randn(N, 3)
    density = density_of(
        lambda x: program(x, observed=True), lambda x: program(x, observed=False), x
    )
    assert density.num_dims == 4
    for k in (1, K):
        u = torch.randn(k, N, 4)
        a, log_b = u[..., :1], u[..., 1:]
        prior = normal(a, 0.0, 1.0).sum(-1) + normal(log_b, a, 0.5).sum(-1)
        torch.testing.assert_close(log_prior(density, u), prior)
        joint = prior + normal(x, a + log_b.exp(), 1.0).sum(-1)
        torch.testing.assert_close(density.log_joint(u), joint)
        for draws in (density.from_prior(k), density.from_guide(k)):
            assert draws.shape == (k, N, 4)


def test_a_pair_whose_particles_are_looped() -> None:
    class Model(pairs.Generator):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), x.new_ones(2)).to_event(1))
                loc = self.decoder(z).softmax(dim=1)  # of data where particles come first
                pyro.sample("x", dist.Normal(loc, x.new_tensor(1.0)).to_event(1), obs=x)

    class Guide(pairs.Inference):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                self.infer(x)

    model, x = Model(), torch.randn(N, pairs.D)
    density = density_of(model, Guide(), x)
    u = torch.randn(K, N, 2)
    expected = normal(u, 0.0, 1.0).sum(-1)
    expected = expected + normal(x, model.decoder(u).softmax(-1), 1.0).sum(-1)
    with pytest.warns(PvaeWarning, match="looped"):
        ours = density.log_joint(u)
    torch.testing.assert_close(ours, expected)
    assert density.from_prior(K).shape == (K, N, 2)


def test_draws_from_the_prior_are_ancestral(device: torch.device) -> None:
    """Whitened by the prior's own conditionals they are standard normal.

    Means and mean squares of 3 * 20000 draws, to 5 standard errors: a false alarm in 3e5.
    """
    model, guide, (x,) = pairs.two_sites(device, 4)
    density = density_of(model, guide, x)
    u = density.from_prior(5000)
    z2, z1 = u[..., :1], u[..., 1:]
    white = torch.cat([z2, (z1 - model.middle(z2)) / 0.7], -1).detach().flatten(0, 1)
    error = 5 / math.sqrt(len(white))
    assert bool((white.mean(0).abs() < error).all())
    assert bool(((white.square().mean(0) - 1).abs() < error * math.sqrt(2)).all())


def test_simulated_data_go_with_their_latents(device: torch.device) -> None:
    """x - E[x | z] is white noise, at the latents that are returned; labels stay."""
    model, guide, (x, y) = pairs.labels(device, 3000)
    drawn, u = density_of(model, guide, x, y).simulated()
    new, labels = drawn.batch
    assert labels is y
    onehot = torch.nn.functional.one_hot(y, 3).to(u)
    residual = (new - model.decoder(torch.cat([u[0], onehot], -1))).detach()
    assert abs(float(residual.mean())) < 5 / math.sqrt(residual.numel())
    assert abs(float(residual.square().mean()) - 1) < 5 * math.sqrt(2 / residual.numel())
    assert float((new - x).abs().mean()) > 0.1
    torch.testing.assert_close(
        drawn.log_joint(u)[0],
        normal(u[0], model.prior(y), 1.0).sum(-1) + normal(residual, 0.0, 1.0).sum(-1),
    )


def test_densities_outside_finite_numbers_are_numbers_or_nan_not_errors() -> None:
    density = density_of(*pairs.two_sites(torch.device("cpu"), N)[:2], torch.randn(N, pairs.D))
    u = torch.full((2, N, 3), math.inf)
    u[0] = math.nan
    assert not density.log_joint(u).isfinite().any()


def _auxiliary(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        base = dist.Normal(x.new_zeros(2), 1.0).to_event(1)
        a = pyro.sample("a", base, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(a, event_dim=1))


def _wide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.LogNormal(x.new_zeros(2), 1.0).to_event(1))


def test_refusals(store: None) -> None:
    model, _, (x,) = pairs.functions(torch.device("cpu"), N)
    auxiliary = density_of(model, _auxiliary, x)
    u = torch.randn(K, N, 2)
    assert auxiliary.log_joint(u).shape == (K, N)  # the model's needs no guide
    assert not auxiliary.has_log_q
    with pytest.raises(PairError, match="one support in model and guide"):
        density_of(model, _wide, x)
    ae = recipes.ae(pairs.D, 2)
    points = density_of(ae.model, ae.guide, x)
    with pytest.raises(UndefinedError, match="point mass"):
        log_q(points, u)
    for refused in (lambda: points.from_prior(2), points.simulated):
        with pytest.raises(UndefinedError, match="improper prior"):
            refused()


def _given_data(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), x.new_tensor(1.0)), obs=make(x))

    return program


def test_refusals_of_supports_and_of_simulation() -> None:
    def bounded(x: Tensor, observed: bool) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x, x + 1))
            if observed:
                pyro.sample("x", dist.Normal(z, x.new_tensor(1.0)), obs=x)

    with pytest.raises(UndefinedError, match="whose bounds change"):
        density_of(
            lambda x: bounded(x, observed=True),
            lambda x: bounded(x, observed=False),
            torch.randn(N),
        )

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    x = torch.randn(N)
    with pytest.raises(UndefinedError, match="as it is"):
        density_of(_given_data(lambda x: 2 * x), guide, x).simulated()
    drawn, u = density_of(_given_data(lambda x: x), guide, x).simulated()
    assert u.shape == (1, N, 2)
    assert not torch.equal(drawn.batch[0], x)

    def factored(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.factor("preference", z.sum(-1))
            pyro.sample("x", dist.Normal(z.sum(-1), x.new_tensor(1.0)), obs=x)

    with pytest.raises(UndefinedError, match="factor 'preference'"):
        density_of(factored, guide, x).simulated()
