"""Draws of latents and data: what sites observe, however it is reshaped, cast or masked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pvae import bounds, diagnostics, export, latent
from pvae.errors import DataError, PvaeError, UndefinedError
from pvae.pair import Pair, observed_sites
from pvae.simulate import simulate_batch

N, D = 8, 3
Change = Callable[[Tensor], Tensor]


def counts(change: Change, given: Change | None = None) -> Pair:
    """Poisson counts of one latent; the model observes what ``change`` makes of its argument."""
    given = change if given is None else given

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, device=x.device), 1.0).to_event(1))
            rate = (0.5 * z).exp().expand(*z.shape[:-1], D) + 1.0
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=change(x))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = given(x).mean(1, keepdim=True) / 4 - 0.4
            pyro.sample("z", dist.Normal(mean, 0.7).to_event(1))

    return Pair(model, guide)


def plain(x: Tensor) -> Tensor:
    return x


SHAPES: dict[str, tuple[Change, Change]] = {  # from the data to the argument, and back
    "flattened": (lambda x: x.reshape(N, D, 1), lambda x: x.flatten(1)),
    "cast": (lambda x: x.long(), lambda x: x.to(torch.get_default_dtype())),
    "both": (lambda x: x.int().reshape(N, 1, D), lambda x: x.double().squeeze(1)),
}


@pytest.fixture
def data(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    rates = torch.linspace(1.0, 5.0, N)[:, None].expand(N, D)
    return torch.poisson(rates, generator=generator).to(device)


@pytest.mark.parametrize("name", SHAPES)
def test_a_reshaped_argument_gives_the_same_numbers(name: str, data: Tensor) -> None:
    """Every tool that draws data, against the model that observes its argument as it is."""
    to_argument, back = SHAPES[name]
    x, same, pair = to_argument(data), counts(plain), counts(back)
    options: dict[str, Any] = {"num_simulations": 60, "num_particles": 9}
    for tool in (diagnostics.sbc, diagnostics.tarp):
        assert torch.equal(tool(pair, x, **options).ranks, tool(same, data, **options).ranks)
    ais = bounds.AIS(num_temperatures=3, num_leapfrog=1)
    ours, theirs = (
        bounds.bdmc(p, d, 2, ais=ais, progress=False) for p, d in ((pair, x), (same, data))
    )
    assert float(ours.lower.mean) == pytest.approx(float(theirs.lower.mean), rel=1e-12)
    assert float(ours.upper.mean) == pytest.approx(float(theirs.upper.mean), rel=1e-12)
    assert ours.batch[0].shape == x.shape
    assert ours.batch[0].dtype == x.dtype
    torch.testing.assert_close(back(ours.batch[0]), theirs.batch[0])
    for kind in ("mixed", "posterior"):
        found, other = (
            diagnostics.predictive(p, d, kind=kind, num_particles=9)
            for p, d in ((pair, x), (same, data))
        )
        for key, statistic in found.statistics.items():
            assert torch.equal(statistic.replicated, other.statistics[key].replicated)
    tree = export.to_arviz(pair, x, num_particles=5, progress=False)
    expected = export.to_arviz(same, data, num_particles=5, progress=False)
    assert "constant_data" not in tree.children  # the argument is the observed data
    for group in expected.children:
        for label, variable in expected[group].data_vars.items():
            np.testing.assert_array_equal(tree[group][str(label)].values, variable.values)


def test_a_reshaped_argument_is_checked_like_others(data: Tensor) -> None:
    """The support of the site that observes it, row by row, before anything runs."""
    x = data.reshape(N, D, 1).clone()
    x[5] = -1.0
    with pytest.raises(DataError, match="row 5: expected values in the support of site 'x'"):
        bounds.elbo(counts(lambda x: x.flatten(1)), x)


def test_data_that_the_model_changes_first_are_refused_alike(data: Tensor) -> None:
    """None of the arguments is 2 x. Where equal values hide that, the density shows it."""
    pair = counts(lambda x: 2 * x)
    ais = bounds.AIS(num_temperatures=2, num_leapfrog=1)
    with pytest.raises(UndefinedError, match="as it is or reshaped, or a column of one; got none"):
        diagnostics.sbc(pair, data)
    with pytest.raises(UndefinedError, match="as it is or reshaped, or a column of one; got none"):
        bounds.bdmc(pair, data, 2, ais=ais, progress=False)
    nothing = torch.zeros_like(data)  # 2 * 0 is 0
    with pytest.raises(UndefinedError, match="changes it first"):
        diagnostics.sbc(pair, nothing)
    with pytest.raises(UndefinedError, match="changes it first"):
        bounds.bdmc(pair, nothing, 2, ais=ais, progress=False)


@pytest.mark.filterwarnings("ignore:Nothing in the pair uses argument")
def test_what_a_site_observes(data: Tensor) -> None:
    """Places by identity, by memory, by value; none; more than one; and how it is put back."""
    other = torch.arange(float(N * D), device=data.device).reshape(N, D)
    table: list[tuple[Callable[[Tensor, Tensor], Tensor], int | None, bool]] = [
        (lambda x, y: x, 0, True),
        (lambda x, y: y, 1, True),
        (lambda x, y: x.reshape(N, D, 1).squeeze(-1), 0, True),
        (lambda x, y: y.clone(), 1, False),
        (lambda x, y: x.float(), 0, False),
        (lambda x, y: x + 0.5, None, False),
        (lambda x, y: x + y, None, False),
    ]
    for make, place, is_itself in table:

        def model(x: Tensor, y: Tensor, make: Any = make) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(1, device=x.device), 1.0).to_event(1))
                fn = dist.Normal(torch.zeros(D, device=x.device), 1.0).to_event(1)
                pyro.sample("x", fn, obs=make(x, y))

        def guide(x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(1, device=x.device), 1.0).to_event(1))

        batch = (data, other)
        structure = Pair(model, guide).inspect(batch)
        trace = poutine.trace(model).get_trace(*batch)
        found = observed_sites(structure, trace, batch)["x"]
        assert (found.place, found.is_itself, found.mask) == (place, is_itself, None)
        alike = observed_sites(structure, trace, (data, data.clone()))["x"]
        assert alike.place is None or alike.is_itself or place != 0


def test_data_on_an_axis_of_their_own(data: Tensor) -> None:
    """A plate to the left of the data plate: the model observes x.T, and x is put back."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros((), device=x.device), 1.0))
            with pyro.plate("views", D, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.mean(1), 0.1))

    structure = Pair(model, guide).inspect(data)
    run = simulate_batch(structure, data)
    assert run.observed["x"].place == 0
    torch.testing.assert_close(run.data("x"), data)
    (x,) = run.put_back()
    torch.testing.assert_close(x, run.traces[0].nodes["x"]["value"].T)
    torch.testing.assert_close(x, run.value("x")[0])
    assert not run.settled().is_fed


