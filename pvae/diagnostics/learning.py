"""Whether a training has ended: its learning curve, with the curve's own noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from scipy.stats import binom
from scipy.stats import t as student
from torch import Tensor

from pvae.annotations import strict
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import CURVE, FALL, HIDDEN, Verdict
from pvae.errors import UndefinedError, check_number

__all__ = ["LearningCurve", "Record", "learning_curve"]

FEWEST = 8
"""Epochs below which a curve isn't judged."""

_NAMES = ("elbo", "unnormalised_elbo", "log_joint")

Record: TypeAlias = Mapping[str, float | None]
"""The numbers of one epoch, by name."""


@dataclass(frozen=True, repr=False)
class LearningCurve(Result):
    """The last part of a learning curve as a line with noise around it.

    Attributes:
        name: The history's column.
        values: It, shape ``(E,)``, in nats.
        window: Epochs at the end to which the line is fitted, W.
        slope: Slope of the line, in nats an epoch.
        se_slope: Its standard error, widened for what neighbouring epochs have in common.
        correlation: Correlation of the noise of neighbouring epochs, 0 where it is negative.
        p_rise: How often noise alone rises as much, at most.
        noise: Standard deviation of an epoch's value around the curve.
        drop: How far the last epochs are below the best ones, in nats; at most 0 if they aren't.
        se_drop: Its standard error.
        p_drop: How often noise alone does as much, at most.
        alpha: Level of both tests, each one-sided.
        generalisation: Training value less validation value over the window, and its standard
            error over epochs, not over data; None without validation data.
    """

    name: str
    values: Tensor
    window: int
    slope: float
    se_slope: float
    correlation: float
    p_rise: float
    noise: float
    drop: float
    se_drop: float
    p_drop: float
    alpha: float
    generalisation: tuple[float, float] | None

    @property
    def state(self) -> Literal["rising", "plateau", "falling"]:
        """What the tests say: falling first, as a curve that has fallen may be flat since."""
        if self.p_drop < self.alpha:
            return "falling"
        return "rising" if self.p_rise < self.alpha else "plateau"

    @property
    def is_unfinished(self) -> bool:
        """Whether the curve rises, and by enough to go on."""
        return self.state == "rising" and CURVE.verdict(self.slope * self.window) != "good"

    @property
    def is_open(self) -> bool:
        """Whether noise could hide a rise that would be worth going on for."""
        gain, error = self.slope * self.window, self.se_slope * self.window
        return self.state == "plateau" and not gain + 2 * error < HIDDEN

    @property
    def title(self) -> str:
        """How many epochs there are, and how noisy they are."""
        return f"{self.name} of {len(self.values)} epochs, noise {self.noise:.2g} nats"

    def findings(self) -> list[Finding]:
        """What is to be gained by going on, and what validation data say."""
        gain, error, advice = self.slope * self.window, self.se_slope * self.window, ""
        verdict: Verdict = "good"
        if self.state == "falling":
            gain, error = -self.drop, self.se_drop
            verdict = FALL.verdict(self.drop / self.se_drop if self.se_drop > 0 else math.inf)
            meaning = f"{self.name} has fallen by so much since it was best"
            advice = "patience=..., which keeps the best epoch; or a smaller network"
        elif self.is_unfinished:
            meaning = f"{self.name} still rises; so much in the last {self.window} epochs"
            verdict, advice = "look", MORE_EPOCHS
        elif self.state == "rising":
            meaning = f"{self.name} still rises, but hardly"
        elif self.is_open:
            meaning = "no trend above the noise, which could hide one"
            verdict, advice = "look", f"{MORE_EPOCHS}; or more validation data"
        else:
            meaning = f"{self.name} has levelled off"
        lines = [Finding("learning curve", gain, error, "nats", verdict, meaning, advice)]
        if self.generalisation is not None:
            meaning = "what training data have above validation data"
            lines.append(Finding("train - valid", *self.generalisation, "nats", meaning=meaning))
        return lines


MORE_EPOCHS = "train on: fit.refine(epochs), or pvae train --resume --epochs N"


@strict
def learning_curve(history: Sequence[Record], *, alpha: float = 1e-3) -> LearningCurve:
    r"""Whether more epochs would help, or fewer would have.

    The slope is that of a line through the last quarter of the curve, W epochs, at least 8. The
    curve is rising if its slope is above 0 by Student's t, or if more of the last W steps (at least
    12, or all there are) go up than fair coins would; where noise is independent, or a random walk,
    the latter are no more often heads. If all go up, that is as rare as independent noise is in
    order. It has fallen if the mean of its last W / 2 epochs is below the best such
    mean, or that of its last 1, 2, 4, ... below the W epochs before them, or if as many steps go
    down. The number of comparisons is allowed for.

    Noise is what a parabola leaves, and neighbouring epochs have some in common. Its correlation r
    is the median over stretches of W epochs, each with its own parabola taken out, and with what
    that takes out of noise given back: W (1 - r) / (1 + r) epochs count as independent, in errors
    and in degrees of freedom. The noise that is shown is from second differences,
    :math:`\sqrt{\overline{(v_{e-1} - 2 v_e + v_{e+1})^2} / 6}`, which a smooth curve hardly enters.

    Arguments:
        history: One row an epoch, as `Fit.history` is; its validation value is judged, or else
            its training value, where no penalty and no weight on the rate counts.
        alpha: How often a flat curve is called rising, and how often falling; of few epochs up to
            ten times as often, where their noise has a correlation of 0.9.

    Raises:
        UndefinedError: With fewer than 8 epochs, no such column, or late values not finite.

    Example:
        >>> history = [{"elbo": -100 + 0.5 * e} for e in range(60)]
        >>> learning_curve(history).state
        'rising'
    """
    check_number("alpha", alpha, above=0, below=0.5)
    name, values, window = _judged(history)
    parabola = _Parabola(window)
    common = parabola.correlation(values.flip(0).unfold(0, window, window).numpy())
    slope, se_slope = parabola.slope(values[-window:].numpy(), common)
    freedom = max(window * (1 - common) / (1 + common) - 3, 0.5)
    second = values[:-2] - 2 * values[1:-1] + values[2:]
    steps = values[-max(window, 13) :].diff()
    ups, downs = _as_many(steps > 0), _as_many(steps < 0)
    several = _falls(values, parabola, common)
    falls = [(3 * n * _p_value(fall, error, freedom), -fall, error) for fall, error, n in several]
    p_drop, fall, se_drop = min(falls, key=lambda row: row[:2])
    return LearningCurve(
        name=name,
        values=values,
        window=window,
        slope=slope,
        se_slope=se_slope,
        correlation=common,
        p_rise=min(1.0, 2 * min(_p_value(slope, se_slope, freedom), ups)),
        noise=float((second[-2 * window :].square().mean() / 6).sqrt()),
        drop=-fall,
        se_drop=se_drop,
        p_drop=min(1.0, p_drop, 3 * downs if fall < 0 else 1.0),
        alpha=alpha,
        generalisation=_generalisation(history, name, window),
    )


