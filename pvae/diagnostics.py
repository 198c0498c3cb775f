"""What a fit is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pvae import bounds, randomness
from pvae import terms as t
from pvae.data import Source
from pvae.errors import UndefinedError

__all__ = ["active_units"]


def active_units(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    site: str | None = None,
    threshold: float = 1e-2,
    structure: t.Structure | None = None,
    num_particles: int = 32,
    max_rows: int = 8192,
    seed: int = 0,
) -> Tensor:
    r"""Which dimensions of a latent depend on the data.

    Dimension d is active if :math:`\mathrm{Var}_n(E_q[z_d | x_n])` exceeds a threshold. The inner
    mean is the guide's own where it is known; otherwise it is one over draws, whose noise is taken
    off the variance.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Arguments:
        model: A Pyro program.
        guide: Its guide.
        data: An array, tensor, tuple of them, data set or source.
        site: The latent; None if the pair has one.
        threshold: Of the variance; the paper's is 0.01.
        structure: What `pvae.terms.inspect_pair` found, if it is known.
        num_particles: Draws for the mean, where it isn't known.
        max_rows: Bound on the rows in memory at once.
        seed: Of the draws.

    Returns:
        True where active, shape ``latent_shape``.
    """
    source, structure = bounds.prepare(model, guide, data, structure)
    if site is None:
        if len(structure.latents) != 1:
            raise UndefinedError(
                "active_units",
                "a site, as the pair doesn't have exactly one latent of its data",
                ", ".join(structure.latents) or "none",
                [f"site='{name}'" for name in structure.latents[:2]],
            )
        site = structure.latents[0]
    size = structure.subsample_size or 1
    with randomness.forked(seed):
        means, _ = _means(model, guide, source, structure, site, 1, max_rows)
        if means is None:
            rows = max(max_rows, num_particles * size)  # all draws of a datum in one chunk
            means, noise = _means(model, guide, source, structure, site, num_particles, rows)
            assert means is not None  # noqa: S101
            return means.var(0) - noise > threshold
    return means.var(0) > threshold


def _means(
    model: Any,
    guide: Any,
    source: Source,
    structure: t.Structure,
    site: str,
    num_particles: int,
    max_rows: int,
) -> tuple[Tensor | None, Tensor]:
    """E_q[z | x_n] for each datum, and what the noise of draws adds to its variance over data.

    With one particle, None if the guide's own mean isn't known.
    """
    means, noise = [], torch.zeros((), device=structure.device)
    for _, terms in t.stream(model, guide, source, structure, num_particles, max_rows):
        found = terms.sites[site]
        assert found.value is not None  # noqa: S101
        draws = found.value.double()
        exact = _mean(found.guide, found.value)
        if exact is not None:
            means.append(exact.double())
        elif num_particles == 1:
            return None, noise
        else:
            means.append(draws.mean(0))
            noise = noise + (draws.var(0) / len(draws)).sum(0)
    return torch.cat(means), noise / source.num_rows


def _mean(fn: Any, value: Tensor) -> Tensor | None:
    """The guide's mean for each datum, if it is known and has the shape of a draw."""
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError):
        return None
    mean = mean[0] if mean.dim() == value.dim() else mean
    return mean if mean.shape == value.shape[1:] else None
