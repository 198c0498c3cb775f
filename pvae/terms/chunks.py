"""Passes over a whole data set, in chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pvae.data import Source, first_batch
from pvae.errors import PairError
from pvae.modes import evaluating
from pvae.pair import Batch, Structure
from pvae.terms.evaluation import Evaluation
from pvae.terms.passes import compute
from pvae.terms.result import Terms

__all__ = ["chunks_of", "draw_globals", "first_rows", "stream"]


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
    structure, source, max_rows = evaluation.structure, evaluation.source, evaluation.max_rows
    with evaluating(structure.modules):
        for rows, keep, batch, indices in chunks_of(source, structure, num_particles, max_rows):
            size = structure.subsample_size or len(batch[0])
            at_once = max(1, min(num_particles, max_rows // size))
            done = 0
            while done < num_particles:
                k = min(at_once, num_particles - done)
                terms = run(
                    structure,
                    batch,
                    num_particles=k,
                    given={**(given or {}), **indices},
                    **options,
                )
                if keep is not None and isinstance(terms, Tensor):
                    terms = terms[..., :keep]
                elif keep is not None:
                    terms.first_rows(keep)
                yield rows, terms
                done += k


Chunk = tuple[slice, int | None, tuple[Tensor, ...], dict[str, Tensor]]


def chunks_of(
    source: Source, structure: Structure, num_particles: int, max_rows: int
) -> Iterator[Chunk]:
    """Each chunk's rows, how many of them count (None for all), its batch, and plate indices."""
    if structure.subsample_size is not None:
        return _self_subsampled(source, structure)
    if structure.tied_to is not None:
        return _of_one_length(source, structure.tied_to)
    return _chunks(source, max(1, min(1024, max_rows // num_particles)))


def _chunks(source: Source, size: int) -> Iterator[Chunk]:
    for start, batch in source.all(size):
        yield slice(start, start + len(batch[0])), None, batch, {}


def _self_subsampled(source: Source, structure: Structure) -> Iterator[Chunk]:
    """Visits every datum of a pair that subsamples itself, by setting its plate's indices.

    The plate insists on its subsample size, so the last chunk is filled up with rows that are
    dropped afterwards.
    """
    size, total = structure.subsample_size or 1, source.num_rows
    everything = torch.arange(total, device=source.device)
    batch = source.rows(everything)
    for start in range(0, total, size):
        stop = min(start + size, total)
        indices = torch.arange(start, start + size, device=source.device) % total
        keep = stop - start if stop - start < size else None
        yield slice(start, stop), keep, batch, {structure.plate: indices}


def _of_one_length(source: Source, size: int) -> Iterator[Chunk]:
    """Chunks of the only length that the pair runs on, the last one filled up."""
    if size > source.num_rows:
        raise PairError(
            "data",
            f"at least {size} rows, the only length that the pair runs on",
            f"{source.num_rows} rows",
            ["plates of length len(x)", "parameters that don't belong to single rows"],
        )
    for start in range(0, source.num_rows, size):
        stop = min(start + size, source.num_rows)
        indices = torch.arange(start, start + size, device=source.device) % source.num_rows
        keep = stop - start if stop - start < size else None
        yield slice(start, stop), keep, source.rows(indices), {}


def first_rows(evaluation: Evaluation) -> Batch:
    """A batch of the first rows: as many as the pair runs on, if it can't run on any number."""
    structure, source = evaluation.structure, evaluation.source
    whole = structure.subsample_size is not None
    return first_batch(source, source.num_rows if whole else structure.tied_to or 128)


def draw_globals(evaluation: Evaluation, num_draws: int = 1) -> tuple[dict[str, Tensor], Terms]:
    """Draws of what is outside the data plate, in the form in which they can be given.

    Those of several particles can be given only to as many vectorised ones, so where particles
    are looped it is one; the terms, which are of the first rows, say how many.
    """
    structure = evaluation.structure
    with evaluating(structure.modules):
        terms = compute(structure, first_rows(evaluation), num_particles=num_draws).passes[0]
    k, given = terms.num_particles, dict[str, Tensor]()
    for name, site in terms.sites.items():
        if site.is_local or site.kind not in ("latent", "auxiliary") or site.draws is None:
            continue
        event_dim = len((site.guide or site.model).event_shape)
        padding = structure.nesting + event_dim + 1 - site.draws.dim()
        shape = (k, *(1,) * padding, *site.draws.shape[1:])
        given[name] = site.draws.reshape(shape) if k > 1 else site.draws[0]
    return given, terms
