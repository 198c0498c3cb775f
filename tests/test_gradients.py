"""Means and variances of gradients against quadrature, and estimators that are known to differ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvae
from pvae import objectives as o
from pvae import recipes
from pvae.diagnostics import compare_objectives, gradient_noise
from pvae.errors import ArgumentError
from tests import gaussian, pairs

pytestmark = pytest.mark.usefixtures("store")
REPEATS = 2000


def by_quadrature(
    model: gaussian.GaussianModel, guide: gaussian.GaussianGuide, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance over one draw of the gradient of -log w, by parameter a, c, log t, w."""
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    parameters = [guide.a, guide.c, guide.log_t, model.w]
    rows = []
    for noise in points:
        z = guide.a * x + guide.c + guide.log_t.exp() * float(noise)
        loss = -gaussian.log_weights(model, guide, x, z[None]).mean()
        rows.append(torch.stack(torch.autograd.grad(loss, parameters)))
    each, mass = (
        torch.stack(rows).double(),
        torch.as_tensor(weights / weights.sum(), device=x.device)[:, None],
    )
    mean = (mass * each).sum(0)
    return mean, (mass * (each - mean).square()).sum(0)


def test_moments_are_those_of_quadrature(device: torch.device) -> None:
    """Within 5 standard errors of 2,000 draws: eight false alarms in 1.7e6 (two-sided) at most."""
    model, guide = gaussian.pair(device)
    x = torch.tensor([0.8], device=device)
    found = gradient_noise((model, guide), x, num_repeats=REPEATS)
    mean, variance = by_quadrature(model, guide, x)
    names = {"a": 0, "c": 1, "log_t": 2, "w": 3}
    assert len(found.parameters) == 4
    for name, moments in found.parameters.items():
        i = names[name.rpartition(".")[2]]
        error = math.sqrt(float(variance[i]) / REPEATS)
        assert abs(float(moments.mean) - float(mean[i])) < 5 * error
        assert moments.total_variance == pytest.approx(float(variance[i]), rel=0.35)
        ratio = abs(float(moments.mean)) / moments.total_variance**0.5
        assert moments.snr == pytest.approx(ratio)
    assert found.sides["model"].total_variance == pytest.approx(float(variance[3]), rel=0.35)
    assert set(found.sites) == {"z (guide)", "x (model)"}
    assert found.sites["z (guide)"].total_variance == pytest.approx(
        found.sides["guide"].total_variance
    )


def test_sticking_the_landing_has_no_noise_at_the_posterior(device: torch.device) -> None:
    model = gaussian.GaussianModel().to(device)
    guide = gaussian.exact_guide(model).to(device)
    x = torch.linspace(-1, 1, 5, device=device)
    found = compare_objectives(
        (model, guide), x, {"ELBO": o.ELBO(), "STL": o.STL(), "IWAE-5": o.IWAE(5)}, num_repeats=50
    )
    assert list(found) == ["ELBO", "STL", "IWAE-5"]
    assert found["STL"].sides["guide"].total_variance < 1e-20
    assert found["ELBO"].sides["guide"].total_variance > 1e-3
    assert found["ELBO"].step_ratio == 1.0
    assert found["IWAE-5"].step_ratio > 0
    lines = {line.name: line for line in found.findings()}
    assert list(lines)[:3] == ["ELBO, guide", "STL, guide", "IWAE-5, guide"]
    assert lines["ELBO, model"].value == found["ELBO"].sides["model"].total_variance
    assert lines["ELBO, guide"].meaning.endswith("; 1.00x the time")
    assert "50 gradients of each" in found.title
    assert list(found.to_frame()["name"]) == list(lines)


def test_without_signal_the_ratio_is_its_floor(device: torch.device) -> None:
    """At the posterior the guide's expected gradient is 0: the SNR is that of noise alone."""
    model = gaussian.GaussianModel().to(device)
    guide = gaussian.exact_guide(model).to(device)
    found = [
        gradient_noise((model, guide), torch.ones(3, device=device), num_repeats=100, seed=seed)
        for seed in range(30)
    ]
    ratios = torch.tensor([f.sides["guide"].snr for f in found])
    floor = found[0].sides["guide"].floor
    assert abs(float(ratios.mean()) - floor) < 5 * float(ratios.std()) / 30**0.5
    assert floor == pytest.approx(0.0798, abs=1e-3)


