"""Codes of data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Unpack

import torch
from torch import Tensor

from pvae.data import as_source, check_rows
from pvae.errors import DataError, UndefinedError, check_int
from pvae.options import Options, tool
from pvae.pair import PairLike, rows_to
from pvae.terms import Evaluation, Terms, mean_of, only_site, prepared, stream

__all__ = ["as_matrix", "codes", "means_and_noise"]

NUM_PARTICLES_OF_MEAN = 32


@tool
def codes(
    pair: PairLike,
    data: object,
    *,
    site: str | None = None,
    num_particles: int | None = None,
    num_particles_of_mean: int = NUM_PARTICLES_OF_MEAN,
    **options: Unpack[Options],
) -> Tensor:
    r"""The code of each datum, :math:`E_q[z | x_n]`, or draws from q(z | x).

    The mean is exact where the guide's distribution knows its mean and nothing random feeds it; a
    point mass is its own. Otherwise it is one over draws, also of what comes before the site.

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        site: The latent; None if the pair has one.
        num_particles: K draws from the guide for each datum; None for the mean.
        num_particles_of_mean: Draws that the mean is estimated from, where it isn't exact.
        options: As in `pvae.options.Options`.

    Returns:
        Shape ``(N, *latent_shape)``, or ``(K, N, *latent_shape)``, on the pair's device.

    Raises:
        UndefinedError: If there is more than one latent to choose from, or q has no mean.

    Example:
        >>> autoencoder = pvae.recipes.ae(64, 2)
        >>> codes(autoencoder, torch.zeros(5, 64)).shape
        torch.Size([5, 2])
    """
    check_int("num_particles_of_mean", num_particles_of_mean)
    if num_particles is not None:
        check_int("num_particles", num_particles)
    with prepared(pair, data, options, "codes") as evaluation:
        structure = evaluation.structure
        site = only_site("codes", "latent of the data", structure.latents, site)
        if num_particles is not None:
            passes = stream(evaluation, num_particles)
            draws = _by_rows(passes, lambda terms: _draws(terms, site))
            return torch.cat([torch.cat(parts) for parts in draws], 1)
        means, _ = means_and_noise(evaluation, site, num_particles_of_mean)
    return means


def means_and_noise(
    evaluation: Evaluation, site: str, num_particles: int = NUM_PARTICLES_OF_MEAN
) -> tuple[Tensor, Tensor]:
    """:math:`E_q[z | x_n]` as `codes` has it, and its variance from being one over draws."""
    structure = evaluation.structure
    drawn = (*structure.latents, *structure.global_latents, *structure.auxiliary)
    passes = stream(evaluation, 1 if drawn == (site,) else num_particles)
    with contextlib.closing(passes):
        _, terms = next(passes)
    k = 1 if _is_exact(terms, site) else num_particles

    def sums(terms: Terms) -> Tensor:
        means = _means(terms, site)
        return torch.stack([means.sum(0), means.square().sum(0)])

    parts = [torch.stack(p).sum(0) for p in _by_rows(stream(evaluation, k), sums)]
    first, second = torch.cat(parts, 1) / k
    if missing := int(first.isnan().reshape(len(first), -1).any(1).sum()):
        where, expected = f"mean of q at site '{site}'", "a distribution that has a mean"
        actual = f"{type(terms.sites[site].guide).__name__} whose mean is NaN, for {missing} data"
        raise UndefinedError(where, expected, actual, ["num_particles=1, for a draw"])
    return first, (second - first.square()).clamp(min=0) / max(k - 1, 1)


def _by_rows(
    passes: Iterable[tuple[slice, Terms]], pick: Callable[[Terms], Tensor]
) -> list[list[Tensor]]:
    """What each chunk of data has, pass by pass: its particles may come in several."""
    parts: dict[int, list[Tensor]] = {}
    for rows, terms in passes:
        parts.setdefault(rows.start, []).append(pick(terms))
    return list(parts.values())


def _draws(terms: Terms, site: str) -> Tensor:
    value = terms.sites[site].value
    assert value is not None  # noqa: S101
    return value


def _means(terms: Terms, site: str) -> Tensor:
    """The guide's mean for each particle and datum, ``(K, N, ...)``; the draw if it isn't known."""
    means = []
    for one in terms.passes:
        draws, axis = one.sites[site].draws, one.sites[site].data_axis
        assert draws is not None  # noqa: S101
        mean = mean_of(one.sites[site].guide)
        shape = [-1 if i == axis else size for i, size in enumerate(draws.shape)]
        each = draws if mean is None else mean.reshape(shape)
        means.append(rows_to(1, axis, each)[:, : terms.num_rows])  # the mean is of all rows
    return torch.cat(means)


def _is_exact(terms: Terms, site: str) -> bool:
    """Whether the guide's mean is known, and the same whatever has been drawn before."""
    means = _means(terms, site)
    is_known = all(mean_of(one.sites[site].guide) is not None for one in terms.passes)
    return is_known and bool((means == means[:1]).all())


def as_matrix(where: str, codes: Tensor) -> Tensor:
    """Codes without their gradient; refuses what is no finite matrix of real numbers."""
    is_tensor = isinstance(codes, Tensor)
    if not is_tensor or codes.dim() != 2 or not codes.is_floating_point():
        actual = f"shape {tuple(codes.shape)}, {codes.dtype}" if is_tensor else type(codes).__name__
        fixes = ["codes.flatten(1)", "torch.as_tensor(array)"]
        raise DataError(where, "a floating tensor of shape (N, d)", actual, fixes)
    codes = codes.detach()
    check_rows(as_source(codes, codes.device, codes.dtype), where=where)
    return codes
