"""Codes as a matrix."""

from __future__ import annotations

from torch import Tensor

from pvae.data import as_source, check_rows
from pvae.errors import DataError

__all__ = ["as_matrix"]


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
