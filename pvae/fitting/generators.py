"""All generators that a training may draw from: the process's, and those that its parts keep."""

from __future__ import annotations

from pvae.pair.held import Held
from pvae.randomness import GENERATORS, Own

__all__ = ["own_generators"]


def own_generators(*roots: object) -> list[Own]:
    """The generators that programs, data sets and loaders keep for themselves, in one order."""
    return [thing for thing in Held(roots).found(GENERATORS) if isinstance(thing, GENERATORS)]
