"""One traced batch of a pair, to find out what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pvae.devices import double
from pvae.distributions import is_improper, log_density_of_delta
from pvae.errors import PvaeError, telling_memory, warn
from pvae.pair.checks import (
    check_apart,
    check_densities,
    check_locality,
    check_sites,
    check_with_pyro,
)
from pvae.pair.masks import PENDING, RERUNS, check_imputed, masked_apart
from pvae.pair.messages import infer_of, is_factor, is_penalty, plate_scale
from pvae.pair.parameters import Parameters
from pvae.pair.plates import DataPlate, PlateName, Sites
from pvae.pair.rows import find_rows
from pvae.pair.running import (
    Batch,
    first_floating,
    flatten,
    probing,
    put_back,
    run_pair,
    tensors_of,
)
from pvae.pair.structure import Structure
from pvae.pair.uses import Uses
from pvae.types import Program, Site

__all__ = ["inspect_pair"]


def inspect_pair(
    model: Program,
    guide: Program,
    batch: Batch,
    plate: PlateName = None,
    densities: tuple[str, ...] = (),
) -> Structure:
    """Traces one batch of a pair, in evaluation mode and on copies of the generators.

    As `Pair.inspect`, which remembers what is found.
    """
    stored = dict(pyro.get_param_store().named_parameters())
    length = next((len(b) for b in batch if isinstance(b, Tensor) and b.dim()), 1)
    look = telling_memory("a look at the pair", length, option=None)
    with look, probing((model, guide)) as networks:
        with Uses(batch) as uses:
            guide_trace, model_trace = run_pair(model, guide, batch)
        networks.note_first_run()
        with put_back((model, guide)):
            again = [run_pair(model, guide, batch, model_too=False)[0] for _ in range(RERUNS)]
            sites = Sites(model_trace, guide_trace, batch, plate, densities)
            axes, fewer = find_rows(sites, batch, lambda other: run_pair(model, guide, other)[1])
        with put_back((model, guide)):
            programs = {"model": model, "guide": guide}
            traces = {"model": model_trace, "guide": guide_trace}
            parameters = Parameters(
                programs, networks, traces, stored, lambda: run_pair(model, guide, batch)
            )
            uses.take_in(guide_trace, model_trace)
            if uses.unused(batch):  # are they of training alone, or indices of a plate?
                with networks.in_training(), suppress(PvaeError), uses:
                    uses.take_in(*run_pair(model, guide, batch))
                with suppress(Exception), uses:
                    uses.take_in(poutine.trace(model).get_trace(*batch))
            check_sites(sites)
            check_densities(sites, densities)
            check_with_pyro(model_trace, guide_trace)
            check_locality(sites, fewer)
            check_apart(sites, lambda: run_pair(model, guide, batch))

            def replayed(other: Trace) -> Trace:
                return poutine.trace(poutine.replay(model, trace=other)).get_trace(*batch)

            apart, pending = masked_apart(sites, guide_trace, again, replayed)
            unknown = check_imputed(sites, guide_trace, model_trace, replayed)
    return Structure(
        model=model,
        guide=guide,
        **_rows(sites, fewer),
        axes=axes,
        **_latents(sites, again),
        observed=_where(sites.in_model.values(), _is_data),
        factors=_where(sites.in_model.values(), lambda s: is_factor(s) and not is_penalty(s)),
        auxiliary=_where(sites.guided.values(), lambda s: s["name"] not in sites.in_model),
        not_reparametrised=_where(sites.guided.values(), lambda s: not s["fn"].has_rsample),
        global_sites=sites.outside(sites.with_density),
        removed_scales=_removed_scales(s for s in sites.all if s["name"] not in sites.training),
        densities=densities,
        training_terms=sites.training,
        masked_apart=apart,
        imputed=tuple(sites.imputed),
        shapes={name: tuple(sites.guided[name]["fn"].event_shape) for name in sites.latents},
        parameters=parameters.by_name,
        sides=parameters.sides,
        modules=parameters.modules,
        **_place(parameters, batch),
        categories=tuple(sorted(uses.categories)),
        oddities=(*parameters.oddities, *uses.unused(batch)),
        notes={PENDING: (*pending, *unknown)},
    )


def _place(parameters: Parameters, batch: Batch) -> dict[str, Any]:
    """A tensor of the pair's, and where it has run, as `Structure` has them."""
    tensors = (*parameters.by_name.values(), *tensors_of(parameters.modules), *batch)
    anchor, leaves = first_floating(tensors), list[object]()
    flatten(batch, leaves)
    devices = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
    there = next((d for d in devices if d.type != "cpu"), [*devices, anchor.device][0])
    return {"anchor": anchor, "device": there}


