"""Which site a tool is about, and the mean of its distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pvae.errors import UndefinedError, oxford

__all__ = ["mean_of", "only_site"]


def mean_of(fn: Any) -> Tensor | None:
    """A distribution's mean; None if it isn't known."""
    try:
        return fn.mean
    except (NotImplementedError, AttributeError):
        return None


def only_site(where: str, what: str, names: Sequence[str], chosen: str | None) -> str:
    """The site that was chosen, or the only one there is."""
    if chosen is None and len(names) == 1:
        return names[0]
    if chosen is not None and chosen in names:
        return chosen
    known = oxford(names) if names else "none"
    raise UndefinedError(
        where,
        f"the name of a {what}" if chosen else f"site=NAME, as there isn't exactly one {what}",
        f"'{chosen}'; there are: {known}" if chosen else known,
        [f"site='{name}'" for name in names[:2]],
    )
