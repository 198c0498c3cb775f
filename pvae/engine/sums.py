"""Sums of what steps measure, kept on the device with the digits of float64.

A device without that type (see `pvae.devices`) has two numbers in its widest type for each: the sum
as rounded, and all that rounding has left out of it, which the host adds up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pvae.devices import floats

__all__ = ["add_to", "set_sums", "sums_of", "zero_sums"]


def zero_sums(device: torch.device, *shape: int) -> Tensor:
    """New sums; where there are two numbers for each, they are in the last axis but one."""
    *leading, last = shape
    parts = () if floats(device) == torch.float64 else (2,)
    return torch.zeros((*leading, *parts, last), dtype=floats(device), device=device)


def add_to(sums: Tensor, values: Tensor) -> None:
    """Adds finite values in the type of the sums, one to each; waits for nothing."""
    if sums.dtype == torch.float64:
        sums.add_(values)
        return
    rounded, rest = sums.unbind(-2)
    new = rounded + values
    added = new - rounded
    rest.add_((rounded - (new - added)) + (values - added))
    rounded.copy_(new)


def sums_of(sums: Tensor) -> Tensor:
    """The sums in float64, on the host where the device has no such type."""
    return sums if sums.dtype == torch.float64 else sums.cpu().double().sum(-2)


def set_sums(sums: Tensor, values: Tensor) -> None:
    """Sets sums to what `sums_of` has given, maybe of another device's."""
    if sums.dtype == torch.float64:
        sums.copy_(values)
        return
    rounded = values.to("cpu", sums.dtype)
    sums.copy_(torch.stack([rounded, (values.cpu() - rounded).to(sums.dtype)], -2))
