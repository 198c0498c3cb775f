"""Predictive checks: statistics of the data against those of replicated data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor

from pvae import terms
from pvae.devices import double
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import P_VALUE, REPLICATES, Verdict
from pvae.errors import ArgumentError, UndefinedError, check_int
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.simulate import CheckKind, Replicates

__all__ = ["PredictiveCheck", "PredictiveChecks", "Statistic", "predictive"]

Function = Callable[[Tensor], Tensor | float]


@dataclass(frozen=True)
class Statistic:
    r"""One statistic of the data, and of replicated data.

    Attributes:
        name: Its name.
        observed: T(x).
        replicated: :math:`T(x^{rep}_s)`, shape ``(S,)``, on the CPU.
    """

    name: str
    observed: float
    replicated: Tensor

    @property
    def p_value(self) -> float:
        r"""The Bayesian p-value :math:`P(T(x^{rep}) > T(x)) + \tfrac12 P(T(x^{rep}) = T(x))`."""
        above, equal, num_draws = self._counts
        return (above + equal / 2) / num_draws

    @property
    def error(self) -> float:
        r"""Its standard error over draws, :math:`\sqrt{p(1-p)/S}` at :math:`p = (c+1)/(S+2)`.

        The shift keeps it above zero where none or all of the replicates are on one side.
        """
        *_, num_draws = self._counts
        p = (self.p_value * num_draws + 1) / (num_draws + 2)
        return math.sqrt(p * (1 - p) / num_draws)

    @property
    def two_sided(self) -> float:
        r"""The two-sided p-value, :math:`\min(1, 2 \min(p_\le, p_\ge))`.

        Each side counts the data as one more replicate, :math:`p_\ge = (\#\{T(x^{rep}) \ge T(x)\}
        + 1) / (S + 1)`, so that under the model it is at most a with probability at most a.
        """
        above, equal, num_draws = self._counts
        smaller = min(above, num_draws - above - equal) + equal
        return min(1.0, 2 * (smaller + 1) / (num_draws + 1))

    @property
    def distance(self) -> float:
        """How many of the replicates' standard deviations T(x) is away from their mean."""
        off = abs(self.observed - float(self.replicated.mean()))
        spread = float(self.replicated.std(correction=0))
        return off / spread if spread > 0 else math.inf if off > 0 else 0.0

    @property
    def is_beyond(self) -> bool:
        """Whether no replicate reaches T(x), and it is more than five spreads away.

        Few replicates have little spread by chance: it takes 10, and 50 if they are all the same.
        """
        above, equal, num_draws = self._counts
        distance = self.distance
        # five spreads off is then one in 700 by chance; one that isn't as all others, one in 130
        enough = 10 if math.isfinite(distance) else 50
        is_outside = num_draws >= enough and not equal and above in (0, num_draws)
        return is_outside and REPLICATES.verdict(distance) != "good"

    @property
    def _counts(self) -> tuple[int, int, int]:
        above = int((self.replicated > self.observed).sum())
        return above, int((self.replicated == self.observed).sum()), len(self.replicated)


