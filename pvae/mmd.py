"""Maximum mean discrepancy between two samples, and the test that it gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pvae.annotations import Finite, strict
from pvae.devices import double
from pvae.errors import ArgumentError, check_int

__all__ = ["Kernel", "TwoSampleTest", "kernel_named", "median_kernel", "mmd", "two_sample_test"]

Kernel = Callable[[Tensor], Tensor]
"""From squared distances to values in (0, 1], 1 at distance 0."""

KERNELS = ("imq", "rbf")
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@strict
def kernel_named(name: str, dim: int) -> Kernel:
    r"""A kernel for codes of ``dim`` entries near a standard normal.

    ``"imq"`` is the mean over scales s of :math:`C / (C + d^2)` with :math:`C = 2 s \cdot dim`, as
    Tolstikhin et al. have it; ``"rbf"`` is :math:`\exp(-d^2 / (2 \cdot dim))`.
    """
    if name not in KERNELS:
        raise ArgumentError(
            "kernel", f"one of {', '.join(KERNELS)}, or a function", repr(name), ["kernel='imq'"]
        )
    if name == "rbf":
        return lambda d2: (-d2 / (2 * dim)).exp()
    widths = [2 * dim * s for s in SCALES]
    return lambda d2: functools.reduce(torch.add, (c / (c + d2) for c in widths)) / len(widths)


@strict
def mmd(
    x: Tensor, y: Tensor, kernel: Literal["imq", "rbf"] | Kernel = "imq", *, unbiased: bool = True
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
    k = _checked(x, y, kernel, 2 if unbiased else 1)

    def within(a: Tensor) -> Tensor:
        values = k(_squared_distances(a, a))
        if not unbiased:
            return values.mean((-2, -1))
        n = a.shape[-2]
        diagonal = values.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (values.sum((-2, -1)) - diagonal) / (n * (n - 1))

    return within(x) + within(y) - 2 * k(_squared_distances(x, y)).mean((-2, -1))


@strict
def median_kernel(x: Finite) -> Kernel:
    r"""The Gaussian kernel :math:`\exp(-d^2 / (2 m^2))`, m the median distance between points.

    Arguments:
        x: A sample, shape ``(N, D)``.

    Example:
        >>> median_kernel(torch.tensor([[0.0], [1.0], [2.0]]))(torch.tensor(2.0))
        tensor(0.3679)
    """
    if x.dim() != 2 or len(x) < 2:
        raise ArgumentError(
            "median_kernel", "at least two points (N, D)", f"{tuple(x.shape)}", _MORE
        )
    above = torch.triu_indices(len(x), len(x), 1, device=x.device)
    median = _squared_distances(x, x)[above[0], above[1]].median()
    if not median > 0:
        raise ArgumentError("median_kernel", "points that differ", "a median distance of 0", _MORE)
    return lambda d2: (-d2 / (2 * median.to(d2))).exp()


class TwoSampleTest(NamedTuple):
    """The unbiased `mmd` of two samples, and the share of permutations whose is as large."""

    mmd: float
    p_value: float


@strict
def two_sample_test(
    x: Tensor,
    y: Tensor,
    kernel: Literal["imq", "rbf"] | Kernel | None = None,
    *,
    num_permutations: int = 999,
    seed: int = 0,
) -> TwoSampleTest:
    """Whether two samples come from one distribution: a permutation test on `mmd`.

    If they do, the p-value is at most a with probability a or less, whatever the distribution, the
    kernel and the sizes (Gretton et al., 2012). The Gram matrix of all points is held in memory.

    Arguments:
        x: One sample, shape ``(N, D)``.
        y: The other, shape ``(M, D)``.
        kernel: As in `mmd`; None for `median_kernel` of all points.
        num_permutations: The p-value is at least 1 / (this + 1).
        seed: Seed of the permutations; the caller's generators are left as they are.

    Example:
        >>> x = torch.arange(20.0)[:, None]
        >>> two_sample_test(x, x + 100).p_value
        0.001
    """
    check_int("num_permutations", num_permutations)
    for name, sample in (("x", x), ("y", y)):
        if sample.dim() != 2 or not bool(sample.isfinite().all()):
            what = f"{tuple(sample.shape)}" if sample.dim() != 2 else "NaN or infinity"
            raise ArgumentError(f"two_sample_test, {name}", "finite points (N, D)", what)
    k = _checked(x, y, "imq" if kernel is None else kernel, 2)
    both = double(torch.cat([x, y]).detach())
    k = median_kernel(both) if kernel is None else k
    gram = k(_squared_distances(both, both)).fill_diagonal_(0)
    generator = torch.Generator().manual_seed(seed)
    n, m = len(x), len(y)
    shuffled = [torch.randperm(n + m, generator=generator) for _ in range(num_permutations)]
    orders = torch.stack([torch.arange(n + m), *shuffled])
    first = torch.zeros(len(orders), n + m, dtype=both.dtype).scatter_(1, orders[:, :n], 1.0)
    first = first.to(gram.device)
    second = 1 - first
    from_first = first @ gram
    values = (from_first * first).sum(1) / (n * (n - 1))
    values += ((second @ gram) * second).sum(1) / (m * (m - 1))
    values -= 2 * (from_first * second).sum(1) / (n * m)
    tolerance = 1e-12 * gram.mean()  # permutations that change nothing are as great
    p_value = double(values >= values[0] - tolerance).mean()
    return TwoSampleTest(float(values[0]), float(p_value))


_MORE = ["more points, not all alike"]
_ALIKE = ["two samples of the same kind of points"]


def _checked(x: Tensor, y: Tensor, kernel: str | Kernel, least: int) -> Kernel:
    if min(x.dim(), y.dim()) < 2:
        actual = f"shapes {tuple(x.shape)} and {tuple(y.shape)}"
        raise ArgumentError("mmd", "points (..., N, D)", actual, ["x[:, None], for numbers"])
    dim, sizes = x.shape[-1], (x.shape[-2], y.shape[-2])
    if y.shape[-1] != dim:
        raise ArgumentError("mmd", f"points of {dim} entries", f"{y.shape[-1]} in y", _ALIKE)
    if min(sizes) < least:
        expected = f"at least {least} points in each sample"
        raise ArgumentError("mmd", expected, f"{sizes[0]} and {sizes[1]}", _ALIKE)
    return kernel_named(kernel, dim) if isinstance(kernel, str) else kernel


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    centre = b.detach().mean(-2, keepdim=True)  # so that little is lost in the difference
    a, b = a - centre, b - centre
    norms = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    return (norms - 2 * a @ b.transpose(-2, -1)).clamp(min=0)
