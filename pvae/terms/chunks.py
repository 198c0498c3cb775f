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
    structure, max_rows = evaluation.structure, evaluation.max_rows
    with evaluating(structure.modules):
        for rows, keep, batch, indices in chunks_of(
            evaluation.source, structure, num_particles, max_rows
        ):
            values = {**(given or {}), **indices}
            size = structure.subsample_size or len(batch[0])
            at_once = max(1, min(num_particles, max_rows // size))
            for done in range(0, num_particles, at_once):
                k = min(at_once, num_particles - done)
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
            yield slice(start, start + len(batch[0])), None, batch, {}
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
        if not site.is_local and site.is_drawn and site.draws is not None:
            event_dim = len((site.guide or site.model).event_shape)
            padding = structure.nesting + event_dim + 1 - site.draws.dim()
            shape = (k, *(1,) * padding, *site.draws.shape[1:])
            given[name] = site.draws.reshape(shape) if k > 1 else site.draws[0]
    return given, terms
