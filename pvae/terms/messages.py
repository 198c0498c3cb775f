"""Reading Pyro's messages: what kind of site one is, and what scales it."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample

from pvae.sites import PENALTY

__all__ = ["delta_of", "extra_scale", "is_factor", "is_penalty", "plate_scale", "sample_sites"]


def is_factor(site: Any) -> bool:
    """Whether a site is a factor statement."""
    return isinstance(site["fn"], dist.Unit)


def is_penalty(site: Any) -> bool:
    """Whether a site is a factor marked as a penalty."""
    return bool((site["infer"] or {}).get(PENALTY))


def sample_sites(trace: Any) -> list[Any]:
    """The sites that have a density: no subsampling, no deterministic ones."""
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not (site["infer"] or {}).get("_deterministic")
    ]


def delta_of(fn: Any) -> tuple[Any, int] | None:
    """The Delta inside a distribution, and the number of dimensions made into its event."""
    dims = 0
    while True:
        if isinstance(fn, dist.Delta):
            return fn, dims
        if isinstance(fn, torch.distributions.Independent):
            dims += fn.reinterpreted_batch_ndims
            fn = fn.base_dist
        else:
            return None


def extra_scale(site: Any) -> Any:
    """The factor of a site that no plate explains."""
    factor = 1.0
    for frame in site["cond_indep_stack"]:
        if frame.full_size not in (None, -1):
            factor *= frame.full_size / frame.size
    return site["scale"] / factor


def plate_scale(site: Any, without: str) -> float:
    """The factor that subsampled plates other than one give a site."""
    factor = 1.0
    for frame in site["cond_indep_stack"]:
        if frame.name != without and frame.full_size not in (None, -1):
            factor *= frame.full_size / frame.size
    return factor
