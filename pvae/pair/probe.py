"""One traced batch of a pair, to find out what it is made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pvae.distributions import is_improper, log_density_of_delta
from pvae.errors import PairError, PvaeError, oxford, warn
from pvae.pair.messages import extra_scale, is_factor, is_penalty, sample_sites
from pvae.pair.modules import probing
from pvae.pair.parameters import Parameters
from pvae.pair.plates import DataPlate, find_data_plate
from pvae.pair.structure import Structure
from pvae.types import Program, Site

__all__ = ["Batch", "as_batch", "inspect_pair", "num_rows_of", "run_pair"]

Batch = tuple[Any, ...]
R = TypeVar("R")
RERUNS = 3


def as_batch(batch: Any) -> Batch:
    """What a pair is called with, as a tuple; one tensor is a batch of one."""
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)


def num_rows_of(batch: Batch) -> int | None:
    """Length of the first tensor; None if there is none."""
    return next((len(b) for b in batch if isinstance(b, Tensor) and b.dim()), None)


def inspect_pair(
    model: Program, guide: Program, batch: Batch, plate: str | None = None
) -> Structure:
    """Traces one batch of a pair, in evaluation mode and on copies of the generators.

    Arguments:
        model: A Pyro program; a module, a function or a method.
        guide: Its guide.
        batch: What they are called with; the first tensor's first axis counts the data.
        plate: Name of the data plate. If None: the only plate that has the batch's length.

    Raises:
        PairError: If model and guide don't match, there is no data plate or more than one
            candidate, a latent of the model has no guide, or data stand outside the plate.
    """
    rows = num_rows_of(batch)
    stored = dict(pyro.get_param_store().named_parameters())
    with probing((model, guide)) as found:
        guide_trace, model_trace = run_pair(model, guide, batch)
        again = [run_pair(model, guide, batch, model_too=False)[0] for _ in range(RERUNS)]
        fewer = None if rows is None or rows < 2 else _with_rows(model, guide, batch, rows - 1)
        parameters = Parameters(
            {"model": model, "guide": guide},
            found,
            {"model": model_trace, "guide": guide_trace},
            stored,
            lambda: run_pair(model, guide, batch),
        )
    of_model, of_guide = sample_sites(model_trace), sample_sites(guide_trace)
    sites = [*of_guide, *of_model]
    data_plate = find_data_plate(of_model, of_guide, rows, plate)
    guided = {s["name"]: s for s in of_guide if not s["is_observed"]}
    in_model = {s["name"]: s for s in of_model}
    latents = [n for n, s in in_model.items() if not s["is_observed"]]
    unguided = [n for n in latents if n not in guided]
    _check_sites(of_guide, guided, in_model, unguided, data_plate)
    _check_with_pyro(model_trace, guide_trace)
    _check_locality(guided, in_model, data_plate, rows, fewer)
    with_guide = [n for n in latents if n in guided]
    inside, outside, global_sites = _places(sites, with_guide, data_plate)
    is_whole = data_plate.size == (rows or data_plate.size)
    return Structure(
        model=model,
        guide=guide,
        plate=data_plate.name,
        plates=data_plate.names,
        dim=data_plate.dim,
        nesting=max(-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized),
        subsample_size=None if is_whole else data_plate.size,
        full_size=data_plate.full_size,
        is_scaled=data_plate.full_size != data_plate.size,
        tied_to=rows if rows is not None and rows > 1 and fewer is None else None,
        latents=inside,
        global_latents=outside,
        global_sites=global_sites,
        fed=tuple(n for n in inside if log_density_of_delta(guided[n]["fn"]) is not None),
        observed=tuple(n for n, s in in_model.items() if s["is_observed"] and not is_factor(s)),
        auxiliary=tuple(n for n in guided if n not in in_model),
        points=frozenset(
            n for n in latents if n in guided and _is_point(n, guided, in_model, again)
        ),
        improper=tuple(n for n in latents if is_improper(in_model[n]["fn"])),
        enumerated=tuple(unguided),
        removed_scales=_removed_scales(sites),
        not_reparametrised=tuple(
            n for n, s in guided.items() if not is_factor(s) and not s["fn"].has_rsample
        ),
        shapes={n: tuple(guided[n]["fn"].event_shape) for n in latents if n in guided},
        parameters=parameters.parameters,
        sides=parameters.sides,
        modules=parameters.modules,
        anchor=parameters.anchor(batch),
        oddities=parameters.oddities(),
    )


def _places(
    sites: list[Site], latents: list[str], data_plate: DataPlate
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Latents in the data plate, latents outside it, and all sites outside it."""
    local = {s["name"] for s in sites if data_plate.holds(s)}
    outside = [s["name"] for s in sites if s["name"] not in local and not is_penalty(s)]
    return (
        tuple(name for name in latents if name in local),
        tuple(name for name in latents if name not in local),
        tuple(dict.fromkeys(outside)),
    )


