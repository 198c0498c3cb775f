"""How well the guide's importance weights behave: Pareto k-hat, and the gap that they show."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Unpack

import torch
from pyro import poutine
from torch import Tensor

from pvae.annotations import strict
from pvae.bounds.joint import JointWeights, is_joint, is_nested, joint_weights, num_draws
from pvae.bounds.possible import Possible
from pvae.bounds.weights import require_evidence, require_whole, weights_by_chunk
from pvae.devices import double
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import JOINT_GAP, JOINT_KHAT, KHAT, NOISE, UNRELIABLE
from pvae.errors import DataError, check_int, check_number, oxford
from pvae.estimate import Estimate
from pvae.options import Options, tool
from pvae.pair import PairLike, Structure, as_pair
from pvae.terms import Evaluation, prepared

__all__ = ["Importance", "JointImportance", "importance", "khat", "richer_guide"]

FEWEST = 25
"""Draws from which there are enough in the tail, five."""


@strict
def khat(log_weights: Tensor, tolerance: float = 1e-3) -> Tensor:
    r"""The Pareto shape of each datum's largest importance weights, estimated by ArviZ.

    Weights whose tail has shape k have finite moments up to 1/k: below 0.5 a finite variance,
    below 0.7 averages that settle at a practical rate, above 0.7 estimates that aren't to be
    relied on; there q is too narrow somewhere. The estimate's standard error is about
    :math:`(1 + k) / \sqrt M` with the M draws in the tail, :math:`3 \sqrt K` of them from 226
    draws on.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024),
        https://jmlr.org/papers/v25/19-556.html

    Arguments:
        log_weights: Shape ``(K, N)``, at least 25 draws; of `bounds.log_weights`.
        tolerance: Standard deviation in nats up to which log weights count as constant, as an
            exact guide's are but for rounding, whose tail would be fitted instead.

    Returns:
        Shape ``(N,)``, in double precision, where the weights are. NaN where there is no tail:
        with constant weights, and with ties, as a discrete latent makes them. Infinite where too
        few draws for a tail have any weight beside the largest.

    Raises:
        DataError: If the shape is another, or a weight is NaN or infinite.

    Example:
        >>> z = 0.5 * torch.randn(100_000, 1)  # draws from N(0, 0.5^2) for N(0, 1): k is 0.75
        >>> bool((khat(-0.5 * z**2 + 2 * z**2) - 0.75).abs() < 0.3)
        True
    """
    check_number("tolerance", tolerance, minimum=0)
    _check(log_weights)
    from arviz_stats.base import array_stats  # imports for seconds

    weights = double(log_weights.detach())
    tail = _tail_size(len(weights))
    top = weights.topk(tail + 1, dim=0).values
    excess = (top - top[0]).exp() - (top[-1] - top[0]).exp()
    at = tail - int(tail / 4 + 0.5)  # the quartile that ArviZ's fit starts from
    is_lone = ~(excess[at] > _LEAST) & ((top[at] > top[-1]) | ~top[at].isfinite())
    is_tied = (top[1:] != top[:-1]).sum(0) < tail / 2
    has_tail = ~is_lone & ~is_tied & ~(weights.std(0) <= tolerance)
    shapes = torch.where(is_lone, math.inf, torch.full_like(weights[0], math.nan))
    if bool(has_tail.any()):
        chosen = weights[:, has_tail].cpu().numpy()
        _, fitted = array_stats.psislw(-chosen, axis=0)  # it takes the negative of log weights
        shapes[has_tail] = torch.as_tensor(fitted).to(shapes)
    return shapes


_LEAST = 1e-200  # excess over the tail's start, relative to the largest weight


def _tail_size(num_draws: int) -> int:
    return int(3 * math.sqrt(num_draws)) if num_draws > 225 else num_draws // 5


def _check(log_weights: Tensor) -> None:
    if log_weights.dim() != 2 or len(log_weights) < FEWEST:
        expected, got = f"shape (K, N), K at least {FEWEST}", f"shape {tuple(log_weights.shape)}"
        fixes = ["bounds.log_weights(pair, data, num_particles=1000)"]
        raise DataError("log_weights", expected, got, fixes)
    broken = log_weights.isnan() | log_weights.isposinf()
    if bool(broken.any()):
        row = int(broken.any(0).nonzero()[0])
        got = f"{float(log_weights[:, row][broken[:, row]][0])} for datum {row}"
        fixes = ["bounds.elbo on this datum, site by site"]
        raise DataError("log_weights", "log densities that are numbers", got, fixes)


@dataclass(frozen=True, repr=False)
class Importance(Result):
    r"""What one set of importance weights says of a guide.

    Attributes:
        log_weights: Shape ``(K, N)`` in nats.
        khat: k-hat of each datum, shape ``(N,)``; NaN or infinite as `khat` has it.
        tolerance: Standard deviation of log weights up to which they count as constant.
        rows: Which rows of the data these are, ``(N,)``; None for all of them.
        possible: What else the draws say of the numbers, by which impossible ones are marked.
    """

    log_weights: Tensor
    khat: Tensor
    tolerance: float
    rows: Tensor | None = None
    possible: Possible | None = None

    @property
    def is_exact(self) -> Tensor:
        """Data whose weights are constant: q is the posterior there. Shape ``(N,)``."""
        return self.log_weights.std(0) <= self.tolerance

    @property
    def ess(self) -> Tensor:
        r"""Effective sample size of each datum, :math:`1 / \sum_k \bar w_k^2`, shape ``(N,)``."""
        assert self.evidence.ess is not None  # noqa: S101
        return self.evidence.ess

    @property
    def elbo(self) -> Estimate:
        """The mean of the log weights."""
        return self._marked(Estimate.of_mean("ELBO", self.log_weights, kind="lower"))

    @property
    def evidence(self) -> Estimate:
        """The log of the mean of the weights, which is low on average."""
        name = f"evidence, IWAE-{len(self.log_weights)}"
        return self._marked(Estimate.of_evidence(name, self.log_weights))

    def _marked(self, estimate: Estimate) -> Estimate:
        return estimate if self.possible is None else self.possible.mark(estimate)

    @property
    def _impossible(self) -> list[Finding]:
        """A line if the numbers can't be."""
        evidence = self.evidence
        return [Finding.of(evidence)] if evidence.kind == "impossible" else []

    @property
    def gap(self) -> Estimate:
        """Evidence minus ELBO; the error over draws is that of the difference."""
        return (self.evidence - self.elbo).named("gap")

    @property
    def unreliable(self) -> float:
        """Share of data whose k-hat is above 0.7."""
        return float(double(self.khat > KHAT).mean())

    @property
    def se_unreliable(self) -> float:
        """Standard error of that share over data."""
        return math.sqrt(self.unreliable * (1 - self.unreliable) / len(self.khat))

    @property
    def se_khat(self) -> Tensor:
        r"""Standard error of each k-hat over draws, by :math:`(1 + k) / \sqrt M`; ``(N,)``."""
        tail = _tail_size(len(self.log_weights))
        return (1 + self.khat).clamp(min=0) / math.sqrt(tail)

    def worst(self, count: int = 5) -> Tensor:
        """Rows of the data with the largest k-hat, the largest first."""
        worst = self._worst(count)
        return worst if self.rows is None else self.rows.to(worst.device)[worst]

    def _worst(self, count: int = 5) -> Tensor:
        ranked = self.khat.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        order = ranked.argsort(descending=True, stable=True)[:count]
        return order[ranked[order] > -math.inf]

    @property
    def title(self) -> str:
        """How many weights there are."""
        k, n = self.log_weights.shape
        return f"Importance weights, N = {n}, K = {k}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Which data are the worst."""
        rows = [
            f"{int(name)} ({float(self.khat[at]):.2f} +- {float(self.se_khat[at]):.2f})"
            for name, at in zip(self.worst(), self._worst(), strict=True)
        ]
        return (f"rows with the largest k-hat: {', '.join(rows) or 'none'}",)

    def findings(self) -> list[Finding]:
        """What it means, line by line."""
        rows = ", ".join(str(int(row)) for row in self.worst())
        verdict = UNRELIABLE.verdict(self.unreliable)
        meaning = "share of data for which q is too narrow somewhere"
        advice = f"diagnostics.gap, on rows {rows} first: is it the encoder or the family?"
        advice = "" if verdict == "good" else advice
        share, error = self.unreliable, self.se_unreliable
        lines = [Finding(f"k-hat above {KHAT}", share, error, "", verdict, meaning, advice)]
        is_tied = self.khat.isnan() & ~self.is_exact
        for name, is_one, why in (
            (
                "exact",
                self.is_exact,
                "constant weights: q is the posterior there, and has no k-hat",
            ),
            ("no tail", is_tied, "weights that repeat, as those of a discrete latent: no k-hat"),
        ):
            if bool(is_one.any()):
                share = float(double(is_one).mean())
                lines.append(Finding(name, share, meaning=f"share of data with {why}"))
        effective = Estimate("effective draws", self.ess / len(self.log_weights), unit="")
        return [
            *self._impossible,
            *lines,
            Finding.of(self.gap.named("gap, at least"), "evidence - ELBO; too low, if anything"),
            Finding.of(effective, "ESS / K, the share of draws that count"),
        ]


