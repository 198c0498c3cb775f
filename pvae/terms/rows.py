"""Parameters that belong to single rows, and data whose rows they aren't."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro import poutine
from torch import Tensor

from pvae.data import Source, first_batch
from pvae.errors import PairError, PvaeError
from pvae.modes import evaluating
from pvae.pair import Batch, Structure, is_inside, probing
from pvae.terms.passes import compute
from pvae.terms.result import Terms

__all__ = ["check_own_rows", "has_own_rows"]


def has_own_rows(structure: Structure, batch: Batch) -> bool:
    """Whether parameters belong to places in the batch, as an autoguide's for each datum do.

    That shows when the rows of a batch are turned round: with rows' own draws, the first row then
    has another gradient as the last one. Networks of a row, and parameters that are looked up by
    an index in the batch, follow the rows. Of one that runs on any number of rows, and draws beside
    its sites, it can't be told. Found out once.
    """
    is_one = structure.num_rows_of(batch) < 2
    if structure.subsample_size is not None or not structure.parameters or is_one:
        return False
    if "has_own_rows" not in structure.notes:
        try:
            structure.notes["has_own_rows"] = _moves(structure, batch)
        except PvaeError:  # what the pair refuses, it refuses elsewhere
            return False
    return bool(structure.notes["has_own_rows"])


def _moves(structure: Structure, batch: Batch) -> bool:
    programs = structure.model, structure.guide
    with probing(programs), evaluating(structure.modules), torch.enable_grad():
        terms = compute(structure, batch, detach=True)
        draws, turned_draws = _draws(structure, terms), _draws(structure, terms, turned=True)
        again = compute(structure, batch, detach=True, given=draws)
        turned = compute(structure, _turned(structure, batch), detach=True, given=turned_draws)
        ours = _gradients(terms, 0)
        is_told = structure.tied_to is not None or _are_same(ours, _gradients(again, 0))
        return is_told and not _are_same(ours, _gradients(turned, -1))


def _are_same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether gradients are the same up to rounding, which is that of the largest ones."""
    largest = max((float(a.abs().max()) for a in ours if a.numel()), default=0.0)
    for a, b in zip(ours, theirs, strict=True):
        if a.numel() and float((a - b).abs().max()) > 1e-2 * float(a.abs().max()) + 1e-5 * largest:
            return False
    return True


def _turned(structure: Structure, batch: Batch) -> Batch:
    pairs = zip(batch, structure.axes, strict=True)
    return tuple(part if axis is None else part.flip(axis) for part, axis in pairs)


def _draws(structure: Structure, terms: Terms, *, turned: bool = False) -> Mapping[str, Tensor]:
    """What the guide drew; the rows of its local sites turned round, if asked for."""
    draws = {}
    for name, site in terms.guide_trace.nodes.items():
        if name in terms.sites and site["type"] == "sample" and not site["is_observed"]:
            value, event_dim = site["value"].detach(), len(site["fn"].event_shape)
            axis = value.dim() - event_dim + structure.dim
            draws[name] = value.flip(axis) if turned and is_inside(structure, site) else value
    return draws


def _gradients(terms: Terms, row: int) -> list[Tensor]:
    """Gradients of a row's terms, by parameter."""
    sites = [s for s in terms.sites.values() if s.is_local and s.kind != "penalty"]
    parts = [p[0, row] for s in sites for p in (s.log_p, s.log_q) if p is not None]
    parameters = [*terms.structure.parameters.values()]
    total = torch.stack(parts).sum()
    if not total.requires_grad:
        return []
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in pairs]


def check_own_rows(structure: Structure, source: Source) -> None:
    """Refuses other rows than those that parameters belong to, where that can be told.

    Raises:
        PairError: If there are more or fewer rows, or ``pyro.plate(..., subsample=index)`` has an
            index in the data that parameters for each row don't follow.
    """
    place = _index_place(structure, first_batch(source, structure.tied_to or 64))
    if place is None and structure.tied_to is None:
        return
    batch = first_batch(source, structure.tied_to or source.num_rows)
    if not has_own_rows(structure, batch):
        return
    if source.num_rows != (structure.tied_to or source.num_rows):
        expected = f"the {structure.tied_to} rows that the pair's parameters belong to, one each"
        fixes = ["an amortised guide, such as guides.MeanField(network, latent_dim)"]
        raise PairError("data", expected, f"{source.num_rows} rows", fixes)
    if place is not None:
        _check_index(structure, source, place)


def _check_index(structure: Structure, source: Source, place: int) -> None:
    plate, total = structure.plate, structure.full_size
    index = torch.cat([batch[place] for _, batch in source.all()])
    if len(index) == total and torch.equal(index.cpu(), torch.arange(total)):
        return
    rows = f"rows {index[:3].tolist()}, ... of {total}"
    fixes = ["order = index.argsort(), and every array as array[order]"]
    if len(index) < total:
        by_index = f"lambda *batch: pyro.plate('{plate}', {total}, dim={structure.dim}, "
        fixes = [f"AutoNormal(model, create_plates={by_index}subsample=batch[{place}]))"]
    expected = f"all {total} rows in their order: the guide has parameters for each row, which "
    expected += f"don't follow pyro.plate('{plate}', {total}, subsample=...)"
    raise PairError(f"data[{place}]", expected, rows, fixes)


def _index_place(structure: Structure, batch: Batch) -> int | None:
    """Which entry of the batch the data plate's ``subsample=`` is; None if it has none there."""
    if not any(_is_index(part) for part in batch):
        return None
    try:
        with probing((structure.model, structure.guide)):
            nodes = poutine.trace(structure.model).get_trace(*batch).nodes
    except Exception:  # a model that needs its guide's draws
        return None
    for name in structure.plates & nodes.keys():
        index = nodes[name]["value"]
        for place, part in enumerate(batch):
            if part is index and _is_index(part):
                return place
    return None


def _is_index(part: object) -> bool:
    return isinstance(part, Tensor) and part.dim() == 1 and part.dtype in (torch.int32, torch.int64)
