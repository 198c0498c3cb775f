"""The parts of the ELBO: rate and distortion by site, and what the rate is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from pvae import terms as t
from pvae.data import Source
from pvae.diagnostics.finding import Finding, Verdict
from pvae.diagnostics.mixture import Draws, Mixture, draw, require_mixture, score_mixture, sum_of
from pvae.errors import UndefinedError, check_int, check_number, oxford
from pvae.latent.coding import means_and_noise
from pvae.options import Options, tool
from pvae.pair import PairLike

__all__ = ["Part", "Surgery", "surgery"]


@dataclass(frozen=True)
class Part:
    """One part of the ELBO in nats: a mean over N data and K draws each.

    Attributes:
        values: One for each datum, or one for each datum and dimension: ``(N,)`` or
            ``(N, *event_shape)``.
        variance: Of each of them over draws, the same shape; NaN if K is 1.
    """

    values: Tensor
    variance: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean over data, shape ``()`` or ``event_shape``."""
        return self.values.mean(0)

    @property
    def se_data(self) -> Tensor:
        """Its standard error over data: other data, and other draws.

        In parts with q(z), which all data make together, q(z) counts as fixed.
        """
        return self.values.std(0) / len(self.values) ** 0.5

    @property
    def se_draws(self) -> Tensor:
        """Its standard error over draws, the data held fixed; NaN if K is 1."""
        return self.variance.sum(0).sqrt() / len(self.values)


@dataclass(frozen=True)
class Surgery:
    r"""Rate and distortion of N data, taken apart.

    The sums are exact, as all parts are of the same draws: the ELBO is -(distortion + rate), the
    rate is that of all sites, and ``information + marginal_kl``, and ``marginal_kl`` is
    ``total_correlation + sum(dimension_kl)``.

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

    rate: Part
    distortion: Part
    rates: dict[str, Part]
    distortions: dict[str, Part]
    rates_by_dimension: dict[str, Part]
    activity: dict[str, Tensor]
    information: Part | None
    information_upper: Part | None
    marginal_kl: Part | None
    total_correlation: Part | None
    dimension_kl: Part | None
    undefined: dict[str, str]
    threshold: float

    @property
    def num_data(self) -> int:
        """N."""
        return len(self.rate.values)

    @property
    def collapsed(self) -> dict[str, Tensor]:
        """By site, which dimensions have neither activity nor rate, ``event_shape``."""
        found = {}
        for name, activity in self.activity.items():
            by_dimension = self.rates_by_dimension.get(name)
            idle = activity < self.threshold
            found[name] = (
                idle if by_dimension is None else idle & (by_dimension.mean < self.threshold)
            )
        return found

    def findings(self) -> list[Finding]:
        """The parts, and whether the posterior has collapsed."""
        lines = [
            _line("distortion", self.distortion, "-E[log p(x | z)], what is lost"),
            _line("rate", self.rate, "E[KL(q(z | x) || p(z))], what is sent"),
        ]
        if len(self.rates) > 1:
            lines += [_line(f"rate {name}", part, "") for name, part in self.rates.items()]
        lines += [*self._information(), *self._marginal()]
        if self.activity:
            lines.append(self._collapse())
        return lines

    def _information(self) -> list[Finding]:
        if self.information is None or self.information_upper is None:
            return []
        value, limit = float(self.information.mean), math.log(self.num_data)
        upper = float(self.information_upper.mean)
        verdict: Verdict = "good" if value >= 0.1 else "bad"
        meaning, advice = f"I(n; z); of all data between this and {upper:.4g}", ""
        if verdict == "bad":
            meaning = "I(n; z): z says nothing about x, the whole latent has collapsed"
            advice = "does q see x (testing.check_pair)? If so a warm-up of beta, free bits"
        elif self._is_near_limit:
            verdict = "look"
            meaning = f"I(n; z), near its limit log N = {limit:.3g}: of all data it may be greater"
            advice = "more rows of data"
        return [_line("information", self.information, meaning, verdict, advice)]

    def _marginal(self) -> list[Finding]:
        if self.marginal_kl is None:
            return []
        value, whole = float(self.marginal_kl.mean), max(float(self.rate.mean), 1e-12)
        if self._is_near_limit:
            meaning = "KL(q(z) || p(z)), at most: with more data for q(z) it is less"
            return [_line("marginal KL", self.marginal_kl, meaning), *self._dimensions()]
        is_large = value > 1.0 and value > 0.2 * whole
        lines = [
            _line(
                "marginal KL",
                self.marginal_kl,
                "KL(q(z) || p(z)): samples of the prior aren't where codes are"
                if is_large
                else "KL(q(z) || p(z)), with these data for q(z)",
                "look" if is_large else "good",
                "a richer prior, latent.fit_density, or more rows" if is_large else "",
            )
        ]
        return lines + self._dimensions()

    @property
    def _is_near_limit(self) -> bool:
        """Whether N data could hardly show more information, so that other parts depend on N."""
        limit = math.log(self.num_data) - 0.5
        return self.information is not None and float(self.information.mean) > limit

    def _dimensions(self) -> list[Finding]:
        if self.total_correlation is None or self.dimension_kl is None:
            return []
        total = Part(self.dimension_kl.values.sum(1), self.dimension_kl.variance.sum(1))
        of = "of q(z), at most" if self._is_near_limit else "of q(z)"
        return [
            _line("total correlation", self.total_correlation, of),
            _line("dimension-wise KL", total, "KL(q(z_d) || p(z_d)), summed"),
        ]

    def _collapse(self) -> Finding:
        collapsed = torch.cat([c.flatten() for c in self.collapsed.values()])
        count, size = int(collapsed.sum()), collapsed.numel()
        verdict: Verdict = "bad" if count == size else "look" if 2 * count > size else "good"
        return Finding(
            "collapsed units",
            count,
            verdict=verdict,
            meaning=f"of {size}: neither activity nor rate above {self.threshold:g}",
            advice={
                "bad": "a warm-up of beta, free bits, or a weaker decoder",
                "look": "a smaller latent_dim fits; or a warm-up of beta",
            }.get(verdict, ""),
        )

    def __str__(self) -> str:
        lines = [f"ELBO surgery of {self.num_data} data", *map(str, self.findings())]
        lines += [f"  {name}: not defined, {why}" for name, why in self.undefined.items()]
        return "\n".join(lines)

    __repr__ = __str__


def _line(
    name: str, part: Part, meaning: str, verdict: Verdict = "none", advice: str = ""
) -> Finding:
    return Finding(name, float(part.mean), float(part.se_data), "nats", verdict, meaning, advice)


@tool
def surgery(
    pair: PairLike,
    data: Any,
    *,
    num_particles: int = 2,
    threshold: float = 1e-2,
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
        threshold: Of a collapsed dimension, in nats and in units of z squared.
        options: As in `pvae.options.Options`.

    Returns:
        The parts. What isn't defined for the pair is None, and the result says why: parts of q(z)
        where a prior depends on the datum (as on its label), or log q(z | x) can't be scored at
        another datum's draw; parts by dimension with several latents, or dependent dimensions.

    Raises:
        UndefinedError: If a latent has a point-mass guide, an improper prior or a mask, or there
            are sites outside the data plate.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> parts = surgery(vae, torch.rand(20, 4).round())
        >>> total = parts.information.mean + parts.marginal_kl.mean
        >>> bool(torch.isclose(parts.rate.mean, total))
        True
    """
    check_int("num_particles", num_particles)
    check_number("threshold", threshold, minimum=0)
    with t.prepared(pair, data, options, "surgery") as evaluation:
        evaluation = evaluation.in_memory()
        structure = evaluation.structure
        _check(structure, evaluation.source)
        own = draw(evaluation, num_particles)
        undefined: dict[str, str] = {}
        mixture = None
        try:
            require_mixture(evaluation)
        except UndefinedError as error:
            undefined["parts of q(z)"] = _reason(error)
        else:
            mixture = score_mixture(evaluation, own)
        activity = {}
        for name in structure.latents:
            try:
                means, noise = means_and_noise(evaluation, name, 32)
            except UndefinedError as error:
                undefined[f"activity of {name}"] = _reason(error)
            else:
                activity[name] = (means.double().var(0) - noise.double().mean(0)).clamp(min=0)
    return _assemble(own, mixture, activity, undefined, threshold)


