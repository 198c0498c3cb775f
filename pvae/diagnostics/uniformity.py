"""Whether ranks are uniform: tests, and a band for their distribution function."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import binom, chisquare
from torch import Tensor

from pvae.devices import double
from pvae.simulate import random_rank

__all__ = ["Uniformity", "ranked", "uniformity"]

MAX_POINTS, MAX_BINS = 99, 20


@dataclass(frozen=True)
class Uniformity:
    r"""Tests of ranks, column by column, against the uniform distribution on 0, ..., L.

    Attributes:
        points: Where the distribution function is looked at, in (0, 1), shape ``(P,)``.
        ecdf: Share of ranks below ``points * (L + 1)``, shape ``(P, D)``.
        lower: Where all P values of all D columns lie with probability 95% (or a little more) if
            every column is uniform: the band's lower edge, shape ``(P,)``.
        upper: Its upper edge.
        chi2_p: p-values of the chi-squared test over bins, shape ``(D,)``.
        ecdf_p: p-values of the simultaneous test by the distribution function, shape ``(D,)``.
        p_values: The lesser of both, times 2 D (Bonferroni): below a with probability a at most,
            for any of the columns, if all are uniform. Shape ``(D,)``.
        shift: How far the mean of rank / L is from 1/2, in standard errors, shape ``(D,)``.
        spread: How far its variance is from the uniform one's, likewise.
    """

    points: Tensor
    ecdf: Tensor
    lower: Tensor
    upper: Tensor
    chi2_p: Tensor
    ecdf_p: Tensor
    p_values: Tensor
    shift: Tensor
    spread: Tensor

    @property
    def p_value(self) -> float:
        """That all columns are uniform: the least of the corrected p-values."""
        return float(self.p_values.min())

    @property
    def worst(self) -> int:
        """The column with the least p-value; among equals, the one of the oddest shape."""
        least = self.p_values == self.p_values.min()
        oddness = torch.maximum(self.shift.abs(), self.spread.abs())
        return int(torch.where(least, oddness, -1.0).argmax())


def ranked(own: Tensor, drawn: Iterable[tuple[slice, Tensor]]) -> Tensor:
    """Ranks of numbers ``(S, ...)`` among others drawn for some rows at a time; ties by chance."""
    less = torch.zeros(own.shape, dtype=torch.long, device=own.device)
    equal = less.clone()
    for rows, draws in drawn:
        less[rows] += (draws < own[rows]).sum(0)
        equal[rows] += (draws == own[rows]).sum(0)
    return random_rank(less, equal)


def uniformity(ranks: Tensor, num_draws: int) -> Uniformity:
    r"""Tests ranks of S independent simulations, shape ``(S, D)``, each in 0, ..., L.

    The test by the distribution function F takes, over all points t, the least two-sided
    probability of :math:`S F(t) \sim \mathrm{Binomial}(S, t)`; its p-value is computed, not
    simulated, from the Markov chain that the counts are (Sailynoja et al., 2022). Where it is
    below 1e-9 an upper bound is given, P times that least probability.

    References:
        Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation
        and multiple sample comparison (Sailynoja et al., 2022),
        https://doi.org/10.1007/s11222-022-10090-6

    Arguments:
        ranks: Integers, shape ``(S, D)``.
        num_draws: L.
    """
    counts = ranks.cpu().numpy()
    size, columns = counts.shape
    cuts = np.unique(np.linspace(1, num_draws, min(num_draws, MAX_POINTS)).round().astype(int))
    below = np.stack([np.searchsorted(c, cuts) for c in np.sort(counts, 0).T], 1)  # (P, D)
    points = tuple((cuts / (num_draws + 1)).tolist())
    two_sided = _two_sided(below, size, np.asarray(points)[:, None]).min(0)
    ecdf_p = np.array([_p_value(size, points, float(least)) for least in two_sided])
    chi2_p = _chi_squared(counts, num_draws)
    low, high = _limits(size, points, _level(size, points, 0.05 / columns))
    unit = double(ranks) / num_draws
    variance = (num_draws + 2) / (12 * num_draws)  # of a uniform rank / L
    fourth = variance * (3 * (num_draws + 1) ** 2 - 7) / (20 * num_draws**2)
    squares = (unit - 0.5).square().mean(0)
    p_values = np.minimum(1, 2 * columns * np.minimum(chi2_p, ecdf_p))
    known = (np.asarray(points), below / size, low / size, high / size, chi2_p, ecdf_p, p_values)
    shift = (unit.mean(0) - 0.5) / (variance / size) ** 0.5
    spread = (squares - variance) / ((fourth - variance**2) / size) ** 0.5
    return Uniformity(*map(torch.from_numpy, known), *(x.cpu() for x in (shift, spread)))


def _chi_squared(counts: np.ndarray, num_draws: int) -> np.ndarray:
    """p-values over bins of about equal probability, with at least five ranks expected in each."""
    num_bins = max(2, min(MAX_BINS, num_draws + 1, len(counts) // 5))
    bins = np.arange(num_draws + 1) * num_bins // (num_draws + 1)
    expected = np.bincount(bins) * len(counts) / (num_draws + 1)
    observed = [np.bincount(bins[c], minlength=num_bins) for c in counts.T]
    return np.array([chisquare(f, expected).pvalue for f in observed])


def _two_sided(count: np.ndarray, size: int, share: np.ndarray) -> np.ndarray:
    tails = np.minimum(binom.cdf(count, size, share), binom.sf(count - 1, size, share))
    return np.asarray(2 * tails)


def _limits(size: int, points: tuple[float, ...], level: float) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest count at each point whose two-sided probability is above."""
    level = max(level, 1e-300)
    share, at_most = np.asarray(points), level / 2 * (1 + 1e-12)
    low, high = binom.ppf(level / 2, size, share), binom.isf(level / 2, size, share)
    low = np.where(binom.cdf(low, size, share) <= at_most, low + 1, low)
    high = np.where(binom.sf(high - 1, size, share) <= at_most, high - 1, high)
    return low, high


