"""What all steps of `benchmarks/gpu.py` have in common."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import pvae
from pvae import VAE, randomness, recipes

ROOT = Path(__file__).parents[2]
PIXELS = 784

Result = Literal["passed", "failed", "left out"]


@dataclass(frozen=True)
class Outcome:
    """What a step has found.

    Attributes:
        result: Whether what must hold does; left out, where that can't be seen here.
        said: The numbers that say so, in a line.
        numbers: The same, for programs.
        unfinished: Whether a further call is to go on with it.
    """

    result: Result
    said: str
    numbers: dict[str, Any] = field(default_factory=dict)
    unfinished: bool = False


def judged(holds: bool, said: str, **numbers: Any) -> Outcome:  # noqa: FBT001
    return Outcome("passed" if holds else "failed", said, numbers)


def failed(why: str, **numbers: Any) -> Outcome:
    return Outcome("failed", why, numbers)


def left_out(why: str, **numbers: Any) -> Outcome:
    return Outcome("left out", why, numbers)


@dataclass(frozen=True)
class Setting:
    """Where and how long steps run.

    Attributes:
        device: Type of the device.
        short: Whether sizes are small, for a few minutes in all.
        folder: For files of the steps; what is there goes on in a second call.
        seconds: After which the step is killed.
    """

    device: str
    short: bool
    folder: str
    seconds: float = 600.0

    @property
    def has_times(self) -> bool:
        """Whether times mean anything: not on the CPU, nor where the device is pretended."""
        return self.device != "cpu" and "PVAE_PRETEND" not in os.environ

    def pick(self, whole: int, short: int) -> int:
        return short if self.short else whole


def python(
    setting: Setting, *command: str, seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python in the repository, with all that it says in one text."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path_of("PYTHONPATH")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds or setting.seconds,
        check=False,
    )


def path_of(name: str) -> str:
    """The search path with the repository and its benchmarks on it."""
    parts = [str(ROOT), str(ROOT / "benchmarks"), *os.environ.get(name, "").split(os.pathsep)]
    return os.pathsep.join(dict.fromkeys(filter(None, parts)))


def tests(setting: Setting, *arguments: str) -> Outcome:
    """Runs tests: all have to pass."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = python(setting, *command)
    lines = done.stdout.strip().splitlines() or ["nothing was said"]
    bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return judged(done.returncode == 0, "; ".join([lines[-1], *bad[:5]]), failed=bad)


def build(kind: str = "mlp") -> VAE:
    """The same pair each time, with the same weights."""
    with randomness.forked(0):
        if kind == "conv":
            return recipes.vae((1, 28, 28), 8, network="conv", hidden=(8, 16))
        return recipes.vae(PIXELS, 20, hidden=(400,))


def images(rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Binary images, as `peers.common` makes them."""
    from peers.common import Case
    from peers.common import images as make

    return np.asarray(make(Case("mlp", 1, rows=rows)), dtype=np.float32)


def fit(setting: Setting, pair: object, x: object, **options: Any) -> pvae.Fit:
    """A training with the settings that steps share."""
    own = {"epochs": 1, "batch_size": 128, "device": setting.device, "progress": False}
    return pvae.fit(pair, x, **{**own, **options})  # type: ignore[arg-type]


def relative(values: Sequence[float], expected: Sequence[float]) -> float:
    """The greatest difference, over the size of what was expected."""
    pairs = zip(values, expected, strict=True)
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


@contextmanager
def told() -> Iterator[list[str]]:
    """The warnings of a block, as a list that is full at its end."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
        texts += [str(w.message) for w in caught if issubclass(w.category, pvae.PvaeWarning)]


adam = functools.partial(torch.optim.Adam, lr=1e-3)
