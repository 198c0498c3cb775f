"""Random state: seeds derived from seeds, generators saved, restored and forked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "GENERATORS",
    "Own",
    "derive_seed",
    "forked",
    "get_own",
    "get_state",
    "set_own",
    "set_seed",
    "set_state",
]

Own = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
"""A generator that is somebody's own, not the process's."""

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


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


# Generators that a data set, a loader or a program keeps for itself


def _get_own(generator: Own) -> object:
    """The state of a generator, as JSON has it."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes().hex()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def _set_own(generator: Own, state: Any) -> None:
    """Puts a state back that `_get_own` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8))
    elif isinstance(generator, random.Random):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_arrays(state))
    else:
        generator.bit_generator.state = _arrays(state)


def _seed_own(generator: Own, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random | np.random.RandomState):
        generator.seed(seed)
    else:
        generator.bit_generator.state = type(generator.bit_generator)(seed).state


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return {"dtype": str(value.dtype), "items": value.tolist()}
    return value


def _arrays(value: object) -> Any:
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "items"}:
        return np.array(value["items"], dtype=value["dtype"])
    return {name: _arrays(part) for name, part in value.items()}


def get_own(own: Sequence[Own]) -> list[object]:
    """The states of generators that belong to parts of a program, as JSON has them."""
    return [*map(_get_own, own)]


def set_own(own: Sequence[Own], states: Sequence[object]) -> None:
    """Puts states back that `get_own` returned."""
    for generator, state in zip(own, states, strict=True):
        _set_own(generator, state)


@contextmanager
def forked(seed: int | None = None, own: Sequence[Own] = ()) -> Iterator[None]:
    """Runs a block on copies of all generators, seeded anew if ``seed`` is given.

    Arguments:
        seed: Seed of the copies; None for copies that go on as the generators would.
        own: Generators beside those of the process, which are put back, too.

    Example:
        >>> before = torch.get_rng_state()
        >>> with forked(seed=1):
        ...     _ = torch.rand(3)
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    state, states = get_state(), get_own(own)
    try:
        if seed is not None:
            set_seed(seed)
            for generator in own:
                _seed_own(generator, seed)
        yield
    finally:
        set_state(state)
        set_own(own, states)
