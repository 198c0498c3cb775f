"""Whether a training has ended: its learning curve, with the curve's own noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
        noise: Standard deviation of an epoch's value around the curve.
        drop: By how much the best stretch of W / 2 epochs was above the last one, in nats.
        se_drop: Its standard error.
        alpha: Level of both tests, each one-sided.
        generalisation: Training value less validation value over the window, and its standard
            error over epochs, not over data; None without validation data.
    """

    name: str
    values: Tensor
    window: int
    slope: float
    se_slope: float
    noise: float
    drop: float
    se_drop: float
    alpha: float
    generalisation: tuple[float, float] | None

    @property
    def state(self) -> Literal["rising", "plateau", "falling"]:
        """What the tests say: falling first, as a curve that has fallen may be flat since."""
        threshold = float(student.isf(self.alpha, self.window - 2))
        beyond = float(student.isf(self.alpha / self._stretches, self.window - 2))
        if self.drop > beyond * self.se_drop:
            return "falling"
        return "rising" if self.slope > threshold * self.se_slope else "plateau"

    @property
    def _stretches(self) -> int:
        """How many stretches the best one is chosen from, as independent ones."""
        return max(1, len(self.values) // max(1, self.window // 2) - 1)

    def findings(self) -> list[Finding]:
        """What is to be gained by going on, and what validation data say."""
        verdicts: dict[str, tuple[Verdict, str, str]] = {
            "plateau": ("good", "has levelled off: no trend above its noise", ""),
            "rising": ("look", "still rises; so much in as many epochs again", ".refine(epochs)"),
            "falling": (
                "bad" if self.drop > CLEARLY * self.se_drop else "look",
                f"has fallen by {self.drop:.3g} nats since its best",
                "patience=..., which keeps the best epoch; or a smaller network",
            ),
        }
        verdict, meaning, advice = verdicts[self.state]
        gain, error = self.slope * self.window, self.se_slope * self.window
        lines = [Finding("learning curve", gain, error, "nats", verdict, meaning, advice)]
        if self.generalisation is not None:
            meaning = "what training data have above validation data"
            lines.append(Finding("train - valid", *self.generalisation, "nats", meaning=meaning))
        return lines

    def __str__(self) -> str:
        head = f"{self.name} of {len(self.values)} epochs, noise {self.noise:.2g} nats"
        return "\n".join([head, *map(str, self.findings())])

    __repr__ = __str__


def learning_curve(history: Sequence[Mapping[str, Any]], *, alpha: float = 1e-3) -> LearningCurve:
    r"""Whether more epochs would help, or fewer would have.

    A line is fitted to the last quarter of the curve, at least 8 epochs. Standard errors are those
    of least squares times :math:`\sqrt{(1 + r) / (1 - r)}`, with r the correlation of neighbouring
    residuals, if that is above 0. The curve is rising if the slope is above 0 at
    level alpha, by Student's t. It has fallen if the mean of its last W / 2 epochs is below the
    best such mean, by a test at alpha over the number of stretches. The noise is from second
    differences, :math:`\sqrt{\overline{(v_{e-1} - 2 v_e + v_{e+1})^2} / 6}`, which a smooth curve
    hardly enters.

    Arguments:
        history: One row an epoch, as `Fit.history` is; its validation value is judged, or else
            its training value, where no penalty and no weight on the rate counts.
        alpha: How often a curve that is flat, with independent noise, is called rising, and how
            often falling. Where neighbours go together by a correlation of 0.6, it is ten to forty
            times as often, and more beyond: short windows can't tell what they have in common.

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
    slope, se_slope, spread = _line(values[-window:])
    second = values[:-2] - 2 * values[1:-1] + values[2:]
    noise = float((second[-2 * window :].square().mean() / 6).sqrt())
    half = window // 2
    means = values.unfold(0, half, 1).mean(1)
    drop = float(means[:-1].max() - means[-1])
    return LearningCurve(
        name,
        values,
        window,
        slope,
        se_slope,
        noise,
        drop,
        spread * math.sqrt(2 / half),
        alpha,
        _generalisation(history, name, window),
    )


def _line(values: Tensor) -> tuple[float, float, float]:
    """Slope by least squares, its standard error, and the standard deviation of what is left.

    Both are widened for what neighbours have in common, whose estimate is low by about
    (1 + 3 r) / n (Kendall, 1954).
    """
    count = len(values)
    place = torch.arange(count, dtype=values.dtype) - (count - 1) / 2
    slope = float((place * values).sum() / place.square().sum())
    rest = values - values.mean() - slope * place
    common = float((rest[1:] * rest[:-1]).sum() / rest.square().sum().clamp(min=1e-300))
    common = min(max(common + (1 + 3 * common) / count, 0.0), 0.95)
    spread = math.sqrt(float(rest.square().sum()) / (count - 2) * (1 + common) / (1 - common))
    return slope, spread / math.sqrt(float(place.square().sum())), spread


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
