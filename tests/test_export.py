"""Exports to ArviZ: numbers against terms and closed forms, and ArviZ's own functions on them."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from arviz_stats import psense_summary
from scipy import stats
from torch import Tensor

import pvae
from pvae import export, recipes
from pvae.data import as_source
from pvae.errors import ArgumentError, PvaeWarning, UndefinedError
from tests import pairs
from tests.test_bounds import exact_pair, orthogonal
from tests.test_predictive import regression

mpl.use("agg")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the 0.23 line says that the 1.x line is coming
    import arviz

    try:
        import arviz.preview as az
    except ImportError:
        az = arviz

D, Q = 5, 2


def to_arviz(*args: Any, **options: Any) -> Any:
    """`export.to_arviz`; what a tree has is known at run time alone."""
    return export.to_arviz(*args, **options)


def exported(device: torch.device, n: int = 8, **options: Any) -> tuple[Any, Any, Tensor, Any]:
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(n)
    return toy, pair, x, to_arviz(pair, x, **options)


def test_densities_are_those_of_the_exported_draws(device: torch.device) -> None:
    """Every number of the posterior's groups, recomputed from z and x by torch."""
    toy, _, x, tree = exported(device, num_particles=50)
    z = torch.from_numpy(tree["posterior"]["z"].values[0])
    assert z.shape == (50, 8, Q)
    likelihood = torch.distributions.Normal(z @ toy.weight.T + toy.bias, toy.sigma)
    log_lik = likelihood.log_prob(x).sum(-1).numpy()
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1).numpy()
    mean, covariance = toy.posterior(x)
    log_q = torch.distributions.MultivariateNormal(mean, covariance).log_prob(z).numpy()
    sample = tree["sample_stats"]
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values[0], log_lik)
    np.testing.assert_allclose(sample["log_p"].values[0], log_lik + log_prior)
    np.testing.assert_allclose(sample["log_q"].values[0], log_q)
    evidence = np.broadcast_to(toy.log_evidence(x).numpy(), (50, 8))
    np.testing.assert_allclose(sample["log_weight"].values[0], evidence)
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, x.numpy())


def test_khat_of_each_datum(device: torch.device) -> None:
    """Exact guides have none; of narrow ones it is that of the exported weights."""
    *_, tree = exported(device, num_particles=30)
    assert np.isnan(tree["sample_stats"]["khat"].values).all()
    toy = orthogonal()
    pair, x = exact_pair(toy, device, widen=0.5), toy.sample(8)
    tree = to_arviz(pair, x, num_particles=400)
    khat = tree["sample_stats"]["khat"]
    assert khat.dims == ("data",)
    weights = torch.from_numpy(tree["sample_stats"]["log_weight"].values[0])
    np.testing.assert_allclose(khat.values, pvae.diagnostics.khat(weights).numpy())
    assert khat.values.mean() > 0.5
    _, theirs = (-tree["sample_stats"]["log_weight"]).azstats.psislw(dim=["chain", "draw"])
    np.testing.assert_allclose(khat.values, theirs.values)
    model, guide, batch = pairs.PAIRS["global_latent"](device)
    tree = to_arviz((model, guide), batch, num_particles=30)
    assert tree["sample_stats"]["khat"].dims == ()


def test_draws_have_the_right_moments(device: torch.device) -> None:
    """Prior, posterior and both predictives, each mean to 4.9 standard errors (40 numbers)."""
    toy, _, x, tree = exported(device, n=2, num_particles=4000)
    mean, covariance = toy.posterior(x)
    marginal = toy.weight @ toy.weight.T + toy.sigma**2 * torch.eye(D)
    given = toy.weight @ covariance @ toy.weight.T + toy.sigma**2 * torch.eye(D)
    exact = {
        ("prior", "z"): (torch.zeros(2, Q), torch.eye(Q)),
        ("posterior", "z"): (mean, covariance),
        ("prior_predictive", "x"): (toy.bias.expand(2, D), marginal),
        ("posterior_predictive", "x"): (mean @ toy.weight.T + toy.bias, given),
    }
    for (group, name), (location, spread) in exact.items():
        draws = torch.from_numpy(tree[group][name].values[0])
        error = (spread.diagonal() / 4000).sqrt()
        assert ((draws.mean(0) - location).abs() < 4.9 * error).all(), group
        ratio = draws.var(0) / spread.diagonal()
        assert ((ratio - 1).abs() < 4.9 * math.sqrt(2 / 4000)).all(), group


