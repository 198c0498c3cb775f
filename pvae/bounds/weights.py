"""The log importance weights of a pair, all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pvae import randomness
from pvae import terms as t
from pvae.bounds.prepare import prepare
from pvae.errors import UndefinedError, check_int, oxford

__all__ = ["log_weights"]


def log_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    num_particles: int = 1000,
    *,
    plate: str | None = None,
    structure: t.Structure | None = None,
    max_rows: int = 8192,
    seed: int = 0,
) -> Tensor:
    r"""The log importance weight of each draw from the guide, for each datum.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} | x_n), \quad z_{kn} \sim q(z | x_n)

    Their mean over k estimates the ELBO, the log of the mean of the weights estimates the evidence.
    All K * N of them are kept; `bounds.elbo` and `bounds.evidence` keep only their sums.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Arguments:
        model: A Pyro program.
        guide: Its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: K, draws for each datum.
        plate: Name of the data plate, where the batch's length doesn't tell.
        structure: What `pvae.terms.inspect_pair` found, if it is known.
        max_rows: Bound on the rows that are run at once, counting each particle of a datum as one.
        seed: Of the draws; the caller's generators are left as they are.

    Returns:
        Shape ``(K, N)`` in nats, double precision, on the pair's device.

    Raises:
        UndefinedError: If a latent of a datum has a point-mass guide or an improper prior, or
            there are sites outside the data plate, whose weight is no single datum's.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> log_weights(vae.model, vae.guide, torch.zeros(5, 4), 10).shape
        torch.Size([10, 5])
    """
    check_int("num_particles", num_particles)
    with randomness.forked(seed):
        source, structure = prepare(model, guide, data, structure, plate)
        structure.require_density("importance weights")
        structure.require_proper("importance weights")
        if structure.global_sites:
            raise UndefinedError(
                "importance weights per datum",
                "a pair whose sites are all inside the data plate",
                f"global site {oxford(structure.global_sites)}",
                ["bounds.evidence, for the data set"],
            )
        found: dict[int, list[Tensor]] = {}  # by a chunk's first row: its particles, in parts
        for rows, terms in t.stream(model, guide, source, structure, num_particles, max_rows):
            found.setdefault(rows.start, []).append(terms.log_weight.double())
        return torch.cat([torch.cat(parts) for parts in found.values()], 1)
