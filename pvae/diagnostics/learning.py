"""Whether a training has ended: its learning curve, with the curve's own noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.stats import t as student
from torch import Tensor

from pvae.diagnostics.finding import Finding, Verdict
from pvae.errors import ArgumentError, UndefinedError, check_number

__all__ = ["LearningCurve", "learning_curve"]

FEWEST = 12
"""Epochs below which a curve isn't judged."""

CLEARLY = 10
"""Standard errors from which a fall is bad, and not only worth a look."""

_NAMES = ("elbo", "unnormalised_elbo", "log_joint")


@dataclass(frozen=True)
class LearningCurve:
    """The last part of a learning curve as a line with noise around it.

    Attributes:
        name: The history's column.
        values: It, shape ``(E,)``, in nats.
        window: Epochs at the end to which the line is fitted, W.
        slope: Of the line, in nats an epoch.
        se_slope: Its standard error, widened for what neighbouring epochs have in common.
        correlation: Of the noise of neighbouring epochs, 0 where it is negative.
        freedom: Degrees of freedom of both errors.
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
    freedom: float
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
        p_slope = _p_value(self.slope, self.se_slope, self.freedom)
        return "rising" if p_slope < self.alpha else "plateau"

    def findings(self) -> list[Finding]:
        """What is to be gained by going on, and what validation data say."""
        verdicts: dict[str, tuple[Verdict, str, str]] = {
            "plateau": ("good", "has levelled off: no trend above its noise", ""),
            "rising": ("look", "still rises; so much in as many epochs again", ".refine(epochs)"),
            "falling": (
                "bad" if self.drop > CLEARLY * self.se_drop else "look",
                "has fallen by so much since it was best",
                "patience=..., which keeps the best epoch; or a smaller network",
            ),
        }
        verdict, meaning, advice = verdicts[self.state]
        gain, error = self.slope * self.window, self.se_slope * self.window
        if self.state == "falling":
            gain, error = -self.drop, self.se_drop
        lines = [Finding("learning curve", gain, error, "nats", verdict, meaning, advice)]
        if self.generalisation is not None:
            meaning = "what training data have above validation data; error over epochs alone"
            lines.append(Finding("train - valid", *self.generalisation, "nats", meaning=meaning))
        return lines

    def __str__(self) -> str:
        head = f"{self.name} of {len(self.values)} epochs, noise {self.noise:.2g} nats"
        return "\n".join([head, *map(str, self.findings())])

    __repr__ = __str__


def learning_curve(history: Sequence[Mapping[str, Any]], *, alpha: float = 1e-3) -> LearningCurve:
    r"""Whether more epochs would help, or fewer would have.

    A line is fitted to the last quarter of the curve, W epochs, at least 8. The curve is rising if
    its slope is above 0 at level alpha, by Student's t. It has fallen if, at the same level, the
    mean of its last W / 2 epochs is below the best such mean, or that of its last 1, 2, 4, ...
    below the W epochs before them; the number of comparisons is allowed for.

    Neighbouring epochs have noise in common. Its correlation r is the median over stretches of W
    epochs, each with its own line taken out: W (1 - r) / (1 + r) epochs count as independent, in
    errors and in degrees of freedom. The noise is from second differences,
    :math:`\sqrt{\overline{(v_{e-1} - 2 v_e + v_{e+1})^2} / 6}`, which a smooth curve hardly enters.

    Arguments:
        history: One row an epoch, as `Fit.history` is; its validation value is judged, or else
            its training value, where no penalty and no weight on the rate counts.
        alpha: How often a flat curve is called rising, and how often falling. Few epochs can't tell
            what they have in common: with a correlation of 0.9, at alpha 0.01, a curve of 12 epochs
            is called falling 6 times in 100, one of 40 3 times, one of 100 or more 1 to 2 times.

    Raises:
        UndefinedError: With fewer than 12 epochs, no such column, or late values not finite.

    Example:
        >>> history = [{"elbo": -100 + 0.5 * e} for e in range(60)]
        >>> learning_curve(history).state
        'rising'
    """
    if check_number("alpha", alpha, above=0) >= 0.5:
        raise ArgumentError("alpha", "a level below 0.5", f"{alpha:g}")
    columns = [f"valid_{name}" for name in _NAMES] + list(_NAMES)
    name = next((c for c in columns if any(row.get(c) is not None for row in history)), None)
    found = [] if name is None else [row.get(name) for row in history]
    values = torch.tensor([v for v in found if v is not None], dtype=torch.float64)
    values = values[values.isfinite()]
    if name is None or len(values) < FEWEST:
        raise UndefinedError(
            "learning curve", f"at least {FEWEST} epochs with a bound", f"{len(values)}"
        )
    window = max(8, len(values) // 4)
    if any(v is None or not math.isfinite(v) for v in found[-window:]):
        raise UndefinedError(
            "learning curve", "a bound that is finite in the last epochs", "one that isn't"
        )
    stretches = values.flip(0).unfold(0, window, window).flip(0, 1)
    lines = [_line(stretch) for stretch in stretches]
    slope, spread, _ = lines[-1]
    common = min(max(statistics.median(r for _, _, r in lines), 0.0), 0.97)
    widening = (1 + common) / (1 - common)
    freedom = max(window / widening - 2, 0.5)
    widened = math.sqrt(widening)
    p_drop, drop, se_drop = min(
        (
            (min(1.0, count * _p_value(fall, widened * error, freedom)), fall, widened * error)
            for fall, error, count in _falls(values, window)
        ),
        key=lambda found: (found[0], -found[1]),
    )
    second = values[:-2] - 2 * values[1:-1] + values[2:]
    return LearningCurve(
        name=name,
        values=values,
        window=window,
        slope=slope,
        se_slope=widened * spread / math.sqrt(window * (window**2 - 1) / 12),
        correlation=common,
        freedom=freedom,
        noise=float((second[-2 * window :].square().mean() / 6).sqrt()),
        drop=drop,
        se_drop=se_drop,
        p_drop=p_drop,
        alpha=alpha,
        generalisation=_generalisation(history, name, window),
    )


def _line(values: Tensor) -> tuple[float, float, float]:
    """Slope by least squares, standard deviation of what is left, and its neighbours' correlation.

    What is left of n independent values has a correlation of -2 / n, and of others one that is low
    by (2 + 4 r) / n (Kendall, 1954, with a line for his mean).
    """
    count = len(values)
    place = torch.arange(count, dtype=values.dtype) - (count - 1) / 2
    slope = float((place * values).sum() / place.square().sum())
    rest = values - values.mean() - slope * place
    squares = float(rest.square().sum())
    common = float((rest[1:] * rest[:-1]).sum()) / max(squares, 1e-300)
    return slope, math.sqrt(squares / (count - 2)), (common * count + 2) / (count - 4)


def _falls(values: Tensor, window: int) -> Iterator[tuple[float, float, int]]:
    """Falls at the end, errors with independent noise, and how many comparisons each is one of."""
    half = window // 2
    means = values.unfold(0, half, 1).mean(1)
    _, spread, _ = _line(values[-window:])
    stretches = max(1, len(values) // half - 1)
    yield float(means[:-1].max() - means[-1]), spread * math.sqrt(2 / half), 2 * stretches
    lasts = [2**i for i in range(half.bit_length()) if 2**i < half]
    for last in lasts:  # the noise of the epochs before: a crash is no part of its own error
        before, after = values[-window - last : -last], values[-last:]
        _, spread, _ = _line(before)
        error = spread * math.sqrt(1 / last + 1 / window)
        yield float(before.mean() - after.mean()), error, 2 * len(lasts)


def _p_value(value: float, error: float, freedom: float) -> float:
    """One-sided."""
    return float(student.sf(value / max(error, 1e-300), freedom))


def _generalisation(
    history: Sequence[Mapping[str, Any]], name: str, window: int
) -> tuple[float, float] | None:
    if not name.startswith("valid_"):
        return None
    own = name.removeprefix("valid_")
    pairs = [(row.get(own), row.get(name)) for row in list(history)[-window:]]
    apart = [a - b for a, b in pairs if a is not None and b is not None]
    if len(apart) < 2:
        return None
    each = torch.tensor(apart, dtype=torch.float64)
    return float(each.mean()), float(each.std()) / math.sqrt(len(each))