def test_predictive_draws_belong_to_their_latents(device: torch.device) -> None:
    """With ``mean=True`` they are W z + b of the very z in the export, prior and posterior."""
    toy, _, _, tree = exported(device, num_particles=7, mean=True)
    for group in ("prior", "posterior"):
        z = torch.from_numpy(tree[group]["z"].values)
        x = tree[f"{group}_predictive"]["x"].values
        np.testing.assert_allclose(x, (z @ toy.weight.T + toy.bias).numpy())


@pytest.mark.parametrize("max_rows", [1, 30])
def test_chunks_leave_every_density_with_its_draw(max_rows: int, device: torch.device) -> None:
    toy, _, x, tree = exported(device, num_particles=9, max_rows=max_rows)
    z = torch.from_numpy(tree["posterior"]["z"].values[0])
    likelihood = torch.distributions.Normal(z @ toy.weight.T + toy.bias, toy.sigma)
    log_lik = likelihood.log_prob(x).sum(-1).numpy()
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values[0], log_lik)
    assert len(np.unique(z.numpy())) == z.numel()


def test_global_draws_are_shared_and_their_densities_of_the_data_set(device: torch.device) -> None:
    """With a conjugate regression's exact guide every weight is the evidence."""
    model, guide, (x, y), (mean, sd) = regression(device, 40)
    covariance = 0.3**2 * torch.eye(40) + 100.0 * torch.outer(x, x).cpu()
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(40), covariance)
    exact = float(gaussian.log_prob(y.cpu()))
    for max_rows in (10, 8192):
        tree = to_arviz((model, guide), (x, y), num_particles=60, max_rows=max_rows)
        w = tree["posterior"]["w"].values[0]
        assert w.shape == (60,)
        sample = tree["sample_stats"]
        np.testing.assert_allclose(sample["log_q"].values[0], stats.norm.logpdf(w, mean, sd))
        np.testing.assert_allclose(sample["log_weight"].values[0], exact)
        loc = w[:, None] * x.cpu().numpy()
        expected = stats.norm.logpdf(y.cpu().numpy(), loc, 0.3)
        np.testing.assert_allclose(tree["log_likelihood"]["y"].values[0], expected)
    assert tree["constant_data"]["x"].dims == ("data",)
    np.testing.assert_array_equal(tree["constant_data"]["x"].values, x.cpu().numpy())


def test_sensitivity_to_prior_and_likelihood_by_power_scaling(device: torch.device) -> None:
    """Of a conjugate normal: the same distance of exact distribution functions, scaled alike.

    With the prior to the power a, the posterior of the mean has precision a / 4 + N and mean
    N x / precision; with the likelihood to the power, 1 / 4 + a N and a N x / precision.
    """
    x = torch.tensor([1.0, 3.0, 2.5, 0.5], dtype=torch.float64, device=device)
    count, total = len(x), float(x.sum())

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        precision = count + 0.25
        pyro.sample("mean", dist.Normal(x.new_tensor(total / precision), precision**-0.5))

    tree = to_arviz((model, guide), x, num_particles=4000)
    draws = tree["posterior"]["mean"].values[0]
    prior = tree["log_prior"]["mean"]
    assert prior.dims == ("chain", "draw")
    np.testing.assert_allclose(prior.values[0], stats.norm.logpdf(draws, 0, 2))
    grid = np.linspace(draws.min(), draws.max(), 20_001)

    def cdf(of_prior: float, of_likelihood: float) -> np.ndarray:
        precision = of_prior / 4 + of_likelihood * count
        return stats.norm.cdf(grid, of_likelihood * total / precision, precision**-0.5)

    found = psense_summary(tree, round_to=6)
    for column, scaled in (("prior", lambda a: cdf(a, 1)), ("likelihood", lambda a: cdf(1, a))):
        sides = [_distance(cdf(1, 1), scaled(a)) / abs(np.log2(a)) for a in (0.99, 1.01)]
        assert float(found[column].iloc[0]) == pytest.approx(np.mean(sides), rel=0.1)
    assert found["likelihood"].iloc[0] > 2 * found["prior"].iloc[0]