# Masks


def masked(how: str) -> Pair:
    """x_d = z + noise, of which some entries are missing, with the exact posterior of the rest."""

    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), device=x.device), 1.0))
            fn = dist.Normal(z.unsqueeze(-1).expand(*z.shape, D), 1.0)
            if how == "distribution":
                pyro.sample("x", fn.mask(keep).to_event(1), obs=x)
            elif how == "handler":
                with poutine.mask(mask=keep.all(1)):
                    pyro.sample("x", fn.to_event(1), obs=x)
            else:
                pyro.sample("x", fn.to_event(1), obs=x, obs_mask=keep.all(1))

    def guide(x: Tensor, keep: Tensor) -> None:
        keep = kept(how, keep)
        precision = 1 + keep.sum(1)
        mean = torch.where(keep, x, 0.0).sum(1) / precision
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, precision**-0.5))
            if how == "obs_mask":
                fn = dist.Normal(z.unsqueeze(-1).expand(*z.shape, D), 1.0).to_event(1)
                with poutine.mask(mask=~keep.all(1)):
                    pyro.sample("x_unobserved", fn)

    return Pair(model, guide)


def kept(how: str, keep: Tensor) -> Tensor:
    """Which entries count."""
    return keep if how == "distribution" else keep.all(1, keepdim=True).expand(keep.shape)


def log_evidence(x: Tensor, keep: Tensor) -> Tensor:
    """log p of the entries that count, in closed form: their covariance is I + 1 1^T."""
    totals = []
    for row, has in zip(x.cpu(), keep.cpu(), strict=True):
        n = int(has.sum())
        fn = torch.distributions.MultivariateNormal(torch.zeros(n), torch.eye(n) + 1.0)
        totals.append(fn.log_prob(row[has]) if n else torch.zeros(()))
    return torch.stack(totals)


HOW = ["distribution", "handler", "obs_mask"]
MISSING = 50.0


@pytest.fixture
def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    keep = torch.ones(N, D, dtype=torch.bool)
    keep[1, 0] = keep[4, 1:] = keep[6] = False
    x = torch.randn(N, D, generator=generator).where(keep, MISSING)
    return x.to(device), keep.to(device)


