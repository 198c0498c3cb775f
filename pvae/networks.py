"""Networks for encoders and decoders: plain torch, no distributions.

All of them take any leading batch dimensions (particles, data), and further inputs, such as
labels, which are joined to the first: integers as one-hot vectors, floating numbers as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pvae.annotations import strict
from pvae.described import Described
from pvae.errors import (
    ArgumentError,
    PairError,
    as_shape,
    as_widths,
    check_int,
    check_memory,
    check_number,
)
from pvae.internals import Convolution
from pvae.types import Shape

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "activation_named",
    "check_weights",
    "unit_norm",
]


@strict
def activation_named(
    name: str | Callable[[], nn.Module], where: str = "activation"
) -> Callable[[], nn.Module]:
    """The activation class of ``torch.nn`` with that name; what is no string is one already."""
    if not isinstance(name, str):
        return name
    kind = getattr(nn, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ArgumentError(where, "the name of a torch.nn activation", repr(name), ["ReLU"])
    return kind


class _UnitColumns(Described):
    """A weight whose columns, what one input contributes to all outputs, have norm 1."""

    def __init__(self, groups: int = 1, *, transposed: bool = False) -> None:
        super().__init__()
        self.groups, self.transposed = groups, transposed

    def forward(self, weight: Tensor) -> Tensor:
        if self.transposed:  # (inputs, outputs, ...)
            return F.normalize(weight.flatten(1), dim=1).reshape(weight.shape)
        grouped = weight.unflatten(0, (self.groups, -1)).movedim(2, 1)  # group, input, output, ...
        unit = F.normalize(grouped.flatten(2), dim=2).reshape(grouped.shape)
        return unit.movedim(1, 2).flatten(0, 1)


@strict
def unit_norm(network: nn.Module) -> nn.Module:
    """Gives every linear and convolutional layer of a network columns of norm 1; returns it.

    For the decoder of a sparse autoencoder: it can't make up for a code that shrinks, which is how
    a penalty on the code's size is cheated.

    Arguments:
        network: Changed in place.

    Example:
        >>> layer = unit_norm(torch.nn.Linear(3, 4))
        >>> layer.weight.norm(dim=0).allclose(torch.ones(3))
        True
    """
    for module in list(network.modules()):
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", _UnitColumns())
        elif isinstance(module, Convolution):
            unit = _UnitColumns(module.groups, transposed=module.transposed)
            parametrize.register_parametrization(module, "weight", unit)
    return network


def _join(x: Tensor, event_dim: int, context: Sequence[Tensor], context_dim: int) -> Tensor:
    """Flattens the event of x and appends the context, one-hot where it is integer."""
    x = x.flatten(-event_dim) if event_dim > 1 else x
    if not context_dim:
        return x
    if not context:
        expected = f"a context of {context_dim} feature(s) or classes (context_dim={context_dim})"
        fixes = ["pass the labels: model(x, y), guide(x, y)", "context_dim=0"]
        raise PairError("network", expected, "no context", fixes)
    parts = [_features(c, context_dim, x) for c in context]
    batch = torch.broadcast_shapes(x.shape[:-1], *(p.shape[:-1] for p in parts))
    return torch.cat([p.expand(*batch, p.shape[-1]) for p in (x, *parts)], dim=-1)


def check_weights(where: str, shapes: Iterable[Sequence[int]]) -> None:
    """Refuses layers whose weights, of these shapes, take more memory than there is.

    Raises:
        OutOfMemoryError: With widths to try.
    """
    shapes = list(shapes)
    num_bytes = sum(map(math.prod, shapes)) * torch.get_default_dtype().itemsize
    largest = " x ".join(map(str, max(shapes, key=math.prod, default=())))
    name = where.rpartition(".")[2]
    fixes = [f"{name} 256,256" if name.startswith("--") else f"{name}=(256, 256)"]
    check_memory(where, num_bytes, f"weights of up to {largest}", fixes)


def _features(c: Tensor, context_dim: int, x: Tensor) -> Tensor:
    """A context as features in its last axis: one-hot if it is integer."""
    if not c.dtype.is_floating_point:
        try:
            return F.one_hot(c.long(), context_dim).to(x.dtype)
        except RuntimeError as error:
            low, high = int(c.min()), int(c.max())
            expected = f"classes from 0 to {context_dim - 1}, as context_dim={context_dim} says"
            actual, fixes = f"classes from {low} to {high}", [f"context_dim={high + 1}"]
            raise PairError("context", expected, actual, fixes) from error
    if c.shape[-1:] != (context_dim,) or (x.dim() > 1 and c.dim() < 2):
        expected = f"floating features of shape (..., {context_dim}), one row a datum"
        fixes = ["y[:, None], for one number a datum", "integers, for classes"]
        raise PairError("context", expected, f"shape {tuple(c.shape)}", fixes)
    return c.to(x.dtype)


def _as_input(network: nn.Module, x: Tensor, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """The input in the network's precision and scale, its shape checked."""
    if tuple(x.shape[-len(shape) :]) != shape:
        sizes = ", ".join(map(str, shape))
        fixes = [f"x.reshape(-1, {sizes})", "change in_shape"]
        expected = f"input of shape (..., {sizes})"
        raise PairError(type(network).__name__, expected, f"{tuple(x.shape)}", fixes)
    x = x.to(next(network.parameters()).dtype)
    return x if scale == 1.0 else x * scale


