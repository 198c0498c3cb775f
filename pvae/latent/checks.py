"""What the files of this package share: a site, a mean, a matrix of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pvae.data import as_source, check_rows
from pvae.errors import DataError, UndefinedError, oxford

__all__ = ["as_matrix", "mean_of", "only_site"]


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


def as_matrix(where: str, codes: Tensor) -> Tensor:
    """Codes without their gradient; refuses what is no finite matrix of real numbers."""
    if not isinstance(codes, Tensor) or codes.dim() != 2 or not codes.is_floating_point():
        raise DataError(
            where,
            "a floating tensor of shape (N, d)",
            f"shape {tuple(codes.shape)}, {codes.dtype}"
            if isinstance(codes, Tensor)
            else type(codes).__name__,
            ["codes.flatten(1)", "torch.as_tensor(array)"],
        )
    codes = codes.detach()
    check_rows(as_source(codes, codes.device, codes.dtype), where=where)
    return codes
