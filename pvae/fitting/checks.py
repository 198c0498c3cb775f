"""What `fit` refuses before it trains."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pyro.infer import ELBO as PyroELBO
from pyro.poutine import Trace

from pvae import randomness
from pvae.data import Batches, LoaderSource, Source, first_batch, num_rows_of
from pvae.engine import Backup
from pvae.errors import ArgumentError, PairError, PvaeError, oxford, warn
from pvae.modes import evaluating, in_mode
from pvae.objectives import Objective
from pvae.objectives.refusals import check_of_pyro
from pvae.pair import Batch, Structure, is_penalty, put_back, run_pair
from pvae.pair.running import ON_ONE_DEVICE
from pvae.terms import check_own_rows, has_own_rows

__all__ = [
    "check_batches",
    "check_objective",
    "check_overcomplete",
    "check_pair",
    "check_whole",
    "trying",
]


def check_batches(structure: Structure, batches: Batches) -> None:
    """Refuses batches that the pair can't be trained on, or would be wrongly trained on."""
    if structure.subsample_size is not None:
        return
    _warn_of_size(structure, batches.source.num_rows)
    _check_rows_kept(structure, batches)
    if batches.batch_size == batches.source.num_rows:
        check_own_rows(structure, batches.source)
    if batches.batch_size < batches.source.num_rows:
        _check_minibatches(structure, batches)
    if 1 in batches.sizes:
        _check_one_row(structure, batches)


def _warn_of_size(structure: Structure, num_rows: int) -> None:
    """Warns of a plate that counts other data than there are, beside latents that they share."""
    if structure.global_latents and structure.is_scaled and structure.full_size != num_rows:
        warn(
            f"pyro.plate('{structure.plate}', {structure.full_size}, ...) counts other data than "
            f"the {num_rows} that there are: the posterior of {oxford(structure.global_latents)} "
            f"is that of {structure.full_size} such data."
        )


def check_whole(structure: Structure, source: Source, batch_size: int | None) -> None:
    """Refuses minibatches where no plate counts the data: all of them are one datum."""
    if structure.has_plate or batch_size is None or isinstance(source, LoaderSource):
        return
    rows = max((len(part) for part in first_batch(source, 1) if part.dim()), default=1)
    if batch_size < rows:
        raise PairError(
            "batch_size",
            "all data in one batch: no plate of the pair counts them, so they are one datum",
            f"batches of {batch_size}, of arrays with {rows} rows",
            [
                "batch_size=None",
                "with pyro.plate('data', len(x)): around what belongs to single rows",
            ],
        )


def _words(batches: Batches) -> tuple[str, list[str]]:
    """What cuts the data into batches, and what has all of them in one."""
    if isinstance(batches.source, LoaderSource):
        return "the DataLoader", ["loader.dataset as the data, and batch_size=None"]
    return "batch_size", ["batch_size=None"]


def _check_rows_kept(structure: Structure, batches: Batches) -> None:
    """Refuses other rows, or rows in another order, for parameters that belong to single rows."""
    num_rows, size = batches.source.num_rows, batches.batch_size
    if size == num_rows and not batches.shuffle:
        return
    where, whole = _words(batches)
    tied, own_rows = structure.tied_to, has_own_rows(structure, first_batch(batches.source, size))
    if own_rows or (tied is not None and num_rows % size):
        why = (
            "parameters belong to places in the batch, as m has one for each row in m[:len(x)]"
            if tied is None
            else f"the pair runs on {tied} rows and on no other number"
        )
        expected = f"all {num_rows} rows in one batch, in one order: {why}"
        own = "pyro.plate(name, N, subsample_size=...) in the pair, which picks its rows"
        actual = f"batches of {size}" if size < num_rows else "another order in each epoch"
        raise PairError(where, expected, actual, [*whole, own])
    if tied is None:
        return
    warn(
        f"The pair runs on batches of {structure.tied_to} rows and on no others. If it has "
        f"parameters of its own for each row, other rows will share them: {whole[0]}."
    )


def _check_minibatches(structure: Structure, batches: Batches) -> None:
    if not structure.global_sites or structure.is_scaled:
        return
    shared, plate = oxford(structure.shared_sites[:4]), structure.plate
    num_rows, (_, whole) = batches.source.num_rows, _words(batches)
    scaled = f"pyro.plate('{plate}', {num_rows}, subsample_size=len(x))"
    advice = (
        f"In batches of {batches.batch_size} of {num_rows} rows they would count once a batch, as "
        "if each batch were the whole data set"
    )
    if structure.global_latents:
        raise PairError(
            f"global site(s) {shared}",
            "a data plate that knows the full size",
            f"pyro.plate('{plate}', len(x)). {advice}",
            [f"{scaled} in model and guide", *whole],
        )
    warn(f"Site(s) {shared} are outside the data plate. {advice}. {scaled} counts them once.")


