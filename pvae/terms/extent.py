"""What a pass says of its data: how large their log density can be, and which values count."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pvae.devices import beside, double
from pvae.distributions import base_of
from pvae.limits import is_discrete, largest_log_prob
from pvae.pair import is_inside, is_penalty, mask_of
from pvae.pair.messages import is_factor, plate_scale, sample_sites
from pvae.terms.collect import Collector
from pvae.terms.result import Terms
from pvae.types import Dist, Site

__all__ = ["Extent", "count_where", "extent_of"]


@dataclass(frozen=True)
class Extent:
    """What one pass has, by datum.

    Attributes:
        limit: The largest log density that any data have at these latents, ``(K, N)``; infinite
            where a site's distribution doesn't tell, there are factors, or data are shared by all.
        marks: A number for each datum, by its observed values alone.
        entries: How many values of each datum are observed, and not masked out.
        continuous: How many of these have a density.
        is_normalised: Whether all observed sites are scored by distributions of their values.
    """

    limit: Tensor
    marks: Tensor
    entries: Tensor
    continuous: Tensor
    is_normalised: bool


def extent_of(terms: Terms) -> Extent:
    """What a pass, of particles that went through at once, has."""
    collect = Collector(terms.structure, terms.num_particles, per_dimension=False)
    zeros = double(terms.like.new_zeros((terms.num_particles, terms.num_rows)))
    limit, marks, entries, continuous = zeros, zeros, zeros, zeros
    is_normalised = True
    for site in sample_sites(terms.model_trace):
        if is_penalty(site) or not site["is_observed"]:
            continue
        if is_factor(site) or not is_inside(terms.structure, site):
            limit = limit + math.inf
            continue
        weight = plate_scale(site, without=terms.structure.plates)
        limit = limit + beside(weight, limit) * _reduced(
            terms, collect, site, largest_log_prob(site["fn"])
        )
        own_marks, count = _marks_of(terms, site)
        marks = marks + _reduced(terms, collect, site, own_marks, is_masked=True)
        count = _reduced(terms, collect, site, count, is_masked=True)
        entries = entries + count
        continuous = continuous if is_discrete(site["fn"]) else continuous + count
        is_normalised &= not _is_grey(site["fn"])
    return Extent(limit, marks, entries, continuous, is_normalised)


def count_where(terms: Terms, site: Site, holds: Tensor) -> Tensor:
    """At which draws of a latent something holds, ``(K, N)`` or ``(K, 1)``, as 0 and 1."""
    collect = Collector(terms.structure, terms.num_particles, per_dimension=False)
    found = _reduced(terms, collect, site, holds)
    return (found if found.dim() == 2 else found.unsqueeze(1)).clamp(max=1)


def _reduced(
    terms: Terms, collect: Collector, site: Site, raw: Tensor, *, is_masked: bool = False
) -> Tensor:
    """A number of each batch entry of a site, summed as its log densities are."""
    while raw.dim() > collect.rank:  # over states that are enumerated
        raw = raw.amax(0)
    raw = beside(double(raw), double(terms.like.new_zeros(())))  # of constants, it is on the host
    total = collect.summed(site, raw, is_masked=is_masked)
    return total[:, : terms.num_rows] if total.dim() == 2 else total


def _marks_of(terms: Terms, site: Site) -> tuple[Tensor, Tensor]:
    """A number by the values, and how many values count, of each batch entry of a site."""
    fn, value = site["fn"], torch.as_tensor(site["value"], device=terms.like.device)
    event_dim = len(fn.event_shape)
    shape = [*fn.batch_shape[-terms.structure.nesting :], *fn.event_shape]
    axis = terms.structure.axis_in(len(shape) - event_dim)
    value = double(value).expand(torch.broadcast_shapes(value.shape, shape))
    sizes = [1 if i == axis else size for i, size in enumerate(shape)]
    place = torch.arange(math.prod(sizes), dtype=torch.float64, device=value.device)
    marks = value * (1 + place).sin().add(2).reshape(sizes)
    mask = beside(mask_of(site), marks)
    count = torch.ones_like(marks)
    if mask is not None:
        marks, count = torch.where(mask, marks, 0.0), torch.where(mask, count, 0.0)
    own = len(base_of(fn).event_shape) if is_discrete(fn) else 0
    if own:  # one of many classes, or counts that have one total, is one value
        count = count.amax(tuple(range(-own, 0)))
    return sum_rightmost(marks, event_dim), sum_rightmost(count, event_dim - own)


def _is_grey(fn: Dist) -> bool:
    """Whether values between 0 and 1 are scored by the probabilities of 0 and 1."""
    return isinstance(base_of(fn), dist.Bernoulli) and not is_discrete(fn)
