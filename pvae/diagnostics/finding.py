"""What a diagnostic found, in one line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Verdict"]

Verdict = Literal["good", "look", "bad", "none"]
"""``"look"`` is worth a look, ``"none"`` a number by which nothing is judged."""

_MARKS: dict[Verdict, str] = {"good": "+", "look": "?", "bad": "!", "none": " "}


@dataclass(frozen=True)
class Finding:
    """One number of a diagnostic, what it means, and what to do about it.

    Attributes:
        name: What it is, in the field's words.
        value: The number.
        error: Its standard error; None where it has none, or isn't known.
        unit: Of value and error, such as ``"nats"``; empty for none.
        verdict: Whether it is as it should be.
        meaning: What the number says, in a clause.
        advice: What to do next; empty where nothing is to be done.

    Example:
        >>> print(Finding("k-hat above 0.7", 0.31, 0.02, "", "bad", "q is too narrow", "widen it"))
        ! k-hat above 0.7     0.310 +- 0.020       q is too narrow
              next: widen it
    """

    name: str
    value: float
    error: float | None = None
    unit: str = ""
    verdict: Verdict = "none"
    meaning: str = ""
    advice: str = ""

    @property
    def number(self) -> str:
        """Value, standard error and unit, with the digits that the error leaves."""
        if not math.isfinite(self.value):
            return str(self.value)
        if self.value == 0 and self.name.endswith("p-value"):
            return "< 1e-300"  # below the least double
        has_error = self.error is not None and math.isfinite(self.error) and self.error > 0
        if has_error:
            assert self.error is not None  # noqa: S101
            digits = min(6, max(0, 1 - math.floor(math.log10(self.error))))
            value = round(self.value, digits) + 0.0  # no -0
            text = f"{value:.{digits}f} +- {self.error:.{digits}f}"
        else:
            text = f"{self.value:.4g}"
        return f"{text} {self.unit}".rstrip()

    def __str__(self) -> str:
        line = f"{_MARKS[self.verdict]} {self.name:<19} {self.number:<20} {self.meaning}".rstrip()
        return line + (f"\n      next: {self.advice}" if self.advice else "")