def _distance(p: np.ndarray, q: np.ndarray) -> float:
    """The cumulative Jensen-Shannon distance of distribution functions, or of their reflections."""

    def one(p: np.ndarray, q: np.ndarray) -> float:
        middle = np.log2((p + q) / 2)
        apart = p * (np.log2(p) - middle) + q * (np.log2(q) - middle)
        return float((apart.sum() / (p + q).sum()) ** 0.5)

    return max(one(p, q), one(1 - p, 1 - q))


def test_labels_and_names_of_dimensions(device: torch.device) -> None:
    model, guide, (x, y) = pairs.PAIRS["labels"](device)
    names = [f"row {i}" for i in range(12)]
    tree = to_arviz(
        (model, guide),
        (x, y),
        num_particles=3,
        dims={"z": ["unit"]},
        coords={"data": names, "unit": ["a", "b"]},
    )
    z = tree["posterior"]["z"]
    assert z.dims == ("chain", "draw", "data", "unit")
    assert z.coords["unit"].values.tolist() == ["a", "b"]
    assert tree["prior"]["z"].dims == z.dims
    assert tree["constant_data"]["y"].values.tolist() == y.tolist()
    assert tree["observed_data"]["x"].coords["data"].values.tolist() == names
    assert "x" not in tree["constant_data"]
    for bad, match in (
        ({"dims": {"w": ["unit"]}}, "dims: expected some of 'z' and 'x'"),
        ({"dims": {"z": ["a", "b"]}}, "1 names, for event_shape"),
        ({"coords": {"nothing": [1]}}, "coords"),
        ({"groups": ["nothing"]}, "groups"),
        ({"num_particles": 0}, "num_particles"),
        ({"max_bytes": 1000}, "at most max_bytes = 0 MiB; got 0 MiB: "),
    ):
        with pytest.raises(ArgumentError, match=match):
            to_arviz((model, guide), (x, y), **bad)


def test_other_plates_name_dimensions(device: torch.device) -> None:
    """An inner plate to the right of the data plate, and a global one."""

    def model(x: Tensor) -> None:
        with pyro.plate("topics", 4):
            pyro.sample("level", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("words", 3, dim=-1):
                word = pyro.sample("word", dist.Normal(z.expand(x.shape), 1.0))
                pyro.sample("x", dist.Normal(word, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("topics", 4):
            pyro.sample("level", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("words", 3, dim=-1):
                pyro.sample("word", dist.Normal(x, 0.1))

    x = torch.randn(6, 3).to(device)
    with pytest.warns(UserWarning, match="Particles are looped"):
        tree = to_arviz((model, guide), x, num_particles=5)
    posterior = tree["posterior"]
    assert posterior["level"].dims == ("chain", "draw", "topics")
    assert posterior["word"].dims == ("chain", "draw", "data", "words")
    assert tree["observed_data"]["x"].dims == ("data", "words")
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "words")
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, x.cpu().numpy())
    close = posterior["word"].values[0] - x.cpu().numpy()
    assert 0.05 < close.std() < 0.2  # rows and words aren't exchanged
    expected = stats.norm.logpdf(x.cpu().numpy(), posterior["word"].values[0], 1.0).sum(-1)
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values[0], expected)


def test_a_plate_to_the_left_of_the_data_plate(device: torch.device) -> None:
    """Data come first in the export, whatever their axis is in the programs."""
    shift = torch.tensor([0.0, 10.0, 20.0]).to(device)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("views", 3, dim=-2):
                pyro.sample("x", dist.Normal(z + shift[:, None], 1.0), obs=x.T)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    x = (torch.randn(7, 3) + shift.cpu()).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PvaeWarning)  # where a view isn't told from a particle
        tree = to_arviz((model, guide), x, num_particles=5, mean=True)
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, x.cpu().numpy())
    z = tree["posterior"]["z"].values
    drawn = tree["posterior_predictive"]["x"]
    assert drawn.dims == ("chain", "draw", "data", "views")
    np.testing.assert_allclose(drawn.values, z[..., None] + shift.cpu().numpy())


