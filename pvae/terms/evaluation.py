"""A pair and data, made ready for a tool."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from pvae import randomness
from pvae.data import LoaderSource, Source, as_source, check_rows, first_batch, in_memory
from pvae.devices import as_device, same_device
from pvae.errors import ArgumentError, PairError
from pvae.options import checked_options
from pvae.pair import Batch, Pair, PairLike, Structure, as_pair
from pvae.pair.running import ON_ONE_DEVICE
from pvae.terms.rows import check_own_rows
from pvae.terms.support import check_data
from pvae.threads import alone

__all__ = ["Evaluation", "check_place", "look_at", "prepared"]


@dataclass(frozen=True)
class Evaluation:
    """A pair and the data that it is evaluated on, checked, with its `Options`.

    Attributes:
        pair: The pair.
        structure: What it is made of.
        source: N data, on the pair's device.
    """

    pair: Pair
    structure: Structure
    source: Source
    max_rows: int = 8192
    progress: bool = True
    seed: int = 0

    @property
    def num_rows(self) -> int:
        """N."""
        return self.source.num_rows

    def in_memory(self) -> Evaluation:
        """The same, with the data of a ``DataLoader`` read out, so that their order is one."""
        return replace(self, source=in_memory(self.source))

    def on(self, batch: Batch) -> Evaluation:
        """The same pair on other data."""
        structure = self.structure
        source = as_source(batch, structure.device, structure.dtype, structure.axes)
        return replace(self, source=source)

    def as_one_datum(self) -> Evaluation:
        """The same pair and data with no plate that counts these: the data set is one datum.

        What all data share is then a latent of that datum, beside all latents of single data.
        ``max_rows`` goes on to bound the rows that go through at once.
        """
        if self.structure.subsample_size is not None:
            expected, actual = "a pair that takes all its data", "one that draws a subsample"
            raise PairError("the data set as one datum", expected, actual)
        pair = Pair(
            self.pair.model, self.pair.guide, plate=False, densities=self.structure.densities
        )
        batch = first_batch(self.in_memory().source, self.num_rows)
        structure = pair.inspect(batch)
        whole = replace(self, pair=pair, structure=structure).on(batch)
        return replace(whole, max_rows=max(1, self.max_rows // self.num_rows))


@contextmanager
def prepared(
    pair: PairLike, data: object, options: Mapping[str, object], tool: str = "pair"
) -> Iterator[Evaluation]:
    """Looks at pair and data together, and seeds copies of the generators for a tool's draws.

    Arguments:
        pair: A pair, or a tuple of model and guide.
        data: An array, tensor, tuple of them, data set, loader or source.
        options: As in `pvae.options.Options`.
        tool: Name of the tool, for error messages.

    Raises:
        ArgumentError: If an option can't be used, or there is no pair.
        DataError: If data are missing, infinite, or outside the support of the site that observes
            them; names the first offending row.
        PairError: If model, guide and data don't fit each other.
    """
    checked, pair = checked_options(options), as_pair(pair, tool)
    with alone(), randomness.forked(checked["seed"]):
        structure, source = _structure_of(pair, data, checked["device"])
        rest = (checked["max_rows"], checked["progress"], checked["seed"])
        yield Evaluation(pair, structure, source, *rest)


def look_at(
    pair: Pair, data: object, device: torch.device, dtype: torch.dtype, num_rows: int | None = 128
) -> tuple[Structure, Source]:
    """What a pair is made of, by some rows of data or all, and the data as a source where it is.

    Their rows are along the axes that the pair's data plate counts.

    Raises:
        DataError: If the data aren't numbers, or not finite.
        PairError: If pair and data don't fit each other.
    """
    source = as_source(data, device, dtype, axes="any")
    try:
        structure = pair.inspect_source(source, num_rows or source.num_rows)
    except PairError as error:
        _check_values(pair, source, dtype)  # was it the data?
        if _is_of_lengths(error, first_batch(source, 1)):
            as_source(data, device, dtype)  # refuses unequal lengths
        raise
    return structure, as_source(data, structure.device, structure.dtype, structure.axes)


def check_place(structure: Structure, device: torch.device) -> None:
    """Refuses a pair that doesn't run on the device that was asked for, and ran on another one.

    Raises:
        ArgumentError: If it is so.
    """
    if not same_device(structure.device, device):
        expected = f"a pair whose tensors can be on '{device}'"
        actual = f"programs that hold or make tensors on '{structure.device}'"
        raise ArgumentError("device", expected, actual, [ON_ONE_DEVICE])


def _is_of_lengths(error: PairError, batch: Batch) -> bool:
    """Whether a program has failed because of two arrays' lengths, which its error names both."""
    lengths = {str(len(part)) for part in batch if part.dim()}
    named = set(re.findall(r"\d+", str(error.__cause__)))
    return len(lengths & named) > 1


def _check_values(pair: Pair, source: Source, dtype: torch.dtype) -> None:
    """Refuses values that aren't finite, naming the row along the axis that the pair counts."""
    whole = first_batch(source, source.num_rows)
    filled = as_source(tuple(map(torch.nan_to_num, whole)), source.device, dtype, axes="any")
    with contextlib.suppress(PairError):
        check_rows(source.along(pair.inspect_source(filled).axes))
    check_rows(source)


def _structure_of(
    pair: Pair, data: object, device: str | torch.device | None
) -> tuple[Structure, Source]:
    """What a pair is made of, by data, and the data as a source on its device, checked once."""
    if device is not None:
        pair.place(device, data)
    like = pair.home(data)
    where = like.device if device in (None, "auto") else as_device(device)
    structure, source = look_at(pair, data, where, like.dtype)
    if device not in (None, "auto"):
        check_place(structure, where)
    if isinstance(source, LoaderSource):
        needs_rows = structure.tied_to is not None or structure.subsample_size is not None
        source = in_memory(source) if needs_rows else source.ordered()
    if source not in pair.checked_sources:
        check_data(structure, source)
        check_own_rows(structure, source)
        if not isinstance(source, LoaderSource):
            pair.checked_sources.add(source)
    return structure, source
