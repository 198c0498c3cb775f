"""Latents that model and guide mask differently: taken out of both where that is right.

So are the values that ``obs_mask=`` says are missing, where the guide leaves them to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent

from pvae import randomness
from pvae.distributions import log_density_of_delta, masks_of
from pvae.errors import PairError
from pvae.modes import is_capturing_graph
from pvae.pair.messages import log_prob_of, mask_of, masks_at, sample_sites
from pvae.pair.plates import PlateName, Sites
from pvae.pair.running import Batch, probing, run_pair
from pvae.pair.structure import Structure
from pvae.types import Dist, Site

__all__ = ["OtherMasksError", "align_masks", "check_imputed", "look_at_masks", "masked_apart"]

PENDING = "masks_pending"
"""Key in the notes of a structure: latents of which nothing has been left out yet, so that it isn't
known whether what is left out is read."""

RERUNS, RERUNS_OF_DISCRETE = 3, 20  # other draws, of which discrete ones repeat

Mask = Tensor | bool
_FIXES = [
    "poutine.mask(mask=...) around the latent in model and guide alike",
    "poutine.mask(mask=...) around the observed site alone",
]


class OtherMasksError(PairError):
    """Masks that differ in another way than in the batch that a pair was looked at by."""


def masked_apart(
    sites: Sites, guide: Trace, again: Sequence[Trace], run: Callable[[Trace], Trace]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of latents whose masks differ in model and guide; refuses those that can't be left out.

    Where a mask leaves an entry out on one side, the density on the other integrates to 1 by
    itself if nothing else reads the entry, and can be taken out, too. Whether something reads it
    is found out by other draws of it, under which no other density may change.

    Arguments:
        sites: The pair's sites.
        guide: The guide's trace.
        again: Others, with draws of their own.
        run: Replays the model against a trace of the guide.

    Returns:
        All of them, and those of which this batch leaves nothing out.

    Raises:
        PairError: If some other density changes, q has no density of the entry by itself, or the
            latent is outside the data plate.
    """
    differ = {name: _differ(sites.in_model[name], sites.guided[name]) for name in sites.latents}
    entries = {name: where for name, where in differ.items() if where is not None}
    outside = sites.outside(entries)
    pending = tuple(name for name, where in entries.items() if not bool(where.any()))
    for name in entries.keys() - {*pending}:
        _check_unread(name, entries[name], guide, again, run, is_outside=name in outside)
    if entries:
        align_masks(entries, guide.copy(), run(guide))
    return tuple(entries), pending


def _differ(p: Site, q: Site) -> Tensor | None:
    """The entries that one side alone leaves out; None if the masks are the same."""
    of_model, of_guide = mask_of(p), mask_of(q)
    if of_model is None and of_guide is None:
        return None
    if of_model is None or of_guide is None:
        given = of_guide if of_model is None else of_model
        assert given is not None  # noqa: S101
        return ~given
    return None if torch.equal(of_model, of_guide) else of_model ^ of_guide


def check_imputed(
    sites: Sites, guide: Trace, model: Trace, run: Callable[[Trace], Trace]
) -> tuple[str, ...]:
    """Refuses missing values that the guide leaves to the model where something else reads them.

    Where nothing does, their density integrates to 1 by itself, and is no part of the evidence.

    Arguments:
        sites: The pair's sites.
        guide: The guide's trace.
        model: The model's.
        run: Replays the model against a trace of the guide.

    Returns:
        Names of those of which this batch has none, so that it can't be told.
    """
    pending = []
    for name in sites.imputed:
        missing = mask_of(model.nodes[name])
        if missing is None or not bool(missing.any()):
            pending.append(name)
            continue
        fn = model.nodes[name]["fn"]
        count = RERUNS if fn.has_rsample else RERUNS_OF_DISCRETE
        site = model.nodes[name]
        values = [torch.where(missing, fn.sample(), site["value"]) for _ in range(count)]
        reader = _reader_of(name, site, values, guide, run)
        if reader is not None:
            raise PairError(
                f"site '{name}'",
                "a site of that name in the guide, as missing values are read",
                f"site '{reader}', whose density changes with them",
                [f"pyro.sample('{name}', ...) in the guide", "an autoguide, which has it"],
            )
    return tuple(pending)


