"""What all diagnostics share: a result as text, HTML, dictionary and table, and its thresholds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pvae
from pvae import diagnostics
from pvae.diagnostics import Finding, Result, thresholds
from pvae.estimate import Estimate
from pvae.mmd import TwoSampleTest

LINES = [
    Finding("one", 0.5, 0.01, "nats", "good", "a < b"),
    Finding("two", math.inf, math.nan, "", "bad", "too wide", "do this"),
    Finding("three", 3.0, None, "", "look", "too narrow", "do this"),
]


@dataclass(frozen=True, repr=False)
class Three(Result):
    """Three lines under two headings."""

    title = "Three lines"
    missing = {"four": "there is none"}  # noqa: RUF012
    notes = ("a note",)
    advice = "rest"

    def findings(self) -> list[Finding]:
        return LINES

    def sections(self) -> list[tuple[str, list[Finding]]]:
        return [("first", LINES[:1]), ("second", LINES[1:])]


def test_a_result_as_text() -> None:
    assert str(Three()).splitlines() == [
        "Three lines",
        "-- first",
        "+ one                  0.500 +- 0.010 nats    a < b",
        "-- second",
        "! two                  inf                    too wide",
        "? three                3                      too narrow",
        "      next: do this",  # said once
        "  four: not defined, there is none",
        "  a note",
        "next: rest",
    ]
    assert repr(Three()) == str(Three())


def test_a_result_as_data() -> None:
    found: Any = Three().to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    one, two, three = found["findings"]
    assert (one["value"], one["error"], one["verdict"]) == (0.5, 0.01, "good")
    assert (two["value"], two["error"], two["advice"]) == (None, None, "do this")
    assert three["unit"] == ""
    assert found["missing"] == {"four": "there is none"}
    frame = Three().to_frame()
    assert list(frame["name"]) == ["one", "two", "three"]
    assert list(frame["verdict"]) == ["good", "bad", "look"]
    assert frame["value"][1] == math.inf


def test_a_result_in_a_notebook() -> None:
    page = Three()._repr_html_()
    assert "a &lt; b" in page
    assert page.count("do this") == 1
    for text in ("Three lines", "second", "0.500 +- 0.010 nats", "there is none", "next: rest"):
        assert text in page


def test_a_finding_of_an_estimate() -> None:
    """The error is over data, or over draws where no datum has a value, or there is one datum."""
    values = torch.tensor([1.0, 2.0, 3.0])
    assert Finding.of(Estimate("v", values)).error == pytest.approx(1 / math.sqrt(3))
    by_draw = Finding.of(Estimate("v", values, by="draw", num_data=2))
    assert (by_draw.value, by_draw.error) == pytest.approx((1.0, 1 / math.sqrt(3) / 2))
    one = Estimate("v", torch.tensor([1.0]), torch.tensor([0.04]))
    assert Finding.of(one).error == pytest.approx(0.2)
    assert Finding.of(Estimate("v", torch.tensor([1.0]))).error is None


def test_what_diagnostics_return_is_a_result() -> None:
    """Whatever has findings."""
    classes = [getattr(diagnostics, name) for name in diagnostics.__all__]
    found = [c for c in classes if isinstance(c, type) and hasattr(c, "findings")]
    assert len(found) >= 14
    assert all(issubclass(c, Result) for c in found)
    own = [c.__name__ for c in found if c is not Result and {"__str__", "__repr__"} & set(vars(c))]
    assert not own


ROWS = [row for row in vars(thresholds).values() if isinstance(row, thresholds.Threshold)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.quantity)
def test_verdicts_change_at_thresholds(row: diagnostics.Threshold) -> None:
    towards_good = 1 if row.is_least else -1
    assert row.verdict(math.nan) == "none"
    assert row.verdict(towards_good * math.inf) == "good"
    if math.isfinite(row.bad):
        assert row.verdict(row.bad) == "bad"
        assert row.verdict(row.bad + towards_good * 1e-6) != "bad"
    if math.isfinite(row.look):
        assert row.verdict(row.look) != "good"
        assert row.verdict(row.look + towards_good * 1e-6) == "good"


def test_the_page_has_the_table() -> None:
    page = (Path(pvae.__file__).parents[1] / "docs" / "diagnostics.md").read_text()
    assert diagnostics.table() in page
    assert all(row.quantity in page for row in ROWS)


@pytest.mark.parametrize(
    ("distance", "p_value", "verdict"),
    [(0.26, 1e-4, "bad"), (0.26, 0.2, "good"), (0.15, 1e-4, "look"), (0.05, 1e-4, "good")],
)
def test_a_distance_is_judged_where_a_test_finds_one(
    distance: float, p_value: float, verdict: str
) -> None:
    one = torch.eye(1)
    found = diagnostics.AggregatedPosterior(
        torch.zeros(9, 1),
        torch.zeros(9, 1),
        ("z[0]",),
        TwoSampleTest(0.0, 0.5),
        torch.tensor([distance]),
        torch.tensor([p_value]),
        one,
        None,
    )
    joint, single = found.findings()
    assert (joint.verdict, single.verdict) == ("good", verdict)
    different = replace(found, joint=TwoSampleTest(1.0, 1e-3))
    assert different.findings()[0].verdict == "look"  # a test says nothing of size
