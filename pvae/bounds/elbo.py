"""The evidence lower bound, and the bound for a data set."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from pvae.bounds.weights import Sums, WeightSums, facts
from pvae.errors import check_int
from pvae.estimate import Estimate
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.terms import Evaluation, Terms, draw_globals, prepared, stream

__all__ = ["elbo", "with_globals"]

_NAMES = {"elbo": "ELBO", "log_joint": "log joint", "unnormalised_elbo": "unnormalised ELBO"}


@tool
def elbo(pair: PairLike, data: Any, num_particles: int = 1, **options: Unpack[Options]) -> Estimate:
    r"""The evidence lower bound of each datum, split into distortion and rate.

    .. math::
        L_n = E_q[\log p(x_n | z)] - E_q[\log q(z | x_n) - \log p(z)] = -D_n - R_n

    With a point-mass guide there is no such bound; the result is then named "log joint", is
    :math:`\log p(x_n, z_n)` at the code, and has no rate. With an improper prior it is named
    "unnormalised ELBO". With sites outside the data plate it is the bound for the data set, all of
    them included, and ``num_particles`` counts draws of those.

    References:
        Fixing a Broken ELBO (Alemi et al., 2018), https://arxiv.org/abs/1711.00464

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: K, draws for each datum.
        options: As in `pvae.options.Options`.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> found = elbo(vae, torch.zeros(5, 4), 10)
        >>> bool(torch.allclose(found.values, -found.distortion.values - found.rate.values))
        True
    """
    k = check_int("num_particles", num_particles)
    with prepared(pair, data, options, "elbo") as evaluation:
        structure = evaluation.structure
        name = _NAMES[structure.quantity]
        if structure.global_sites:
            return with_globals(name, evaluation, k, 1)
        sums, is_split = Sums(), True
        for rows, terms in stream(evaluation, k):
            is_split = not terms.is_joint
            sums.add(rows, _parts(terms, is_split=is_split))
    values, square, likelihood, rate = sums.all / k
    variances = (square - values.square()).clamp(min=0) / (k - 1) if k > 1 else None
    has_rate = is_split and not structure.has_points and not structure.improper
    return Estimate(
        name,
        values,
        variances,
        num_particles=k,
        distortion=Estimate("distortion", -likelihood, num_particles=k) if is_split else None,
        rate=Estimate("rate", rate, num_particles=k) if has_rate else None,
        **facts(structure),
    )


def _parts(terms: Terms, *, is_split: bool) -> Tensor:
    """Sums over particles of log weight, its square, log likelihood and rate, ``(4, n)``."""
    log_weight = terms.log_weight.double()
    likelihood = rate = log_weight
    if is_split:
        likelihood = terms.log_likelihood.double()
        rate = (terms.log_q - terms.log_prior).double()
    return torch.stack([log_weight, log_weight.square(), likelihood, rate]).sum(1)


def with_globals(name: str, evaluation: Evaluation, num_global: int, num_local: int) -> Estimate:
    """The data set's bound: each draw of what is outside the data plate is shared by all data."""
    totals, num_data = [], evaluation.num_rows
    for _ in range(num_global):
        given, first = draw_globals(evaluation)
        weights = WeightSums()
        for rows, terms in stream(evaluation, num_local, given):
            weights.add(rows, weights.reduce(terms.log_weight))
        values = weights.estimate(name, num_local, evaluation.structure).values
        totals.append((first.global_log_p[0] - first.global_log_q[0]).double() + values.sum())
        num_data = len(values)
    return Estimate(
        name,
        torch.stack(totals),
        by="draw",
        num_data=num_data,
        num_particles=num_local,
        **facts(evaluation.structure),
    )