@dataclass(frozen=True, repr=False)
class PredictiveCheck(Result):
    """Statistics of N data at a site against those of S replicated data sets.

    A replicate is of a kind; ``is_optimistic`` says whether it was made from the very data that
    it is compared with.
    """

    kind: CheckKind
    site: str
    num_data: int
    num_particles: int
    statistics: dict[str, Statistic]
    is_optimistic: bool

    @property
    def title(self) -> str:
        """What a replicate is, and how many there are."""
        return (
            f"predictive check ({self.kind}) of site '{self.site}': "
            f"{self.num_particles} replicates of {self.num_data} data"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Whether passing says little."""
        return (_OPTIMISTIC,) if self.is_optimistic else ()

    def findings(self) -> list[Finding]:
        """A line for each statistic: its p-value, T(x), and mean and spread of replicates."""
        return [self._finding(s) for s in self.statistics.values()]

    def worst(self, num_sites: int) -> Finding:
        """The statistic with the least p-value, as the line of one site of several."""
        statistic = min(self.statistics.values(), key=lambda s: (s.two_sided, -s.distance))
        line = self._finding(statistic, num_sites)
        return replace(line, name=f"p of {self.site}, {statistic.name}")

    def _finding(self, statistic: Statistic, num_sites: int = 1) -> Finding:
        replicated, kind = statistic.replicated, self.kind
        p_value = min(1.0, statistic.two_sided * len(self.statistics) * num_sites)
        verdict: Verdict = P_VALUE.verdict(p_value)
        is_known = verdict != "good" or not statistic.is_beyond  # else more replicates give less
        if not is_known:
            verdict = "look"
        elif verdict == "good" and self.is_optimistic:
            verdict = "none"
        mean = float(replicated.mean())
        spread = float(replicated.std()) if len(replicated) > 1 else math.nan
        meaning = f"{statistic.observed:.4g} in the data; replicates {mean:.4g}, sd {spread:.2g}"
        advice = _ADVICE[kind] if verdict in ("look", "bad") else ""
        p, error = statistic.p_value, statistic.error
        name = f"p of {statistic.name}"
        return Finding(name, p, error, "", verdict, meaning, advice, p_value if is_known else None)


@dataclass(frozen=True, repr=False)
class PredictiveChecks(Result):
    """Predictive checks of several observed sites, a line each: the statistic that is furthest off.

    Attributes:
        checks: Each site's own check, by its name.
    """

    checks: dict[str, PredictiveCheck]

    @property
    def title(self) -> str:
        """How many sites there are."""
        return f"predictive checks of {len(self.checks)} sites"

    def findings(self) -> list[Finding]:
        """A line for each site; p-values are corrected for statistics and sites."""
        return [check.worst(len(self.checks)) for check in self.checks.values()]


_FIT = "another likelihood or decoder; bounds.evidence of both says which is better"
_ADVICE: dict[CheckKind, str] = {
    "mixed": "kind='aggregated': if that passes it is the prior, latent.fit_density finds another",
    "prior": "kind='mixed' or 'aggregated': if that passes it is the prior, not the likelihood",
    "aggregated": _FIT,
    "posterior": _FIT,
}
_OPTIMISTIC = (
    "each replicate was decoded from the data's own codes: passing says little. "
    "kind='mixed' is the check of the model"
)


@tool
def predictive(
    pair: PairLike,
    data: object,
    statistics: Mapping[str, Function] | None = None,
    *,
    kind: CheckKind = "mixed",
    site: str | None = None,
    num_particles: int = 500,
    **options: Unpack[Options],
) -> PredictiveCheck:
    r"""Does the model make data like these? Statistics T of the data against S replicates.

    .. math::
        p = P(T(x^{rep}) > T(x)) + \tfrac12 P(T(x^{rep}) = T(x)), \quad
        x^{rep}_n \sim p(x | z_n)

    What the latents :math:`z_n` of a replicate are is the kind of the check:

    =============== ==========================================================================
    ``kind``        latents
    =============== ==========================================================================
    ``mixed``       of data from the model, global ones g from the guide: :math:`g \sim q(g),\
                    z_n \sim p(z | g)`. Without global latents that is the model itself, with
                    no encoder: the honest check of a VAE
    ``prior``       all from the model
    ``aggregated``  of data from the aggregated posterior :math:`\tfrac1N \sum_n q(z | x_n)`.
                    Where this passes and ``mixed`` fails, the prior doesn't match the codes
    ``posterior``   all from the guide, datum by datum: :math:`z_n \sim q(z | x_n)`
    =============== ==========================================================================

    With ``posterior`` and latents of data the replicates are reconstructions: each has seen its
    datum, so p-values gather around 1/2 even for wrong models, and passing says little. Without
    latents of data, as in regression, it is the usual posterior predictive check, and ``mixed``
    is the same.

    A statistic says one number of a whole data set; for numbers of each datum see `pit`. The
    verdict is on the two-sided p-value times the number of statistics: worth a "look" up to 0.05,
    "bad" up to 0.001, which is how often it is a false alarm under the model (for ``mixed`` and
    ``aggregated`` as far as what guide and training took from the data can be neglected); S has to
    be large enough for so small a p-value. With 10 replicates or more (50, if all are the same),
    T(x) beyond all of them and five of their spreads away is worth a look, too. With many data
    every model fails; T(x) beside the replicates' mean and spread says by how much. Entries that
    are masked out are in none of the default statistics, and the data's own in all replicates.

    References:
        Posterior Predictive Assessment of Model Fitness via Realized Discrepancies
        (Gelman, Meng & Stern, 1996), http://www.stat.columbia.edu/~gelman/research/published/A6n41.pdf

        Identifying Outliers in Bayesian Hierarchical Models: a Simulation-Based Approach
        (Marshall & Spiegelhalter, 2007), https://doi.org/10.1214/07-BA218

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        statistics: T by name, each a function of the observed site's data, shape
            ``(N, *event_shape)``, to one number. None for mean, standard deviation, minimum and
            maximum of all entries that aren't masked out, the standard deviation of the data's
            means, and the share of zeros if there are any; for classes, the shares of the
            commonest.
        kind: What a replicate is.
        site: The observed site; None if there is one.
        num_particles: S, replicated data sets. No two-sided p-value is below 2 / (S + 1).
        options: As in `pvae.options.Options`.

    Raises:
        ArgumentError: If a statistic isn't one finite number.
        UndefinedError: If there is nothing to draw: an improper prior, a factor, a likelihood
            that is fed the data.

    Example:
        >>> vae = pvae.recipes.vae(6, 2, hidden=(8,))
        >>> x = torch.zeros(20, 6)
        >>> result = predictive(vae, x, {"ones": lambda x: x.sum()})
        >>> result.statistics["ones"].observed, result.findings()[0].verdict
        (0.0, 'look')
    """
    check_int("num_particles", num_particles)
    with terms.prepared(pair, data, options, "predictive") as evaluation, torch.no_grad():
        replicates = Replicates.of("predictive", evaluation, site, kind)
        x = replicates.observed
        chosen = _defaults(replicates) if statistics is None else dict(statistics)
        observed = {name: _number(name, fn, x) for name, fn in chosen.items()}
        values: dict[str, list[float]] = {name: [] for name in chosen}
        for block in replicates.blocks(num_particles):
            for one in block:
                for name, fn in chosen.items():
                    values[name].append(_number(name, fn, one))
    results = {
        name: Statistic(name, observed[name], torch.tensor(of, dtype=torch.float64))
        for name, of in values.items()
    }
    is_optimistic = not replicates.has_honest_p_values
    return PredictiveCheck(kind, replicates.site, len(x), num_particles, results, is_optimistic)


def _number(name: str, fn: Function, x: Tensor) -> float:
    value = torch.as_tensor(fn(x))
    if value.dim() or not bool(value.isfinite()):
        got = f"shape {tuple(value.shape)}" if value.dim() else f"{float(value)}"
        raise ArgumentError(
            f"statistics[{name!r}]",
            "one finite number for a whole data set",
            f"{got} for data of shape {tuple(x.shape)}",
            ["a mean over the data", "diagnostics.pit(..., statistic=...), for one a datum"],
        )
    return float(value)


def _defaults(replicates: Replicates) -> dict[str, Function]:
    """Statistics that mean something for the data at hand, of what isn't masked out."""
    labels, observed = replicates.labels(), replicates.observed
    seen, n = _seen(replicates), len(observed)
    if labels is not None:
        seen = seen if labels(observed).shape == seen.shape else seen[..., 0]  # one of many classes
        classes, counts = labels(observed)[seen].unique(return_counts=True)
        common = classes[counts.argsort(descending=True)[:5]].tolist()
        return {f"share of class {c}": _share_of(c, labels, seen) for c in sorted(common)}
    chosen: dict[str, Function] = {
        "mean": lambda x: double(x[seen]).mean(),
        "sd": lambda x: double(x[seen]).std(),
        "min": lambda x: double(x[seen]).min(),
        "max": lambda x: double(x[seen]).max(),
    }
    if observed[0].numel() > 1:
        counts = double(seen).reshape(n, -1).sum(1)

        def spread_of_means(x: Tensor) -> Tensor:
            sums = double(torch.where(seen, x, 0)).reshape(n, -1).sum(1)
            return (sums / counts)[counts > 0].std()

        chosen["sd of means"] = spread_of_means
    if bool((observed[seen] == 0).any()):
        chosen["share of zeros"] = lambda x: double(x[seen] == 0).mean()
    if n < 2:
        chosen = {name: fn for name, fn in chosen.items() if not name.startswith("sd")}
    return chosen


def _seen(replicates: Replicates) -> Tensor:
    """Which entries of the data count, all of them where there is no mask."""
    observed, mask = replicates.observed, replicates.mask
    seen = torch.ones_like(observed, dtype=torch.bool) if mask is None else mask.expand_as(observed)
    if not bool(seen.any()):
        raise UndefinedError("predictive", "data that aren't masked out", "none")
    return seen


def _share_of(label: int, labels: Callable[[Tensor], Tensor], seen: Tensor) -> Function:
    return lambda x: double(labels(x)[seen] == label).mean()
