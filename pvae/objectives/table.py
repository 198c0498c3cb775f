"""All objectives in one table, which ``docs/objectives.md`` is made from."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from pvae.objectives import aggregate, elbo, gradients, rate, weighted
from pvae.objectives.base import Objective
from pvae.objectives.refusals import NEEDS
from pvae.objectives.two_losses import TwoLosses

__all__ = ["ALL", "Table", "table"]

ALL: tuple[type[Objective], ...] = tuple(
    kind
    for module in (elbo, weighted, gradients, rate, aggregate)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Objective) and kind.__name__ in module.__all__
)
"""In the order in which their modules define them."""

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
        ['ELBO', 'IWAE', 'MultiplyWeightedIWAE']
    """
    return Table(_row(kind) for kind in ALL)


def _row(kind: type[Objective]) -> Row:
    text = inspect.getdoc(kind) or ""
    paper = re.search(r"References:.*?\(([^()]+),\s+(\d{4})\),\s+(https://\S+)", text, re.DOTALL)
    author, year, url = ("", "", "") if paper is None else paper.groups()
    split = ("no shared parameters",) if issubclass(kind, TwoLosses) else ()
    bound = kind.bound if isinstance(kind.bound, str) else "lower"
    return Row(
        kind.__name__,
        text.splitlines()[0].rstrip("."),
        SPECIAL.get(kind.__name__, BOUNDS[bound]),
        kind.num_particles * getattr(kind, "num_means", 1),
        kind.estimator,
        (*(NEEDS[n] for n in kind.needs), *split),
        f"{author} {year}, {url}",
    )
