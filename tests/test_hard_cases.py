"""Diagnostics where data are few, shuffled, or impossible under some latents."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import bounds, diagnostics, recipes
from pvae.data import LinearGaussian
from pvae.errors import ArgumentError, UndefinedError
from tests import linear

pytestmark = pytest.mark.usefixtures("store")


def shuffled(x: Tensor) -> Any:
    return DataLoader(TensorDataset(x), batch_size=16, shuffle=True)


def test_a_gap_of_a_shuffling_loader_compares_the_same_rows() -> None:
    """With an exact guide log weights are constant: every amortisation gap is that of a fit.

    The rows' evidences spread by 1.7 nats, which is what was seen as gaps of mixed-up rows.
    """
    toy = LinearGaussian.random(6, 2)
    x = toy.sample(64)
    found = diagnostics.gap(
        linear.pair(toy, linear.exact),
        shuffled(x),
        num_particles=50,
        flow=False,
        local=bounds.LocalFit(max_steps=20),
        progress=False,
    )
    assert float(toy.log_evidence(x).std()) > 1.5
    assert float(found.amortisation.per_datum.std()) < 0.3
    assert abs(found.approximation.mean) < 0.2


def test_a_shuffling_loader_gives_what_its_data_give() -> None:
    """All of the screen; before, it ended with an error after its first checks."""
    toy = LinearGaussian.random(6, 2)
    found = pvae.diagnose(linear.pair(toy, linear.exact), shuffled(toy.sample(64)))
    assert not found.undefined
    assert {*found.results} == {*diagnostics.DEFAULT}


def test_the_screen_anneals_when_it_is_asked_to() -> None:
    """Near the evidence in closed form; 4.5 standard errors, a false alarm in 1.5e5."""
    toy = LinearGaussian.random(3, 1)
    x = toy.sample(4)
    found = pvae.diagnose(linear.pair(toy, linear.scaled(1.2)), x, checks=["ais"])
    bound = found.results["ais"].estimate
    assert bound.name == "evidence, AIS-100"
    error = bound.se_draws
    assert bound.mean == pytest.approx(float(toy.log_evidence(x).mean()), abs=4.5 * error + 1e-3)


def test_one_datum_has_a_screen_of_what_needs_no_second() -> None:
    vae, x = recipes.vae(4, 2, hidden=(8,)), torch.ones(1, 4)
    found = pvae.diagnose(vae, x)
    assert set(found.undefined) == {"surgery", "aggregated", "trial"}
    assert all("rows of data: expected" in why for why in found.undefined.values())
    with pytest.raises(ArgumentError, match="active_units, rows of data"):
        diagnostics.active_units(vae, x)


def test_errors_over_one_datum_are_not_zero() -> None:
    vae, x = recipes.vae(4, 2, hidden=(8,)), torch.ones(1, 4)
    found = diagnostics.pit(vae, x, num_particles=10)
    assert math.isnan(found.mean[1])
    assert math.isnan(found.spread[1])
    ais = bounds.AIS(num_temperatures=2, num_leapfrog=1)
    both = bounds.bdmc(vae, x, 2, ais=ais, progress=False)
    assert "nan" not in str(both)


def test_few_replicates_alone_are_no_bad_sign() -> None:
    """Data of the model itself: a single replicate is on one side for sure, which says nothing.

    No two-sided p-value of S = 5 is below 1/3, and distances don't count: no chance is involved.
    By five spreads alone 21% of normal statistics were bad at S = 2, and all of them at S = 1.
    """
    toy = LinearGaussian.random(3, 1)
    pair = linear.pair(toy, linear.exact)
    for num_particles in (1, 2, 5):
        for seed in range(20):
            found = diagnostics.predictive(
                pair, toy.sample(20, seed=seed), num_particles=num_particles
            )
            assert all(line.verdict != "bad" for line in found.findings())


def bounded() -> tuple[Any, Any]:
    """x uniform around z: most draws of a wide guide make x impossible."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.clamp(max=3.0), x.new_tensor(2.0)))

    return model, guide


def test_impossible_draws_are_vectorised_and_counted() -> None:
    """log p is -inf either way of scoring, which was warned of as a difference of nan nats."""
    x = torch.tensor([0.0, 1.0])
    found = bounds.evidence(bounded(), x, 4000)
    normal = dist.Normal(torch.tensor(0.0), torch.tensor(1.0))
    exact = ((normal.cdf(x + 1) - normal.cdf(x - 1)) / 2).log()
    assert found.values is not None
    assert torch.allclose(found.values, exact, atol=0.2)
    assert found.mean == pytest.approx(float(exact.mean()), abs=4.5 * found.se_draws + 2e-3)


def test_a_datum_without_any_weight_has_no_effective_draw() -> None:
    x = torch.tensor([0.0, 50.0])
    found = bounds.evidence(bounded(), x, 100)
    assert found.ess is not None
    assert float(found.ess[1]) == 0
    assert "1 of 2 data rest on a few draws" in str(found)
    weights = diagnostics.importance(bounded(), x, num_particles=100)
    assert float(weights.ess[1]) == 0
    assert float(weights.ess[0]) > 1


def test_a_gap_without_a_value_is_refused_before_fits() -> None:
    with pytest.raises(UndefinedError, match=r"gap: .* at datum 0"):
        diagnostics.gap(bounded(), torch.zeros(3), num_particles=100, progress=True)
    toy = LinearGaussian.random(3, 1)
    pair = linear.pair(toy, linear.exact)
    other = bounds.elbo(pair, toy.sample(2), 4)
    with pytest.raises(ArgumentError, match="the same 3 data"):
        diagnostics.gap(pair, toy.sample(3), num_particles=4, evidence=other)


def test_the_rate_where_some_latents_make_the_data_impossible() -> None:
    """log p(x | z) is -inf there; log q - log p is finite, and was -inf + inf before."""
    model, _ = bounded()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_full((len(x),), 0.5), 1.0))

    found = bounds.elbo((model, guide), torch.ones(50), 400)
    assert found.mean == -math.inf
    assert found.rate is not None
    error = 0.5 / math.sqrt(50 * 400)  # it is z / 2 - 1 / 8, and z has variance 1
    assert abs(found.rate.mean - 0.125) < 4.5 * error


def test_a_number_that_rounds_to_zero_has_no_sign() -> None:
    assert diagnostics.Finding("total correlation", -1e-9, 1e-7).number == "0.000000 +- 0.000000"


def test_what_depends_on_the_number_of_data_is_not_judged() -> None:
    """With a sharp posterior each of 20 data is told from the others: information is log 20."""
    sharp = LinearGaussian(torch.eye(2), torch.zeros(2), 1e-3)
    x = sharp.sample(20)
    found = diagnostics.surgery(linear.pair(sharp, linear.marginals), x)
    lines = {line.name: line for line in found.findings()}
    assert lines["information"].value == pytest.approx(math.log(20), abs=1e-3)
    assert lines["marginal KL"].value > 1
    assert lines["marginal KL"].verdict == "none"
    assert "at most" in lines["marginal KL"].meaning
    assert "at most" in lines["total correlation"].meaning


def test_bounds_are_compared_by_name() -> None:
    toy = LinearGaussian.random(3, 1)
    bound = bounds.elbo(linear.pair(toy, linear.exact), toy.sample(5), 2)
    several: Any = [bound, bound]
    with pytest.raises(ArgumentError, match="a dictionary of estimates by name; got list"):
        bounds.compare(several)
