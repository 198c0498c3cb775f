"""The evidence lower bound, and its importance-weighted kin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pvae import randomness
from pvae import terms as t
from pvae.bounds.prepare import prepare
from pvae.bounds.result import Bound
from pvae.data import Source
from pvae.engine import Asked, Repeated
from pvae.errors import check_int
from pvae.modes import evaluating

__all__ = ["elbo", "evidence"]


def elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    num_particles: int = 1,
    *,
    plate: str | None = None,
    structure: t.Structure | None = None,
    max_rows: int = 8192,
    seed: int = 0,
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
        model: A Pyro program.
        guide: Its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: K, draws for each datum.
        plate: Name of the data plate, where the batch's length doesn't tell.
        structure: What `pvae.terms.inspect_pair` found, if it is known.
        max_rows: Bound on the rows in memory at once, counting each particle of a datum as one.
        seed: Of the draws; the caller's generators are left as they are.
    """
    check_int("num_particles", num_particles)
    with randomness.forked(seed):
        source, structure = prepare(model, guide, data, structure, plate)
        name = _NAMES[structure.quantity]
        if structure.global_sites:
            return _with_globals(name, model, guide, source, structure, num_particles, 1, max_rows)
        moments = _Moments(structure)
        for rows, terms in t.stream(model, guide, source, structure, num_particles, max_rows):
            moments.add(rows, terms)
        return moments.bound(name, num_particles)


_NAMES = {"elbo": "ELBO", "log_joint": "log joint", "unnormalised_elbo": "unnormalised ELBO"}


def evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    num_particles: int = 1000,
    *,
    num_global: int = 16,
    plate: str | None = None,
    structure: t.Structure | None = None,
    max_rows: int = 8192,
    engine: Asked = "auto",
    seed: int = 0,
) -> Bound:
    r"""The importance-weighted estimate of the evidence of each datum, a lower bound on average.

    .. math::
        \hat\ell_n = \log \tfrac1K \sum_{k=1}^K w_{nk}, \quad
        w_{nk} = p(x_n, z_{nk}) / q(z_{nk} | x_n), \quad z_{nk} \sim q(z | x_n)

    Its expectation is at most log p(x_n) and doesn't fall as K grows. The standard error over
    draws is by the delta method, :math:`\mathrm{var}_n \approx \sum_k \bar w_{nk}^2 - 1/K` with
    the normalised weights; where one weight has it all, even that is too small.

    With sites g outside the data plate there is no evidence of one datum; the result is the bound
    for the data set,
    :math:`E_{q(g)}[\log p(g) - \log q(g) + \sum_n \log \tfrac1K \sum_k w_{nk}(g)]`.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Arguments:
        model: A Pyro program.
        guide: Its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: K, draws for each datum.
        num_global: Draws of global latents, where there are any.
        plate: Name of the data plate, where the batch's length doesn't tell.
        structure: What `pvae.terms.inspect_pair` found, if it is known.
        max_rows: Bound on the rows in memory at once, counting each particle of a datum as one.
        engine: ``"eager"``; ``"compiled"``, where the pass over a chunk of data is one graph, with
            the same draws; ``"auto"``, compiled where that pays.
        seed: Of the draws; the caller's generators are left as they are.

    Raises:
        UndefinedError: If a latent of a datum has a point-mass guide, or an improper prior.
    """
    check_int("num_particles", num_particles)
    check_int("num_global", num_global)
    with randomness.forked(seed):
        source, structure = prepare(model, guide, data, structure, plate)
        structure.require_density("evidence by importance sampling")
        structure.require_proper("evidence")
        what = "log joint" if structure.points else "evidence"
        name = f"{what}, IWAE-{num_particles}"
        if structure.global_sites:
            return _with_globals(
                name, model, guide, source, structure, num_global, num_particles, max_rows
            )
        weights = _Weights(structure)

        def reduced(k: int, *batch: Tensor) -> Tensor:
            terms = t.compute(model, guide, batch, structure=structure, num_particles=k)
            return weights.reduce(terms)

        calls = -(-source.num_rows * num_particles // max_rows)
        repeated = Repeated(reduced, calls, structure.dtype, engine)

        def run(*pair_and_batch: Any, given: Any, num_particles: int, **rest: Any) -> Tensor:
            if not given:
                return repeated(num_particles, *pair_and_batch[-1])
            rest |= {"given": given, "num_particles": num_particles}  # rows that the pair picks
            return weights.reduce(t.compute(*pair_and_batch, **rest))

        chunks = t.stream(model, guide, source, structure, num_particles, max_rows, run=run)
        for rows, sums in chunks:
            weights.add(rows, sums)
        return weights.bound(name, num_particles)


class _Moments:
    """Sums over particles of the ELBO, its square, and its likelihood, chunk by chunk."""

    def __init__(self, structure: t.Structure) -> None:
        self.structure = structure
        self.sums: dict[int, Tensor] = {}  # by a chunk's first row; (3, rows)
        self.is_split = True

    def add(self, rows: slice, terms: t.Terms) -> None:
        log_weight = terms.log_weight.double()
        self.is_split = "joint" not in terms.notes
        likelihood = terms.log_likelihood.double() if self.is_split else log_weight
        new = torch.stack([log_weight.sum(0), log_weight.square().sum(0), likelihood.sum(0)])
        known = self.sums.get(rows.start)
        self.sums[rows.start] = new if known is None else known + new

    def bound(self, name: str, k: int) -> Bound:
        values, square, likelihood = torch.cat(list(self.sums.values()), 1) / k
        variance = (square - values.square()).clamp(min=0) / (k - 1) if k > 1 else None
        common: dict[str, Any] = {"num_data": len(values), "num_particles": k}

        def part(part_name: str, part_values: Tensor) -> Bound:
            return Bound(part_name, part_values, float(part_values.sum()), None, **common)

        has_rate = self.is_split and not self.structure.has_points and not self.structure.improper
        return Bound(
            name,
            values,
            float(values.sum()),
            None if variance is None else math.sqrt(float(variance.sum())),
            distortion=part("distortion", -likelihood) if self.is_split else None,
            rate=part("rate", likelihood - values) if has_rate else None,
            removed_scales=self.structure.removed_scales,
            **common,
        )


class _Weights:
    """log-sum-exp of weights and of their squares, chunk by chunk, particles in any number."""

    def __init__(self, structure: t.Structure) -> None:
        self.structure = structure
        self.sums: dict[int, Tensor] = {}  # by a chunk's first row; (2, rows)

    @staticmethod
    def reduce(terms: t.Terms) -> Tensor:
        """What is kept of a chunk."""
        log_weight = terms.log_weight.double()
        return torch.stack([log_weight.logsumexp(0), (2 * log_weight).logsumexp(0)])

    def add(self, rows: slice, new: Tensor) -> None:
        known = self.sums.get(rows.start)
        self.sums[rows.start] = new if known is None else torch.logaddexp(known, new)

    def values(self, k: int) -> tuple[Tensor, Tensor]:
        """log of the mean weight of each datum, and its variance over draws (delta method)."""
        first, second = torch.cat(list(self.sums.values()), 1)
        variance = ((second - 2 * first).exp() - 1 / k).clamp(min=0)
        return first - math.log(k), variance

    def bound(self, name: str, k: int) -> Bound:
        values, variance = self.values(k)
        return Bound(
            name,
            values,
            float(values.sum()),
            math.sqrt(float(variance.sum())) if k > 1 else None,
            len(values),
            k,
            removed_scales=self.structure.removed_scales,
        )


def _with_globals(
    name: str,
    model: Any,
    guide: Any,
    source: Source,
    structure: t.Structure,
    num_global: int,
    num_local: int,
    max_rows: int,
) -> Bound:
    """The data set's bound: each draw of what is outside the data plate is shared by all data."""
    totals, num_data = [], source.num_rows
    for _ in range(num_global):
        given, outside = _draw_globals(model, guide, source, structure)
        weights = _Weights(structure)
        for rows, terms in t.stream(model, guide, source, structure, num_local, max_rows, given):
            weights.add(rows, weights.reduce(terms))
        values, _ = weights.values(num_local)
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
        global_sites=structure.global_sites,
        removed_scales=structure.removed_scales,
    )


def _draw_globals(
    model: Any, guide: Any, source: Source, structure: t.Structure
) -> tuple[dict[str, Tensor], float]:
    """One draw of everything outside the data plate, and its log p - log q."""
    rows = source.num_rows if structure.subsample_size else structure.tied_to or 128
    with evaluating(structure.modules):
        terms = t.compute(model, guide, t.first_batch(source, rows), structure=structure)
    given = {
        name: site.draws[0]
        for name, site in terms.sites.items()
        if not site.is_local and site.kind in ("latent", "auxiliary") and site.draws is not None
    }
    return given, float(terms.global_log_p[0] - terms.global_log_q[0])
