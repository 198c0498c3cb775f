"""Draws from q(z | x) of all data, and their density under the mixture of all of them, q(z)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from pvae import terms
from pvae.data import first_batch
from pvae.errors import UndefinedError, oxford
from pvae.modes import evaluating
from pvae.pair import mask_of, probing

__all__ = ["Draws", "Mixture", "draw", "require_mixture", "score_mixture", "sum_of"]


@dataclass(frozen=True)
class Draws:
    """K draws for each of N data, and their terms, each of shape ``(K, N, ...)``.

    Attributes:
        values: By latent.
        log_q: log q(z | x) of all latents together.
        rates: log q - log p by site that the guide draws.
        distortions: -log p by site that has data.
        log_q_dims: By latent and dimension; empty where dimensions aren't independent.
        log_p_dims: Likewise.
        because: Why there are none by dimension.
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
    """log q(z) of draws, ``(K, N)``, with all rows, and without a draw's own.

    Attributes:
        log_prob: With all rows.
        without_own: Without the row that a draw is from.
        log_prob_dims: log q(z_d), ``(K, N, D)``; None where it isn't known.
    """

    log_prob: Tensor
    without_own: Tensor
    log_prob_dims: Tensor | None


def draw(evaluation: terms.Evaluation, num_particles: int) -> Draws:
    """Draws from the guide for all data."""
    because = _why_no_dimensions(evaluation)
    chunks: dict[int, list[dict[tuple[str, str], Tensor]]] = {}
    for rows, found in terms.stream(evaluation, num_particles, per_dimension=not because):
        chunks.setdefault(rows.start, []).append(_kept(found))
    whole = {
        key: torch.cat([torch.cat([p[key] for p in parts]) for parts in chunks.values()], 1)
        for key in next(iter(chunks.values()))[0]
    }

    def group(kind: str) -> dict[str, Tensor]:
        return {name: value for (k, name), value in whole.items() if k == kind}

    return Draws(
        group("value"),
        whole["log_q", ""],
        group("rate"),
        group("distortion"),
        group("log_q_dims"),
        group("log_p_dims"),
        because,
    )


def _kept(found: terms.Terms) -> dict[tuple[str, str], Tensor]:
    """What is kept of a chunk."""
    found.require_split()
    kept = {("log_q", ""): found.log_q.double()}
    for name, site in found.sites.items():
        if site.kind == "penalty":
            continue
        is_drawn = site.kind in ("latent", "auxiliary")
        if is_drawn or site.log_q is not None:
            zero = torch.zeros_like(found.log_q)
            log_q = zero if site.log_q is None else site.log_q
            log_p = zero if site.log_p is None or not is_drawn else site.log_p
            kept["rate", name] = (log_q - log_p).double()
        elif site.log_p is not None:
            kept["distortion", name] = -site.log_p.double()
        if name in found.structure.latents and site.value is not None:
            kept["value", name] = site.value
        for key in ("log_q_dims", "log_p_dims"):
            value = getattr(site, key)
            if value is not None:
                kept[key, name] = value.double()
    return kept


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
    structure, source = evaluation.structure, evaluation.source
    if structure.subsample_size is not None or structure.tied_to is not None:
        raise UndefinedError(
            "q(z)", "a pair that runs on any rows", "one that picks its rows, or has one length"
        )
    batch = first_batch(source, 128)
    with probing((structure.model, structure.guide)):
        first = terms.compute(structure, batch)
        values = {name: first.sites[name].value for name in structure.latents}
        drawn = {name: value[0] for name, value in values.items() if value is not None}
        for trace in (first.guide_trace, first.model_trace):
            masked = [n for n in drawn if mask_of(trace.nodes[n]) is not None]
            if masked:
                raise UndefinedError(
                    "q(z)", "latents of all rows", f"a mask at site {oxford(masked)}"
                )
        one = {name: value[:1] for name, value in drawn.items()}
        terms.score_guide(structure, batch, one)
        rolled = {name: value.roll(1, 0) for name, value in drawn.items()}
        second = terms.compute(structure, batch, given=rolled)
    for name in drawn:
        ours, other = second.sites[name].log_p, first.sites[name].log_p
        if ours is None or other is None or not torch.allclose(ours, other.roll(1, 1), rtol=1e-4):
            raise UndefinedError(
                "p(z)",
                "one prior for all data",
                f"a prior at site '{name}' that differs between data",
                ["the rows of one label at a time"],
            )


def score_mixture(evaluation: terms.Evaluation, own: Draws, max_rows: int | None = None) -> Mixture:
    """log q(z) of every draw: the log of the mean of its density under every row's guide.

    Arguments:
        evaluation: The pair and its rows.
        own: The draws.
        max_rows: Bound on the rows in the guide at once; None for what is cheap for it alone.
    """
    structure, source = evaluation.structure, evaluation.source
    max_rows = max_rows or max(evaluation.max_rows, _LEAST_ROWS)
    k, n = own.log_q.shape
    values = {name: value.flatten(0, 1) for name, value in own.values.items()}
    by_dimension = len(values) == 1 and not own.because
    rows = max(1, min(n, 1024, max_rows))
    size = max(1, max_rows // rows)
    joint, without, dims = [], [], []
    with evaluating(structure.modules):
        starts = range(0, k * n, size)
        for start in tqdm(starts, disable=not evaluation.progress, desc="q(z)", unit="chunk"):
            chosen = {name: value[start : start + size] for name, value in values.items()}
            of_row = torch.arange(start, min(start + size, k * n), device=own.log_q.device) % n
            sums: list[Tensor] = []
            for others in torch.arange(n, device=own.log_q.device).split(rows):
                batch = source.rows(others)
                sites = terms.score_guide(
                    structure,
                    batch,
                    chosen,
                    per_dimension=by_dimension,
                ).values()
                log_q = sum_of(s.log_q for s in sites if s.kind != "penalty")
                is_own = of_row[:, None] == others
                new = [log_q.logsumexp(1), log_q.masked_fill(is_own, -torch.inf).logsumexp(1)]
                if by_dimension:
                    each = next(s.log_q_dims for s in sites if s.log_q_dims is not None)
                    new.append(each.double().flatten(2).logsumexp(1))
                sums = new if not sums else list(map(torch.logaddexp, sums, new))
            joint.append(sums[0])
            without.append(sums[1])
            dims += sums[2:]
    return Mixture(
        torch.cat(joint).reshape(k, n) - math.log(n),
        torch.cat(without).reshape(k, n) - math.log(n - 1),
        torch.cat(dims).reshape(k, n, -1) - math.log(n) if dims else None,
    )


_LEAST_ROWS = 65536


def sum_of(parts: Iterable[Tensor | None]) -> Tensor:
    """The sum of tensors, in double precision."""
    return torch.stack([p.double() for p in parts if p is not None]).sum(0)
