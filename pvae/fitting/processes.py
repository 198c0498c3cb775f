"""Several processes that train together: what they agree on first, and what they can't train."""

from __future__ import annotations

from contextlib import suppress
from typing import NoReturn

import torch
from pyro.infer import ELBO as PyroELBO
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pvae import distributed
from pvae.data import LoaderSource, Source, first_batch
from pvae.distributed import World
from pvae.errors import ArgumentError, PairError, PvaeError, oxford, warn
from pvae.fitting.checks import trying
from pvae.fitting.identity import differences
from pvae.fitting.training import Training
from pvae.internals import BatchNorm
from pvae.objectives import Objective
from pvae.pair import Structure
from pvae.terms import Terms, compute

__all__ = ["agree", "check_parts", "warn_if_apart"]

_ALONE = "one process"
_APART = "data that don't meet in a batch"


def warn_if_apart(world: World) -> None:
    """Warns of processes that ``torchrun`` has started, and that don't know of each other."""
    if world.size == 1 and distributed.is_started_by_torchrun():
        warn(
            "torchrun has started several processes, but each trains by itself. To train "
            "together: with pvae.distributed.joined(): pvae.fit(...)",
        )


def agree(world: World, training: Training) -> None:
    """Refuses processes that train different things; gives all the first one's tensors.

    Raises:
        ArgumentError: Naming what differs: a setting, the data, a parameter's shape.
    """
    first, tensors = training.record.first, training.tensors
    parts = {name: e for name, e in first.entries.items() if name not in first.restored}
    shapes = {name: f"{tuple(x.shape)} {x.dtype}" for name, x in tensors.items()}
    mine = {**training.identity, **parts, **shapes}
    for rank, theirs in enumerate(world.gather(mine)):
        for what, there, here in differences(theirs, mine):
            where, expected = f"process {world.rank}", f"the same as in process {rank}: {what} "
            fixes = ["the same call, with the same data, in every process"]
            raise ArgumentError(where, expected + there, f"{what} {here}", fixes)
    world.copy_from_first(tensors.values())


def check_parts(
    world: World, objective: PyroELBO, structure: Structure, source: Source, batch_size: int
) -> None:
    """Refuses what isn't the same computed in parts: what couples data, what learns by itself.

    Whether a datum's terms depend on other data is tried on one batch, too, by gradients. Where
    there are none, as of discrete data or draws, a coupling that nothing declares isn't noticed.
    """
    if world.size == 1:
        return
    if isinstance(source, LoaderSource):
        _refuse("data", "rows by index", "a DataLoader", ["pass loader.dataset"])
    if structure.subsample_size is not None:
        _refuse("pair", "a pair that takes its batch as it is", "one that subsamples by itself")
    if structure.tied_to is not None:
        _refuse("pair", "a pair that runs on any rows", f"one that needs all {structure.tied_to}")
    if batch_size < world.size:
        expected = f"at least a row for each of {world.size} processes"
        fixes = ["it counts the rows of all processes together"]
        raise ArgumentError("batch_size", expected, str(batch_size), fixes)
    _check_objective(objective, structure)
    for module in structure.modules:
        is_norm = isinstance(module, BatchNorm)
        if is_norm or getattr(module, "couples_data", False):
            instead = ["nn.LayerNorm or nn.GroupNorm", _ALONE] if is_norm else [_ALONE]
            _refuse("pair", _APART, type(module).__name__, instead)
    rows = max(world.shares(batch_size))
    _check_pair(structure, first_batch(source, max(rows, 2)))


def _refuse(where: str, expected: str, actual: str, fixes: list[str] | None = None) -> NoReturn:
    raise PairError(where, f"{expected}, for several processes", actual, fixes or [_ALONE])


def _check_objective(objective: PyroELBO, structure: Structure) -> None:
    if isinstance(objective, Objective):
        if objective.couples_data:
            _refuse("objective", "a loss that is a mean over data", f"{objective}, which isn't")
        if objective.make_state(structure, 1, 1, 1).tensors():
            _refuse("objective", "one that learns nothing by itself", f"{objective}, which does")
    elif type(objective) not in (TraceMeanField_ELBO, TraceEnum_ELBO):
        known = ["TraceMeanField_ELBO or TraceEnum_ELBO", _ALONE]
        _refuse("objective", "an objective of pvae's", type(objective).__name__, known)


def _check_pair(structure: Structure, batch: tuple[Tensor, ...]) -> None:
    """Tries a batch in training mode: sites, buffers that move, terms that need other data."""
    buffers = [
        (f"{type(module).__name__}.{name}", buffer, buffer.clone())
        for module in structure.modules
        for name, buffer in module.named_buffers(recurse=False)
    ]
    with trying(structure), torch.enable_grad():
        terms = compute(structure, batch)
        moved = [name for name, buffer, copy in buffers if not torch.equal(buffer, copy)]
    _check_sites(structure, terms)
    if moved:
        expected = "no buffers that training moves: each process would have its own"
        raise PairError("pair", expected, oxford(moved[:3]), [_ALONE])
    if _meets(structure, batch):
        _refuse("pair", _APART, "terms of the first row that change with other rows")


def _check_sites(structure: Structure, terms: Terms) -> None:
    for name, site in terms.sites.items():
        if not site.is_local and not structure.is_scaled:
            _refuse(
                f"site '{name}'",
                "a data plate that knows the full size",
                f"a site outside of one that doesn't, '{structure.plate}': it would count once in "
                "each process",
                ["pyro.plate(name, N, subsample_size=len(x))", _ALONE],
            )
        if any(getattr(fn, "couples_data", False) for fn in (site.model, site.guide)):
            what = "a density that all rows of the batch share"
            _refuse(f"site '{name}'", "a density of each datum alone", what)


def _meets(structure: Structure, batch: tuple[Tensor, ...]) -> bool:
    """Whether the terms of the first datum have a gradient of other data."""
    leaves = [x.detach().clone() for x in batch]
    axes = zip(leaves, structure.axes, strict=True)
    rows = [
        (x.requires_grad_(), axis) for x, axis in axes if x.is_floating_point() and axis is not None
    ]
    gradients: tuple[Tensor | None, ...] = ()
    with trying(structure), torch.enable_grad(), suppress(PvaeError, RuntimeError):
        terms = compute(structure, tuple(x.clone() for x in leaves))  # a pair may write into them
        beside = (*terms.penalties.values(), *terms.training.values())
        parts = [terms.log_weight, *(part for part in beside if part.dim() == 2)]
        first = torch.stack([part[:, 0].sum() for part in parts]).sum()
        gradients = torch.autograd.grad(first, [x for x, _ in rows], allow_unused=True)
    found = zip(gradients, rows, strict=False)  # none where it doesn't run
    others = [g.movedim(axis, 0)[1:] for g, (_, axis) in found if g is not None]
    return any(bool((g.abs() > 0).any()) for g in others)
