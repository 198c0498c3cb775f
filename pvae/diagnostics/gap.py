"""Where the gap between ELBO and evidence comes from: the encoder, or the family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from pvae import bounds
from pvae import terms as t
from pvae.bounds import Bound, Estimate
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import GAP
from pvae.errors import ArgumentError, UndefinedError, check_int
from pvae.options import Options, tool
from pvae.pair import PairLike

__all__ = ["Gap", "gap"]


@dataclass(frozen=True, repr=False)
class Gap(Result):
    r"""The gap of a pair in parts, each with its errors over data and over draws.

    .. math::
        \log p(x) - L[q] =
        \underbrace{\log p(x) - L[q^*]}_{\text{approximation}} +
        \underbrace{L[q^*] - L[q]}_{\text{amortisation}}

    with q the guide's and q* the best of its family for each datum.

    Attributes:
        log_weights: Of draws from each q, ``(K, N)``: ``"guide"``, ``"own"`` (q*), ``"full rank"``
            and ``"flow"``, the last three fitted to each datum.
        evidence: log p(x).
        instead: Why q* is of the full-rank Gaussians and not of the guide's own family, or nothing.
        unsettled: Families whose fit was still getting better when it ended.
        sampled: The evidence, draw by draw, where it is from the fitted q; their noise cancels in
            part where it is compared with an ELBO.
        rows: Which rows of the data these are, ``(N,)``; None for all of them.
    """

    log_weights: dict[str, Tensor]
    evidence: Bound
    instead: str = ""
    unsettled: tuple[str, ...] = ()
    sampled: Estimate | None = None
    rows: Tensor | None = None

    def elbo(self, q: str) -> Bound:
        """The ELBO of one of the distributions by name."""
        return Estimate.of_elbo(self.log_weights[q]).bound(f"ELBO, {q}", "lower")

    def gain(self, q: str, over: str) -> Bound:
        """By how much one ELBO is above another."""
        return self._gain(q, over).bound(f"ELBO, {q} - {over}")

    @property
    def amortisation(self) -> Bound:
        """What the encoder loses against the best of its family for each datum."""
        return self._gain("own", "guide").bound("amortisation gap")

    @property
    def approximation(self) -> Bound:
        """What the best of the family loses against the posterior; at least, on average."""
        return self._below_evidence("own", "approximation gap")

    @property
    def total(self) -> Bound:
        """Both together: evidence minus the guide's ELBO."""
        return self._below_evidence("guide", "gap")

    @property
    def verdict(self) -> Literal["fine", "encoder", "family", "both"]:
        """What is to be enlarged: the one whose gap is more than twice the other's, or both.

        Where a full-rank Gaussian stands in for the guide's own family, what it gains may be the
        encoder's or the family's.
        """
        encoder, family = self.amortisation.mean, self.approximation.mean
        if max(encoder, family) < GAP.look:
            return "fine"
        if self.instead and encoder >= GAP.look:
            return "both"
        if encoder > 2 * family:
            return "encoder"
        return "family" if family > 2 * encoder else "both"

    @property
    def is_worse(self) -> Tensor:
        """Data whose fit ended below the guide, beyond noise: 4 errors and 0.01 nats. ``(N,)``."""
        gain = self._gain("own", "guide")
        return gain.values < -4 * gain.variance.sqrt() - 0.01

    def worst(self, count: int = 5) -> Tensor:
        """Rows of the data with the largest gap in all, the largest first."""
        found = self.total.per_datum.argsort(descending=True, stable=True)[:count]
        return found if self.rows is None else self.rows.to(found.device)[found]

    def findings(self) -> list[Finding]:
        """What it means, line by line."""
        rows = ", ".join(str(int(row)) for row in self.worst())
        encoder = "a larger encoder, more training, or bounds.refined, a fit of each datum"
        found = [
            self._finding(
                self.amortisation,
                f"what the encoder loses against the best {self._family} for each datum",
                f"{encoder}; worst rows {rows}" if self.verdict in ("encoder", "both") else "",
            ),
            self._finding(
                self.approximation,
                f"what the {'family' if not self.instead else self._family} loses against the "
                "posterior",
                f"a richer family; {self._best()}" if self.verdict in ("family", "both") else "",
            ),
            self._line("full rank gains", "full rank", "own", "on the best of the guide's family"),
        ]
        if "flow" in self.log_weights:
            found.append(self._line("flow gains", "flow", "full rank", "on the full-rank Gaussian"))
        worse = self.is_worse.double()
        if bool(worse.any()):
            found.append(
                Finding(
                    "fits below guide",
                    float(worse.mean()),
                    verdict="look",
                    meaning="share of data for which the guide's q is better than the fitted one",
                    advice="Refinement with more steps or a smaller learning rate"
                    if not self.instead
                    else "",
                )
            )
        return found

    @property
    def _family(self) -> str:
        """Whose best q the parts are about."""
        return "full-rank Gaussian (not its own family)" if self.instead else "q of its family"

    @property
    def title(self) -> str:
        """How many data were looked at, and what is to be enlarged."""
        words = _WORDS[self.verdict]
        if self.instead and self.verdict == "both":
            words = "encoder or family lose, which can't be told apart here"
        return f"Inference gap, N = {self.evidence.num_data}: {words}"

    @property
    def notes(self) -> tuple[str, ...]:
        """The ELBO of each q, the evidence, and what is to be known of the fits."""
        lines = [str(bound) for bound in (*map(self.elbo, self.log_weights), self.evidence)]
        if self.instead:
            lines.append(f"own: a full-rank Gaussian instead, as {self.instead}")
        lines += [f"{q}: was still getting better at the last step" for q in self.unsettled]
        return tuple(lines)

    def _gain(self, q: str, over: str) -> Estimate:
        return Estimate.of_elbo(self.log_weights[q]) - Estimate.of_elbo(self.log_weights[over])

    def _below_evidence(self, q: str, name: str) -> Bound:
        elbo = Estimate.of_elbo(self.log_weights[q])
        if self.sampled is not None:
            return (self.sampled - elbo).bound(name)
        values = self.evidence.per_datum - elbo.values
        error = math.hypot(self.evidence.se_total or 0.0, float(elbo.variance.sum().sqrt()))
        n, k = len(values), len(elbo.influence)
        return Bound(name, values, float(values.sum()), error, n, k, kind="none")

    def _best(self) -> str:
        gains = [f"a full-rank q gains {self.gain('full rank', 'own').mean:.2g} nats"]
        if "flow" in self.log_weights:
            gains.append(f"a flow {self.gain('flow', 'own').mean:.2g}")
        return ", ".join(gains)

    def _line(self, name: str, q: str, over: str, meaning: str) -> Finding:
        gain = self.gain(q, over)
        error = None if math.isnan(gain.se_data) else gain.se_data
        return Finding(name, gain.mean, error, "nats", meaning=meaning)

    @staticmethod
    def _finding(part: Bound, meaning: str, advice: str) -> Finding:
        verdict = GAP.verdict(part.mean)
        error = None if math.isnan(part.se_data) else part.se_data
        return Finding(part.name, part.mean, error, "nats", verdict, meaning, advice)


