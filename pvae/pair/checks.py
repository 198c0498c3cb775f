"""Pairs that are refused: sites that don't match, shapes that don't fit, data out of place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pvae.devices import is_of_devices
from pvae.errors import PairError, is_out_of_memory, oxford
from pvae.pair.messages import infer_of, is_factor, is_penalty, log_prob_of, refused
from pvae.pair.plates import DataPlate, Sites
from pvae.types import Message, Site

__all__ = ["check_apart", "check_densities", "check_locality", "check_sites", "check_with_pyro"]

SWAPPED = "model and guide in this order: are they swapped?"


def check_densities(sites: Sites, densities: tuple[str, ...]) -> None:
    """Refuses a name that is no factor of the guide, where it has others that may be meant."""
    unknown = [name for name in densities if name not in sites.in_guide]
    if unknown and sites.training:
        fixes = [f"densities=('{name}',)" for name in sites.training[:2]]
        actual = f"{oxford(unknown)}; its factors: {oxford(sites.training)}"
        raise PairError("densities", "names of factors in the guide", actual, fixes)


def check_sites(sites: Sites) -> None:
    """Refuses latents without a guide, guide sites without a latent, and pairs without data."""
    data = [n for n, s in sites.in_guide.items() if s["is_observed"] and not is_factor(s)]
    if data:
        fixes, expected = [SWAPPED, "drop obs= in the guide"], "draws, as a guide makes them"
        raise PairError(f"guide site '{data[0]}'", expected, "observed data", fixes)
    for name in sites.unguided:
        _check_unguided(name, sites.in_model[name], sites.guided)
    for name, site in sites.guided.items():
        _check_guided(name, site, sites.in_model)
    if not any(s["is_observed"] and not is_penalty(s) for s in sites.in_model.values()):
        expected = "at least one observed site: pyro.sample(..., obs=x)"
        actual = f"sites: {_names(sites.in_model)}, all of them drawn"
        raise PairError("model", expected, actual, [SWAPPED])


def _check_unguided(name: str, site: Site, guided: dict[str, Site]) -> None:
    if infer_of(site).get("enumerate") != "parallel":
        fixes = [
            f"pyro.sample('{name}', ...) in the guide",
            "infer={'enumerate': 'parallel'} in the model, to sum a discrete latent out",
            "obs=..., if it is data",
        ]
        actual = f"the guide's sites: {_names(guided)}"
        raise PairError(f"site '{name}'", "a site of that name in the guide", actual, fixes)


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
    except PairError:
        raise
    except ValueError as error:
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        expected = "sites whose shapes fit their plates, and each other in model and guide"
        fixes = [".to_event(k) at the site that is named", "the site inside the data plate"]
        raise PairError("pair", expected, "; ".join(lines[:3]), fixes) from error


def _is_scored(site: Site) -> bool:
    """Gives a site its log density, which Pyro checks; not outside the support, or no inverse."""
    try:
        site["log_prob"] = log_prob_of(site)  # type: ignore[index]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if is_of_devices(error):
            raise refused(site, error) from error
        return False
    return True


def check_locality(sites: Sites, fewer: Trace | None) -> None:
    """Refuses latents and data that stand outside the data plate and belong inside."""
    plate = sites.data_plate
    if plate is None:
        return
    for name, site in sites.in_model.items():
        inside = sites.is_inside(site)
        if site["is_observed"]:
            if plate.rows > 1 and _has_rows(site, plate.rows, fewer):
                _check_observed(site, plate, inside=inside)
        elif name in sites.guided and sites.is_inside(sites.guided[name]) != inside:
            expected = f"the data plate '{plate.name}' around it in model and guide alike"
            actual = f"in the {'model' if inside else 'guide'} alone"
            fixes = [f"with pyro.plate('{plate.name}', ...) in both"]
            raise PairError(f"latent '{name}'", expected, actual, fixes)


def check_apart(sites: Sites, run: Callable[[], tuple[Trace, Trace]]) -> None:
    """Refuses sites outside the data plate whose densities depend on latents inside it.

    No datum has terms of its own then. It is seen by gradients, so not of discrete latents.
    """
    plate = sites.data_plate
    outside = sites.outside(sites.with_density)
    local = {name for name, site in sites.guided.items() if sites.is_inside(site)}
    if plate is None or not outside or not local:
        return
    leaves = _Leaves(local)
    with torch.enable_grad(), leaves:
        for trace in run():
            for name in outside:
                if name not in trace.nodes or not leaves.values:
                    continue
                density = log_prob_of(trace.nodes[name]).sum()
                if not density.requires_grad:
                    continue
                every = torch.autograd.grad(
                    density, leaves.values, allow_unused=True, retain_graph=True
                )
                if any(g is not None for g in every):
                    fixes = [
                        f"the pyro.sample('{name}', ...) indented into the plate",
                        "pvae.Pair(model, guide, plate=False), where all data are one datum",
                    ]
                    expected = f"a density apart from the latents in the data plate '{plate.name}'"
                    actual = "one that depends on them, while the site is outside of it"
                    raise PairError(f"site '{name}'", expected, actual, fixes)


class _Leaves(Messenger):
    """Cuts the draws of some sites off what they were made of, so that gradients end there."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names, self.values = names, list[Tensor]()

    def _pyro_post_sample(self, msg: Message) -> None:
        value = msg["value"]
        is_new = not any(value is known for known in self.values)
        if msg["name"] in self.names and is_new and value.is_floating_point():
            msg["value"] = value.detach().requires_grad_()
            self.values.append(msg["value"])


def _has_rows(site: Site, rows: int, fewer: Trace | None) -> bool:
    """Whether an axis counts the data: it is as long as the batch, also as a shorter one."""
    shape = site["value"].shape if isinstance(site["value"], Tensor) else ()
    if fewer is None or site["name"] not in fewer.nodes:
        return rows in shape[: max(1, len(shape) - len(site["fn"].event_shape))]
    other = fewer.nodes[site["name"]]["value"].shape
    both = zip(shape, other, strict=False)
    return len(shape) == len(other) and any(pair == (rows, rows - 1) for pair in both)


def _check_observed(site: Site, plate: DataPlate, *, inside: bool) -> None:
    event_shape = tuple(site["fn"].event_shape)
    is_event = site["value"].dim() - len(event_shape) < -plate.dim
    if is_event or not inside:
        expected = (
            f"the data plate '{plate.name}' around it: it has {plate.rows} rows, like the batch"
        )
        whole = f"event_shape {event_shape}, which holds them all"
        fixes = [
            f"the pyro.sample('{site['name']}', ...) indented into the plate",
            ".to_event(k) for the axes of one datum alone",
            "pvae.Pair(model, guide, plate=False), where all data are one datum",
        ]
        actual = whole if inside else "outside of it"
        raise PairError(f"observed site '{site['name']}'", expected, actual, fixes)
