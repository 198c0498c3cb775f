"""What every worker of the throughput benchmark has in common: the case and its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LATENT = {"mlp": 20, "iwae": 50, "conv": 20, "flow": 20}
HIDDEN = {"mlp": (400,), "iwae": (200, 200), "conv": (16, 32), "flow": (400,)}
HEAD = 256  # the layer between convolutions and latent
FLOW = {"transforms": 3, "hidden_features": (128,)}
PIXELS = 784
LR = 1e-3


@dataclass(frozen=True)
class Case:
    """What is trained: the model, the batch and the draws a datum."""

    model: str
    batch: int
    draws: int = 1
    rows: int = 4096
    epochs: int = 3
    """Of a round."""
    seed: int = 0
    device: str = "cpu"

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // self.batch

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Side:
    """A training that is ready to run.

    Attributes:
        run: From a number of steps, whole epochs, to their mean loss per datum; waits for the
            device.
        parameters: How many numbers it trains.
        packages: Whose versions to note.
    """

    run: Callable[[int], float]
    parameters: int
    packages: tuple[str, ...]


def images(case: Case) -> np.ndarray:
    """Binary images, shape ``(rows, 784)``: ten patterns, a tenth of the pixels flipped."""
    rng = np.random.default_rng(case.seed)
    patterns = rng.random((10, PIXELS)) < 0.3
    flipped = rng.random((case.rows, PIXELS)) < 0.1
    x = patterns[rng.integers(10, size=case.rows)] ^ flipped
    return x.astype(np.float32)
