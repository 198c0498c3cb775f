"""Maximum mean discrepancy between two samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pvae.errors import ArgumentError

__all__ = ["Kernel", "kernel_named", "mmd"]

Kernel = Callable[[Tensor], Tensor]
"""From squared distances to values in (0, 1], 1 at distance 0."""

KERNELS = ("imq", "rbf")
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def kernel_named(name: str, dim: int) -> Kernel:
    r"""A kernel for codes of ``dim`` entries near a standard normal.

    ``"imq"`` is the mean over scales s of :math:`C / (C + d^2)` with :math:`C = 2 s \cdot dim`, as
    Tolstikhin et al. have it; ``"rbf"`` is :math:`\exp(-d^2 / (2 \cdot dim))`.
    """
    if name == "imq":
        return lambda d2: (
            sum((2 * dim * s / (2 * dim * s + d2) for s in SCALES), torch.zeros_like(d2))
            / len(SCALES)
        )
    if name == "rbf":
        return lambda d2: (-d2 / (2 * dim)).exp()
    raise ArgumentError("kernel", f"one of {', '.join(KERNELS)}, or a function", repr(name))


def mmd(
    x: Tensor,
    y: Tensor,
    kernel: Literal["imq", "rbf"] | Kernel = "imq",
    *,
    unbiased: bool = True,
) -> Tensor:
    r"""The squared maximum mean discrepancy of two samples.

    .. math:: E\,k(x, x') + E\,k(y, y') - 2 E\,k(x, y)

    References:
        A Kernel Two-Sample Test (Gretton et al., 2012),
        https://jmlr.org/papers/v13/gretton12a.html

        Wasserstein Auto-Encoders (Tolstikhin et al., 2018), https://arxiv.org/abs/1711.01558

    Arguments:
        x: One sample, shape ``(..., N, D)``.
        y: The other, shape ``(..., M, D)``.
        kernel: A name (see `kernel_named`), or a function of squared distances.
        unbiased: Whether pairs of a point with itself are left out; the result may then be
            negative. With them it is at least 0, and too high by about 2 / N.

    Returns:
        Shape ``(...)``.

    Raises:
        ArgumentError: If a sample has fewer points than are needed, or another number of entries.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> mmd(x, x, lambda d2: 1 / (1 + d2), unbiased=False)
        tensor(0.)
    """
    if x.shape[-1] != y.shape[-1]:
        raise ArgumentError("mmd", f"points of {x.shape[-1]} entries", f"{y.shape[-1]} in y")
    least = 2 if unbiased else 1
    if min(x.shape[-2], y.shape[-2]) < least:
        raise ArgumentError(
            "mmd", f"at least {least} points in each sample", f"{x.shape[-2]} and {y.shape[-2]}"
        )
    k = kernel_named(kernel, x.shape[-1]) if isinstance(kernel, str) else kernel

    def within(a: Tensor) -> Tensor:
        values = k(_squared_distances(a, a))
        if not unbiased:
            return values.mean((-2, -1))
        n = a.shape[-2]
        diagonal = values.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (values.sum((-2, -1)) - diagonal) / (n * (n - 1))

    return within(x) + within(y) - 2 * k(_squared_distances(x, y)).mean((-2, -1))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    centre = b.detach().mean(-2, keepdim=True)  # so that little is lost in the difference
    a, b = a - centre, b - centre
    norms = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    return (norms - 2 * a @ b.transpose(-2, -1)).clamp(min=0)
