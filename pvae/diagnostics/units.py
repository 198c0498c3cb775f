"""Which dimensions of a latent are used."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from pvae import terms as t
from pvae.errors import check_int
from pvae.latent.coding import means_and_noise
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.terms import only_site

__all__ = ["active_units"]


@tool
def active_units(
    pair: PairLike,
    data: Any,
    *,
    site: str | None = None,
    threshold: float = 1e-2,
    num_particles: int = 32,
    **options: Unpack[Options],
) -> Tensor:
    r"""Which dimensions of a latent depend on the data.

    Dimension d is active if :math:`\mathrm{Var}_n(E_q[z_d | x_n])` exceeds a threshold. The inner
    mean is the guide's own where it is known; otherwise it is one over draws, whose noise is taken
    off the variance.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        site: The latent; None if the pair has one.
        threshold: Of the variance; the paper's is 0.01.
        num_particles: Draws for the mean, where it isn't known.
        options: As in `pvae.options.Options`.

    Returns:
        True where active, shape ``latent_shape``.
    """
    check_int("num_particles", num_particles, minimum=2)
    with t.prepared(pair, data, options, "active_units") as evaluation:
        structure = evaluation.structure
        site = only_site("active_units", "latent of the data", structure.latents, site)
        check_int("active_units, rows of data", evaluation.num_rows, minimum=2)
        means, noise = means_and_noise(evaluation, site, num_particles)
    return means.double().var(0) - noise.double().mean(0) > threshold
