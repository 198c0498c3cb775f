"""What `fit` refuses before it trains."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.infer.autoguide import AutoGuide

from pvae import randomness
from pvae.data import LoaderSource, Source, first_batch
from pvae.distributed import World
from pvae.errors import ArgumentError, PairError, PvaeError, oxford, warn
from pvae.modes import evaluating, in_mode
from pvae.objectives import Objective
from pvae.pair import Structure, is_penalty, run_pair
from pvae.types import Site

__all__ = [
    "check_batches",
    "check_objective",
    "check_overcomplete",
    "check_parameters",
    "check_plate",
    "trying",
]


def check_batches(structure: Structure, source: Source, batch_size: int, world: World) -> None:
    """Refuses batches that the pair can't be trained on, or would be wrongly trained on."""
    if isinstance(source, LoaderSource) or structure.subsample_size is not None:
        return
    if batch_size < source.num_rows:
        _check_minibatches(structure, source.num_rows, batch_size)
    if 1 in _sizes(source.num_rows, batch_size, world):
        _check_one_row(structure, source, batch_size)


def _sizes(num_rows: int, batch_size: int, world: World) -> set[int]:
    """How many rows a process may get at once."""
    return world.shares(batch_size) | world.shares(num_rows % batch_size)


def _check_minibatches(structure: Structure, num_rows: int, batch_size: int) -> None:
    if structure.tied_to is not None:
        per_row = isinstance(poutine.unwrap(structure.guide), AutoGuide) and structure.latents
        if per_row or num_rows % batch_size:
            raise PairError(
                "batch_size",
                f"all {num_rows} rows in one batch: the pair runs on {structure.tied_to} rows and "
                "on no other number",
                f"batches of {batch_size}",
                [
                    "batch_size=None",
                    "pyro.plate(name, N, subsample_size=...) in the pair, which picks its rows",
                ],
            )
        warn(
            f"The pair runs on batches of {structure.tied_to} rows and on no others. If it has "
            "parameters of its own for each row, other rows will share them: batch_size=None."
        )
    if structure.global_sites and not structure.is_scaled:
        shared = oxford(structure.global_sites[:4])
        advice = (
            f"In batches of {batch_size} of {num_rows} rows they would count once a batch, as if "
            "each batch were the whole data set"
        )
        if structure.global_latents:
            raise PairError(
                f"global site(s) {shared}",
                "a data plate that knows the full size",
                f"pyro.plate('{structure.plate}', len(x)). {advice}",
                [
                    f"pyro.plate('{structure.plate}', {num_rows}, subsample_size=len(x)) in model "
                    "and guide",
                    "batch_size=None",
                ],
            )
        warn(
            f"Site(s) {shared} are outside the data plate. {advice}. "
            f"pyro.plate('{structure.plate}', {num_rows}, subsample_size=len(x)) counts them once."
        )


def _check_one_row(structure: Structure, source: Source, batch_size: int) -> None:
    """Tries a batch of one row in training mode, which batch norm and penalties may refuse."""
    try:
        with trying(structure):
            run_pair(structure.model, structure.guide, first_batch(source, 1))
    except PairError as error:
        if not re.search("more than 1 value per channel|at least two data", str(error)):
            raise
        raise ArgumentError(
            "batch_size",
            "every batch with at least two rows, as batch norm and MMD need in training",
            f"{source.num_rows} rows in batches of {batch_size}: the last one has a single row",
            [f"batch_size={batch_size + 1}", "one row fewer"],
        ) from error


def check_objective(
    objective: Objective, structure: Structure, source: Source, batch_size: int, world: World
) -> None:
    """Tries the objective on batches of the sizes that training will have."""
    sizes = {batch_size}
    if not isinstance(source, LoaderSource) and structure.subsample_size is None:
        sizes = _sizes(source.num_rows, batch_size, world)
    state = objective.make_state(structure, source.num_rows, 1, 1)
    for size in sizes:
        with trying(structure):
            batch = first_batch(source, size)
            terms = objective.compute_terms(structure, batch)
            objective.surrogate(terms, state)


@contextmanager
def trying(structure: Structure) -> Iterator[None]:
    """Training mode, which leaves no trace: modes, buffers and generators are put back."""
    copies = [(b, b.clone()) for m in structure.modules for b in m.buffers(recurse=False)]
    try:
        with in_mode(structure.modules, training=True), randomness.forked(), torch.no_grad():
            yield
    finally:
        for buffer, copy in copies:
            buffer.copy_(copy)


def check_overcomplete(structure: Structure, source: Source) -> None:
    """Warns of an autoencoder that nothing keeps from learning the identity."""
    if isinstance(source, LoaderSource) or not (structure.points & set(structure.improper)):
        return
    batch = first_batch(source, min(8, source.num_rows))
    points = sorted(structure.points & set(structure.improper))
    try:
        with evaluating(structure.modules), randomness.forked():
            clean, of_model = run_pair(structure.model, structure.guide, batch)
        code, data = (
            sum(_size(of_model.nodes[n]) for n in names) for names in (points, structure.observed)
        )
        if code < data:
            return
        if any(hasattr(clean.nodes[n]["fn"], "quantised") for n in points):
            return  # few codes
        with trying(structure):
            of_guide, of_model = run_pair(structure.model, structure.guide, batch)
    except PvaeError:  # training will say so
        return
    sites = [*of_guide.nodes.values(), *of_model.nodes.values()]
    if any(is_penalty(s) for s in sites if s["type"] == "sample"):
        return
    if any(not torch.equal(of_guide.nodes[n]["value"], clean.nodes[n]["value"]) for n in points):
        return  # corrupted data, dropout, or a norm over the batch
    warn(
        f"The code has {code} entries, the data have {data}: an autoencoder can learn the "
        "identity, and nothing here keeps it from that. A smaller latent_dim, a sparse or normal "
        "prior, a corruption, or a penalty would.",
    )


def _size(site: Site) -> int:
    return math.prod(site["fn"].event_shape)


def check_plate(objective: PyroELBO, structure: Structure) -> None:
    """Refuses an objective that was told of another data plate than the pair's."""
    plate = getattr(objective, "plate", None)
    if plate is not None and plate not in structure.plates:
        raise ArgumentError(
            "objective",
            f"the pair's data plate, '{structure.plate}'",
            f"plate='{plate}'",
            [f"pvae.fit(pvae.Pair(model, guide, plate='{plate}'), ...)"],
        )


def check_parameters(structure: Structure) -> None:
    """Refuses a pair with nothing to train."""
    if not structure.parameters:
        raise PairError(
            "pair",
            "at least one trainable parameter",
            "none",
            ["pyro.param or pyro.module in a function", "nn.Parameter in a module"],
        )
