"""Modes of posteriors that local fits have missed, found by annealing from the prior."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

from pvae import randomness
from pvae.bounds.annealing import AIS, annealed
from pvae.bounds.weights import WeightSums
from pvae.data import first_batch
from pvae.errors import UndefinedError
from pvae.estimate import Estimate
from pvae.terms import Evaluation

__all__ = ["FIND_MODES", "missed_by_fits", "said"]

FIND_MODES = (
    "diagnostics.gap(pair, x, evidence=bounds.evidence(pair, x, method='ais', "
    "ais=bounds.AIS(start='prior'))), or local=bounds.LocalFit(start='prior')"
)
"""What to type where posteriors have modes that fits have missed."""

_HOW = AIS(start="prior", num_temperatures=50, num_leapfrog=4)
_CHAINS, _ROWS = 64, 64  # enough to see that something is missing
_ERRORS, _LEAST = 4.5, 0.02  # standard errors, and nats per datum, by which annealing finds more


def missed_by_fits(evaluation: Evaluation, fitted: Estimate) -> Estimate | None:
    """Nats per datum that annealing from the prior finds beyond fits, on the first rows.

    Both are lower bounds on average: where one is higher by more than errors, the other has missed
    something. None where it isn't; or where the pair can't be annealed from its prior.

    Arguments:
        evaluation: The pair and its data, in memory.
        fitted: log p(x) of the same data, from draws of what was fitted to each datum.
    """
    structure, n = evaluation.structure, min(evaluation.num_rows, _ROWS)
    if not structure.takes_any_rows or structure.improper or fitted.kind != "lower":
        return None
    rows = first_batch(evaluation.source, n)
    some, weights = replace(evaluation.on(rows), progress=False), WeightSums()
    with randomness.forked(), contextlib.suppress(UndefinedError):
        for chunk in annealed(some, _HOW, _CHAINS):
            weights.add(chunk.rows, weights.reduce(chunk.forward))
        found = weights.estimate("annealing", _CHAINS, structure)
        variances = None if fitted.variances is None else fitted.variances[:n]
        theirs = Estimate("fits", fitted.values[:n], variances, num_particles=fitted.num_particles)
        more = found - theirs
        is_more = more.mean > max(_LEAST, _ERRORS * more.se_draws)
        return more.named("missed by fits") if is_more and math.isfinite(more.mean) else None
    return None


def said(missed: Estimate) -> str:
    """What fits have missed, and what to type, in a line."""
    return (
        f"too low: annealing from the prior finds {missed.mean:.2g} nats per datum more, of modes "
        f"that the fits have missed: {FIND_MODES}"
    )
