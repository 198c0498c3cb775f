"""Passes over a whole data set, in chunks of bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pvae.data import Source
from pvae.data.sources import LoaderSource
from pvae.errors import PairError, check_int
from pvae.modes import evaluating
from pvae.terms.passes import compute
from pvae.terms.probe import inspect_pair
from pvae.terms.structure import Structure

__all__ = ["chunks_of", "first_batch", "home_of", "inspect_source", "stream"]


def first_batch(source: Source, num_rows: int) -> tuple[Tensor, ...]:
    """The first rows of a source; a DataLoader's first batch."""
    return next(source.all(min(num_rows, source.num_rows)))[1]


def home_of(programs: Iterable[Any], data: Any) -> Tensor:
    """A floating tensor that is where a pair is: a module's; for functions, one of the data."""
    modules = [p for p in programs if isinstance(p, nn.Module)]
    given = data if isinstance(data, (tuple, list)) else (data,)
    tensors = (v for m in modules for v in (*m.parameters(), *m.buffers()))
    for tensor in (*tensors, *given):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return tensor
    return torch.zeros(())


def inspect_source(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    source: Source,
    num_rows: int = 128,
    plate: str | None = None,
) -> Structure:
    """What a pair is made of, by a batch of ``num_rows`` rows, or by all rows.

    All rows go to a pair that subsamples itself, to an autoguide that isn't set up yet (its first
    batch decides how many parameters it has), and to one that doesn't run on a batch.
    """
    if isinstance(source, LoaderSource):
        return inspect_pair(model, guide, first_batch(source, num_rows), plate)
    autoguide = poutine.unwrap(guide)
    if isinstance(autoguide, AutoGuide) and getattr(autoguide, "prototype_trace", None) is None:
        inspect_pair(model, guide, first_batch(source, source.num_rows), plate)
    try:
        structure = inspect_pair(model, guide, first_batch(source, num_rows), plate)
    except PairError:
        if source.device.type != "cpu" or num_rows >= source.num_rows:
            raise
        whole: Structure | None = None
        with contextlib.suppress(PairError):
            whole = inspect_pair(model, guide, first_batch(source, source.num_rows), plate)
        if whole is None or (whole.subsample_size is None and whole.tied_to is None):
            raise
        return whole
    if structure.subsample_size is not None and num_rows < source.num_rows:
        return inspect_pair(model, guide, first_batch(source, source.num_rows), plate)
    return structure


def stream(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    source: Source,
    structure: Structure,
    num_particles: int = 1,
    max_rows: int = 8192,
    given: Mapping[str, Tensor] | None = None,
    run: Callable[..., Any] = compute,
    **options: Any,
) -> Iterator[tuple[slice, Any]]:
    """Terms of every datum in order, in evaluation mode without gradients.

    A chunk has at most ``max_rows`` rows, counting each particle of a datum as one, so memory
    doesn't grow with K * N. Where K alone is larger, the particles of a datum come in several
    chunks, one after another, and add up to K.

    Arguments:
        model: A Pyro program.
        guide: Its guide.
        source: The data.
        structure: What `inspect_pair` found.
        num_particles: K.
        max_rows: The bound on rows.
        given: Values of guide sites that aren't to be drawn.
        run: `compute`, or what is called like it and makes a tensor of a chunk's terms, with
            the rows last.
        options: For `compute`.

    Yields:
        The rows that a chunk has, and their terms.
    """
    check_int("max_rows", max_rows)
    with evaluating(structure.modules):
        for rows, keep, batch, indices in chunks_of(source, structure, num_particles, max_rows):
            size = structure.subsample_size or len(batch[0])
            at_once = max(1, min(num_particles, max_rows // size))
            done = 0
            while done < num_particles:
                k = min(at_once, num_particles - done)
                terms = run(
                    model,
                    guide,
                    batch,
                    structure=structure,
                    num_particles=k,
                    given={**(given or {}), **indices},
                    **options,
                )
                yield rows, terms if keep is None else _rows_of(terms, keep)
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


def _rows_of(terms: Any, count: int) -> Any:
    """The first rows of a chunk."""
    if isinstance(terms, Tensor):
        return terms[..., :count]
    for site in terms.sites.values():
        site.first_rows(count)
    terms.num_rows = count
    return terms
