"""Is the bound tight, the posterior right, the latent used, the model adequate: on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any, Unpack

import torch
from torch import Tensor
from tqdm import tqdm

from pvae import bounds
from pvae import terms as t
from pvae.diagnostics.aggregate import aggregated_posterior
from pvae.diagnostics.calibration import sbc
from pvae.diagnostics.finding import Finding
from pvae.diagnostics.gap import gap
from pvae.diagnostics.gradients import gradient_noise
from pvae.diagnostics.importance import importance
from pvae.diagnostics.joint import tarp
from pvae.diagnostics.learning import LearningCurve, learning_curve
from pvae.diagnostics.predictive import predictive
from pvae.diagnostics.surgery import surgery
from pvae.errors import ArgumentError, PvaeError, UndefinedError, check_int, oxford
from pvae.options import Options, tool
from pvae.pair import PairLike

__all__ = ["CHECKS", "DEFAULT", "Diagnosis", "Subject", "diagnose"]


@dataclass(frozen=True)
class Subject:
    """What is diagnosed: a pair, some rows of data, and how much may be spent on each check.

    Attributes:
        evaluation: The pair and its rows.
        num_particles: K, draws from the guide for each datum.
    """

    evaluation: t.Evaluation
    num_particles: int

    def run(self, check: Callable[..., Any], **options: Any) -> Any:
        """A diagnostic of the pair and its data."""
        on = self.evaluation
        shared = {"max_rows": on.max_rows, "seed": on.seed, "progress": on.progress}
        return check(on.pair, on.source, **shared, **options)


@dataclass(frozen=True)
class Lines:
    """Findings of what has none itself."""

    result: Any
    lines: list[Finding]

    def findings(self) -> list[Finding]:
        """The lines."""
        return self.lines


def _bound(subject: Subject) -> Lines:
    found = subject.run(bounds.elbo, num_particles=min(subject.num_particles, 16))
    if found.by == "draw":
        error, meaning = found.se_draws, "a datum's share"
    else:
        error, meaning = found.se_data, "log p(x, z) - log q(z | x), averaged over q"
    return Lines(found, [Finding(found.name, found.mean, error, "nats", meaning=meaning)])


def _gradients(subject: Subject) -> Any:
    """Of the ELBO: a trained objective isn't part of a pair."""
    return subject.run(gradient_noise)


def _annealing(subject: Subject) -> Lines:
    found = subject.run(bounds.evidence, method="ais", num_particles=16)
    meaning = "log p(x) by annealing, a lower bound on average"
    return Lines(found, [Finding("AIS", found.mean, found.se_data, "nats", meaning=meaning)])


CHECKS: dict[str, tuple[str, Callable[[Subject], Any]]] = {
    "elbo": ("the bound", _bound),
    "importance": ("the bound", lambda s: s.run(importance, num_particles=s.num_particles)),
    "gap": ("the bound", lambda s: s.run(gap)),
    "ais": ("the bound", _annealing),
    "sbc": ("the posterior", lambda s: s.run(sbc, num_simulations=500)),
    "tarp": ("the posterior", lambda s: s.run(tarp, num_simulations=500)),
    "surgery": ("the latent space", lambda s: s.run(surgery)),
    "aggregated": ("the latent space", lambda s: s.run(aggregated_posterior)),
    "predictive": ("the model", lambda s: s.run(predictive, num_particles=100)),
    "gradients": ("the training", _gradients),
}
"""By name: what it is about, and how it is run."""

DEFAULT = ("elbo", "importance", "sbc", "tarp", "surgery", "aggregated", "predictive")
"""What is checked where nothing else is asked for: together less than two epochs of training."""


