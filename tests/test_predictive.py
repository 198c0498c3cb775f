"""Predictive checks and calibration, against known predictive distributions."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import Tensor, nn

from pvae import VAE, diagnostics, guides, latent, likelihoods, priors, recipes, simulate
from pvae.data import LinearGaussian, as_source
from pvae.errors import ArgumentError, UndefinedError
from pvae.pair import Pair
from pvae.terms import Evaluation
from tests import pairs
from tests.test_bounds import exact_pair, orthogonal

D, Q = 5, 2
FALSE_ALARM = 1e-5


def counts_are_uniform(p_values: list[float]) -> float:
    """p-value of uniformity of p-values."""
    return float(stats.kstest(p_values, "uniform").pvalue)


def test_p_values_by_hand() -> None:
    """Counted on paper: of ten replicates three are above, two equal, five below."""
    replicated = torch.tensor([3.0, 4.0, 5.0, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    found = diagnostics.Statistic("T", 2.0, replicated)
    assert found.p_value == pytest.approx(0.4)
    assert found.two_sided == 1.0
    assert found.error == pytest.approx(math.sqrt(5 / 12 * 7 / 12 / 10))
    extreme = diagnostics.Statistic("T", 9.0, replicated)
    assert extreme.p_value == 0.0
    assert extreme.two_sided == pytest.approx(2 / 11)
    assert extreme.error > 0
    assert extreme.distance == pytest.approx((9 - 1.9) / float(replicated.std(correction=0)))
    assert not extreme.is_beyond  # not by five spreads
    assert diagnostics.Statistic("T", 12.0, replicated).is_beyond
    assert not found.is_beyond
    assert diagnostics.Statistic("T", 12.0, torch.zeros(50)).is_beyond


def test_replicates_have_the_evidences_moments(device: torch.device) -> None:
    """Mean and covariance of draws of x: b and W W' + s^2 I; 4.5 standard errors at most."""
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(50)
    source = as_source(x, device, torch.float64)
    structure = pair.inspect_source(source)
    parts = [
        run.value("x")
        for _, _, run in simulate.draws(Evaluation(pair, structure, source, 999), 400, "prior")
    ]
    drawn = torch.cat([p.flatten(0, 1) for p in parts]).cpu()
    assert drawn.shape == (400 * 50, D)
    covariance = toy.weight @ toy.weight.T + toy.sigma**2 * torch.eye(D)
    errors = (covariance.diagonal() / len(drawn)).sqrt()
    assert ((drawn.mean(0) - toy.bias).abs() < 4.9 * errors).all()
    squares = torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance.square()
    assert ((drawn.T.cov() - covariance).abs() < 4.9 * (squares / len(drawn)).sqrt()).all()


def test_reconstructions_are_the_exact_ones(device: torch.device) -> None:
    """x_rep given x: mean W m + b, variance W C W' + s^2, with the exact posterior m, C."""
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(7)
    source = as_source(x, device, torch.float64)
    structure = pair.inspect_source(source)
    passes = simulate.draws(Evaluation(pair, structure, source, 7 * 1000), 5000)
    drawn = torch.cat([run.value("x") for _, _, run in passes]).cpu()
    mean, covariance = toy.posterior(x)
    exact = mean @ toy.weight.T + toy.bias
    variance = (toy.weight @ covariance @ toy.weight.T).diagonal() + toy.sigma**2
    assert ((drawn.mean(0) - exact).abs() < 4.9 * (variance / 5000).sqrt()).all()
    assert ((drawn.var(0) / variance - 1).abs() < 4.9 * math.sqrt(2 / 5000)).all()


def test_means_in_place_of_draws(device: torch.device) -> None:
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(7)
    source = as_source(x, device, torch.float64)
    structure = pair.inspect_source(source)
    [(_, _, run)] = simulate.draws(Evaluation(pair, structure, source), 3, mean=True)
    exact = run.value("z").cpu() @ toy.weight.T + toy.bias
    torch.testing.assert_close(run.value("x").cpu(), exact)


STATISTICS = {"mean": lambda x: x.mean(), "sd": lambda x: x.std()}


def test_two_sided_p_values_are_valid_under_the_model(device: torch.device) -> None:
    """Of 150 data sets from the model, P(p <= a) <= a for each a: a false alarm in 1e5."""
    toy = orthogonal()
    pair = exact_pair(toy, device)
    p_values = [
        diagnostics.predictive(pair, toy.sample(10, seed=s), STATISTICS, num_particles=99, seed=s)
        .statistics["sd"]
        .two_sided
        for s in range(150)
    ]
    for level in (0.02, 0.1, 0.3):
        alarms = sum(p <= level for p in p_values)
        assert stats.binom.sf(alarms - 1, 150, level) > FALSE_ALARM
    assert counts_are_uniform(p_values) > FALSE_ALARM
    assert stats.binom.cdf(sum(p <= 0.3 for p in p_values), 150, 0.3) > FALSE_ALARM