@pytest.mark.parametrize("how", HOW)
def test_masked_entries_stay_as_observed(how: str, batch: tuple[Tensor, Tensor]) -> None:
    x, keep = batch
    name = "x_observed" if how == "obs_mask" else "x"
    seen = kept(how, keep)
    run = simulate_batch(masked(how).inspect(batch), batch, num_particles=20)
    mask = run.mask(name)
    assert mask is not None
    assert torch.equal(mask, seen)
    drawn = run.value(name)
    assert drawn.shape == (20, N, D)
    assert torch.equal(drawn[:, ~seen], x[~seen].expand(20, -1))
    assert (drawn[:, seen].std(0) > 0.5).all()


@pytest.mark.parametrize("how", HOW)
def test_simulated_data_under_a_mask(how: str, batch: tuple[Tensor, Tensor]) -> None:
    """BDMC from the exact posterior is log p of what isn't masked, whatever it is that was drawn;
    SBC finds that posterior calibrated, and one that is too narrow not."""
    x, keep = batch
    pair, seen = masked(how), kept(how, keep)
    ais = bounds.AIS(num_temperatures=2, num_leapfrog=1)
    both = bounds.bdmc(pair, batch, 2, ais=ais, progress=False)
    drawn, labels = both.batch
    assert labels is keep or torch.equal(labels, keep)
    assert torch.equal(drawn[~seen], x[~seen])
    assert not (drawn[seen] == x[seen]).any()
    exact = float(log_evidence(drawn, seen).mean())
    assert float(both.lower.mean) == pytest.approx(exact, abs=0.5 if how == "obs_mask" else 1e-9)
    if how == "obs_mask":  # what is missing is a latent, of some of the data
        with pytest.raises(UndefinedError, match="latents without a mask"):
            diagnostics.sbc(pair, batch)
        return
    assert float(both.upper.mean) == pytest.approx(exact)
    found = diagnostics.sbc(pair, batch, num_simulations=400, num_particles=39)
    assert found.tests.p_value > 1e-5

    def narrow(x: Tensor, keep: Tensor) -> None:
        with poutine.block(), poutine.trace() as run:
            pair.guide(x, keep)
        fn = run.trace.nodes["z"]["fn"]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(fn.mean, fn.stddev / 3))

    off = diagnostics.sbc((pair.model, narrow), batch, num_simulations=400, num_particles=39)
    assert off.tests.p_value < 1e-6


@pytest.mark.parametrize("how", ["distribution", "handler"])
def test_imputations_have_the_posterior_predictive(how: str) -> None:
    """z is N(m, v) given what is seen, so that what isn't is N(m, v + 1), to 4.5 errors.

    Means of 4000 draws of each of some 100 entries, and their variances: a false alarm in 1500.
    """
    keep = torch.rand(40, D) < 0.6
    x = torch.randn(40, D)
    batch = (x.where(keep, MISSING), keep)
    pair, seen = masked(how), kept(how, keep)
    tree: Any = export.to_arviz(pair, batch, num_particles=4000, progress=False)
    drawn = torch.from_numpy(tree["posterior_predictive"]["x"].values[0])
    precision = 1 + seen.sum(1, keepdim=True)
    mean = torch.where(seen, x, 0.0).sum(1, keepdim=True) / precision
    variance = (1 / precision + 1).expand(seen.shape)[~seen]
    off = (drawn.mean(0) - mean)[~seen].abs() / (variance / 4000).sqrt()
    assert float(off.max()) < 4.5
    spread = (drawn.var(0)[~seen] / variance - 1).abs() / (2 / 4000) ** 0.5
    assert float(spread.max()) < 4.5
    means: Any = export.to_arviz(pair, batch, num_particles=2000, mean=True, progress=False)
    impute = torch.from_numpy(means["posterior_predictive"]["x"].values[0]).mean(0)
    assert float((impute - mean)[~seen].abs().max()) < 4.5 / 2000**0.5


def test_default_statistics_are_of_what_is_seen() -> None:
    """A fill value of 50 is in none; that of their mean is the mean of what is seen."""
    keep = torch.rand(30, D) < 0.6
    x = torch.randn(30, D).where(keep, MISSING)
    found = diagnostics.predictive(masked("distribution"), (x, keep), num_particles=200)
    assert found.statistics["mean"].observed == pytest.approx(float(x[keep].mean()))
    assert found.statistics["max"].observed == float(x[keep].max())
    has = keep.any(1)
    means = (torch.where(keep, x, 0.0).sum(1) / keep.sum(1))[has]
    assert found.statistics["sd of means"].observed == pytest.approx(float(means.std()))
    assert float(found.statistics["max"].replicated.max()) < 20
    with pytest.raises(UndefinedError, match="aren't masked out"):
        diagnostics.predictive(masked("distribution"), (x, torch.zeros_like(keep)))


