"""Models compared by their evidence on the same held-out data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pvae.bounds.result import Bound
from pvae.errors import ArgumentError, oxford

__all__ = ["Comparison", "Row", "compare"]


@dataclass(frozen=True)
class Row:
    """A model's line.

    Attributes:
        name: The model's.
        rank: From 0, the best.
        mean: Of its bound, nats per datum.
        se: Standard error of the mean, over data.
        diff: The best mean minus this one.
        dse: Standard error of the difference, datum by datum.
        bound: What the bound is.
    """

    name: str
    rank: int
    mean: float
    se: float
    diff: float
    dse: float
    bound: str


@dataclass(frozen=True)
class Comparison:
    """Models from the best to the worst.

    Attributes:
        rows: A line each.
        num_data: N.
        notes: What a reader must know of the comparison.
    """

    rows: tuple[Row, ...]
    num_data: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        head = f"{'':<{width}}  rank      mean        se      diff       dse  bound"
        lines = [head]
        for row in self.rows:
            numbers = "".join(f"{x:>10.4g}" for x in (row.mean, row.se, row.diff, row.dse))
            lines.append(f"{row.name:<{width}}  {row.rank:>4}{numbers}  {row.bound}")
        lines.append(f"nats per datum, N = {self.num_data}")
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__


def compare(bounds: Mapping[str, Bound], *, mixed: bool = False) -> Comparison:
    r"""A table of models by their evidence on the same data, as ArviZ's ``compare`` has them.

    With :math:`\ell_n` the bounds of two models for a datum, a difference is the mean of
    :math:`\ell_n^{best} - \ell_n`, and its standard error :math:`\mathrm{sd}_n / \sqrt N` of these:
    the data's own spread, which both models share, falls out. The noise of draws is in it, but
    not the bias of a bound, which a better guide makes smaller: a difference of ELBOs is one of
    pairs, not of models.

    Times N, ``mean``, ``se`` and ``diff`` are ArviZ's ``elpd``, ``se`` and ``elpd_diff``, with
    held-out data in the place of cross-validation; ``dse`` is the same.

    Arguments:
        bounds: Name -> what `elbo` or `evidence` has returned, all of the same data in the same
            order.
        mixed: Whether bounds of different kinds may be compared, such as an ELBO and AIS.

    Raises:
        ArgumentError: If there are fewer than two, their numbers of data differ, or, unless
            ``mixed``, their kinds.
        UndefinedError: If one has no value for each datum, because of global sites.

    Example:
        >>> x = torch.zeros(4, 64)
        >>> pairs = {"small": pvae.recipes.vae(64, 2), "large": pvae.recipes.vae(64, 8)}
        >>> found = {n: pvae.bounds.elbo(p, x, 10) for n, p in pairs.items()}
        >>> [row.rank for row in compare(found).rows]
        [0, 1]
    """
    if not isinstance(bounds, Mapping):
        raise ArgumentError("bounds", "a dictionary of bounds by name", type(bounds).__name__)
    if len(bounds) < 2:
        raise ArgumentError("bounds", "two or more to compare", f"{len(bounds)}")
    sizes = {name: bound.per_datum.shape[0] for name, bound in bounds.items()}
    if len(set(sizes.values())) > 1:
        actual = ", ".join(f"{size} of '{name}'" for name, size in sizes.items())
        raise ArgumentError("bounds", "one number of data, of the same data", actual)
    kinds = dict.fromkeys(bound.name for bound in bounds.values())
    if len(kinds) > 1 and not mixed:
        raise ArgumentError(
            "bounds",
            "one kind of bound, with one number of draws",
            oxford(kinds),
            ["the same estimate of each model", "mixed=True, to compare them all the same"],
        )
    means = {name: bound.mean for name, bound in bounds.items()}
    order = sorted(means, key=lambda name: -means[name])
    best = bounds[order[0]].per_datum.double().cpu()
    num_data = len(best)
    rows = []
    for rank, name in enumerate(order):
        bound = bounds[name]
        difference = best - bound.per_datum.double().cpu()
        dse = float(difference.std()) / math.sqrt(num_data) if num_data > 1 else math.nan
        mean_difference = float(difference.mean())
        rows.append(Row(name, rank, bound.mean, bound.se_data, mean_difference, dse, bound.name))
    notes = []
    if len(kinds) > 1:
        notes.append("note: bounds of different kinds, which are loose by different amounts")
    if any(bound.kind == "none" for bound in bounds.values()):
        notes.append("note: what is no bound of log p(x) says nothing of how good a model is")
    return Comparison(tuple(rows), num_data, tuple(notes))