class MLP(Described):
    """A multi-layer perceptron, ``(..., *in_shape) -> (..., *out_shape)``.

    Arguments:
        in_shape: Shape of one input.
        out_shape: Shape of one output.
        hidden: Widths of the hidden layers; ``()`` makes the network linear.
        activation: Class of the activation between layers.
        context_dim: Number of features, or of classes, of the further input; 0 for none.
        in_scale: Factor on the input, such as ``1 / 255`` for bytes.
        out_activation: Class of an activation of the output; None for none.

    Example:
        >>> MLP(784, 2 * 20, hidden=(400,))(torch.zeros(3, 128, 784)).shape
        torch.Size([3, 128, 40])
        >>> MLP((1, 28, 28), 20, context_dim=10)(torch.zeros(5, 1, 28, 28), torch.arange(5)).shape
        torch.Size([5, 20])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        hidden: Sequence[int] = (256, 256),
        activation: Callable[[], nn.Module] = nn.ReLU,
        context_dim: int = 0,
        in_scale: float = 1.0,
        out_activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.in_shape = as_shape("MLP.in_shape", in_shape, least=1)
        self.out_shape = as_shape("MLP.out_shape", out_shape, least=1)
        self.context_dim = check_int("MLP.context_dim", context_dim, minimum=0)
        self.in_scale = check_number("in_scale", in_scale)
        widths = [math.prod(self.in_shape) + self.context_dim, *as_widths("MLP.hidden", hidden)]
        check_weights("MLP.hidden", pairwise([*widths, math.prod(self.out_shape)]))
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), activation()]
        layers.append(nn.Linear(widths[-1], math.prod(self.out_shape)))
        layers += [] if out_activation is None else [out_activation()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """The output, ``(..., *out_shape)``."""
        x = _as_input(self, x, self.in_shape, self.in_scale)
        y = self.layers(_join(x, len(self.in_shape), context, self.context_dim))
        return y.unflatten(-1, self.out_shape) if len(self.out_shape) > 1 else y


class _Residual(nn.Module):
    """Two 3x3 convolutions whose output is added to the input (He et al., 2016)."""

    def __init__(self, channels: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.body = nn.Sequential(activation(), first, activation(), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _image_shape(where: str, shape: Shape) -> tuple[int, int, int]:
    sizes = as_shape(where, shape)
    if len(sizes) != 3:
        fixes = ["(1, 28, 28)", "MLP for data without rows and columns"]
        raise ArgumentError(where, "an image shape (channels, height, width)", f"{sizes}", fixes)
    return sizes[0], sizes[1], sizes[2]


def _halvings(height: int, width: int, times: int) -> list[tuple[int, int]]:
    """Image sizes before and after each halving, rounded up: any size will do."""
    sizes = [(height, width)]
    for _ in range(times):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


class ConvEncoder(Described):
    """Strided convolutions over images of any size, ``(..., C, H, W) -> (..., out_features)``.

    Each entry of ``channels`` is one 3x3 convolution of stride 2, which halves height and width,
    rounding up. Arguments that aren't here are those of `MLP`.

    Arguments:
        in_shape: (C, H, W).
        out_features: Size of the output.
        channels: Channels after each halving.
        hidden: Width of the layer between convolutions and output.
        residual: Whether a residual block follows each halving.

    References:
        Deep Residual Learning for Image Recognition (He et al., 2016),
        https://arxiv.org/abs/1512.03385

    Example:
        >>> ConvEncoder((1, 27, 19), 40)(torch.zeros(3, 8, 1, 27, 19)).shape
        torch.Size([3, 8, 40])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_features: int,
        channels: Shape = (32, 64),
        hidden: int = 256,
        activation: Callable[[], nn.Module] = nn.ReLU,
        *,
        residual: bool = False,
        context_dim: int = 0,
        in_scale: float = 1.0,
        out_activation: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.in_shape = _image_shape("ConvEncoder.in_shape", in_shape)
        self.context_dim = check_int("ConvEncoder.context_dim", context_dim, minimum=0)
        self.in_scale = check_number("in_scale", in_scale)
        widths = [self.in_shape[0], *as_widths("ConvEncoder.channels", channels)]
        height, width = _halvings(*self.in_shape[1:], len(widths) - 1)[-1]
        flat = widths[-1] * height * width + self.context_dim
        hidden = check_int("ConvEncoder.hidden", hidden)
        outer = (flat, hidden), (hidden, check_int("ConvEncoder.out_features", out_features))
        check_weights("ConvEncoder.channels", (*((*pair, 9) for pair in pairwise(widths)), *outer))
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
            layers += [_Residual(after, activation)] if residual else []
            layers.append(activation())
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(flat, hidden),
            activation(),
            nn.Linear(hidden, out_features),
            *([] if out_activation is None else [out_activation()]),
        )

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """The output, ``(..., out_features)``."""
        x = _as_input(self, x, self.in_shape, self.in_scale)
        h = self.convolutions(x.reshape(-1, *self.in_shape))
        return self.head(_join(h.reshape(*x.shape[:-3], -1), 1, context, self.context_dim))


