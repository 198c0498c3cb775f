"""Distributions taken apart: their arguments, what they wrap, and the same ones made again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform
from torch.distributions.constraints import Constraint

from pvae import randomness
from pvae.errors import ArgumentError
from pvae.internals import mask_of
from pvae.types import Dist

__all__ = [
    "Template",
    "arguments_of",
    "base_of",
    "is_improper",
    "is_point",
    "is_transformed",
    "log_density_of_delta",
    "masks_of",
    "mean_of",
    "take_apart",
]


# What a distribution wraps


def base_of(fn: Dist) -> Dist:
    """The distribution inside `Independent` and masks.

    Example:
        >>> type(base_of(dist.Normal(torch.zeros(3), 1.0).mask(False).to_event(1))).__name__
        'Normal'
    """
    while isinstance(fn, (Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn


def masks_of(fn: Dist) -> list[tuple[Tensor | bool, int]]:
    """The masks inside a distribution, each with the number of event dimensions that it covers."""
    masks = []
    while isinstance(fn, (Independent, MaskedDistribution)):
        if isinstance(fn, MaskedDistribution):
            masks.append((mask_of(fn), len(fn.event_shape)))
        fn = fn.base_dist
    return masks


def is_improper(fn: Dist) -> bool:
    """Whether a density has no finite integral, as a flat prior's."""
    fn = base_of(fn)
    return isinstance(fn, dist.ImproperUniform) or bool(getattr(fn, "is_improper", False))


def is_point(fn: Dist) -> bool:
    """Whether a distribution is a point mass (Delta), also under transforms and expansions."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def is_transformed(fn: Dist) -> bool:
    """Whether a distribution is of transformed draws, as a flow's is."""
    return isinstance(base_of(fn), dist.TransformedDistribution)


def log_density_of_delta(fn: Dist) -> Tensor | None:
    """The log density that a Delta carries, also inside Independent and masks; None for others.

    It is never read off by comparing values, which are unequal after any round trip.
    """
    if isinstance(fn, dist.Delta):
        return fn.log_density
    if not isinstance(fn, (Independent, MaskedDistribution)):
        return None
    inner = log_density_of_delta(fn.base_dist)
    if inner is None or isinstance(fn, Independent):
        return None if inner is None else sum_rightmost(inner, fn.reinterpreted_batch_ndims)
    return scale_and_mask(inner, mask=mask_of(fn))


def mean_of(fn: Dist) -> Tensor | None:
    """A distribution's mean; None if it isn't known."""
    try:
        return fn.mean
    except (NotImplementedError, AttributeError):
        return None


# What a distribution was made with

_SAME = (("probs", "logits"), ("gate", "gate_logits"))
"""Arguments of which a constructor takes one, as each gives the other."""
_FACTOR = "scale_tril"
"""Taken before other forms of a covariance, as densities use it: nothing is factorised again."""
_OTHER_FORMS = {"covariance_matrix", "precision_matrix"}
_ATTRIBUTES = {"base_distribution": "base_dist", "transform": "inv", "tseq": "transforms"}
"""Attributes that hold an argument of another name."""


def arguments_of(thing: object) -> dict[str, object]:
    """The constructor arguments of a distribution, a transform or a constraint, by name.

    ``type(thing)(**arguments_of(thing))`` is the same again. Of arguments that say the same, only
    one is there: the one of ``probs`` and ``logits`` that it was made with, and ``scale_tril``
    of the forms of a covariance.

    Raises:
        AttributeError: If it doesn't keep one of its arguments.

    Example:
        >>> arguments_of(dist.Normal(0.0, 2.0))
        {'loc': tensor(0.), 'scale': tensor(2.)}
    """
    names = list(_argument_names(type(thing)))
    left_out = set(_OTHER_FORMS if _FACTOR in names else ())
    for same in _SAME:
        if set(same) <= set(names):
            left_out |= set(same) - {_first_kept(thing, same) or same[-1]}
    values = {name: _attribute(thing, name) for name in names if name not in left_out}
    if values.get("validate_args", True) is None:
        del values["validate_args"]
    return values


def _argument_names(kind: type) -> tuple[str, ...]:
    _, *parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    if kind.__init__ is object.__init__:  # type: ignore[misc]
        return ()
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise AttributeError(str(parameter))
    return tuple(parameter.name for parameter in parameters)


def _first_kept(thing: object, names: tuple[str, ...]) -> str | None:
    """The first of the names that a distribution, or one inside it, has a value for."""
    own = next((key for key in vars(thing) if key in names), None)
    inner = (value for value in vars(thing).values() if isinstance(value, Distribution))
    return own or next(filter(None, (_first_kept(each, names) for each in inner)), None)


