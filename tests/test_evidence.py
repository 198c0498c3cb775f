"""Annealing, bidirectional Monte Carlo and the chi bound, against evidences that are known."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import VAE, bounds, guides, likelihoods, priors
from pvae.bounds.hmc import Path, adapt, pilot_length, transition
from pvae.bounds.weights import WeightSums
from pvae.data import LinearGaussian
from pvae.errors import ArgumentError, UndefinedError
from pvae.pair import Pair
from tests import gaussian, pairs

STEPS = 4.5  # standard errors; two-sided, a false alarm in 1.5e5


def linear(toy: LinearGaussian, shift: float, scale: float, device: torch.device) -> VAE:
    """The toy with a guide whose mean is off by ``shift`` and whose scale is ``scale``."""
    weight, bias = toy.weight, toy.bias
    decoder = nn.Linear(weight.shape[1], len(bias))
    decoder.weight.data, decoder.bias.data = weight.clone(), bias.clone()

    class Posterior(nn.Module):
        def forward(self, x: Tensor) -> Any:
            mean = toy.posterior(x.cpu())[0].to(x.device) + shift
            return dist.Normal(mean, torch.full_like(mean, scale)).to_event(1)

    likelihood = likelihoods.Gaussian(decoder, len(bias), sigma=toy.sigma)
    return VAE(priors.StandardNormal(weight.shape[1]), likelihood, Posterior()).to(device)


def poor(device: torch.device) -> tuple[LinearGaussian, VAE, Tensor]:
    toy = LinearGaussian.random(5, 2, sigma=0.7)
    return toy, linear(toy, 0.6, 0.12, device), toy.sample(12)


# --- the sampler


def on_half_line(u: Tensor, above: float = math.nan) -> tuple[Tensor, Tensor]:
    """From N(0, 2^2) to a standard normal that is no number above 1, where chains may not be."""
    start = -0.125 * u.square().sum(-1)
    end = -0.5 * u.square().sum(-1)
    return start, torch.where(u[..., 0] < 1, end, above)


@pytest.mark.parametrize("above", [math.nan, math.inf, -math.inf])
def test_transitions_leave_the_target_as_it_is(above: float) -> None:
    """A truncated normal, N(0, 1) below 1, and a normal, from exact draws, with coarse steps.

    Means of 8000 chains after 10 transitions, to 4.5 standard errors: a false alarm in 1.5e5 each.
    Nearly half the proposals are refused, so that moves without that step would show.
    """
    num = 8000
    uniform = torch.rand(num)
    normal = torch.distributions.Normal(0.0, 1.0)
    below = normal.icdf(uniform * normal.cdf(torch.tensor(1.0)))
    u = torch.stack([below, torch.randn(num)], -1).reshape(num // 4, 4, 2)
    path = Path(lambda u: on_half_line(u, above), num_leapfrog=3)
    state, chances = path.state(u), []
    for _ in range(10):
        state, chance = transition(path, state, 1.0, torch.full((4, 2), 1.1))
        chances.append(float(chance.mean()))
    assert 0.3 < np.mean(chances) < 0.8
    assert bool((state.u[..., 0] < 1).all())
    moved = (state.u - u).abs().mean()
    assert float(moved) > 0.5
    flat = state.u.flatten(0, 1)
    ratio = math.exp(float(normal.log_prob(torch.tensor(1.0)))) / float(
        normal.cdf(torch.tensor(1.0))
    )
    for values, mean, square in ((flat[:, 0], -ratio, 1 - ratio), (flat[:, 1], 0.0, 1.0)):
        for drawn, exact in ((values, mean), (values.square(), square)):
            assert abs(float(drawn.mean()) - exact) < STEPS * float(drawn.std()) / math.sqrt(num)


def test_steps_are_set_for_the_acceptance_datum_by_datum() -> None:
    """Data whose targets differ a hundredfold in scale get steps that differ as much."""
    sizes = torch.tensor([0.1, 1.0, 10.0])

    def ends(u: Tensor) -> tuple[Tensor, Tensor]:
        log_density = -0.5 * (u / sizes.unsqueeze(-1)).square().sum(-1)
        return log_density, log_density

    ticks = []
    path = Path(ends, num_leapfrog=4, tick=lambda: ticks.append(1))
    betas = [0.5] * 30
    state = path.state(torch.randn(8, 3, 4) * sizes.unsqueeze(-1))
    steps = adapt(path, state, betas, torch.ones(3, 4), 0.65)
    assert len(steps) == 30
    assert len(ticks) == pilot_length(30)
    ratio = steps[-1][:, 0] / sizes
    assert float(ratio.max() / ratio.min()) < 2
    chances = []
    for _ in range(40):
        state, chance = transition(path, state, 0.5, steps[-1])
        chances.append(chance.mean(0))
    mean = torch.stack(chances).mean(0)
    assert bool((mean > 0.45).all())
    assert bool((mean < 0.85).all())


def test_a_start_where_the_model_is_no_number_is_refused() -> None:
    path = Path(on_half_line, num_leapfrog=1)
    with pytest.raises(UndefinedError, match="NaN at row 1"):
        path.state(torch.tensor([[[0.0], [2.0]]]))


# --- annealing


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_mean_weight_is_the_evidence(start: Any, device: torch.device) -> None:
    """E[w] = p(x) however few the temperatures and however coarse the transitions.

    4000 chains a datum, to 4.5 standard errors: a false alarm in 1.5e5 for each of 6.
    """
    model = gaussian.GaussianModel().to(device)
    guide = gaussian.GaussianGuide(0.1, 0.5, 0.9).to(device)
    x = torch.tensor([-1.0, 0.3, 2.0], device=device)
    ais = bounds.AIS(start, num_temperatures=3, num_leapfrog=2, acceptance=0.5)
    found = bounds.evidence((model, guide), x, 4000, method="ais", ais=ais, progress=False)
    ratio = (found.values - gaussian.log_evidence(model, x)).detach().exp()
    assert found.ess is not None
    relative_error = (1 / found.ess - 1 / 4000).sqrt()
    assert float(relative_error.max()) < 0.1
    assert bool(((ratio - 1).abs() < STEPS * relative_error).all())


@pytest.mark.parametrize("apart", [0, 20])
def test_mean_weights_there_and_back(
    apart: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E[w / p(x)] = E[p(x) / w'] = 1, with one chain a datum, from the exact draw and from near it.

    Over 3000 simulated data, to 4.5 standard errors: a false alarm in 1.5e5 each.
    """
    monkeypatch.setattr("pvae.bounds.annealing._APART", apart)
    model = gaussian.GaussianModel(0.6).to(device)
    guide = gaussian.GaussianGuide().to(device)
    ais = bounds.AIS("prior", num_temperatures=3, num_leapfrog=1, acceptance=0.98)
    x = torch.zeros(3000, device=device)
    found = bounds.bdmc((model, guide), x, 1, ais=ais, progress=False)
    exact = gaussian.log_evidence(model, found.batch[0]).detach()
    for off in (found.lower.per_datum - exact, exact - found.upper.per_datum):
        ratio = off.exp()
        error = float(ratio.std()) / math.sqrt(3000)
        assert abs(float(ratio.mean()) - 1) < STEPS * error
        assert 0.005 < error < 0.1


