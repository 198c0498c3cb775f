"""Conditional: a module that turns a context into a Pyro distribution.

Priors, likelihoods and guide families are all of this one kind. Whatever else describes a
distribution (an instance, a function, a module, a zuko flow) becomes one with `as_conditional`.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.zuko import ZukoToPyro
from torch import Tensor, nn
from torch.nn import functional as F

from pvae.described import Described
from pvae.distributions import take_apart
from pvae.errors import ArgumentError, PairError, as_shape
from pvae.types import Dist, Shape

__all__ = [
    "Conditional",
    "FromNetwork",
    "NetworkLike",
    "Unconditional",
    "as_conditional",
    "positive_scale",
    "split_parameters",
]

NetworkLike = nn.Module | Callable[[int], nn.Module]
"""A network, or a function that builds it from the number of parameters per value."""


class Conditional(Described, ABC):
    """The abstract conditional distribution: ``forward(*context)`` returns a Pyro distribution.

    To write one:

    1. Call ``super().__init__(event_shape)`` with the shape of one value (a latent, an image).
    2. Hold parameters as ``nn.Parameter`` and constants as buffers, and build the distribution
       from them inside ``forward``, so that all of it follows ``.to(device)`` and ``.double()``.
    3. Return a distribution with ``event_shape`` complete (``.to_event(k)``) and ``batch_shape``
       equal to the leading dimensions of the context, ``(N,)`` or ``(K, N)``; without a context,
       or ignoring it, ``()``.

    `pvae.testing.check_conditional` then tests the rest of the contract.

    Arguments:
        event_shape: Shape of one value; ``None`` where only a call can tell.
    """

    event_shape: tuple[int, ...] | None

    def __init__(self, event_shape: Shape | None = None) -> None:
        super().__init__()
        self.event_shape = None if event_shape is None else as_shape("event_shape", event_shape)

    @property
    def is_point(self) -> bool:
        """Whether the distribution is a point mass, the degenerate member of its family."""
        return False

    @abstractmethod
    def forward(self, *context: Tensor) -> Dist:
        """The distribution given the context."""

    def __call__(self, *context: Tensor) -> Dist:
        """The distribution given the context, its kind and event shape checked."""
        fn, name = super().__call__(*context), type(self).__name__
        if not isinstance(fn, dist.Distribution):
            fixes = ["build it from pyro.distributions, not torch.distributions"]
            raise PairError(name, "forward to return a Pyro distribution", _class_of(fn), fixes)
        if self.event_shape is not None and tuple(fn.event_shape) != self.event_shape:
            missing = len(self.event_shape) - len(fn.event_shape)
            fixes = [f".to_event({missing})"] if missing > 0 else []
            expected = f"a distribution with event_shape {self.event_shape}"
            raise PairError(name, expected, _shapes_of(fn), fixes)
        return fn


def _class_of(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"


def _shapes_of(fn: Dist) -> str:
    return f"event_shape {tuple(fn.event_shape)}, batch_shape {tuple(fn.batch_shape)}"


def _with_event(fn: Dist, event_shape: tuple[int, ...]) -> Dist:
    """Takes the last dimensions of a batch as an event, as many as the event still lacks."""
    if not isinstance(fn, dist.Distribution):
        return fn
    missing = len(event_shape) - len(fn.event_shape)
    return fn.to_event(missing) if 0 < missing <= len(fn.batch_shape) else fn


class Unconditional(Conditional):
    """The abstract distribution that ignores the context, as most priors do.

    To write one, hold parameters as ``nn.Parameter``, give constants to ``super().__init__``, and
    define `distribution` of them; its dimensions become the event.

    Arguments:
        event_shape: Shape of one value, an integer for a vector.
        constants: Numbers by name; each becomes a buffer of shape ``event_shape``.

    Example:
        >>> class Cauchy(Unconditional):
        ...     def __init__(self, event_shape, scale=1.0):
        ...         super().__init__(event_shape, loc=0.0, scale=scale)
        ...
        ...     def distribution(self):
        ...         return dist.Cauchy(self.loc, self.scale)
        >>> Cauchy(2)().log_prob(torch.zeros(2))
        tensor(-2.2895)
    """

    event_shape: tuple[int, ...]

    def __init__(self, event_shape: Shape, **constants: float) -> None:
        super().__init__(event_shape)
        for name, number in constants.items():
            self.register_buffer(name, torch.full(self.event_shape, float(number)))

    @abstractmethod
    def distribution(self) -> Dist:
        """The distribution, of shape ``event_shape``."""

    def forward(self, *context: Tensor) -> Dist:
        """The distribution, whatever the context."""
        return _with_event(self.distribution(), self.event_shape)


class FromNetwork(Conditional):
    """The abstract conditional whose parameters a network computes from the context.

    To write one, set ``self.num_params`` before ``super().__init__`` and define `distribution`,
    which gets that many tensors of shape ``(..., *event_shape)``; the last dimensions of what it
    returns become the event.

    The network may return one tensor, which is split (see `split_parameters`), or a tuple of
    ``num_params`` tensors, which is taken as it is.

    Arguments:
        network: A module from the context to the parameters, or a function that builds it from
            ``num_params``, such as ``lambda p: MLP(20, 784 * p)``.
        event_shape: Shape of one value.
    """

    event_shape: tuple[int, ...]
    num_params: int = 1

    def __init__(self, network: NetworkLike, event_shape: Shape) -> None:
        super().__init__(event_shape)
        self.network = network if isinstance(network, nn.Module) else network(self.num_params)
        if not isinstance(self.network, nn.Module):
            expected = "a torch module, or a function from the number of parameters to one"
            where = f"{type(self).__name__}.network"
            raise ArgumentError(where, expected, type(self.network).__name__)

    @abstractmethod
    def distribution(self, *params: Tensor) -> Dist:
        """The distribution with these parameters, each of shape ``(..., *event_shape)``."""

    def forward(self, *context: Tensor) -> Dist:
        """The distribution given the context."""
        output = self.network(*context)
        params = split_parameters(output, self.num_params, self.event_shape, type(self).__name__)
        return _with_event(self.distribution(*params), self.event_shape)


def split_parameters(
    output: Tensor | Sequence[Tensor],
    num_params: int,
    event_shape: tuple[int, ...],
    where: str = "network",
) -> tuple[Tensor, ...]:
    """Splits the output of a network into ``num_params`` tensors of shape ``(..., *event_shape)``.

    A tuple of tensors is taken as it is. One tensor may have the parameters along the first axis
    of the event (``(..., P * C, H, W)``, as convolutions write them), or all flat
    (``(..., P * C * H * W)``, as linear layers do). So an encoder with one output of size
    ``2 * latent_dim`` gives location and scale.

    Arguments:
        output: What the network returned.
        num_params: P, the number of parameters per value.
        event_shape: Shape of one value.
        where: Name for the `PairError` about an output that doesn't fit.

    Example:
        >>> loc, scale = split_parameters(torch.zeros(5, 2 * 3), 2, (3,))
        >>> loc.shape
        torch.Size([5, 3])
    """
    given = (output,) if isinstance(output, Tensor) else tuple(output)
    parts = _split(output, num_params, event_shape) if isinstance(output, Tensor) else given
    ends = {tuple(p.shape[p.dim() - len(event_shape) :]) for p in parts}
    if len(parts) == num_params and ends <= {event_shape}:
        return parts
    size = num_params * math.prod(event_shape)
    raise PairError(
        f"{where}.network",
        f"{num_params} parameter(s) for each value of event_shape {event_shape}, that is "
        f"(..., {size}) or {num_params} tensor(s) (..., {str(event_shape)[1:-1]})",
        f"output of shape {', '.join(str(tuple(o.shape)) for o in given)}",
        [f"give the network {size} outputs", "change event_shape"],
    )


def _split(output: Tensor, num_params: int, event_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """One tensor split along the first axis of the event, or the last axis where all is flat."""
    rank = len(event_shape)
    is_flat = output.shape[-1:] == (num_params * math.prod(event_shape),)
    is_one_row = rank > 1 and output.dim() == rank and is_flat  # not one value without a row
    shape = (num_params * event_shape[0], *event_shape[1:]) if rank else ()
    if rank and tuple(output.shape[-rank:]) == shape and not is_one_row:
        return output.chunk(num_params, dim=-rank)
    if is_flat:
        flat = output.reshape(*output.shape[:-1], num_params, *event_shape)
        return flat.unbind(dim=-rank - 1)
    return (output,)


_AT_ONE = math.log(math.expm1(1.0))


def positive_scale(raw: Tensor) -> Tensor:
    r"""A positive scale from any real number: :math:`\mathrm{softplus}(r + c) + 10^{-6}`.

    With :math:`c = \log(e - 1)` a fresh network, whose outputs are near 0, starts near scale 1,
    which is the prior's. It neither overflows nor reaches 0, and it has a gradient everywhere.

    Example:
        >>> positive_scale(torch.tensor([-1e4, 0.0, 1e4]))
        tensor([1.0000e-06, 1.0000e+00, 1.0001e+04])
    """
    return F.softplus(raw + _AT_ONE) + 1e-6


class Fixed(Conditional):
    """A distribution instance, its tensors held as buffers so that they move with the module.

    Each call builds the distribution anew around the buffers, so nothing that it computes and
    keeps (probabilities from logits, say) outlives a move or a load.
    """

    def __init__(self, fn: Dist) -> None:
        super().__init__(tuple(fn.event_shape) or None)
        where = f"{type(fn).__name__} instance"
        if fn.batch_shape:
            expected = "batch_shape (), so that one draw is one whole value"
            fixes = [f".to_event({len(fn.batch_shape)})"]
            raise ArgumentError(where, expected, _shapes_of(fn), fixes)
        self._template, tensors = take_apart(fn, where)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.clone())

    @property
    def fn(self) -> Dist:
        """The distribution of the buffers as they are."""
        return self._template.build(self._buffers)

    def forward(self, *context: Tensor) -> Dist:
        return self.fn


class Called(Conditional):
    """A function or module that returns a distribution."""

    def __init__(self, function: Callable[..., Dist]) -> None:
        super().__init__()
        self.function = function  # a module is registered by this line
        called = function.forward if isinstance(function, nn.Module) else function
        kinds = [p.kind for p in inspect.signature(called).parameters.values()]
        takes_all = inspect.Parameter.VAR_POSITIONAL in kinds
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._takes = None if takes_all else sum(kind in positional for kind in kinds)

    def forward(self, *context: Tensor) -> Dist:
        fn = self.function(*context[: self._takes])
        if isinstance(fn, (Tensor, tuple, list)):
            where, expected = type(self.function).__name__, "a Pyro distribution"
            fixes = ["guides.MeanField(network, 2)", "likelihoods.Gaussian(network, event_shape)"]
            raise ArgumentError(where, expected, "tensors: it is a network", fixes)
        return fn


class Flow(Conditional):
    """A zuko flow: its features are the event, its context the concatenated context."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, *context: Tensor) -> Dist:
        dtype = next(self.flow.parameters()).dtype
        joined = torch.cat([c.to(dtype) for c in context], -1) if context else None
        return ZukoToPyro(self.flow(joined))