def _attribute(thing: object, name: str) -> object:
    if name == "validate_args":
        return vars(thing).get("_validate_args")
    for candidate in (name, f"_{name}", _ATTRIBUTES.get(name, name)):
        is_method = inspect.isfunction(inspect.getattr_static(type(thing), candidate, None))
        if hasattr(thing, candidate) and not is_method:
            return getattr(thing, candidate)
    raise AttributeError(name)


# The same made again


class _Slot(str):
    """The place of a tensor in a template: its name."""


@dataclass(frozen=True)
class Template:
    """The class of a distribution, and its arguments with marked places for tensors."""

    kind: Callable[..., object]
    arguments: Mapping[str, object]

    def build(self, tensors: Mapping[str, Tensor | None]) -> Dist:
        """The distribution, made anew of tensors by the names that `take_apart` gave.

        Nothing that another one has computed and kept (probabilities from logits, a transform's
        last value) is in it.
        """
        return self.kind(**{k: _filled(v, tensors) for k, v in self.arguments.items()})


def _filled(value: object, tensors: Mapping[str, Tensor | None]) -> object:
    if isinstance(value, _Slot):
        return tensors[value]
    if isinstance(value, Template):
        return value.build(tensors)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_filled(v, tensors) for v in value)
    return value


def take_apart(fn: Dist, where: str) -> tuple[Template, dict[str, Tensor]]:
    """A distribution as a template and its tensors, so that these can be moved, saved and loaded.

    It goes by the arguments of constructors, of the distribution and of all that is in it: wrapped
    distributions, mixtures, transforms, supports.

    Arguments:
        fn: The distribution.
        where: Name for the `ArgumentError` about one that can't be made again of its arguments, or
            has trainable tensors.

    Example:
        >>> template, tensors = take_apart(dist.Normal(0.0, 1.0), "prior")
        >>> template.build({name: t.double() for name, t in tensors.items()}).sample().dtype
        torch.float64
    """
    tensors: dict[str, Tensor] = {}
    template = cast("Template", _emptied(fn, where, "", tensors))
    try:
        is_same = _is_same(fn, template.build(tensors))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise _unknown(where, f"{type(fn).__name__}: {error}") from error
    if not is_same:
        raise _unknown(where, f"{type(fn).__name__}, whose attributes make another distribution")
    return template, tensors


def _emptied(value: object, where: str, path: str, tensors: dict[str, Tensor]) -> object:
    """The value with slots in place of tensors, which go into ``tensors`` by path."""
    if isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.requires_grad):
        expected = "a distribution without trainable tensors, which it hides from the optimiser"
        actual = type(value).__name__ + (f" at {path}" if path else "")
        fixes = ["pass a Conditional, or a module that builds the distribution in forward"]
        raise ArgumentError(where, expected, actual, fixes)
    if isinstance(value, Tensor):
        tensors[path] = value
        return _Slot(path)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_emptied(v, where, f"{path}_{i}", tensors) for i, v in enumerate(value))
    if isinstance(value, (Distribution, Transform, Constraint)):
        return _without_tensors(value, where, path, tensors)
    return value


def _without_tensors(
    value: Distribution | Transform | Constraint, where: str, path: str, tensors: dict[str, Tensor]
) -> object:
    try:
        arguments = arguments_of(value)
    except AttributeError as error:
        if isinstance(value, Constraint) and not any(map(torch.is_tensor, vars(value).values())):
            return value
        what = f"{type(value).__name__}, which doesn't keep its argument {error}"
        raise _unknown(where, what) from error
    paths = {k: f"{path}_{k}".lstrip("_") for k in arguments}
    inner = {k: _emptied(v, where, paths[k], tensors) for k, v in arguments.items()}
    return Template(type(value), inner)


def _is_same(fn: Dist, other: Dist) -> bool:
    """Whether two distributions agree in shape and, if one can be drawn, on the density of a draw.

    An argument and an attribute of one name need not be the same thing.
    """
    if (fn.batch_shape, fn.event_shape) != (other.batch_shape, other.event_shape):
        return False
    try:
        with torch.no_grad(), randomness.forked(seed=0), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draw = fn.sample()
            expected = fn.log_prob(draw)
    except (NotImplementedError, ValueError, RuntimeError):
        return True  # neither draws nor densities
    return torch.allclose(other.log_prob(draw), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def _unknown(where: str, what: str) -> ArgumentError:
    expected = "a distribution that can be made again of its constructor's arguments"
    fixes = ["pass a function that builds it: lambda: dist.Normal(loc, scale).to_event(1)"]
    return ArgumentError(where, expected, what, fixes)
