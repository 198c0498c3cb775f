"""The bound by number of draws, and tables of models, against quadrature and numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pvae import bounds, recipes
from pvae.bounds.curve import Curve, _points
from pvae.errors import ArgumentError, UndefinedError
from tests import gaussian, pairs

STEPS = 4.5  # standard errors; two-sided, a false alarm in 1.5e5


def test_points_are_means_over_disjoint_groups() -> None:
    log_weight = torch.randn(8, 3)
    values, variances, ess = _points(log_weight)
    assert values.shape == variances.shape == (4, 3)
    for i, k in enumerate((1, 2, 4, 8)):
        groups = torch.stack([g.exp().mean(0).log() for g in log_weight.split(k)])
        torch.testing.assert_close(values[i], groups.mean(0))
        if k < 8:
            torch.testing.assert_close(variances[i], groups.var(0) / len(groups))
    w = log_weight.exp()
    torch.testing.assert_close(ess, w.sum(0) ** 2 / w.square().sum(0))
    torch.testing.assert_close(variances[-1], w.var(0, correction=0) / w.mean(0) ** 2 / 8)


def test_the_first_points_by_quadrature(device: torch.device) -> None:
    """ELBO and IWAE-2 of each datum, to 4.5 standard errors over draws."""
    model, guide = gaussian.pair(device)
    x = torch.tensor([-1.0, 0.4, 2.5], device=device)
    found = bounds.iwae_curve((model, guide), x, 8192)
    assert found.num_particles == tuple(2**i for i in range(14))

    def elbo(w: Tensor) -> Tensor:
        return w[0]

    def two(w: Tensor) -> Tensor:
        return w.logsumexp(0) - math.log(2)

    for i, (what, num_draws) in enumerate(((elbo, 1), (two, 2))):
        exact = torch.stack(
            [gaussian.expectation(model, guide, row.unsqueeze(0), what, num_draws) for row in x]
        ).detach()
        off = (found.values[i] - exact).abs()
        assert bool((off < STEPS * found.variances[i].sqrt()).all())
    assert float(found.se_draws[0]) == pytest.approx(float(found.variances[0].sum().sqrt()) / 3)


def test_chunks_of_any_size_give_every_draw_once(device: torch.device) -> None:
    """With the posterior as the guide each point is the evidence, of however many chunks."""
    model = gaussian.GaussianModel().to(device)
    guide = gaussian.exact_guide(model).to(device)
    x = torch.linspace(-2, 2, 5, device=device)
    exact = gaussian.log_evidence(model, x).detach()
    for max_rows in (8192, 40, 3):  # all data at once, two at once, one in parts
        found = bounds.iwae_curve((model, guide), x, 16, max_rows=max_rows)
        torch.testing.assert_close(found.values, exact.expand(5, 5))
        torch.testing.assert_close(found.ess, torch.full_like(exact, 16.0))
        assert found.doubts == ()
        assert found.extrapolated == pytest.approx(float(exact.mean()))


def test_extrapolation_takes_the_bias_off(device: torch.device) -> None:
    """Many data with few draws: the last point is visibly too low, what it goes to isn't.

    Weights are bounded, as the guide is wider than the posterior.
    """
    model = gaussian.GaussianModel().to(device)
    guide = gaussian.GaussianGuide(0.25, 0.3, 0.9).to(device)
    x = gaussian.SIGMA * torch.randn(20_000, device=device)
    exact = gaussian.log_evidence(model, x).detach()
    found = bounds.iwae_curve((model, guide), x, 32)
    off = found.values[-1] - exact
    error = float(off.std()) / math.sqrt(len(x))
    assert float(off.mean()) < -STEPS * error
    better = 2 * found.values[-1] - found.values[-2] - exact
    error = float(better.std()) / math.sqrt(len(x))
    assert abs(float(better.mean())) < STEPS * error + 0.1 * abs(float(off.mean()))
    assert found.extrapolated == pytest.approx(float((better + exact).mean()))


def test_a_guide_that_misses_gets_a_guess(device: torch.device) -> None:
    model = gaussian.GaussianModel().to(device)
    x = torch.linspace(-2, 2, 40, device=device)
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
    assert math.isnan(found.se_extrapolated)
    assert "nan" not in str(found)


@pytest.mark.parametrize("name", pairs.PAIRS)
def test_the_curve_of_any_pair(name: str, device: torch.device, store: None) -> None:
    model, guide, batch = pairs.PAIRS[name](device)
    if name in pairs.GLOBAL:
        with pytest.raises(UndefinedError, match="global site"):
            bounds.iwae_curve((model, guide), batch, 16)
        return
    found = bounds.iwae_curve((model, guide), batch, 512)
    assert found.values.shape == (10, len(batch[0]))
    lower = bounds.elbo((model, guide), batch, 512, seed=1)
    better = bounds.evidence((model, guide), batch, 512, seed=1)
    assert lower.se_draws is not None
    assert better.se_draws is not None
    first = STEPS * math.hypot(lower.se_draws, float(found.se_draws[0]))
    assert abs(lower.mean - float(found.means[0])) < first
    last = STEPS * math.hypot(better.se_draws, float(found.se_draws[-1])) + 0.05
    assert abs(better.mean - float(found.means[-1])) < last


def test_refusals() -> None:
    ae = recipes.ae(6, 2)
    with pytest.raises(UndefinedError, match="point mass"):
        bounds.iwae_curve(ae, torch.zeros(3, 6))
    vae = recipes.vae(6, 2)
    for number, message in ((100, "a power of 2"), (8, "at least 16")):
        with pytest.raises(ArgumentError, match=message):
            bounds.iwae_curve(vae, torch.zeros(3, 6), number)


# --- comparison


def bound(values: list[float], name: str = "evidence, IWAE-10", **options: Any) -> bounds.Bound:
    tensor = torch.tensor(values)
    return bounds.Bound(name, tensor, float(tensor.sum()), None, len(values), 10, **options)


def test_a_table_by_hand() -> None:
    best, middle, worst = [-1.0, -2.0, -3.0, -4.0], [-1.5, -2.0, -4.0, -4.5], [-9.0] * 4
    found = bounds.compare({"b": bound(middle), "c": bound(worst), "a": bound(best)})
    assert [row.name for row in found.rows] == ["a", "b", "c"]
    assert [row.rank for row in found.rows] == [0, 1, 2]
    first, second, third = found.rows
    assert (first.mean, first.diff, first.dse) == (-2.5, 0.0, 0.0)
    assert first.se == pytest.approx(np.std(best, ddof=1) / 2)
    assert second.mean == pytest.approx(-3.0)
    assert second.diff == pytest.approx(0.5)
    assert second.dse == pytest.approx(np.std([0.5, 0.0, 1.0, 0.5], ddof=1) / 2)
    assert third.se == 0.0
    assert third.dse == pytest.approx(np.std(np.array(best) + 9, ddof=1) / 2)
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
    first, second = table.rows
    difference = exact[first.name] - exact[second.name]
    assert second.diff == pytest.approx(float(difference.mean()))
    assert second.dse == pytest.approx(float(difference.std()) / 20)
    assert second.dse < 0.5 * math.hypot(first.se, second.se)


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
    whole = bounds.Bound("ELBO", None, -3.0, 0.1, 2, 1, global_sites=("mu",))
    with pytest.raises(UndefinedError, match="per datum"):
        bounds.compare({"a": whole, "b": whole})


def test_a_curve_of_the_wrong_order_is_doubted() -> None:
    """Bias that falls as 1 / log K, not as 1 / K, though every datum has draws enough."""
    num = 200
    noise = 0.001 * torch.randn(6, num)
    steps = torch.tensor([2.0**i for i in range(6)])
    slow = -1 / (1 + steps.log()).unsqueeze(1) + noise
    fast = -1 / steps.unsqueeze(1) + noise
    common = (torch.zeros(6, num), torch.full((num,), 30.0))
    names = tuple(int(s) for s in steps)
    assert Curve(names, fast, *common).doubts == ()
    assert len(Curve(names, slow, *common).doubts) == 1


def test_the_last_points_error_with_heavy_tails() -> None:
    """Weights exp(3 u): over 200 curves the error is within 30 % of the spread; delta has 0.66."""
    generator = torch.Generator().manual_seed(0)
    means, errors, deltas = [], [], []
    for _ in range(200):
        log_weight = 3 * torch.randn(256, 100, generator=generator, dtype=torch.float64)
        values, variances, ess = _points(log_weight)
        found = Curve(tuple(2**i for i in range(9)), values, variances, ess)
        means.append(found.means[-1])
        errors.append(found.se_draws[-1])
        deltas.append(variances[-1].sum().sqrt() / 100)
    spread = float(torch.stack(means).std())
    assert float(torch.stack(errors).mean()) == pytest.approx(spread, rel=0.3)
    assert float(torch.stack(deltas).mean()) < 0.75 * spread
