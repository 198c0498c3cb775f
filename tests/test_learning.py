"""Learning curves: what is flat is called flat, and what isn't is found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pvae
from pvae import recipes
from pvae.diagnostics import learning_curve
from pvae.errors import ArgumentError, UndefinedError


def rows(values: Tensor, name: str = "elbo") -> list[dict[str, float]]:
    return [{"epoch": e, name: float(v)} for e, v in enumerate(values)]


def noise(epochs: int, seed: int, common: float = 0.0) -> Tensor:
    """Standard normal, with that correlation of neighbours."""
    generator = torch.Generator().manual_seed(seed)
    each = torch.randn(epochs, generator=generator)
    for e in range(1, epochs):
        each[e] = common * each[e - 1] + math.sqrt(1 - common**2) * each[e]
    return each


@pytest.mark.parametrize("epochs", [12, 40, 200])
def test_a_flat_curve_is_called_otherwise_as_often_as_alpha_says(epochs: int) -> None:
    """Of 400 curves at alpha 0.01: more than 20 wrong ones of a kind happen once in 1e7."""
    states = [
        learning_curve(rows(-90 + 0.3 * noise(epochs, seed)), alpha=0.01).state
        for seed in range(400)
    ]
    for wrong in ("rising", "falling"):
        assert states.count(wrong) <= 20


def test_neighbours_that_go_together_are_no_trend() -> None:
    """With a correlation of 0.6, least squares alone calls 60 of 100 falling at alpha 0.01."""
    states = [
        learning_curve(rows(noise(200, seed, common=0.6)), alpha=1e-3).state for seed in range(200)
    ]
    assert states.count("rising") <= 10
    assert states.count("falling") <= 12


def test_what_is_measured() -> None:
    """Slope, noise and drop of curves made with known ones, within 5 standard errors."""
    epoch = torch.arange(400.0)
    found = learning_curve(rows(0.05 * epoch + 0.5 * noise(400, 1)))
    assert found.state == "rising"
    assert found.window == 100
    exact = 0.5 / math.sqrt(100 * (100**2 - 1) / 12)
    assert found.se_slope == pytest.approx(exact, rel=0.35)
    assert abs(found.slope - 0.05) < 5 * exact
    assert found.noise == pytest.approx(0.5, rel=0.2)
    gain, *_ = found.findings()
    assert gain.value == pytest.approx(found.slope * 100)
    assert gain.verdict == "look"
    falling = learning_curve(rows(-0.02 * (epoch - 200).abs() + 0.2 * noise(400, 2)))
    assert falling.state == "falling"
    assert falling.drop == pytest.approx(0.02 * 174, abs=0.5)
    assert falling.findings()[0].verdict == "bad"


def test_a_step_down_that_has_levelled_off_has_fallen() -> None:
    values = torch.cat([torch.zeros(50), -torch.ones(50)]) + 0.1 * noise(100, 3)
    found = learning_curve(rows(values))
    assert found.state == "falling"
    assert abs(found.drop - 1) < 0.3


def test_validation_comes_first() -> None:
    values = torch.linspace(-100, -90, 40)
    history = [a | b for a, b in zip(rows(values), rows(values.flip(0), "valid_elbo"), strict=True)]
    found = learning_curve(history)
    assert (found.name, found.state) == ("valid_elbo", "falling")
    assert found.generalisation is not None
    assert found.generalisation[0] == pytest.approx(float((values - values.flip(0))[-10:].mean()))


def test_in_the_screen(device: torch.device) -> None:
    vae = recipes.vae(6, 2, hidden=(4,)).to(device)
    x = torch.rand(40, 6, device=device).round()
    fit = pvae.fit(vae.model, vae.guide, x, epochs=12, lr=1e-2, progress=False)
    found = fit.diagnose(checks=["elbo"])
    assert [line.name for line in found.findings()] == ["ELBO", "learning curve"]
    assert "-- the training" in str(found)
    short = pvae.diagnose(vae.model, vae.guide, x, checks=["elbo"], history=fit.history[:3])
    assert "at least 12 epochs" in short.undefined["learning"]


def test_refusals() -> None:
    with pytest.raises(UndefinedError, match="at least 12 epochs with a bound; got 3"):
        learning_curve(rows(torch.zeros(3)))
    with pytest.raises(UndefinedError, match="got 0"):
        learning_curve([{"loss": 1.0}] * 20)
    with pytest.raises(UndefinedError, match="finite in the last epochs"):
        learning_curve([*rows(torch.zeros(30)), {"elbo": float("nan")}])
    with pytest.raises(ArgumentError, match="alpha"):
        learning_curve(rows(torch.zeros(30)), alpha=0.7)
