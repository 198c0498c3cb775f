"""One traced batch of a pair, to find out what it is made of."""

from __future__ import annotations

from collections.abc import Iterable

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor

from pvae.distributions import is_improper, log_density_of_delta
from pvae.errors import PvaeError
from pvae.pair.checks import check_locality, check_sites, check_with_pyro
from pvae.pair.messages import extra_scale, is_factor, is_inside, is_penalty, sample_sites
from pvae.pair.modules import first_floating, probing, tensors_of
from pvae.pair.parameters import Parameters
from pvae.pair.plates import find_data_plate
from pvae.pair.running import Batch, num_rows_of, run_pair
from pvae.pair.structure import Structure
from pvae.types import Program, Site

__all__ = ["inspect_pair"]

RERUNS = 3


def inspect_pair(
    model: Program, guide: Program, batch: Batch, plate: str | None = None
) -> Structure:
    """Traces one batch of a pair, in evaluation mode and on copies of the generators.

    As `Pair.inspect`, which remembers what is found.
    """
    rows = num_rows_of(batch)
    stored = dict(pyro.get_param_store().named_parameters())
    with probing((model, guide)) as networks:
        guide_trace, model_trace = run_pair(model, guide, batch)
        again = [run_pair(model, guide, batch, model_too=False)[0] for _ in range(RERUNS)]
        fewer = None if rows is None or rows < 2 else _with_rows(model, guide, batch, rows - 1)
        programs = {"model": model, "guide": guide}
        traces = {"model": model_trace, "guide": guide_trace}
        parameters = Parameters(
            programs, networks, traces, stored, lambda: run_pair(model, guide, batch)
        )
    of_model, of_guide = sample_sites(model_trace), sample_sites(guide_trace)
    data_plate = find_data_plate(of_model, of_guide, rows, plate)
    guided = {s["name"]: s for s in of_guide if not s["is_observed"]}
    in_model = {s["name"]: s for s in of_model}
    check_sites(of_guide, in_model, data_plate)
    check_with_pyro(model_trace, guide_trace)
    check_locality(guided, in_model, data_plate, rows, fewer)
    sites = [*of_guide, *of_model]
    drawn = [s for s in of_model if not s["is_observed"]]
    latents = [s["name"] for s in drawn if s["name"] in guided]
    inside = {s["name"] for s in sites if is_inside(data_plate, s)}
    outside = [s["name"] for s in sites if s["name"] not in inside and not is_penalty(s)]
    deltas = {n for n, s in guided.items() if log_density_of_delta(s["fn"]) is not None}
    tensors = (*parameters.by_name.values(), *tensors_of(parameters.modules), *batch)
    is_whole = data_plate.size == (rows or data_plate.size)
    return Structure(
        model=model,
        guide=guide,
        plate=data_plate.name,
        plates=data_plate.plates,
        dim=data_plate.dim,
        nesting=max(-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized),
        subsample_size=None if is_whole else data_plate.size,
        full_size=data_plate.full_size,
        is_scaled=data_plate.full_size != data_plate.size,
        tied_to=rows if rows is not None and rows > 1 and fewer is None else None,
        latents=tuple(name for name in latents if name in inside),
        global_latents=tuple(name for name in latents if name not in inside),
        global_sites=tuple(dict.fromkeys(outside)),
        observed=_names(s for s in of_model if s["is_observed"] and not is_factor(s)),
        auxiliary=tuple(name for name in guided if name not in in_model),
        points=frozenset(n for n in latents if _is_point(n, guided, in_model, again)),
        improper=_names(s for s in drawn if is_improper(s["fn"])),
        enumerated=_names(s for s in drawn if s["name"] not in guided),
        fed=tuple(n for n in latents if n in inside and n in deltas),
        removed_scales=_removed_scales(sites),
        not_reparametrised=_names(s for s in guided.values() if not s["fn"].has_rsample),
        shapes={name: tuple(guided[name]["fn"].event_shape) for name in latents},
        parameters=parameters.by_name,
        sides=parameters.sides,
        modules=parameters.modules,
        anchor=first_floating(tensors),
        oddities=parameters.oddities,
    )


def _names(sites: Iterable[Site]) -> tuple[str, ...]:
    return tuple(site["name"] for site in sites)


def _with_rows(model: Program, guide: Program, batch: Batch, rows: int) -> Trace | None:
    """The model's trace on fewer rows; None if the pair doesn't run on them.

    One with parameters for each row doesn't, for example: it draws as many as before.
    """
    fewer = tuple(b[:rows] if isinstance(b, Tensor) and b.dim() else b for b in batch)
    try:
        trace = run_pair(model, guide, fewer)[1]
    except PvaeError:
        return None
    return trace if all(map(_fills_its_plates, sample_sites(trace))) else None


def _fills_its_plates(site: Site) -> bool:
    shape = site["value"].shape if isinstance(site["value"], Tensor) else ()
    batch = tuple(shape)[: len(shape) - len(site["fn"].event_shape)]
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and -f.dim <= len(batch)]
    return all(batch[f.dim] in (1, f.size) or f.size < 0 for f in frames)


def _is_point(
    name: str, guided: dict[str, Site], in_model: dict[str, Site], again: list[Trace]
) -> bool:
    """A Delta is a point if its density is 1 and nothing random feeds it."""
    log_density = log_density_of_delta(guided[name]["fn"])
    if log_density is None or bool((log_density != 0).any()):
        return False
    for other, site in guided.items():  # draws of a few values may repeat by chance
        if other not in in_model and not getattr(site["fn"], "has_rsample", True):
            return False
    return all(torch.equal(guided[name]["value"], trace.nodes[name]["value"]) for trace in again)


def _removed_scales(sites: list[Site]) -> dict[str, float]:
    removed = {}
    for site in sites:
        scale = extra_scale(site)
        if isinstance(scale, Tensor) or abs(scale - 1.0) > 1e-9:
            removed[site["name"]] = float(torch.as_tensor(scale).double().mean())
    return removed
