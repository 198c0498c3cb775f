"""Estimate: a number with its standard errors, and what it is an estimate of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pvae.annotations import Extended, strict
from pvae.errors import ArgumentError, UndefinedError, check_number, escaped, shown
from pvae.measure import Measure

if TYPE_CHECKING:
    import numpy as np
    from arviz_stats.utils import ELPDData
    from numpy.typing import NDArray
    from pandas import DataFrame

__all__ = ["BoundKind", "Estimate", "with_error"]

BoundKind = Literal["lower", "upper", "estimate", "none", "impossible"]
"""What an estimate is of log p(x), on average; an upper bound's estimate is itself too low."""

_KINDS: dict[BoundKind, str] = {
    "lower": "a lower bound of log p(x) on average",
    "upper": "an upper bound of log p(x) on average",
    "estimate": "no bound: an upper bound's estimate, which is low on average",
    "none": "no bound of log p(x)",
    "impossible": "no bound of log p(x): it is impossible",
}
_MARK = "impossible: "
_FEW = 5  # draws


@dataclass(frozen=True, repr=False, eq=False)
class Estimate:
    r"""An estimate of a quantity, one value for each datum or each draw, and of its mean.

    Its standard error over data, :math:`\mathrm{sd}_n(v_n) / \sqrt N`, says how much the mean
    would differ on other data of the same kind; the one over draws,
    :math:`\sqrt{\sum_n \mathrm{var}_n} / N`, on the same data with other draws. Either is NaN where
    it isn't known. With ``by="draw"`` the values are totals over the data set, one for each of S
    joint draws of what all data share, and with ``by="data set"`` there is one value, of all data:
    these have an error over draws alone.

    Attributes:
        name: What it is.
        values: Shape ``(N,)`` by datum, ``(S,)`` by draw, ``(1,)`` by data set, the batch shape by
            distribution.
        variances: Variance of each value over draws, of the same shape; None where it isn't known.
        by: What has a value of its own: ``"datum"``, ``"draw"``, ``"data set"`` or
            ``"distribution"``.
        num_data: N.
        num_particles: K, draws for each datum, or S, for the data set; None where the values are
            exact.
        unit: Unit of the values.
        kind: What it is of log p(x): see `BoundKind`.
        distortion: :math:`-E_q[\log p(x | z)]`, an estimate like this one, or None.
        rate: :math:`E_q[\log q(z | x) - \log p(z)]`, likewise.
        ess: Effective sample size of each datum's K weights, ``(N,)``, or None.
        acceptance: Mean acceptance of each datum's Markov chains, ``(N,)``, or None.
        global_sites: Sites outside the data plate, whose densities are in the totals.
        remarks: What else a reader must know of the number, a line each.
        influence: K times what each draw moves each datum's value by, ``(K, N)``, or None; with it
            differences of estimates from the same draws have the right error.
        measure: Of which data log p(x) is, and whether of masses or densities; None if not known.

    Example:
        >>> values, variances = torch.tensor([-1.0, -3.0]), torch.tensor([0.1, 0.3])
        >>> found = Estimate("ELBO", values, variances, kind="lower")
        >>> found.mean, round(found.se_data, 3), round(found.se_draws, 3)
        (-2.0, 1.0, 0.316)
    """

    name: str
    values: Tensor
    variances: Tensor | None = None
    by: Literal["datum", "draw", "data set", "distribution"] = "datum"
    num_data: int = 0
    num_particles: int | None = 1
    unit: str = "nats"
    kind: BoundKind = "none"
    distortion: Estimate | None = None
    rate: Estimate | None = None
    ess: Tensor | None = None
    acceptance: Tensor | None = None
    global_sites: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    influence: Tensor | None = None
    measure: Measure | None = None

    def __post_init__(self) -> None:
        if not self.is_whole:
            object.__setattr__(self, "num_data", self.values.numel())
        if self.variances is not None:
            return
        if self.num_particles is None:
            object.__setattr__(self, "variances", torch.zeros_like(self.values))
        elif self.influence is not None and (k := len(self.influence)) > 1:
            object.__setattr__(self, "variances", self.influence.square().sum(0) / (k * (k - 1)))

    @classmethod
    def of_mean(
        cls, name: str, draws: Tensor, *, kind: BoundKind = "none", unit: str = "nats"
    ) -> Estimate:
        """The mean over draws of ``(K, N)`` numbers; that of log weights is the ELBO.

        Example:
            >>> Estimate.of_mean("mean", torch.tensor([[0.0, 1.0], [2.0, 1.0]])).values
            tensor([1., 1.])
        """
        mean, k = draws.mean(0), len(draws)
        return cls(name, mean, num_particles=k, unit=unit, kind=kind, influence=draws - mean)

    @classmethod
    def of_evidence(cls, name: str, log_weights: Tensor, *, kind: BoundKind = "lower") -> Estimate:
        """The log of the mean of weights, of ``(K, N)`` log weights; errors by the delta method.

        Example:
            >>> found = Estimate.of_evidence("evidence", torch.tensor([[0.0], [2.0]]).log())
            >>> found.values, found.ess
            (tensor([0.]), tensor([1.]))
        """
        k, shares = len(log_weights), log_weights.softmax(0)
        return cls(
            name,
            log_weights.logsumexp(0) - math.log(k),
            num_particles=k,
            kind=kind,
            ess=(1 / shares.square().sum(0)).nan_to_num(0.0),  # 0 where no draw has any weight
            influence=k * shares - 1,
        )

    @property
    def is_whole(self) -> bool:
        """Whether it is one number of the whole data set, and none of single data."""
        return self.by in ("draw", "data set")

    @property
    def total(self) -> float:
        """The sum over the data set."""
        return float(self.values.mean() if self.by == "draw" else self.values.sum())

    @property
    def mean(self) -> float:
        """The mean over data; where values are by draw, the total's share of a datum."""
        return self.total / max(self.num_data, 1)

    @property
    def se_data(self) -> float:
        """Standard error of the mean over data; NaN where no datum has a value of its own."""
        if self.by != "datum" or self.num_data < 2:
            return math.nan
        return float(self.values.std()) / math.sqrt(self.num_data)

    @property
    def se_draws(self) -> float:
        """Standard error of the mean over draws, the data held fixed; NaN if it isn't known."""
        return self.se_total / max(self.num_data, 1)

    @property
    def se_total(self) -> float:
        """Standard error of the total over draws, likewise."""
        if self.by == "draw":
            count = len(self.values)
            return float(self.values.std()) / math.sqrt(count) if count > 1 else math.nan
        return math.nan if self.variances is None else math.sqrt(float(self.variances.sum()))

    @property
    def per_datum(self) -> Tensor:
        """The values, shape ``(N,)``; refused with sites that belong to no single datum."""
        if not self.is_whole:
            return self.values
        actual = f"global site(s) {', '.join(self.global_sites)}" if self.global_sites else "draws"
        expected = "a pair whose sites are all inside the data plate"
        fixes = [".total, for the whole data set"]
        raise UndefinedError(f"{self.name} per datum", expected, actual, fixes)

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference, datum by datum, of the same data in the same order.

        Draws count as common, so that their noise cancels, where both keep their influence.
        """
        ours, theirs, name = self.per_datum, other.per_datum, f"{self.name} - {other.name}"
        if ours.shape != theirs.shape:
            actual = f"{len(ours)} and {len(theirs)} data"
            raise ArgumentError(name, "estimates of the same data", actual)
        if self.measure is not None and other.measure is not None:
            self.measure.require_same(other.measure, (self.name, other.name), name)
        k = self.num_particles or other.num_particles
        found = Estimate(name, ours - theirs, by=self.by, num_particles=k, unit=self.unit)
        found = found.impossible(dict.fromkeys((*self.reasons, *other.reasons)))
        mine, its = self.influence, other.influence
        if mine is not None and its is not None and mine.shape == its.shape:
            return replace(found, influence=mine - its, variances=None)
        if self.variances is not None and other.variances is not None:
            return replace(found, variances=self.variances + other.variances)
        return found

    def impossible(self, reasons: Iterable[str]) -> Estimate:
        """The same, marked as impossible for reasons, each with its site; itself without any.

        Example:
            >>> rate = Estimate("rate", torch.tensor([-3.0])).impossible(["site 'z': below 0"])
            >>> rate.kind, rate.remarks
            ('impossible', ("impossible: site 'z': below 0",))
        """
        new = [line for line in (f"{_MARK}{why}" for why in reasons) if line not in self.remarks]
        return replace(self, kind="impossible", remarks=(*new, *self.remarks)) if new else self

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is impossible, a line each; empty if it isn't."""
        return tuple(r.removeprefix(_MARK) for r in self.remarks if r.startswith(_MARK))

    def in_bins(self, width: float) -> Estimate:
        r"""A log density as the log probability of bins: :math:`\log p(x_n) + D_n \log h`.

        With D the number of continuous values of a datum and h the width of the bins that they were
        rounded to. It is as good as the density is flat within a bin; discrete values stay.

        Arguments:
            width: h, in units of the data.

        Raises:
            UndefinedError: If it isn't known whether it is a density, or one datum has no value.
        """
        log_width = math.log(check_number("width", width, above=0))
        if self.measure is None:
            fixes = ["bounds.elbo(...)", "bounds.evidence(...)"]
            what = "a number whose measure is not known"
            raise UndefinedError(f"{self.name} in bins", "a bound of log p(x)", what, fixes)
        values = self.per_datum + log_width * self.measure.continuous.to(self.values.dtype)
        return replace(self, values=values, measure=self.measure.in_bins())

    def named(self, name: str) -> Estimate:
        """The same under another name."""
        return replace(self, name=name)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the number, a line each."""
        lines = [] if self.ess is None else self._of_weights(self.ess)
        if self.acceptance is not None and not bool(self.acceptance.isnan().all()):
            mean, least = float(self.acceptance.mean()), float(self.acceptance.min())
            lines.append(f"acceptance: mean {mean:.2f}, least {least:.2f}")
        parts = [f"{part.title}: {part.mean:.2f}" for part in self._parts]
        return (*lines, *parts, *self.remarks)

    @property
    def title(self) -> str:
        """Its name, and a word where the number can't be."""
        return self.name + ", IMPOSSIBLE" * (self.kind == "impossible")

    @property
    def _parts(self) -> list[Estimate]:
        return [part for part in (self.distortion, self.rate) if part is not None]

    def _of_weights(self, ess: Tensor) -> list[str]:
        what = "" if self.measure is None else f", {self.measure.words}"
        lines, k = [_KINDS[self.kind] + what], self.num_particles or 1
        if k > 1:
            middle, least = float(ess.median()), float(ess.min())
            shown = f"median {middle:.3g} of {k}, least {least:.3g}"
            lines.append(f"ESS: {f'{middle:.3g} of {k}' if self.is_whole else shown}")
            if few := int((ess < min(_FEW, k / 2)).sum()):
                shown = f"{few} of {self.num_data} data rest on a few draws: they are"
                shown = "it rests on a few draws: it is" if self.is_whole else shown
                lines.append(f"{shown} too low, by more than the error over draws says")
        return lines

    @property
    def headline(self) -> str:
        """Mean and standard errors on one line."""
        name, n, k = self.title, self.num_data, self.num_particles
        if self.is_whole:
            sites = ", ".join(self.global_sites)
            total = f"{self.total:.2f}{_known(' +- {:.2g} over draws', self.se_total)} {self.unit}"
            with_sites = f", with global site(s) {sites}" if sites else ""
            what = "a bound " * (self.kind != "impossible")
            return f"{name}: {total}, {what}for the data set of {n}{with_sites}"
        how = "exact" if k is None else f"K = {k}"
        if math.isinf(self.mean):
            return f"{name}: {'-' if self.mean < 0 else ''}infinite, {how}"
        over_draws = "" if k is None else _known(" (over draws {:.2g})", self.se_draws)
        if n == 1:
            return f"{name}: {self.mean:.4g}{over_draws} {self.unit}, {how}"
        errors = f"{_known(' +- {:.2g}', self.se_data)}{over_draws}"
        return f"{name}: {self.mean:.2f}{errors} {self.unit} per {self.by}, N = {n}, {how}"

    def __str__(self) -> str:
        return shown("\n".join([self.headline, *(f"  {line}" for line in self.notes)]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        notes = "".join(f"<br>{escaped(note)}" for note in self.notes)
        return f"<div><b>{escaped(self.headline)}</b>{notes}</div>"

    def to_dict(self) -> dict[str, object]:
        """Mean, errors and what it is, as JSON has them: numbers that aren't finite are None."""
        numbers = ("mean", "se_data", "se_draws", "total")
        words = ("unit", "kind", "by", "num_data", "num_particles")
        return {
            "name": self.name,
            **{key: _finite(getattr(self, key)) for key in numbers},
            **{key: getattr(self, key) for key in words},
            "measure": None if self.measure is None else self.measure.kind,
            "notes": list(self.notes),
            **{part.name: part.to_dict() for part in self._parts},
        }

    def to_frame(self) -> DataFrame:
        """A pandas table with a row for each value, its error over draws, and its weights' ESS."""
        from pandas import DataFrame

        error = None if self.variances is None else self.variances.sqrt()
        columns = {"value": self.values, "se_draws": error, "ess": self.ess}
        frame = DataFrame({k: _numbers(v) for k, v in columns.items() if v is not None})
        return frame.rename_axis(self.by)

    def to_elpd(self) -> ELPDData:
        r"""An estimate of log evidence as ArviZ's ``ELPDData``, which ``arviz.compare`` takes.

        The expected log predictive density is the sum of log p(x_n) over held-out data, in the
        place of cross-validation's. With ArviZ 0.23 the function is ``arviz.preview.compare``.
        Its default, stacking, needs exp(value) to be above the least double; where values are
        below -700 nats, ``method="pseudo-bma"`` does without.

        Its ``kind`` is this estimate's name and whether it is of a mass or a density, so that ArviZ
        refuses to compare bounds that are loose by different amounts, or densities with masses.
        What is no estimate of log evidence, or has no value for each datum, is refused.

        Example:
            >>> values = torch.tensor([-1.0, -3.0])
            >>> Estimate("evidence", values, kind="lower").to_elpd().elpd
            -4.0
        """
        if self.kind in ("none", "impossible"):
            what = "; ".join((f"{self.name}, which is {_KINDS[self.kind]}", *self.reasons))
            fixes = ["bounds.evidence(...).to_elpd()", "bounds.elbo(...).to_elpd()"]
            raise UndefinedError("ArviZ's ELPDData", "an estimate of log evidence", what, fixes)
        from arviz_stats.utils import ELPDData
        from xarray import DataArray

        values = _numbers(self.per_datum)
        return ELPDData(
            kind=self.name if self.measure is None else f"{self.name}, {self.measure.kind}",
            elpd=float(values.sum()),
            se=float((len(values) * values.var()) ** 0.5),  # ArviZ's divides by N
            p=math.nan,  # no number of parameters is estimated
            n_samples=self.num_particles or 0,
            n_data_points=len(values),
            scale="log",
            warning=any("rest on a few draws" in note for note in self.notes),
            good_k=math.nan,
            elpd_i=DataArray(values, dims=["datum"]),
        )


def _numbers(column: Tensor) -> NDArray[np.float64]:
    return column.detach().double().cpu().flatten().numpy()


def _known(text: str, number: float) -> str:
    """A number in a text; nothing if it isn't known."""
    return "" if math.isnan(number) else text.format(number)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


@strict
def with_error(value: Extended, error: Extended | None, unit: str = "") -> str:
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