def test_a_point_mass_has_one_draw_and_no_weights(device: torch.device) -> None:
    ae = recipes.ae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(6, D).to(device)
    tree = to_arviz(ae, x, num_particles=20)
    assert tree["posterior"].sizes["draw"] == 1
    assert tree["posterior_predictive"].sizes["draw"] == 20
    assert set(tree["sample_stats"].data_vars) == {"log_p"}
    codes = pvae.latent.codes(ae, x).cpu().numpy()
    np.testing.assert_allclose(tree["posterior"]["z"].values[0, 0], codes)
    assert tree.attrs["quantity"] == "log_joint"
    for name in ("prior", "prior_predictive", "log_q", "log_weight"):
        assert f"{name}: " in tree.attrs["left_out"]
    assert "prior" not in tree.children
    with pytest.raises(UndefinedError, match="'z' from the model: expected a prior that is"):
        to_arviz(ae, x, groups=["prior"])


def test_what_would_not_fit_is_refused_with_sizes(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.zeros(100_000, D)
    with pytest.raises(
        ArgumentError, match=r"max_bytes = 2,048 MiB; got .*prior_predictive [\d,]+"
    ):
        to_arviz(vae, x, num_particles=10_000)


@pytest.mark.parametrize("name", pairs.PAIRS)
@pytest.mark.usefixtures("store")
def test_every_kind_of_pair(name: str, device: torch.device) -> None:
    """All groups that have a meaning, finite; the reason for the one that hasn't; state kept."""
    model, guide, batch = pairs.PAIRS[name](device)
    before = torch.get_rng_state()
    tree = to_arviz((model, guide), batch, num_particles=7, max_rows=30)
    assert torch.equal(torch.get_rng_state(), before)
    missing = {"constant_data"} - set(tree.children)
    if name == "enumerated":
        assert "posterior_predictive: " in tree.attrs["left_out"]
        missing |= {"posterior_predictive"}
    else:
        assert tree.attrs["left_out"] == "khat: 25 draws are the fewest for a tail"
    assert set(tree.children) == set(export.GROUPS) - missing
    seen = batch[1].cpu().numpy() if name == "masked" else np.ones(len(batch[0]), dtype=bool)
    for group in tree.children.values():
        for variable in group.data_vars.values():
            values = variable.values
            if group.name == "observed_data":  # NaN is what no site has observed
                assert np.isnan(values[~seen]).all()
                values = values[seen]
            assert np.isfinite(values).all()
    again = to_arviz((model, guide), batch, num_particles=7, max_rows=30)
    xarray.testing.assert_equal(again, tree)


@pytest.mark.usefixtures("store")
def test_an_enumerated_likelihood_is_summed_out(device: torch.device) -> None:
    """log p(x | z) = log sum_c p(c) p(x | z, c), by hand from the exported z."""
    model, guide, (x,) = pairs.PAIRS["enumerated"](device)
    tree = to_arviz((model, guide), x, num_particles=5, groups=["posterior", "log_likelihood"])
    z = torch.from_numpy(tree["posterior"]["z"].values[0]).to(device)
    with torch.no_grad():
        loc = model.decoder(z)[:, :, None] + model.shift
        each = torch.distributions.Normal(loc, 1.0).log_prob(x[:, None]).sum(-1)
        expected = (each + model.logits.log_softmax(0)).logsumexp(-1).cpu().numpy()
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values[0], expected)


def test_a_round_trip_through_netcdf(tmp_path: Path, device: torch.device) -> None:
    model, guide, batch = pairs.PAIRS["labels"](device)
    tree = to_arviz((model, guide), batch, num_particles=5, coords={"data": list("abcdefghijkl")})
    tree.to_netcdf(tmp_path / "fit.nc")
    with xarray.open_datatree(tmp_path / "fit.nc") as back:
        xarray.testing.assert_equal(back.load(), tree)
        assert back.attrs["quantity"] == "elbo"
        assert back.attrs["pvae_version"] == pvae.__version__
        assert back["posterior"].attrs["inference_library"] == "pvae"


