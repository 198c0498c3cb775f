"""What log densities can be at most, and where supports end in floating point."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import Independent
from torch.distributions.constraints import Constraint

from pvae.internals import mask_of
from pvae.types import Dist

__all__ = [
    "is_discrete",
    "is_on_edge",
    "is_outside",
    "is_without_mass",
    "largest_log_prob",
    "support_of",
]

_HALF_LOG_TAU = math.log(2 * math.pi) / 2


def support_of(fn: Dist) -> Constraint | None:
    """Where a distribution has mass, of single entries; None where it doesn't say so."""
    with contextlib.suppress(NotImplementedError, AttributeError):
        support = fn.support
        while isinstance(support, (_Independent, constraints.MixtureSameFamilyConstraint)):
            support = support.base_constraint
        return support
    return None


_Independent = type(constraints.independent(constraints.real, 1))


def is_discrete(fn: Dist) -> bool:
    """Whether a distribution has probabilities, and no density."""
    support = support_of(fn)
    return support is not None and bool(support.is_discrete)


def largest_log_prob(fn: Dist) -> Tensor:
    """The largest log density that any value has, of the batch shape; infinite where not known.

    Example:
        >>> largest_log_prob(dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])))
        tensor([-0.9189, -1.6121])
    """
    if isinstance(fn, Independent):
        return _sum_entries(largest_log_prob(fn.base_dist), fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return scale_and_mask(largest_log_prob(fn.base_dist), mask=mask_of(fn))
    if isinstance(fn, ExpandedDistribution):
        return largest_log_prob(fn.base_dist).expand(fn.batch_shape)
    if isinstance(fn, dist.MixtureSameFamily):
        weights = fn.mixture_distribution.logits.log_softmax(-1)
        return (weights + largest_log_prob(fn.component_distribution)).logsumexp(-1)
    largest = _LARGEST.get(type(fn).log_prob) or _LARGEST.get(type(fn))
    if largest is not None:
        return largest(fn).expand(fn.batch_shape)
    device = next((v.device for v in vars(fn).values() if isinstance(v, Tensor)), None)
    constant = torch.tensor(0.0 if is_discrete(fn) else math.inf, device=device)
    return constant.expand(fn.batch_shape)


def _once(expanded: Tensor) -> Tensor:
    """A tensor without the repeats that an expansion has made of it."""
    for dim, stride in enumerate(expanded.stride()):
        expanded = expanded.narrow(dim, 0, 1) if stride == 0 else expanded
    return expanded


def _sum_entries(each: Tensor, count: int) -> Tensor:
    """The sum over the last dimensions; of repeated entries by their number."""
    if count and all(stride == 0 for stride in each.stride()[-count:]):
        return each.flatten(-count)[..., 0] * math.prod(each.shape[-count:])
    return sum_rightmost(each, count)


def _of_gamma(fn: Dist) -> Tensor:
    more = fn.concentration - 1
    at_mode = torch.xlogy(more, more / fn.rate) - more
    constant = torch.xlogy(fn.concentration, fn.rate) - fn.concentration.lgamma()
    return torch.where(more >= 0, constant + at_mode, math.inf)


def _of_beta(fn: Dist) -> Tensor:
    return _of_concentration(torch.stack([fn.concentration1, fn.concentration0], -1))


def _of_concentration(concentration: Tensor) -> Tensor:
    more, total = concentration - 1, concentration.sum(-1)
    share = more / more.sum(-1, keepdim=True).clamp(min=torch.finfo(more.dtype).tiny)
    constant = total.lgamma() - concentration.lgamma().sum(-1)
    return torch.where((more >= 0).all(-1), constant + torch.xlogy(more, share).sum(-1), math.inf)


def _at_loc(fn: Dist) -> Tensor:
    density: Tensor = fn.log_prob(fn.loc)
    return density


_BY_KIND: dict[type[Dist], Callable[[Dist], Tensor]] = {
    dist.Normal: lambda fn: -_once(fn.scale).log() - _HALF_LOG_TAU,
    dist.HalfNormal: lambda fn: math.log(2) - fn.scale.log() - _HALF_LOG_TAU,
    dist.Laplace: lambda fn: -(2 * _once(fn.scale)).log(),
    dist.Cauchy: lambda fn: -(math.pi * fn.scale).log(),
    dist.HalfCauchy: lambda fn: math.log(2) - (math.pi * fn.scale).log(),
    dist.Logistic: lambda fn: -(4 * fn.scale).log(),
    dist.Gumbel: lambda fn: -fn.scale.log() - 1,
    dist.Exponential: lambda fn: fn.rate.log(),
    dist.Uniform: lambda fn: -(fn.high - fn.low).log(),
    dist.Gamma: _of_gamma,
    dist.Beta: _of_beta,
    dist.Dirichlet: lambda fn: _of_concentration(fn.concentration),
    dist.StudentT: _at_loc,
    dist.VonMises: _at_loc,
    dist.MultivariateNormal: _at_loc,
    dist.LowRankMultivariateNormal: _at_loc,
    dist.MultivariateStudentT: _at_loc,
    dist.Bernoulli: lambda fn: fn.logits.new_zeros(()),  # of grey values, too
}


# by the function that scores, as a subclass may have its own
_LARGEST: dict[object, Callable[[Dist], Tensor]] = {
    kind.log_prob: largest for kind, largest in _BY_KIND.items()
} | {dist.LogNormal: lambda fn: fn.scale**2 / 2 - fn.loc - fn.scale.log() - _HALF_LOG_TAU}


def is_on_edge(fn: Dist, value: Tensor) -> Tensor | None:
    """Which values have an entry where the support ends in floating point; None without an end.

    There a draw is not what was drawn: it has been rounded or clamped to what numbers can say.

    Example:
        >>> is_on_edge(dist.Beta(0.5, 0.5), torch.tensor([0.0, 0.5, 1.0]))
        tensor([ True, False,  True])
    """
    support = support_of(fn)
    if support is None or support.is_discrete or not value.is_floating_point():
        return None
    numbers = torch.finfo(value.dtype)
    if isinstance(support, type(constraints.simplex)):
        least = value.topk(min(2, value.shape[-1]), largest=False).values
        # what is clamped before shares are taken has the same share
        tied = (least[..., :1] == least[..., -1:]) & (value.shape[-1] > 1)
        return _any_entry((least <= numbers.tiny) | tied, fn, value)
    ends = vars(support)
    below, above = ends.get("lower_bound"), ends.get("upper_bound")
    edges = [
        (value - end).abs() <= numbers.tiny + numbers.eps * torch.as_tensor(end).abs()
        for end in (below, above)
        if end is not None
    ]
    if not edges:
        return None
    return _any_entry(torch.stack(torch.broadcast_tensors(*edges)).any(0), fn, value)


def is_outside(fn: Dist, value: Tensor) -> Tensor | None:
    """Which values have an entry outside the support; None where it has no ends that tell.

    Not every density says so: that of a Poisson distribution is finite between whole numbers.

    Example:
        >>> is_outside(dist.Exponential(1.0), torch.tensor([-0.5, 0.0, 2.0]))
        tensor([ True, False, False])
    """
    support = support_of(fn)
    has_ends = support is not None and vars(support).keys() & {"lower_bound", "upper_bound"}
    is_whole = support is not None and support.is_discrete and support.event_dim == 0
    if support is None or not (has_ends or is_whole):
        return None
    if has_ends and not support.is_discrete and value.is_floating_point():
        least = torch.finfo(value.dtype).tiny
        below = value < torch.as_tensor(vars(support).get("lower_bound", -math.inf)) - least
        outside = below | (value > torch.as_tensor(vars(support).get("upper_bound", math.inf)))
        return _any_entry(outside | value.isnan(), fn, value)
    return _any_entry(~support.check(value), fn, value)


def _any_entry(each: Tensor, fn: Dist, value: Tensor) -> Tensor:
    """Whether something holds at any entry of a value, of the shape that log densities have."""
    batch = value.dim() - len(fn.event_shape)
    return each.flatten(batch).any(-1) if each.dim() > batch else each


def is_without_mass(fn: Dist, value: Tensor) -> Tensor | None:
    """Which values have probability 0, though torch, which clamps it, scores them as rare.

    None for distributions that don't clamp. What is rare indeed is told by its log density.
    """
    base: Dist = fn
    while isinstance(base, Independent):
        base = base.base_dist
    if isinstance(base, dist.Categorical):
        probs = base.probs.expand(*value.shape, base.probs.shape[-1])
        mass = probs.gather(-1, value.long().unsqueeze(-1)).squeeze(-1)
    elif isinstance(base, dist.OneHotCategorical):
        mass = (base.probs * value).sum(-1)
    elif isinstance(base, dist.Bernoulli):
        mass = torch.where(value == 1, base.probs, 1 - base.probs)
    else:
        return None
    clamped = math.log(torch.finfo(mass.dtype).eps)
    missing = (mass == 0) & ((base.log_prob(value) - clamped).abs() < _ROUNDING)
    return _any_entry(missing, fn, value)


_ROUNDING = 1e-3  # nats
