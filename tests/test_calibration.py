"""Calibration of guides against posteriors that are known, and tests against distributions.

p-values below 1e-5 on exact guides would be false alarms, one in 1e5 by construction: the p-values
are corrected for what they are the least of. Simulations are of fixed seeds.
"""

from __future__ import annotations

import math
from typing import Any

import arviz_base
import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_plots import plot_ecdf_pit
from scipy import stats
from torch import Tensor, nn

from pvae import diagnostics
from pvae.data import LinearGaussian
from pvae.diagnostics.uniformity import _inside, _p_value, uniformity
from pvae.errors import ArgumentError, UndefinedError
from pvae.simulate import draw_jointly
from pvae.terms import prepared
from tests import linear, pairs

FALSE_ALARM = 1e-5
QUICK: dict[str, Any] = {"num_simulations": 500, "num_particles": 39}


def data(device: torch.device, features: int = 3) -> Tensor:
    return torch.zeros(4, features, device=device)


def run_sbc(make: linear.Make, device: torch.device, **options: Any) -> diagnostics.SBC:
    model, guide = linear.pair(linear.correlated(), make)
    return diagnostics.sbc((model, guide), data(device), **QUICK | options)


def run_tarp(make: linear.Make, device: torch.device, **options: Any) -> diagnostics.TARP:
    model, guide = linear.pair(linear.correlated(), make)
    return diagnostics.tarp((model, guide), data(device), **QUICK | options)


# --- the tests themselves -----------------------------------------------------------------------


def test_the_bands_probability_by_enumeration() -> None:
    """All 4^5 samples of five ranks in 0..3, against the chain of counts."""
    size, points = 5, (0.25, 0.5, 0.75)
    grid = np.stack(np.meshgrid(*[np.arange(4)] * size), -1).reshape(-1, size)
    counts = np.stack([(grid < k).sum(1) for k in (1, 2, 3)], 1)
    tails = np.minimum(
        stats.binom.cdf(counts, size, points), stats.binom.sf(counts - 1, size, points)
    )
    least = 2 * tails.min(1)
    for level in np.unique(least):
        expected = (least > level * (1 + 1e-9)).mean()
        assert _inside(size, points, float(level)) == pytest.approx(expected, abs=1e-12)


def test_p_values_are_of_all_samples_that_are_as_odd() -> None:
    """The test's p-value by enumeration: 3^6 samples of six ranks in 0..2."""
    size = 6
    grid = torch.cartesian_prod(*[torch.arange(3)] * size)  # (729, 6)
    found = uniformity(grid.T, 2)
    counts = np.stack([(grid.numpy() < k).sum(1) for k in (1, 2)], 1)
    share = np.array([1 / 3, 2 / 3])
    tails = np.minimum(
        stats.binom.cdf(counts, size, share), stats.binom.sf(counts - 1, size, share)
    )
    least = tails.min(1)
    expected = (least[None] <= least[:, None] * (1 + 1e-9)).mean(1)
    np.testing.assert_allclose(found.ecdf_p.numpy(), expected, atol=1e-12)


def test_tiny_p_values_are_upper_bounds() -> None:
    """The bound that stands in for p-values below 1e-9 is never less than the chain's number."""
    points = tuple(np.arange(1, 20) / 20)
    for level in (0.1, 1e-3, 1e-6):
        exact = 1 - _inside(200, points, level)
        assert exact <= len(points) * level
        assert _p_value(200, points, level) == exact
    assert _p_value(200, points, 1e-30) == pytest.approx(19e-30)


@pytest.mark.parametrize("columns", [1, 4])
def test_the_band_is_the_tests(columns: int, device: torch.device) -> None:
    """A column leaves the band if and only if its p-value is at most 5% over their number."""
    generator = torch.Generator().manual_seed(1)
    agree, outside = [], 0
    for power in np.linspace(0.8, 1.25, 40):
        unit = torch.rand(200, columns, generator=generator) ** power
        found = uniformity((unit * 50).long().to(device), 49)
        inside = (found.ecdf >= found.lower[:, None]) & (found.ecdf <= found.upper[:, None])
        agree += (inside.all(0) == (found.ecdf_p > 0.05 / columns)).tolist()
        outside += int((~inside).any(0).sum())
        least = torch.minimum(found.chi2_p, found.ecdf_p)
        torch.testing.assert_close(found.p_values, (2 * columns * least).clamp(max=1))
        assert found.p_value == float(found.p_values.min())
    assert all(agree)
    assert 0 < outside < len(agree)


