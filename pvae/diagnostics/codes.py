"""Which dimensions of codes are used, how sparse codes are, and how they move with their data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Unpack

import torch
from pyro import poutine
from torch import Tensor

from pvae import terms
from pvae.annotations import Finite, strict
from pvae.devices import double
from pvae.diagnostics.thresholds import ACTIVITY
from pvae.errors import UndefinedError, check_int, check_number
from pvae.jacobian import squared_jacobian_norm
from pvae.latent.coding import means_and_noise
from pvae.modes import evaluating
from pvae.options import Options, tool
from pvae.pair import PairLike, rows_from, rows_to

__all__ = ["active_units", "hoyer", "near_zero", "sensitivity"]


@tool
def active_units(
    pair: PairLike,
    data: object,
    *,
    site: str | None = None,
    threshold: float = ACTIVITY,
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
        threshold: Threshold of the variance; the paper's is 0.01.
        num_particles: Draws for the mean, where it isn't known.
        options: As in `pvae.options.Options`.

    Returns:
        True where active, shape ``latent_shape``.
    """
    check_int("num_particles", num_particles, minimum=2)
    check_number("threshold", threshold, minimum=0)
    with terms.prepared(pair, data, options, "active_units") as evaluation:
        structure = evaluation.structure
        site = terms.only_site("active_units", "latent of the data", structure.latents, site)
        check_int("active_units, rows of data", evaluation.num_rows, minimum=2)
        means, noise = means_and_noise(evaluation, site, num_particles)
    return double(means).var(0) - double(noise).mean(0) > threshold


@strict
def hoyer(codes: Finite) -> Tensor:
    r"""How sparse each code is, whatever its scale: 0 if all entries are alike, 1 if one is not 0.

    .. math:: \frac{\sqrt d - \|z\|_1 / \|z\|_2}{\sqrt d - 1}

    A code of zeros alone counts as sparse, 1.

    References:
        Non-negative Matrix Factorization with Sparseness Constraints (Hoyer, 2004),
        https://www.jmlr.org/papers/v5/hoyer04a.html

    Arguments:
        codes: Shape ``(..., d)``, d at least 2.

    Example:
        >>> hoyer(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, 1.0]]))
        tensor([1., 0.])
    """
    root = check_int("hoyer: entries of a code", codes.shape[-1], minimum=2) ** 0.5
    norm = torch.linalg.vector_norm(codes, dim=-1)
    ratio = codes.abs().sum(-1) / torch.where(norm > 0, norm, 1.0)
    return torch.where(norm > 0, (root - ratio) / (root - 1), 1.0)


@strict
def near_zero(codes: Finite, threshold: float = 0.01) -> Tensor:
    """Share of each code's entries that are near 0, whatever the codes' scale.

    Arguments:
        codes: Shape ``(N, d)``.
        threshold: What counts as near, in units of the root mean square of all entries.

    Example:
        >>> near_zero(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        tensor([0.5000, 0.0000])
    """
    limit = check_number("threshold", threshold, minimum=0) * codes.square().mean().sqrt()
    return (codes.abs() <= limit).to(codes.dtype).mean(-1)


@tool
def sensitivity(
    pair: PairLike,
    data: object,
    *,
    site: str | None = None,
    num_probes: int | None = None,
    **options: Unpack[Options],
) -> Tensor:
    r"""How far a code moves with its datum, :math:`\|\partial z / \partial x\|_F`.

    z is the code, or the mean of a stochastic guide, in evaluation mode. The norm scales with the
    codes; divided by their spread, ``codes.var(0).sum().sqrt()``, it compares between pairs.

    References:
        Contractive Auto-Encoders (Rifai et al., 2011),
        https://icml.cc/2011/papers/455_icmlpaper.pdf

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source; the first is differentiated.
        site: The latent; None if the pair has one.
        num_probes: Random directions for an estimate (see `pvae.jacobian`); None for exact norms.
        options: As in `pvae.options.Options`.

    Returns:
        Shape ``(N,)``.

    Raises:
        UndefinedError: If the mean of q isn't known.
    """
    with terms.prepared(pair, data, options, "sensitivity") as evaluation:
        structure = evaluation.structure
        name = terms.only_site("sensitivity", "latent of the data", structure.latents, site)
        if structure.has_plate and not structure.takes_any_rows:
            raise UndefinedError(
                "sensitivity",
                "a pair that runs on any rows it is given",
                "one that subsamples its data, or runs on one number of rows alone",
                ["pyro.plate(name, len(x)), with no subsample"],
            )

        axis = structure.axes[0] if structure.axes else None

        def code(x: Tensor, context: Sequence[Tensor]) -> Tensor:
            batch = rows_from(0, axis, x), *context
            fn = poutine.trace(structure.guide).get_trace(*batch).nodes[name]["fn"]
            mean = terms.mean_of(fn)
            if mean is None:
                expected = "a distribution whose mean is known"
                raise UndefinedError(f"site '{name}'", expected, type(fn).__name__)
            return rows_to(0, structure.axis_in(mean.dim() - len(fn.event_shape)), mean)

        squares = []
        with evaluating(structure.modules):
            for _, (x, *context) in evaluation.source.all(evaluation.max_rows):
                x = x if x.is_floating_point() else x.to(structure.dtype)
                encode = functools.partial(code, context=context)
                rows = rows_to(0, axis, x)
                squares.append(squared_jacobian_norm(encode, rows, num_probes=num_probes))
    return torch.cat(squares).sqrt()
