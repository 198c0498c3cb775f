from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch

from pvae import randomness

collect_ignore = ["pretend"]  # no tests, and not to be imported where there is no pretend device


@pytest.fixture(autouse=True)
def _float64(request: pytest.FixtureRequest, _guard: None) -> Iterator[None]:
    """Double precision and a fixed seed, unless a test asks for ``float32``."""
    before = torch.get_default_dtype()
    wanted = torch.float32 if request.node.get_closest_marker("float32") else torch.float64
    torch.set_default_dtype(wanted)
    with randomness.forked(seed=0):
        yield
    torch.set_default_dtype(before)


@pytest.fixture
def gpu(device: torch.device) -> Iterator[torch.device]:
    """CUDA, which alone has graphs and says what waits for it; Pyro validates as in a training."""
    if device.type != "cuda":
        pytest.skip("graphs, and what says where a step waits, are CUDA's")
    with pyro.validation_enabled(is_validate=False):
        yield device
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def store() -> Iterator[None]:
    """A parameter store of its own, for pairs whose parameters live there."""
    with pyro.get_param_store().scope():
        yield
