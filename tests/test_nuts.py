"""A guide beside NUTS on the same model, where the posterior is known."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

import pvae
from pvae import diagnostics
from pvae.errors import UndefinedError
from pvae.sites import PENALTY
from tests.globals import Regression

pytestmark = [pytest.mark.usefixtures("store")]
FEW: Any = {"num_samples": 150, "num_warmup": 100, "progress": False}


@pytest.mark.slow
def test_the_posterior_has_no_fault_and_independence_is_found() -> None:
    """Means, deviations and correlations of both, and what the table has of them."""
    toy = Regression(inside=True, centre=10.0)
    exact = diagnostics.against_nuts(toy.pair(), toy.batch, **FEW)
    assert {line.verdict for line in exact.findings()} == {"good"}
    draws, sd = exact.nuts.flatten(0, 1), toy.covariance.diagonal().sqrt()
    error = sd / exact.ess.sqrt()
    assert bool(((draws.mean(0) - toy.mean).abs() < 6 * error).all())
    assert bool(((draws.std(0) / sd - 1).abs() < 6 / (2 * exact.ess).sqrt()).all())
    known = toy.covariance / sd / sd[:, None]
    assert float((exact.correlations[1] - known).abs().max()) < 0.2
    assert float((exact.z.abs()).max()) < 6
    table = exact.summary()
    assert table["entry"].tolist() == ["w[0]", "w[1]", "w[2]"]
    assert {"site", "vi_mean", "nuts_mean", "sd_ratio", "z"} <= {*table.columns}
    mean_field = diagnostics.AgainstNUTS(
        toy.mean + torch.randn(4000, 3) * toy.mean_field_scale,
        *(exact.nuts, exact.sites, exact.names, exact.rhat, exact.ess, 0, "another guide"),
    )
    verdicts = {line.name: line.verdict for line in mean_field.findings()}
    assert verdicts["sd of q / NUTS"] == "bad"
    assert verdicts["correlation of q - NUTS"] in ("look", "bad")
    assert verdicts["mean of q - NUTS"] == "good"


def test_chains_that_have_not_mixed_judge_nothing() -> None:
    stuck = torch.randn(2, 100, 1) + 10 * torch.arange(2.0)[:, None, None]
    found = diagnostics.AgainstNUTS(
        torch.zeros(100, 1), stuck, ("a",), ("a",), torch.tensor([8.0]), torch.tensor([2.0]), 3, ""
    )
    first, *others = found.findings()
    assert (first.verdict, {line.verdict for line in others}) == ("bad", {"none"})
    assert "3 divergent" in str(found)


@pytest.mark.slow
def test_latents_of_data_stand_in_it_and_penalties_do_not() -> None:
    """Two schools of known spread; the marked factor would draw mu to 50; names aren't sorted."""
    y = torch.tensor([1.0, 3.0])

    def model(y: Tensor) -> None:
        mu = pyro.sample("top", dist.Normal(torch.tensor(0.0), 1.0))
        unit = dist.Unit(-((mu - 50) ** 2))
        pyro.sample("penalty", unit, obs=torch.empty(0), infer={PENALTY: True})
        with pyro.plate("data", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    guide = AutoDelta(poutine.block(model, hide=["penalty"]))
    found = diagnostics.against_nuts((model, guide), y, num_particles=10, **FEW)
    assert found.names == ("top", "theta[0]", "theta[1]")
    assert [found.rhat.shape, found.ess.shape] == [(3,), (3,)]
    precision = torch.tensor([[3.0, -1, -1], [-1, 2, 0], [-1, 0, 2]])
    covariance = torch.linalg.inv(precision)
    mean = covariance @ torch.tensor([0.0, 1.0, 3.0])
    error = covariance.diagonal().sqrt() / found.ess.sqrt()
    assert bool(((found.means[1] - mean).abs() < 6 * error).all())
    (width,) = (line for line in found.findings() if line.name == "sd of q / NUTS")
    assert (width.value, width.verdict) == (0.0, "bad")  # a point mass


@pytest.mark.slow
def test_enumerated_latents_are_summed_out_and_discrete_ones_refused() -> None:
    """A mixture's weight given its components: x = 1 three times of four."""
    x = torch.tensor([1.0, 1.0, 1.0, -1.0])

    def mixture(x: Tensor) -> None:
        weight = pyro.sample("weight", dist.Beta(torch.tensor(2.0), 2.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(weight))
            pyro.sample("x", dist.Normal(2 * c - 1, 0.1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("weight", dist.Beta(torch.tensor(5.0), 3.0))

    def drawn(x: Tensor) -> None:
        guide(x)
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(0.5 * torch.ones(())))

    found = diagnostics.against_nuts((config_enumerate(mixture), guide), x, **FEW)
    assert float(found.means[1]) == pytest.approx(5 / 8, abs=6 * float(found.errors[1]))
    with pytest.raises(UndefinedError, match="'c', which is discrete"):
        diagnostics.against_nuts((mixture, drawn), x, **FEW)


def test_what_nuts_cannot_be_beside() -> None:
    x = torch.zeros(20)

    def model(x: Tensor, size: int = 20) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", size, subsample_size=len(x)), poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(torch.tensor(0.0), 1.0))

    with pytest.raises(UndefinedError, match=r"poutine.scale at site 'x'"):
        diagnostics.against_nuts((model, guide), x)
    with pytest.raises(UndefinedError, match="all 100 data"):
        diagnostics.against_nuts((lambda x: model(x, 100), guide), x)


@pytest.mark.slow
def test_it_is_a_check_of_the_screen_by_argument() -> None:
    toy = Regression(inside=True)
    found = pvae.diagnose(toy.mean_field(), toy.batch, checks=["nuts"], progress=False)
    assert [line.name for line in found.findings()][:2] == ["R-hat of NUTS", "sd of q / NUTS"]
    assert "nuts" not in diagnostics.DEFAULT
