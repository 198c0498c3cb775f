"""The one-screen summary of a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pvae import bounds, diagnostics, latent
from pvae import terms as t
from pvae.errors import UndefinedError
from pvae.estimate import Estimate
from pvae.options import Options
from pvae.pair import PairLike, as_pair

__all__ = ["Summary", "bits_per_dimension", "summarize"]


def bits_per_dimension(nats: float, num_dims: int, bin_width: float = 1.0) -> float:
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
    return -(nats / num_dims + math.log(bin_width)) / math.log(2)


@dataclass(frozen=True)
class Summary:
    """What a fit is worth, on one screen: lines of name, value and remark."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    advice: str

    def __str__(self) -> str:
        name = max(len(line[0]) for line in self.lines)
        value = max(len(line[1]) for line in self.lines)
        body = [f"  {n:<{name}}  {v:<{value}}  {r}".rstrip() for n, v, r in self.lines]
        return "\n".join([self.title, *body, f"next: {self.advice}"])

    __repr__ = __str__


def summarize(
    pair: PairLike,
    data: Any,
    *,
    title: str = "",
    levels: int | None = None,
    bin_width: float | None = None,
    num_particles: int = 500,
    history: Any = (),
    seconds: float | None = None,
    seed: int = 0,
) -> Summary:
    """The summary of a fit on data that it wasn't fitted to.

    What has no meaning for the pair (evidence with a point-mass guide, say) is named, with the
    reason in place of a number.

    Arguments:
        pair: A model and its guide.
        data: Test data.
        title: First line.
        levels: Number of values of an entry, for discrete data.
        bin_width: Width of the bins that continuous data were rounded to.
        num_particles: K, for the evidence.
        history: Records of epochs.
        seconds: Time that training took.
        seed: Of the draws.
    """
    pair = as_pair(pair, "summarize")
    with t.prepared(pair, data, {}) as evaluation:
        source, structure = evaluation.source, evaluation.structure
    options: Options = {"seed": seed, "progress": False}
    few = max(1, min(num_particles, 10))
    lower = bounds.elbo(pair, source, few, **options)
    lines = [(lower.name, _with_error(lower), f"nats per datum, N = {lower.num_data}, K = {few}")]
    best = lower if structure.quantity == "elbo" else None
    try:
        found = bounds.evidence(pair, source, num_particles, **options)
        is_bound = "a lower bound" if structure.quantity == "elbo" else "no bound: a point mass"
        lines.append(
            (found.name.split(",")[0], _with_error(found), f"IWAE, K = {num_particles}; {is_bound}")
        )
        best = found if structure.quantity == "elbo" else None
    except UndefinedError as error:
        lines.append(("evidence", "not defined", f"{error.actual}"))
    if lower.distortion is not None:
        lines.append(("distortion", f"{lower.distortion.mean:.2f}", "-E_q[log p(x | z)]"))
    if lower.rate is not None:
        lines.append(("rate", f"{lower.rate.mean:.2f}", "E_q[log q(z | x) - log p(z)]"))
    elif structure.has_points:
        lines.append(("rate", "not defined", "a point mass has no density to compare"))
    elif structure.improper:
        lines.append(("rate", "not defined", "an improper prior has no scale to compare with"))
    lines += _bits(best, source, levels, bin_width)
    active = _active(pair, source, structure, seed)
    if active is not None:
        lines.append(("active units", f"{active[0]} of {active[1]}", "Var_x(E_q[z]) > 0.01"))
    if structure.has_points and len(structure.latents) == 1:
        lines += _of_codes(pair, source, seed)
    if seconds is not None:
        lines.append(("training", f"{seconds:.0f} s", f"{len(history)} epoch(s)"))
    return Summary(title or "pvae", tuple(lines), _advice(lower, best, active, list(history)))


def _with_error(bound: Estimate) -> str:
    over_data = "" if math.isnan(bound.se_data) else f" +- {bound.se_data:.2g}"
    over_draws = "" if math.isnan(bound.se_draws) else f" (draws {bound.se_draws:.2g})"
    return f"{bound.mean:.2f}{over_data}{over_draws}"