_WORDS = {
    "fine": "encoder and family are good enough",
    "encoder": "enlarge the encoder, not the family",
    "family": "enlarge the family, not the encoder",
    "both": "encoder and family both lose",
}


@tool
def gap(
    pair: PairLike,
    data: Any,
    *,
    num_particles: int = 1000,
    evidence: Bound | None = None,
    refinement: bounds.Refinement | None = None,
    flow: bool = True,
    **options: Unpack[Options],
) -> Gap:
    r"""Whether the ELBO is low for the encoder's sake, or for the family's.

    For each datum q is fitted anew, from the guide's own family (its distributions' parameters,
    from those that the encoder gave on), from full-rank Gaussians, and from flows, the last two in
    unconstrained coordinates. All ELBOs are of fresh draws.

    The evidence is importance sampling from the q with the largest ELBO for each datum, a lower
    bound on average, so that the approximation gap is at least what is said. With the guide's own
    family mean-field, what the full-rank Gaussian gains says what independence costs.

    Where the guide's own family can't be read off (flows, latents that depend on one another in the
    guide, auxiliary sites) a full-rank Gaussian stands in for it, and the result says so; the
    amortisation gap may then be below 0.

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer et al., 2018),
        https://proceedings.mlr.press/v80/cremer18a.html

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source; some hundred data are enough.
        num_particles: K, draws of a datum for each ELBO.
        evidence: log p(x) of the same data by other means, such as
            ``bounds.evidence(..., method="ais")``.
        refinement: How to fit.
        flow: Whether to fit flows, too.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: Where there are no densities of single data in unconstrained coordinates
            (global, discrete or point-mass latents, improper priors), or latents are masked out.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> found = gap(vae, torch.zeros(5, 4), num_particles=50, flow=False,
        ...     refinement=pvae.bounds.Refinement(max_steps=50), progress=False)
        >>> found.amortisation.per_datum.shape
        torch.Size([5])
    """
    check_int("num_particles", num_particles, minimum=2)
    with t.prepared(pair, data, options, "gap") as evaluation:
        evaluation = evaluation.in_memory()  # a loader may shuffle, and all need the same rows
        guides = bounds.log_weights(evaluation.pair, evaluation.source, num_particles, **options)
        _check(guides, evidence)
        parts: dict[str, list[Tensor]] = {}
        unsettled, instead = [], ""
        for fit in bounds.fit_locally(
            evaluation,
            refinement or bounds.Refinement(),
            num_particles,
            families=bounds.FAMILIES if flow else bounds.FAMILIES[:-1],
        ):
            parts.setdefault(fit.family, []).append(fit.log_weights)
            unsettled += [] if fit.is_settled else [fit.family]
            instead = instead or fit.instead
    weights = {"guide": guides, **{q: torch.cat(p, 1) for q, p in parts.items()}}
    sampled = None
    if evidence is None:
        stacked = torch.stack(list(weights.values()))
        best = stacked.mean(1).argmax(0).expand(1, *stacked.shape[1:])
        sampled = Estimate.of_evidence(stacked.gather(0, best)[0])
        evidence = sampled.bound(f"evidence, local IWAE-{num_particles}", "lower")
    return Gap(weights, evidence, instead, tuple(dict.fromkeys(unsettled)), sampled)


def _check(guides: Tensor, evidence: Bound | None) -> None:
    """Before the fits, which take long."""
    if evidence is not None and evidence.per_datum.shape[0] != guides.shape[1]:
        raise ArgumentError(
            "evidence", f"an estimate for the same {guides.shape[1]} data", f"{evidence.num_data}"
        )
    wrong = (~guides.isfinite()).any(0).nonzero()
    if len(wrong):
        raise UndefinedError(
            "gap",
            "a finite log p(x, z) - log q(z | x) at each draw of the guide",
            f"NaN or infinity at datum {int(wrong[0])}, whose ELBO has no value",
            ["a likelihood that no latent makes impossible", "bounds.evidence, which is defined"],
        )
