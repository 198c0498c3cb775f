"""Pairs whose latents all data share, as Bayesian modellers write them."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from field import Row, grid, noise, row
from pyro.contrib.forecast import ForecastingModel
from pyro.infer import autoguide
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import pvae

N, P = 60, 3
LONG: dict[str, Any] = {"epochs": 400, "lr": 0.03}
SLOPES = torch.tensor([1.0, -2.0, 0.5])


def covariates() -> Tensor:
    return noise(N, P, seed=1)


def targets() -> Tensor:
    return covariates() @ SLOPES.to(torch.get_default_dtype()) + 0.5 * noise(N, seed=2)


def regression(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(P), 1.0).to_event(1))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("y", dist.Normal((x * weight).sum(-1), 0.5), obs=y)


def regression_evidence() -> float:
    x = covariates()
    covariance = x @ x.T + 0.25 * torch.eye(N)
    return float(dist.MultivariateNormal(torch.zeros(N), covariance).log_prob(targets()))


def _regression(guide: Any, **options: Any) -> Row:
    data = (covariates(), targets())
    options = LONG | options
    return Row((regression, guide), data, regression_evidence, "closed form", options=options)


@row("Bayesian regression, AutoNormal")
def auto_normal() -> Row:
    return _regression(AutoNormal(regression), batch_size=20)


@row("Bayesian regression, x @ weight, which no particles go through at once")
def looped() -> Row:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(P), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)

    data = (covariates(), targets())
    draws = {"num_particles": 200}
    guide = AutoNormal(model)
    return Row(
        (model, guide), data, regression_evidence, "closed form", options=LONG, evidence=draws
    )


@row("Bayesian regression, AutoMultivariateNormal")
def auto_multivariate() -> Row:
    return _regression(AutoMultivariateNormal(regression))


@row("Bayesian regression, AutoLowRankMultivariateNormal")
def auto_low_rank() -> Row:
    return _regression(AutoLowRankMultivariateNormal(regression, rank=2))


@row("Bayesian regression, AutoIAFNormal")
def auto_iaf() -> Row:
    return _regression(AutoIAFNormal(regression, hidden_dim=[8]))


@row("Bayesian regression, AutoStructured")
def auto_structured() -> Row:
    return _regression(AutoStructured(regression, conditionals="mvn"))


@row("Bayesian regression, AutoLaplaceApproximation before .laplace_approximation()")
def auto_laplace() -> Row:
    return _regression(AutoLaplaceApproximation(regression))


@row("Bayesian regression, AutoDelta (MAP)")
def auto_map() -> Row:
    return _regression(autoguide.AutoDelta(regression))


@row("hierarchical regression: eight schools, non-centred by reparametrisation")
def eight_schools() -> Row:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]).to(torch.get_default_dtype())
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]).to(y.dtype)

    def centred(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    model = pyro.poutine.reparam(centred, config={"theta": LocScaleReparam(0.0)})

    def exact() -> float:
        tau = torch.linspace(1e-4, 400.0, 40001)  # mu is Gaussian given tau
        total = sigma**2 + tau[:, None] ** 2
        covariance = torch.diag_embed(total) + 25.0
        each = dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(y)
        joint = each + dist.HalfCauchy(5.0).log_prob(tau)
        return float(joint.logsumexp(0) + (tau[1] - tau[0]).log())

    return Row((model, AutoNormal(model)), (y, sigma), exact, "quadrature", options=LONG)


@row("AutoGuideList: two autoguides for two blocks")
def guide_list() -> Row:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(P), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * weight).sum(-1), sigma), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(pyro.poutine.block(model, expose=["weight"])))
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["sigma"])))
    x, y = covariates(), targets()

    def exact() -> float:
        log_sigma, step = grid(-4.0, 3.0)
        covariance = x @ x.T + torch.diag_embed((2 * log_sigma[:, None]).exp().expand(-1, N))
        each = dist.MultivariateNormal(torch.zeros(N), covariance).log_prob(y)
        joint = each + dist.Normal(0.0, 1.0).log_prob(log_sigma)
        return float(joint.logsumexp(0) + step)

    return Row((model, guide), (x, y), exact, "quadrature", options=LONG)


@row("hand-written Gaussian guide on a rate: Gamma-Poisson")
def gamma_poisson() -> Row:
    x = torch.poisson(torch.full((N,), 3.0), generator=torch.Generator().manual_seed(0))

    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(1.0))
        scale = pyro.param("scale", torch.tensor(0.2), constraint=dist.constraints.positive)
        pyro.sample("rate", dist.LogNormal(loc, scale))

    def exact() -> float:
        a, b = 2.0 + x.sum(), torch.tensor(1.0 + N)
        return float(
            2.0 * torch.tensor(1.0).log()
            - torch.lgamma(torch.tensor(2.0))
            + torch.lgamma(a)
            - a * b.log()
            - torch.lgamma(x + 1).sum()
        )

    return Row((model, guide), (x,), exact, "closed form", options=LONG)


@row("Bayesian neural network: PyroSample weights")
def neural_network() -> Row:
    class Network(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.first = PyroModule[nn.Linear](P, 4)
            self.first.weight = PyroSample(dist.Normal(0.0, 1.0).expand([4, P]).to_event(2))
            self.first.bias = PyroSample(dist.Normal(0.0, 1.0).expand([4]).to_event(1))
            self.last = PyroModule[nn.Linear](4, 1)
            self.last.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            mean = self.last(torch.tanh(self.first(x))).squeeze(-1)
            with pyro.plate("data", N, subsample_size=len(x)):
                pyro.sample("y", dist.Normal(mean, 0.5), obs=y)
            return mean

    model = Network()
    data = (covariates(), targets())
    return Row((model, AutoNormal(model)), data, options={"batch_size": 20, **LONG})


@row("sparse regression: horseshoe prior")
def horseshoe() -> Row:
    def model(x: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(0.5)))
        lam = pyro.sample("lam", dist.HalfCauchy(torch.ones(P)).to_event(1))
        raw = pyro.sample("raw", dist.Normal(torch.zeros(P), 1.0).to_event(1))
        weight = raw * lam * tau.unsqueeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * weight).sum(-1), 0.5), obs=y)

    data = (covariates(), targets())
    return Row((model, AutoMultivariateNormal(model)), data, options=LONG)


@row("matrix factorisation: two crossed plates")
def matrix_factorisation() -> Row:
    users, items, rank = 8, 6, 2
    x = noise(users, rank, seed=3) @ noise(rank, items, seed=4) + 0.3 * noise(users, items, seed=5)

    def model(x: Tensor) -> None:
        with pyro.plate("users", users, dim=-2):
            u = pyro.sample("u", dist.Normal(torch.zeros(rank), 1.0).to_event(1))
        with pyro.plate("items", items, dim=-1):
            v = pyro.sample("v", dist.Normal(torch.zeros(rank), 1.0).to_event(1))
        with pyro.plate("users2", users, dim=-2), pyro.plate("items2", items, dim=-1):
            pyro.sample("x", dist.Normal((u * v).sum(-1), 0.3), obs=x)

    return Row(pvae.Pair(model, AutoNormal(model), plate=False), (x,), options=LONG)


@row("Gaussian process regression (pyro.contrib.gp)")
def gaussian_process() -> Row:
    x = torch.linspace(0.0, 5.0, 20)
    y = torch.sin(x) + 0.1 * noise(20, seed=6)
    kernel = gp.kernels.RBF(1)
    found = gp.models.GPRegression(x, y, kernel, noise=torch.tensor(0.1))

    def exact() -> float:
        covariance = found.kernel(x) + found.noise * torch.eye(20)
        return float(dist.MultivariateNormal(torch.zeros(20), covariance).log_prob(y))

    return Row((found.model, found.guide), (), exact, "closed form", options=LONG)


@row("sparse variational Gaussian process (pyro.contrib.gp)")
def sparse_process() -> Row:
    x = torch.linspace(0.0, 5.0, 20)
    y = torch.sin(x) + 0.1 * noise(20, seed=6)
    likelihood = gp.likelihoods.Gaussian(variance=torch.tensor(0.1))
    found = gp.models.VariationalSparseGP(x, y, gp.kernels.RBF(1), x[::4].clone(), likelihood)
    return Row((found.model, found.guide), (), options=LONG)


@row("Forecaster's model (pyro.contrib.forecast), local-level series")
def forecaster() -> Row:
    class Level(ForecastingModel):
        def model(self, zero_data: Tensor, covariates: Tensor) -> None:
            scale = pyro.sample("scale", dist.LogNormal(torch.tensor(-1.0), 1.0))
            with self.time_plate:
                drift = pyro.sample("drift", dist.Normal(0.0, 0.3))
            level = drift.cumsum(-1).unsqueeze(-1)
            self.predict(dist.Normal(0.0, scale[..., None, None]).to_event(0), level)

    model = Level()
    data = 0.3 * noise(30, 1, seed=7).cumsum(0)
    pair = pvae.Pair(model, AutoNormal(model), plate=False)
    return Row(pair, (data, torch.empty(30, 0)), options=LONG)


@row("no plate: a loop over data, an event for the rest")
def no_plate() -> Row:
    x = 1.0 + noise(12, seed=8)

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.tensor(0.0), 1.0))
        for i in range(len(x)):
            pyro.sample(f"x_{i}", dist.Normal(mean, 1.0), obs=x[i])

    def exact() -> float:
        covariance = torch.eye(12) + 1.0
        return float(dist.MultivariateNormal(torch.zeros(12), covariance).log_prob(x))

    return Row((model, AutoNormal(model)), (x,), exact, "closed form", options=LONG)


@row("global and local latents: random effects of groups")
def random_effects() -> Row:
    groups, each = 12, 5
    y = noise(groups, 1, seed=9) + 0.5 * noise(groups, each, seed=10)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("groups", len(y)):
            b = pyro.sample("b", dist.Normal(mu, 1.0))
            loc = b.unsqueeze(-1).expand(*b.shape, each)
            pyro.sample("y", dist.Normal(loc, 0.5).to_event(1), obs=y)

    def exact() -> float:
        own = torch.ones(each, each) + 0.25 * torch.eye(each)
        covariance = torch.block_diag(*[own] * groups) + 1.0
        fn = dist.MultivariateNormal(torch.zeros(groups * each), covariance)
        return float(fn.log_prob(y.flatten()))

    return Row((model, AutoNormal(model)), (y,), exact, "closed form", options=LONG)
