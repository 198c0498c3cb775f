"""The evidence lower bound, and the bound for a data set."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor

from pvae import terms as t
from pvae.bounds.result import Bound, Kind
from pvae.bounds.sums import WeightSums
from pvae.errors import check_int
from pvae.options import Options, tool
from pvae.pair import PairLike

__all__ = ["elbo", "kind_of", "with_globals"]


@tool
def elbo(
    pair: PairLike,
    data: Any,
    num_particles: int = 1,
    **options: Unpack[Options],
) -> Bound:
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
    """
    check_int("num_particles", num_particles)
    with t.prepared(pair, data, options, "elbo") as evaluation:
        structure = evaluation.structure
        name = _NAMES[structure.quantity]
        if structure.global_sites:
            return with_globals(name, evaluation, num_particles, 1)
        moments = _Moments(structure)
        for rows, terms in t.stream(evaluation, num_particles):
            moments.add(rows, terms)
        return moments.bound(name, num_particles)


def kind_of(structure: t.Structure) -> Kind:
    """What an average of log weights is: a lower bound, or none with a point mass."""
    return "lower" if structure.quantity == "elbo" else "none"


_NAMES = {"elbo": "ELBO", "log_joint": "log joint", "unnormalised_elbo": "unnormalised ELBO"}


class _Moments:
    """Sums over particles of the ELBO, its square, and its likelihood, chunk by chunk."""

    def __init__(self, structure: t.Structure) -> None:
        self.structure = structure
        self.sums: dict[int, Tensor] = {}  # by a chunk's first row; (4, rows)
        self.is_split = True

    def add(self, rows: slice, terms: t.Terms) -> None:
        log_weight = terms.log_weight.double()
        self.is_split = not terms.is_joint
        likelihood, rate = log_weight, log_weight
        if self.is_split:
            likelihood = terms.log_likelihood.double()
            rate = (terms.log_q - terms.log_prior).double()
        parts = (log_weight, log_weight.square(), likelihood, rate)
        new = torch.stack([part.sum(0) for part in parts])
        known = self.sums.get(rows.start)
        self.sums[rows.start] = new if known is None else known + new

    def bound(self, name: str, k: int) -> Bound:
        values, square, likelihood, rate = torch.cat(list(self.sums.values()), 1) / k
        variance = (square - values.square()).clamp(min=0) / (k - 1) if k > 1 else None
        common: dict[str, Any] = {"num_data": len(values), "num_particles": k}

        def part(part_name: str, part_values: Tensor) -> Bound:
            total = float(part_values.sum())
            return Bound(part_name, part_values, total, None, kind="none", **common)

        has_rate = self.is_split and not self.structure.has_points and not self.structure.improper
        return Bound(
            name,
            values,
            float(values.sum()),
            None if variance is None else math.sqrt(float(variance.sum())),
            distortion=part("distortion", -likelihood) if self.is_split else None,
            rate=part("rate", rate) if has_rate else None,
            removed_scales=self.structure.removed_scales,
            kind=kind_of(self.structure),
            **common,
        )


def with_globals(
    name: str,
    evaluation: t.Evaluation,
    num_global: int,
    num_local: int,
) -> Bound:
    """The data set's bound: each draw of what is outside the data plate is shared by all data."""
    totals, num_data = [], evaluation.num_rows
    for _ in range(num_global):
        given, first = t.draw_globals(evaluation)
        outside = float(first.global_log_p[0] - first.global_log_q[0])
        weights = WeightSums()
        for rows, terms in t.stream(evaluation, num_local, given):
            weights.add(rows, weights.reduce(terms.log_weight))
        values, *_ = weights.values(num_local)
        totals.append(outside + float(values.sum()))
        num_data = len(values)
    draws = torch.tensor(totals, dtype=torch.float64)
    error = float(draws.std()) / math.sqrt(num_global) if num_global > 1 else None
    return Bound(
        name,
        None,
        float(draws.mean()),
        error,
        num_data,
        num_local,
        kind=kind_of(evaluation.structure),
        global_sites=evaluation.structure.global_sites,
        removed_scales=evaluation.structure.removed_scales,
    )
