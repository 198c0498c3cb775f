"""Is the bound tight, the posterior right, the latent used, the model adequate: on one screen."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from pvae import terms
from pvae.diagnostics.checks import CHECKS, DEFAULT, Lines, Subject
from pvae.diagnostics.gap import Gap
from pvae.diagnostics.importance import FEWEST, Importance
from pvae.diagnostics.learning import LearningCurve, Record, learning_curve
from pvae.diagnostics.result import Finding, Result
from pvae.errors import ArgumentError, PvaeError, UndefinedError, check_int, check_number, oxford
from pvae.options import Options, progress_bar, tool
from pvae.origin import first_line, line_of_user
from pvae.pair import PairLike

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["NOTHING", "Diagnosis", "diagnose"]

NOTHING = "nothing stands out: sample, reconstruct, encode with it"
"""The advice where no line has one."""


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """What diagnostics have found, by check.

    Attributes:
        results: Each check's own result, which has its numbers as data for plots.
        undefined: Why a check says nothing about this pair.
        seconds: What each check took.
        num_data: N, rows that were looked at.
        rows: Which rows of the data these are, ``(N,)``; None for all of them.
    """

    results: dict[str, Any]
    undefined: dict[str, str]
    seconds: dict[str, float]
    num_data: int = 0
    rows: Tensor | None = None

    @property
    def title(self) -> str:
        """How many data were looked at."""
        return f"Diagnosis, N = {self.num_data}"

    def findings(self) -> list[Finding]:
        """All lines, in the order of the screen."""
        return [line for _, line in self._lines()]

    def sections(self) -> list[tuple[str, list[Finding]]]:
        """The lines by what they are about."""
        by_topic = groupby(
            self._lines(), lambda row: CHECKS[row[0]][0] if row[0] in CHECKS else _LAST
        )
        return [(topic, [line for _, line in rows]) for topic, rows in by_topic]

    def _lines(self) -> list[tuple[str, Finding]]:
        """With the check that each is from; what two checks say, as the first has it."""
        rows: dict[str, tuple[str, Finding]] = {}
        for check, result in self.results.items():
            for line in result.findings():
                rows.setdefault(line.name, (check, line))
        return list(rows.values())

    @property
    def missing(self) -> dict[str, str]:
        """By check or line, why there is none."""
        return self.undefined | {
            k: why for r in self.results.values() for k, why in r.missing.items()
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What estimates say of what isn't in them, once each."""
        estimates = (getattr(result, "estimate", None) for result in self.results.values())
        return (*dict.fromkeys(line for found in estimates if found for line in found.remarks),)

    @property
    def advice(self) -> str:
        """What to do next: train on while that helps; else by what is bad, or worth a look."""
        lines, curve = self.findings(), self.results.get("learning")
        if isinstance(curve, LearningCurve) and (curve.is_unfinished or curve.state == "falling"):
            lines = curve.findings()
        first = _most_pressing(lines, without="diagnostics.gap" if "gap" in self.results else None)
        if first is not None:
            return f"{first.advice} ({first.name})"
        if "evidence" in self.missing:
            return "for draws of x and an evidence, a stochastic guide and a proper prior"
        return NOTHING

    def to_dict(self) -> dict[str, object]:
        """As other results have it, with each line's check, the rows and the time of each check."""
        lines = [{"check": check} | line.to_dict() for check, line in self._lines()]
        rows = None if self.rows is None else self.rows.tolist()
        more = {"num_data": self.num_data, "rows": rows, "seconds": self.seconds}
        return super().to_dict() | {"findings": lines} | more

    def to_frame(self) -> DataFrame:
        """A pandas table with a row for each finding, and the check that it is from."""
        frame = super().to_frame()
        frame.insert(0, "check", [check for check, _ in self._lines()])
        return frame


def _most_pressing(lines: list[Finding], without: str | None) -> Finding | None:
    """The first of the bad lines, or else of those worth a look, that say what to do."""
    pressing = [line for line in lines if line.advice and line.verdict in ("bad", "look")]
    if without is not None:
        pressing = [line for line in pressing if not line.advice.startswith(without)]
    pressing.sort(key=lambda line: (line.verdict != "bad", line.name not in _FIRST))
    return pressing[0] if pressing else None


_LAST = "the training"
_FIRST = ("information", "active units")  # without any of these nothing else counts


