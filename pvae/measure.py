"""Measure: of which data log p(x) is, and whether it is a probability or a density."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pvae.errors import ArgumentError

__all__ = ["Measure", "MeasureKind"]

MeasureKind = Literal["mass", "density", "mixed", "unnormalised"]
"""Of a datum's values: all discrete; all continuous; some of each; scored by no distribution."""


_WORDS: dict[MeasureKind, str] = {
    "mass": "of a mass",
    "density": "of a density",
    "mixed": "of masses and densities",
    "unnormalised": "which isn't normalised",
}


@dataclass(frozen=True, eq=False)
class Measure:
    r"""What log p(x) of each datum is a log of, and of which data.

    A log density has a scale, that of the data: in bins of width h it stands for a probability of
    about :math:`\log p(x) + D \log h` with D the number of continuous values.

    Attributes:
        marks: A number for each datum, by its observed values alone; shape ``(N,)``.
        entries: How many values of each datum count, ``(N,)``.
        continuous: How many of these have a density, ``(N,)``.
        is_normalised: Whether all are scored by distributions, unlike grey values as Bernoulli's.
        is_binned: Whether densities have been made probabilities of bins.
    """

    marks: Tensor
    entries: Tensor
    continuous: Tensor
    is_normalised: bool = True
    is_binned: bool = False

    @property
    def kind(self) -> MeasureKind:
        """Whether log p(x) is that of a mass or a density."""
        if not self.is_normalised:
            return "unnormalised"
        if not bool((self.continuous > 0).any()):
            return "mass"
        return "density" if bool((self.continuous == self.entries).all()) else "mixed"

    @property
    def words(self) -> str:
        """The same in words, as they follow "log p(x)"."""
        return _WORDS[self.kind]

    def in_bins(self) -> Measure:
        """The same once densities are taken times the width of bins."""
        return replace(self, continuous=self.continuous * 0, is_binned=True)

    def to(self, device: torch.device) -> Measure:
        """The same on a device."""
        marks, entries, continuous = (
            x.to(device) for x in (self.marks, self.entries, self.continuous)
        )
        return replace(self, marks=marks, entries=entries, continuous=continuous)

    def require_same(self, other: Measure, names: tuple[str, str], where: str) -> None:
        """Refuses what can't be compared: other rows, other data, a density with a mass.

        Raises:
            ArgumentError: That says which of these it is.
        """
        one, two = names
        other = other.to(self.marks.device)
        if len(self.marks) != len(other.marks):
            counts = f"{len(self.marks)} of '{one}', {len(other.marks)} of '{two}'"
            raise ArgumentError(where, "one number of data, of the same data", counts, _SAME)
        if self.kind != other.kind or bool((self.continuous != other.continuous).any()):
            actual = f"a {self.kind} of '{one}', a {other.kind} of '{two}'"
            if self.kind == other.kind:
                actual = f"densities of other numbers of values of '{one}' and '{two}'"
            fixes = [] if "unnormalised" in (self.kind, other.kind) else _BINS
            raise ArgumentError(
                where, "log p(x) of one kind: of masses or of densities", actual, fixes
            )
        if bool((self.entries != other.entries).any()):
            actual = f"other numbers of observed values of '{one}' and '{two}'"
            raise ArgumentError(where, "the same observed values of each datum", actual, _SAME)
        affine = self.is_binned or other.is_binned  # counts and shares of these are the same data
        ours, theirs = (_standard(m) if affine else m for m in (self.marks, other.marks))
        if not _equal(ours, theirs):
            same_rows = _equal(ours.sort().values, theirs.sort().values)
            actual = f"'{one}' and '{two}' of the same rows in another order"
            if not same_rows:
                apart = int(((ours - theirs).abs() > _tolerance(ours, theirs)).sum())
                actual = f"'{one}' and '{two}' of other data: {apart} of {len(ours)} rows differ"
            raise ArgumentError(where, "the same data in the same order", actual, _SAME)


_SAME = ["the same data, in one order, for each: one array, one seed, no shuffling loader"]
_BINS = [
    "bounds.compare(..., bin_width=h), with h the width of the bins that data were rounded to",
    "estimate.in_bins(h), for one of them",
]
_TENSORS = ("marks", "entries", "continuous")
_EXACT = 1e-5  # of the largest mark: data may be in single precision


def _tolerance(ours: Tensor, theirs: Tensor) -> Tensor:
    return _EXACT * (1e-30 + ours.abs().max().maximum(theirs.abs().max()))


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return bool(((ours - theirs).abs() <= _tolerance(ours, theirs)).all())


def _standard(marks: Tensor) -> Tensor:
    """Marks but for the data's unit and origin, by which all data have been changed alike."""
    off = marks - marks.mean()
    size = off.square().mean().sqrt()
    return off / size if bool(size > 0) and math.isfinite(size) else off