def test_counts_that_are_masked_out_are_drawn_and_stay_apart() -> None:
    """Whole numbers in the data: NaN where they are missing, and 0 draws of the fill value."""

    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 0.1))
            fn = dist.Poisson(z.exp().unsqueeze(-1).expand(*z.shape, D)).mask(keep)
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 0.1))

    keep = torch.arange(12 * D).reshape(12, D) % 3 > 0
    x = torch.ones(12, D).where(keep, 99.0)
    tree: Any = export.to_arviz((model, guide), (x, keep), num_particles=20, progress=False)
    assert float(tree["posterior_predictive"]["x"].max()) < 20
    assert np.array_equal(np.isnan(tree["observed_data"]["x"].values), ~keep.numpy())


@pytest.mark.parametrize("how", HOW)
def test_exports_and_checks_under_a_mask(how: str, batch: tuple[Tensor, Tensor]) -> None:
    x, keep = batch
    name = "x_observed" if how == "obs_mask" else "x"
    pair, seen = masked(how), kept(how, keep).cpu().numpy()
    largest = {"max": lambda x: x.max()}
    found = diagnostics.predictive(pair, batch, largest, num_particles=9)
    assert found.statistics["max"].replicated.unique().tolist() == [MISSING]
    u = diagnostics.pit(pair, batch, num_particles=9).values
    assert np.array_equal(u.isnan().numpy(), ~seen)
    tree: Any = export.to_arviz(pair, batch, num_particles=30, progress=False)
    for group in ("posterior_predictive", "prior_predictive"):
        drawn = tree[group][name].values[0]
        assert (drawn != x.cpu().numpy()).all()  # what is masked out is imputed
        assert (drawn.std(0) > 0.5).all()
    stays = tree["observed_data"][name].values
    assert np.array_equal(np.isnan(stays), ~seen)
    assert np.array_equal(stays[seen], x.cpu().numpy()[seen])
    z = torch.from_numpy(tree["posterior"]["z"].values[0])[..., None]
    each = torch.distributions.Normal(z, 1.0).log_prob(x.cpu()).numpy()
    expected = np.where(seen, each, 0.0).sum(-1)
    np.testing.assert_allclose(tree["log_likelihood"][name].values[0], expected)
    assert list(tree["constant_data"].data_vars) == ["keep"]
    if how != "obs_mask":
        weight = tree["sample_stats"]["log_weight"].values[0]
        exact = log_evidence(x, torch.from_numpy(seen)).numpy()
        np.testing.assert_allclose(weight, np.broadcast_to(exact, weight.shape))


# Data that feed data


def chain(x: Tensor | None, y: Tensor | None, size: int = N) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        x = pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_observed_sites_that_feed_one_another() -> None:
    """y is drawn given the x that was drawn: Var y = 3 and Cov(x, y) = 2, not those given x.

    4.5 standard errors of 4000 draws. SBC knows q(z | x) = N(x / 2, 1 / 2) to be exact.
    """

    def model(x: Tensor, y: Tensor) -> None:
        chain(x, y, len(x))

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    pair, batch = (model, guide), (torch.full((N,), 30.0), torch.full((N,), -30.0))
    drawn = {name: latent.sample(pair, batch, 4000, site=name, seed=1) for name in ("z", "x", "y")}
    moments = torch.stack([drawn["z"], drawn["x"], drawn["y"]]).cov()
    exact = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 3.0]])
    errors = ((exact.square() + torch.outer(exact.diag(), exact.diag())) / 4000).sqrt()
    assert ((moments - exact).abs() < 4.5 * errors).all()
    check = diagnostics.predictive(
        pair, batch, {"mean": lambda y: y.mean()}, site="y", num_particles=400
    )
    replicated = check.statistics["mean"].replicated
    assert abs(float(replicated.mean())) < 4.5 * math.sqrt(3 / N / 400)
    found = diagnostics.sbc(pair, batch, num_simulations=400, num_particles=39)
    assert found.tests.p_value > 1e-5


def test_draws_need_a_site_for_each_argument(data: Tensor) -> None:
    """Two sites that observe one argument have no place of their own; the export has both."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, device=x.device), 1.0).to_event(1))
            for name in ("a", "b"):
                fn = dist.Normal(z.expand(*z.shape[:-1], D), 1.0).to_event(1)
                pyro.sample(name, fn, obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1, device=x.device), 1.0).to_event(1))

    with pytest.raises(PvaeError, match="observed sites with an argument each"):
        diagnostics.sbc((model, guide), data)
    tree = export.to_arviz((model, guide), data, num_particles=3, progress=False)
    assert set(tree["prior_predictive"].data_vars) == {"a", "b"}
