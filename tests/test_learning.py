"""Learning curves: what is flat is called flat, and what isn't is found."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom
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


@pytest.mark.parametrize(
    ("epochs", "common", "level"),
    [
        (8, 0.0, 0.01),
        (10, 0.0, 0.01),
        (12, 0.0, 0.01),
        (40, 0.0, 0.01),
        (200, 0.0, 0.01),
        (40, 0.6, 0.04),
        (100, 0.6, 0.02),
        (100, 0.9, 0.03),
        (8, 0.9, 0.1),
        (10, 0.9, 0.1),
        (12, 0.9, 0.1),
        (40, 0.9, 0.1),
    ],
)
def test_a_flat_curve_is_called_otherwise_as_often_as_alpha_says(
    epochs: int, common: float, level: float
) -> None:
    """At alpha 0.01 the rates are below these levels; a count above its bound happens once in 1e6.

    With correlated noise the levels are above alpha, as the docstring says.
    """
    states = [
        learning_curve(rows(-90 + 0.3 * noise(epochs, seed, common)), alpha=0.01).state
        for seed in range(300)
    ]
    bound = binom.isf(1e-6, 300, level)
    for wrong in ("rising", "falling"):
        assert states.count(wrong) <= bound


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_crash_in_the_last_epochs_has_fallen(last: int) -> None:
    values = -90 + 0.3 * noise(40, 5)
    values[-last:] -= 5
    found = learning_curve(rows(values))
    assert found.state == "falling"
    assert abs(found.drop - 5) < 1.5
    (line,) = found.findings()
    assert line.value == -found.drop
    assert line.verdict == "bad"
    assert learning_curve(rows(-90 - (values + 90))).state != "falling"


@pytest.mark.parametrize("epochs", [8, 10, 15, 40, 100])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1])
def test_a_curve_that_bends_is_no_noise(epochs: int, scale: float) -> None:
    """What a line leaves of it goes together, too: 20 nats in 8 epochs were called no trend."""
    bend = -100 * (-torch.arange(epochs) / (epochs / 3)).exp()
    up = bend + scale * noise(epochs, 6)
    assert learning_curve(rows(up)).state == "rising"
    assert learning_curve(rows(-up)).state == "falling"


def test_a_rise_that_is_hardly_one_is_no_reason_to_go_on() -> None:
    """As at the end of a schedule, where every epoch is better by next to nothing."""
    found = learning_curve(rows(-90 - 1e-4 * (-torch.arange(40) / 20).exp()))
    assert found.state == "rising"
    assert not found.is_unfinished
    (line,) = found.findings()
    assert (line.verdict, line.advice) == ("good", "")


def test_noise_that_could_hide_a_trend_is_not_called_flat() -> None:
    loud, quiet = (learning_curve(rows(scale * noise(30, 7))) for scale in (20.0, 0.1))
    assert loud.state == quiet.state == "plateau"
    assert [found.findings()[0].verdict for found in (loud, quiet)] == ["look", "good"]
    assert "could hide" in str(loud)


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
    fit = pvae.fit(vae, x, epochs=12, lr=1e-2, progress=False)
    found = fit.diagnose(checks=["elbo"])
    assert [line.name for line in found.findings()] == [
        "ELBO",
        "distortion",
        "rate",
        "learning curve",
        "training time",
    ]
    assert "-- the training" in str(found)
    short = pvae.diagnose(vae, x, checks=["elbo"], history=fit.history[:3])
    assert "at least 8 epochs" in short.undefined["learning"]


def test_refusals() -> None:
    with pytest.raises(UndefinedError, match="at least 8 epochs with a bound; got 3"):
        learning_curve(rows(torch.zeros(3)))
    with pytest.raises(UndefinedError, match="got 0"):
        learning_curve([{"loss": 1.0}] * 20)
    with pytest.raises(UndefinedError, match="finite in the last epochs"):
        learning_curve([*rows(torch.zeros(30)), {"elbo": float("nan")}])
    with pytest.raises(ArgumentError, match="alpha"):
        learning_curve(rows(torch.zeros(30)), alpha=0.7)