def test_with_the_exact_posterior_every_chain_has_the_evidence(device: torch.device) -> None:
    """The ends differ by a number alone, wherever chains go; the same there and back."""
    model = gaussian.GaussianModel().to(device)
    guide = gaussian.exact_guide(model).to(device)
    x = torch.linspace(-2, 3, 3, device=device)
    exact = gaussian.log_evidence(model, x).detach()
    ais = bounds.AIS(num_temperatures=4, num_leapfrog=2)
    for max_rows in (8192, 10, 2):
        found = bounds.evidence(
            (model, guide), x, 5, method="ais", ais=ais, max_rows=max_rows, progress=False
        )
        torch.testing.assert_close(found.values, exact)
        torch.testing.assert_close(found.ess, torch.full_like(exact, 5.0))
        assert found.se_draws == pytest.approx(0.0, abs=1e-6)
    both = bounds.bdmc((model, guide), x, 5, ais=ais, max_rows=10, progress=False)
    exact = gaussian.log_evidence(model, both.batch[0]).detach()
    torch.testing.assert_close(both.lower.per_datum, exact)
    torch.testing.assert_close(both.upper.per_datum, exact)
    assert both.gap.mean == pytest.approx(0.0, abs=1e-9)


@pytest.mark.slow
def test_annealing_where_importance_sampling_is_loose(device: torch.device) -> None:
    """A guide that is shifted by more than two of its own standard deviations, and too narrow."""
    toy, pair, x = poor(device)
    exact = float(toy.log_evidence(x).mean())
    loose = bounds.evidence(pair, x, 1000)
    assert loose.mean < exact - 1.0
    assert "rest on a few draws" in str(loose)
    for start in ("guide", "prior"):
        ais = bounds.AIS(start, num_temperatures=150, num_leapfrog=6)
        found = bounds.evidence(pair, x, 24, method="ais", ais=ais, seed=1)
        assert found.se_draws < 0.05
        assert abs(found.mean - exact) < 0.1
        assert found.acceptance is not None
        assert 0.5 < float(found.acceptance.min()) < float(found.acceptance.max()) < 0.8