def test_chi_squared_is_scipys_over_even_bins() -> None:
    ranks = torch.randint(0, 100, (400, 1))
    found = uniformity(ranks, 99)
    expected = stats.chisquare(np.bincount(ranks[:, 0].numpy() // 5, minlength=20)).pvalue
    assert float(found.chi2_p[0]) == pytest.approx(expected)


def test_shift_and_spread_are_standard_errors() -> None:
    """Both by enumeration of one rank in 0..4, which has the same mean and variance of each."""
    ranks = torch.tensor([[0, 1, 4, 4, 4, 2]]).T
    found = uniformity(ranks, 4)
    unit = torch.arange(5.0) / 4 - 0.5
    ours = ranks[:, 0].double() / 4 - 0.5
    root = math.sqrt(6)
    shift = ours.mean() / unit.std(correction=0) * root
    square = unit.square()
    spread = (ours.square().mean() - square.mean()) / square.std(correction=0) * root
    assert float(found.shift[0]) == pytest.approx(float(shift))
    assert float(found.spread[0]) == pytest.approx(float(spread))


# --- simulation-based calibration -----------------------------------------------------------------


def test_the_exact_guide_passes(device: torch.device) -> None:
    found = run_sbc(linear.exact, device)
    assert found.tests.p_value > FALSE_ALARM
    assert found.findings()[0].verdict == "good"
    worst = ((found.coverage - found.levels[:, None]) / found.coverage_se).abs().max()
    assert float(worst) < 5.0  # 6 intervals: 3e-6
    assert found.names == ("z[0]", "z[1]")
    assert found.ranks.min() == 0
    assert found.ranks.max() == 39
    assert "as an exact q's" in str(found)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (linear.scaled(0.7), "q is too narrow"),
        (linear.scaled(1.6), "q is too wide"),
        (linear.shifted(0.5), "q is too high"),
        (linear.shifted(-0.5), "q is too low"),
    ],
)
def test_wrong_guides_are_caught_with_their_direction(
    make: linear.Make, says: str, device: torch.device
) -> None:
    found = run_sbc(make, device)
    assert float(found.tests.p_values.max()) < 1e-6
    assert found.findings()[0].verdict == "bad"
    assert says in str(found)
    assert all(found.shape_of(d) == says for d in range(2))


def test_coverage_of_a_narrow_guide_is_known(device: torch.device) -> None:
    """An interval of a Gaussian that is too narrow by f covers P(|z| < f Phi^-1(...)).

    L = 399, so that the ends of intervals are all but q's quantiles. 4.5 standard errors.
    """
    factor = 0.6
    found = run_sbc(linear.scaled(factor), device, num_particles=399, levels=(0.5, 0.9))
    exact = 2 * stats.norm.cdf(factor * stats.norm.ppf((1 + found.levels.numpy()) / 2)) - 1
    for level, expected in enumerate(exact):
        error = math.sqrt(expected * (1 - expected) / 500)
        for d in range(2):
            assert abs(float(found.coverage[level, d]) - expected) < 4.5 * error + 0.004


def test_levels_are_those_that_ranks_can_have(device: torch.device) -> None:
    found = run_sbc(linear.exact, device, num_simulations=50, num_particles=9, levels=(0.5, 0.8))
    torch.testing.assert_close(found.levels.sort().values, torch.tensor([0.6, 0.8]))
    inside = ((found.ranks >= 1) & (found.ranks <= 8)).double().mean(0)
    torch.testing.assert_close(found.coverage[found.levels > 0.7][0], inside.cpu())


def test_what_single_dimensions_cannot_see(device: torch.device) -> None:
    """The prior in q's place, and right marginals without their correlation of -0.9.

    Their ranks are uniform in each dimension; those of log p(x, z) - log q(z | x) are not.
    """
    for make in (linear.ignorant, linear.marginals):
        found = run_sbc(make, device)
        assert found.tests.p_value > FALSE_ALARM
        assert found.joint is not None
        assert found.joint.p_value < 1e-20
        assert found.p_value == 2 * found.joint.p_value
        single, joint = found.findings()[:2]
        assert (single.name, single.verdict) == ("SBC p-value", "good")
        assert (joint.name, joint.verdict) == ("joint SBC p-value", "bad")
    assert "how dimensions depend on each other" in str(run_sbc(linear.marginals, device))


