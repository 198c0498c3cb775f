"""Vector arithmetic on codes, their neighbours, and distances between posteriors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn import functional as F

from pvae.annotations import Finite, strict
from pvae.data.arrays import as_array
from pvae.distributions import is_point
from pvae.errors import ArgumentError, DataError, UndefinedError, check_int
from pvae.latent.coding import as_matrix
from pvae.types import Dist

__all__ = [
    "analogy",
    "attribute_vector",
    "interpolate",
    "jeffreys",
    "nearest",
    "precision_at_k",
    "traverse",
]


@strict
def interpolate(
    a: Finite, b: Finite, steps: int, kind: Literal["linear", "spherical"] = "linear"
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


@strict
def attribute_vector(codes: Finite, has_attribute: object) -> Tensor:
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
    has = torch.as_tensor(as_array("has_attribute", has_attribute), device=codes.device)
    if has.dtype != torch.bool or has.shape != codes.shape[:1]:
        expected = f"booleans of shape ({len(codes)},)"
        actual = f"{str(has.dtype).removeprefix('torch.')} of shape {tuple(has.shape)}"
        raise ArgumentError("has_attribute", expected, actual, ["labels == 3"])
    count = int(has.sum())
    if count in (0, len(has)):
        raise DataError("has_attribute", "codes with the attribute and without", f"{count} with it")
    return codes[has].mean(0) - codes[~has].mean(0)


@strict
def analogy(a: Finite, b: Finite, c: Finite) -> Tensor:
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
    if len({tuple(code.shape[-1:]) for code in (a, b, c)}) > 1:
        actual = f"shapes {tuple(a.shape)}, {tuple(b.shape)}, {tuple(c.shape)}"
        fixes = ["codes of one pair"]
        raise ArgumentError("analogy", "codes of one length", actual, fixes)
    return c + b - a


@strict
def traverse(z: Finite, dims: Sequence[int], values: object) -> Tensor:
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
        raise ArgumentError("traverse", expected, actual, ["z=codes[0]", "values=[-1.0, 1.0]"])
    copies = z.repeat(len(dims), len(values), 1)
    for i, dim in enumerate(dims):
        if check_int("dims", dim, 0) >= len(z):
            raise ArgumentError(
                "dims", f"dimensions from 0 to {len(z) - 1}", str(dim), ["dims=[0]"]
            )
        copies[i, :, dim] = values
    return copies


@strict
def nearest(
    codes: Tensor,
    gallery: Tensor,
    k: int,
    *,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    max_rows: int = 2048,
) -> tuple[Tensor, Tensor]:
    """The k codes of a gallery that are nearest to each code.

    Arguments:
        codes: Shape ``(N, d)``.
        gallery: Shape ``(M, d)``. A code that is in it, too, finds itself.
        k: How many, at most M.
        metric: ``"euclidean"``, or ``"cosine"``: 1 minus the cosine of the angle.
        max_rows: Rows of each that are compared at once; memory grows with its square.

    Returns:
        Indices into the gallery, nearest first, and distances; both of shape ``(N, k)``.

    Raises:
        DataError: If either is no finite matrix.

    Example:
        >>> nearest(torch.tensor([[0.0]]), torch.tensor([[3.0], [-1.0], [2.0]]), k=2)
        (tensor([[1, 2]]), tensor([[1., 2.]]))
    """
    codes, gallery = as_matrix("codes", codes), as_matrix("gallery", gallery)
    if gallery.shape[1] != codes.shape[1]:
        raise DataError("gallery", f"codes of {codes.shape[1]} dimensions", f"{gallery.shape[1]}")
    if check_int("k", k) > len(gallery):
        raise ArgumentError("k", f"at most {len(gallery)}, the gallery's size", str(k))
    if metric not in ("euclidean", "cosine"):
        raise ArgumentError("metric", "'euclidean' or 'cosine'", repr(metric))
    if metric == "cosine":
        codes, gallery = F.normalize(codes, dim=1), F.normalize(gallery, dim=1)
    places = torch.arange(len(gallery), device=codes.device)
    parts = []
    for some in codes.split(max_rows):
        distances = some.new_empty(len(some), 0)
        indices = distances.long()
        for here, others in zip(places.split(max_rows), gallery.split(max_rows), strict=True):
            if metric == "cosine":
                new = (1 - some @ others.T).clamp(min=0)
            else:
                new = torch.cdist(some, others, compute_mode="donot_use_mm_for_euclid_dist")
            distances = torch.cat([distances, new], 1)
            indices = torch.cat([indices, here.expand_as(new)], 1)
            distances, order = distances.topk(min(k, distances.shape[1]), largest=False)
            indices = indices.gather(1, order)
        parts.append((indices, distances))
    indices, distances = (torch.cat(part) for part in zip(*parts, strict=True))
    return indices, distances


@strict
def precision_at_k(labels: object, gallery_labels: object, indices: Tensor | np.ndarray) -> Tensor:
    """How many of a code's k nearest have its label, as a share of k; the mean is the usual number.

    Arguments:
        labels: Labels of the codes, shape ``(N,)``.
        gallery_labels: Labels of the gallery, shape ``(M,)``.
        indices: From `nearest`, shape ``(N, k)``.

    Returns:
        One share for each code, shape ``(N,)``.

    Example:
        >>> precision_at_k([7, 8], [7, 7, 8], torch.tensor([[0, 1], [1, 2]]))
        tensor([1.0000, 0.5000])
    """
    indices = torch.as_tensor(indices)
    own, others = (torch.as_tensor(y, device=indices.device) for y in (labels, gallery_labels))
    fits = own.dim() == others.dim() == 1 and len(own) == len(indices)
    if not fits or int(indices.max()) >= len(others):
        expected = f"one for each of the {len(indices)} codes, and one for each of the gallery"
        actual = f"shapes {tuple(own.shape)} and {tuple(others.shape)}"
        fixes = ["labels of both, one for each code"]
        raise DataError("labels", expected, actual, fixes)
    hits = others[indices] == own.unsqueeze(1)
    return hits.to(torch.get_default_dtype()).mean(1)


@strict
def jeffreys(q_a: Dist, q_b: Dist) -> Tensor:
    r"""A distance between posteriors, the symmetric Kullback-Leibler divergence in nats.

    .. math:: J(a, b) = KL(q_a \| q_b) + KL(q_b \| q_a)

    References:
        An invariant form for the prior probability in estimation problems (Jeffreys, 1946),
        https://doi.org/10.1098/rspa.1946.0056

    Arguments:
        q_a: A distribution, such as ``vae.guide.posterior(x)``.
        q_b: Another; batch shapes broadcast, so ``(N, 1)`` against ``(M,)`` gives all pairs.

    Returns:
        The broadcast batch shape.

    Raises:
        UndefinedError: If one is a point mass, or their divergence isn't known in closed form.

    Example:
        >>> loc = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> q = dist.Normal(loc, 1.0).to_event(1)
        >>> jeffreys(dist.Normal(loc.unsqueeze(1), 1.0).to_event(1), q)
        tensor([[0., 1.],
                [1., 0.]])
    """
    fixes = ["nearest, by the euclidean distance of codes"]
    for name, q in (("q_a", q_a), ("q_b", q_b)):
        if is_point(q):
            where, expected = f"jeffreys, {name}", "a distribution with a density"
            raise UndefinedError(where, expected, "a point mass (Delta)", fixes)
    try:
        return kl_divergence(q_a, q_b) + kl_divergence(q_b, q_a)
    except NotImplementedError:
        expected = "two distributions whose divergence is known in closed form"
        actual = f"{type(q_a).__name__} and {type(q_b).__name__}"
        raise UndefinedError("jeffreys", expected, actual, fixes) from None