@pytest.mark.slow
def test_both_bounds_bracket_the_evidence(device: torch.device) -> None:
    """Linear-Gaussian, poor guide: within 0.1 nats; with few temperatures the gap shows it."""
    toy, pair, x = poor(device)
    x = x.repeat(3, 1)
    ais = bounds.AIS("prior", num_temperatures=150, num_leapfrog=6)
    found = bounds.bdmc(pair, x, 12, ais=ais, progress=False)
    assert found.batch[0].shape == x.shape
    assert not torch.equal(found.batch[0].cpu(), x)
    exact = toy.log_evidence(found.batch[0].cpu())
    lower = found.lower.per_datum.cpu() - exact
    upper = found.upper.per_datum.cpu() - exact
    for off, sign in ((lower, 1), (upper, -1)):
        error = float(off.std()) / math.sqrt(len(off))
        assert sign * float(off.mean()) < STEPS * error
        assert abs(float(off.mean())) < 0.1
    assert found.gap.mean == pytest.approx(float((upper - lower).mean()))
    rough = bounds.AIS("prior", num_temperatures=4, num_leapfrog=6)
    coarse = bounds.bdmc(pair, x, 2, ais=rough, progress=False)
    assert coarse.gap.mean > found.gap.mean + 0.5
    off = coarse.lower.per_datum.cpu() - toy.log_evidence(coarse.batch[0].cpu())
    assert coarse.gap.mean > -float(off.mean())  # it bounds what the lower bound misses


def positive(x: Tensor, model: bool) -> None:
    """z ~ Gamma(2, 1.5), x | z ~ N(z^2, 0.8); q is log-normal, and poor."""
    with pyro.plate("data", len(x)):
        if model:
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), x.new_tensor(1.5)))
            pyro.sample("x", dist.Normal(z**2, x.new_tensor(0.8)), obs=x)
        else:
            pyro.sample("z", dist.LogNormal(x.new_zeros(len(x)), x.new_tensor(0.5)))


def test_a_positive_latent_against_quadrature(device: torch.device) -> None:
    x = torch.tensor([-0.5, 1.0, 6.0], device=device)
    u = torch.linspace(-12, 4, 20001)
    z = u.exp().unsqueeze(-1)
    joint = dist.Gamma(2.0, 1.5).log_prob(z) + dist.Normal(z**2, 0.8).log_prob(x.cpu())
    exact = (joint + u.unsqueeze(-1)).logsumexp(0) + math.log(float(u[1] - u[0]))
    ais = bounds.AIS(num_temperatures=40, num_leapfrog=5)
    found = bounds.evidence(
        (lambda x: positive(x, model=True), lambda x: positive(x, model=False)),
        x,
        2000,
        method="ais",
        ais=ais,
        progress=False,
    )
    off = (found.values.cpu() - exact).abs()
    assert found.ess is not None
    error = (1 / found.ess - 1 / 2000).sqrt().cpu()
    assert bool((error < 0.1).all())
    assert bool((off < STEPS * error + 0.01).all())  # 0.01: the bias of a logarithm


def test_two_sites_against_the_closed_form(device: torch.device) -> None:
    model, guide, (x,) = pairs.two_sites(device, 6)
    first, second = model.decoder, model.middle
    inner = second.weight @ second.weight.T + 0.49 * torch.eye(2, device=device)
    covariance = first.weight @ inner @ first.weight.T + torch.eye(pairs.D, device=device)
    mean = first(second.bias)
    exact = dist.MultivariateNormal(mean, covariance).log_prob(x).detach()
    found = bounds.evidence(
        (model, guide), x, 100, method="ais", ais=bounds.AIS(num_temperatures=50), progress=False
    )
    assert found.se_draws < 0.1
    assert abs(found.mean - float(exact.mean())) < STEPS * found.se_draws + 0.02