class ConvDecoder(Described):
    """The way back to images of any size, ``(..., in_features) -> (..., C, H, W)``.

    Each step doubles height and width (to the very sizes that `ConvEncoder` had) by repeating
    pixels, then convolves 3x3; unlike transposed convolutions this leaves no checkerboard.
    Arguments that aren't here are those of `MLP`.

    Arguments:
        in_features: Size of the latent.
        out_shape: (C, H, W); C counts the parameters per value, too: 2 * C for two of them.
        channels: Channels before each doubling.
        hidden: Width of the layer between latent and convolutions.
        residual: Whether a residual block follows each doubling.

    References:
        Deconvolution and Checkerboard Artifacts (Odena et al., 2016),
        https://distill.pub/2016/deconv-checkerboard/

    Example:
        >>> ConvDecoder(20, (2, 27, 19))(torch.zeros(3, 8, 20)).shape
        torch.Size([3, 8, 2, 27, 19])
    """

    def __init__(
        self,
        in_features: int,
        out_shape: Shape,
        channels: Shape = (64, 32),
        hidden: int = 256,
        activation: Callable[[], nn.Module] = nn.ReLU,
        *,
        residual: bool = False,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.in_features = check_int("ConvDecoder.in_features", in_features)
        self.out_shape = _image_shape("ConvDecoder.out_shape", out_shape)
        self.context_dim = check_int("ConvDecoder.context_dim", context_dim, minimum=0)
        widths = as_widths("ConvDecoder.channels", channels)
        self._sizes = _halvings(*self.out_shape[1:], len(widths))[::-1]
        height, width = self._sizes[0]
        hidden = check_int("ConvDecoder.hidden", hidden)
        features = self.in_features + self.context_dim
        outer = (features, hidden), (hidden, widths[0] * height * width)
        inner = ((*pair, 9) for pair in pairwise([*widths, self.out_shape[0]]))
        check_weights("ConvDecoder.channels", (*inner, *outer))
        self.head = nn.Sequential(
            nn.Linear(features, hidden),
            activation(),
            nn.Linear(hidden, widths[0] * height * width),
            nn.Unflatten(1, (widths[0], height, width)),
        )
        self.steps = nn.ModuleList()
        for before, after in pairwise([*widths, self.out_shape[0]]):
            block = [_Residual(before, activation)] if residual else []
            last = nn.Conv2d(before, after, 3, padding=1)
            self.steps.append(nn.Sequential(activation(), *block, last))

    def forward(self, z: Tensor, *context: Tensor) -> Tensor:
        """The output, ``(..., C, H, W)``."""
        z = _as_input(self, z, (self.in_features,))
        joined = _join(z, 1, context, self.context_dim)
        h = self.head(joined.reshape(-1, joined.shape[-1]))
        for size, step in zip(self._sizes[1:], self.steps, strict=True):
            h = step(F.interpolate(h, size=size, mode="nearest"))
        return h.reshape(*joined.shape[:-1], *self.out_shape)
