"""Pairs whose data no plate counts: the data set is one datum, and training is Pyro's own."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib import gp
from pyro.contrib.forecast import ForecastingModel
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import Pair, bounds, data, diagnostics, export, latent
from pvae.errors import DataError, PairError, UndefinedError

pytestmark = [
    pytest.mark.usefixtures("store"),
    pytest.mark.filterwarnings("ignore::pvae.PvaeWarning"),  # of looped particles
]
Made = tuple[Pair, tuple[Tensor, ...]]
T, SIGMA = 12, 0.4


def series() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.sin(torch.linspace(0.0, 3.0, T)) + 0.1 * torch.randn(T, generator=generator)


def loop() -> Made:
    """One latent, and a site for each value."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for t, value in enumerate(y):
            pyro.sample(f"y{t}", dist.Normal(z, SIGMA), obs=value)

    def guide(y: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(1 / (T + SIGMA**2)))
        pyro.sample("z", dist.Normal(weight * y.sum(), (1 + T / SIGMA**2) ** -0.5))

    return Pair(model, guide), (series(),)


def sequential_plate() -> Made:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for t in pyro.plate("data", len(y)):
            pyro.sample(f"y{t}", dist.Normal(z, SIGMA), obs=y[t])

    return Pair(model, loop()[0].guide), (series(),)


def chain() -> Made:
    """A state-space model: as many latents as values, drawn jointly by its guide."""

    def model(y: Tensor) -> None:
        z = torch.tensor(0.0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z{t}", dist.Normal(0.9 * z, 0.5))
            pyro.sample(f"y{t}", dist.Normal(z, SIGMA), obs=y[t])

    return Pair(model, AutoMultivariateNormal(model)), (series()[:4],)


def regression() -> Made:
    """Arrays of different lengths, one of them a matrix that belongs to no row."""
    generator = torch.Generator().manual_seed(1)
    x, basis = (torch.randn(*s, generator=generator) for s in ((T, 3), (3, 2)))

    def model(x: Tensor, basis: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w @ basis.T @ x.T, SIGMA).to_event(1), obs=y)

    return Pair(model, AutoNormal(model)), (x, basis, series())


def components() -> Made:
    """A plate, but none that counts the data."""

    def model(y: Tensor) -> None:
        with pyro.plate("components", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), SIGMA).to_event(1), obs=y)

    return Pair(model, AutoNormal(model)), (series(),)


def sparse_gp() -> Made:
    x, y = torch.linspace(0.0, 3.0, T), series()
    made = gp.models.VariationalSparseGP(
        x, y, gp.kernels.RBF(1), x[::4].clone(), gp.likelihoods.Gaussian(), whiten=True
    )
    return Pair(made.model, made.guide), ()


def collapsed_gp() -> Made:
    x, y = torch.linspace(0.0, 3.0, T), series()
    made = gp.models.SparseGPRegression(x, y, gp.kernels.RBF(1), x[::4].clone())
    return Pair(made.model, made.guide), ()


class _Forecast(ForecastingModel):
    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        level = (scale * drift).cumsum(-1).unsqueeze(-1)
        self.predict(dist.Normal(0.0, torch.full((1,), SIGMA)), level)


def forecast() -> Made:
    """It has a plate as long as the data, which stand outside it: that has to be said."""
    model = _Forecast()
    return Pair(model, AutoNormal(model), plate=False), (series()[:, None], torch.zeros(T, 0))


KINDS = [
    loop,
    sequential_plate,
    chain,
    regression,
    components,
    sparse_gp,
    collapsed_gp,
    forecast,
]


