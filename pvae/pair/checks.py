"""Pairs that are refused: sites that don't match, shapes that don't fit, data out of place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pvae.errors import PairError, oxford, warn
from pvae.pair.messages import infer_of, is_factor, is_penalty, log_prob_of
from pvae.pair.plates import Sites
from pvae.types import Site

__all__ = ["check_locality", "check_sites", "check_with_pyro"]

SWAPPED = "model and guide in this order: are they swapped?"


def check_sites(sites: Sites) -> None:
    """Refuses latents without a guide, guide sites without a latent, and pairs without data."""
    data = [n for n, s in sites.in_guide.items() if s["is_observed"] and not is_factor(s)]
    if data:
        fixes, expected = [SWAPPED, "drop obs= in the guide"], "draws, as a guide makes them"
        raise PairError(f"guide site '{data[0]}'", expected, "observed data", fixes)
    for name in sites.unguided:
        _check_unguided(name, sites.in_model[name], sites)
    for name, site in sites.guided.items():
        _check_guided(name, site, sites.in_model)
    if not any(s["is_observed"] and not is_penalty(s) for s in sites.in_model.values()):
        expected = "at least one observed site: pyro.sample(..., obs=x)"
        actual = f"sites: {_names(sites.in_model)}, all of them drawn"
        raise PairError("model", expected, actual, [SWAPPED])


def _check_unguided(name: str, site: Site, sites: Sites) -> None:
    if infer_of(site).get("enumerate") != "parallel":
        fixes = [
            f"pyro.sample('{name}', ...) in the guide",
            "infer={'enumerate': 'parallel'} in the model, to sum a discrete latent out",
            "obs=..., if it is data",
        ]
        actual = f"the guide's sites: {_names(sites.guided)}"
        raise PairError(f"site '{name}'", "a site of that name in the guide", actual, fixes)
    plates = [f.name for f in site["cond_indep_stack"]]
    if plates != [sites.data_plate.name]:
        expected = f"the data plate '{sites.data_plate.name}' and no other around it"
        actual = f"plates: {_names(plates)}"
        raise PairError(f"enumerated site '{name}'", expected, actual, ["a guide for it"])


def _check_guided(name: str, site: Site, in_model: dict[str, Site]) -> None:
    infer = infer_of(site)
    if name not in in_model and not infer.get("is_auxiliary"):
        fixes = ["the same name in model and guide", "infer={'is_auxiliary': True}"]
        actual = f"the model's sites: {_names(in_model)}"
        expected = "a latent site of that name in the model"
        raise PairError(f"guide site '{name}'", expected, actual, fixes)
    if name in in_model and in_model[name]["is_observed"]:
        fixes = ["drop it from the guide", "call the model without that data"]
        expected = "a latent in the model, as it is in the guide"
        raise PairError(f"site '{name}'", expected, "observed data", fixes)
    if infer.get("enumerate") == "parallel":
        warn(
            f"Site '{name}' of the guide asks to be enumerated, but is drawn here. "
            "objective=pyro.infer.TraceEnum_ELBO() enumerates it."
        )


def _names(names: Iterable[str]) -> str:
    return oxford(names) or "none"


def check_with_pyro(model_trace: Trace, guide_trace: Trace) -> None:
    """Pyro's own checks of shapes, which its ELBOs make when validation is on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing sites, which are refused elsewhere
            check_model_guide_match(model_trace, guide_trace)
        for trace in (model_trace, guide_trace):
            for site in prune_subsample_sites(trace).nodes.values():
                if site["type"] == "sample" and _is_scored(site):
                    check_site_shape(site, max_plate_nesting=float("inf"))
    except ValueError as error:
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        expected = "sites whose shapes fit their plates, and each other in model and guide"
        fixes = [".to_event(k) at the site that is named", "the site inside the data plate"]
        raise PairError("pair", expected, "; ".join(lines[:3]), fixes) from error


def _is_scored(site: Site) -> bool:
    """Gives a site its log density, which Pyro checks; not outside the support, or no inverse."""
    try:
        site["log_prob"] = log_prob_of(site)  # type: ignore[index]
    except Exception:
        return False
    return True


def check_locality(sites: Sites, rows: int | None, fewer: Trace | None) -> None:
    """Refuses latents and data that stand outside the data plate and belong inside."""
    plate = sites.data_plate.name
    for name, site in sites.in_model.items():
        inside = sites.is_inside(site)
        if site["is_observed"]:
            if rows is not None and rows > 1 and _has_rows(site, rows, fewer):
                _check_observed(site, sites, rows)
        elif name in sites.guided and sites.is_inside(sites.guided[name]) != inside:
            expected = f"the data plate '{plate}' around it in model and guide alike"
            actual = f"in the {'model' if inside else 'guide'} alone"
            fixes = [f"with pyro.plate('{plate}', ...) in both"]
            raise PairError(f"latent '{name}'", expected, actual, fixes)


def _has_rows(site: Site, rows: int, fewer: Trace | None) -> bool:
    """Whether the first axis counts the data: it is as long as the batch, also as a shorter one."""
    value, name = site["value"], site["name"]
    if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != rows:
        return False
    if fewer is None or name not in fewer.nodes:
        return True
    return fewer.nodes[name]["value"].shape[0] == rows - 1


def _check_observed(site: Site, sites: Sites, rows: int) -> None:
    event_shape, plate = tuple(site["fn"].event_shape), sites.data_plate
    is_event = site["value"].dim() - len(event_shape) < -plate.dim
    inside = sites.is_inside(site)
    if is_event or not inside:
        expected = f"the data plate '{plate.name}' around it: it has {rows} rows, like the batch"
        whole = f"event_shape {event_shape}, which holds them all"
        fixes = [
            f"the pyro.sample('{site['name']}', ...) indented into the plate",
            ".to_event(k) for the axes of one datum alone",
        ]
        actual = whole if inside else "outside of it"
        raise PairError(f"observed site '{site['name']}'", expected, actual, fixes)
