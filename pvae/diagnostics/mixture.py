"""Draws from q(z | x) of all data, and their density under the mixture of all of them, q(z)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae import terms
from pvae.bounds.possible import Possible
from pvae.data import first_batch
from pvae.devices import beside, double
from pvae.errors import UndefinedError, oxford
from pvae.modes import evaluating
from pvae.options import progress_bar
from pvae.pair import mask_of, probing

__all__ = ["Draws", "Mixture", "draw", "require_mixture", "score_mixture", "sum_of"]


@dataclass(frozen=True)
class Draws:
    """K draws for each of N data, and their terms, each ``(K, N, ...)`` by site.

    ``log_q`` is that of all latents together. Terms by dimension are empty where dimensions aren't
    independent given what comes before, and ``because`` says why.
    """

    values: dict[str, Tensor]
    log_q: Tensor
    rates: dict[str, Tensor]
    distortions: dict[str, Tensor]
    log_q_dims: dict[str, Tensor]
    log_p_dims: dict[str, Tensor]
    because: str


@dataclass(frozen=True)
class Mixture:
    """log q(z) of draws, ``(K, N)``, with all rows, without a draw's own, and by dimension."""

    log_prob: Tensor
    without_own: Tensor
    log_prob_dims: Tensor | None


def draw(
    evaluation: terms.Evaluation, num_particles: int, possible: Possible | None = None
) -> Draws:
    """Draws from the guide for all data, which ``possible`` takes in."""
    because = _why_no_dimensions(evaluation)
    chunks: dict[int, list[dict[str, dict[str, Tensor]]]] = {}
    for rows, part in terms.stream(evaluation, num_particles, per_dimension=not because):
        chunks.setdefault(rows.start, []).append(_terms_of(part))
        if possible is not None:
            possible.take(rows, part)

    def joined(kind: str) -> dict[str, Tensor]:
        parts = [[part[kind] for part in of_rows] for of_rows in chunks.values()]
        return {
            name: torch.cat([torch.cat([p[name] for p in of_rows]) for of_rows in parts], 1)
            for name in parts[0][0]
        }

    rates, distortions = joined("rate"), joined("distortion")
    dims = joined("log_q_dims"), joined("log_p_dims")
    return Draws(joined("value"), joined("log_q")["q"], rates, distortions, *dims, because)


def _terms_of(chunk: terms.Terms) -> dict[str, dict[str, Tensor]]:
    """What is needed of a chunk, by kind and site."""
    chunk.require_split()
    kinds = ("value", "rate", "distortion", "log_q_dims", "log_p_dims")
    parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    parts["log_q"] = {"q": double(chunk.log_q)}
    zero = torch.zeros_like(chunk.log_q)
    for name, site in chunk.sites.items():
        if not site.has_density:
            continue
        is_drawn = site.kind in ("latent", "auxiliary")
        if is_drawn or site.log_q is not None:
            log_p = site.log_p if is_drawn else None
            log_q, log_p = (zero if value is None else value for value in (site.log_q, log_p))
            parts["rate"][name] = double(log_q - log_p)
        elif site.log_p is not None:
            parts["distortion"][name] = -double(site.log_p)
        if name in chunk.structure.latents and site.value is not None:
            parts["value"][name] = site.value
        for kind, dims in (("log_q_dims", site.log_q_dims), ("log_p_dims", site.log_p_dims)):
            if dims is not None:
                parts[kind][name] = double(dims)
    return parts


def _why_no_dimensions(evaluation: terms.Evaluation) -> str:
    structure, source = evaluation.structure, evaluation.source
    rows = structure.tied_to or (source.num_rows if structure.subsample_size else 2)
    batch = first_batch(source, rows)
    try:
        with probing((structure.model, structure.guide)):
            terms.compute(structure, batch, per_dimension=True)
    except UndefinedError as error:
        return f"{error.where}: {error.actual}"
    return ""