def test_names_with_slashes(tmp_path: Path, device: torch.device) -> None:
    """As `pyro.contrib.autoname.scope` makes them; a file's groups are what slashes separate."""

    def model(x: Tensor) -> None:
        with pyro.plate("a/data", len(x)):
            z = pyro.sample("a/z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("a/x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("a/data", len(x)):
            pyro.sample("a/z", dist.Normal(x, 1.0).to_event(1))

    tree = to_arviz((model, guide), torch.randn(6, 1).to(device), num_particles=30)
    assert tree["posterior"]["a.z"].dims == ("chain", "draw", "a.data", "a.z_dim_0")
    tree.to_netcdf(tmp_path / "fit.nc")
    with xarray.open_datatree(tmp_path / "fit.nc") as back:
        xarray.testing.assert_equal(back.load(), tree)


def test_a_loader_is_read_in_one_order(device: torch.device) -> None:
    """A shuffling loader gives another order each time; rows of all groups belong together."""
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(12, D).round()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x), batch_size=5, shuffle=True
    )
    tree = to_arviz(vae, loader, num_particles=6, max_rows=12)
    held = torch.from_numpy(tree["observed_data"]["x"].values)
    z = torch.from_numpy(tree["posterior"]["z"].values[0]).to(device)
    with torch.no_grad():
        expected = vae.model.likelihood(z).log_prob(held.to(device)).cpu().numpy()
    np.testing.assert_allclose(tree["log_likelihood"]["x"].values[0], expected)


def test_the_exports_of_a_fit(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,))
    x = torch.rand(30, D).round()
    fit = pvae.fit(vae, x, epochs=1, progress=False, device=str(device))
    tree: Any = fit.to_arviz(num_particles=4)
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, x.numpy())
    assert fit.to_arviz(x[:3], num_particles=4)["posterior"].sizes["data"] == 3


# LOO


def exact_loo(x: Tensor, y: Tensor) -> np.ndarray:
    """log p(y_n | y_-n) of the conjugate regression."""
    x, y = x.cpu(), y.cpu()
    found = []
    for i in range(len(x)):
        keep = torch.arange(len(x)) != i
        precision = x[keep].square().sum() / 0.3**2 + 0.01
        mean = (x[keep] * y[keep]).sum() / 0.3**2 / precision
        sd = (0.3**2 + x[i].square() / precision).sqrt()
        found.append(float(torch.distributions.Normal(mean * x[i], sd).log_prob(y[i])))
    return np.array(found)


def test_loo_of_a_conjugate_regression(device: torch.device) -> None:
    """Datum by datum, with an exact guide and with one that is too wide, which PSIS corrects."""
    model, guide, (x, y), (mean, sd) = regression(device, 30)
    exact = exact_loo(x, y)

    def wide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(x.new_tensor(mean + 0.3 * sd), 1.5 * sd))

    for each in (guide, wide):
        found = export.loo((model, each), (x, y), num_particles=4000)
        np.testing.assert_allclose(found.elpd_i.values, exact, atol=0.03)
        assert float(found.elpd) == pytest.approx(exact.sum(), abs=0.15)
        assert float(found.pareto_k.max()) < 0.7


