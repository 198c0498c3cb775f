"""Schedules: functions from the training step to a number, for beta, learning rates and the like.

A schedule is a frozen value. Lengths are in steps, or in epochs, which `fit` turns into steps; a
length of ``None`` is the whole training.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

from pvae.annotations import check_fields
from pvae.errors import ArgumentError, check_choice, check_int, check_number

__all__ = ["Constant", "Cosine", "Cyclical", "Schedule", "Timed", "Warmup", "as_schedule"]


class Schedule(ABC):
    """The abstract schedule: ``schedule(step)`` is its value at a training step, from 0 on.

    A new schedule is a frozen dataclass that extends `Timed` and defines `value`.
    """

    @property
    def settles_at(self) -> int:
        """The step from which the value doesn't change any more."""
        return 0

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value at ``step``."""

    def resolve(self, steps_per_epoch: int, total_steps: int) -> Schedule:
        """The same schedule with its length in steps; `fit` calls this."""
        return self


@dataclass(frozen=True)
class Constant(Schedule):
    """The same number at every step.

    Example:
        >>> Constant(0.5)(7)
        0.5
    """

    number: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "Constant")

    def __call__(self, step: int) -> float:
        """The number."""
        return self.number


@dataclass(frozen=True)
class Timed(Schedule):
    """The abstract schedule with a length: subclasses define `value`.

    Arguments:
        length: T, in ``unit``; ``None`` is the whole training.
        unit: ``"steps"`` or ``"epochs"``.
    """

    length: int | None = None
    unit: Literal["steps", "epochs"] = "steps"

    def __post_init__(self) -> None:
        if self.length is not None:
            check_int(f"{type(self).__name__}.length", self.length)
        check_choice(f"{type(self).__name__}.unit", self.unit, ("steps", "epochs"))
        for name in ("start", "end"):  # which most have
            check_number(f"{type(self).__name__}.{name}", getattr(self, name, 0.0))

    @abstractmethod
    def value(self, step: int, length: int) -> float:
        """The value at ``step`` of ``length`` steps."""

    def __call__(self, step: int) -> float:
        """The value at ``step``."""
        if self.length is None or self.unit != "steps":
            fixes = [
                "call .resolve(steps_per_epoch, total_steps) first, as fit does",
                "length=1000",
            ]
            raise ArgumentError(type(self).__name__, "a length in steps", repr(self), fixes)
        return self.value(step, self.length)

    def resolve(self, steps_per_epoch: int, total_steps: int) -> Timed:
        """The same schedule with its length in steps."""
        factor = steps_per_epoch if self.unit == "epochs" else 1
        length = total_steps if self.length is None else self.length * factor
        return replace(self, length=length, unit="steps")

    @property
    def settles_at(self) -> int:
        """The step from which the value doesn't change any more."""
        return self.length or 0


@dataclass(frozen=True)
class Warmup(Timed):
    r"""A straight line from ``start`` to ``end`` over ``length``, then ``end``.

    .. math:: v(t) = a + (b - a) \min(t / T, 1)

    References:
        Ladder Variational Autoencoders (Sønderby et al., 2016), https://arxiv.org/abs/1602.02282

    Arguments:
        length: T; it and its unit as in `Timed`.
        start: a, the value at step 0.
        end: b, the value from step T on.

    Example:
        >>> warmup = Warmup(10, unit="epochs").resolve(steps_per_epoch=5, total_steps=100)
        >>> warmup(0), warmup(25), warmup(50), warmup(99)
        (0.0, 0.5, 1.0, 1.0)
    """

    start: float = 0.0
    end: float = 1.0

    def value(self, step: int, length: int) -> float:
        """The value at a step."""
        return self.start + (self.end - self.start) * min(step / length, 1.0)


@dataclass(frozen=True)
class Cosine(Timed):
    r"""Half a cosine from ``start`` down (or up) to ``end`` over ``length``, then ``end``.

    .. math:: v(t) = b + (a - b) \tfrac12 (1 + \cos(\pi \min(t / T, 1)))

    References:
        SGDR: Stochastic Gradient Descent with Warm Restarts (Loshchilov & Hutter, 2017),
        https://arxiv.org/abs/1608.03983

    Arguments:
        length: T; it and its unit as in `Timed`.
        start: a, the value at step 0.
        end: b, the value from step T on.

    Example:
        >>> cosine = Cosine(length=100)
        >>> cosine(0), round(cosine(50), 6), cosine(100)
        (1.0, 0.5, 0.0)
    """

    start: float = 1.0
    end: float = 0.0

    def value(self, step: int, length: int) -> float:
        """The value at a step."""
        phase = math.pi * min(step / length, 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(phase))


@dataclass(frozen=True)
class Cyclical(Timed):
    r"""``cycles`` warm-ups over ``length``: each rises for ``ramp`` of its time, then holds.

    References:
        Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing
        (Fu et al., 2019), https://arxiv.org/abs/1903.10145

    Arguments:
        length: T, of all cycles; it and its unit as in `Timed`.
        cycles: Number of cycles.
        ramp: The part of a cycle in which the value rises, in (0, 1].
        start: The value at the start of each cycle.
        end: The value that each cycle holds, and the value after the last.

    Example:
        >>> [Cyclical(length=100, cycles=2)(t) for t in (0, 10, 25, 49, 50, 100)]
        [0.0, 0.4, 1.0, 1.0, 0.0, 1.0]
    """

    cycles: int = 4
    ramp: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("Cyclical.cycles", self.cycles)
        check_number("Cyclical.ramp", self.ramp, above=0, maximum=1)

    def value(self, step: int, length: int) -> float:
        """The value at a step."""
        if step >= length:
            return self.end
        within = (step * self.cycles / length) % 1.0
        return self.start + (self.end - self.start) * min(within / self.ramp, 1.0)


def as_schedule(where: str, value: float | Schedule) -> Schedule:
    """A number as the schedule that stays there; a schedule as itself."""
    return value if isinstance(value, Schedule) else Constant(check_number(where, value))