def test_far_off_is_seen_with_few_replicates_and_advice_is_said_once(device: torch.device) -> None:
    """With 20 of them no two-sided p-value is below 2 / 21: nothing is bad by so few."""
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(200)
    found = diagnostics.predictive(pair, 5 * x + 9, num_particles=20)
    verdicts = [f.verdict for f in found.findings()]
    assert verdicts.count("look") >= 4
    assert "bad" not in verdicts
    assert str(found).count("next:") == 1
    good = diagnostics.predictive(pair, x, num_particles=20)
    assert {f.verdict for f in good.findings()} == {"good"}


def test_one_draw_is_enough_for_a_uniform_transform(device: torch.device) -> None:
    """The rank among one draw and the datum, randomised, is exactly uniform."""
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(2000)
    found = diagnostics.pit(pair, x, num_particles=1)
    assert found.p_value is not None
    assert found.p_value > FALSE_ALARM
    assert float(found.values.min()) < 0.01
    assert float(found.values.max()) > 0.99


@pytest.mark.parametrize("kind", ["mixed", "prior", "aggregated"])
def test_the_right_model_passes_and_wrong_ones_are_caught(kind: Any, device: torch.device) -> None:
    """Half the noise, and a missing offset, in a data set of 400."""
    toy = orthogonal()
    x = toy.sample(400)
    pair = exact_pair(toy, device)
    good = diagnostics.predictive(pair, x, kind=kind, num_particles=300)
    assert [f.verdict for f in good.findings()] == ["good"] * 5
    narrow = exact_pair(LinearGaussian(toy.weight, toy.bias, toy.sigma / 2), device)
    found = diagnostics.predictive(narrow, x, kind=kind, num_particles=300)
    assert {"look", "bad"} & {f.verdict for f in found.findings()}
    if kind != "aggregated":  # where codes of such data make up for some of it
        assert found.statistics["sd"].p_value < 0.01
    shifted = exact_pair(LinearGaussian(toy.weight, toy.bias + 0.5, toy.sigma), device)
    found = diagnostics.predictive(
        shifted, x, {"mean": torch.mean}, kind="prior", num_particles=2000
    )
    assert found.statistics["mean"].p_value > 0.99
    assert found.findings()[0].verdict == "bad"
    assert found.findings()[0].p_value == pytest.approx(2 / 2001)
    assert "kind='mixed'" in found.findings()[0].advice


def test_a_prior_that_misses_the_codes(device: torch.device) -> None:
    """Data whose codes are spread three times too wide: mixed fails, aggregated passes."""
    toy = orthogonal()
    pair = exact_pair(toy, device)
    z = 3 * torch.randn(400, Q)
    x = z @ toy.weight.T + toy.bias + toy.sigma * torch.randn(400, D)
    mixed = diagnostics.predictive(pair, x, STATISTICS)
    assert mixed.statistics["sd"].two_sided < 0.01
    assert "aggregated" in mixed.findings()[1].advice
    close = diagnostics.predictive(pair, x, STATISTICS, kind="aggregated")
    ratio = close.statistics["sd"].replicated.mean() / close.statistics["sd"].observed
    assert 0.9 < float(ratio) < 1.0  # codes are shrunk by the prior


def test_reconstructions_are_said_to_be_optimistic(device: torch.device) -> None:
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(50)
    found = diagnostics.predictive(pair, x, kind="posterior", num_particles=100)
    assert {f.verdict for f in found.findings()} == {"none"}
    assert "passing says little" in str(found)


