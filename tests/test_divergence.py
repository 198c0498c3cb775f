"""The divergence of two distributions, and the table of objectives."""

from __future__ import annotations

import math
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch

import pvae
from pvae import objectives
from pvae.errors import UndefinedError


def test_it_is_in_closed_form_where_torch_has_one() -> None:
    q, p = dist.Normal(1.0, 2.0), dist.Normal(-0.5, 0.7)
    found = pvae.kl(q, p)
    exact = math.log(0.7 / 2) + (4 + 1.5**2) / (2 * 0.49) - 0.5
    assert found.mean == pytest.approx(exact)
    assert found.se_draws == 0.0
    assert str(found).endswith("nats, exact")
    assert pvae.kl(p, q).mean != pytest.approx(exact)  # not symmetric


def test_it_is_sampled_where_not() -> None:
    """Against quadrature, at 5 standard errors: a false alarm below 1e-6."""
    p = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.tensor([-2.0, 2.0]), 1.0)
    )
    q = dist.Normal(0.5, 1.5)
    found = pvae.kl(q, p, 200_000)
    grid = torch.linspace(-15, 15, 20_001)
    exact = torch.trapezoid(q.log_prob(grid).exp() * (q.log_prob(grid) - p.log_prob(grid)), grid)
    assert abs(found.mean - float(exact)) < 5 * found.se_draws
    assert "over draws" in str(found)
    before = torch.get_rng_state()
    assert pvae.kl(q, p, 200_000).mean == found.mean
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_zero_for_equals_only_and_has_no_bound() -> None:
    scales = torch.logspace(-3, 3, 13)
    q = dist.Normal(0.0, 1.0)
    values = pvae.kl(q, dist.Normal(torch.zeros(13), scales)).values
    assert bool((values >= 0).all())
    assert [i for i, v in enumerate(values) if v < 1e-12] == [6]
    assert float(values[0]) > 1e5
    same = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), torch.ones(2))
    )
    assert pvae.kl(same, same).mean == 0.0


def test_mass_outside_the_support_makes_it_infinite() -> None:
    found = pvae.kl(dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0))
    assert math.isinf(found.mean)
    assert str(found).startswith("KL(q || p): infinite, K = 10000")
    assert "infinite where q has mass and p has none" in str(found)
    assert math.isfinite(pvae.kl(dist.LogNormal(0.0, 1.0), dist.Normal(0.0, 1.0)).mean)


def test_batches_broadcast() -> None:
    q = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    flow = dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0), [dist.transforms.AffineTransform(1.0, 2.0)]
    ).to_event(1)
    found = pvae.kl(q, flow, 50_000)
    exact = pvae.kl(q, dist.Normal(torch.ones(2), 2.0).to_event(1))
    assert found.values.shape == exact.values.shape == (3,)
    assert found.variances is not None
    off = (found.values - exact.values).abs()
    assert bool((off < 5.2 * found.variances.sqrt()).all())
    assert str(exact).endswith("nats per distribution, N = 3, exact")


def test_it_refuses_what_has_no_divergence() -> None:
    with pytest.raises(UndefinedError, match="point mass"):
        pvae.kl(dist.Delta(torch.zeros(2), event_dim=1), dist.Normal(0.0, 1.0))
    with pytest.raises(UndefinedError, match="event_shape"):
        pvae.kl(dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.Normal(0.0, 1.0))


# The table of objectives


def test_every_objective_is_in_the_table() -> None:
    rows = {row.name: row for row in objectives.table()}
    kinds = [getattr(objectives, name) for name in objectives.__all__]
    named = {
        k.__name__
        for k in kinds
        if isinstance(k, type)
        and issubclass(k, objectives.Objective)
        and k is not objectives.Objective
    }
    assert set(rows) == named
    assert all(row.source.count("https://") == 1 for row in rows.values())
    assert rows["CUBO"].bound.startswith("upper bound")
    assert objectives.Renyi(alpha=-0.5).bound == "none"


def test_the_page_of_objectives_is_the_table() -> None:
    page = Path(__file__).parent.parent / "docs" / "objectives.md"
    assert str(objectives.table()) in page.read_text()
