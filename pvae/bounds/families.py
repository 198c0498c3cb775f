"""Families of q with parameters for each datum, as distributions of its flat latents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms
from pyro.distributions.transforms.spline import ConditionedSpline
from torch import Tensor
from torch.distributions import Independent, Transform, transform_to
from torch.nn.functional import softplus

from pvae.bounds.density import LatentDensity
from pvae.errors import UndefinedError, is_out_of_memory
from pvae.pair import rows_from, rows_to
from pvae.terms import Terms, compute
from pvae.types import Dist

__all__ = ["LocalFamily", "flow", "full_rank", "own_family", "refuse_masks"]


@dataclass(frozen=True)
class LocalFamily:
    """A family of distributions of u: parameters for each datum, and a function of them."""

    parameters: list[Tensor]
    distribution: Callable[[Sequence[Tensor]], Dist]

    def log_weights(self, density: LatentDensity, num_draws: int) -> Tensor:
        """log p(x, u) - log q(u) of draws, ``(K, N)``, log q with its parameters stopped."""
        u = self.distribution(self.parameters).rsample((num_draws,))
        stopped = self.distribution([p.detach() for p in self.parameters])
        log_q = stopped.log_prob(u.view_as(u))  # a view, as transforms remember their draws
        return density.log_joint(u) - log_q


def _affine_start(like: Tensor) -> list[Tensor]:
    """Parameters with which `_affine` changes nothing; ``like`` has shape ``(N, D)``."""
    return [torch.zeros_like(like), torch.zeros_like(like), torch.zeros_like(like).diag_embed()]


def _affine(loc: Tensor, factor: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Location and triangular factor, moved in units of the factor that they start from."""
    shift, log_diagonal, below = parameters
    triangle = below.tril(-1) + log_diagonal.exp().diag_embed()
    return loc + (factor @ shift.unsqueeze(-1)).squeeze(-1), factor @ triangle


def full_rank(loc: Tensor, scale: Tensor) -> LocalFamily:
    """Full-rank Gaussians, which start from diagonal ones."""
    start = scale.diag_embed()

    def distribution(parameters: Sequence[Tensor]) -> Dist:
        mean, factor = _affine(loc, start, parameters)
        return dist.MultivariateNormal(mean, scale_tril=factor, validate_args=False)

    return LocalFamily(_affine_start(loc), distribution)


class _Triangular(Transform):
    """x -> loc + factor x, one for each datum (Pyro's takes one factor for all)."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.loc, self.factor = loc, factor

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + (self.factor @ x.unsqueeze(-1)).squeeze(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        white = (y - self.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.factor, white, upper=False).squeeze(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_det.expand(x.shape[:-1])


_BINS, _BOUND = 8, 4.0
_ONE = math.log(math.expm1(1 - 1e-3))  # softplus(_ONE) is 1, but for what splines add to it


def _spline_start(like: Tensor) -> list[Tensor]:
    """Parameters with which `_spline` changes nothing."""
    lengths = [like.new_zeros(*like.shape, _BINS) for _ in range(3)]
    return [*lengths, like.new_full((*like.shape, _BINS - 1), _ONE)]


def _spline(parameters: Sequence[Tensor]) -> Transform:
    widths, heights, middles, slopes = parameters
    shares = (widths.softmax(-1), heights.softmax(-1), softplus(slopes), middles.sigmoid())
    return ConditionedSpline(shares, bound=_BOUND)


def flow(start: LocalFamily) -> LocalFamily:
    """Two layers of splines, each followed by an affine map, the last of them the Gaussian's.

    It is richer than a Gaussian in one dimension, too, and as fast to invert as to run.
    """
    gaussian = start.distribution([p.detach() for p in start.parameters])
    zero, one = torch.zeros_like(gaussian.loc), torch.ones_like(gaussian.loc)
    base = dist.Normal(zero, one, validate_args=False).to_event(1)
    flip = torch.arange(zero.shape[-1] - 1, -1, -1, device=zero.device)

    def distribution(parameters: Sequence[Tensor]) -> Dist:
        inner = _affine(zero, one.diag_embed(), parameters[4:7])
        outer = _affine(gaussian.loc, gaussian.scale_tril, parameters[11:])
        first = [_spline(parameters[:4]), transforms.Permute(flip), _Triangular(*inner)]
        second = [_spline(parameters[7:11]), transforms.Permute(flip), _Triangular(*outer)]
        return dist.TransformedDistribution(base, first + second, validate_args=False)

    layer = [*_spline_start(zero), *_affine_start(zero)]
    return LocalFamily([*layer, *(p.clone() for p in layer)], distribution)


class _Sites:
    """Distributions of the guide's kinds at its sites, as one of u."""

    def __init__(self, density: LatentDensity, sites: dict[str, Dist]) -> None:
        self.density, self.sites = density, sites
        axis_in = density.structure.axis_in  # the data's axis, after one of particles
        self.axes = {name: axis_in(1 + len(fn.batch_shape)) for name, fn in sites.items()}

    def rsample(self, shape: tuple[int]) -> Tensor:
        sites, axes = self.sites.items(), self.axes
        drawn = {name: rows_to(1, axes[name], fn.rsample(shape)) for name, fn in sites}
        return self.density.flatten(drawn)

    def log_prob(self, u: Tensor) -> Tensor:
        total = self.density.log_det(u)
        for name, value in self.density.values(u).items():
            axis = self.axes[name]
            log_prob = rows_to(1, axis, self.sites[name].log_prob(rows_from(1, axis, value)))
            total = total + log_prob.reshape(*u.shape[:2], -1).sum(-1)
        return total