def _judged(history: Sequence[Record]) -> tuple[str, Tensor, int]:
    """The column that is judged, its values, and W."""
    columns = [f"valid_{name}" for name in _NAMES] + list(_NAMES)
    name = next((c for c in columns if any(row.get(c) is not None for row in history)), "")
    column = [math.nan if (v := row.get(name)) is None else v for row in history]
    given = torch.tensor(column, dtype=torch.float64)
    values = given[given.isfinite()]
    if len(values) < FEWEST:
        expected = f"at least {FEWEST} epochs with a bound"
        raise UndefinedError("learning curve", expected, f"{len(values)}")
    window = max(8, len(values) // 4)
    if not bool(given[-window:].isfinite().all()):
        expected = "a bound that is finite in the last epochs"
        raise UndefinedError("learning curve", expected, "one that isn't")
    return name, values, window


class _Parabola:
    """What a parabola leaves of W values, and on average of noise with a correlation r."""

    def __init__(self, window: int) -> None:
        self.place = np.arange(window) - (window - 1) / 2
        basis, _ = np.linalg.qr(np.vander(self.place, 3))
        self.rest = np.eye(window) - basis @ basis.T
        self.lags = abs(np.subtract.outer(self.place, self.place))
        self.grid = np.linspace(0, 0.98, 25)
        left = [self.rest @ r**self.lags @ self.rest for r in self.grid]
        self.squares = np.array([np.trace(noise) for noise in left])
        self.ratios = np.array([np.trace(noise, 1) for noise in left]) / self.squares

    def correlation(self, stretches: np.ndarray) -> float:
        """r, the median over stretches ``(S, W)``; 0 where it would be negative."""
        rest = stretches @ self.rest
        ratios = (rest[:, 1:] * rest[:, :-1]).sum(1) / np.maximum((rest**2).sum(1), 1e-300)
        return float(np.interp(np.median(ratios), self.ratios, self.grid))

    def sd(self, values: np.ndarray, common: float) -> float:
        """Of the noise."""
        squares = np.interp(common, self.grid, self.squares)
        return float(np.linalg.norm(self.rest @ values) / math.sqrt(squares))

    def slope(self, values: np.ndarray, common: float) -> tuple[float, float]:
        """By least squares, and its standard error."""
        along = self.place / (self.place @ self.place)
        spread = math.sqrt(along @ common**self.lags @ along)
        return float(along @ values), self.sd(values, common) * spread


def _falls(
    values: Tensor, parabola: _Parabola, common: float
) -> Iterator[tuple[float, float, int]]:
    """Falls at the end, their errors, and how many comparisons each is one of."""
    window = len(parabola.place)
    half, widening = window // 2, math.sqrt((1 + common) / (1 - common))
    means = values.unfold(0, half, 1).mean(1)
    sd = parabola.sd(values[-window:].numpy(), common) * widening
    stretches = max(1, len(values) // half - 1)
    yield float(means[:-1].max() - means[-1]), sd * math.sqrt(2 / half), stretches
    lasts = [2**i for i in range(half.bit_length()) if 2**i < half]
    lasts = [last for last in lasts if window + last <= len(values)]
    for last in lasts:  # the noise of the epochs before: a crash is no part of its own error
        before, after = values[-window - last : -last], values[-last:]
        sd = parabola.sd(before.numpy(), common) * widening
        yield float(before.mean() - after.mean()), sd * math.sqrt(1 / last + 1 / window), len(lasts)


def _as_many(steps: Tensor) -> float:
    """How often fair coins have as many heads; of heads alone, how often noise is in order."""
    if bool(steps.all()):
        return 1 / math.factorial(len(steps) + 1)
    return float(binom.sf(int(steps.sum()) - 1, len(steps), 0.5))


def _p_value(value: float, error: float, freedom: float) -> float:
    """One-sided."""
    return float(student.sf(value / max(error, 1e-300), freedom))


def _generalisation(
    history: Sequence[Record], name: str, window: int
) -> tuple[float, float] | None:
    own = name.removeprefix("valid_")
    pairs = [(row.get(own), row.get(name)) for row in list(history)[-window:]]
    apart = [a - b for a, b in pairs if a is not None and b is not None]
    if own == name or len(apart) < 2:
        return None
    each = torch.tensor(apart, dtype=torch.float64)
    return float(each.mean()), float(each.std()) / math.sqrt(len(each))