def test_joint_ranks_by_hand(device: torch.device) -> None:
    """log p - log q of a guide that is too wide, by the normal distribution's density."""
    toy = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 0.5)
    pair = linear.pair(toy, linear.scaled(2.0))
    with prepared(pair, data(device, 1), {}) as evaluation:
        drawn = draw_jointly("sbc", evaluation, 60, site=None, arguments=None, scored=True)
        ((_, draws),) = drawn.of_guide(7)
    assert drawn.scores is not None
    assert drawn.score is not None
    assert drawn.score.name == "log p(x, z) - log q(z | x)"
    mean, covariance = toy.posterior(drawn.observed.cpu())
    sd = covariance.sqrt()
    p, q = stats.norm(mean, sd), stats.norm(mean, 2 * sd)
    evidence = toy.log_evidence(drawn.observed.cpu()).numpy()[:, None]
    for z, found in ((drawn.latents, drawn.scores), *((d[:, :1], d[:, 1]) for d in draws)):
        expected = evidence + p.logpdf(z.cpu()) - q.logpdf(z.cpu())
        np.testing.assert_allclose(found.cpu(), expected[:, 0], atol=2e-3)
    result = diagnostics.sbc(pair, data(device, 1), num_simulations=60, num_particles=7)
    assert result.joint_ranks is not None
    less = (draws[:, :, 1] < drawn.scores).sum(0)
    ties = (draws[:, :, 1] == drawn.scores).sum(0)
    assert bool(((less <= result.joint_ranks) & (result.joint_ranks <= less + ties)).all())
    assert int((ties > 0).sum()) < 10


def test_an_exact_guide_of_many_dimensions_has_uniform_joint_ranks(device: torch.device) -> None:
    """Its scores are all but equal: what rounding leaves of them decides nothing."""
    toy = LinearGaussian.random(40, 8)
    pair = linear.pair(toy, linear.exact)
    found = diagnostics.sbc(pair, torch.zeros(3, 40, device=device), **QUICK)
    assert found.joint is not None
    assert found.joint.p_value > FALSE_ALARM


def idle_toy(idle: int) -> LinearGaussian:
    """Two latents with a posterior correlation of -0.95, and some that no data depend on."""
    weight = torch.cat([torch.ones(1, 2), torch.zeros(1, idle)], 1)
    return LinearGaussian(weight, torch.zeros(1), (1 / 0.95 - 1) ** 0.5)


@pytest.mark.parametrize("idle", [0, 4, 20])
def test_tarp_beside_idle_dimensions(idle: int, device: torch.device) -> None:
    """A missed correlation is found whatever else is idle, and so are the idle ones."""
    x, names = data(device, 1), tuple(f"z[{i}]" for i in range(2, 2 + idle))
    missed = linear.pair(idle_toy(idle), linear.marginals)
    found = diagnostics.tarp(missed, x, num_simulations=500)
    assert found.tests.p_value < 1e-8
    assert found.idle == names
    assert (f"without {idle} idle" in str(found)) == (idle > 0)
    exact = diagnostics.tarp(linear.pair(idle_toy(idle), linear.exact), x, num_simulations=500)
    assert exact.tests.p_value > FALSE_ALARM


def test_tarp_keeps_dimensions_that_only_seem_idle(device: torch.device) -> None:
    """q that ignores x where the model doesn't; q off where the model has no use for z."""
    toy, x = idle_toy(2), data(device, 1)

    def off(mean: Tensor, covariance: Tensor) -> Any:
        scale = covariance.diagonal().sqrt() * torch.tensor([1.0, 1.0, 1.0, 0.5])
        return dist.Normal(mean, scale).to_event(1)

    ignorant = diagnostics.tarp(linear.pair(toy, linear.ignorant), x, num_simulations=500)
    assert ignorant.idle == ("z[2]", "z[3]")
    assert ignorant.tests.p_value < 1e-8
    assert diagnostics.tarp(linear.pair(toy, off), x, num_simulations=500).idle == ("z[2]",)