@dataclass(frozen=True, repr=False)
class JointImportance(Importance):
    """What the weights of joint draws say of a guide whose latents all data share.

    Its ``log_weights`` have shape ``(S, 1)`` and are of the whole data set, as are k-hat, ELBO and
    evidence.

    Attributes:
        joint: The weights, with their noise over local draws.
        sites: The global latents.
        richer: What to put in the guide's place.
        is_proper: Whether priors are distributions. Under a flat one weights have no scale, so that
            ELBO and evidence are no bounds; k-hat, gap and ESS are as they would be with any.
    """

    joint: JointWeights = field(kw_only=True)
    sites: tuple[str, ...] = field(kw_only=True)
    richer: str = field(kw_only=True)
    is_proper: bool = field(kw_only=True, default=True)

    @property
    def elbo(self) -> Estimate:
        """The mean of the log weights."""
        return self._scaled(super().elbo)

    @property
    def evidence(self) -> Estimate:
        """The log of the mean of the weights, which is low on average."""
        return self._scaled(super().evidence)

    def _scaled(self, bound: Estimate) -> Estimate:
        if self.is_proper:
            return bound
        return replace(bound, name=f"unnormalised {bound.name}", kind="none")

    @property
    def noise(self) -> float:
        """Standard deviation in nats of a log weight over its local draws."""
        return math.sqrt(float(self.joint.noise.mean()))

    @property
    def title(self) -> str:
        """How many joint draws there are."""
        whole = f"all {self.joint.num_data} data" if self.joint.num_data > 1 else "the data set"
        return f"Importance weights of {whole}, {self.joint.name}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing more."""
        return ()

    def findings(self) -> list[Finding]:
        """What it means, line by line."""
        of = f"of {len(self.log_weights)} joint draws of {oxford(self.sites)}"
        lines = [] if self.joint.num_particles == 1 else [self._of_noise()]
        if bool(self.is_exact.all()):
            meaning = f"{of}: constant weights, q is the posterior"
            lines.append(Finding("exact", 1.0, None, "", "good", meaning))
        elif bool(self.khat.isnan().all()):
            lines.append(Finding("no tail", 1.0, meaning=f"{of}: weights that repeat, no k-hat"))
        else:
            shape, error = float(self.khat), float(self.se_khat)
            verdict = JOINT_KHAT.verdict(shape)
            narrow = "" if verdict == "good" else ": q is too narrow somewhere"
            advice = "" if verdict == "good" else self.richer
            known = error if math.isfinite(error) else None
            lines.append(Finding("joint k-hat", shape, known, "", verdict, of + narrow, advice))
        size = float(self.ess) / len(self.log_weights)
        meaning = "ESS / S, the share of joint draws that count"
        lines = [*self._impossible, *lines]
        return [*lines, self._of_gap(), Finding("effective draws", size, meaning=meaning)]

    def _of_gap(self) -> Finding:
        value, error = self.gap.total, self.gap.se_total
        verdict = JOINT_GAP.verdict(value - 2 * error)
        meaning = "evidence - ELBO of the data set; too low, if anything"
        advice = "" if verdict == "good" else self.richer
        known = error if math.isfinite(error) else None
        return Finding("joint gap, at least", value, known, "nats", verdict, meaning, advice)

    def _of_noise(self) -> Finding:
        verdict = NOISE.verdict(self.noise)
        meaning = f"sd of a log weight over its {self.joint.num_particles} local draws"
        advice = "diagnostics.importance(pair, x, num_particles=200): more local draws"
        advice = "" if verdict == "good" else advice
        return Finding("local noise", self.noise, None, "nats", verdict, meaning, advice)