def run_pair(
    model: Program, guide: Program, batch: Batch, *, model_too: bool = True
) -> tuple[Trace, Trace]:
    """Traces of the guide and of the model replayed against it; errors say which one failed."""
    unwrapped = poutine.unwrap(guide)
    if isinstance(unwrapped, poutine.messenger.Messenger):  # an AutoMessenger runs both itself
        _named("guide", lambda: guide(*batch), batch)
        model_trace, guide_trace = unwrapped.get_traces()
        return guide_trace, model_trace
    guide_trace = _named("guide", lambda: poutine.trace(guide).get_trace(*batch), batch)
    if not model_too:
        return guide_trace, None
    replayed = poutine.replay(model, trace=guide_trace)
    return guide_trace, _named("model", lambda: poutine.trace(replayed).get_trace(*batch), batch)


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


def _named(what: str, run: Callable[[], R], batch: Batch) -> R:
    try:
        return run()
    except Exception as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        for cause in reversed(chain):  # the first error; the others are Pyro's additions to it
            if isinstance(cause, PvaeError):
                raise cause from None
        first_line = (str(error).strip() or "no message").splitlines()[0]
        fixes = [f"{what}(*batch) on one batch by hand, to see the whole traceback"]
        if "plate" in first_line:
            fixes.insert(0, ".to_event(k) at the site, so that batch_shape is the plates' sizes")
        raise PairError(
            what,
            f"to run when called with ({', '.join(map(_shown, batch))})",
            f"{type(error).__name__}: {first_line}",
            fixes,
        ) from error


def _shown(part: object) -> str:
    if isinstance(part, Tensor):
        return f"{str(part.dtype).removeprefix('torch.')} of shape {tuple(part.shape)}"
    return type(part).__name__


def _check_sites(
    of_guide: list[Site],
    guided: dict[str, Site],
    in_model: dict[str, Site],
    unguided: list[str],
    data_plate: DataPlate,
) -> None:
    for site in of_guide:
        if site["is_observed"] and not is_factor(site):
            raise PairError(
                f"guide site '{site['name']}'",
                "draws, as a guide makes them",
                "observed data",
                ["model and guide in this order: are they swapped?", "drop obs= in the guide"],
            )
    for name in unguided:
        site = in_model[name]
        if (site["infer"] or {}).get("enumerate") != "parallel":
            raise PairError(
                f"site '{name}'",
                "a site of that name in the guide",
                f"the guide's sites: {oxford(guided) if guided else 'none'}",
                [
                    f"pyro.sample('{name}', ...) in the guide",
                    "infer={'enumerate': 'parallel'} in the model, to sum a discrete latent out",
                    "obs=..., if it is data",
                ],
            )
        plates = [f.name for f in site["cond_indep_stack"]]
        if plates != [data_plate.name]:
            raise PairError(
                f"enumerated site '{name}'",
                f"the data plate '{data_plate.name}' and no other around it",
                f"plates: {oxford(plates) if plates else 'none'}",
                ["a guide for it"],
            )
    for name, site in guided.items():
        infer = site["infer"] or {}
        if name not in in_model and not infer.get("is_auxiliary"):
            raise PairError(
                f"guide site '{name}'",
                "a latent site of that name in the model",
                f"the model's sites: {oxford(in_model) if in_model else 'none'}",
                ["the same name in model and guide", "infer={'is_auxiliary': True}"],
            )
        if name in in_model and in_model[name]["is_observed"]:
            raise PairError(
                f"site '{name}'",
                "a latent in the model, as it is in the guide",
                "observed data",
                ["drop it from the guide", "call the model without that data"],
            )
        if infer.get("enumerate") == "parallel":
            warn(
                f"Site '{name}' of the guide asks to be enumerated, but is drawn here. "
                "objective=pyro.infer.TraceEnum_ELBO() enumerates it."
            )
    if not any(s["is_observed"] and not is_penalty(s) for s in in_model.values()):
        raise PairError(
            "model",
            "at least one observed site: pyro.sample(..., obs=x)",
            f"sites: {oxford(in_model) if in_model else 'none'}, all of them drawn",
            ["model and guide in this order: are they swapped?"],
        )


