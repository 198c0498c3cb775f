"""Models compared by their evidence on the same held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvae.annotations import strict
from pvae.errors import ArgumentError, oxford
from pvae.estimate import Estimate

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, repr=False)
class Comparison:
    """Models from the best to the worst.

    Attributes:
        estimates: Each model's evidence, by name, the best first.
        notes: What a reader must know of the comparison.
    """

    estimates: dict[str, Estimate]
    notes: tuple[str, ...] = ()

    @property
    def differences(self) -> dict[str, Estimate]:
        """The best minus each, datum by datum."""
        best = next(iter(self.estimates.values()))
        return {name: best - other for name, other in self.estimates.items()}

    def to_frame(self) -> DataFrame:
        """A pandas table: mean and its standard error, difference to the best and its error."""
        from pandas import DataFrame

        pairs = zip(self.estimates.values(), self.differences.values(), strict=True)
        rows = [(bound.mean, bound.se_data, d.mean, d.se_data, bound.name) for bound, d in pairs]
        frame = DataFrame(rows, list(self.estimates), ["mean", "se", "diff", "dse", "bound"])
        frame.insert(0, "rank", range(len(rows)))
        return frame

    def __str__(self) -> str:
        table = self.to_frame().to_string(float_format="{:.4g}".format)
        num_data = next(iter(self.estimates.values())).num_data
        return "\n".join([table, f"nats per datum, N = {num_data}", *self.notes])

    __repr__ = __str__


@strict
def compare(
    estimates: Mapping[str, Estimate],
    *,
    mixed: bool = False,
    bin_width: float | Mapping[str, float] | None = None,
) -> Comparison:
    r"""A table of models by their evidence on the same data, as ArviZ's ``compare`` has them.

    With :math:`\ell_n` the bounds of two models for a datum, a difference is the mean of
    :math:`\ell_n^{best} - \ell_n`, and its standard error :math:`\mathrm{sd}_n / \sqrt N` of these:
    the data's own spread, which both models share, falls out. The noise of draws is in it, but
    not the bias of a bound, which a better guide makes smaller: a difference of ELBOs is one of
    pairs, not of models.

    A density has the unit of its data and is no probability: one can't be compared with the other,
    nor densities of data in other units, unless all are made probabilities of bins (`bin_width`).
    Which rows each estimate is of is known by their values, and rows that differ are refused.

    For weights of models, and for plots, ArviZ's ``compare`` takes `Estimate.to_elpd`; its numbers
    are those of the data set, N times the means here.

    Arguments:
        estimates: By name, of `elbo` or `evidence`, of the same data in the same order.
        mixed: Whether bounds of different kinds may be compared, such as an ELBO and AIS.
        bin_width: Width h of the bins that data were rounded to, in units of the data of those that
            are densities: these become log p(x) + D log h with D the number of continuous values.
            By name, where these have data in different units.

    Raises:
        ArgumentError: If there are fewer than two; if their data differ, some are of densities and
            some of masses, or one is impossible; or, unless ``mixed``, if their kinds differ.
        UndefinedError: If one has no value for each datum, because of global sites.

    Example:
        >>> x = torch.zeros(4, 64)
        >>> pairs = {"small": pvae.recipes.vae(64, 2), "large": pvae.recipes.vae(64, 8)}
        >>> found = {n: pvae.bounds.elbo(p, x, 10) for n, p in pairs.items()}
        >>> compare(found).to_frame()["rank"].tolist()
        [0, 1]
    """
    if not isinstance(estimates, Mapping):
        expected = "a dictionary of estimates by name"
        raise ArgumentError("estimates", expected, type(estimates).__name__, _TWO)
    if len(estimates) < 2:
        raise ArgumentError("estimates", "two or more to compare", f"{len(estimates)}", _TWO)
    _check_possible(estimates)
    if bin_width is not None:
        estimates = _in_bins(estimates, bin_width)
    sizes = {name: len(bound.per_datum) for name, bound in estimates.items()}
    if len(set(sizes.values())) > 1:
        actual = ", ".join(f"{size} of '{name}'" for name, size in sizes.items())
        raise ArgumentError("estimates", "one number of data, of the same data", actual, _TWO)
    known = [(name, b.measure) for name, b in estimates.items() if b.measure is not None]
    for name, measure in known[1:]:
        known[0][1].require_same(measure, (known[0][0], name), "estimates")
    ranked = dict(sorted(estimates.items(), key=lambda item: -item[1].mean))
    return Comparison(ranked, _notes(list(ranked.values()), mixed=mixed))


_TWO = ['{"a": bounds.elbo(a, x), "b": bounds.elbo(b, x)}']


def _in_bins(
    estimates: Mapping[str, Estimate], width: float | Mapping[str, float]
) -> dict[str, Estimate]:
    if not isinstance(width, Mapping):
        return {name: bound.in_bins(width) for name, bound in estimates.items()}
    if unknown := [name for name in width if name not in estimates]:
        fixes = [f"bin_width={dict.fromkeys(estimates, 1.0)}"]
        raise ArgumentError("bin_width", f"names of {oxford(estimates)}", oxford(unknown), fixes)
    return {n: bound.in_bins(width[n]) if n in width else bound for n, bound in estimates.items()}


def _check_possible(estimates: Mapping[str, Estimate]) -> None:
    wrong = [f"'{name}': {'; '.join(b.reasons)}" for name, b in estimates.items() if b.reasons]
    if wrong:
        fixes = ["pvae.diagnose(pair, x), for what is wrong with the pair"]
        raise ArgumentError("estimates", "numbers that are possible", " and ".join(wrong), fixes)


def _notes(bounds: list[Estimate], *, mixed: bool) -> tuple[str, ...]:
    """What a reader must know of what is compared; refuses what isn't alike, unless ``mixed``."""
    notes = []
    if len(names := dict.fromkeys(bound.name for bound in bounds)) > 1:
        expected = "one kind of bound, with one number of draws"
        fixes = ["the same estimate of each model", "mixed=True, to compare them all the same"]
        if not mixed:
            raise ArgumentError("estimates", expected, oxford(names), fixes)
        notes.append("note: bounds of different kinds, which are loose by different amounts")
    if any(bound.kind == "none" for bound in bounds):
        notes.append("note: what is no bound of log p(x) says nothing of how good a model is")
    return tuple(notes)