def _check(structure: t.Structure, source: Source) -> None:
    structure.require_density("ELBO surgery")
    structure.require_proper("ELBO surgery")
    check_int("ELBO surgery, rows of data", source.num_rows, minimum=2)
    if structure.global_sites or structure.nesting > 1 or not structure.latents:
        raise UndefinedError(
            "ELBO surgery",
            "a pair whose latents are all in the data plate, and in no other",
            f"global site(s) {oxford(structure.global_sites)}"
            if structure.global_sites
            else "plates inside the data plate"
            if structure.latents
            else "no latent with a guide",
            ["bounds.elbo, for rate and distortion of the data set"],
        )


def _reason(error: UndefinedError) -> str:
    return f"{error.where}: {error.actual}"


def _part(values: Tensor) -> Part:
    """Of values for each draw, ``(K, N, ...)``."""
    k = len(values)
    variance = values.var(0) / k if k > 1 else torch.full_like(values[0], torch.nan)
    return Part(values.mean(0), variance)


def _assemble(
    own: Draws,
    mixture: Mixture | None,
    activity: dict[str, Tensor],
    undefined: dict[str, str],
    threshold: float,
) -> Surgery:
    rate = sum_of(own.rates.values())
    by_dimension = {
        name: _part(log_q - own.log_p_dims[name])
        for name, log_q in own.log_q_dims.items()
        if name in own.log_p_dims
    }
    if own.because:
        undefined["parts by dimension"] = own.because
    parts: dict[str, Part | None] = dict.fromkeys(_AGGREGATED)
    if mixture is not None:
        information = own.log_q - mixture.log_prob
        parts["information"] = _part(information)
        parts["information_upper"] = _part(own.log_q - mixture.without_own)
        parts["marginal_kl"] = _part(rate - information)
        dims = mixture.log_prob_dims
        if dims is None and len(own.values) > 1:
            undefined["total correlation"] = "several latents"
        if dims is not None:
            (log_p_dims,) = own.log_p_dims.values()
            parts["total_correlation"] = _part(mixture.log_prob - dims.sum(-1))
            parts["dimension_kl"] = _part(dims - log_p_dims.flatten(2))
    return Surgery(
        rate=_part(rate),
        distortion=_part(sum_of(own.distortions.values())),
        rates={name: _part(value) for name, value in own.rates.items()},
        distortions={name: _part(value) for name, value in own.distortions.items()},
        rates_by_dimension=by_dimension,
        activity=activity,
        undefined=undefined,
        threshold=threshold,
        **parts,
    )


_AGGREGATED = (
    "information",
    "information_upper",
    "marginal_kl",
    "total_correlation",
    "dimension_kl",
)
