"""Several observed sites: columns of one tensor, labels, sequences, and data that feed data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor

import pvae
from pvae import bounds, diagnostics, latent
from pvae.errors import ArgumentError, UndefinedError

pytestmark = pytest.mark.usefixtures("store")
N, T, PHI = 60, 4, 0.5
QUICK: dict[str, Any] = {"num_simulations": 300, "num_particles": 19, "progress": False}
FALSE_ALARM = 1e-5


def sequences(n: int = N) -> Tensor:
    """x_t = z + PHI x_{t-1} + noise."""
    z, columns = torch.randn(n), [torch.zeros(n)]
    for _ in range(T):
        columns.append(z + PHI * columns[-1] + torch.randn(n))
    return torch.stack(columns[1:], 1)


def by_return(x: Tensor) -> None:
    """Each site is given what the one before has drawn."""
    with pyro.plate("data", len(x)):
        z, before = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0)), torch.tensor(0.0)
        for t in range(T):
            before = pyro.sample(f"x_{t}", dist.Normal(z + PHI * before, 1.0), obs=x[:, t])


def from_batch(x: Tensor) -> None:
    """Each site reads the number before from the data, and observes a copy of a column."""
    with pyro.plate("data", len(x)) as rows:
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        for t in pyro.markov(range(T)):
            before = x[:, t - 1] if t else torch.zeros(len(x))
            pyro.sample(f"x_{t}", dist.Normal(z + PHI * before, 1.0), obs=x[rows, t])


def at_once(x: Tensor) -> None:
    """Each entry of one site reads the one before it, as under teacher forcing."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        before = torch.cat([torch.zeros(len(x), 1), x[:, :-1]], 1)
        pyro.sample("x", dist.Normal(z[..., None] + PHI * before, 1.0).to_event(1), obs=x)