def _inside(size: int, points: tuple[float, ...], level: float) -> float:
    """Probability that no point of a uniform sample has a two-sided probability <= level."""
    low, high = _limits(size, points, level)
    if (low > high).any():
        return 0.0
    log_factorial = gammaln(np.arange(size + 1) + 1.0)
    here, probability, before = np.array([0]), np.array([1.0]), 0.0
    for point, first, last in zip(points, low.astype(int), high.astype(int), strict=True):
        there = np.arange(first, last + 1)
        steps = there[None, :] - here[:, None]
        left = size - here[:, None]
        share = (point - before) / (1 - before)
        known = np.clip(steps, 0, left)
        log_pmf = log_factorial[left] - log_factorial[known] - log_factorial[left - known]
        log_pmf = log_pmf + known * np.log(share) + (left - known) * np.log1p(-share)
        probability = probability @ np.where(steps == known, np.exp(log_pmf), 0.0)
        here, before = there, point
    return float(probability.sum())


def _p_value(size: int, points: tuple[float, ...], least: float) -> float:
    """Probability that some point has so little a two-sided probability; at most, if it is tiny."""
    bound = len(points) * least
    return bound if bound < 1e-9 else max(0.0, 1 - _inside(size, points, least))


@lru_cache(maxsize=64)
def _level(size: int, points: tuple[float, ...], alpha: float) -> float:
    """The two-sided probability below which some point falls with probability alpha at most."""
    low, high = np.log(alpha / (2 * len(points))), np.log(alpha)
    for _ in range(20):
        middle = (low + high) / 2
        too_often = 1 - _inside(size, points, float(np.exp(middle))) > alpha
        low, high = (low, middle) if too_often else (middle, high)
    return float(np.exp(low))