def test_loo_prefers_the_right_model(device: torch.device) -> None:
    """ArviZ's compare on two of them: with the noise's scale, and with one three times that."""
    model, guide, (x, y), _ = regression(device, 60)

    def loose(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    precision = float(x.square().sum()) + 0.01
    mean = float((x * y).sum()) / precision

    def loose_guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(x.new_tensor(mean), precision**-0.5))

    right = export.loo((model, guide), (x, y))
    wrong = export.loo((loose, loose_guide), (x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas, in ArviZ
        table = az.compare({"right": right, "wrong": wrong})
    assert list(table.index) == ["right", "wrong"]


def test_loo_is_refused_where_it_means_nothing(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(30, D).round()
    with pytest.raises(UndefinedError, match=r"'z' inside it: log p\(x \| z\) .* has seen x"):
        export.loo(vae, x)
    for name in ("global_latent", "enumerated"):
        with pyro.get_param_store().scope():
            model, guide, batch = pairs.PAIRS[name](device)
            with pytest.raises(UndefinedError, match="has seen x"):
                export.loo((model, guide), batch)
    model, _, (x, y), _ = regression(device, 30)

    def point(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Delta(x.new_ones(())))

    with pytest.raises(UndefinedError, match="a point mass at 'w'"):
        export.loo((model, point), (x, y))


@pytest.mark.usefixtures("store")
def test_loo_needs_all_data(device: torch.device) -> None:
    model, guide, (x, y) = pairs.PAIRS["autoguide"](device)
    with pytest.warns(UserWarning, match="Pareto"):  # ArviZ's, on a guide that wasn't trained
        assert export.loo((model, guide), (x, y), num_particles=100).n_data_points == 12
    with pytest.raises(UndefinedError, match="all 12 data"):
        export.loo((model, guide), (x[:5], y[:5]))
    tree = to_arviz((model, guide), (x[:5], y[:5]), num_particles=3)
    assert "sample_stats: " in tree.attrs["left_out"]


# ArviZ's own functions


@pytest.fixture(scope="module")
def tree() -> Any:
    """Of a pair with a data plate and an event of one dimension."""
    with pvae.randomness.forked(seed=0):
        device = torch.device("cpu")
        *_, tree = exported(device, n=12, num_particles=100)
    return tree


def test_arviz_summary(tree: Any) -> None:
    table = az.summary(tree, var_names=["z"], kind="stats")
    assert len(table) == 12 * Q
    z = tree["posterior"]["z"].values[0]
    means = np.array(table["mean"], dtype=float).reshape(12, Q)
    np.testing.assert_allclose(means, z.mean(0), rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plot_dist", {"var_names": ["z"], "coords": {"data": [0, 1]}}),
        ("plot_forest", {"var_names": ["z"], "coords": {"data": [0, 1]}}),
        ("plot_pair", {"var_names": ["z"], "coords": {"data": [0, 1]}}),
        ("plot_prior_posterior", {"var_names": ["z"], "coords": {"data": [0]}}),
        ("plot_ppc_dist", {"num_samples": 10}),
        ("plot_ppc_dist", {"num_samples": 10, "group": "prior_predictive"}),
        ("plot_ppc_tstat", {"t_stat": "mean"}),
        ("plot_ppc_tstat", {"t_stat": "std", "group": "prior_predictive"}),
    ],
)
def test_arviz_plots(name: str, options: dict[str, Any], tree: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ's own, of its libraries
        found = getattr(az, name)(tree, backend="matplotlib", **options)
    assert found is not None
    mpl.pyplot.close("all")


def test_arviz_draws_calibration(device: torch.device) -> None:
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(60)
    found = pvae.diagnostics.pit(pair, x)
    values = (("chain", "draw", "x_dim"), found.values[None].numpy())
    u = xarray.Dataset({"x": values}, {"x_dim": np.arange(D)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert az.plot_ecdf_pit(u, backend="matplotlib") is not None
    mpl.pyplot.close("all")


@pytest.mark.parametrize("name", ["plot_ppc_pit", "plot_ppc_interval", "plot_ppc_dist", "plot_lm"])
def test_arviz_plots_of_a_regression(name: str, device: torch.device) -> None:
    model, guide, data, _ = regression(device, 30)
    tree = to_arviz((model, guide), data, num_particles=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert getattr(az, name)(tree, backend="matplotlib") is not None
    mpl.pyplot.close("all")


def test_the_older_arviz_reads_the_file(tree: Any, tmp_path: Path) -> None:
    """The 0.23 line's own functions, on what ``arviz.from_netcdf`` makes of the file."""
    if not arviz.__version__.startswith("0."):
        pytest.skip("ArviZ 1 reads the tree itself")
    tree.to_netcdf(tmp_path / "fit.nc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = arviz.from_netcdf(tmp_path / "fit.nc")
        arviz.plot_posterior(data, var_names=["z"], coords={"data": [0]})
        arviz.plot_ppc(data, num_pp_samples=10)
        table = arviz.summary(data, var_names=["z"], kind="stats")
    assert len(table) == 12 * Q
    mpl.pyplot.close("all")


def test_arviz_loo_plot(device: torch.device) -> None:
    model, guide, data, _ = regression(device, 30)
    found = export.loo((model, guide), data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert az.plot_khat(found, backend="matplotlib") is not None
    mpl.pyplot.close("all")


def test_the_source_of_a_fit_is_data(device: torch.device) -> None:
    _, pair, x, tree = exported(device, num_particles=3)
    again = to_arviz(pair, as_source(x, device, x.dtype), num_particles=3)
    xarray.testing.assert_equal(again, tree)
