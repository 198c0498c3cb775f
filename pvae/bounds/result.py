"""The result type of every estimate of an evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from pvae.errors import UndefinedError

__all__ = ["Bound", "Kind"]

Kind = Literal["lower", "upper", "estimate", "none"]
"""What an estimate is on average: a bound of log p(x), no bound, or of something else."""

_KINDS: dict[Kind, str] = {
    "lower": "a lower bound of log p(x) on average",
    "upper": "an upper bound of log p(x) on average",
    "estimate": "no bound: an upper bound's estimate, which is low on average",
    "none": "no bound of log p(x)",
}


@dataclass(frozen=True)
class Bound:
    r"""An estimate of a quantity for each datum, and of its mean.

    There are two standard errors of the mean. The one over data,
    :math:`\mathrm{sd}_n(v_n) / \sqrt N`, says how much the mean would differ on other data of the
    same kind. The one over draws, :math:`\sqrt{\sum_n \mathrm{var}_n} / N`, says how much it would
    differ on the same data with other draws from the guide.

    Attributes:
        name: What it is.
        values: One for each datum in nats, shape ``(N,)``; None with global sites.
        total: Sum over the data set.
        se_total: Standard error over draws of the total; None if one draw was made.
        num_data: N.
        num_particles: K, draws for each datum.
        distortion: :math:`-E_q[\log p(x | z)]`, an estimate like this one, or None.
        rate: :math:`E_q[\log q(z | x) - \log p(z)]`, likewise.
        global_sites: What is outside the data plate; the total has it, no single datum does.
        removed_scales: ``poutine.scale`` factors by site that are not in it.
        kind: What it is on average: ``"lower"``, ``"upper"``, ``"estimate"``, ``"none"``.
        ess: Effective sample size of each datum's K weights, shape ``(N,)``, or None.
        acceptance: Of each datum's Markov chains, shape ``(N,)``, or None.
    """

    name: str
    values: Tensor | None
    total: float
    se_total: float | None
    num_data: int
    num_particles: int
    distortion: Bound | None = None
    rate: Bound | None = None
    global_sites: tuple[str, ...] = ()
    removed_scales: dict[str, float] = field(default_factory=dict)
    kind: Kind = "lower"
    ess: Tensor | None = None
    acceptance: Tensor | None = None

    @property
    def mean(self) -> float:
        """The mean over data in nats; with global sites, the total's share of a datum."""
        return self.total / self.num_data

    @property
    def se_data(self) -> float:
        """Standard error of the mean over data."""
        values = self.per_datum
        return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan

    @property
    def se_draws(self) -> float | None:
        """Standard error of the mean over draws, the data held fixed; None if one was made."""
        return None if self.se_total is None else self.se_total / self.num_data

    @property
    def per_datum(self) -> Tensor:
        """The values, shape ``(N,)``.

        Raises:
            UndefinedError: With sites outside the data plate, which belong to no single datum.
        """
        if self.values is None:
            raise UndefinedError(
                f"{self.name} per datum",
                "a pair whose sites are all inside the data plate",
                f"global site(s) {', '.join(self.global_sites)}",
                [".total, for the whole data set"],
            )
        return self.values

    def __str__(self) -> str:
        draws = "" if self.se_draws is None else f" (over draws {self.se_draws:.2g})"
        if self.values is None:
            error = "" if self.se_total is None else f" +- {self.se_total:.2g} over draws"
            lines = [
                f"{self.name}: {self.total:.2f}{error} nats, a bound for the data set of "
                f"{self.num_data}, with global site(s) {', '.join(self.global_sites)}"
            ]
        else:
            error = f" +- {self.se_data:.2g}" if self.num_data > 1 else ""
            lines = [
                f"{self.name}: {self.mean:.2f}{error}{draws} nats per datum, "
                f"N = {self.num_data}, K = {self.num_particles}"
            ]
        if self.ess is not None:
            lines += [f"  {line}" for line in self._of_weights()]
        for part in (self.distortion, self.rate):
            if part is not None:
                lines.append(f"  {part.name}: {part.mean:.2f}")
        for site, scale in self.removed_scales.items():
            lines.append(f"  left out: poutine.scale of {scale:g} at site '{site}'")
        return "\n".join(lines)

    def _of_weights(self) -> list[str]:
        assert self.ess is not None  # noqa: S101
        lines = [_KINDS[self.kind]]
        middle, least = float(self.ess.median()), float(self.ess.min())
        if self.num_particles > 1:
            lines.append(f"ESS: median {middle:.3g} of {self.num_particles}, least {least:.3g}")
            few = int((self.ess < min(_FEW, self.num_particles / 2)).sum())
            if few:
                lines.append(
                    f"{few} of {self.num_data} data rest on a few draws: they are too low, by "
                    "more than the error over draws says"
                )
        if self.acceptance is not None and not bool(self.acceptance.isnan().all()):
            mean, least = float(self.acceptance.mean()), float(self.acceptance.min())
            lines.append(f"acceptance: mean {mean:.2f}, least {least:.2f}")
        return lines

    __repr__ = __str__


_FEW = 5
