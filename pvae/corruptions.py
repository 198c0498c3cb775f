"""Corruptions x -> x~ of what a denoising guide sees; the model scores the clean x.

A corruption is any module (or function) from a batch to one of the same shape. In a pair it acts
in training mode alone, drawn afresh for every batch; called by itself, it acts at once:
``vae.reconstruct(corruption(x))``. Several in a row are an ``nn.Sequential``.

References:
    Stacked Denoising Autoencoders (Vincent et al., 2010),
    https://www.jmlr.org/papers/v11/vincent10a.html
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from pvae.described import Described
from pvae.errors import ArgumentError, PairError, check_int, check_number
from pvae.shelf import Shelf

__all__ = [
    "BlockMasking",
    "Corruption",
    "Downsampling",
    "Masking",
    "Noise",
    "SaltAndPepper",
    "named",
]


def _rate(where: str, rate: float) -> float:
    if check_number(where, rate, minimum=0) > 1:
        raise ArgumentError(where, "a probability", f"{rate}")
    return float(rate)


class Corruption(Described, ABC):
    """The abstract corruption that has a name: it is made from its strength alone.

    To write one, define ``forward(x)``, and `for_range` where the strength is in units of x.
    """

    @classmethod
    def for_range(cls, strength: float, low: float, high: float, unit: float) -> Corruption:
        """The corruption for data of a certain range, as the command line makes it.

        Arguments:
            strength: The first argument of the class, for data from 0 to 1.
            low: The smallest value that data have.
            high: The largest one.
            unit: What 1 is in units of x: 16 for counts from 0 to 16.
        """
        return cls(strength)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The corrupted batch."""


named: Shelf[type[Corruption]] = Shelf("corruption")
"""Corruptions by name."""


@named.put("noise")
class Noise(Corruption):
    r"""Additive noise, :math:`\tilde x = x + \sigma n` with :math:`n \sim N(0, I)`.

    Arguments:
        sigma: Standard deviation of the added noise, in units of x; the command line takes it for
            data from 0 to 1.

    Example:
        >>> Noise(0.1)(torch.zeros(100, 64)).std() < 0.11
        tensor(True)
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = check_number("Noise.sigma", sigma, minimum=0)

    @classmethod
    def for_range(cls, strength: float, low: float, high: float, unit: float) -> Noise:
        """The noise, its scale in units of x."""
        return cls(strength * unit)

    def forward(self, x: Tensor) -> Tensor:
        """The corrupted batch."""
        return x + self.sigma * torch.randn_like(x)


@named.put("mask")
class Masking(Corruption):
    r"""Masking, :math:`\tilde x = x \cdot m`: each entry is put to 0 with probability ``rate``.

    Arguments:
        rate: Probability that an entry is put to 0.

    Example:
        >>> Masking(0.5)(torch.ones(2, 4)).unique()
        tensor([0., 1.])
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = _rate("Masking.rate", rate)

    def forward(self, x: Tensor) -> Tensor:
        """The corrupted batch."""
        return x * (torch.rand_like(x) >= self.rate)


@named.put("salt_and_pepper")
class SaltAndPepper(Corruption):
    """Each entry is put to ``low`` or ``high``, with probability ``rate / 2`` each.

    Arguments:
        rate: Probability that an entry is put to the smallest or the largest value.
        low: The smallest value that data have.
        high: The largest one.

    Example:
        >>> SaltAndPepper(1.0)(torch.full((2, 4), 0.5)).unique()
        tensor([0., 1.])
    """

    def __init__(self, rate: float, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        self.rate = _rate("SaltAndPepper.rate", rate)
        self.low = check_number("SaltAndPepper.low", low)
        self.high = check_number("SaltAndPepper.high", high)

    @classmethod
    def for_range(cls, strength: float, low: float, high: float, unit: float) -> SaltAndPepper:
        """Salt and pepper that are the largest and the smallest value of the data."""
        return cls(strength, low, high)

    def forward(self, x: Tensor) -> Tensor:
        """The corrupted batch."""
        u = torch.rand_like(x)
        x = torch.where(u < self.rate, torch.full_like(x, self.low), x)
        return torch.where(u < self.rate / 2, torch.full_like(x, self.high), x)


def _image(where: str, x: Tensor) -> tuple[int, int]:
    if x.dim() < 3:
        fixes = ["Masking, for data without rows and columns"]
        raise PairError(where, "images, shape (N, ..., H, W)", f"{tuple(x.shape)}", fixes)
    return x.shape[-2], x.shape[-1]


@named.put("block")
class BlockMasking(Corruption):
    """A square of each image is put to ``fill``; its place is drawn for each image.

    The square lies wholly inside, in all channels alike.

    Arguments:
        size: Side of a square that is put to 0 in each image, in pixels.
        fill: What is put there.

    Example:
        >>> int((BlockMasking(3)(torch.ones(1, 1, 8, 8)) == 0).sum())
        9
    """

    def __init__(self, size: int, fill: float = 0.0) -> None:
        super().__init__()
        self.size = check_int("BlockMasking.size", size)
        self.fill = check_number("BlockMasking.fill", fill)

    def forward(self, x: Tensor) -> Tensor:
        """The corrupted batch."""
        height, width = _image("BlockMasking", x)
        if self.size > min(height, width):
            expected = f"images of at least {self.size} pixels a side"
            raise PairError("BlockMasking", expected, f"{height}x{width}")
        lost = _within(x, height, self.size)[:, :, None] & _within(x, width, self.size)[:, None, :]
        lost = lost.reshape(len(x), *[1] * (x.dim() - 3), height, width)
        return torch.where(lost, torch.full_like(x, self.fill), x)


def _within(x: Tensor, length: int, size: int) -> Tensor:
    """For each image, which of ``length`` places lie in an interval of that size at random."""
    start = torch.randint(length - size + 1, (len(x), 1), device=x.device)
    place = torch.arange(length, device=x.device)
    return (place >= start) & (place < start + size)


@named.put("downsample")
class Downsampling(Corruption):
    """Lower resolution in the same size: each block of pixels is replaced by its mean.

    Nothing is random; a pair trained with it restores what a small image has lost.

    Arguments:
        factor: Side of the blocks that are averaged, in pixels; an image keeps ``1 / factor**2`` of
            its numbers.

    Example:
        >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> Downsampling(2)(x)[0, 0, 0]
        tensor([2.5000, 2.5000, 4.5000, 4.5000])
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = check_int("Downsampling.factor", factor, minimum=2)

    def small(self, x: Tensor) -> Tensor:
        """The small images, shape ``(N, C, ceil(H / factor), ceil(W / factor))``."""
        _image("Downsampling", x)
        images = x.reshape(-1, 1, *x.shape[-2:])
        small = F.avg_pool2d(images, self.factor, ceil_mode=True, count_include_pad=False)
        return small.reshape(*x.shape[:-2], *small.shape[-2:])

    def forward(self, x: Tensor) -> Tensor:
        """The corrupted batch."""
        height, width = _image("Downsampling", x)
        small = self.small(x)
        large = small.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)
        return large[..., :height, :width]
