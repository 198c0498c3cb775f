"""All objectives in one table, which ``docs/objectives.md`` is made from."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from pvae.objectives.aggregate import DIPVAE, TCVAE, FactorVAE, InfoVAE
from pvae.objectives.base import Objective
from pvae.objectives.elbo import ELBO
from pvae.objectives.gradients import RWS, STL, TVO, VIMCO
from pvae.objectives.rate import GECO, Capacity, FreeBits
from pvae.objectives.two_losses import TwoLosses
from pvae.objectives.upper import CUBO
from pvae.objectives.weighted import CIWAE, IWAE, PIWAE, DReG, MultiplyWeightedIWAE, Renyi

__all__ = ["ALL", "Table", "table"]

ALL: tuple[type[Objective], ...] = (
    ELBO,
    STL,
    IWAE,
    MultiplyWeightedIWAE,
    CIWAE,
    PIWAE,
    DReG,
    Renyi,
    VIMCO,
    RWS,
    TVO,
    CUBO,
    FreeBits,
    Capacity,
    GECO,
    TCVAE,
    InfoVAE,
    FactorVAE,
    DIPVAE,
)
BOUNDS = {
    "lower": "lower bound",
    "upper": "upper bound; its estimate is biased down, and bounds nothing",
    "none": "no bound",
}
SPECIAL = {
    "ELBO": "lower bound, with beta from 1 on; below, no bound",
    "STL": "lower bound, with beta from 1 on; below, no bound",
    "Renyi": "lower bound from alpha = 0 on; below, no bound: its estimate is biased down",
    "TVO": "lower bound, as K grows",
}
NEEDS = {
    "density": "a density of q",
    "gradient": "reparametrised draws",
    "local": "local sites alone",
    "own draws": "no joint draw of all data",
    "unscaled": "no poutine.scale",
    "split": "nothing summed out",
}


@dataclass(frozen=True)
class Row:
    """One objective: its name, what it is, and what it needs of a pair."""

    name: str
    what: str
    bound: str
    particles: int
    estimator: str
    needs: tuple[str, ...]
    source: str


class Table(list[Row]):
    """Rows that print themselves as Markdown."""

    def __str__(self) -> str:
        head = ("objective", "what it is", "bound", "draws", "gradient", "needs", "source")
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in self:
            needs = ", ".join(row.needs) or "any pair"
            cells = (f"`{row.name}`", row.what, row.bound, str(row.particles), row.estimator)
            lines.append("| " + " | ".join((*cells, needs, row.source)) + " |")
        return "\n".join(lines)

    __repr__ = __str__
    _repr_markdown_ = __str__


def table() -> Table:
    """What each objective is, whether it is a bound, and what it needs of a pair.

    Example:
        >>> [row.name for row in table()][:3]
        ['ELBO', 'STL', 'IWAE']
    """
    rows = Table()
    for kind in ALL:
        summary = (inspect.getdoc(kind) or "").splitlines()[0].rstrip(".")
        default = inspect.signature(kind).parameters.get("num_particles")
        means = inspect.signature(kind).parameters.get("num_means")
        draws = 1 if default is None else default.default
        split = ("no shared parameters",) if issubclass(kind, TwoLosses) else ()
        bound = kind.bound if isinstance(kind.bound, str) else "lower"
        rows.append(
            Row(
                kind.__name__,
                summary,
                SPECIAL.get(kind.__name__, BOUNDS[bound]),
                draws if means is None else draws * means.default,
                kind.estimator,
                (*(NEEDS[n] for n in kind.needs), *split),
                kind.source,
            )
        )
    return rows