def test_where_log_q_of_a_given_z_is_not_known(device: torch.device) -> None:
    """A guide with an auxiliary site is ranked by log p(x, z): exact, and without correlation."""
    toy, x = linear.correlated(), data(device)

    def guide_of(share: float) -> Any:
        def guide(x: Tensor) -> None:
            mean, covariance = (t.to(x.device) for t in toy.posterior(x.cpu()))
            half = torch.linalg.cholesky(covariance * share)
            with pyro.plate("data", len(x)):
                fn = dist.MultivariateNormal(x.new_zeros(2), scale_tril=half)
                first = pyro.sample("first", fn.expand((len(x),)), infer={"is_auxiliary": True})
                rest = covariance - covariance * share
                pyro.sample("z", dist.MultivariateNormal(mean + first, rest))

        return guide

    model, _ = linear.pair(toy, linear.exact)
    found = diagnostics.sbc((model, guide_of(0.5)), x, **QUICK)
    assert found.quantity == "log p(x, z)"
    assert found.p_value > FALSE_ALARM


def test_tarp_sees_the_joint(device: torch.device) -> None:
    exact = run_tarp(linear.exact, device)
    assert exact.tests.p_value > FALSE_ALARM
    assert exact.findings()[0].verdict == "good"
    for make in (linear.marginals, linear.ignorant, linear.scaled(0.7), linear.shifted(0.7)):
        found = run_tarp(make, device)
        assert found.tests.p_value < 1e-5
        assert found.findings()[0].verdict == "bad"
    assert "q is too narrow" in str(run_tarp(linear.scaled(0.7), device))
    assert "q is too wide" in str(run_tarp(linear.scaled(1.5), device))


def test_tarp_with_references_from_the_prior(device: torch.device) -> None:
    """The exact guide passes, a narrow one doesn't; the prior passes, as is said."""
    options = {"reference": "prior"}
    assert run_tarp(linear.exact, device, **options).tests.p_value > FALSE_ALARM
    assert run_tarp(linear.scaled(0.5), device, **options).tests.p_value < 1e-5
    assert run_tarp(linear.ignorant, device, **options).tests.p_value > FALSE_ALARM


def test_tarps_coverage_in_one_dimension_is_known(device: torch.device) -> None:
    """Ranks of distances, by hand from the same draws: a guide that ignores x and its reference."""
    toy = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 0.5)
    model, guide = linear.pair(toy, linear.exact)
    found = diagnostics.tarp((model, guide), data(device, 1), num_simulations=60, num_particles=7)
    with prepared((model, guide), data(device, 1), {}) as evaluation:
        first, second = (
            draw_jointly("tarp", evaluation, 60, site=None, arguments=None) for _ in range(2)
        )
        list(second.of_guide(8))  # the scale is from these
        ((_, draws),) = first.of_guide(7)
    expected = []
    for i in range(60):
        gaps = (second.observed[:, 0] - first.observed[i, 0]).abs()
        near = second.latents[gaps.argmin(), 0]
        away = (draws[:, i, 0] - near).abs()
        expected.append(int((away < (first.latents[i, 0] - near).abs()).sum()))
    assert found.ranks.tolist() == expected
    torch.testing.assert_close(found.coverage[0].item(), np.mean(np.array(expected) < 1))


@pytest.mark.slow
@pytest.mark.parametrize("idle", [0, 4])
def test_false_alarms_are_as_rare_as_stated(idle: int, device: torch.device) -> None:
    """Of 200 exact guides, "look" or worse at most 5%, "bad" at most 0.1%, for SBC and TARP.

    More than 25 of Binomial(200, 0.05), or 6 of Binomial(200, 0.001), happen less than once in
    1e5. And no test is idle: the uncorrected p-values of chi-squared are uniform, as far as a test
    of Kolmogorov and Smirnov of 200 of them can tell; seeds are fixed.
    """
    pair, x = linear.pair(idle_toy(idle), linear.exact), data(device, 1)
    alarms: dict[str, list[float]] = {"sbc": [], "joint": [], "tarp": []}
    plain: dict[str, list[float]] = {name: [] for name in alarms}
    for seed in range(200):
        options: Any = {"num_simulations": 200, "num_particles": 9, "seed": seed}
        sbc, tarp = diagnostics.sbc(pair, x, **options), diagnostics.tarp(pair, x, **options)
        assert sbc.joint is not None
        for name, tests in (("sbc", sbc.tests), ("joint", sbc.joint), ("tarp", tarp.tests)):
            alarms[name].append(tests.p_value)
            plain[name].append(float(tests.chi2_p[0]))
    assert stats.binom.sf(25, 200, 0.05) < 1e-5
    assert stats.binom.sf(6, 200, 0.001) < 1e-5
    for name, p_values in alarms.items():
        assert (np.array(p_values) < 0.05).sum() <= 25
        assert (np.array(p_values) < 0.001).sum() <= 6
        assert stats.kstest(plain[name], "uniform").pvalue > FALSE_ALARM


