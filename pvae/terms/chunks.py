"""Passes over a whole data set, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.data import LoaderSource, Source, first_batch
from pvae.devices import double
from pvae.errors import PairError, telling_memory
from pvae.modes import evaluating
from pvae.pair import Batch, Structure
from pvae.terms.evaluation import Evaluation
from pvae.terms.passes import can_vectorize, compute, draw_guide
from pvae.terms.result import SiteTerms

__all__ = ["GlobalDraws", "chunks_of", "draw_globals", "first_rows", "fits_particles", "stream"]


def stream(
    evaluation: Evaluation,
    num_particles: int = 1,
    given: Mapping[str, Tensor] | None = None,
    run: Callable[..., Any] = compute,
    **options: Any,
) -> Generator[tuple[slice, Any]]:
    """Terms of every datum in order, in evaluation mode without gradients.

    A chunk has at most ``max_rows`` rows, counting each particle of a datum as one, so memory
    doesn't grow with K * N. Where K alone is larger, the particles of a datum come in several
    chunks, one after another, and add up to K.

    Arguments:
        evaluation: The pair and its data, as `prepared` has them.
        num_particles: K.
        given: Values of guide sites that aren't to be drawn.
        run: `compute`, or what is called like it and makes a tensor, with the rows last, or
            something that can cut itself to its ``first_rows``.
        options: For `compute`.

    Yields:
        The rows that a chunk has, and their terms.
    """
    structure, max_rows = evaluation.structure, evaluation.max_rows
    chunks = chunks_of(evaluation.source, structure, num_particles, max_rows)
    with evaluating(structure.modules):  # also while what it yields is read, which may run more
        for rows, keep, batch, indices in chunks:
            values = {**(given or {}), **indices}
            size = structure.subsample_size or structure.num_rows_of(batch)
            at_once = max(1, min(num_particles, max_rows // size))
            for done in range(0, num_particles, at_once):
                k = min(at_once, num_particles - done)
                with telling_memory("the pair", k * size):
                    terms = run(structure, batch, num_particles=k, given=values, **options)
                if keep is not None and isinstance(terms, Tensor):
                    terms = terms[..., :keep]
                elif keep is not None:
                    terms.first_rows(keep)
                yield rows, terms


Chunk = tuple[slice, int | None, tuple[Tensor, ...], dict[str, Tensor]]


def chunks_of(
    source: Source, structure: Structure, num_particles: int, max_rows: int
) -> Iterator[Chunk]:
    """Each chunk's rows, how many of them count (None for all), its batch, and plate indices.

    A pair that subsamples itself visits every datum by setting its plate's indices. There, and
    for a pair that runs on one number of rows alone, the last chunk is filled up with rows that
    don't count.
    """
    is_subsampled = structure.subsample_size is not None
    size, total = structure.subsample_size or structure.tied_to, source.num_rows
    if size is None:
        at_once = max(1, min(1024, max_rows // num_particles))
        for start, batch in source.all(at_once):
            yield slice(start, start + structure.num_rows_of(batch)), None, batch, {}
        return
    if size > total and not is_subsampled:
        expected = f"at least {size} rows, the only length that the pair runs on"
        fixes = ["plates of length len(x)", "parameters that don't belong to single rows"]
        raise PairError("data", expected, f"{total} rows", fixes)
    everything = torch.arange(total, device=source.device)
    whole = source.rows(everything) if is_subsampled else ()
    for start in range(0, total, size):
        stop = min(start + size, total)
        keep = stop - start if stop - start < size else None
        indices = torch.arange(start, start + size, device=source.device) % total
        if is_subsampled:
            yield slice(start, stop), keep, whole, {structure.plate: indices}
        else:
            yield slice(start, stop), keep, source.rows(indices), {}


def first_rows(evaluation: Evaluation) -> Batch:
    """A batch of the first rows: as many as the pair runs on, if it can't run on any number."""
    structure, source = evaluation.structure, evaluation.source
    whole = structure.subsample_size is not None
    return first_batch(source, source.num_rows if whole else structure.tied_to or 128)


def fits_particles(evaluation: Evaluation) -> bool:
    """Whether several particles go through the pair at once, found out on the first rows."""
    structure = evaluation.structure
    with evaluating(structure.modules):
        return can_vectorize(structure, first_rows(evaluation))


@dataclass(frozen=True)
class GlobalDraws:
    """Draws of what is outside the data plate.

    Attributes:
        given: Values by site, in the form in which they can be given.
        count: How many they are.
        log_q: The log density of each, ``(count,)``.
    """

    given: dict[str, Tensor]
    count: int
    log_q: Tensor


def draw_globals(
    evaluation: Evaluation, num_draws: int = 1, *, of_model: bool = False
) -> GlobalDraws:
    """Draws of what is outside the data plate.

    They are the guide's, by a pass of the guide alone; with ``of_model`` the pair has a guide that
    leaves them to the model. Those of several particles can be given only to as many vectorised
    ones, so where particles are looped it is one. A guide that reads the data has all of them, up
    to ``max_rows``; where there are more, one whose draws depend on which rows it has is refused.
    """
    structure, source = evaluation.structure, evaluation.source
    k = num_draws if num_draws == 1 or fits_particles(evaluation) else 1
    is_whole = source.num_rows <= evaluation.max_rows and not isinstance(source, LoaderSource)
    batch = first_batch(source, source.num_rows) if is_whole else first_rows(evaluation)
    with evaluating(structure.modules):
        run = compute(structure, batch, num_particles=k).sites if of_model else None
        sites = run or draw_guide(structure, batch, num_particles=k)
    given: dict[str, Tensor] = {}
    for name, site in sites.items():
        if not site.is_local and site.is_drawn and site.draws is not None:
            event_dim = len((site.guide or site.model).event_shape)
            padding = structure.nesting + event_dim + 1 - site.draws.dim()
            shape = (k, *(1,) * padding, *site.draws.shape[1:])
            given[name] = site.draws.reshape(shape) if k > 1 else site.draws[0]
    log_q = _log_q(sites, k)
    if not is_whole and not of_model:
        _check_blind(evaluation, given, k, log_q)
    return GlobalDraws(given, k, log_q)


def _log_q(sites: Mapping[str, SiteTerms], k: int) -> Tensor:
    outside = [s.log_q for s in sites.values() if not s.is_local and s.has_density]
    parts = [double(part) for part in outside if part is not None]
    return torch.stack(parts).sum(0) if parts else torch.zeros(k, dtype=torch.float64)


def _check_blind(
    evaluation: Evaluation, given: Mapping[str, Tensor], k: int, log_q: Tensor
) -> None:
    """Refuses, once looked at, draws of what all data share whose density other rows change."""
    structure = evaluation.structure
    if structure.subsample_size is not None or structure.tied_to is not None:
        return
    if "reads_rows" not in structure.notes:
        other = first_batch(evaluation.source, 64)
        with evaluating(structure.modules):
            again = _log_q(draw_guide(structure, other, num_particles=k, given=given), k)
        off = (again - log_q).abs().max() / log_q.abs().max().clamp(min=1.0)
        structure.notes["reads_rows"] = not bool(off <= _SAME)
    if structure.notes["reads_rows"]:
        rows, most = evaluation.num_rows, evaluation.max_rows
        expected = "draws of global latents that don't depend on which rows the guide is given"
        actual = f"a guide that reads the data, {rows} rows of which max_rows={most} are at once"
        raise PairError("guide", expected, actual, [f"max_rows={rows}"])


_SAME = 1e-4
