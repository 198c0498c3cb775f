"""Neighbours among codes, and distances between posteriors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn import functional as F

from pvae.distributions import is_point
from pvae.errors import ArgumentError, DataError, UndefinedError, check_int
from pvae.latent.coding import as_matrix
from pvae.types import Dist

__all__ = ["jeffreys", "nearest", "precision_at_k"]


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
    parts = []
    for some in codes.split(max_rows):
        distances = some.new_empty(len(some), 0)
        indices = distances.long()
        for start in range(0, len(gallery), max_rows):
            others = gallery[start : start + max_rows]
            if metric == "cosine":
                new = (1 - some @ others.T).clamp(min=0)
            else:
                new = torch.cdist(some, others, compute_mode="donot_use_mm_for_euclid_dist")
            here = torch.arange(start, start + len(others), device=codes.device)
            distances = torch.cat([distances, new], 1)
            indices = torch.cat([indices, here.expand_as(new)], 1)
            distances, order = distances.topk(min(k, distances.shape[1]), largest=False)
            indices = indices.gather(1, order)
        parts.append((indices, distances))
    return torch.cat([i for i, _ in parts]), torch.cat([d for _, d in parts])


def precision_at_k(labels: object, gallery_labels: object, indices: Tensor) -> Tensor:
    """How many of a code's k nearest have its label, as a share of k; the mean is the usual number.

    Arguments:
        labels: Of the codes, shape ``(N,)``.
        gallery_labels: Of the gallery, shape ``(M,)``.
        indices: From `nearest`, shape ``(N, k)``.

    Returns:
        One share for each code, shape ``(N,)``.

    Example:
        >>> precision_at_k([7, 8], [7, 7, 8], torch.tensor([[0, 1], [1, 2]]))
        tensor([1.0000, 0.5000])
    """
    own, others = (torch.as_tensor(y, device=indices.device) for y in (labels, gallery_labels))
    fits = own.dim() == others.dim() == 1 and len(own) == len(indices)
    if not fits or int(indices.max()) >= len(others):
        expected = f"one for each of the {len(indices)} codes, and one for each of the gallery"
        actual = f"shapes {tuple(own.shape)} and {tuple(others.shape)}"
        raise DataError("labels", expected, actual)
    hits = others[indices] == own.unsqueeze(1)
    return hits.to(torch.get_default_dtype()).mean(1)


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