def test_statistics_get_data_and_replicates_alike(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(20, D).round()
    seen = []

    def ones(x: Tensor) -> Tensor:
        seen.append((tuple(x.shape), x.dtype, x.device.type, x.unique().tolist()))
        return x.sum()

    for max_rows in (1, 70, 8192):
        seen.clear()
        found = diagnostics.predictive(vae, x, {"ones": ones}, num_particles=9, max_rows=max_rows)
        assert found.statistics["ones"].replicated.shape == (9,)
        assert set(map(repr, seen)) == {repr(((20, D), x.dtype, device.type, [0.0, 1.0]))}
        assert len(seen) == 10


def test_defaults_for_classes_and_numbers(device: torch.device) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros((), dtype=torch.float64), 1.0))
            logits = torch.stack([z, -z, 0 * z], -1)
            pyro.sample("x", dist.Categorical(logits=logits), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            zero = torch.zeros((), device=x.device, dtype=torch.float64)
            pyro.sample("z", dist.Normal(zero, 1.0))

    x = torch.tensor([0, 1, 2, 1] * 10, device=device)
    found = diagnostics.predictive((model, guide), x)
    assert list(found.statistics) == [f"share of class {c}" for c in (0, 1, 2)]
    assert found.statistics["share of class 1"].observed == 0.5
    with pytest.raises(UndefinedError, match="ordered values at site 'x'; got Categorical"):
        diagnostics.pit((model, guide), x)
    assert diagnostics.pit((model, guide), x, statistic=lambda x: x == 1).values.shape == (40,)


@pytest.mark.parametrize("statistic", [lambda x: x, lambda x: x.sum() / 0, lambda x: x.sum(1)])
def test_a_statistic_is_one_finite_number(statistic: Any, device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    with pytest.raises(ArgumentError, match="one finite number for a whole data set"):
        diagnostics.predictive(vae, torch.ones(20, D), {"T": statistic})


def test_pit_by_the_normal_distribution_function(device: torch.device) -> None:
    """u against the exact F(x) = Phi((x - b) / sd): within the noise of S draws."""
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(40)
    found = diagnostics.pit(pair, x, num_particles=2000)
    sd = (toy.weight.square().sum(1) + toy.sigma**2).sqrt()
    exact = torch.distributions.Normal(toy.bias, sd).cdf(x)
    error = (exact * (1 - exact) / 2000).sqrt() + 1 / 2000
    assert ((found.values - exact).abs() < 5.5 * error).all()
    for own, p in zip(found.values.T, found.p_values, strict=True):  # type: ignore[arg-type]
        assert float(p) == pytest.approx(stats.kstest(own.numpy(), "uniform").pvalue)


def test_pit_is_uniform_under_the_model_and_says_what_is_wrong(device: torch.device) -> None:
    """Each p-value is uniform: of five, none is below 1e-5 / 5 but for one time in 1e5."""
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(600)
    good = diagnostics.pit(pair, x, num_particles=50)
    assert good.p_value is not None
    assert good.p_value > FALSE_ALARM
    assert abs(good.mean[0] - 0.5) < 4.5 * good.mean[1]
    assert abs(good.spread[0] - 1) < 4.5 * good.spread[1]
    wrong = {
        "bias": LinearGaussian(toy.weight, toy.bias - 0.7, toy.sigma),
        "narrow": LinearGaussian(toy.weight * 0.6, toy.bias, toy.sigma * 0.6),
        "wide": LinearGaussian(toy.weight * 1.7, toy.bias, toy.sigma * 1.7),
    }
    for word, other in wrong.items():
        off = exact_pair(other, device)
        found = diagnostics.pit(off, x, num_particles=50)
        uniform, mean, spread = found.findings()
        assert uniform.verdict == "bad"
        assert word in uniform.advice
    assert mean.value == found.mean[0]
    assert spread.value < 1


def test_pit_of_counts_is_uniform(device: torch.device) -> None:
    """Discrete values: the randomised transform, on data drawn from the model itself."""
    torch.manual_seed(1)
    vae = VAE(
        priors.StandardNormal(Q),
        likelihoods.Binomial(nn.Linear(Q, D), D, total_count=3),
        guides.MeanField(nn.Linear(D, 2 * Q), Q),
    ).to(device)
    x = latent.sample(vae, torch.zeros(1, D), 1000, seed=3)
    found = diagnostics.pit(vae, x, num_particles=20)
    assert found.p_value is not None
    assert found.p_value > FALSE_ALARM
    decoder = vae.model.likelihood.network
    assert isinstance(decoder, nn.Linear)
    nn.init.constant_(decoder.bias, 1.0)
    off = diagnostics.pit(vae, x, num_particles=20)
    assert off.findings()[0].verdict == "bad"


def test_pit_standard_errors_are_over_data(device: torch.device) -> None:
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(50)
    found = diagnostics.pit(pair, x)
    rows = found.values.mean(1)
    assert found.mean[0] == pytest.approx(float(rows.mean()))
    assert found.mean[1] == pytest.approx(float(rows.std()) / math.sqrt(50))


def test_pit_of_reconstructions_is_not_tested(device: torch.device) -> None:
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(200)
    found = diagnostics.pit(pair, x, kind="posterior")
    assert found.p_values is None
    assert found.p_value is None
    assert found.spread[0] < 0.9  # gathered around 1/2, though the model is right
    assert "decoded from its own code" in str(found)
    others = diagnostics.pit(pair, x, kind="aggregated")
    assert abs(others.spread[0] - 1) < 4.5 * others.spread[1]  # codes of other data
    assert others.p_values is not None


def test_a_statistic_of_each_datum(device: torch.device) -> None:
    """The squared length of x - b in units of the covariance is chi-squared."""
    toy = orthogonal()
    pair, x = exact_pair(toy, device), toy.sample(300)
    precision = torch.linalg.inv(toy.weight @ toy.weight.T + toy.sigma**2 * torch.eye(D))

    def length(x: Tensor) -> Tensor:
        off = x.cpu() - toy.bias
        return ((off @ precision) * off).sum(1)

    found = diagnostics.pit(pair, x, statistic=length, num_particles=1000)
    assert found.values.shape == (300,)
    exact = stats.chi2.cdf(length(x).numpy(), D)
    np.testing.assert_allclose(found.values.numpy(), exact, atol=5.5 * 0.5 / math.sqrt(1000))
    with pytest.raises(ArgumentError, match="finite numbers for each of 300 data"):
        diagnostics.pit(pair, x, statistic=lambda x: x.mean())


def regression(device: torch.device, n: int = 200, slope: float = 2.0) -> Any:
    """y = slope x + noise by Bayesian regression; the guide is the exact posterior's."""
    x = torch.linspace(-1, 1, n).to(device)
    y = slope * x + 0.3 * torch.randn(n).to(device)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 0.3), obs=y)

    precision = (x.square().sum() / 0.3**2 + 0.01).item()
    mean = ((x * y).sum() / 0.3**2).item() / precision

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(x.new_tensor(mean), precision**-0.5))

    return model, guide, (x, y), (mean, precision**-0.5)


