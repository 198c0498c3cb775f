from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvae.errors import ArgumentError
from pvae.schedules import Constant, Cosine, Cyclical, Schedule, Warmup, as_schedule


@given(length=st.integers(1, 1000), step=st.integers(0, 2000))
def test_warmup_is_the_line_and_then_its_end(length: int, step: int) -> None:
    warmup = Warmup(length, start=0.2, end=3.0)
    assert warmup(step) == pytest.approx(0.2 + 2.8 * min(step / length, 1.0))


@given(length=st.integers(2, 1000))
def test_cosine_goes_down_all_the_way(length: int) -> None:
    values = [Cosine(length)(t) for t in range(length + 2)]
    assert values[0] == 1.0
    assert values[length] == values[length + 1] == pytest.approx(0.0, abs=1e-15)
    assert all(a >= b for a, b in itertools.pairwise(values))
    middle = 0.5 * (1 + math.cos(math.pi * (length // 2) / length))
    assert values[length // 2] == pytest.approx(middle)


def test_cyclical_repeats() -> None:
    cyclical = Cyclical(100, cycles=4, ramp=0.5)
    assert [cyclical(t) for t in range(25)] == pytest.approx([cyclical(t + 25) for t in range(25)])
    assert cyclical(13) == 1.0
    assert cyclical(100) == cyclical(1000) == 1.0


def test_epochs_and_the_whole_training_become_steps() -> None:
    assert Warmup(3, "epochs").resolve(10, 200) == Warmup(30, "steps")
    assert Cosine().resolve(10, 200) == Cosine(200, "steps")
    assert Warmup(7).resolve(10, 200) == Warmup(7)
    assert Constant(2.0).resolve(10, 200)(5) == 2.0
    assert (Constant().settles_at, Warmup(7).settles_at) == (0, 7)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Warmup(0), r"Warmup\.length"),
        (lambda: Warmup(2.5), r"Warmup\.length"),  # type: ignore[arg-type]
        (lambda: Warmup(3, "years"), r"Warmup\.unit"),  # type: ignore[arg-type]
        (lambda: Cyclical(10, cycles=0), r"Cyclical\.cycles"),
        (lambda: Cyclical(10, ramp=2.0), r"Cyclical\.ramp"),
        (lambda: as_schedule("beta", float("nan")), "beta"),
        (lambda: Warmup(3, "epochs")(0), "a length in steps"),
    ],
)
def test_what_is_refused(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(ArgumentError, match=words):
        make()


def test_a_number_is_a_schedule() -> None:
    assert as_schedule("beta", 0.5)(100) == 0.5
    warmup: Schedule = Warmup(3)
    assert as_schedule("beta", warmup) is warmup