def own_family(density: LatentDensity, instead: LocalFamily) -> tuple[LocalFamily, str]:
    """The family that the guide's distributions are of; ``instead``, and why, if not known."""
    if density.structure.auxiliary or density.structure.fed:
        return instead, "its latents come from auxiliary sites"
    first, second = _one_pass(density), _one_pass(density)
    readings = {}
    for name in density.sites:
        fn = first.sites[name].guide
        reading, again = _read(fn), _read(second.sites[name].guide)
        if reading is None or again is None:
            return instead, f"{type(fn).__name__} at site '{name}' has no parameters to read"
        if not all(map(torch.equal, reading.start, again.start)):
            return instead, f"site '{name}' depends on what the guide has drawn before"
        readings[name] = reading
    ends = list(itertools.accumulate((len(r.start) for r in readings.values()), initial=0))

    def distribution(parameters: Sequence[Tensor]) -> Dist:
        shares = (parameters[a:b] for a, b in itertools.pairwise(ends))
        made = {n: r.build(p) for (n, r), p in zip(readings.items(), shares, strict=True)}
        return _Sites(density, made)

    moves = [torch.zeros_like(p) for r in readings.values() for p in r.start]
    return LocalFamily(moves, distribution), ""


@dataclass(frozen=True)
class _Reading:
    """A distribution's kind and unconstrained parameters, of which it can be made again."""

    kind: type[Dist]
    names: list[str]
    start: list[Tensor]
    units: list[Tensor]
    event_dims: int

    def build(self, moves: Sequence[Tensor]) -> Dist:
        """The distribution, its parameters moved."""
        values = {}
        for name, start, unit, move in zip(self.names, self.start, self.units, moves, strict=True):
            values[name] = transform_to(self.kind.arg_constraints[name])(start + unit * move)
        made = self.kind(**values, validate_args=False)
        extra = self.event_dims - len(made.event_shape)
        return made.to_event(extra) if extra else made


_DERIVED = {"covariance_matrix", "precision_matrix", "probs"}  # another parameter says it, too


def _read(fn: Dist) -> _Reading | None:
    """Kind and parameters of a distribution; None if they don't make it again."""
    base = fn
    while isinstance(base, Independent):
        base = base.base_dist
    try:
        reading = _parameters_of(base, len(fn.event_shape))
        start = reading.start
        made, draw = reading.build([torch.zeros_like(p) for p in start]), fn.rsample()
        densities = made.log_prob(draw), fn.log_prob(draw)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return None
    is_same = made.batch_shape == fn.batch_shape and torch.allclose(*densities, rtol=1e-4)
    return reading if is_same and start else None


def _parameters_of(base: Dist, event_dims: int) -> _Reading:
    limits = {k: v for k, v in base.arg_constraints.items() if k not in _DERIVED}
    start = [transform_to(v).inv(getattr(base, k)).detach() for k, v in limits.items()]
    units = [torch.ones_like(p) for p in start]
    if "loc" in limits:  # moves in standard deviations
        unit = base.scale if "scale" in limits else base.stddev
        units[list(limits).index("loc")] = unit.expand_as(base.loc)
    return _Reading(type(base), list(limits), start, units, event_dims)


def refuse_masks(density: LatentDensity) -> None:
    """Refuses latents that are masked out, whose best q is as wide as can be."""
    terms = _one_pass(density)
    for name in density.sites:
        for trace in (terms.guide_trace, terms.model_trace):
            mask = trace.nodes[name]["mask"]
            if mask is not None and not bool(torch.as_tensor(mask).all()):
                where, actual = f"a local fit at site '{name}'", "a mask that leaves some out"
                fixes = ["data without padding rows", "poutine.mask around the observed site alone"]
                raise UndefinedError(where, "latents that all count", actual, fixes)


def _one_pass(density: LatentDensity) -> Terms:
    with torch.no_grad():
        return compute(density.structure, density.batch, given=density.given)
