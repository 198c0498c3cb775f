"""All objectives in one table, which ``docs/objectives.md`` is made from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pvae.objectives import aggregate, elbo, gradients, rate, weighted
from pvae.objectives.base import Objective, TwoLosses
from pvae.objectives.refusals import NEEDS
from pvae.shelf import Shelf

__all__ = ["ALL", "Table", "named", "table"]

ALL: tuple[type[Objective], ...] = tuple(
    kind
    for module in (elbo, weighted, gradients, rate, aggregate)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Objective) and kind.__name__ in module.__all__
)
"""In the order in which their modules define them."""

named: Shelf[Callable[..., Objective]] = Shelf("objective")
"""``named("dreg")()`` is a `DReG` with its defaults. One that can't be made without an argument, as
`Capacity` and `GECO`, has no name."""

for _kind in ALL:
    if all(p.default is not p.empty for p in inspect.signature(_kind).parameters.values()):
        named.put(_kind.__name__.lower())(_kind)

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


class Row(NamedTuple):
    """One objective: its name, what it is, and what it needs of a pair."""

    name: str
    what: str
    bound: str
    particles: int
    estimator: str
    needs: Sequence[str]
    source: str


class Table(list[Row]):
    """Rows that print themselves as Markdown."""

    def __str__(self) -> str:
        head = ("objective", "what it is", "bound", "draws", "gradient", "needs", "source")
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in self:
            cells = row._replace(name=f"`{row.name}`", needs=", ".join(row.needs) or "any pair")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
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
    needs = (*kind.needs, *(("own parameters",) if issubclass(kind, TwoLosses) else ()))
    bound = kind.bound if isinstance(kind.bound, str) else "lower"
    return Row(
        kind.__name__,
        text.splitlines()[0].rstrip("."),
        SPECIAL.get(kind.__name__, BOUNDS[bound]),
        kind.num_particles * getattr(kind, "num_means", 1),
        kind.estimator,
        [NEEDS[need][0] for need in needs],
        f"{author} {year}, {url}",
    )