def look_at_masks(
    structure: Structure, batch: Batch, guide: Trace, model: Trace
) -> dict[str, Tensor]:
    """Looks, in each pass, at masks of which the batches before haven't told all.

    Arguments:
        structure: The pair.
        batch: What this pass was called with.
        guide: The guide's trace.
        model: The model's.

    Returns:
        Where a pass mustn't wait for the device: whether masks of both programs differ, by latent.

    Raises:
        PairError: If a latent's masks are alike in the batch that was looked at, and aren't in this
            one, in which one program may have none; or what this batch is the first to leave out
            is read.
    """
    unlike = {}
    for name in (*structure.latents, *structure.global_latents):
        if name in structure.masked_apart or name not in model.nodes or name not in guide.nodes:
            continue
        p, q = masks_at(model.nodes[name]), masks_at(guide.nodes[name])
        if bool(p) != bool(q):
            where, expected = f"latent '{name}'", "a mask in each batch, or in none"
            fixes = [_FIXES[0], "torch.ones_like(mask), where nothing is to be left out"]
            actual = "one in one program alone, that the batch looked at before hadn't"
            raise OtherMasksError(where, expected, actual, fixes)
        if [(id(mask), dims) for mask, dims in p] != [(id(mask), dims) for mask, dims in q]:
            unlike[name] = _are_unlike(model.nodes[name], guide.nodes[name])
    is_on_host = structure.device.type == "cpu"
    if not is_capturing_graph() and (is_on_host or not torch.is_grad_enabled()):
        for name in (name for name, flag in unlike.items() if bool(flag)):
            expected = "one mask in model and guide, as in the batch looked at before"
            raise OtherMasksError(f"latent '{name}'", expected, "masks that differ", _FIXES[:1])
        unlike = {}
    pending = structure.notes.get(PENDING, ())
    if pending and is_capturing_graph():
        expected = "a batch in which its mask leaves something out, before steps are compiled"
        raise PairError(f"site '{pending[0]}'", expected, "none yet")
    if any(_leaves_out(name, guide, model) for name in pending):
        structure.notes[PENDING] = _look_again(structure, batch, pending)
    return unlike


def _are_unlike(p: Site, q: Site) -> Tensor:
    """Whether two sites that both have masks leave out different entries."""
    of_model, of_guide = mask_of(p), mask_of(q)
    assert of_model is not None and of_guide is not None  # noqa: S101, PT018
    return (of_model ^ of_guide).any()


def _leaves_out(name: str, guide: Trace, model: Trace) -> bool:
    """Whether one program alone leaves something of a latent out; or whether values are missing."""
    p = model.nodes[name]
    where = _differ(p, guide.nodes[name]) if name in guide.nodes else mask_of(p)
    return where is not None and bool(where.any())


def _look_again(structure: Structure, batch: Batch, pending: Iterable[str]) -> tuple[str, ...]:
    """What can't be told by this batch either."""
    programs = structure.model, structure.guide
    with probing(programs):
        guide, model = run_pair(*programs, batch)
        again = [run_pair(*programs, batch, model_too=False)[0] for _ in range(RERUNS)]
        named: PlateName = structure.plate if structure.has_plate else False
        sites = Sites(model, guide, batch, named, structure.densities)

        def run(other: Trace) -> Trace:
            return poutine.trace(poutine.replay(structure.model, trace=other)).get_trace(*batch)

        _, apart = masked_apart(sites, guide, again, run)
        left = {*apart, *check_imputed(sites, guide, model, run)}
    return tuple(name for name in pending if name in left)


def _check_unread(
    name: str,
    entries: Tensor,
    guide: Trace,
    again: Iterable[Trace],
    run: Callable[[Trace], Trace],
    *,
    is_outside: bool,
) -> None:
    if is_outside:
        expected = "one mask in model and guide alike, outside the data plate"
        raise PairError(f"latent '{name}'", expected, "masks that differ", _FIXES)
    site = guide.nodes[name]
    others = [torch.where(entries, o.nodes[name]["value"], site["value"]) for o in again]
    reader = _reader_of(name, site, others, guide, run)
    if reader is not None:
        expected = "one mask in model and guide: entries that one of them leaves out are read"
        actual = f"site '{reader}', whose density changes with them"
        raise PairError(f"latent '{name}'", expected, actual, _FIXES)


