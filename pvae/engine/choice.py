"""Which engine pays: compiling takes a while, and makes every step shorter."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from typing import Literal, get_args

import pyro
import torch
from torch import Tensor

from pvae.engine.graphs import undoing
from pvae.engine.stepper import Engine, Stepper
from pvae.modes import in_mode
from pvae.objectives import Objective

__all__ = ["ASKED", "WORTH_COMPILING", "Asked", "choose", "has_compiler"]

Asked = Literal["auto", "eager", "compiled", "cudagraph"]
ASKED: tuple[Asked, ...] = get_args(Asked)

WORTH_COMPILING = 180.0
"""Seconds of eager training from which compiling pays: it takes up to half a minute for each shape
of batch, and saves from a tenth of the time (large convolutions) to half of it (small networks)."""


def choose(stepper: Stepper, batch: Callable[[], tuple[Tensor, ...]], steps: int) -> Engine:
    """The engine for so many steps on such a batch, by the time that an eager one takes.

    Leaves everything as it was. Only long trainings are measured at all.
    """
    if not isinstance(stepper.objective, Objective) or steps < WORTH_COMPILING / 0.2:
        return "eager"
    if not has_compiler(stepper.structure.device):
        return "eager"
    return "compiled" if steps * _seconds(stepper, batch()) > WORTH_COMPILING else "eager"


def has_compiler(device: torch.device) -> bool:
    """Whether graphs can be compiled: on a CPU that takes a C++ compiler."""
    return device.type != "cpu" or any(map(shutil.which, ("c++", "g++", "clang++", "cl")))


def _seconds(stepper: Stepper, batch: tuple[Tensor, ...]) -> float:
    """What a pass takes as in training, without its update."""
    seconds = []
    with (
        undoing(stepper.passes),
        in_mode(stepper.structure.modules, training=True),
        pyro.validation_enabled(is_validate=False),
    ):
        for _ in range(4):
            started = time.perf_counter()
            stepper.passes.run(*batch)
            if stepper.structure.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