def _rows(sites: Sites, fewer: Trace | None) -> dict[str, Any]:
    """What counts the data, as `Structure` has it; without a plate, a row of all of them."""
    plate = sites.data_plate or DataPlate("dataset", frozenset(), -sites.nesting, 1, 1, 1)
    return {
        "plate": plate.name,
        "plates": plate.plates,
        "dim": plate.dim,
        "nesting": sites.nesting,
        "subsample_size": None if plate.size == plate.rows else plate.size,
        "full_size": plate.full_size,
        "is_scaled": plate.full_size != plate.size,
        "tied_to": plate.rows if plate.rows > 1 and fewer is None else None,
    }


def _latents(sites: Sites, again: list[Trace]) -> dict[str, Any]:
    """Names of latents by their kind, as `Structure` has them."""
    drawn = [s for s in sites.in_model.values() if not s["is_observed"]]
    fed = _where(sites.guided.values(), lambda s: log_density_of_delta(s["fn"]) is not None)
    outside = sites.outside(sites.latents)
    return {
        "latents": tuple(name for name in sites.latents if name not in outside),
        "global_latents": outside,
        "points": frozenset(name for name in sites.latents if _is_point(name, sites, again)),
        "improper": _where(drawn, lambda s: is_improper(s["fn"])),
        "enumerated": tuple(sites.unguided),
        "guide_states": _listed(sites),
        "fed": tuple(name for name in sites.latents if name in fed and name not in outside),
    }


def _where(sites: Iterable[Site], holds: Callable[[Site], bool]) -> tuple[str, ...]:
    return tuple(site["name"] for site in sites if holds(site))


def _listed(sites: Sites) -> tuple[str, ...]:
    """Guide sites that are marked to be enumerated; none, if there is one that can't be."""
    marked = _where(sites.guided.values(), lambda s: infer_of(s).get("enumerate") == "parallel")
    for name in marked:
        site = sites.guided[name]
        if not site["fn"].has_enumerate_support or infer_of(site).get("num_samples") is not None:
            warn(
                f"Site '{name}' of the guide asks to be enumerated, and is drawn: Pyro lists no "
                f"states of it. Its axes in plates, in place of .to_event(k), can be enumerated."
            )
            return ()
    return marked


def _is_data(site: Site) -> bool:
    return site["is_observed"] and not is_factor(site)


def _is_point(name: str, sites: Sites, again: list[Trace]) -> bool:
    """A Delta is a point if its density is 1 and nothing random feeds it."""
    log_density = log_density_of_delta(sites.guided[name]["fn"])
    if log_density is None or bool((log_density != 0).any()):
        return False
    for other, site in sites.guided.items():  # draws of a few values may repeat by chance
        if other not in sites.in_model and not getattr(site["fn"], "has_rsample", True):
            return False
    value = sites.guided[name]["value"]
    return all(torch.equal(value, trace.nodes[name]["value"]) for trace in again)


def _removed_scales(sites: Iterable[Site]) -> dict[str, float]:
    """Factors that no plate explains."""
    removed = {}
    for site in sites:
        scale = site["scale"] / plate_scale(site)
        if isinstance(scale, Tensor) or abs(scale - 1.0) > 1e-9:
            removed[site["name"]] = float(double(torch.as_tensor(scale)).mean())
    return removed
