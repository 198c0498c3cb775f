"""Estimate: a number with its standard errors, and what it is an estimate of."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from pvae.errors import UndefinedError, oxford

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["BoundKind", "Estimate", "with_error"]

BoundKind = Literal["lower", "upper", "estimate", "none"]
"""What an estimate is of log p(x), on average: a lower bound, an upper bound, the estimate of an
upper bound (which is itself too low on average), or none of these."""

_KINDS: dict[BoundKind, str] = {
    "lower": "a lower bound of log p(x) on average",
    "upper": "an upper bound of log p(x) on average",
    "estimate": "no bound: an upper bound's estimate, which is low on average",
    "none": "no bound of log p(x)",
}
_FEW = 5  # draws


@dataclass(frozen=True, repr=False)
class Estimate:
    r"""An estimate of a quantity, one value for each datum or each draw, and of its mean.

    There are two standard errors of the mean. The one over data,
    :math:`\mathrm{sd}_n(v_n) / \sqrt N`, says how much the mean would differ on other data of the
    same kind. The one over draws, :math:`\sqrt{\sum_n \mathrm{var}_n} / N`, says how much it would
    differ on the same data with other draws.

    With ``by="draw"`` the values are totals over the data set, one for each of S joint draws of
    what all data share: these have an error over draws alone, and no single datum has a value.

    Attributes:
        name: What it is.
        values: Shape ``(N,)`` by datum, or ``(S,)`` by draw.
        variances: Of each datum's value over draws, ``(N,)``; None where it isn't known.
        by: What the values count: ``"datum"`` or ``"draw"``.
        num_data: N.
        num_particles: K, draws for each datum; None where the values are exact.
        unit: Of the values.
        kind: What it is of log p(x): see `BoundKind`.
        distortion: :math:`-E_q[\log p(x | z)]`, an estimate like this one, or None.
        rate: :math:`E_q[\log q(z | x) - \log p(z)]`, likewise.
        ess: Effective sample size of each datum's K weights, ``(N,)``, or None.
        acceptance: Mean acceptance of each datum's Markov chains, ``(N,)``, or None.
        global_sites: What is outside the data plate and in the totals.
        removed_scales: ``poutine.scale`` factors by site that are not in it.
        influence: K times what each draw moves each datum's value by, ``(K, N)``, if it is kept.
            Differences of estimates from the same draws then have the right error.

    Example:
        >>> values, variances = torch.tensor([-1.0, -3.0]), torch.tensor([0.1, 0.3])
        >>> found = Estimate("ELBO", values, variances, kind="lower")
        >>> found.mean, round(found.se_data, 3), round(found.se_draws, 3)
        (-2.0, 1.0, 0.316)
    """

    name: str
    values: Tensor
    variances: Tensor | None = None
    by: Literal["datum", "draw"] = "datum"
    num_data: int = 0
    num_particles: int | None = 1
    unit: str = "nats"
    kind: BoundKind = "none"
    distortion: Estimate | None = None
    rate: Estimate | None = None
    ess: Tensor | None = None
    acceptance: Tensor | None = None
    global_sites: tuple[str, ...] = ()
    removed_scales: Mapping[str, float] = field(default_factory=dict)
    influence: Tensor | None = None

    def __post_init__(self) -> None:
        if self.by == "datum":
            object.__setattr__(self, "num_data", self.values.numel())
        if self.influence is not None and self.variances is None:
            k = len(self.influence)
            spread = self.influence.square().sum(0) / (k * max(k - 1, 1))
            object.__setattr__(self, "variances", spread if k > 1 else None)

    # From weights

    @classmethod
    def of_mean(cls, name: str, draws: Tensor, **fields: object) -> Estimate:
        """The mean over draws of ``(K, N)`` numbers, such as log weights (the ELBO).

        Example:
            >>> Estimate.of_mean("mean", torch.tensor([[0.0, 1.0], [2.0, 1.0]])).values
            tensor([1., 1.])
        """
        mean = draws.mean(0)
        return cls(name, mean, num_particles=len(draws), influence=draws - mean, **fields)  # type: ignore[arg-type]

    @classmethod
    def of_evidence(cls, name: str, log_weights: Tensor, **fields: object) -> Estimate:
        """The log of the mean of weights, of ``(K, N)`` log weights; errors by the delta method."""
        k = len(log_weights)
        values = log_weights.logsumexp(0) - math.log(k)
        influence = k * log_weights.softmax(0) - 1
        return cls(name, values, num_particles=k, influence=influence, **fields)  # type: ignore[arg-type]

    # The mean

    @property
    def total(self) -> float:
        """The sum over the data set."""
        return float(self.values.sum() if self.by == "datum" else self.values.mean())

    @property
    def mean(self) -> float:
        """The mean over data; where values are by draw, the total's share of a datum."""
        return self.total / max(self.num_data, 1)

    @property
    def se_data(self) -> float:
        """Standard error of the mean over data; NaN where there is no value by datum."""
        if self.by == "draw" or self.num_data < 2:
            return math.nan
        return float(self.values.std()) / math.sqrt(self.num_data)

    @property
    def se_draws(self) -> float | None:
        """Standard error of the mean over draws, the data held fixed; None if it isn't known."""
        error = self.se_total
        return None if error is None else error / max(self.num_data, 1)

    @property
    def se_total(self) -> float | None:
        """Standard error of the total over draws."""
        if self.by == "draw":
            count = len(self.values)
            return float(self.values.std()) / math.sqrt(count) if count > 1 else None
        return None if self.variances is None else math.sqrt(float(self.variances.sum()))

    @property
    def per_datum(self) -> Tensor:
        """The values, shape ``(N,)``.

        Raises:
            UndefinedError: With sites outside the data plate, which belong to no single datum.
        """
        if self.by == "draw":
            raise UndefinedError(
                f"{self.name} per datum",
                "a pair whose sites are all inside the data plate",
                f"global site(s) {oxford(self.global_sites)}" if self.global_sites else "draws",
                [".total, for the whole data set"],
            )
        return self.values

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference, datum by datum; draws count as common where both keep their influence."""
        ours, theirs = self.per_datum, other.per_datum
        influence = variances = None
        both = self.influence is not None and other.influence is not None
        if both and self.num_particles == other.num_particles:
            assert self.influence is not None and other.influence is not None  # noqa: S101, PT018
            influence = self.influence - other.influence
        elif self.variances is not None and other.variances is not None:
            variances = self.variances + other.variances
        return Estimate(
            f"{self.name} - {other.name}",
            ours - theirs,
            variances,
            num_particles=self.num_particles,
            unit=self.unit,
            influence=influence,
        )

    def named(self, name: str) -> Estimate:
        """The same under another name."""
        return replace(self, name=name)

    # As text, as data

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the number, a line each."""
        lines = [] if self.ess is None else self._of_weights()
        if self.acceptance is not None and not bool(self.acceptance.isnan().all()):
            mean, least = float(self.acceptance.mean()), float(self.acceptance.min())
            lines.append(f"acceptance: mean {mean:.2f}, least {least:.2f}")
        parts = [p for p in (self.distortion, self.rate) if p is not None]
        lines += [f"{part.name}: {part.mean:.2f}" for part in parts]
        scales = self.removed_scales.items()
        lines += [
            f"left out: poutine.scale of {scale:g} at site '{site}'" for site, scale in scales
        ]
        return tuple(lines)

    def _of_weights(self) -> list[str]:
        assert self.ess is not None  # noqa: S101
        lines, k = [_KINDS[self.kind]], self.num_particles or 1
        if k > 1:
            middle, least = float(self.ess.median()), float(self.ess.min())
            lines.append(f"ESS: median {middle:.3g} of {k}, least {least:.3g}")
            few = int((self.ess < min(_FEW, k / 2)).sum())
            if few:
                lines.append(
                    f"{few} of {self.num_data} data rest on a few draws: they are too low, by "
                    "more than the error over draws says"
                )
        return lines

    @property
    def headline(self) -> str:
        """Mean and standard errors on one line."""
        draws = self.se_draws
        if self.by == "draw":
            error = "" if self.se_total is None else f" +- {self.se_total:.2g} over draws"
            return (
                f"{self.name}: {self.total:.2f}{error} {self.unit}, a bound for the data set of "
                f"{self.num_data}, with global site(s) {oxford(self.global_sites)}"
            )
        over_data = f" +- {self.se_data:.2g}" if self.num_data > 1 else ""
        over_draws = "" if draws is None else f" (over draws {draws:.2g})"
        how = "exact" if self.num_particles is None else f"K = {self.num_particles}"
        if self.num_data == 1:
            return f"{self.name}: {self.mean:.4g}{over_draws} {self.unit}, {how}"
        return (
            f"{self.name}: {self.mean:.2f}{over_data}{over_draws} {self.unit} per datum, "
            f"N = {self.num_data}, {how}"
        )

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"  {line}" for line in self.notes)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        notes = "".join(f"<br>{html.escape(note)}" for note in self.notes)
        return f"<div><b>{html.escape(self.headline)}</b>{notes}</div>"

    def to_dict(self) -> dict[str, object]:
        """Mean, errors and what it is, as JSON has them: numbers that aren't finite are None."""
        found: dict[str, object] = {
            "name": self.name,
            "mean": _finite(self.mean),
            "se_data": _finite(self.se_data),
            "se_draws": _finite(self.se_draws),
            "total": _finite(self.total),
            "unit": self.unit,
            "kind": self.kind,
            "num_data": self.num_data,
            "num_particles": self.num_particles,
        }
        for part in (self.distortion, self.rate):
            if part is not None:
                found[part.name] = part.to_dict()
        return found

    def to_frame(self) -> DataFrame:
        """A pandas table with a row for each value, its error over draws, and its weights' ESS."""
        from pandas import DataFrame

        columns = {"value": self.values}
        if self.variances is not None:
            columns["se_draws"] = self.variances.sqrt()
        if self.ess is not None:
            columns["ess"] = self.ess
        rows = {
            name: column.detach().double().cpu().flatten().numpy()
            for name, column in columns.items()
        }
        frame = DataFrame(rows)
        frame.index.name = self.by
        return frame


def _finite(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else number


def with_error(value: float, error: float | None, unit: str = "") -> str:
    """A number and its standard error, with the digits that the error leaves.

    Example:
        >>> with_error(0.3141, 0.02, "nats")
        '0.314 +- 0.020 nats'
    """
    if not math.isfinite(value):
        return str(value)
    if error is None or not math.isfinite(error) or error <= 0:
        return f"{value:.4g} {unit}".rstrip()
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    rounded = round(value, digits) + 0.0  # no -0
    return f"{rounded:.{digits}f} +- {error:.{digits}f} {unit}".rstrip()
