"""All objectives: by name, and in one table, which ``docs/objectives.md`` is made from."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields

from pvae.errors import ArgumentError
from pvae.objectives import aggregate, elbo, gradients, rate, weighted
from pvae.objectives.base import Objective
from pvae.objectives.refusals import NEEDS
from pvae.objectives.two_losses import TwoLosses

__all__ = ["ALL", "NAMES", "Table", "named", "table"]

ALL: tuple[type[Objective], ...] = tuple(
    kind
    for module in (elbo, weighted, gradients, rate, aggregate)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Objective) and kind.__name__ in module.__all__
)
"""In the order in which their modules define them."""

NAMES: dict[str, type[Objective]] = {
    kind.__name__.lower(): kind
    for kind in ALL
    if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(kind))
}
"""By name, as on the command line: those that need no argument."""

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


def named(name: str, **options: object) -> Objective:
    """The objective of a name, as on the command line: that of its class, in lower case.

    Arguments:
        name: One of `NAMES`.
        options: The objective's arguments, ``num_particles`` among them.

    Raises:
        ArgumentError: If there is none of that name, or it has no such argument.

    Example:
        >>> named("dreg", num_particles=3)
        DReG(num_particles=3)
    """
    kind = NAMES.get(name.lower())
    if kind is None:
        choices = _nearest(name, NAMES)
        expected = f"one of {', '.join(choices)}"
        raise ArgumentError("objective", expected, repr(name), [repr(c) for c in choices[:2]])
    known = [f.name for f in fields(kind) if f.init]
    for option in options:
        if option not in known:
            choices = _nearest(option, known)
            expected = f"an argument of the objective {name}, one of {', '.join(choices)}"
            raise ArgumentError(option, expected)
    return kind(**options)  # type: ignore[arg-type]


def _nearest(word: str, choices: Iterable[str]) -> list[str]:
    """The choices, those first that are spelt most alike."""
    alike = {c: difflib.SequenceMatcher(None, word.lower(), c).ratio() for c in choices}
    return sorted(alike, key=lambda c: -alike[c])


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