def _check_with_pyro(model_trace: Trace, guide_trace: Trace) -> None:
    """Pyro's own checks of shapes, which its ELBOs make when validation is on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing sites, which are refused elsewhere
            check_model_guide_match(model_trace, guide_trace)
    except ValueError as error:
        raise _from_pyro(error) from error
    for trace in (model_trace, guide_trace):
        for site in prune_subsample_sites(trace).nodes.values():
            if site["type"] != "sample":
                continue
            try:
                site["log_prob"] = site["fn"].log_prob(
                    site["value"], *site["args"], **site["kwargs"]
                )
            except Exception:  # noqa: S112 - outside the support, or no inverse
                continue
            try:
                check_site_shape(site, max_plate_nesting=float("inf"))
            except ValueError as error:
                raise _from_pyro(error) from error


def _from_pyro(error: ValueError) -> PairError:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return PairError(
        "pair",
        "sites whose shapes fit their plates, and each other in model and guide",
        "; ".join(lines[:3]),
        [".to_event(k) at the site that is named", "the site inside the data plate"],
    )


def _check_locality(
    guided: dict[str, Site],
    in_model: dict[str, Site],
    data_plate: DataPlate,
    rows: int | None,
    fewer: Trace | None,
) -> None:
    """Refuses latents and data that stand outside the data plate and belong inside."""
    for name, site in in_model.items():
        inside = data_plate.holds(site)
        if name in guided and not site["is_observed"] and data_plate.holds(guided[name]) != inside:
            where = "model" if inside else "guide"
            raise PairError(
                f"latent '{name}'",
                f"the data plate '{data_plate.name}' around it in model and guide alike",
                f"in the {where} alone",
                [f"with pyro.plate('{data_plate.name}', ...) in both"],
            )
        value = site["value"]
        if not (site["is_observed"] and isinstance(value, Tensor) and value.dim() and rows):
            continue
        is_event = value.dim() - len(site["fn"].event_shape) < -data_plate.dim
        has_rows = rows > 1 and value.shape[0] == rows
        if has_rows and fewer is not None and name in fewer.nodes:
            has_rows = fewer.nodes[name]["value"].shape[0] == rows - 1
        if has_rows and (not inside or is_event):
            raise PairError(
                f"observed site '{name}'",
                f"the data plate '{data_plate.name}' around it: it has {rows} rows, like the batch",
                f"event_shape {tuple(site['fn'].event_shape)}, which holds them all"
                if inside
                else "outside of it",
                [
                    f"the pyro.sample('{name}', ...) indented into the plate",
                    ".to_event(k) for the axes of one datum alone",
                ],
            )


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
        if isinstance(scale, Tensor):
            removed[site["name"]] = float(scale.double().mean())
        elif abs(scale - 1.0) > 1e-9:
            removed[site["name"]] = float(scale)
    return removed