@tool
def importance(
    pair: PairLike,
    data: object,
    *,
    num_particles: int | None = None,
    num_global: int | None = None,
    **options: Unpack[Options],
) -> Importance:
    r"""How well the guide does as a proposal for each datum's posterior, or for the data set's.

    From one set of log weights, :math:`\log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} | x_n)`:
    k-hat of each datum, the effective sample size, the ELBO, the evidence, and the gap between
    them, :math:`\log \tfrac1K \sum_k w_{kn} - \tfrac1K \sum_k \log w_{kn}`, an estimate of
    KL(q || p(z | x)) that is low on average.

    With latents that all data share, there is one weight of the data set for each of S joint
    draws, as `bounds.evidence` has it, with K local draws nested in each, and one k-hat.

    References:
        Yes, but Did It Work?: Evaluating Variational Inference (Yao et al., 2018),
        https://proceedings.mlr.press/v80/yao18a.html

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source; with latents that all data
            share, all data that the guide was fitted to.
        num_particles: K, draws for each datum, at least 25; from 1000 on, which is the default,
            k-hat is to about 0.2. With global latents as in `bounds.evidence`.
        num_global: S, joint draws, at least 25; as in `bounds.evidence`.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: With point-mass guides; with improper priors, unless latents are shared by
            all data; with these, if there are only some of the data.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> importance(vae, torch.zeros(5, 4), num_particles=50).khat.shape
        torch.Size([5])
    """
    check_int("num_global", FEWEST if num_global is None else num_global, minimum=FEWEST)
    with prepared(as_pair(pair, "importance"), data, options, "importance") as evaluation:
        structure = evaluation.structure
        check_int("num_particles", _fewest(structure, num_particles), minimum=FEWEST)
        if is_joint(structure):
            return _of_joint_draws(evaluation, num_global, num_particles)
        require_evidence(structure, "importance weights")
        possible = Possible(structure)
        draws = weights_by_chunk(evaluation, num_particles or 1000, possible)
        weights = torch.cat(list(draws), 1)
    tolerance = _tolerance(weights, structure)
    return Importance(weights, khat(weights, tolerance), tolerance, possible=possible)


