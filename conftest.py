"""What every test and doctest runs under: one thread, a device, and a guard on global state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pvae

torch.set_num_threads(1)

with contextlib.suppress(ImportError):  # importing it turns torch's argument validation off
    validates = pyro.settings.get("validate_distributions_torch")
    import zuko  # noqa: F401

    pyro.settings.set(validate_distributions_torch=validates)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device that the tests run on")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    pyro.set_rng_seed(0)  # what draws without a seed of its own draws the same in every run


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, np=np, dist=dist, pyro=pyro, pvae=pvae)


def global_state() -> dict[str, Any]:
    """What no test, and no function of pvae, may change for the process."""
    return {
        "pyro settings": {k: pyro.settings.get(k) for k in pyro.settings.get()},
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "param store": {k: id(v) for k, v in pyro.get_param_store().named_parameters()},
        "numpy errors": np.geterr(),
    }


@pytest.fixture(autouse=True)
def _guard() -> Iterator[None]:
    before = global_state()
    yield
    after = global_state()
    pyro.get_param_store().clear()
    changed = {k: (before[k], after[k]) for k in before if before[k] != after[k]}
    assert not changed, f"the test changed global state: {changed}"