def test_global_latents_are_shared_by_all_data_of_a_draw(device: torch.device) -> None:
    """Also where data come in several chunks: x_rep's mean, as a function of x, is one line."""
    model, guide, data, _ = regression(device)
    source = as_source(data, device, torch.float64)
    structure = Pair(model, guide).inspect_source(source)
    for max_rows in (64, 1000, 10_000):
        lines: dict[int, list[Tensor]] = {}
        evaluation = Evaluation(Pair(model, guide), structure, source, max_rows)
        for draws, _, run in simulate.draws(evaluation, 6, mean=True):
            mean = run.value("y")
            for s in range(draws.start, draws.stop):
                lines.setdefault(s, []).append(mean[s - draws.start])
        slopes = []
        for parts in lines.values():
            line = torch.cat(parts) / data[0]
            torch.testing.assert_close(line, line[:1].expand(len(line)))
            slopes.append(float(line[0]))
        assert len(set(slopes)) == len(lines) == 6


def test_regression_is_calibrated_and_a_wrong_one_is_not(device: torch.device) -> None:
    model, guide, (x, y), _ = regression(device)
    for kind in ("mixed", "posterior"):
        found = diagnostics.pit((model, guide), (x, y), kind=kind)
        assert found.p_value is not None
        assert found.p_value > FALSE_ALARM
        check = diagnostics.predictive((model, guide), (x, y), kind=kind)
        assert {f.verdict for f in check.findings()} == {"good"}
    curved = y + 2 * x.square()
    assert diagnostics.pit((model, guide), (x, curved)).findings()[0].verdict == "bad"
    found = diagnostics.pit((model, guide), (x, y), kind="prior")
    assert found.p_values is None
    assert "share a global latent" in str(found)


def test_padding_counts_nowhere(device: torch.device) -> None:
    """Masked rows are as observed in every replicate, and have no transform."""
    model, guide, (x, keep) = pairs.PAIRS["masked"](device)
    x = x.where(keep[:, None], 50.0)
    found = diagnostics.predictive((model, guide), (x, keep), {"max": lambda x: x.max()})
    assert found.statistics["max"].replicated.unique().tolist() == [50.0]
    u = diagnostics.pit((model, guide), (x, keep)).values
    assert torch.equal(u.isnan().all(1), ~keep.cpu())
    assert torch.equal(u.isnan().any(1), ~keep.cpu())
    with pytest.raises(UndefinedError, match="without a mask"):
        diagnostics.pit((model, guide), (x, keep), kind="aggregated")