def test_annealing_from_the_prior_needs_no_density_of_the_guide(device: torch.device) -> None:
    """A point-mass guide: refused from the guide, and the evidence from the prior."""
    toy = LinearGaussian.random(5, 1)
    pair = linear(toy, 0.0, 1.0, device)
    point = guides.Point(nn.Linear(5, 1), 1).to(device)
    points = VAE(pair.model.prior, pair.model.likelihood, point)
    x = toy.sample(5)
    with pytest.raises(UndefinedError, match="point mass"):
        bounds.evidence(points, x, method="ais")
    ais = bounds.AIS("prior", num_temperatures=60, num_leapfrog=5)
    found = bounds.evidence(points, x, 64, method="ais", ais=ais)
    assert found.kind == "lower"
    exact = float(toy.log_evidence(x).mean())
    assert abs(found.mean - exact) < STEPS * found.se_draws + 0.02


def test_the_callers_state_stays_as_it_was(device: torch.device) -> None:
    _, pair, x = poor(device)
    pair.train()
    ais = bounds.AIS(num_temperatures=3, num_leapfrog=1)
    before = torch.get_rng_state()

    def run(seed: int) -> Tensor:
        return bounds.bdmc(pair, x, 3, ais=ais, seed=seed, progress=False).upper.per_datum

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert pair.model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in pair.parameters())
    assert all(p.requires_grad for p in pair.parameters())


