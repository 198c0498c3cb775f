"""Reading on in the midst of an epoch, also where a user's loader has an order of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pvae.data import Batches, LoaderSource, Mixed
from pvae.data.order import repeats
from pvae.errors import warn
from pvae.fitting.fingerprint import digest_of
from pvae.fitting.generators import Generators, States

__all__ = ["Reading"]


class Reading:
    """The batches of a training, from any step of an epoch on.

    A ``DataLoader`` is read once more from the epoch's start, with all generators as they were
    there, and these are put back where reading goes on. So its rows come in the order that they
    had, if that depends on generators at the start of the pass alone; else a warning says so.

    Arguments:
        batches: The data, cut into batches.
        generators: Those that the training draws from.

    Attributes:
        start: States of the generators at the start of the epoch, where there is a loader.
    """

    def __init__(self, batches: Batches | Mixed, generators: Generators) -> None:
        self._batches, self._generators = batches, generators
        parts = batches.parts.values() if isinstance(batches, Mixed) else [batches]
        self._loaders = [p.source for p in parts if isinstance(p.source, LoaderSource)]
        self.start: States | None = None
        self._last: Any = None
        self._expected: str | None = None

    def epoch(self, epoch: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from step ``start`` on."""
        if not self._loaders:
            yield from self._batches.epoch(epoch, start)
            return
        here, batches = self._generators.get(), self._batches.epoch(epoch)
        if start == 0 or self.start is None:
            self.start = here
        else:
            expected = self._expected or self._digest()
            self._generators.set(self.start)
            for _ in range(start):
                self._last = next(batches, None)
            self._generators.set(here)
            self._check(expected)
        for self._last in batches:
            yield self._last

    def _check(self, expected: str | None) -> None:
        """Warns if the batches that were read again aren't those of before."""
        self._expected = None
        if expected not in (None, self._digest()):
            warn(
                "The DataLoader's rows come in another order than before, as it depends on more "
                "than generators at the start of a pass: the rest of this epoch isn't what it "
                "would have been. pvae.fit(pair, loader.dataset, batch_size=...) goes on exactly."
            )

    def _digest(self) -> str | None:
        """Of the batch that was read last; None where the order is sure to be the same."""
        if self._last is None:
            return None
        if isinstance(self._batches, Batches) and all(repeats(s.loader) for s in self._loaders):
            return None
        name, batch = self._last if isinstance(self._batches, Mixed) else ("", self._last)
        return f"{name} {digest_of([batch])}"

    def as_json(self) -> dict[str, object]:
        """What a checkpoint within an epoch has beside the states of the process's generators."""
        return {"own": None if self.start is None else self.start.own, "last": self._digest()}

    def restore(self, process: dict[str, Tensor], saved: dict[str, Any]) -> None:
        """Puts back what a checkpoint within an epoch has."""
        self.start, self._expected = States(process, saved["own"]), saved["last"]
