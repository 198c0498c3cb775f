"""Batches of several sources in one training, such as labelled and unlabelled data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pvae.data.batches import Batches
from pvae.data.sources import Batch, Source
from pvae.errors import ArgumentError, check_int, oxford

__all__ = ["Mixed"]


class Mixed:
    """Batches of several sources, each by itself, in an order that is spread evenly.

    The order is a function of (epoch, step), as that of each source's rows is. Where a source has
    less than the epoch asks for, it goes on with its next pass.

    Arguments:
        parts: The batches of each source, by name.
        mix: How many batches of each come in one turn, by name: an epoch has as many turns as the
            source that lasts longest needs. None for one pass over each in every epoch, so that
            all batches count alike.

    Example:
        >>> import torch
        >>> from pvae.data import as_source
        >>> few, many = (Batches(as_source(torch.arange(n)), 2) for n in (4, 12))
        >>> mixed = Mixed({"few": few, "many": many})
        >>> [name for name, _ in mixed.epoch(0)]
        ['many', 'few', 'many', 'many', 'many', 'few', 'many', 'many']
        >>> [name for name, _ in Mixed(mixed.parts, {"few": 1, "many": 2}).epoch(0)]
        ['many', 'few', 'many', 'many', 'few', 'many', 'many', 'few', 'many']
    """

    def __init__(self, parts: Mapping[str, Batches], mix: Mapping[str, int] | None = None) -> None:
        self.parts, self.mix = dict(parts), mix
        steps = {name: part.steps_per_epoch for name, part in self.parts.items()}
        turns = 1
        if mix is not None:
            _check_mix(self.parts, mix)
            turns = max(-(-steps[name] // count) for name, count in mix.items())
        self._order = _spread(steps if mix is None else mix) * turns

    @property
    def source(self) -> Source:
        """The first source."""
        return next(iter(self.parts.values())).source

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return sum(part.num_rows for part in self.parts.values())

    @property
    def batch_size(self) -> int:
        """Rows of the largest batch."""
        return max(part.batch_size for part in self.parts.values())

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, of all sources."""
        return len(self._order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[str, Batch]]:
        """The batches of one epoch, from step ``start`` on, each with its source's name."""
        before = {name: epoch * self._order.count(name) for name in self.parts}
        for name in self._order[:start]:
            before[name] += 1
        running = {name: _passes(self.parts[name], count) for name, count in before.items()}
        for name in self._order[start:]:
            yield name, next(running[name])


def _spread(counts: Mapping[str, int]) -> list[str]:
    """Each name so many times, as evenly as can be."""
    places = [(2 * k + 1, n, name) for name, n in counts.items() for k in range(n)]
    return [name for *_, name in sorted(places, key=lambda place: place[0] / place[1])]


def _passes(batches: Batches, start: int) -> Iterator[Batch]:
    """Pass after pass over a source, from its batch number ``start`` on."""
    number, step = divmod(start, batches.steps_per_epoch)
    while True:
        yield from batches.epoch(number, step)
        number, step = number + 1, 0


def _check_mix(parts: Mapping[str, Batches], mix: Mapping[str, int]) -> None:
    if not isinstance(mix, Mapping) or mix.keys() != parts.keys():
        expected = f"a number of batches for each of {oxford(parts)}"
        fixes = ["mix={" + ", ".join(f"'{name}': 1" for name in parts) + "}"]
        raise ArgumentError("mix", expected, repr(mix), fixes)
    for name, count in mix.items():
        check_int(f"mix['{name}']", count)
