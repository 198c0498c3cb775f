"""Which dimensions of a latent are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pvae import bounds, randomness
from pvae import terms as t
from pvae.errors import check_int
from pvae.latent.checks import only_site
from pvae.latent.coding import means_and_noise

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
    check_int("num_particles", num_particles, minimum=2)
    with randomness.forked(seed):
        source, structure = bounds.prepare(model, guide, data, structure)
        site = only_site("active_units", "latent of the data", structure.latents, site)
        check_int("active_units, rows of data", source.num_rows, minimum=2)
        means, noise = means_and_noise(
            model, guide, source, structure, site, num_particles, max_rows
        )
    return means.double().var(0) - noise.double().mean(0) > threshold