# --- any pair -------------------------------------------------------------------------------------


class Context(nn.Module):
    """p(z | y) = N(m_y, 1), p(x | z) = N(z, 1); the label comes with the data."""

    means = (-2.0, 0.0, 3.0)

    def prior(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_tensor(self.means)[y]

    def forward(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.prior(x, y), x.new_tensor(1.0)))
            pyro.sample("x", dist.Normal(z, x.new_tensor(1.0)), obs=x)


class ContextGuide(Context):
    def forward(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = (self.prior(x, y) + x) / 2
            pyro.sample("z", dist.Normal(mean, x.new_tensor(0.5**0.5)))


def test_context_comes_from_the_data(device: torch.device) -> None:
    """Exact given the label. The same guide with another's labels isn't."""
    y = torch.tensor([0, 0, 1, 2], device=device)
    batch = (torch.zeros(4, device=device), y)
    found = diagnostics.sbc((Context(), ContextGuide()), batch, **QUICK)
    assert found.tests.p_value > FALSE_ALARM
    guide = ContextGuide()
    guide.means = (0.0, 0.0, 0.0)
    assert diagnostics.sbc((Context(), guide), batch, **QUICK).tests.p_value < 1e-6


def test_discrete_latents_are_ranked_by_chance(device: torch.device) -> None:
    """A Bernoulli latent with its exact posterior passes; one with wrong odds doesn't."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(2 * z, x.new_tensor(1.0)), obs=x)

    def guide_of(bias: float) -> Any:
        def guide(x: Tensor) -> None:
            logits = math.log(0.3 / 0.7) + 2 * x - 2 + bias
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=logits))

        return guide

    x = torch.zeros(4, device=device)
    assert diagnostics.sbc((model, guide_of(0.0)), x, **QUICK).tests.p_value > FALSE_ALARM
    assert diagnostics.sbc((model, guide_of(2.0)), x, **QUICK).tests.p_value < 1e-6
    assert diagnostics.tarp((model, guide_of(0.0)), x, **QUICK).tests.p_value > FALSE_ALARM


def test_missing_entries_stay_missing(device: torch.device) -> None:
    """What is masked in x keeps the data's value, so that the guide sees what it sees in use."""

    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), x.new_tensor(1.0)))
            loc = z.unsqueeze(-1).expand(*z.shape, 2)
            fn = dist.Normal(loc, x.new_tensor(1.0)).mask(keep).to_event(1)
            pyro.sample("x", fn, obs=x)

    def guide(x: Tensor, keep: Tensor) -> None:
        precision = 1 + keep.sum(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x * keep).sum(1) / precision, precision**-0.5))

    keep = torch.tensor([[True, False], [True, True], [False, False]], device=device)
    batch = (torch.full((3, 2), -99.0, device=device), keep)
    with prepared((model, guide), batch, {"max_rows": 64}) as evaluation:
        joint = draw_jointly("sbc", evaluation, 100, site=None, arguments=None)
    x, seen = joint.evaluation.source.rows(torch.arange(100, device=device))
    assert bool((x[~seen] == -99).all())
    assert bool((x[seen] != -99).all())
    assert diagnostics.sbc((model, guide), batch, **QUICK).tests.p_value > FALSE_ALARM


def test_an_argument_that_is_reshaped_or_changed(device: torch.device) -> None:
    model, guide = linear.pair(linear.correlated(), linear.exact)
    flat = data(device) + torch.arange(3.0, device=device)
    images = flat.reshape(4, 3, 1)

    def changed(program: Any, change: Any) -> Any:
        return lambda x: program(change(x))

    def flatten(x: Tensor) -> Tensor:
        return x.flatten(1)

    found = diagnostics.sbc((changed(model, flatten), changed(guide, flatten)), images, **QUICK)
    assert found.tests.p_value > FALSE_ALARM
    torch.testing.assert_close(found.ranks, diagnostics.sbc((model, guide), flat, **QUICK).ranks)

    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    pair = (changed(model, doubled), changed(guide, doubled))
    with pytest.raises(UndefinedError, match=r"arguments=\{'x': 0\}"):
        diagnostics.sbc(pair, flat)
    with pytest.raises(UndefinedError, match="or changes it first"):
        diagnostics.sbc(pair, flat, arguments={"x": 0})
    with pytest.raises(ArgumentError, match=r"places from 0 to 0, of 'x'; got 3 for 'x'"):
        diagnostics.sbc(pair, flat, arguments={"x": 3})
    named = diagnostics.sbc((model, guide), flat, arguments={"x": 0}, **QUICK)
    torch.testing.assert_close(named.ranks, found.ranks)