def in_a_plate(x: Tensor) -> None:
    """The same, with time in a plate of its own and along the first axis of the data."""
    with pyro.plate("data", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("time", T, dim=-2):
            before = torch.cat([torch.zeros(1, x.shape[1]), x[:-1]])
            pyro.sample("x", dist.Normal(z + PHI * before, 1.0), obs=x)


def from_the_end(x: Tensor) -> None:
    """Each entry reads the one after it."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        after = torch.cat([x[:, 1:], torch.zeros(len(x), 1)], 1)
        pyro.sample("x", dist.Normal(z[..., None] + PHI * after, 1.0).to_event(1), obs=x)


def last_reads_itself(x: Tensor) -> None:
    """In single precision its draws settle as well, and are no draws of the model."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        own = torch.where(torch.arange(x.shape[1]) < x.shape[1] - 1, 0.0, 0.01)
        pyro.sample("x", dist.Normal(z[..., None] + own * x, 1.0).to_event(1), obs=x)


def hardly(x: Tensor) -> None:
    """One site reads next to nothing of its own data."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z[..., None] + 0.02 * x, 1.0).to_event(1), obs=x)


def guide_of(factor: float) -> Callable[[Tensor], None]:
    """The exact posterior of z, its standard deviation times a factor."""

    def guide(x: Tensor) -> None:
        rest = torch.cat([x[:, :1], x[:, 1:] - PHI * x[:, :-1]], 1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(rest.sum(1) / (1 + T), factor * (1 + T) ** -0.5))

    return guide


@pytest.mark.parametrize("model", [by_return, from_batch, at_once])
def test_sequences_are_ranked(model: Any) -> None:
    """Columns are put back where they stand: the exact guide passes, and no other."""
    x = sequences()
    for tool in (diagnostics.sbc, diagnostics.tarp):
        assert float(tool((model, guide_of(1.0)), x, **QUICK).tests.p_values.min()) > FALSE_ALARM
    assert diagnostics.sbc((model, guide_of(0.5)), x, **QUICK).p_value < 1e-6


@pytest.mark.parametrize("model", [by_return, from_batch])
def test_samples_of_sequences_are_the_models(model: Any) -> None:
    """Far from the data: mean and sd of x_1 by hand, within 5 standard errors."""
    x, n = 30 + torch.zeros(N, T) + torch.randn(N, T), 4000
    drawn = latent.sample((model, guide_of(1.0)), x, n, site="x_1")
    sd = ((1 + PHI) ** 2 + 1 + PHI**2) ** 0.5
    assert abs(float(drawn.mean())) < 5 * sd / n**0.5
    assert abs(float(drawn.std()) / sd - 1) < 5 / (2 * n) ** 0.5


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("model", [at_once, in_a_plate])
def test_a_site_that_reads_its_own_earlier_entries_is_drawn_in_turn(
    model: Any, *, mean: bool
) -> None:
    """Means and standard deviations by hand, within 5 standard errors; of means, that of z."""
    x, n = 30 + torch.randn(N, T), 4000
    pair = pvae.Pair(model, no_latent_but_z, plate="data")
    drawn = latent.sample(pair, x.T if model is in_a_plate else x, n, mean=mean)
    of_z, noise = 0.0, 0.0
    for t in range(T):
        of_z, noise = 1 + PHI * of_z, 1 + PHI**2 * noise
        sd = (of_z**2 + noise * (not mean)) ** 0.5
        assert abs(float(drawn[:, t].mean())) < 5 * sd / n**0.5
        assert abs(float(drawn[:, t].std()) / sd - 1) < 5 / (2 * n) ** 0.5


def no_latent_but_z(x: Tensor) -> None:
    with pyro.plate("data", x.shape[0] if x.shape[0] != T else x.shape[1]):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def test_bits_that_read_those_before_are_drawn_in_turn() -> None:
    """A bit is 1 with probability 0.8 as long as none was 1 before, and then never again."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            before = torch.cat([torch.zeros(len(x), 1), x.cumsum(1)[:, :-1]], 1)
            pyro.sample("x", dist.Bernoulli(0.8 * (before == 0)).to_event(1), obs=x)

    x, n = torch.ones(N, T), 4000
    x[:, 1:] = 0
    drawn = latent.sample((model, no_latent_but_z), x, n)
    assert bool((drawn.sum(1) <= 1).all())
    for t in range(T):
        p = 0.8 * 0.2**t
        assert abs(float(drawn[:, t].mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5
    with pytest.raises(
        UndefinedError, match=r"mean of site 'x', whose .*Bernoulli.*\n.*mean=False"
    ):
        latent.sample((model, no_latent_but_z), x, mean=True)


@pytest.mark.parametrize("model", [by_return, from_batch])
def test_means_of_sequences_are_given_the_means_before(model: Any) -> None:
    """z (1 + PHI + PHI^2 + ...), and nothing of the data."""
    x = 30 + torch.randn(N, T)
    pair = model, guide_of(1.0)
    z = latent.sample(pair, x, site="z", mean=True)
    for t in range(T):
        expected = z * sum(PHI**k for k in range(t + 1))
        torch.testing.assert_close(latent.sample(pair, x, site=f"x_{t}", mean=True), expected)


def test_a_mean_given_labels_that_were_drawn_is_refused_by_site() -> None:
    """A mean of labels is no label; what has no mean is refused where it is asked for."""
    batch = torch.randn(N), torch.full((N,), 2)
    with pytest.raises(UndefinedError, match=r"mean of site 'y', whose data are read: .*Categor"):
        latent.sample((labelled, of_label), batch, site="x", mean=True)

    def unread(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])), obs=y)
            pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)

    pair = unread, of_label
    z, x = (latent.sample(pair, batch, site=site, mean=True) for site in ("z", "x"))
    torch.testing.assert_close(x, 3 * z)
    with pytest.raises(UndefinedError, match="site 'y': expected a distribution that has a mean"):
        latent.sample(pair, batch, site="y", mean=True)


@pytest.mark.parametrize("model", [by_return, from_batch])
def test_sequences_are_drawn_as_the_model_has_them(model: Any) -> None:
    """Mean and sd of x_0 and x_1 by hand, not given the data: within 5 standard errors."""
    pair, x = (model, guide_of(1.0)), 30 + torch.zeros(200, T) + torch.randn(200, T)
    weights = {"x_0": (1.0, 1.0), "x_1": (1 + PHI, 1 + PHI**2)}  # of z; the noise's variance
    for site, (of_z, noise) in weights.items():
        sd = (of_z**2 + noise) ** 0.5
        statistics: dict[str, Any] = {"mean": torch.mean, "sd": torch.std}
        found = diagnostics.predictive(pair, x, statistics, site=site, num_particles=50)
        mean, spread = (found.statistics[name].replicated for name in statistics)
        assert abs(float(mean.mean())) < 5 * sd / (200 * 50) ** 0.5
        assert abs(float(spread.mean()) / sd - 1) < 5 / (2 * 200 * 50) ** 0.5


@pytest.mark.parametrize("model", [hardly, from_the_end, last_reads_itself])
def test_a_site_that_reads_its_own_data_is_refused(model: Any) -> None:
    for tool in (diagnostics.sbc, diagnostics.predictive, latent.sample):
        with pytest.raises(UndefinedError, match=r"site 'x': .* as under teacher forcing"):
            tool((model, guide_of(1.0)), sequences().float())


