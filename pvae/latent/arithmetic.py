"""Vector arithmetic on codes: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pvae.errors import ArgumentError, DataError, check_int

__all__ = ["analogy", "attribute_vector", "interpolate", "traverse"]


def interpolate(
    a: Tensor, b: Tensor, steps: int, kind: Literal["linear", "spherical"] = "linear"
) -> Tensor:
    r"""Codes on the way from a to b, both ends included.

    With the angle :math:`\omega` between a and b, and t from 0 to 1:

    .. math::
        \text{linear: } (1 - t)\, a + t\, b, \qquad \text{spherical: }
        \frac{\sin((1 - t)\, \omega)}{\sin \omega}\, a + \frac{\sin(t\, \omega)}{\sin \omega}\, b

    Draws from N(0, I) in many dimensions have nearly equal norms, and the line between two of them
    passes through smaller ones; on the great circle all have the norm of the ends. Where that isn't
    defined (a and b parallel, opposite, or zero) the line is taken.

    References:
        Sampling Generative Networks (White, 2016), https://arxiv.org/abs/1609.04468

    Arguments:
        a: Shape ``(..., d)``; each vector of d is a code.
        b: The same, or what broadcasts.
        steps: Number of codes, at least 2.
        kind: ``"linear"`` or ``"spherical"``.

    Returns:
        Shape ``(steps, ..., d)``.

    Example:
        >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> interpolate(a, b, 3, "spherical")
        tensor([[1.0000, 0.0000],
                [0.7071, 0.7071],
                [0.0000, 1.0000]])
    """
    if kind not in ("linear", "spherical"):
        raise ArgumentError("kind", "'linear' or 'spherical'", repr(kind))
    a, b = torch.broadcast_tensors(a, b)
    where = torch.linspace(0, 1, check_int("steps", steps, 2), dtype=a.dtype, device=a.device)
    where = where.reshape(-1, *(1,) * a.dim())
    if kind == "linear":
        return torch.lerp(a, b, where)
    size_a, size_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    u, v = a / size_a.where(size_a > 0, 1), b / size_b.where(size_b > 0, 1)
    apart, along = (u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(apart, along)  # exact also near 0 and pi, as arccos isn't
    sine = angle.sin()
    straight = (sine < torch.finfo(a.dtype).eps ** 0.5) | (size_a == 0) | (size_b == 0)
    circle = ((1 - where) * angle).sin() * a + (where * angle).sin() * b
    return torch.where(straight, torch.lerp(a, b, where), circle / sine.where(~straight, 1))


def attribute_vector(codes: Tensor, has_attribute: object) -> Tensor:
    """The direction of an attribute: the mean code of those that have it, minus the others'.

    Added to a code it gives, or subtracted takes away, the attribute. It also has whatever else
    goes with the attribute in these data.

    References:
        Autoencoding beyond pixels using a learned similarity metric (Larsen et al., 2016),
        https://arxiv.org/abs/1512.09300

    Arguments:
        codes: Shape ``(N, *latent_shape)``.
        has_attribute: Booleans, shape ``(N,)``.

    Returns:
        Shape ``latent_shape``.

    Raises:
        DataError: If all have the attribute, or none has.

    Example:
        >>> attribute_vector(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), [False, True])
        tensor([2., 0.])
    """
    has = torch.as_tensor(has_attribute, device=codes.device)
    if has.dtype != torch.bool or has.shape != codes.shape[:1]:
        expected = f"booleans of shape ({len(codes)},)"
        actual = f"{str(has.dtype).removeprefix('torch.')} of shape {tuple(has.shape)}"
        raise ArgumentError("has_attribute", expected, actual, ["labels == 3"])
    count = int(has.sum())
    if count in (0, len(has)):
        raise DataError("has_attribute", "codes with the attribute and without", f"{count} with it")
    return codes[has].mean(0) - codes[~has].mean(0)


def analogy(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The d that is to c as b is to a: the parallelogram's corner, c + b - a.

    References:
        Sampling Generative Networks (White, 2016), https://arxiv.org/abs/1609.04468

    Arguments:
        a: Codes, shape ``(..., *latent_shape)``.
        b: The same.
        c: The same.

    Example:
        >>> analogy(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([5.0, 5.0]))
        tensor([6., 5.])
    """
    return c + b - a


def traverse(z: Tensor, dims: Sequence[int], values: object) -> Tensor:
    """Copies of a code, each with one dimension set to a value.

    Arguments:
        z: A code, shape ``(d,)``.
        dims: The dimensions, D of them.
        values: The values, V of them, for each dimension.

    Returns:
        Shape ``(D, V, d)``.

    Example:
        >>> traverse(torch.zeros(3), dims=[0, 2], values=[-1.0, 1.0])
        tensor([[[-1.,  0.,  0.],
                 [ 1.,  0.,  0.]],
                [[ 0.,  0., -1.],
                 [ 0.,  0.,  1.]]])
    """
    values = torch.as_tensor(values, dtype=z.dtype, device=z.device)
    if z.dim() != 1 or values.dim() != 1:
        expected = "one code of shape (d,) and values of shape (V,)"
        actual = f"shapes {tuple(z.shape)} and {tuple(values.shape)}"
        raise ArgumentError("traverse", expected, actual)
    copies = z.repeat(len(dims), len(values), 1)
    for i, dim in enumerate(dims):
        if check_int("dims", dim, 0) >= len(z):
            raise ArgumentError("dims", f"dimensions from 0 to {len(z) - 1}", str(dim))
        copies[i, :, dim] = values
    return copies
