"""Calls that are compiled where that pays, and the evidence with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pvae import bounds
from pvae.engine import Repeated
from pvae.errors import ArgumentError, PvaeWarning
from tests import fits, pairs

pytestmark = pytest.mark.usefixtures("store")


def double(k: int, x: Tensor) -> Tensor:
    return k * x + torch.randn(3)


def test_short_work_isnt_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvae.engine.repeated.compile_function", lambda *_: 1 / 0)
    repeated = Repeated(double, calls=1000, dtype=torch.float64)
    for _ in range(5):
        repeated(2, torch.ones(3))
    assert (repeated.left, repeated.engine) == (995, "auto")


def test_long_work_is_compiled_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[int, ...]] = []

    def note(function: Any, example: Any) -> Any:
        compiled.append(tuple(example[0].shape))
        return function

    monkeypatch.setattr("pvae.engine.repeated.compile_function", note)
    monkeypatch.setattr("pvae.engine.repeated.has_compiler", lambda _: True)
    repeated = Repeated(double, calls=10**9, dtype=torch.float64)
    torch.manual_seed(0)
    found = [repeated(2, torch.ones(3)) for _ in range(6)] + [repeated(2, torch.ones(1, 3))]
    assert compiled == [(3,)]
    torch.manual_seed(0)
    for value in found:
        torch.testing.assert_close(value.flatten(), double(2, torch.ones(3)))
    monkeypatch.setattr("pvae.engine.repeated.has_compiler", lambda _: False)
    other = Repeated(double, calls=10**9, dtype=torch.float64)
    for _ in range(5):
        other(2, torch.ones(3))
    assert compiled == [(3,)]


def test_other_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(function: Any, example: Any) -> Any:
        return lambda *tensors: function(*tensors) + 0.5

    monkeypatch.setattr("pvae.engine.repeated.compile_function", wrong)
    repeated = Repeated(double, 5, torch.float64, "compiled")
    with pytest.warns(PvaeWarning, match=r"Python, not compiled: the numbers differ .* by 0\.\d"):
        first = repeated(2, torch.ones(3))
    assert repeated.engine == "eager"
    assert not torch.equal(first, repeated(2, torch.ones(3)))
    with pytest.raises(ArgumentError, match="one of auto, eager, compiled"):
        Repeated(double, 5, torch.float64, "fast")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_evidence_is_the_eager_one(device: torch.device) -> None:
    """With a last chunk of another size."""
    pair = fits.vae().to(device)
    x = fits.binary(7).to(device)
    found = [
        bounds.evidence(pair, x, 50, max_rows=200, engine=engine)
        for engine in ("eager", "compiled")
    ]
    torch.testing.assert_close(found[1].per_datum, found[0].per_datum)
    assert found[1].se_draws == pytest.approx(found[0].se_draws)


def test_pairs_that_subsample_themselves_are_eager(device: torch.device) -> None:
    model, guide, (x,) = pairs.subsample_drawn(device)
    found = [
        bounds.evidence((model, guide), x, 50, engine=engine) for engine in ("eager", "compiled")
    ]
    assert torch.equal(found[0].per_datum, found[1].per_datum)