def test_entries_masked_by_the_distribution(device: torch.device) -> None:
    """``.mask(...)`` under ``.to_event(1)``: missing entries of a datum."""

    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            fn = dist.Normal(z.expand(x.shape), 1.0).mask(seen).to_event(1)
            pyro.sample("x", fn, obs=x)

    def guide(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))

    x, seen = torch.randn(30, D).to(device), (torch.rand(30, D) < 0.7).to(device)

    class Looped(nn.Module):
        """Runs for one particle at a time alone: ``x.shape`` has no particles."""

        def forward(self, x: Tensor, seen: Tensor) -> None:
            model(x, seen)

    with pytest.warns(UserWarning, match="Particles are looped"):
        u = diagnostics.pit((Looped(), guide), (x, seen), num_particles=5).values
    assert torch.equal(u.isnan(), ~seen.cpu())


def test_masked_entries_are_in_no_statistic(device: torch.device) -> None:
    """What stands at masked entries, here values of the model's own latent, isn't compared."""

    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), x.new_tensor(1.0)))
            fn = dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), x.new_tensor(0.1))
            pyro.sample("x", fn.mask(keep).to_event(1), obs=x)

    def guide(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], x.new_tensor(0.1)))

    x = (torch.randn(500, 1) + 0.1 * torch.randn(500, 2)).to(device)
    keep = torch.tensor([True, False], device=device).expand(500, 2)
    found = diagnostics.predictive((model, guide), (x, keep), num_particles=200)
    assert {line.verdict for line in found.findings()} == {"good"}
    statistic = found.statistics["sd of means"]
    assert statistic.observed == pytest.approx(float(x[:, 0].std()))
    assert abs(float(statistic.replicated.mean()) - 1.01**0.5) < 0.02


def test_teacher_forcing_is_drawn_in_turn_or_refused(device: torch.device) -> None:
    """Of x_t = x_{t-1} + z + noise the last has variance T^2 + T; what reads x's mean is refused.

    The mean of 40 replicates' variances of 400 data is within five standard errors.
    """

    def model(x: Tensor, *, own: float = 0.0) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            before = torch.cat([0 * x[:, :1], x[:, :-1]], 1) + own * x.mean(1, keepdim=True)
            pyro.sample("x", dist.Normal(before + z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    x = torch.randn(400, 3).to(device)
    last = {"variance": lambda x: x[:, -1].var()}
    found = diagnostics.predictive((model, guide), x, last, num_particles=40, progress=False)
    replicated = found.statistics["variance"].replicated
    assert abs(float(replicated.mean()) / 12 - 1) < 5 * (2 / 400 / 40) ** 0.5
    for check in (diagnostics.predictive, diagnostics.pit):
        with pytest.raises(UndefinedError, match="teacher forcing"):
            check((functools.partial(model, own=0.1), guide), x)


def test_refusals(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(20, D).round()
    with pytest.raises(ArgumentError, match="kind"):
        diagnostics.predictive(vae, x, kind="nothing")  # type: ignore[arg-type]
    with pytest.raises(UndefinedError, match="observed site inside the data plate"):
        diagnostics.pit(vae, x, site="y")
    with pytest.raises(ArgumentError, match="num_particles"):
        diagnostics.pit(vae, x, num_particles=0)
    ae = recipes.ae(D, Q, hidden=(8,)).to(device)
    with pytest.raises(UndefinedError, match="'z' from the model: expected a prior that is"):
        diagnostics.predictive(ae, x)
    diagnostics.predictive(ae, x, kind="aggregated", num_particles=5)

    def with_factor(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q), 1.0).to_event(1))
            pyro.factor("extra", z.sum(-1))
            pyro.sample(
                "x", dist.Normal(z[..., :1], 1.0).expand([*z.shape[:-1], D]).to_event(1), obs=x
            )

    with pytest.raises(UndefinedError, match="factor 'extra'"):
        diagnostics.predictive((with_factor, vae.guide), x)
    model, guide, batch = pairs.PAIRS["enumerated"](device)
    with pytest.raises(UndefinedError, match="'c', which the model sums out"):
        diagnostics.predictive((model, guide), batch, kind="posterior")


@pytest.mark.usefixtures("store")
def test_an_autoguide_of_a_regression(device: torch.device) -> None:
    """Point masses on unconstrained draws, as Pyro's autoguides have them."""
    model, guide, batch = pairs.PAIRS["autoguide"](device)
    assert isinstance(guide, AutoNormal)
    source = as_source(batch, device, torch.float64)
    structure = Pair(model, guide).inspect_source(source)
    evaluation = Evaluation(Pair(model, guide), structure, source)
    for _, _, run in simulate.draws(evaluation, 5, mean=True):
        expected = (batch[0] * run.value("weight")[:, None]).sum(-1)
        torch.testing.assert_close(run.value("y"), expected)
