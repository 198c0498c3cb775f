"""A guide that is bad in one way is caught by the diagnostic made for it; the exact one passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from pvae import bounds, diagnostics
from pvae.data import LinearGaussian
from tests import linear

pytestmark = pytest.mark.usefixtures("store")


def toy() -> LinearGaussian:
    """Posteriors with a correlation of -0.97; made in the tests' precision."""
    weight = torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.1, -0.1]])
    return LinearGaussian(weight, torch.zeros(3), 0.15)


def best_mean_field(mean: Tensor, covariance: Tensor) -> Any:
    """The independent Gaussian with the largest ELBO: the precision's diagonal."""
    return dist.Normal(mean, covariance.inverse().diagonal().rsqrt()).to_event(1)


def lazy(mean: Tensor, covariance: Tensor) -> Any:
    """The right family with means that an encoder has not learned: all are pulled to 0."""
    return dist.MultivariateNormal(0.5 * mean, covariance)


def quick_gap(model: Any, guide: Any, x: Tensor, seed: int) -> Any:
    return diagnostics.gap(
        (model, guide), x[:30], num_particles=300, flow=False, progress=False, seed=seed,
        local=bounds.LocalFit(max_steps=400),
    )  # fmt: skip


def of(check: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, guide, x, seed: check((model, guide), x, seed=seed)


BAD: dict[str, tuple[linear.Make, Callable[..., Any], str]] = {
    "too narrow, by weights": (
        linear.scaled(0.4),
        of(diagnostics.importance),
        "k-hat above 0.7",
    ),
    "too narrow, by ranks": (linear.scaled(0.5), of(diagnostics.sbc), "SBC p-value"),
    "shifted": (linear.shifted(1.0), of(diagnostics.sbc), "SBC p-value"),
    "mean-field, by its gap": (best_mean_field, quick_gap, "approximation gap"),
    "mean-field, with exact marginals": (linear.marginals, of(diagnostics.tarp), "TARP p-value"),
    "collapsed": (linear.ignorant, of(diagnostics.surgery), "information"),
    "badly amortised": (lazy, quick_gap, "amortisation gap"),
}
"""By kind: the guide, the diagnostic made for it, and the line that has to say so."""


def verdict(kind: str, make: linear.Make, seed: int, device: torch.device) -> str:
    _, check, name = BAD[kind]
    x = toy().sample(300, seed=seed).to(device)
    found = check(*linear.pair(toy(), make), x, seed)
    return next(str(line.verdict) for line in found.findings() if line.name == name)


@pytest.mark.parametrize("kind", BAD)
def test_the_bad_guide_is_caught_and_the_good_one_passes(kind: str, device: torch.device) -> None:
    """Gaps and weights of the exact guide have no noise; its p-values are above 0.05 19 in 20.

    None is in four data sets once in 160,000.
    """
    assert verdict(kind, BAD[kind][0], 0, device) == "bad"
    assert any(verdict(kind, linear.exact, seed, device) == "good" for seed in range(4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind, (*_, name) in BAD.items() if "p-value" in name])
def test_how_often(kind: str, device: torch.device) -> None:
    """Of 100 data sets: every bad guide is caught, and of good ones as many as the level says.

    A verdict is "bad" below 1e-3 and "look" below 0.05: more than the bounds happen once in 1e5.
    """
    good = [verdict(kind, linear.exact, seed, device) for seed in range(100)]
    assert good.count("bad") <= binom.isf(1e-5, 100, 1e-3)
    assert good.count("look") <= binom.isf(1e-5, 100, 0.05)
    assert "good" not in [verdict(kind, BAD[kind][0], seed, device) for seed in range(10)]
