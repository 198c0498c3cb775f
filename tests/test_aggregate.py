"""The aggregated posterior against the prior, where both are known.

Exact guides are given p-values of at least 1e-5 for a false alarm; all seeds are fixed.
"""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

import pvae
from pvae import diagnostics, plots
from pvae.data import LinearGaussian
from pvae.errors import ArgumentError, UndefinedError
from pvae.pair import Pair
from tests import linear


def run(make: linear.Make, device: torch.device, n: int = 400, **options: Any) -> Any:
    toy = linear.correlated()
    model, guide = linear.pair(toy, make)
    return diagnostics.aggregated_posterior((model, guide), toy.sample(n).to(device), **options)


def test_of_the_exact_guide_it_is_the_prior(device: torch.device) -> None:
    found = run(linear.exact, device)
    assert found.joint.p_value > 1e-3  # no lower than that by chance but in 1e-3; the seed is fixed
    assert float(found.ks_p.min()) > 1e-5
    assert {f.verdict for f in found.findings()} == {"good", "none"}


def test_what_makes_it_another(device: torch.device) -> None:
    """Shifts are seen in dimensions; a correlation that the prior lacks only in all together."""
    away = run(linear.shifted(3.0), device)
    assert float(away.ks_p.max()) < 1e-5
    assert away.joint.p_value <= 1e-3
    assert {f.verdict for f in away.findings()[:2]} == {"look", "bad"}

    def tied(mean: Tensor, covariance: Tensor) -> Any:
        together = torch.tensor([[1.0, 0.9], [0.9, 1.0]], device=mean.device)
        return dist.MultivariateNormal(torch.zeros_like(mean), together)

    joint = run(tied, device)
    assert float(joint.ks_p.min()) > 1e-5
    assert joint.joint.p_value <= 1e-3
    assert float(joint.correlation[0, 1]) == pytest.approx(0.9, abs=0.05)  # 4.5 errors: 0.043


def test_distances_are_scipys(device: torch.device) -> None:
    found = run(linear.exact, device, 150)
    for d in range(2):
        pair = (found.draws[:, d].cpu().numpy(), found.prior[:, d].cpu().numpy())
        expected = stats.ks_2samp(*pair)
        assert float(found.ks[d]) == pytest.approx(expected.statistic)
        assert float(found.ks_p[d]) == pytest.approx(min(1, 2 * expected.pvalue))
    torch.testing.assert_close(found.correlation.cpu(), torch.corrcoef(found.draws.T.cpu()))


def test_correlations_of_means_and_of_draws(device: torch.device) -> None:
    """Of draws: 0, as of the prior. Of means: of the covariance I - S, in closed form."""
    found = run(linear.exact, device, 700, num_permutations=9)
    _, covariance = linear.correlated().posterior(torch.zeros(1, 3))
    of_means = torch.eye(2) - covariance
    expected = float(of_means[0, 1] / (of_means[0, 0] * of_means[1, 1]).sqrt())
    error = (1 - expected**2) / math.sqrt(700)
    assert found.mean_correlation is not None
    assert abs(float(found.mean_correlation[0, 1]) - expected) < 4.5 * error
    assert abs(float(found.correlation[0, 1])) < 4.5 / math.sqrt(700)
    assert abs(expected) > 0.5


def test_a_constant_code_correlates_with_nothing(device: torch.device) -> None:
    def point(mean: Tensor, covariance: Tensor) -> Any:
        return dist.Delta(torch.stack([mean[:, 0], torch.full_like(mean[:, 0], 0.3)], 1)).to_event(
            1
        )

    found = run(point, device)
    assert found.correlation.isnan().tolist() == [[False, True], [True, True]]
    assert "q(z_d) from p(z_d)" in str(found)


def test_labelled_priors_are_drawn_with_the_datas_labels(device: torch.device) -> None:
    """A prior per label: its mixture, with the data's labels, is what q(z) is compared with."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(3.0 * y, x.new_tensor(1.0)))
            pyro.sample("x", dist.Normal(z, x.new_tensor(1.0)), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((3.0 * y + x) / 2, x.new_tensor(0.5**0.5)))

    y = (torch.arange(600, device=device) % 4 == 0).double()
    x = 3 * y + math.sqrt(2) * torch.randn(600, device=device)
    found = diagnostics.aggregated_posterior((model, guide), (x, y))
    assert found.joint.p_value > 1e-3
    assert float(found.ks_p.min()) > 1e-5
    assert float(found.prior.mean()) == pytest.approx(0.75, abs=0.4)


@pytest.mark.slow
def test_false_alarms(device: torch.device) -> None:
    """Of 120 exact guides, as stated: more than 18 of Binomial(120, 0.05), or 4 of (120, 0.001),
    happen less than once in 1e5. And the tests aren't idle: p-values below one half are common.
    """
    toy = LinearGaussian.random(4, 2, 0.5)
    pair = Pair(*linear.pair(toy, linear.exact))
    joint, single = [], []
    for seed in range(120):
        found = diagnostics.aggregated_posterior(pair, toy.sample(40, seed).to(device), seed=seed)
        joint.append(found.joint.p_value)
        single.append(float(found.ks_p.min()))
    for p_values in (np.array(joint), np.array(single)):
        assert (p_values <= 0.05).sum() <= 18
        assert (p_values <= 0.001).sum() <= 4
        assert (p_values < 0.5).sum() > 15


def test_refusals(device: torch.device) -> None:
    ae = pvae.recipes.ae(6, 2).to(device)
    x = torch.rand(10, 6, device=device).round()
    with pytest.raises(UndefinedError, match="improper prior"):
        diagnostics.aggregated_posterior(ae, x)
    vae = pvae.recipes.vae(6, 2).to(device)
    with pytest.raises(ArgumentError, match="num_rows"):
        diagnostics.aggregated_posterior(vae, x, num_rows=1)
    with pytest.raises(ArgumentError, match="rows of data"):
        diagnostics.aggregated_posterior(vae, x[:1])
    before = torch.get_rng_state()
    first = diagnostics.aggregated_posterior(vae, x)
    again = diagnostics.aggregated_posterior(vae, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.draws, again.draws)


def test_its_picture(device: torch.device) -> None:
    found = run(linear.shifted(3.0), device, 60, num_permutations=9)
    figure = plots.aggregated_posterior(found)
    figure.savefig(BytesIO(), format="png")
    first, second, matrix = figure.axes[:3]
    assert first.get_title().startswith(found.names[int(found.ks.argmax())])
    assert second.get_title() != first.get_title()
    np.testing.assert_allclose(np.asarray(matrix.images[0].get_array()), found.correlation.cpu())


def test_the_picture_of_ranks(device: torch.device) -> None:
    model, guide = linear.pair(linear.correlated(), linear.scaled(0.6))
    options: Any = {"num_simulations": 100, "num_particles": 19}
    for tool in (diagnostics.sbc, diagnostics.tarp):
        found = tool((model, guide), torch.zeros(2, 3, device=device), **options)
        figure = plots.calibration(found)
        figure.savefig(BytesIO(), format="png")
        lines = figure.axes[0].lines
        assert len(lines) == len(found.names)
        worst = int(np.argsort(found.tests.p_values.numpy(), kind="stable")[0])
        expected = (found.tests.ecdf[:, worst] - found.tests.points).numpy()
        np.testing.assert_allclose(np.asarray(lines[0].get_ydata(), dtype=float), expected)
        assert found.names[worst] in str(lines[0].get_label())