def made(kind: Callable[[], Made]) -> Made:
    """A pair, its autoguide set up by the same draws each time."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    pair, batch = kind()
    pair.guide(*batch)
    return pair, batch


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_pyros_svi(kind: Callable[[], Made]) -> None:
    pair, batch = made(kind)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    torch.manual_seed(1)
    theirs = [svi.step(*batch) for _ in range(20)]
    parameters = dict(pair.inspect(batch).parameters)

    pair, batch = made(kind)
    run = pvae.fit(pair, batch, epochs=20, lr=0.02, seed=1, batch_size=None, progress=False)
    torch.testing.assert_close(
        torch.tensor([row["loss"] for row in run.history]),
        torch.tensor(theirs),
        rtol=1e-7,
        atol=1e-7,
    )
    assert set(run.structure.parameters) == set(parameters)
    for name, value in run.structure.parameters.items():
        torch.testing.assert_close(value, parameters[name], rtol=1e-7, atol=1e-7)


def log_evidence(y: Tensor) -> float:
    covariance = torch.ones(len(y), len(y)) + SIGMA**2 * torch.eye(len(y))
    return float(dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y))


@pytest.mark.parametrize("kind", [loop, sequential_plate])
def test_the_data_set_is_one_datum(kind: Callable[[], Made]) -> None:
    """The guide is the posterior: each bound is log p(y), of all data together."""
    pair, (y,) = made(kind)
    exact = log_evidence(y)
    how = bounds.AIS(num_temperatures=3)
    for found in (
        bounds.elbo(pair, y, 4),
        bounds.evidence(pair, y, 4),
        bounds.evidence(pair, y, 4, method="ais", ais=how, progress=False),
    ):
        assert found.per_datum.tolist() == pytest.approx([exact], rel=1e-9)
        assert "the one datum is the whole data set" in str(found)
    fitted = bounds.evidence(pair, y, 50, method="local", progress=False)
    assert float(fitted.per_datum) == pytest.approx(exact, abs=0.02)
    assert bounds.log_weights(pair, y, 3).shape == (3, 1)
    mean = y.sum() / (T + SIGMA**2)
    torch.testing.assert_close(latent.codes(pair, y), mean.reshape(1))
    tree = export.to_arviz(pair, y, num_particles=30, progress=False)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "dataset")
    assert tree["sample_stats"]["log_weight"].to_numpy() == pytest.approx(exact, rel=1e-9)
    each = sum(v.to_numpy() for v in tree["log_likelihood"].data_vars.values())
    z = torch.from_numpy(tree["posterior"]["z"].to_numpy())
    expected = dist.Normal(z, SIGMA).log_prob(y).sum(-1)
    assert torch.allclose(torch.from_numpy(each).flatten(), expected.flatten())


def test_arrays_of_any_lengths_are_the_arguments() -> None:
    """The evidence of Bayesian linear regression; one array isn't as long as the others."""
    pair, (x, basis, y) = made(regression)
    features = x @ basis
    covariance = features @ features.T + SIGMA**2 * torch.eye(T)
    exact = float(dist.MultivariateNormal(torch.zeros(T), covariance).log_prob(y))
    found = bounds.evidence(pair, (x, basis, y), 200, method="local", progress=False)
    assert float(found.per_datum) == pytest.approx(exact, abs=0.05)
    assert pair.inspect((x, basis, y)).axes == (None, None, None)
    tree = export.to_arviz(pair, (x, basis, y), num_particles=2, progress=False)
    assert tree["constant_data"]["basis"].shape == (3, 2)


def test_minibatches_are_refused_with_the_line_that_works() -> None:
    pair, (y,) = made(loop)
    with pytest.raises(PairError, match="no plate of the pair counts them") as caught:
        pvae.fit(pair, y, batch_size=4, progress=False)
    assert "batch_size=None" in str(caught.value)
    loader = DataLoader(TensorDataset(y), batch_size=5)
    with pytest.raises(DataError, match="one batch of all data"):
        pvae.fit(pair, loader, progress=False)
    whole = DataLoader(TensorDataset(y), batch_size=T)
    assert bounds.elbo(pair, whole).per_datum.tolist() == pytest.approx([log_evidence(y)])
    assert bounds.elbo(pair, TensorDataset(y)).per_datum.tolist() == pytest.approx(
        [log_evidence(y)]
    )


def test_what_needs_rows_says_so() -> None:
    pair, (y,) = made(loop)
    for tool in (diagnostics.sbc, diagnostics.tarp):
        with pytest.raises(UndefinedError, match="whose data no plate counts"):
            tool(pair, y, progress=False)
    with pytest.raises(UndefinedError, match="data of site 'y0'"):  # no argument of its own
        bounds.bdmc(pair, y, 2, progress=False)


def test_a_plate_that_may_count_the_data_is_asked_about() -> None:
    pair, (data_, covariates) = made(forecast)
    with pytest.raises(PairError, match="plate=False"):
        Pair(pair.model, pair.guide).inspect((data_, covariates))
    assert not pair.inspect((data_, covariates)).has_plate


def test_data_that_depend_on_draws_are_no_observed_data() -> None:
    """A forecaster observes the residuals of its draws."""
    pair, batch = made(forecast)
    tree = export.to_arviz(pair, batch, num_particles=3, progress=False)
    assert "observed_data" not in tree.children
    assert "data that depend on the draws" in tree.attrs["left_out"]


def test_no_arrays_are_no_data_for_whoever_needs_rows() -> None:
    with pytest.raises(DataError, match="at least one row"):
        data.as_source(())
