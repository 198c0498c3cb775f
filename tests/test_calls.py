"""Every public function on the device, with the CPU's numbers; none is missing from the table."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import cli
from tests import pretend
from tests.calls import CALLS, ELSEWHERE

WHOLE: Any = pvae
MODULES: dict[str, Any] = {
    "pvae": pvae,
    "cli": cli,
    **{n: m for n in WHOLE.__all__ if isinstance(m := getattr(pvae, n), types.ModuleType)},
}
PUBLIC = {
    f"{where}.{name}"
    for where, module in MODULES.items()
    for name in module.__all__
    if callable(getattr(module, name)) and not isinstance(getattr(module, name), types.ModuleType)
}


def test_no_public_callable_is_missing() -> None:
    """A new one needs a call in ``tests/calls``, or a reason in ``ELSEWHERE``."""
    called = {name for call in CALLS.values() for name in call.names}
    assert not PUBLIC - called - ELSEWHERE.keys()
    assert not (called | ELSEWHERE.keys()) - PUBLIC
    assert not called & ELSEWHERE.keys()
    assert len(CALLS) >= 50


def numbers(result: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors, numbers and words in what a call returned."""
    if isinstance(result, Tensor):
        yield path, result.detach().cpu().numpy()
    elif isinstance(result, np.ndarray | str | int | float | None):
        yield path, result
    elif isinstance(result, nn.Module):
        yield from numbers(result.state_dict(), path)
    elif isinstance(result, Mapping):
        for key, value in result.items():
            yield from numbers(value, f"{path}.{key}")
    elif isinstance(result, list | tuple | torch.Size):
        for i, value in enumerate(result):
            yield from numbers(value, f"{path}.{i}")
    elif dataclasses.is_dataclass(result):
        for field in dataclasses.fields(result):
            if field.name != "seconds":
                yield from numbers(getattr(result, field.name), f"{path}.{field.name}")


def same(ours: Any, theirs: Any, path: str) -> None:
    if isinstance(ours, np.ndarray) and ours.dtype.kind == "f":
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4, err_msg=path)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4, nan_ok=True), path
    elif isinstance(ours, np.ndarray):
        np.testing.assert_array_equal(ours, theirs, err_msg=path)
    else:
        assert ours == theirs, path


def run(name: str, device: torch.device) -> dict[str, Any]:
    pyro.set_rng_seed(0)
    pyro.get_param_store().clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small pairs, few draws, no training
        return dict(numbers(CALLS[name].run(device)))


@pytest.fixture
def _draws_of_the_cpu() -> Iterator[None]:
    """On the pretend device draws are the CPU's, so that all numbers can be compared."""
    if pretend.kind() is None:
        yield
        return
    torch.ops.pretend.draw_as_cpu(on=True)
    yield
    torch.ops.pretend.draw_as_cpu(on=False)


@pytest.mark.device
@pytest.mark.float32
@pytest.mark.usefixtures("_draws_of_the_cpu", "store")
@pytest.mark.parametrize("name", CALLS)
def test_on_the_device(name: str, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("what is tested is the device, and this is the CPU")
    found, expected = run(name, device), run(name, torch.device("cpu"))
    assert found.keys() == expected.keys()
    assert found
    for path, number in found.items():
        if pretend.kind() is not None or not CALLS[name].draws:
            same(number, expected[path], path)