def _bits(
    bound: Estimate | None, source: Any, levels: int | None, bin_width: float | None
) -> list[tuple[str, str, str]]:
    if levels is None and bin_width is None:
        return []
    if bound is None:
        return [("bits per dimension", "not defined", "there is no evidence to count")]
    _, batch = next(source.all(1))
    bits = bits_per_dimension(bound.mean, batch[0][0].numel(), bin_width or 1.0)
    kind = f"{levels} levels" if bin_width is None else f"a density times bins of {bin_width:.4g}"
    return [("bits per dimension", f"{bits:.3f}", f"from the line '{bound.name}'; {kind}")]


def _active(
    pair: PairLike, source: Any, structure: t.Structure, seed: int
) -> tuple[int, int] | None:
    if len(structure.latents) != 1:
        return None
    active = diagnostics.active_units(pair, source, seed=seed)
    return int(active.sum()), active.numel()


def _of_codes(pair: PairLike, source: Any, seed: int) -> list[tuple[str, str, str]]:
    """What is defined for a point mass: how sparse and how sensitive its codes are."""
    codes = latent.codes(pair, source, seed=seed).flatten(1)
    lines = []
    if codes.shape[1] > 1:
        zero = 100 * float(diagnostics.near_zero(codes).mean())
        value = float(diagnostics.hoyer(codes).mean())
        lines.append(
            ("sparsity", f"{value:.3f}", f"Hoyer's, of codes; {zero:.0f}% of entries near 0")
        )
    num_probes = None if codes.shape[1] <= 256 else 16
    try:
        norms = diagnostics.sensitivity(pair, source, num_probes=num_probes, seed=seed)
    except UndefinedError as error:
        return [*lines, ("sensitivity", "not defined", f"{error.actual}")]
    spread = codes.var(0).sum().sqrt()
    if bool(spread > 0):
        value = float((norms / spread).mean())
        lines.append(
            ("sensitivity", f"{value:.3f}", "|dz/dx| over the codes' spread, per unit of x")
        )
    return lines


NOTHING = "nothing stands out: sample, reconstruct, encode with it"


def _advice(
    lower: Estimate,
    best: Estimate | None,
    active: tuple[int, int] | None,
    history: list[dict[str, Any]],
) -> str:
    """One line on what to do next, by the largest trouble seen; training that isn't done first."""
    state = _state(history)
    if state == "rising":
        return "the validation value still rises: more epochs (--resume --epochs N)"
    if state == "falling":
        return "the validation value fell after its best epoch: patience=10, or a smaller net"
    if best is None:
        return "for draws of x and an evidence, a stochastic guide and a proper prior (recipe vae)"
    if active is not None and active[0] == 0:
        return "no latent dimension is used (posterior collapse): a warm-up of beta (--warmup N)"
    gap = best.mean - lower.mean
    if best is not lower and lower.rate is not None and gap > 0.5 * abs(lower.rate.mean):
        return f"the bound is loose by at least {gap:.1f} nats: a larger encoder, or another guide"
    if active is not None and active[0] < 0.5 * active[1]:
        return f"{active[1] - active[0]} latent dimensions are unused: a smaller latent_dim fits"
    return NOTHING


def _state(history: list[dict[str, Any]]) -> str:
    """Of the validation curve; one too short to judge rises if its last value is its best."""
    names = [f"valid_{name}" for name in ("elbo", "log_joint", "unnormalised_elbo")]
    values = [next((row[n] for n in names if n in row), None) for row in history]
    known = [v for v in values if v is not None]
    try:
        curve = diagnostics.learning_curve([{"valid_elbo": v} for v in known])
    except UndefinedError:
        return "rising" if len(known) >= 2 and known[-1] > max(known[:-1]) else "plateau"
    return "plateau" if curve.state == "rising" and not curve.is_unfinished else curve.state