def test_a_model_that_reads_its_data_is_refused(device: torch.device) -> None:
    """p(z) that depends on the first entry of x, which is simulated from z."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, 0], x.new_tensor(1.0)))
            fn = dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), x.new_tensor(1.0)).to_event(1)
            pyro.sample("x", fn, obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], x.new_tensor(1.0)))

    with pytest.raises(UndefinedError, match="reads x besides observing it"):
        diagnostics.sbc((model, guide), torch.ones(4, 2, device=device))


def test_a_plate_within_the_data_plate(device: torch.device) -> None:
    """Three latents a datum in a plate of their own, with exact posteriors, and a wrong one."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), x.new_tensor(1.0)))
            pyro.sample("x", dist.Normal(z, x.new_tensor([0.5, 1.0, 2.0])), obs=x)

    def guide_of(order: list[int]) -> Any:
        def guide(x: Tensor) -> None:
            precision = 1 + x.new_tensor([4.0, 1.0, 0.25])[order]
            mean = x * (1 - 1 / precision)
            with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 3, dim=-1):
                pyro.sample("z", dist.Normal(mean, precision**-0.5))

        return guide

    x = torch.randn(5, 3, device=device)
    found = diagnostics.sbc((model, guide_of([0, 1, 2])), x, **QUICK)
    assert found.names == ("z[0]", "z[1]", "z[2]")
    assert found.tests.p_value > FALSE_ALARM
    wrong = diagnostics.sbc((model, guide_of([0, 1, 0])), x, **QUICK)
    assert (wrong.tests.p_values < 1e-3).tolist() == [False, False, True]


@pytest.mark.float32
def test_single_precision(device: torch.device) -> None:
    """Ranks of float32 draws; the model's dtype is the data's."""
    found = run_sbc(linear.exact, device)
    assert found.tests.p_value > FALSE_ALARM
    assert found.coverage.dtype == torch.float64


def test_one_latent_of_two(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    found = diagnostics.sbc((model, guide), batch, site="z2", num_simulations=100, num_particles=19)
    assert found.names == ("z2[0]",)


def test_refusals(device: torch.device) -> None:
    model, guide = linear.pair(linear.correlated(), linear.exact)

    def point(mean: Tensor, covariance: Tensor) -> Any:
        return dist.Delta(mean).to_event(1)

    x = data(device)
    for tool in (diagnostics.sbc, diagnostics.tarp):
        with pytest.raises(UndefinedError, match="point mass"):
            tool(linear.pair(linear.correlated(), point), x)
        with pytest.raises(ArgumentError, match="num_simulations"):
            tool((model, guide), x, num_simulations=5)
        with pytest.raises(ArgumentError, match="num_particles"):
            tool((model, guide), x, num_particles=0)
        with pytest.raises(UndefinedError, match="there are: 'z'"):
            tool((model, guide), x, site="w")
    with pytest.raises(ArgumentError, match="levels"):
        diagnostics.sbc((model, guide), x, levels=(1.5,))
    with pytest.raises(ArgumentError, match="reference"):
        diagnostics.tarp((model, guide), x, reference="somewhere")  # type: ignore[arg-type]


def test_the_callers_generators_stay(device: torch.device) -> None:
    before = torch.get_rng_state()
    first = run_sbc(linear.exact, device, num_simulations=50)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.ranks, run_sbc(linear.exact, device, num_simulations=50).ranks)
    other = run_sbc(linear.exact, device, num_simulations=50, seed=1)
    assert not torch.equal(first.ranks, other.ranks)


def test_arviz_takes_the_result(device: torch.device) -> None:
    """ArviZ's picture of its own band, in the group that it expects."""
    found = run_sbc(linear.exact, device, num_simulations=100)
    unit = found.pit()
    assert unit.shape == (100, 2)
    assert torch.equal((unit * 40).long(), found.ranks.cpu())
    tree = arviz_base.from_dict({"prior_sbc": {"z": unit[None].numpy()}})
    with mpl.rc_context({"backend": "agg"}):
        drawn = plot_ecdf_pit(tree, backend="none")
    assert drawn is not None