def labelled(x: Tensor, y: Tensor) -> None:
    """The decoder reads the label as it was given; it is observed, too."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])), obs=y)
        pyro.sample("x", dist.Normal(z + 2 * y, 1.0), obs=x)


def of_label(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x - 2 * y) / 2, 0.5**0.5))


def test_observed_labels() -> None:
    """x is drawn given the label that was drawn: E x = 1.4, not 4 as under the data's labels."""
    y = torch.full((N,), 2)
    batch = (torch.randn(N) * 2**0.5 + 2 * y, y)
    found = diagnostics.sbc((labelled, of_label), batch, **QUICK)
    assert found.p_value > FALSE_ALARM
    check = diagnostics.predictive(
        (labelled, of_label), batch, {"mean": torch.mean}, site="x", num_particles=100
    )
    error = ((2 + 4 * 0.61) / N / 100) ** 0.5
    assert abs(float(check.statistics["mean"].replicated.mean()) - 1.4) < 5 * error
    ais = bounds.AIS(num_temperatures=3, num_leapfrog=1)
    both = bounds.bdmc((labelled, of_label), batch, 2, ais=ais, progress=False)
    torch.testing.assert_close(both.upper.per_datum, both.lower.per_datum)
    assert len(both.batch[1].unique()) == 3


def test_several_sites_have_a_line_each_on_the_screen() -> None:
    """And one site is looked at alone where it is asked for."""
    pair, x = (by_return, guide_of(1.0)), sequences()
    found = pvae.diagnose(pair, x, checks=["predictive"], progress=False)
    names = [line.name.split(",")[0] for line in found.findings()]
    assert names == [f"p of x_{t}" for t in range(T)]
    assert set(found.results["predictive"].checks) == {f"x_{t}" for t in range(T)}
    assert {line.verdict for line in found.findings()} == {"good"}
    wrong = pvae.diagnose(pair, torch.cat([x[:, :3], x[:, 3:] + 9], 1), checks=["predictive"])
    verdicts = {line.name.split(",")[0]: line.verdict for line in wrong.findings()}
    assert verdicts["p of x_3"] == "look"
    assert verdicts["p of x_0"] == "good"
    alone = pvae.diagnose(pair, x, checks=["predictive", "sbc"], site="x_1", progress=False)
    assert alone.results["predictive"].site == "x_1"
    assert alone.results["sbc"].names == ("z",)
    with pytest.raises(ArgumentError, match=r"site: expected one of 'z', 'x_0', 'x_1'"):
        pvae.diagnose(pair, x, site="w")


def test_columns_of_several_kinds() -> None:
    """A number and a bit in one tensor; the bit's column is put back, too."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("a", dist.Normal(2 * z, 1.0), obs=x[:, 0])
            pyro.sample("b", dist.Bernoulli(0.2 + 0.6 * z), obs=x[:, 1])

    def guide_with(bias: float) -> Callable[[Tensor], None]:
        def guide(x: Tensor) -> None:
            odds = torch.tensor(0.4 / 0.6).log() + 2 * x[:, 0] - 2
            odds = odds + torch.where(x[:, 1] == 1, 1.0, -1.0) * torch.tensor(4.0).log()
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=odds + bias))

        return guide

    x = torch.zeros(5, 2)
    assert diagnostics.sbc((model, guide_with(0.0)), x, **QUICK).p_value > FALSE_ALARM
    assert diagnostics.sbc((model, guide_with(3.0)), x, **QUICK).p_value < 1e-6


def test_a_hidden_markov_model_has_a_line_for_each_step() -> None:
    """Its states are summed out, and drawn with the data: the mean of a step is known."""
    go, means = torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([-1.0, 2.0])

    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            state = torch.tensor(0)
            scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0), 0.1))
            for t in pyro.markov(range(3)):
                state = pyro.sample(f"s_{t}", dist.Categorical(go[state]))
                pyro.sample(f"x_{t}", dist.Normal(means[state], scale), obs=x[:, t])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("scale", dist.LogNormal(torch.zeros(len(x)), 0.1))

    share = torch.tensor([1.0, 0.0])
    for t in range(3):
        share = share @ go
        found = diagnostics.predictive(
            (model, guide), torch.zeros(100, 3), {"mean": torch.mean}, site=f"x_{t}",
            num_particles=100,
        )  # fmt: skip
        expected = float(share @ means)
        assert abs(float(found.statistics["mean"].replicated.mean()) - expected) < 0.1
