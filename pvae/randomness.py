"""Random state: seeds derived from seeds, generators saved, restored and forked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["derive_seed", "forked", "get_state", "set_seed", "set_state"]


def derive_seed(*keys: int) -> int:
    """A seed that depends on all the keys, and on nothing else.

    Example:
        >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(1, 0)
        (True, False)
    """
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def set_seed(seed: int) -> None:
    """Seeds torch (on every device), NumPy's global generator and Python's."""
    seed = int(seed)  # Python's own takes no integer of NumPy's
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator is what user code may draw from
    random.seed(seed)


def get_state() -> dict[str, Tensor]:
    """The state of torch's generators on all devices, NumPy's and Python's, as tensors."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for i, cuda in enumerate(torch.cuda.get_rng_state_all()):
            state[f"cuda.{i}"] = cuda
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    _, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    numbers = [float(position), float(has_gauss), float(gauss)]
    state["numpy.keys"] = torch.from_numpy(np.array(keys, dtype=np.int64))
    state["numpy.rest"] = torch.tensor(numbers, dtype=torch.float64)
    version, internal, gauss_next = random.getstate()
    state["python.keys"] = torch.tensor([version, *internal], dtype=torch.int64)
    state["python.rest"] = torch.tensor(
        [] if gauss_next is None else [gauss_next], dtype=torch.float64
    )
    return state


def set_state(state: dict[str, Tensor]) -> None:
    """Restores what `get_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda.{i}"].cpu(), i)
    if torch.backends.mps.is_available() and "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu())
    position, has_gauss, gauss = state["numpy.rest"].tolist()
    keys = state["numpy.keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))  # noqa: NPY002
    version, *internal = state["python.keys"].tolist()
    rest: list[Any] = state["python.rest"].tolist()
    random.setstate((version, tuple(internal), rest[0] if rest else None))


@contextmanager
def forked(seed: int | None = None) -> Iterator[None]:
    """Runs a block on copies of all generators, seeded anew if ``seed`` is given.

    Example:
        >>> before = torch.get_rng_state()
        >>> with forked(seed=1):
        ...     _ = torch.rand(3)
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    state = get_state()
    try:
        if seed is not None:
            set_seed(seed)
        yield
    finally:
        set_state(state)
