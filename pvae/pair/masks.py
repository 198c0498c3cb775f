"""Latents that model and guide mask differently: taken out of both where that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent

from pvae import randomness
from pvae.distributions import log_density_of_delta, masks_of
from pvae.errors import PairError
from pvae.pair.messages import log_prob_of, mask_of, sample_sites
from pvae.pair.plates import Sites
from pvae.types import Dist, Site

__all__ = ["align_masks", "masked_apart"]

Mask = Tensor | bool
_FIXES = [
    "poutine.mask(mask=...) around the latent in model and guide alike",
    "poutine.mask(mask=...) around the observed site alone",
]


def masked_apart(
    sites: Sites, guide: Trace, again: Iterable[Trace], run: Callable[[Trace], Trace]
) -> tuple[str, ...]:
    """Names of latents whose masks differ in model and guide; refuses those that can't be left out.

    Where a mask leaves an entry out on one side, the density on the other integrates to 1 by
    itself if nothing else reads the entry, and can be taken out, too. Whether something reads it
    is found out by other draws of it, under which no other density may change.

    Arguments:
        sites: The pair's sites.
        guide: The guide's trace.
        again: Others, with draws of their own.
        run: Replays the model against a trace of the guide.

    Raises:
        PairError: If some other density changes, q has no density of the entry by itself, or the
            latent is outside the data plate.
    """
    differ = {name: _differ(sites, name) for name in sites.latents}
    entries = {name: where for name, where in differ.items() if where is not None}
    names, outside = tuple(entries), sites.outside(entries)
    for name in names:
        if name in outside:
            expected = "one mask in model and guide alike, outside the data plate"
            raise PairError(f"latent '{name}'", expected, "masks that differ", _FIXES)
        _check_unread(name, entries[name], guide, again, run)
    if names:
        align_masks(names, guide.copy(), run(guide))
    return names


def _differ(sites: Sites, name: str) -> Tensor | None:
    """The entries that one side alone leaves out; None if the masks are the same."""
    of_model, of_guide = mask_of(sites.in_model[name]), mask_of(sites.guided[name])
    if of_model is None and of_guide is None:
        return None
    if of_model is None or of_guide is None:
        given = of_guide if of_model is None else of_model
        assert given is not None  # noqa: S101
        return ~given
    return None if torch.equal(of_model, of_guide) else of_model ^ of_guide


def _check_unread(
    name: str,
    entries: Tensor,
    guide: Trace,
    again: Iterable[Trace],
    run: Callable[[Trace], Trace],
) -> None:
    before, found = randomness.get_state(), []
    for trace in (guide, *again):
        other, own = guide.copy(), guide.nodes[name]["value"]
        value = torch.where(entries, trace.nodes[name]["value"], own)
        other.nodes[name] = {**guide.nodes[name], "value": value}
        with randomness.forked():
            randomness.set_state(before)
            found.append(_densities(run(other), name))
    for other_site, first in found[0].items():
        if any(not torch.equal(first, one[other_site]) for one in found[1:]):
            expected = "one mask in model and guide: entries that one of them leaves out are read"
            actual = f"site '{other_site}', whose density changes with them"
            raise PairError(f"latent '{name}'", expected, actual, _FIXES)


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
