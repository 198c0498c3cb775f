"""What a diagnostic found: lines of number, standard error, verdict, meaning and advice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from pvae.diagnostics.thresholds import P_VALUE, Verdict
from pvae.errors import escaped, shown
from pvae.estimate import Estimate, with_error

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Finding", "Result", "said_once"]

_MARKS: dict[Verdict, str] = {"good": "+", "look": "?", "bad": "!", "none": " "}
_COLOURS: dict[Verdict, str] = {"good": "green", "look": "darkorange", "bad": "crimson"}


IMPOSSIBLE = (
    "mend the site that is named before any other line is read: the prior's support in the guide, "
    "wider draws (a higher temperature, a floor under scales), or double precision"
)
"""What to do about a number that is impossible."""


@dataclass(frozen=True)
class Finding:
    """One number of a diagnostic, what it means, and what to do about it.

    Attributes:
        name: What it is, in the field's words.
        value: The number.
        error: Its standard error; None where it has none, or isn't known.
        unit: Unit of value and error, such as ``"nats"``; empty for none.
        verdict: Whether it is as it should be, by `pvae.diagnostics.thresholds`.
        meaning: What the number says, in a clause.
        advice: What to do next; empty where nothing is to be done.
        p_value: How often the verdict is a false alarm, at most, corrected for all tests of the
            line's result; None where it is no test's.

    Example:
        >>> print(Finding("k-hat above 0.7", 0.31, 0.02, "", "bad", "q is too narrow", "widen it"))
        ! k-hat above 0.7      0.310 +- 0.020         q is too narrow
              next: widen it
    """

    name: str
    value: float
    error: float | None = None
    unit: str = ""
    verdict: Verdict = "none"
    meaning: str = ""
    advice: str = ""
    p_value: float | None = None

    @classmethod
    def of_test(cls, name: str, p_value: float, meaning: str, advice: str) -> Finding:
        """A p-value, judged by how small it is; with advice only where it is.

        Example:
            >>> Finding.of_test("SBC p-value", 0.4, "ranks are uniform", "a richer guide").verdict
            'good'
        """
        verdict = P_VALUE.verdict(p_value)
        advice = "" if verdict == "good" else advice
        return cls(name, p_value, None, "", verdict, meaning, advice, p_value)

    @classmethod
    def of(
        cls,
        estimate: Estimate,
        meaning: str = "",
        verdict: Verdict = "none",
        advice: str = "",
    ) -> Finding:
        """The mean of an estimate, with its error over data, or over draws if it has no other.

        Of a number of the whole data set that is a datum's share, and its unit says so. One that is
        impossible is bad, and says why.

        Example:
            >>> Finding.of(Estimate("rate", torch.tensor([1.0, 2.0, 3.0]))).number
            '2.00 +- 0.58 nats'
        """
        error = estimate.se_draws if math.isnan(estimate.se_data) else estimate.se_data
        known = None if math.isnan(error) else error
        if estimate.kind == "impossible":
            verdict, meaning = "bad", f"impossible: {'; '.join(estimate.reasons)}"
            advice = IMPOSSIBLE
        is_share = estimate.is_whole and estimate.num_data > 1
        unit = f"{estimate.unit} per datum" if is_share else estimate.unit
        return cls(estimate.name, estimate.mean, known, unit, verdict, meaning, advice)

    @property
    def number(self) -> str:
        """Value, standard error and unit, with the digits that the error leaves."""
        if self.value == 0 and self.name.endswith("p-value"):
            return "< 1e-300"  # below the least double
        return with_error(self.value, self.error, self.unit)

    def __str__(self) -> str:
        line = f"{_MARKS[self.verdict]} {self.name:<20} {self.number:<22} {self.meaning}".rstrip()
        return line + (f"\n      next: {self.advice}" if self.advice else "")

    def to_dict(self) -> dict[str, object]:
        """The same, as JSON has it: numbers that aren't finite are None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True, repr=False)
class Result:
    """What a diagnostic found: its numbers as attributes, and what they mean as findings.

    A subclass says what its title and its findings are; text, HTML, dictionary and table follow.
    """

    @property
    def title(self) -> str:
        """The first line: what was looked at, and how much of it; empty for none."""
        return ""

    def findings(self) -> list[Finding]:
        """The lines, in the order in which they are to be read."""
        raise NotImplementedError

    def sections(self) -> list[tuple[str, list[Finding]]]:
        """The same under headings; one without a heading, where there are none."""
        return [("", self.findings())]

    @property
    def missing(self) -> Mapping[str, str]:
        """By name, what isn't defined for the pair, and the reason."""
        return {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What else a reader must know, a line each."""
        return ()

    @property
    def advice(self) -> str:
        """What to do next, all lines together; empty for what their own advice says."""
        return ""

    def __str__(self) -> str:
        lines = [self.title] if self.title else []
        for heading, findings in self.sections():
            lines += [f"-- {heading}"] if heading else []
            lines += map(str, said_once(findings))
        lines += [f"  {note}" for note in self._below]
        return shown("\n".join(lines + [f"next: {self.advice}"] * bool(self.advice)))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        rows = []
        for heading, findings in self.sections():
            rows += [f"<tr><th colspan='4'>{escaped(heading)}</th></tr>"] * bool(heading)
            for line in said_once(findings):
                cells = map(escaped, (line.name, line.number, line.meaning, line.advice))
                colour = _COLOURS.get(line.verdict, "inherit")
                rows.append(f"<tr style='color:{colour}'><td>{'</td><td>'.join(cells)}</td></tr>")
        below = [*self._below, *[f"next: {self.advice}"] * bool(self.advice)]
        notes = "".join(f"<br>{escaped(note)}" for note in below)
        return f"<b>{escaped(self.title)}</b><table>{''.join(rows)}</table>{notes}"

    @property
    def _below(self) -> list[str]:
        return [f"{name}: not defined, {why}" for name, why in self.missing.items()] + [*self.notes]

    def to_dict(self) -> dict[str, object]:
        """Title, findings and reasons, as JSON has them: numbers that aren't finite are None."""
        return {
            "title": self.title,
            "findings": [line.to_dict() for line in self.findings()],
            "missing": dict(self.missing),
            "notes": list(self.notes),
            "next": self.advice,
        }

    def to_frame(self) -> DataFrame:
        """A pandas table with a row for each finding."""
        from pandas import DataFrame

        columns = list(Finding.__dataclass_fields__)
        return DataFrame([asdict(line) for line in self.findings()], columns=columns)


def said_once(findings: Sequence[Finding]) -> list[Finding]:
    """The same lines, with an advice that several have at the last of them alone."""
    last = {line.advice: place for place, line in enumerate(findings)}
    return [
        line if last[line.advice] == place else replace(line, advice="")
        for place, line in enumerate(findings)
    ]