def _reader_of(
    name: str,
    site: Site,
    others: Iterable[Tensor],
    guide: Trace,
    run: Callable[[Trace], Trace],
) -> str | None:
    """The first other site of the model whose density is another under other values of a site."""
    before, found = randomness.get_state(), []
    for value in (site["value"], *others):
        other = guide.copy()
        other.nodes[name] = {**site, "value": value}
        with randomness.forked():
            randomness.set_state(before)
            found.append(_densities(run(other), name))
    for reader, first in found[0].items():
        if any(not torch.equal(first, one[reader]) for one in found[1:]):
            return reader
    return None


def _densities(trace: Trace, name: str) -> dict[str, Tensor]:
    """What each other site of the model scores where it isn't masked out."""
    found = {}
    for site in sample_sites(trace):
        if site["name"] == name:
            continue
        density, mask = log_prob_of(site), site["mask"]
        if mask is not None and mask is not True:
            keep = torch.as_tensor(mask, device=density.device).bool()
            density = torch.where(keep, density, torch.zeros_like(density))
        found[site["name"]] = density
    return found


def align_masks(names: Iterable[str], guide: Trace, model: Trace) -> None:
    """Leaves out, in both traces, each entry of the latents that one of them leaves out."""
    for name in names:
        q, p = guide.nodes[name], model.nodes[name]
        parts = [q]
        drawn = (s["name"] for s in sample_sites(guide) if not s["is_observed"])
        auxiliary = [name for name in drawn if name not in model.nodes]
        if log_density_of_delta(q["fn"]) is not None and auxiliary:  # set to another site's draw
            parts = [q, _source_of(name, guide)]
        _join(p, parts)


def _source_of(name: str, guide: Trace) -> Site:
    """The site at which an autoguide draws a latent by itself."""
    source = f"{name}_unconstrained"
    if source not in guide.nodes:
        expected = "a guide that draws it by itself, as its entries are masked in one program alone"
        fixes = ["AutoNormal", *_FIXES]
        raise PairError(
            f"latent '{name}'", expected, "one that draws it jointly with others", fixes
        )
    site: Site = guide.nodes[source]
    return site


def _join(p: Site, parts: list[Site]) -> None:
    """Gives all of the sites each other's masks."""
    batch: list[Mask] = []
    inner: list[tuple[Mask, int]] = []
    event_dim = len(p["fn"].event_shape)
    for site in (p, parts[0]):
        batch += [site["mask"]] if isinstance(site["mask"], (Tensor, bool)) else []
        for mask, dims in masks_of(site["fn"]):
            (batch.append(mask) if dims == event_dim else inner.append((mask, dims)))
    joint = _all(batch)
    for site in (p, *parts):
        site["mask"] = joint  # type: ignore[index]
        for mask, dims in inner:
            site["fn"] = _masked(site, site["fn"], mask, dims)  # type: ignore[index]


def _all(masks: list[Mask]) -> Mask | None:
    tensors = [mask for mask in masks if isinstance(mask, Tensor)]
    if False in [mask for mask in masks if isinstance(mask, bool)]:
        return False
    joint: Tensor | None = None
    for mask in tensors:
        joint = mask.bool() if joint is None else joint & mask.bool()
    return joint


def _masked(site: Site, fn: Dist, mask: Mask, dims: int) -> Dist:
    """A distribution whose entries, of so many event dimensions, are masked out."""
    if len(fn.event_shape) == dims:
        return fn.mask(mask)
    if isinstance(fn, Independent):
        return _masked(site, fn.base_dist, mask, dims).to_event(fn.reinterpreted_batch_ndims)
    density = log_density_of_delta(fn)
    if density is not None and not bool((density != 0).any()):
        return fn  # it adds nothing
    expected = "independent dimensions, made with .to_event(k), to mask some of them"
    raise PairError(f"latent '{site['name']}'", expected, type(fn).__name__, _FIXES)
