"""The bound by number of draws, and tables of models, against quadrature and numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pvae import bounds, recipes
from pvae.bounds import Curve
from pvae.errors import ArgumentError, UndefinedError
from pvae.estimate import Estimate
from tests import gaussian

STEPS = 4.5  # standard errors; two-sided, a false alarm in 1.5e5


def test_points_are_means_over_disjoint_groups() -> None:
    log_weight = torch.randn(8, 3)
    found = Curve.of_weights(log_weight.split(2, 1))
    assert list(found.estimates) == [1, 2, 4, 8]
    variances = {}
    for k, point in found.estimates.items():
        groups = torch.stack([g.exp().mean(0).log() for g in log_weight.split(k)])
        torch.testing.assert_close(point.values, groups.mean(0))
        if k < 8:
            variances[k] = groups.var(0) / len(groups)
            torch.testing.assert_close(point.variances, variances[k])
    w = log_weight.exp()
    torch.testing.assert_close(found[8].ess, w.sum(0) ** 2 / w.square().sum(0))
    delta = w.var(0, correction=0) / w.mean(0) ** 2 / 8
    larger = max(delta, variances[4], key=lambda v: float(v.sum()))
    torch.testing.assert_close(found[8].variances, larger)


def test_the_first_points_by_quadrature(device: torch.device) -> None:
    """ELBO and IWAE-2 of each datum, to 4.5 standard errors over draws."""
    model, guide = gaussian.pair(device)
    x = torch.tensor([-1.0, 0.4, 2.5], device=device)
    found = bounds.iwae_curve((model, guide), x, 8192)
    assert list(found.estimates) == [2**i for i in range(14)]

    def elbo(w: Tensor) -> Tensor:
        return w[0]

    def two(w: Tensor) -> Tensor:
        return w.logsumexp(0) - math.log(2)

    for what, num_draws in ((elbo, 1), (two, 2)):
        point = found[num_draws]
        assert point.variances is not None
        exact = torch.stack(
            [gaussian.expectation(model, guide, row.unsqueeze(0), what, num_draws) for row in x]
        ).detach()
        off = (point.values - exact).abs()
        assert bool((off < STEPS * point.variances.sqrt()).all())


def test_chunks_of_any_size_give_every_draw_once(device: torch.device) -> None:
    """With the posterior as the guide each point is the evidence, of however many chunks."""
    model = gaussian.GaussianModel().to(device)
    guide = gaussian.exact_guide(model).to(device)
    x = torch.linspace(-2, 2, 5, device=device)
    exact = gaussian.log_evidence(model, x).detach()
    for max_rows in (8192, 40, 3):  # all data at once, two at once, one in parts
        found = bounds.iwae_curve((model, guide), x, 16, max_rows=max_rows)
        for point in found.estimates.values():
            torch.testing.assert_close(point.values, exact)
        torch.testing.assert_close(found[16].ess, torch.full_like(exact, 16.0))
        assert found.doubts == ()
        assert found.extrapolated.mean == pytest.approx(float(exact.mean()))


def test_extrapolation_takes_the_bias_off(device: torch.device) -> None:
    """Many data with few draws: the last point is visibly too low, what it goes to isn't.

    Weights are bounded, as the guide is wider than the posterior.
    """
    model = gaussian.GaussianModel().to(device)
    guide = gaussian.GaussianGuide(0.25, 0.3, 0.9).to(device)
    x = gaussian.SIGMA * torch.randn(20_000, device=device)
    exact = gaussian.log_evidence(model, x).detach()
    found = bounds.iwae_curve((model, guide), x, 32)
    off = found[32].values - exact
    error = float(off.std()) / math.sqrt(len(x))
    assert float(off.mean()) < -STEPS * error
    better = found.extrapolated.values - exact
    error = float(better.std()) / math.sqrt(len(x))
    assert abs(float(better.mean())) < STEPS * error + 0.1 * abs(float(off.mean()))
    assert found.extrapolated.mean == pytest.approx(2 * found[32].mean - found[16].mean)


def test_a_guide_that_misses_gets_a_guess(device: torch.device) -> None:
    model = gaussian.GaussianModel().to(device)
    x = torch.linspace(-2, 2, 400, device=device)
    bad = gaussian.GaussianGuide(0.5, 1.2, 0.08).to(device)
    found = bounds.iwae_curve((model, bad), x, 256)
    assert "four times the draws add" in found.doubts[0]
    assert "data rest on fewer than 20 draws" in found.doubts[1]
    text = str(found)
    assert "a guess:" in text
    assert "next: bounds.evidence(..., method='ais')" in text
    good = gaussian.GaussianGuide(0.57, 0.0, 0.6).to(device)
    sound = bounds.iwae_curve((model, good), x, 256)
    assert sound.doubts == ()
    assert "if weights have a finite variance; no bound" in str(sound)


def test_one_datum_has_no_error_over_data(device: torch.device) -> None:
    model, guide = gaussian.pair(device)
    found = bounds.iwae_curve((model, guide), torch.tensor([0.3], device=device), 16)
    assert math.isnan(found.extrapolated.se_data)
    assert "nan" not in str(found)


def test_refusals() -> None:
    ae = recipes.ae(6, 2)
    with pytest.raises(UndefinedError, match="point mass"):
        bounds.iwae_curve(ae, torch.zeros(3, 6))
    vae = recipes.vae(6, 2)
    for number, message in ((100, "a power of 2"), (8, "at least 16")):
        with pytest.raises(ArgumentError, match=message):
            bounds.iwae_curve(vae, torch.zeros(3, 6), number)


# --- comparison


def bound(values: list[float], name: str = "evidence, IWAE-10", **options: Any) -> Estimate:
    fields = {"num_particles": 10, "kind": "lower", **options}
    return Estimate(name, torch.tensor(values), **fields)


def test_a_table_by_hand() -> None:
    best, middle, worst = [-1.0, -2.0, -3.0, -4.0], [-1.5, -2.0, -4.0, -4.5], [-9.0] * 4
    found = bounds.compare({"b": bound(middle), "c": bound(worst), "a": bound(best)})
    table = found.to_frame()
    assert list(table.index) == ["a", "b", "c"]
    assert list(table["rank"]) == [0, 1, 2]
    np.testing.assert_allclose(table["mean"], [-2.5, -3.0, -9.0])
    np.testing.assert_allclose(table["diff"], [0.0, 0.5, 6.5])
    assert table["se"]["a"] == pytest.approx(np.std(best, ddof=1) / 2)
    assert table["se"]["c"] == 0.0
    assert table["dse"]["a"] == 0.0
    assert table["dse"]["b"] == pytest.approx(np.std([0.5, 0.0, 1.0, 0.5], ddof=1) / 2)
    assert table["dse"]["c"] == pytest.approx(np.std(np.array(best) + 9, ddof=1) / 2)
    lines = str(found).splitlines()
    assert lines[0].split() == ["rank", "mean", "se", "diff", "dse", "bound"]
    assert lines[1].split()[:2] == ["a", "0"]
    assert lines[-1] == "nats per datum, N = 4"


def test_the_paired_error_is_smaller_than_that_of_two_models(device: torch.device) -> None:
    """Two decoders that differ a little; the difference is known in closed form."""
    x = 2 * torch.randn(400, device=device)
    found, exact = {}, {}
    for name, w in (("one", 1.3), ("other", 1.6)):
        model = gaussian.GaussianModel(w).to(device)
        guide = gaussian.exact_guide(model).to(device)
        found[name] = bounds.evidence((model, guide), x, 4)
        exact[name] = gaussian.log_evidence(model, x).detach()
    table = bounds.compare(found)
    first, second = table.estimates
    difference = exact[first] - exact[second]
    found_difference = table.differences[second]
    assert found_difference.mean == pytest.approx(float(difference.mean()))
    assert found_difference.se_data == pytest.approx(float(difference.std()) / 20)
    errors = [estimate.se_data for estimate in table.estimates.values()]
    assert found_difference.se_data < 0.5 * math.hypot(*errors)


def test_what_cannot_be_compared() -> None:
    one = bound([-1.0, -2.0])
    with pytest.raises(ArgumentError, match="two or more"):
        bounds.compare({"a": one})
    with pytest.raises(ArgumentError, match="2 of 'a', 3 of 'b'"):
        bounds.compare({"a": one, "b": bound([-1.0, -2.0, -3.0])})
    lower = bound([-1.0, -2.0], "ELBO")
    with pytest.raises(ArgumentError, match="one kind of bound"):
        bounds.compare({"a": one, "b": lower})
    table = bounds.compare({"a": one, "b": lower}, mixed=True)
    assert "loose by different amounts" in str(table)
    point = bound([-1.0, -2.0], "log joint", kind="none")
    assert "no bound" in str(bounds.compare({"a": point, "b": point}))
    whole = Estimate("ELBO", torch.tensor([-3.0]), by="draw", num_data=2, global_sites=("mu",))
    with pytest.raises(UndefinedError, match="per datum"):
        bounds.compare({"a": whole, "b": whole})


def test_a_curve_of_the_wrong_order_is_doubted() -> None:
    """Bias that falls as 1 / log K, not as 1 / K, though every datum has draws enough."""
    num = 200
    noise = 0.001 * torch.randn(6, num)
    steps = torch.tensor([2.0**i for i in range(6)])
    slow = -1 / (1 + steps.log()).unsqueeze(1) + noise
    fast = -1 / steps.unsqueeze(1) + noise

    def curve(values: Tensor) -> Curve:
        points = {
            int(k): Estimate("IWAE", v, torch.zeros(num), ess=torch.full((num,), 30.0))
            for k, v in zip(steps, values, strict=True)
        }
        return Curve(points)

    assert curve(fast).doubts == ()
    assert len(curve(slow).doubts) == 1


def test_the_last_points_error_with_heavy_tails() -> None:
    """Weights exp(3 u): over 200 curves the error is within 30 % of the spread; delta has 0.66."""
    generator = torch.Generator().manual_seed(0)
    means, errors, deltas = [], [], []
    for _ in range(200):
        log_weight = 3 * torch.randn(256, 100, generator=generator, dtype=torch.float64)
        last = Curve.of_weights([log_weight])[256]
        means.append(last.mean)
        errors.append(last.se_draws)
        deltas.append(Estimate.of_evidence("delta", log_weight).se_draws)
    spread = float(np.std(means, ddof=1))
    assert np.mean(errors) == pytest.approx(spread, rel=0.3)
    assert np.mean(deltas) < 0.75 * spread
