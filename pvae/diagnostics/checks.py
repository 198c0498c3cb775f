"""The checks of the screen: what each is about, and how it is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from pvae import bounds, latent, terms
from pvae.annotations import Extended, strict
from pvae.bounds.joint import is_joint
from pvae.data import first_batch
from pvae.diagnostics.aggregate import aggregated_posterior
from pvae.diagnostics.codes import active_units, hoyer, near_zero, sensitivity
from pvae.diagnostics.gap import gap
from pvae.diagnostics.gradients import gradient_noise
from pvae.diagnostics.importance import importance
from pvae.diagnostics.nuts import against_nuts
from pvae.diagnostics.predictive import PredictiveCheck, PredictiveChecks, predictive
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.sbc import sbc
from pvae.diagnostics.surgery import COLLAPSE_ADVICE, DISTORTION, RATE, surgery
from pvae.diagnostics.tarp import tarp
from pvae.diagnostics.thresholds import ACTIVITY, COLLAPSED, LOOSE, P_VALUE
from pvae.diagnostics.trial import trial
from pvae.errors import UndefinedError, check_int, check_number
from pvae.estimate import Estimate
from pvae.pair import Structure

__all__ = [
    "CHECKS",
    "DEFAULT",
    "SUMMARY",
    "Lines",
    "Subject",
    "bits_per_dimension",
    "main_checks",
]

T = TypeVar("T")


@strict
def bits_per_dimension(nats: Extended, num_dims: int, bin_width: float = 1.0) -> float:
    r"""A log probability of a datum as code length, in bits per dimension.

    .. math:: -(\ell + D \log \Delta) / (D \log 2)

    For a density, :math:`\Delta` is the width of the bins that the values were rounded to, and
    the result is only as good as the density is flat within a bin.

    Arguments:
        nats: :math:`\ell`, log p(x).
        num_dims: D.
        bin_width: :math:`\Delta`; 1 for a probability.

    Example:
        >>> round(bits_per_dimension(-10 * math.log(2), num_dims=10), 6)
        1.0
    """
    check_number("bin_width", bin_width, above=0)
    return -(nats / check_int("num_dims", num_dims) + math.log(bin_width)) / math.log(2)


@dataclass(frozen=True)
class Subject:
    """What is diagnosed, with K draws for each datum, bins of data, and one site, if asked for."""

    evaluation: terms.Evaluation
    num_particles: int
    bin_width: float | None = None
    site: str | None = None

    @property
    def latent(self) -> str | None:
        """The latent of the data that was asked for; None for all."""
        return self.site if self.site in self.evaluation.structure.latents else None

    def run(self, check: Callable[..., T], **options: object) -> T:
        """A diagnostic of the pair and its data."""
        on = self.evaluation
        shared = {"max_rows": on.max_rows, "seed": on.seed, "progress": on.progress}
        return check(on.pair, on.source, **shared, **options)

    @property
    def draws(self) -> dict[str, int]:
        """How many draws weights are of; those of joint draws decide it by what they cost."""
        decided = is_joint(self.evaluation.structure)
        return {} if decided else {"num_particles": self.num_particles}

    @cached_property
    def elbo(self) -> Estimate:
        """The ELBO, or what is in its place, of a few draws a datum."""
        return self.run(bounds.elbo, num_particles=min(self.num_particles, 10))


@dataclass(frozen=True, repr=False)
class Lines(Result):
    """Lines of a check that has no result of its own; the estimate that they are about, if any."""

    lines: list[Finding]
    estimate: Estimate | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def findings(self) -> list[Finding]:
        """The lines."""
        return self.lines

    @property
    def missing(self) -> Mapping[str, str]:
        """The reasons."""
        return self.reasons


def _elbo(subject: Subject) -> Lines:
    elbo, structure = subject.elbo, subject.evaluation.structure
    lines = [Finding.of(elbo, _kind(elbo))]
    reasons = {}
    if elbo.distortion is not None:
        lines.append(Finding.of(elbo.distortion, DISTORTION))
    if elbo.rate is not None:
        lines.append(Finding.of(elbo.rate, RATE))
    elif structure.has_points:
        reasons["rate"] = "a point mass has no density to compare with the prior's"
    elif structure.improper:
        reasons["rate"] = "an improper prior has no scale to compare with"
    return Lines(lines, elbo, reasons)


def _kind(estimate: Estimate) -> str:
    if estimate.kind == "impossible":
        return "no bound of log p(x): it is impossible"
    bound = "lower" if estimate.kind == "lower" else "no"
    draws = "" if math.isnan(estimate.se_draws) else f"; {estimate.se_draws:.2g} over draws"
    return f"{bound} bound of log p(x), K = {estimate.num_particles}{draws}"


def _evidence(subject: Subject) -> Lines:
    """By importance sampling; and bits per dimension, where data have bins."""
    width, reasons = subject.bin_width, {}
    if width is not None:
        reasons = {"bits per dimension": "there is no evidence to count"}
    try:
        evidence = subject.run(bounds.evidence, **subject.draws)
    except UndefinedError as error:
        return Lines([], reasons={"evidence": str(error.actual)} | reasons)
    lines = [_of_evidence(evidence, subject.elbo)]
    if width is None or subject.evaluation.structure.quantity != "elbo":
        return Lines(lines, evidence, reasons)
    (x, *_) = first_batch(subject.evaluation.source, 1)
    kind = "" if width == 1 else f"; a density times bins of {width:.4g}"
    bits = bits_per_dimension(evidence.mean, x.numel(), width)
    bits_line = Finding("bits per dimension", bits, meaning=f"from '{evidence.name}'{kind}")
    return Lines([*lines, bits_line], evidence)


def _of_evidence(evidence: Estimate, elbo: Estimate) -> Finding:
    if evidence.kind != "lower" or elbo.kind != "lower" or elbo.rate is None:
        return Finding.of(evidence, _kind(evidence))
    apart = evidence.mean - elbo.mean
    verdict = LOOSE.verdict(apart / max(abs(elbo.rate.mean), 1e-300))
    if verdict == "good":
        return Finding.of(evidence, _kind(evidence), verdict)
    meaning = f"lower bound of log p(x); the ELBO is {apart:.1f} nats below"
    advice = "a larger encoder, or another guide: diagnostics.gap says which"
    return Finding.of(evidence, meaning, verdict, advice)


def _annealing(subject: Subject) -> Lines:
    evidence = subject.run(bounds.evidence, method="ais", num_particles=16)
    meaning = "lower bound of log p(x), by annealing from q"
    return Lines([Finding.of(evidence, meaning)], evidence)


def _units(subject: Subject) -> Lines:
    """Of each latent, how many units depend on the data."""
    structure, lines = subject.evaluation.structure, []
    for site in structure.latents:
        active = subject.run(active_units, site=site)
        count, size = int(active.sum()), active.numel()
        # without noise or a prior a code has no scale of its own
        has_scale = not (structure.has_points or structure.improper)
        verdict = COLLAPSED.verdict(1 - count / size) if has_scale else "none"
        name = "active units" if len(structure.latents) == 1 else f"active units, {site}"
        meaning = f"of {size}; the mean of q has a variance over data > {ACTIVITY:g}"
        advice = COLLAPSE_ADVICE.get(verdict, "")
        lines.append(Finding(name, count, None, "", verdict, meaning, advice))
    return Lines(lines)


def _codes(subject: Subject) -> Lines:
    """How sparse and how sensitive codes are: of point masses, for which little else is defined."""
    structure = subject.evaluation.structure
    if not structure.has_points or len(structure.latents) != 1:
        return Lines([])
    codes = subject.run(latent.codes).flatten(1)
    lines = []
    if codes.shape[1] > 1:
        zero = float(near_zero(codes).mean())
        meaning = f"Hoyer's, from 0 to 1; {zero:.0%} of entries are near 0"
        lines.append(Finding("sparsity", float(hoyer(codes).mean()), meaning=meaning))
    num_probes = None if codes.shape[1] <= _EXACT else 16
    try:
        norms = subject.run(sensitivity, num_probes=num_probes)
    except UndefinedError as error:
        return Lines(lines, reasons={"sensitivity": str(error.actual)})
    spread = codes.var(0).sum().sqrt()
    if bool(spread > 0):
        value = float((norms / spread).mean())
        meaning = "|dz/dx| in units of the codes' spread, per unit of x"
        lines.append(Finding("sensitivity", value, meaning=meaning))
    return Lines(lines)


_EXACT = 256  # entries of a code up to which its Jacobian is taken whole

FEW, MOST, ROWS = 100, 2000, 1_000_000  # replicates, and rows of all of them together


def _predictive(subject: Subject) -> PredictiveCheck | PredictiveChecks:
    """Of the site that was asked for, of the only one, or of each of several."""
    structure = subject.evaluation.structure
    sites = [name for name in structure.observed if subject.site in (None, name)]
    if len(sites) == 1 or subject.site in structure.observed:
        return _of_site(subject, sites[0])
    checks, reasons = {}, []
    for name in structure.observed:
        try:
            checks[name] = _of_site(subject, name)
        except UndefinedError as error:  # a site outside the data plate, say
            reasons.append(error)
    if not checks:
        raise reasons[0] if reasons else UndefinedError("predictive", "an observed site", "none")
    return PredictiveChecks(checks)


def _of_site(subject: Subject, site: str) -> PredictiveCheck:
    """With more replicates where a few leave it open whether something is off."""
    found = subject.run(predictive, site=site, num_particles=FEW)
    count = max(FEW, min(MOST, ROWS // subject.evaluation.num_rows))
    least = min(s.two_sided for s in found.statistics.values())
    is_open = least <= max(P_VALUE.look, 4 / (FEW + 1)) and count > FEW
    return subject.run(predictive, site=site, num_particles=count) if is_open else found


def _trial(subject: Subject) -> Result:
    structure = subject.evaluation.structure
    if not any(parameter.requires_grad for parameter in structure.parameters.values()):
        return Lines([])  # nothing to train
    return subject.run(trial)


CHECKS: dict[str, tuple[str, Callable[[Subject], Result]]] = {
    "elbo": ("the bound", _elbo),
    "evidence": ("the bound", _evidence),
    "importance": ("the bound", lambda s: s.run(importance, **s.draws)),
    "gap": ("the bound", lambda s: s.run(gap)),
    "ais": ("the bound", _annealing),
    "sbc": ("the posterior", lambda s: s.run(sbc, num_simulations=500, site=s.latent)),
    "tarp": ("the posterior", lambda s: s.run(tarp, num_simulations=500, site=s.latent)),
    "nuts": ("the posterior", lambda s: s.run(against_nuts)),
    "units": ("the latent space", _units),
    "codes": ("the latent space", _codes),
    "surgery": ("the latent space", lambda s: s.run(surgery)),
    "aggregated": ("the latent space", lambda s: s.run(aggregated_posterior, site=s.latent)),
    "predictive": ("the model", _predictive),
    "trial": ("the training", _trial),
    "gradients": ("the training", lambda s: s.run(gradient_noise)),
}
"""By name: what it is about, and how it is run."""

DEFAULT = ("elbo", "importance", "sbc", "tarp", "surgery", "aggregated", "predictive", "trial")
"""What is checked where nothing else is asked for: together less than two epochs of training."""

SUMMARY = ("elbo", "evidence", "units", "codes")
"""What a run's summary has: cheap enough for all of the test data."""


def main_checks(structure: Structure) -> tuple[str, ...]:
    """The checks without which nothing can be said to be well with such a pair.

    They are about bound, posterior, model and training, in this order. Latents that all data share
    have no posterior for simulated data unless they are fitted anew, so that theirs is judged by
    weights alone.
    """
    ranks = () if structure.global_latents else ("sbc",)
    return ("importance", *ranks, "predictive", "trial")