def _fewest(structure: Structure, num_particles: int | None) -> int:
    """What has to be enough for a tail: K, where weights are of K draws."""
    is_of_nested = is_joint(structure) and is_nested(structure)
    return FEWEST if num_particles is None or is_of_nested else num_particles


def _tolerance(log_weights: Tensor, structure: Structure) -> float:
    size = float(log_weights[log_weights.isfinite()].abs().median())
    return max(1e-3, 10 * torch.finfo(structure.dtype).eps * size)


def _of_joint_draws(
    evaluation: Evaluation, num_global: int | None, num_particles: int | None
) -> JointImportance:
    structure = evaluation.structure
    structure.require_density("importance weights", shared=True)
    require_whole("importance weights", structure, evaluation.num_rows)
    joint = joint_weights(evaluation, *num_draws(evaluation, num_global, num_particles))
    sites = structure.global_latents if structure.has_plate else structure.latents
    weights = joint.log_weights[:, None]
    tolerance = _tolerance(weights, structure)
    shape = khat(weights, tolerance)
    return JointImportance(
        weights,
        shape,
        tolerance,
        None,
        joint.possible,
        joint=joint,
        sites=sites,
        richer=richer_guide(structure),
        is_proper=not structure.improper,
    )


def richer_guide(structure: Structure) -> str:
    """What is worth trying in the place of a guide that is too poor."""
    return _RICHER.get(type(poutine.unwrap(structure.guide)).__name__, _DEPENDENT)


_DEPENDENT = (
    "pvae.fit((model, pyro.infer.autoguide.AutoMultivariateNormal(model)), x), a guide whose "
    "latents depend on one another, or AutoLowRankMultivariateNormal; diagnostics.trial(pair, x) "
    "says whether more training would do, diagnostics.against_nuts(pair, x) what is off"
)
_CURVED = (
    "pvae.fit((model, pyro.infer.autoguide.AutoIAFNormal(model)), x); diagnostics.trial(pair, x) "
    "says whether more training would do, diagnostics.against_nuts(pair, x) what is off"
)
_RICHER = dict.fromkeys(("AutoMultivariateNormal", "AutoIAFNormal"), _CURVED)
"""By class of guide, what is worth trying; `_DEPENDENT` for all others."""
