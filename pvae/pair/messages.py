"""Reading Pyro's messages: what kind of site one is, what it scores, and what scales it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pvae.devices import is_of_devices
from pvae.distributions import base_of, is_improper, is_transformed, masks_of
from pvae.errors import PairError, UndefinedError, is_out_of_memory
from pvae.internals import DETERMINISTIC, unvalidated
from pvae.limits import is_outside
from pvae.origin import first_line, line_of_user
from pvae.pair.running import ON_ONE_DEVICE
from pvae.sites import PENALTY
from pvae.types import Site

__all__ = [
    "in_plates",
    "infer_of",
    "is_factor",
    "is_penalty",
    "log_prob_of",
    "mask_of",
    "masks_at",
    "plate_scale",
    "refused",
    "sample_sites",
    "score",
]


def is_factor(site: Site) -> bool:
    """Whether a site is a factor statement."""
    return isinstance(site["fn"], dist.Unit)


def in_plates(names: frozenset[str], site: Site) -> bool:
    """Whether a site is inside one of the plates."""
    return any(frame.name in names for frame in site["cond_indep_stack"])


def infer_of(site: Site) -> Mapping[str, object]:
    """What the statement says to inference in ``infer=``."""
    return site["infer"] or {}


def is_penalty(site: Site) -> bool:
    """Whether a site is a factor marked as a penalty."""
    return bool(infer_of(site).get(PENALTY))


def sample_sites(trace: Trace) -> list[Site]:
    """The sites that have a density: no subsampling, no deterministic ones."""
    sites = (s for s in trace.nodes.values() if s["type"] == "sample" and not site_is_subsample(s))
    return [site for site in sites if not infer_of(site).get(DETERMINISTIC)]


def mask_of(site: Site) -> Tensor | None:
    """Which entries of a site count, of its batch and event shape; None where all do.

    The others are masked out by ``obs_mask=``, by `poutine.mask`, or by ``.mask(...)`` on the
    distribution.
    """
    fn, mask = site["fn"], None
    shape = fn.batch_shape + fn.event_shape
    for part, event_dim in masks_at(site):
        part = torch.as_tensor(part, device=site["value"].device).bool()
        part = part.reshape(part.shape + (1,) * event_dim)
        part = part.expand(torch.broadcast_shapes(part.shape, shape))  # or over states, too
        mask = part if mask is None else mask & part
    return mask


def masks_at(site: Site) -> list[tuple[Tensor | bool, int]]:
    """Masks that may leave something out, each with the event dimensions that it covers."""
    around = site["mask"], len(site["fn"].event_shape)
    masks = [around, *masks_of(site["fn"])]
    return [(mask, dims) for mask, dims in masks if mask is not None and mask is not True]


def log_prob_of(site: Site) -> Tensor:
    """The log density of a site's value, neither masked nor scaled."""
    fn, value = site["fn"], site["value"]
    # Pyro's ImproperUniform makes zeros where tensors are made by default
    with value.device if is_improper(fn) else contextlib.nullcontext():
        return fn.log_prob(value, *site["args"], **site["kwargs"])


def score(site: Site, device: torch.device | None = None) -> Tensor:
    """The same, on a device; a value that the distribution refuses is a `PairError` of the site.

    A draw of a latent outside the support has density 0, which is no error here. A value that a
    flow can't go back from, as it has no inverse, is an `UndefinedError`. Without a device, the
    density is where the distribution has computed it: on the host, if that has numbers for
    parameters, as ``dist.Uniform(0.0, 1.0)`` has.
    """
    try:
        density = log_prob_of(site)
        return density if device is None else density.to(device)
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        outside = None if site["is_observed"] else _zero_outside(site)
        if outside is not None:
            return outside if device is None else outside.to(device)
        if is_transformed(site["fn"]) and isinstance(error, (KeyError, NotImplementedError)):
            raise _without_inverse(site) from error
        raise refused(site, error) from error


def refused(site: Site, error: Exception) -> PairError:
    """The error of a value that a site's distribution doesn't score."""
    line = line_of_user(error)
    fixes = ["data in the likelihood's support", "a guide whose draws are in the prior's support"]
    return PairError(
        f"site '{site['name']}'",
        f"a value that {type(site['fn']).__name__} can score",
        f"{first_line(error)} ({line})" if line else first_line(error),
        [ON_ONE_DEVICE] if is_of_devices(error) else fixes,
    )


def _zero_outside(site: Site) -> Tensor | None:
    """The log density of draws of which some are outside the support; None if none are."""
    outside = is_outside(site["fn"], site["value"])
    if outside is None or not bool(outside.any()):
        return None
    with unvalidated():
        density = log_prob_of(site)
    return torch.where(outside.to(density.device), -math.inf, density)


def _without_inverse(site: Site) -> UndefinedError:
    kinds = [type(step).__name__ for step in base_of(site["fn"]).transforms]
    return UndefinedError(
        f"log density of a given value at site '{site['name']}'",
        "transforms with an inverse",
        f"{' and '.join(dict.fromkeys(kinds))}, which score their own draws alone",
        ["transforms that can be inverted, such as pyro.distributions.transforms.spline"],
    )


def plate_scale(site: Site, without: frozenset[str] = frozenset()) -> float:
    """The factor that subsampled plates give a site, those in ``without`` left out."""
    factor = 1.0
    for frame in site["cond_indep_stack"]:
        if frame.name not in without and frame.full_size not in (None, -1):
            factor *= frame.full_size / frame.size
    return factor
