"""The parts of the ELBO: rate and distortion by site, and what the rate is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor

from pvae import terms
from pvae.bounds.possible import Possible
from pvae.devices import double
from pvae.diagnostics.mixture import Draws, Mixture, draw, require_mixture, score_mixture, sum_of
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import (
    ACTIVITY,
    COLLAPSED,
    INFORMATION,
    MARGINAL_KL,
    MARGINAL_SHARE,
    Verdict,
)
from pvae.errors import UndefinedError, check_int, check_number, oxford
from pvae.estimate import Estimate
from pvae.latent.coding import means_and_noise
from pvae.options import Options, tool
from pvae.pair import PairLike, Structure

__all__ = ["COLLAPSE_ADVICE", "Surgery", "surgery"]


@dataclass(frozen=True, repr=False)
class Surgery(Result):
    r"""Rate and distortion of N data, taken apart.

    The sums are exact, as all parts are of the same draws: the ELBO is -(distortion + rate), the
    rate is that of all sites, and ``information + marginal_kl``, and ``marginal_kl`` is
    ``total_correlation + dimension_kl``, summed over dimensions. Errors over data are those of
    other data and other draws; in parts with q(z), which all data make together, q(z) counts as
    fixed.

    Attributes:
        rate: :math:`E[\log q(z | x) - \log p(z)]` of all latents.
        distortion: :math:`-E[\log p(x | z)]`.
        rates: By latent site.
        distortions: By observed site.
        rates_by_dimension: By latent site, ``(N, *event_shape)``; missing where dimensions aren't
            independent given what comes before.
        activity: By latent site, :math:`\mathrm{Var}_n(E_q[z_d | x_n])`, of ``event_shape``.
        information: :math:`I_q(n; z)`, the mutual information of z and the row that it came from.
        information_upper: The same with each draw's own row left out of q(z).
        marginal_kl: :math:`KL(q(z) \| p(z))`.
        total_correlation: :math:`KL(q(z) \| \prod_d q(z_d))`.
        dimension_kl: :math:`KL(q(z_d) \| p(z_d))`, ``(N, D)``.
        undefined: Why each part that is None is.
        threshold: Below which activity and a dimension's rate are those of a collapsed one.
    """

    rate: Estimate
    distortion: Estimate
    rates: dict[str, Estimate]
    distortions: dict[str, Estimate]
    rates_by_dimension: dict[str, Tensor]
    activity: dict[str, Tensor]
    information: Estimate | None
    information_upper: Estimate | None
    marginal_kl: Estimate | None
    total_correlation: Estimate | None
    dimension_kl: Tensor | None
    undefined: dict[str, str]
    threshold: float

    @property
    def num_data(self) -> int:
        """N."""
        return self.rate.num_data

    @property
    def title(self) -> str:
        """How many data were looked at."""
        return f"ELBO surgery of {self.num_data} data"

    @property
    def missing(self) -> dict[str, str]:
        """Why each part that is None is."""
        return self.undefined

    @property
    def collapsed(self) -> dict[str, Tensor]:
        """By site, which dimensions have neither activity nor rate, ``event_shape``."""
        below = {}
        for name, activity in self.activity.items():
            below[name] = activity < self.threshold
            if name in self.rates_by_dimension:
                below[name] &= self.rates_by_dimension[name].mean(0) < self.threshold
        return below

    def findings(self) -> list[Finding]:
        """The parts, and whether the posterior has collapsed."""
        lines = [
            Finding.of(self.distortion, DISTORTION),
            Finding.of(self.rate, RATE),
            *(Finding.of(part) for part in self.rates.values() if len(self.rates) > 1),
            *self._information(),
            *self._marginal(),
        ]
        if self.activity:
            collapsed = torch.cat([c.flatten() for c in self.collapsed.values()])
            count, size = int(collapsed.sum()), collapsed.numel()
            verdict = COLLAPSED.verdict(count / size)
            meaning = f"of {size} have neither activity nor rate above {self.threshold:g}"
            advice = COLLAPSE_ADVICE.get(verdict, "")
            lines.append(Finding("collapsed units", count, None, "", verdict, meaning, advice))
        return lines

    def _information(self) -> list[Finding]:
        if self.information is None or self.information_upper is None:
            return []
        verdict, advice = INFORMATION.verdict(self.information.mean), ""
        meaning = "mutual information of code and datum"
        if verdict == "bad":
            meaning = "a code says nothing about its datum: the whole latent has collapsed"
            advice = "does q see x (testing.check_pair)? If so a warm-up of beta, free bits"
        elif self._is_near_limit:
            verdict = "none"
            meaning = f"of code and datum, near its limit log N = {math.log(self.num_data):.3g}"
        else:
            meaning += f"; at most {self.information_upper.mean:.4g}"
        return [Finding.of(self.information, meaning, verdict, advice)]

    def _marginal(self) -> list[Finding]:
        if self.marginal_kl is None:
            return []
        value, at_most = self.marginal_kl.mean, ", at most" if self._is_near_limit else ""
        verdict: Verdict = "none" if at_most else "good"
        meaning, advice = f"KL(q(z) || p(z)), q(z) the mean of q over data{at_most}", ""
        if not at_most and value >= MARGINAL_SHARE * self.rate.mean:
            verdict = MARGINAL_KL.verdict(value)
        if verdict == "look":
            meaning = "KL(q(z) || p(z)): the prior isn't where codes are"
            advice = "a richer prior, latent.fit_density, or more rows"
        lines = [Finding.of(self.marginal_kl, meaning, verdict, advice)]
        if self.total_correlation is not None and self.dimension_kl is not None:
            total = Estimate("dimension-wise KL", self.dimension_kl.sum(1))
            lines += [
                Finding.of(self.total_correlation, f"dependence of dimensions under q(z){at_most}"),
                Finding.of(total, "KL(q(z_d) || p(z_d)), summed over dimensions"),
            ]
        return lines

    @property
    def _is_near_limit(self) -> bool:
        """Whether N data could hardly show more information, so that other parts depend on N."""
        limit = math.log(self.num_data) - 0.5
        return self.information is not None and self.information.mean > limit


DISTORTION = "-E[log p(x | z)]: what of x the code doesn't tell"
RATE = "KL(q(z | x) || p(z)): nats that the code takes"
COLLAPSE_ADVICE: dict[Verdict, str] = {
    "bad": "a warm-up of beta (Warmup, --warmup), free bits, or a weaker decoder",
    "look": "a smaller latent_dim fits; or a warm-up of beta",
}


@tool
def surgery(
    pair: PairLike,
    data: object,
    *,
    num_particles: int = 2,
    threshold: float = ACTIVITY,
    **options: Unpack[Options],
) -> Surgery:
    r"""Takes the ELBO of given data apart.

    .. math::
        \text{rate} &= I_q(n; z) + KL(q(z) \| p(z)) \\
        KL(q(z) \| p(z)) &= KL\Big(q(z) \| \prod_d q(z_d)\Big) + \sum_d KL(q(z_d) \| p(z_d))

    with the aggregated posterior :math:`q(z) = \frac1N \sum_n q(z | x_n)` of the N rows, all of
    which are in the sum for every draw. z is all latents together. For these rows the estimates
    have no bias. As estimates for the distribution that the rows are from, they have one:
    information is at most log N, and too low on average; with each draw's own row left out
    (``information_upper``) it is too high on average, so that both hold the truth between them.
    KL(q(z) || p(z)) is too high by what information is too low. All of it takes N K N scores of q.

    A dimension has collapsed if its activity and its rate are below a threshold; the whole latent
    has if the information is below 0.1 nats.

    References:
        ELBO surgery: yet another way to carve up the variational evidence lower bound
        (Hoffman & Johnson, 2016), http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
        Isolating Sources of Disentanglement in VAEs (Chen et al., 2018),
        https://arxiv.org/abs/1802.04942
        On Variational Bounds of Mutual Information (Poole et al., 2019),
        https://arxiv.org/abs/1905.06922
        Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source; at least two rows.
        num_particles: K, draws for each datum; at least 2 for standard errors over draws.
        threshold: Threshold of a collapsed dimension, in nats and in units of z squared.
        options: As in `pvae.options.Options`.

    Returns:
        The parts. What isn't defined for the pair is None, and the result says why: parts of q(z)
        where a prior depends on the datum (as on its label), or log q(z | x) can't be scored at
        another datum's draw; parts by dimension with several latents, or dependent dimensions.

    Raises:
        UndefinedError: If a latent has a point-mass guide, an improper prior or a mask, or there
            are sites outside the data plate.

    Example:
        >>> parts = surgery(pvae.recipes.vae(4, 2, hidden=(8,)), torch.rand(20, 4).round())
        >>> round(parts.rate.mean - parts.information.mean - parts.marginal_kl.mean, 4) + 0.0
        0.0
    """
    check_int("num_particles", num_particles)
    check_number("threshold", threshold, minimum=0)
    undefined: dict[str, str] = {}
    activity: dict[str, Tensor] = {}
    mixture = None
    with terms.prepared(pair, data, options, "surgery") as evaluation:
        evaluation = evaluation.in_memory()
        _check(evaluation.structure, evaluation.num_rows)
        possible = Possible(evaluation.structure)
        own = draw(evaluation, num_particles, possible)
        with _noted(undefined, "parts of q(z)"):
            require_mixture(evaluation)
            mixture = score_mixture(evaluation, own)
        for name in evaluation.structure.latents:
            with _noted(undefined, f"activity of {name}"):
                means, noise = means_and_noise(evaluation, name, 32)
                activity[name] = (double(means).var(0) - double(noise).mean(0)).clamp(min=0)
    found = _assemble(own, mixture, activity, undefined, threshold)
    return _marked(found, possible.reasons())


def _check(structure: Structure, num_rows: int) -> None:
    structure.require_density("ELBO surgery")
    structure.require_proper("ELBO surgery")
    check_int("ELBO surgery, rows of data", num_rows, minimum=2)
    got = "" if structure.latents else "no latent with a guide"
    got = "plates inside the data plate" if structure.latents and structure.nesting > 1 else got
    if structure.global_sites:
        got = f"global site(s) {oxford(structure.shared_sites)}"
    if got:
        expected = "a pair whose latents are all in the data plate, and in no other"
        fixes = ["bounds.elbo, for rate and distortion of the data set"]
        raise UndefinedError("ELBO surgery", expected, got, fixes)


@contextmanager
def _noted(undefined: dict[str, str], part: str) -> Iterator[None]:
    """Notes why a part is undefined, and goes on."""
    try:
        yield
    except UndefinedError as error:
        undefined[part] = f"{error.where}: {error.actual}"


def _estimate(name: str, values: Tensor) -> Estimate:
    """Of values for each draw, ``(K, N)``."""
    k = len(values)
    return Estimate(name, values.mean(0), values.var(0) / k if k > 1 else None, num_particles=k)


def _marked(found: Surgery, reasons: Sequence[str]) -> Surgery:
    """The same with the rate, and what it is made of, marked as impossible where it is that."""
    if not reasons:
        return found
    of_rate = ["the rate, of which it is a part, is"]

    def part(estimate: Estimate | None) -> Estimate | None:
        return None if estimate is None else estimate.impossible(of_rate)

    return replace(
        found,
        rate=found.rate.impossible(reasons),
        rates={name: rate.impossible(reasons) for name, rate in found.rates.items()},
        information=part(found.information),
        information_upper=part(found.information_upper),
        marginal_kl=part(found.marginal_kl),
    )


def _assemble(
    own: Draws,
    mixture: Mixture | None,
    activity: dict[str, Tensor],
    undefined: dict[str, str],
    threshold: float,
) -> Surgery:
    rate = sum_of(own.rates.values())
    if own.because:
        undefined["parts by dimension"] = own.because
    information = information_upper = marginal = correlation = dimension_kl = None
    if mixture is not None:
        own_information = own.log_q - mixture.log_prob
        information = _estimate("information", own_information)
        information_upper = _estimate("information", own.log_q - mixture.without_own)
        marginal = _estimate("marginal KL", rate - own_information)
        dims = mixture.log_prob_dims
        if dims is None and len(own.values) > 1:
            undefined["total correlation"] = "several latents"
        if dims is not None:
            (log_p_dims,) = own.log_p_dims.values()
            correlation = _estimate("total correlation", mixture.log_prob - dims.sum(-1))
            dimension_kl = (dims - log_p_dims.flatten(2)).mean(0)
    return Surgery(
        rate=_estimate("rate", rate),
        distortion=_estimate("distortion", sum_of(own.distortions.values())),
        rates={name: _estimate(f"rate {name}", value) for name, value in own.rates.items()},
        distortions={n: _estimate(f"distortion {n}", d) for n, d in own.distortions.items()},
        rates_by_dimension={
            name: (log_q - own.log_p_dims[name]).mean(0)
            for name, log_q in own.log_q_dims.items()
            if name in own.log_p_dims
        },
        activity=activity,
        information=information,
        information_upper=information_upper,
        marginal_kl=marginal,
        total_correlation=correlation,
        dimension_kl=dimension_kl,
        undefined=undefined,
        threshold=threshold,
    )
