"""Is the bound tight, the posterior right, the latent used, the model adequate: on one screen."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from pvae import terms
from pvae.diagnostics.checks import CHECKS, DEFAULT, Lines, Subject, main_checks
from pvae.diagnostics.gap import Gap
from pvae.diagnostics.importance import FEWEST, Importance
from pvae.diagnostics.learning import LearningCurve, Record, learning_curve
from pvae.diagnostics.predictive import PredictiveCheck, PredictiveChecks
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import ENOUGH_EPOCHS, ENOUGH_ROWS, P_VALUE
from pvae.diagnostics.trial import Trial
from pvae.errors import (
    ArgumentError,
    PvaeError,
    UndefinedError,
    check_choice,
    check_int,
    check_number,
    oxford,
)
from pvae.options import Options, progress_bar, tool
from pvae.origin import first_line, line_of_user
from pvae.pair import PairLike

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["NOTHING", "RUN_ALL", "Diagnosis", "diagnose"]

NOTHING = "nothing stands out: sample, reconstruct, encode with it"
"""The advice where all main checks were made, and no line has one."""

RUN_ALL = "pvae.diagnose(pair, x)"
"""What makes the checks that weren't asked for."""


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """What diagnostics have found, by check.

    Attributes:
        results: Each check's own result, which has its numbers as data for plots.
        undefined: Why a check says nothing about this pair.
        seconds: What each check took.
        num_data: N, rows that were looked at.
        rows: Which rows of the data these are, ``(N,)``; None for all of them.
        main: The checks without which nothing can be said to be well.
        remedies: By check that says nothing, what to try.
    """

    results: dict[str, Any]
    undefined: dict[str, str]
    seconds: dict[str, float]
    num_data: int = 0
    rows: Tensor | None = None
    main: tuple[str, ...] = ()
    remedies: dict[str, str] = field(default_factory=dict)

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
        """With the check that each is from; what two checks say, as the first has it.

        Verdicts of tests allow for all checks that test, and while there is something to be gained
        by training no line but the training's says what to do.
        """
        rows: dict[str, tuple[str, Finding]] = {}
        for check, result in self.results.items():
            for line in result.findings():
                rows.setdefault(line.name, (check, line))
        tests = {check for check, line in rows.values() if line.p_value is not None}
        lines = [(check, _corrected(line, len(tests))) for check, line in rows.values()]
        if self.training is None:
            is_tried = isinstance(self.results.get("trial"), Trial)  # and gains nothing
            return [(c, replace(n, advice="") if is_tried and c == "learning" else n)
                    for c, n in lines]  # fmt: skip
        return [(c, n if c in _TRAINING else replace(n, advice="")) for c, n in lines]

    @property
    def training(self) -> LearningCurve | Trial | None:
        """What says that the training isn't done, or has gone on too long; None if nothing does."""
        curve, tried = self.results.get("learning"), self.results.get("trial")
        if isinstance(curve, LearningCurve) and (curve.is_unfinished or curve.state == "falling"):
            return curve
        return tried if isinstance(tried, Trial) and tried.is_unfinished else None

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
    def has_curve(self) -> bool:
        """Whether there is a learning curve that says so much that no trial is needed."""
        curve = self.results.get("learning")
        if not isinstance(curve, LearningCurve) or curve.is_open:
            return False
        return len(curve.values) >= ENOUGH_EPOCHS

    @property
    def unseen(self) -> dict[str, str]:
        """By main check, why it leaves open whether all is well; empty if none does."""
        why = {}
        for name in self.main:
            found = self.results.get(name)
            if name == "trial" and self.has_curve:
                continue
            if name in self.undefined:
                why[name] = "isn't defined here"
            elif found is None:
                why[name] = "wasn't asked for"
            elif isinstance(found, _BY_ROWS) and self.num_data < ENOUGH_ROWS:
                why[name] = f"saw {self.num_data} rows, fewer than {ENOUGH_ROWS}"
        return why

    @property
    def advice(self) -> str:
        """What to do next: train on while that helps; else by the worst, or what wasn't seen."""
        lines = self.findings() if self.training is None else self.training.findings()
        first = _most_pressing(lines, without="diagnostics.gap" if "gap" in self.results else None)
        if first is not None:
            return f"{first.advice} ({first.name})"
        if "evidence" in self.missing:
            return "for draws of x and an evidence, a stochastic guide and a proper prior"
        return self._open() or NOTHING

    def _open(self) -> str:
        """What wasn't seen, and what to type; empty if all was."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.unseen.items():
            reasons.setdefault(why, []).append(name)
        if not reasons:
            return ""
        said = "; ".join(f"{', '.join(names)} {why}" for why, names in reasons.items())
        tries = [RUN_ALL] if "wasn't asked for" in reasons else []
        tries += [self.remedies[name] for name in self.unseen if name in self.remedies]
        return f"no all-clear, as {said}: " + (tries[0] if tries else "more rows of data")

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


def _corrected(line: Finding, num_tests: int) -> Finding:
    """A line with its verdict corrected for the number of checks that test (Bonferroni)."""
    if line.p_value is None or line.verdict not in ("look", "bad"):
        return line
    verdict = P_VALUE.verdict(min(1.0, line.p_value * num_tests))
    if verdict == "good":
        meaning = f"{line.meaning}; by chance, perhaps, as one of {num_tests} tests"
        return replace(line, verdict=verdict, meaning=meaning, advice="")
    return replace(line, verdict="look") if verdict == "look" else line


def _most_pressing(lines: list[Finding], without: str | None) -> Finding | None:
    """The worst of the lines that say what to do: of tests the one with the least p-value."""
    pressing = [line for line in lines if line.advice and line.verdict in ("bad", "look")]
    if without is not None:
        pressing = [line for line in pressing if not line.advice.startswith(without)]

    def rank(line: Finding) -> tuple[bool, bool, float]:
        return line.verdict != "bad", line.name not in _FIRST, line.p_value or 0.0

    return min(pressing, key=rank, default=None)


_BY_ROWS = (Importance, PredictiveCheck, PredictiveChecks)
_LAST = "the training"
_TRAINING = ("learning", "trial", "training")
_FIRST = ("information", "active units")  # without any of these nothing else counts


@tool
def diagnose(
    pair: PairLike,
    data: object,
    *,
    checks: str | Iterable[str] = DEFAULT,
    num_data: int | None = 500,
    num_particles: int = 200,
    bin_width: float | None = None,
    site: str | None = None,
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
        site: A latent of the data, to which ``"sbc"``, ``"tarp"`` and ``"aggregated"`` then keep,
            or an observed site, to which ``"predictive"`` does. None for all: latents together, and
            a line for each of several observed sites.
        history: History of the training, one row an epoch, as `Fit.history` is; without one, or
            with fewer than 20 epochs or noise that could hide a rise, ``"trial"`` says whether to
            train on, too.
        options: As in `pvae.options.Options`.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> diagnose(vae, torch.rand(50, 4).round(), checks=["elbo"]).findings()[0].name
        'ELBO'
    """
    asked = list(dict.fromkeys([checks] if isinstance(checks, str) else checks))
    if not asked or (unknown := [name for name in asked if name not in CHECKS]):
        got = oxford(unknown) if asked else "none"
        raise ArgumentError("checks", f"some of {oxford(CHECKS)}", got, ['checks=["elbo"]'])
    check_int("num_data", 2 if num_data is None else num_data, minimum=2)
    check_number("bin_width", 1 if bin_width is None else bin_width, above=0)
    check_int("num_particles", num_particles, minimum=FEWEST if "importance" in asked else 1)
    with terms.prepared(pair, data, options, "diagnose") as evaluation:
        evaluation, chosen = _some(evaluation.in_memory(), num_data)
    known = (*evaluation.structure.latents, *evaluation.structure.observed)
    if site is not None:
        check_choice("site", site, known)
    subject = Subject(evaluation, num_particles, bin_width, site)
    main = main_checks(evaluation.structure)
    diagnosis = Diagnosis({}, {}, {}, evaluation.num_rows, chosen, main)
    if history:
        _add_training(diagnosis, history)
    if diagnosis.has_curve:
        asked = [name for name in asked if name != "trial"]  # the curve says more
    training = {name: diagnosis.results.pop(name) for name in list(diagnosis.results)}
    for name in progress_bar(asked, title="diagnose", shown=evaluation.progress):
        started = time.perf_counter()
        try:
            result = CHECKS[name][1](subject)
            if isinstance(result, Importance | Gap):
                result = replace(result, rows=chosen)
            diagnosis.results[name] = result
        except PvaeError as error:  # the other checks have their say
            diagnosis.undefined[name] = error.one_line()
            if error.fixes:
                diagnosis.remedies[name] = error.fixes[0]
        except Exception as error:
            diagnosis.undefined[name] = _failed(error)
        diagnosis.seconds[name] = time.perf_counter() - started
    diagnosis.results.update(training)
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
