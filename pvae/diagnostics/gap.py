"""Where the gap between ELBO and evidence comes from: the encoder, or the family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Unpack

import torch
from torch import Tensor

from pvae import bounds, randomness
from pvae.bounds.modes import FIND_MODES, missed_by_fits
from pvae.bounds.possible import Possible
from pvae.bounds.weights import require_evidence, require_local, weights_by_chunk
from pvae.devices import double
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import GAP
from pvae.errors import ArgumentError, UndefinedError, check_int
from pvae.estimate import Estimate
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.terms import prepared

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
        log_weights: Log weights of draws from each q, ``(K, N)``: ``"guide"``, ``"own"`` (q*),
            ``"full_rank"`` and ``"flow"``, the last three fitted to each datum.
        evidence: log p(x). Where it is from the fitted q it keeps the influence of each draw, as
            its noise cancels in part where it is compared with an ELBO.
        instead: Why q* is of the full-rank Gaussians and not of the guide's own family, or nothing.
        unsettled: Families whose fit was still getting better when it ended.
        rows: Which rows of the data these are, ``(N,)``; None for all of them.
        missed: What annealing from the prior finds beyond the fits, where it is more than errors.
        possible: What else the draws say of the numbers, by which impossible ones are marked: those
            of the ``"guide"`` and of the ``"fits"``.
    """

    log_weights: dict[str, Tensor]
    evidence: Estimate
    instead: str = ""
    unsettled: tuple[str, ...] = ()
    rows: Tensor | None = None
    missed: Estimate | None = None
    possible: Mapping[str, Possible] = field(default_factory=dict)

    def elbo(self, q: str) -> Estimate:
        """The ELBO of one of the distributions by name."""
        name = f"ELBO, {q.replace('_', '-')}"
        found = Estimate.of_mean(name, self.log_weights[q], kind="lower")
        possible = self.possible.get("guide" if q == "guide" else "fits")
        return found if possible is None else possible.mark(found)

    def gain(self, q: str, over: str) -> Estimate:
        """By how much one ELBO is above another."""
        return self.elbo(q) - self.elbo(over)

    @property
    def amortisation(self) -> Estimate:
        """What the encoder loses against the best of its family for each datum."""
        return self.gain("own", "guide").named("amortisation gap")

    @property
    def approximation(self) -> Estimate:
        """What the best of the family loses against the posterior; at least, on average."""
        return (self.evidence - self.elbo("own")).named("approximation gap")

    @property
    def total(self) -> Estimate:
        """Both together: evidence minus the guide's ELBO."""
        return (self.evidence - self.elbo("guide")).named("gap")

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
        gain = self.amortisation
        assert gain.variances is not None  # noqa: S101
        return gain.values < -4 * gain.variances.sqrt() - 0.01

    def worst(self, count: int = 5) -> Tensor:
        """Rows of the data with the largest gap in all, the largest first."""
        worst = self.total.per_datum.argsort(descending=True, stable=True)[:count]
        return worst if self.rows is None else self.rows.to(worst.device)[worst]

    def findings(self) -> list[Finding]:
        """What it means, line by line."""
        verdict, family = self.verdict, self._family
        rows = ", ".join(str(int(row)) for row in self.worst())
        encoder = (
            "a larger encoder, more training, or bounds.evidence(..., method='local'), which fits "
            f"q to each datum; worst rows {rows}"
        )
        best = [f"a full-rank q gains {self.gain('full_rank', 'own').mean:.2g} nats"]
        more = [("full rank gains", "full_rank", "own", "on the best of the guide's family")]
        if "flow" in self.log_weights:
            best.append(f"a flow {self.gain('flow', 'own').mean:.2g}")
            more.append(("flow gains", "flow", "full_rank", "on the full-rank Gaussian"))
        loser = family if self.instead else "family"
        lines = [
            Finding.of(
                self.amortisation,
                f"what the encoder loses against the best {family} for each datum",
                GAP.verdict(self.amortisation.mean),
                encoder if verdict in ("encoder", "both") else "",
            ),
            Finding.of(
                self.approximation,
                f"what the {loser} loses against the posterior",
                GAP.verdict(self.approximation.mean),
                f"a richer family; {', '.join(best)}" if verdict in ("family", "both") else "",
            ),
            *(Finding.of(self.gain(q, over).named(name), what) for name, q, over, what in more),
        ]
        if self.missed is not None:
            meaning = "annealing from the prior finds more: modes that guide and fits have missed"
            lines.append(Finding.of(self.missed, meaning, "bad", FIND_MODES))
        worse = float(double(self.is_worse).mean())
        if worse > 0:
            meaning = "share of data for which the guide's q is better than the fitted one"
            advice = (
                "" if self.instead else "bounds.LocalFit with a larger max_steps or a smaller lr"
            )
            lines.append(Finding("fits below guide", worse, None, "", "look", meaning, advice))
        return lines

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
        lines = [bound.headline for bound in (*map(self.elbo, self.log_weights), self.evidence)]
        if self.instead:
            lines.append(f"own: a full-rank Gaussian instead, as {self.instead}")
        late = "was still getting better at the last step"
        return (*lines, *(f"{q.replace('_', '-')}: {late}" for q in self.unsettled))


