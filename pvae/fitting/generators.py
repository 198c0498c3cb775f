"""All generators that a training may draw from: the process's, and those that its parts keep."""

from __future__ import annotations

import random
from typing import NamedTuple

from torch import Tensor

from pvae import randomness
from pvae.pair.held import Held
from pvae.randomness import GENERATORS, Own

__all__ = ["Generators", "States", "own_generators"]


def own_generators(*roots: object) -> list[Own]:
    """The generators that programs, data sets and loaders keep for themselves, in one order."""
    found = Held(roots).found(GENERATORS)
    return [one for one in found if not isinstance(one, random.SystemRandom)]  # of no state


class States(NamedTuple):
    """States of generators.

    Attributes:
        process: Those of torch, NumPy and Python.
        own: Those that parts keep, each with its kind, as JSON has them.
    """

    process: dict[str, Tensor]
    own: list[list[object]]


class Generators:
    """The process's generators, and those within reach of some roots.

    Arguments:
        roots: Programs, and what gives the data.
    """

    def __init__(self, *roots: object) -> None:
        self._roots = roots

    def get(self) -> States:
        """The states of all."""
        own = own_generators(*self._roots)
        states = zip(own, randomness.get_own(own), strict=True)
        named: list[list[object]] = [
            [type(generator).__name__, state] for generator, state in states
        ]
        return States(randomness.get_state(), named)

    def set(self, states: States) -> bool:
        """Puts all back, if parts keep the generators that they kept; whether they do."""
        randomness.set_state(states.process)
        own = own_generators(*self._roots)
        if [type(generator).__name__ for generator in own] != [name for name, _ in states.own]:
            return False
        randomness.set_own(own, [state for _, state in states.own])
        return True