def test_sites_of_a_hierarchy_have_their_own_parameters(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    found = gradient_noise((model, guide), batch, num_repeats=5)
    assert set(found.sites) == {"z1 (guide)", "z2 (guide)", "z1 (model)", "x (model)"}
    sizes = {name: len(m.mean) for name, m in found.sites.items()}
    assert sizes["z1 (guide)"] == sum(p.numel() for p in guide.first.parameters())
    assert sizes["z2 (guide)"] == sum(p.numel() for p in guide.second.parameters())


def test_the_error_of_the_variance_is_the_spread_of_repeated_estimates(
    device: torch.device,
) -> None:
    """The spread of 40 estimates is known to 11 %: 5 of those. As if entries were independent,
    which they aren't, as they share z, the error was less than half of it."""
    vae = recipes.vae(6, 2, hidden=(8,)).to(device)
    x = torch.rand(5, 6, device=device).round()
    found = [gradient_noise(vae, x, num_repeats=50, seed=seed) for seed in range(40)]
    for where in ("guide", "model"):
        moments = [f.sides[where] for f in found]
        spread = float(torch.tensor([m.total_variance for m in moments]).std())
        errors = torch.tensor([m.se_total_variance for m in moments])
        assert float(errors.square().mean().sqrt()) == pytest.approx(spread, rel=0.55)
        independent = math.sqrt(2 / 49) * float(moments[0].variance.norm())
        assert independent < 0.45 * spread


def test_score_functions_are_noisier_than_paths_and_unbiased(device: torch.device) -> None:
    """The gradient of the guide's shift, with and without a path through z, by quadrature."""
    model, guide = gaussian.pair(device)
    x = torch.tensor([0.8], device=device)

    class Pathless(dist.Normal):
        has_rsample = False

    def pathless(x: Tensor) -> None:
        pyro.module("guide", guide)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Pathless(guide.a * x + guide.c, guide.log_t.exp()))

    path = gradient_noise((model, guide), x, num_repeats=REPEATS)
    score = gradient_noise((model, pathless), x, num_repeats=REPEATS)
    (of_path,) = (m for name, m in path.parameters.items() if name.endswith("c"))
    (of_score,) = (m for name, m in score.parameters.items() if name.endswith("c"))
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    with torch.no_grad():
        z = guide.a * x + guide.c + guide.log_t.exp() * torch.as_tensor(points, device=device)
        loss = -gaussian.log_weights(model, guide, x, z[:, None]).double().flatten()
        each = loss * torch.as_tensor(points, device=device) / guide.log_t.exp()
    mass = torch.as_tensor(weights / weights.sum(), device=device)
    mean = float((mass * each).sum())
    variance = float((mass * (each - mean).square()).sum())
    assert mean == pytest.approx(float(by_quadrature(model, guide, x)[0][1]), abs=1e-6)
    assert abs(float(of_score.mean) - mean) < 5 * math.sqrt(variance / REPEATS)
    assert abs(of_score.total_variance - variance) < 5 * of_score.se_total_variance
    assert of_score.total_variance > 1.5 * of_path.total_variance


def test_a_gradient_without_noise_is_called_so(device: torch.device) -> None:
    """A point mass has no draws; what only a constant enters has gradient 0."""
    autoencoder = recipes.ae(6, 2, hidden=(4,)).to(device)
    x = torch.rand(8, 6, device=device).round()
    found = gradient_noise(autoencoder, x, num_repeats=4)
    assert found.sides["guide"].snr == math.inf
    assert "no noise" in str(found)
    zeros = gradient_noise(autoencoder, x, Nothing(), num_repeats=4)
    assert math.isnan(zeros.sides["model"].snr)
    assert "the gradient is 0" in str(zeros)


class Nothing(o.ELBO):
    """An objective that is 0."""

    def surrogate(self, terms: Any, state: Any) -> Tensor:
        return 0 * super().surrogate(terms, state)


def test_nothing_is_left_changed(device: torch.device) -> None:
    torch.manual_seed(0)
    vae = recipes.vae(6, 2, hidden=(8,)).to(device).eval()
    x = torch.rand(12, 6, device=device).round()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    state = torch.get_rng_state()
    found = pvae.diagnostics.gradient_noise(vae, x, num_repeats=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not vae.training
    assert all(p.grad is None for p in vae.parameters())
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())
    assert str(found) == str(gradient_noise(vae, x, num_repeats=3))
    assert [line.name for line in found.findings()][:2] == [
        "gradient SNR, guide",
        "gradient SNR, model",
    ]


def test_refusals(device: torch.device) -> None:
    model, guide = gaussian.pair(device)
    x = torch.ones(3, device=device)
    with pytest.raises(ArgumentError, match="num_repeats"):
        gradient_noise((model, guide), x, num_repeats=1)
    with pytest.raises(ArgumentError, match=r"one of pvae\.objectives; got RenyiELBO"):
        gradient_noise((model, guide), x, pyro.infer.RenyiELBO())
    with pytest.raises(ArgumentError, match="at least one, by name; got none"):
        compare_objectives((model, guide), x, {})
    several: Any = [o.ELBO()]
    with pytest.raises(ArgumentError, match="by name; got list"):
        compare_objectives((model, guide), x, several)