def require_mixture(evaluation: terms.Evaluation) -> None:
    """Refuses pairs whose q(z) isn't the mean of scores, or that have no one p(z)."""
    structure = evaluation.structure
    if structure.subsample_size is not None or structure.tied_to is not None:
        got = "one that picks its rows, or has one length"
        raise UndefinedError("q(z)", "a pair that runs on any rows", got)
    batch = first_batch(evaluation.source, 128)
    with probing((structure.model, structure.guide)):
        first = terms.compute(structure, batch)
        values = {name: first.sites[name].value for name in structure.latents}
        drawn = {name: value[0] for name, value in values.items() if value is not None}
        for trace in (first.guide_trace, first.model_trace):
            if masked := [name for name in drawn if mask_of(trace.nodes[name]) is not None]:
                got = f"a mask at site {oxford(masked)}"
                raise UndefinedError("q(z)", "latents of all rows", got)
        terms.score_guide(structure, batch, {name: value[:1] for name, value in drawn.items()})
        rolled = {name: value.roll(1, 0) for name, value in drawn.items()}
        second = terms.compute(structure, batch, given=rolled)
    for name in drawn:
        _require_one_prior(name, first.sites[name].log_p, second.sites[name].log_p)


def _require_one_prior(name: str, log_p: Tensor | None, rolled: Tensor | None) -> None:
    """Refuses a site where a value has another prior density at another datum."""
    if log_p is None or rolled is None or not torch.allclose(rolled, log_p.roll(1, 1), rtol=1e-4):
        got = f"a prior at site '{name}' that differs between data"
        fixes = ["the rows of one label at a time"]
        raise UndefinedError("p(z)", "one prior for all data", got, fixes)


def score_mixture(evaluation: terms.Evaluation, own: Draws, max_rows: int | None = None) -> Mixture:
    """log q(z) of every draw: the log of the mean of its density under every row's guide.

    At most ``max_rows`` rows are in the guide at once; None for what is cheap for it alone.
    """
    max_rows = max_rows or max(evaluation.max_rows, _LEAST_ROWS)
    k, n = own.log_q.shape
    values = {name: value.flatten(0, 1) for name, value in own.values.items()}
    by_dimension = len(values) == 1 and not own.because
    rows = max(1, min(n, 1024, max_rows))
    size = max(1, max_rows // rows)
    sums = []
    with evaluating(evaluation.structure.modules):
        starts = range(0, k * n, size)
        for start in progress_bar(starts, title="q(z)", unit="chunk", shown=evaluation.progress):
            chosen = {name: value[start : start + size] for name, value in values.items()}
            own_rows = torch.arange(start, min(start + size, k * n), device=own.log_q.device) % n
            parts = [
                _log_sums(evaluation, chosen, own_rows, others, by_dimension=by_dimension)
                for others in torch.arange(n, device=evaluation.source.device).split(rows)
            ]
            sums.append([functools.reduce(torch.logaddexp, p) for p in zip(*parts, strict=True)])
    joint, without, *dims = (torch.cat(part) for part in zip(*sums, strict=True))
    return Mixture(
        joint.reshape(k, n) - math.log(n),
        without.reshape(k, n) - math.log(n - 1),
        dims[0].reshape(k, n, -1) - math.log(n) if dims else None,
    )


def _log_sums(
    evaluation: terms.Evaluation,
    values: dict[str, Tensor],
    own_rows: Tensor,
    others: Tensor,
    *,
    by_dimension: bool,
) -> list[Tensor]:
    """Logs of sums over rows of the draws' densities: of all, without their own, by dimension."""
    batch, structure = evaluation.source.rows(others), evaluation.structure
    scores = terms.score_guide(structure, batch, values, per_dimension=by_dimension).values()
    log_q = sum_of(s.log_q for s in scores if s.has_density)
    left_out = log_q.masked_fill(own_rows[:, None] == beside(others, own_rows), -torch.inf)
    sums = [log_q.logsumexp(1), left_out.logsumexp(1)]
    if by_dimension:
        each = next(s.log_q_dims for s in scores if s.log_q_dims is not None)
        sums.append(double(each).flatten(2).logsumexp(1))
    return sums


_LEAST_ROWS = 65536


def sum_of(parts: Iterable[Tensor | None]) -> Tensor:
    """The sum of tensors, in double precision."""
    return torch.stack([double(p) for p in parts if p is not None]).sum(0)
