"""Objectives by name: those that can be made without an argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from pvae.objectives.base import Objective
from pvae.objectives.table import ALL
from pvae.shelf import Shelf

__all__ = ["named"]

named: Shelf[Callable[..., Objective]] = Shelf("objective")
"""``named("dreg")()`` is an `pvae.objectives.DReG` as it is by default.

`pvae.objectives.Capacity` and `GECO` have no name: what they are for has to be said.
"""

for _kind in ALL:
    _given = [
        p
        for p in inspect.signature(_kind).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    if not _given:
        named.put(_kind.__name__.lower())(_kind)