def _check_one_row(structure: Structure, batches: Batches) -> None:
    """Tries a batch of one row in training mode, which batch norm and penalties may refuse."""
    size, num_rows = batches.batch_size, batches.source.num_rows
    try:
        with trying(structure):
            run_pair(structure.model, structure.guide, _rows(batches, 1))
    except PairError as error:
        if not re.search("more than 1 value per channel|at least two data", str(error)):
            raise
        fixes = [f"batch_size={size + 1}", "one row fewer"]
        if isinstance(batches.source, LoaderSource):
            fixes.insert(0, "drop_last=True in the DataLoader")
        raise ArgumentError(
            _words(batches)[0],
            "every batch with at least two rows, as batch norm and MMD need in training",
            f"{num_rows} rows in batches of {size}: the last one has a single row",
            fixes,
        ) from error


def _rows(batches: Batches, size: int) -> Batch:
    """The first rows; no more than so many of a ``DataLoader``'s first batch."""
    batch, axes = first_batch(batches.source, size), batches.source.axes
    if num_rows_of(batch, axes) <= size:
        return batch
    pairs = zip(batch, axes or (0,) * len(batch), strict=True)
    return tuple(part if axis is None else part.narrow(axis, 0, size) for part, axis in pairs)


def check_objective(objective: Objective, structure: Structure, batches: Batches) -> None:
    """Tries the objective on batches of the sizes that training will have."""
    sizes = batches.sizes if structure.subsample_size is None else {batches.batch_size}
    state = objective.make_state(structure, batches.source.num_rows, 1, 1)
    for size in sizes:
        with trying(structure):
            terms = objective.compute_terms(structure, _rows(batches, size))
            objective.surrogate(terms, state)


@contextmanager
def trying(structure: Structure) -> Iterator[None]:
    """Training mode, which leaves no trace: modes, buffers, generators and counters go back."""
    backup = Backup([b for m in structure.modules for b in m.buffers(recurse=False)])
    before = put_back((structure.model, structure.guide))
    try:
        with (
            before,
            in_mode(structure.modules, training=True),
            randomness.forked(),
            torch.no_grad(),
        ):
            yield
    finally:
        backup.restore()


def check_overcomplete(structure: Structure, source: Source) -> None:
    """Warns of an autoencoder that nothing keeps from learning the identity."""
    points = sorted(structure.points & set(structure.improper))
    if not points:
        return
    batch = first_batch(source, 8)
    try:
        with (
            put_back((structure.model, structure.guide)),
            evaluating(structure.modules),
            randomness.forked(),
        ):
            clean, of_model = run_pair(structure.model, structure.guide, batch)
        code, data = (
            sum(math.prod(of_model.nodes[name]["fn"].event_shape) for name in names)
            for names in (points, structure.observed)
        )
        if code < data:
            return
        with trying(structure):
            trained = run_pair(structure.model, structure.guide, batch)
    except PvaeError:  # training will say so
        return
    if not _is_regularised(points, clean, *trained):
        warn(
            f"The code has {code} entries, the data have {data}: an autoencoder can learn the "
            "identity, and nothing here keeps it from that. A smaller latent_dim, a sparse or "
            "normal prior, a corruption, or a penalty would."
        )


def _is_regularised(points: list[str], clean: Trace, guide: Trace, model: Trace) -> bool:
    """Whether codes are few, sites penalised, or codes other ones in training.

    These come of corrupted data, dropout, or a norm over the batch.

    Arguments:
        points: Names of the codes.
        clean: The guide's trace in evaluation mode.
        guide: Its trace in training mode.
        model: The model's.
    """
    if any(hasattr(clean.nodes[name]["fn"], "quantised") for name in points):
        return True
    sites = [s for trace in (guide, model) for s in trace.nodes.values() if s["type"] == "sample"]
    values = [(guide.nodes[name]["value"], clean.nodes[name]["value"]) for name in points]
    return any(map(is_penalty, sites)) or not all(torch.equal(*pair) for pair in values)


def check_pair(structure: Structure, objective: PyroELBO) -> None:
    """Refuses a pair with nothing to train, or that the objective isn't for."""
    if not structure.parameters:
        fixes = ["pyro.param or pyro.module in a function", "nn.Parameter in a module"]
        raise PairError("pair", "at least one trainable parameter", "none", fixes)
    places = sorted({str(p.device) for p in structure.parameters.values()})
    if len(places) > 1:
        raise PairError("pair", "parameters on one device", oxford(places), [ON_ONE_DEVICE])
    buffers = (b for module in structure.modules for b in module.buffers(recurse=False))
    if any(tensor.is_inference() for tensor in (*structure.parameters.values(), *buffers)):
        fixes = ["the pair made outside of torch.inference_mode()"]
        actual = "some that were made in torch.inference_mode()"
        raise PairError("pair", "parameters that can be trained", actual, fixes)
    plate = getattr(objective, "plate", None)
    if plate is not None and plate not in structure.plates:
        fixes = [f"pvae.fit(pvae.Pair(model, guide, plate='{plate}'), ...)"]
        expected = f"the pair's data plate, '{structure.plate}'"
        raise ArgumentError("objective", expected, f"plate='{plate}'", fixes)
    if isinstance(objective, Objective):
        objective.check(structure)
    else:
        check_of_pyro(objective, structure)