def as_conditional(thing: object, where: str = "distribution") -> Conditional:
    """Turns whatever describes a distribution into a `Conditional`.

    Arguments:
        thing: A `Conditional`; a Pyro distribution with ``batch_shape`` ``()``; a function or a
            module that returns a Pyro distribution and takes the context, or as much of it as it
            has arguments for; a zuko flow.
        where: Name for error messages.

    Raises:
        ArgumentError: If ``thing`` is none of these, or a distribution that hides trainable
            tensors, or one with a batch shape.

    Note:
        Importing zuko turns torch's argument validation off for the whole process. A flow that
        comes in here sets it back to what Pyro's own validation is.

    Example:
        >>> prior = as_conditional(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> prior.double()().sample().dtype
        torch.float64
    """
    if isinstance(thing, Conditional):
        return thing
    if isinstance(thing, dist.Distribution):
        return Fixed(thing)
    if isinstance(thing, nn.Module) and any(
        kind.__module__.split(".")[0] == "zuko" for kind in type(thing).__mro__
    ):
        validates = pyro.settings.get("validate_distributions_pyro")
        pyro.settings.set(validate_distributions_torch=validates)
        return Flow(thing)
    if callable(thing) and not inspect.isclass(thing):
        return Called(thing)
    actual, fixes = _class_of(thing), ["priors.StandardNormal(20)"]
    if inspect.isclass(thing):
        actual = f"the class {thing.__name__}"
        fixes = ["an instance, such as priors.StandardNormal(20)"]
    elif isinstance(thing, torch.distributions.Distribution):
        fixes = [f"pyro.distributions.{type(thing).__name__}"]
    expected = "a Conditional, a Pyro distribution, what returns one when called, or a zuko flow"
    raise ArgumentError(where, expected, actual, fixes)
