"""Data and pair, made ready for an estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pvae import terms as t
from pvae.data import Source, as_source, check_rows
from pvae.errors import PairError

__all__ = ["prepare"]


def prepare(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    structure: t.Structure | None = None,
    plate: str | None = None,
) -> tuple[Source, t.Structure]:
    """Data, checked, as a source on the pair's device, and what the pair is made of."""
    if structure is not None:
        return as_source(data, structure.device, structure.dtype), structure
    like = t.home_of((model, guide), data)
    source = as_source(data, like.device, like.dtype)
    try:
        structure = t.inspect_source(model, guide, source, plate=plate)
    except PairError:
        check_rows(source)  # was it the data?
        raise
    source = as_source(data, structure.device, structure.dtype)
    t.check_data(model, guide, source)
    return source, structure
