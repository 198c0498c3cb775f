"""What an objective keeps during one training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pvae.pair import Structure
from pvae.schedules import Schedule

__all__ = ["MovingAverage", "ObjectiveState", "Training"]


class Training(NamedTuple):
    """The training that a state is for."""

    schedules: dict[str, Schedule]  # by name, lengths in steps
    structure: Structure
    num_data: int | None = None  # None if it isn't known


class ObjectiveState(nn.Module):
    """What an objective keeps during one training: the step, and the value of its schedules there.

    Schedules are evaluated on the host and kept as tensors, so that nothing has to be traced or
    compiled anew when they change. Subclasses keep more, in buffers and parameters, which a
    checkpoint saves: `surrogate` leaves one tensor in ``measured``, and `learn`, which training
    steps alone call, learns from it. What it computes may be captured as a graph, so that it reads
    no value of a tensor, and keeps no number that changes but in one.
    """

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.schedules, structure, self.num_data = training
        self.step = 0
        self.measured: Tensor | None = None
        self.like = torch.zeros((), dtype=structure.dtype, device=structure.device)
        self._written: dict[str, float] = {}
        for name in self.schedules:
            self.register_buffer(name, self.like.clone())
        self.set_step(0)

    def resolve(self, schedules: dict[str, Schedule], steps_per_epoch: int, total: int) -> None:
        """Takes schedules anew, for a training of another length."""
        self.schedules = {n: s.resolve(steps_per_epoch, total) for n, s in schedules.items()}
        self.set_step(self.step)

    def set_step(self, step: int) -> None:
        """Moves to a training step; schedules are written where they have changed."""
        self.step = step
        for name, schedule in self.schedules.items():
            if (value := schedule(step)) != self._written.get(name):
                self.get_buffer(name).fill_(value)
                self._written[name] = value

    def learn(self) -> None:
        """Learns from what the step has measured; may be called where it measured nothing."""

    def advance(self) -> None:
        """Learns, and moves to the next training step."""
        self.learn()
        self.set_step(self.step + 1)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has of it beside the step."""
        return {k: v for k, v in self.state_dict().items() if k not in self.schedules}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Puts it where it was when `tensors` were taken."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])
        self.set_step(step)

    def report(self) -> dict[str, float]:
        """What the history has of it, beside schedules."""
        return {}


class MovingAverage(ObjectiveState):
    """The moving average of a number that each step measures; ``decay``: what older ones count."""

    average: Tensor
    started: Tensor

    def __init__(self, training: Training, decay: float = 0.9) -> None:
        super().__init__(training)
        self.decay = decay
        for name in ("average", "started"):
            self.register_buffer(name, self.like.clone())

    def averaged(self, value: Tensor) -> Tensor:
        """The average with a new value in it."""
        mixed = self.decay * self.average + (1 - self.decay) * value
        return torch.where(self.started > 0, mixed, value)

    def learn(self) -> None:
        """Takes in what the step has measured, if that is finite."""
        if self.measured is not None:
            average = self.averaged(self.measured)
            ok = average.isfinite()
            self.average.copy_(torch.where(ok, average, self.average))
            self.started.copy_(torch.where(ok, 1.0, self.started))
            self.measured = None