def test_an_interrupt_leaves_everything_as_it_was(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, pair, x = poor(device)
    pair.train()
    before, calls = torch.get_rng_state(), []

    def stop(*_: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return transition(*_)

    monkeypatch.setattr("pvae.bounds.annealing.transition", stop)
    with pytest.raises(KeyboardInterrupt):
        bounds.evidence(pair, x, 2, method="ais", progress=False)
    assert len(calls) == 4
    assert pair.model.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_bar_is_on_stderr_and_comes_late(
    device: torch.device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, pair, x = poor(device)
    ais = bounds.AIS(num_temperatures=3, num_leapfrog=1)
    monkeypatch.setattr(pvae.options, "DELAY", 1000.0)
    bounds.bdmc(pair, x, 3, ais=ais, max_rows=18)
    assert capsys.readouterr().err == ""  # work of less than that
    monkeypatch.setattr(pvae.options, "DELAY", 0.0)
    bounds.bdmc(pair, x, 3, ais=ais, max_rows=18)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "annealing:   0%" in captured.err


# --- weights, and the upper bound


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_sums_of_weights_by_hand(power: float) -> None:
    log_weight = torch.randn(10, 4)
    sums = WeightSums(power)
    for rows in (slice(0, 3), slice(3, 4)):
        for part in (slice(0, 6), slice(6, 10)):
            sums.add(rows, sums.reduce(log_weight[part, rows]))
    structure = Pair(gaussian.GaussianModel(), gaussian.GaussianGuide()).inspect(torch.zeros(4))
    found = sums.estimate("mean", 10, structure)
    powers = log_weight.exp() ** power
    torch.testing.assert_close(found.values, powers.mean(0).log() / power)
    torch.testing.assert_close(found.ess, powers.sum(0) ** 2 / powers.square().sum(0))
    delta = powers.var(0, correction=0) / powers.mean(0) ** 2 / 10
    torch.testing.assert_close(found.variances, delta / power**2)


def test_chi_upper_bound_by_quadrature(device: torch.device) -> None:
    """Against E[w^2] of a guide wide enough for it, and with few draws below it on average."""
    model = gaussian.GaussianModel().to(device)
    guide = gaussian.GaussianGuide(0.3, 0.2, 0.8).to(device)
    x = torch.tensor([-1.0, 0.5, 2.0], device=device)
    exact = torch.stack(
        [
            gaussian.expectation(model, guide, row.unsqueeze(0), lambda w: (2 * w).exp(), 1, 80)
            for row in x
        ]
    ).detach()
    upper = 0.5 * exact.log()
    assert bool((upper > gaussian.log_evidence(model, x)).all())
    found = bounds.evidence((model, guide), x, 50_000, method="cubo")
    assert found.kind == "estimate"
    assert "no bound" in str(found)
    assert found.ess is not None
    error = 0.5 * (1 / found.ess - 1 / 50_000).sqrt()
    assert bool(((found.values - upper).abs() < STEPS * error).all())
    few = bounds.evidence((model, guide), x.repeat(2000), 3, method="cubo")
    assert few.mean < float(upper.mean()) - STEPS * few.se_data


def test_what_a_result_says() -> None:
    _, pair, x = poor(torch.device("cpu"))
    ais = bounds.AIS(num_temperatures=3, num_leapfrog=1)
    found = bounds.evidence(pair, x, 8, method="ais", ais=ais, progress=False)
    lines = str(found).splitlines()
    assert lines[0].startswith("evidence, AIS-3: ")
    assert lines[1] == "  a lower bound of log p(x) on average, of a density"
    assert lines[2].startswith("  ESS: median ")
    assert lines[-1].startswith("  acceptance: mean 0.")
    both = bounds.bdmc(pair, x, 3, ais=ais, progress=False)
    assert "AIS-3, on 12 simulated data, K = 3" in str(both)
    assert both.upper.kind == "upper"
    assert math.isnan(both.upper.se_draws)
    alone = bounds.AIS(num_temperatures=1)  # importance sampling
    found = bounds.evidence(pair, x, 8, method="ais", ais=alone, progress=False)
    assert "acceptance" not in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "posterior"}, "'guide' or 'prior'"),
        ({"schedule": "cosine"}, "'sigmoid' or 'linear'"),
        ({"num_temperatures": 0}, "num_temperatures"),
        ({"num_leapfrog": 0}, "num_leapfrog"),
        ({"num_pilot": 0}, "num_pilot"),
        ({"acceptance": 1.0}, "below 1"),
        ({"acceptance": 0.0}, "above 0"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        bounds.AIS(**options)


def test_schedules_go_from_0_to_1() -> None:
    for schedule in ("linear", "sigmoid"):
        betas = bounds.AIS(num_temperatures=20, schedule=schedule).betas
        assert len(betas) == 21
        assert betas[0] == 0.0
        assert betas[-1] == pytest.approx(1.0)
        assert betas == sorted(betas)
    gaps = np.diff(betas)
    assert gaps[0] < gaps[10] / 3
    assert gaps[0] == pytest.approx(gaps[-1])


def test_bad_arguments_are_refused_before_work() -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    x = torch.zeros(3)
    for options, message in (
        ({"method": "nuts"}, "'importance', 'local', 'ais' or 'cubo'"),
        ({"ais": bounds.AIS()}, "method='ais'"),
        ({"local": bounds.LocalFit()}, "method='local'"),
        ({"family": "planar"}, "'own', 'full_rank' or 'flow'"),
        ({"num_particles": 0}, "num_particles"),
        ({"order": 1.0, "method": "cubo"}, "above 1"),
        ({"max_rows": 0}, "max_rows"),
    ):
        with pytest.raises(ArgumentError, match=message):
            bounds.evidence((never, never), x, **options)
    with pytest.raises(ArgumentError, match="num_particles"):
        bounds.bdmc((never, never), x, 0)


def test_the_upper_bound_of_a_data_set_is_refused(device: torch.device) -> None:
    model, guide, batch = pairs.global_latent(device)
    with pytest.raises(UndefinedError, match="global site"):
        bounds.evidence((model, guide), batch, method="cubo")
    with pytest.raises(UndefinedError, match="global site"):
        bounds.iwae_curve((model, guide), batch, 16)


@pytest.mark.parametrize("method", ["importance", "cubo", "ais"])
def test_a_difference_with_one_seed_has_the_error_of_common_draws(method: Any) -> None:
    """Over 30 seeds its standard deviation is the error that it says, and not that of a sum.

    The ratio of the two is within 5 standard errors of 1; a sum's is several times as large.
    """

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, off: float) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + off, 0.8 + off / 2))

    x, off = torch.linspace(-2.0, 2.0, 6), []
    how = {"ais": bounds.AIS(num_temperatures=2)} if method == "ais" else {}
    said, apart = 0.0, 0.0
    for seed in range(30):
        options: dict[str, Any] = {"method": method, "seed": seed, "progress": False, **how}
        one, two = (
            bounds.evidence((model, functools.partial(guide, off=b)), x, 30, **options)
            for b in (0.1, 0.12)
        )
        difference = one - two
        off.append(difference.mean)
        said += difference.se_draws / 30
        apart += math.hypot(one.se_draws, two.se_draws) / 30
    assert abs(float(torch.tensor(off).std()) / said - 1) < 5 / 60**0.5
    assert apart > 1.5 * said