_WORDS = {
    "fine": "encoder and family are good enough",
    "encoder": "enlarge the encoder, not the family",
    "family": "enlarge the family, not the encoder",
    "both": "encoder and family both lose",
}


@tool
def gap(
    pair: PairLike,
    data: object,
    *,
    num_particles: int = 1000,
    evidence: Estimate | None = None,
    local: bounds.LocalFit | None = None,
    flow: bool = True,
    **options: Unpack[Options],
) -> Gap:
    r"""Whether the ELBO is low for the encoder's sake, or for the family's.

    For each datum q is fitted anew, from the guide's own family (its distributions' parameters,
    from those that the encoder gave on), from full-rank Gaussians, and from flows, the last two in
    unconstrained coordinates. All ELBOs are of fresh draws. The evidence is importance sampling
    from the q with the largest ELBO for each datum, a lower bound on average, so that the
    approximation gap is at least what is said. With the guide's own family mean-field, what the
    full-rank Gaussian gains says what independence costs.

    Fits that start from a guide which has found one mode of a posterior find that one, too. Where
    annealing from the prior finds more than they do, on the first rows, the result says so, and
    what to type; then ``local=bounds.LocalFit(start="prior")`` starts fits from there.

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
        evidence: log p(x) of the same data, as by ``bounds.evidence(..., method="ais")``.
        local: Settings of the fit of q to each datum.
        flow: Whether to fit flows, too.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: Where there are no densities of single data in unconstrained coordinates
            (global, discrete or point-mass latents, improper priors), or latents are masked out.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> few = pvae.bounds.LocalFit(max_steps=50)
        >>> result = gap(vae, torch.zeros(5, 4), num_particles=50, flow=False, local=few)
        >>> result.amortisation.per_datum.shape
        torch.Size([5])
    """
    check_int("num_particles", num_particles, minimum=2)
    with prepared(pair, data, options, "gap") as evaluation:
        require_local(evaluation.structure, "the gap")
        evaluation = evaluation.in_memory()  # a loader may shuffle, and all need the same rows
        require_evidence(evaluation.structure, "importance weights")
        possible = {name: Possible(evaluation.structure) for name in ("guide", "fits")}
        with randomness.forked():
            draws = weights_by_chunk(evaluation, num_particles, possible["guide"])
            guides = torch.cat(list(draws), 1)
        _check(guides, evidence, possible["guide"])
        parts: dict[str, list[Tensor]] = {}
        unsettled, instead = [], ""
        families = bounds.FAMILIES if flow else bounds.FAMILIES[:-1]
        local = local or bounds.LocalFit()
        for fit in bounds.fit_locally(
            evaluation, local, num_particles, families=families, possible=possible["fits"]
        ):
            parts.setdefault(fit.family, []).append(fit.log_weights)
            unsettled += [] if fit.is_settled else [fit.family]
            instead = instead or fit.instead
    weights = {"guide": guides, **{q: torch.cat(p, 1) for q, p in parts.items()}}
    if evidence is None:
        stacked = torch.stack(list(weights.values()))
        best = stacked.mean(1).argmax(0).expand(1, *stacked.shape[1:])
        name = f"evidence, local IWAE-{num_particles}"
        evidence = Estimate.of_evidence(name, stacked.gather(0, best)[0])
        for each in possible.values():
            evidence = each.mark(evidence)
        missed = missed_by_fits(evaluation, evidence)
    else:
        evidence, missed = replace(evidence, influence=None), None  # its draws are others
    late = tuple(dict.fromkeys(unsettled))
    return Gap(weights, evidence, instead, late, missed=missed, possible=possible)


def _check(guides: Tensor, evidence: Estimate | None, possible: Possible) -> None:
    """Before the fits, which take long."""
    count = guides.shape[1]
    if evidence is not None and evidence.per_datum.shape[0] != count:
        expected = f"an estimate for the same {count} data"
        raise ArgumentError("evidence", expected, f"{evidence.num_data}")
    if evidence is not None and evidence.measure is not None:
        names = (evidence.name, "the guide's ELBO")
        evidence.measure.require_same(possible.measure, names, "evidence")
    wrong = (~guides.isfinite()).any(0).nonzero()
    if len(wrong):
        raise UndefinedError(
            "gap",
            "a finite log p(x, z) - log q(z | x) at each draw of the guide",
            f"NaN or infinity at datum {int(wrong[0])}, whose ELBO has no value",
            ["a likelihood that no latent makes impossible", "bounds.evidence, which is defined"],
        )
