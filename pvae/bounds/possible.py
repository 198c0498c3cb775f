"""What numbers of a pair can be, told from the passes that they come from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pvae.bounds.sums import Sums
from pvae.devices import beside, double
from pvae.errors import oxford
from pvae.estimate import Estimate
from pvae.limits import is_on_edge, is_outside, is_without_mass
from pvae.measure import Measure
from pvae.pair import Structure
from pvae.terms import Terms
from pvae.terms.extent import count_where, extent_of

__all__ = ["ALARM", "ROUNDING", "Possible"]

ALARM = math.log(1e5)
r"""Nats by which a sum of log weights may be above its bound by chance.

Where densities are right, :math:`E_q[p(z) / q(z)] \le 1`, also of products over independent draws:
by Markov's inequality the sum of their logs is above log 1e5 at most once in 1e5, however few or
skewed they are.
"""

EDGE = 1e-3
"""Share of draws from which the edge of a support counts: rounding makes fewer."""

ROUNDING = 16
"""Units in the last place by which all that is summed may be off."""


class Possible(Sums):
    r"""Sums by which impossible numbers are told, and of which data log p(x) is.

    What is told, over all passes that have been added:

    - draws of a latent at which the prior has no mass, or a density is no number;
    - draws on the edge of their support, to which floating point has rounded or clamped them;
    - a rate below 0, where no Kullback-Leibler divergence is;
    - an evidence above the largest density that the likelihood has for any data, or infinite.

    Arguments:
        structure: The pair.
    """

    def __init__(self, structure: Structure) -> None:
        super().__init__(_plus)
        self.structure = structure
        self.sites = (*structure.latents, *structure.global_latents)
        self.has_rate = not (structure.global_sites or structure.points or structure.improper)

    @property
    def num_sums(self) -> int:
        """R, how many numbers of each datum a pass has."""
        return _MAXIMA + 3 + 3 * len(self.sites)

    def take(self, rows: slice, terms: Terms, *, of_guide: bool = True) -> None:
        """Takes in a pass; ``of_guide`` says whether latents are the guide's own draws."""
        count = rows.stop - rows.start  # a chunk may be filled up
        self.add(rows, self.reduce(terms, of_guide=of_guide)[:, :count])

    def reduce(self, terms: Terms, *, of_guide: bool = True) -> Tensor:
        """What a chunk's particles say, a row each, shape ``(R, n)``."""
        rows = terms.num_rows  # a loop's own passes may have more
        parts = [self._of_pass(one, of_guide=of_guide)[:, :rows] for one in terms.passes]
        total = parts[0]
        for part in parts[1:]:
            total = _plus(total, part)
        return total

    def _of_pass(self, terms: Terms, *, of_guide: bool) -> Tensor:
        extent, zero = extent_of(terms), double(terms.like.new_zeros(1, 1))
        shape = (terms.num_particles, terms.num_rows)
        limit = double(extent.limit).expand(shape)
        largest = [limit, -limit, extent.marks, extent.entries, extent.continuous]
        largest.append(zero + (not extent.is_normalised))
        added = [zero + 1, *self._rate(terms, zero, of_guide=of_guide)]
        for name in self.sites:
            added += self._site(terms, name, zero, of_guide=of_guide)
        maxima = [double(part).expand(shape).amax(0) for part in largest]
        return torch.stack(maxima + [double(part).expand(shape).sum(0) for part in added])

    def _rate(self, terms: Terms, zero: Tensor, *, of_guide: bool) -> list[Tensor]:
        """log p(z) - log q(z) of draws, and the size of what it is made of."""
        if not (of_guide and self.has_rate) or terms.is_joint:
            return [zero, zero]
        log_p, log_q = double(terms.log_prior), double(terms.log_q)
        return [log_p - log_q, log_p.abs() + log_q.abs()]

    def _site(self, terms: Terms, name: str, zero: Tensor, *, of_guide: bool) -> list[Tensor]:
        """Draws outside the prior's support, without a density, and on the edge."""
        site, node = terms.sites.get(name), terms.model_trace.nodes[name]
        if site is None:  # summed out together with others
            return [zero, zero, zero]
        edge = is_on_edge(node["fn"], node["value"])
        on_edge = zero if edge is None else count_where(terms, node, edge)
        if not of_guide or name in self.structure.points or site.log_p is None:
            return [zero, zero, on_edge]
        log_q = torch.zeros_like(site.log_p) if site.log_q is None else site.log_q
        outside = _by_row(site.log_p == -math.inf)
        broken = _by_row(~(log_q.isfinite() & (site.log_p < math.inf)))
        is_listed = name in self.structure.guide_states  # all states are, with or without mass
        clamped = None if is_listed else is_without_mass(node["fn"], node["value"])
        beyond = None if is_listed else is_outside(node["fn"], node["value"])
        for found in (clamped, beyond):
            if found is not None:
                count = count_where(terms, node, found)
                outside = beside(outside, count) | (count > 0)
        broken = broken & ~beside(outside, broken)
        return [outside, broken, on_edge]

    @property
    def has_one_limit(self) -> bool:
        """Whether the largest density was the same at all latents."""
        largest, negative = self.all[:2]
        return bool((largest + negative <= 1e-6 * (1 + largest.abs())).all())

    @property
    def measure(self) -> Measure:
        """Of which data log p(x) is."""
        _, _, marks, entries, continuous, unnormalised = self.all[:_MAXIMA]
        return Measure(marks, entries, continuous, not bool(unnormalised.any()))

    def mark(self, estimate: Estimate, *, is_limited: bool = True) -> Estimate:
        """The estimate with its measure; marked as impossible, with reasons, where it is that.

        ``is_limited`` says whether it can't be above the largest density, on average.
        """
        found = replace(estimate, measure=self.measure)
        reasons = [*self.reasons(), *self._infinite(found)]
        reasons += self._above(found) if is_limited else ()
        found = found.impossible(reasons)
        if found.rate is not None:
            found = replace(found, rate=found.rate.impossible(self.reasons()))
        return found

    def reasons(self) -> list[str]:
        """Why no number from these draws is to be believed, by site; empty if nothing is wrong."""
        draws, rate, size, *sites = self.all[_MAXIMA:].sum(1).tolist()
        found = []
        for i, name in enumerate(self.sites):
            found += list(self._of_site(name, draws, *sites[3 * i : 3 * i + 3]))
        if rate > ALARM + ROUNDING * self._eps * size:
            where = f"site{'s' * (len(self.sites) > 1)} {oxford(self.sites)}"
            found.append(
                f"{where}: a rate of {-rate / draws:.3g} nats, below 0, where no KL(q || p) is"
            )
        return found

    def _of_site(
        self, name: str, draws: float, outside: float, broken: float, edge: float
    ) -> Iterator[str]:
        of, where = "of the guide's draws", f"site '{name}'"
        if outside:
            yield f"{where}: {_percent(outside / draws)} {of} are outside the prior's support"
        if broken:
            yield f"{where}: log p or log q is no number at {_percent(broken / draws)} {of}"
        if edge > max(_FEWEST, EDGE * draws):
            number = str(self.structure.dtype).removeprefix("torch.")
            yield (
                f"{where}: {_percent(edge / draws)} of draws are on the edge of the support in "
                f"{number}, where their density is another than that of what was drawn"
            )

    def _infinite(self, estimate: Estimate) -> Iterator[str]:
        """Says so where a density is infinite, as at the edge of a Beta's or a Gamma's support."""
        odd = (estimate.values == math.inf) | estimate.values.isnan()
        if count := int(odd.sum()):
            where = f"site {oxford(self.structure.observed)}"
            yield f"{where}: {count} of {odd.numel()} data have a density that is no finite number"

    def _above(self, estimate: Estimate) -> Iterator[str]:
        """Says so where an evidence is above what any data could have."""
        limit, rounding = self.all[0], ROUNDING * self._eps
        values = double(estimate.values)
        total, most = float(values.sum()), float(limit.sum())
        if estimate.by == "draw":
            most *= len(values)
        if total - most > ALARM + rounding * (abs(total) + abs(most)):
            n = max(1, len(values))
            yield (
                f"{total / n:.4g} nats where no data have a density above {most / n:.4g} "
                f"at site {oxford(self.structure.observed)}"
            )

    @property
    def _eps(self) -> float:
        return torch.finfo(self.structure.dtype).eps


_MAXIMA = 6  # rows that are the largest over draws; all others are sums over them
_FEWEST = 3  # draws on an edge, as one may be there by chance


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _plus(ours: Tensor, theirs: Tensor) -> Tensor:
    largest = torch.maximum(ours[:_MAXIMA], theirs[:_MAXIMA])
    return torch.cat([largest, ours[_MAXIMA:] + theirs[_MAXIMA:]])


def _by_row(values: Tensor) -> Tensor:
    """Of each draw, also of what all data share."""
    return values if values.dim() == 2 else values.unsqueeze(1)