@tool
def diagnose(
    pair: PairLike,
    data: object,
    *,
    checks: Iterable[str] = DEFAULT,
    num_data: int | None = 500,
    num_particles: int = 200,
    bin_width: float | None = None,
    history: Sequence[Record] | None = None,
    **options: Unpack[Options],
) -> Diagnosis:
    """What a fit is worth, on one screen: number, standard error, verdict, and what to do next.

    Lines begin with ``+`` where all is well, ``?`` where it is worth a look, ``!`` where something
    is wrong. What isn't defined for the pair is said, with its reason, and never a number. The
    default checks take less than two epochs of training of an image model, and
    ``checks=diagnostics.SUMMARY``, which is what ``pvae train`` ends with, less than that;
    ``"gap"`` (is it the encoder or the family?) and ``"ais"`` (what is log p(x) really?) optimise
    and anneal for each datum, ``"gradients"`` (how noisy is a step?) takes a hundred of them; these
    are run when they are asked for: ``checks=[*DEFAULT, "gap", "ais", "gradients"]``.

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source; held out, if there are any.
        checks: Names of `CHECKS`, or one of them.
        num_data: N, rows that are looked at, drawn from the data; all, where there are fewer, or
            for None.
        num_particles: K, draws from the guide for each, at least 25 for ``"importance"``.
        bin_width: Width of the bins that data were rounded to, 1 for counts and classes: with it
            ``"evidence"`` has a line in bits per dimension (see `bits_per_dimension`).
        history: History of the training, one row an epoch, as `Fit.history` is.
        options: As in `pvae.options.Options`.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> diagnose(vae, torch.rand(50, 4).round(), checks=["elbo"]).findings()[0].name
        'ELBO'
    """
    asked = list(dict.fromkeys([checks] if isinstance(checks, str) else checks))
    if unknown := [name for name in asked if name not in CHECKS]:
        raise ArgumentError("checks", f"some of {oxford(CHECKS)}", oxford(unknown))
    check_int("num_data", 2 if num_data is None else num_data, minimum=2)
    check_number("bin_width", 1 if bin_width is None else bin_width, above=0)
    check_int("num_particles", num_particles, minimum=FEWEST if "importance" in asked else 1)
    with terms.prepared(pair, data, options, "diagnose") as evaluation:
        evaluation, chosen = _some(evaluation.in_memory(), num_data)
    subject = Subject(evaluation, num_particles, bin_width)
    diagnosis = Diagnosis({}, {}, {}, evaluation.num_rows, chosen)
    for name in progress_bar(asked, title="diagnose", shown=evaluation.progress):
        started = time.perf_counter()
        try:
            result = CHECKS[name][1](subject)
            if isinstance(result, Importance | Gap):
                result = replace(result, rows=chosen)
            diagnosis.results[name] = result
        except PvaeError as error:  # the other checks have their say
            diagnosis.undefined[name] = error.one_line()
        except Exception as error:
            diagnosis.undefined[name] = _failed(error)
        diagnosis.seconds[name] = time.perf_counter() - started
    if history:
        _add_training(diagnosis, history)
    return diagnosis


def _failed(error: Exception) -> str:
    """What an error says that isn't one of pvae's, and at which line of a user's it came up."""
    line = line_of_user(error)
    return f"{type(error).__name__}: {first_line(error)}" + (f" ({line})" if line else "")


def _add_training(diagnosis: Diagnosis, history: Sequence[Record]) -> None:
    try:
        diagnosis.results["learning"] = learning_curve(history)
    except UndefinedError as error:
        diagnosis.undefined["learning"] = f"expected {error.expected}; got {error.actual}"
    if (spent := history[-1].get("seconds")) is not None:
        line = Finding("training time", spent, None, "s", meaning=f"{len(history)} epoch(s)")
        diagnosis.results["training"] = Lines([line])


def _some(
    evaluation: terms.Evaluation, count: int | None
) -> tuple[terms.Evaluation, Tensor | None]:
    """Some rows, by chance, and which; all, of a pair that belongs to its rows."""
    structure, source = evaluation.structure, evaluation.source
    whole = structure.subsample_size is not None or structure.tied_to is not None
    if whole or structure.global_sites or count is None or source.num_rows <= count:
        return evaluation, None
    chosen = torch.randperm(source.num_rows, device=source.device)[:count].sort().values
    return evaluation.on(source.rows(chosen)), chosen