@dataclass(frozen=True)
class Diagnosis:
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
    seconds: dict[str, float] = field(repr=False)
    num_data: int = 0
    rows: Tensor | None = None

    def findings(self) -> list[Finding]:
        """All lines, in the order of the screen."""
        return [line for result in self.results.values() for line in result.findings()]

    def to_dict(self) -> dict[str, Any]:
        """All lines and reasons, as JSON has them: numbers that aren't finite are None."""
        lines = {n: [_finite(asdict(f)) for f in r.findings()] for n, r in self.results.items()}
        return {
            "num_data": self.num_data,
            "rows": None if self.rows is None else self.rows.tolist(),
            "findings": lines,
            "undefined": self.undefined,
            "seconds": self.seconds,
            "next": self.advice,
        }

    @property
    def advice(self) -> str:
        """What to do next: train on while that helps; else by what is bad, or worth a look."""
        found = self.findings()
        curve = self.results.get("learning")
        if isinstance(curve, LearningCurve) and curve.is_unfinished:
            found = curve.findings()
        found.sort(key=lambda line: line.name != "information")  # without any, nothing else counts
        for verdict in ("bad", "look"):
            for line in found:
                is_done = line.advice.startswith("diagnostics.gap") and "gap" in self.results
                if line.verdict == verdict and line.advice and not is_done:
                    return f"{line.advice} ({line.name})"
        return "nothing stands out: sample, reconstruct, encode with it"

    def __str__(self) -> str:
        lines, last = [f"Diagnosis, N = {self.num_data}"], ""
        for name, result in self.results.items():
            about = CHECKS.get(name, ("the training", None))[0]
            lines += [f"-- {about}"] if about != last else []
            last = about
            lines += map(str, result.findings())
        if self.undefined:
            lines.append("-- not defined for this pair")
            lines += [f"  {name}: {why}" for name, why in self.undefined.items()]
        return "\n".join([*lines, f"next: {self.advice}"])

    __repr__ = __str__


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in line.items()}


@tool
def diagnose(
    pair: PairLike,
    data: Any,
    *,
    checks: Iterable[str] = DEFAULT,
    num_data: int = 500,
    num_particles: int = 200,
    history: Sequence[Mapping[str, Any]] | None = None,
    **options: Unpack[Options],
) -> Diagnosis:
    """What a fit is worth, on one screen: number, standard error, verdict, and what to do next.

    Lines begin with ``+`` where all is well, ``?`` where it is worth a look, ``!`` where something
    is wrong. What isn't defined for the pair is said, with its reason, and never a number. The
    default checks take less than two epochs of training of an image model; ``"gap"`` (is it the
    encoder or the family?) and ``"ais"`` (what is log p(x) really?) optimise and anneal for each
    datum, ``"gradients"`` (how noisy is a step?) takes a hundred of them; these are run when they
    are asked for: ``checks=[*DEFAULT, "gap", "ais", "gradients"]``.

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source; held out, if there are any.
        checks: Names of `CHECKS`.
        num_data: N, rows that are looked at, drawn from the data; all, where there are fewer.
        num_particles: K, draws from the guide for each, at least 25.
        history: Of the training, one row an epoch, as `Fit.history` is.
        options: As in `pvae.options.Options`.

    Returns:
        A `Diagnosis`; it prints itself.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> found = diagnose(vae, torch.rand(50, 4).round(), checks=["elbo"])
        >>> [line.name for line in found.findings()]
        ['ELBO']
    """
    asked = list(dict.fromkeys(checks))
    if unknown := [name for name in asked if name not in CHECKS]:
        raise ArgumentError("checks", f"some of {oxford(CHECKS)}", oxford(unknown))
    check_int("num_data", num_data, minimum=2)
    check_int("num_particles", num_particles, minimum=25)
    with t.prepared(pair, data, options, "diagnose") as evaluation:
        evaluation, chosen = _some(evaluation.in_memory(), num_data)
    subject = Subject(evaluation, num_particles)
    results: dict[str, Any] = {}
    undefined: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for name in tqdm(asked, desc="diagnose", disable=not evaluation.progress, leave=False):
        started = time.perf_counter()
        try:
            found = CHECKS[name][1](subject)
            results[name] = replace(found, rows=chosen) if hasattr(found, "rows") else found
        except PvaeError as error:  # the other checks have their say
            undefined[name] = error.one_line()
        seconds[name] = time.perf_counter() - started
    if history:
        try:
            results["learning"] = learning_curve(history)
        except UndefinedError as error:
            undefined["learning"] = error.one_line()
    return Diagnosis(results, undefined, seconds, evaluation.num_rows, chosen)


def _some(evaluation: t.Evaluation, count: int) -> tuple[t.Evaluation, Tensor | None]:
    """Some rows, by chance, and which; all, of a pair that belongs to its rows."""
    structure, source = evaluation.structure, evaluation.source
    whole = structure.subsample_size is not None or structure.tied_to is not None
    if whole or structure.global_sites or source.num_rows <= count:
        return evaluation, None
    chosen = torch.randperm(source.num_rows, device=source.device)[:count].sort().values
    return evaluation.on(source.rows(chosen)), chosen
