"""Priors p(z).

A prior is a `pvae.Conditional` over one latent, made from the shape of the latent (``event_shape``,
an integer for a vector). Those here ignore their context; for a prior given labels use a guide
family, which is the same kind of thing:
``guides.MeanField(nn.Embedding(10, 4), 2)`` is p(z | y) for ten classes. Any Pyro distribution or
zuko flow may stand in a prior's place, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Size, Tensor, nn
from torch.distributions.constraints import Constraint

from pvae.conditional import Unconditional
from pvae.errors import UndefinedError, check_number
from pvae.shelf import Shelf
from pvae.types import Dist, Shape

__all__ = ["Flat", "Laplace", "Normal", "StandardNormal", "StudentT", "named"]

named: Shelf[Callable[..., Unconditional]] = Shelf("prior")
"""Priors by name: each is built from the shape of the latent alone."""


@named.put("standard_normal")
class StandardNormal(Unconditional):
    r"""The prior :math:`p(z) = N(0, I)`.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), https://arxiv.org/abs/1312.6114

    Example:
        >>> StandardNormal(2)().log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, event_shape: Shape) -> None:
        super().__init__(event_shape, loc=0.0, scale=1.0)

    def distribution(self) -> Dist:
        """N(0, I)."""
        return dist.Normal(self.loc, self.scale)


@named.put("normal")
class Normal(Unconditional):
    r"""A normal prior with learned location and scale, :math:`N(\mu, \mathrm{diag}\,\sigma^2)`.

    Example:
        >>> sorted(name for name, _ in Normal(2).named_parameters())
        ['loc', 'log_scale']
    """

    def __init__(self, event_shape: Shape) -> None:
        super().__init__(event_shape)
        self.loc = nn.Parameter(torch.zeros(self.event_shape))
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def distribution(self) -> Dist:
        """The normal distribution."""
        return dist.Normal(self.loc, self.log_scale.exp())


@named.put("laplace")
class Laplace(Unconditional):
    r"""The sparse prior :math:`p(z) = \prod_d \tfrac{\lambda}{2} e^{-\lambda |z_d|}`.

    With a point-mass guide it is the L1 penalty :math:`\lambda \|z\|_1`, up to the constant
    :math:`D \log(2 / \lambda)`.

    Arguments:
        rate: :math:`\lambda`; the distribution's scale is its inverse.

    Example:
        >>> prior = Laplace(3, rate=2.0)()
        >>> prior.log_prob(torch.zeros(3)) - prior.log_prob(torch.ones(3))
        tensor(6.)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, event_shape: Shape, rate: float = 1.0) -> None:
        self.rate = check_number("Laplace.rate", rate, above=0)
        super().__init__(event_shape, loc=0.0, scale=1.0 / self.rate)

    def distribution(self) -> Dist:
        """The Laplace distribution."""
        return dist.Laplace(self.loc, self.scale)


@named.put("student_t")
class StudentT(Unconditional):
    r"""A sparse prior with heavy tails, :math:`p(z) = \prod_d \mathrm{St}(z_d; \nu, 0, s)`.

    With a point-mass guide it is the penalty
    :math:`\tfrac{\nu + 1}{2} \sum_d \log(1 + z_d^2 / (\nu s^2))`, which pulls small entries to 0
    and leaves large ones alone.

    References:
        Emergence of simple-cell receptive field properties by learning a sparse code for natural
        images (Olshausen & Field, 1996), https://doi.org/10.1038/381607a0

    Arguments:
        df: :math:`\nu`, degrees of freedom.
        scale: s.

    Example:
        >>> prior = StudentT(1, df=1.0, scale=0.5)()
        >>> prior.log_prob(torch.zeros(1)) - prior.log_prob(torch.ones(1))  # log(1 + 1 / 0.25)
        tensor(1.6094)
    """

    df: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, event_shape: Shape, df: float = 3.0, scale: float = 1.0) -> None:
        df = check_number("StudentT.df", df, above=0)
        scale = check_number("StudentT.scale", scale, above=0)
        super().__init__(event_shape, df=df, loc=0.0, scale=scale)

    def distribution(self) -> Dist:
        """Student's t distribution."""
        return dist.StudentT(self.df, self.loc, self.scale)


class FlatDistribution(dist.TorchDistribution):
    """The improper density 1 on the whole space: ``log_prob`` is 0, and there is no sampling."""

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    has_rsample = True
    is_improper = True

    def __init__(self, event_shape: Sequence[int], batch_shape: Sequence[int] = ()) -> None:
        super().__init__(Size(batch_shape), Size(event_shape), validate_args=False)

    @property
    def support(self) -> Constraint:
        """All real values."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FlatDistribution:
        """The same density for more data."""
        return FlatDistribution(self.event_shape, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero for each value."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return value.new_zeros(torch.broadcast_shapes(self.batch_shape, batch))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Raises: a flat density has no distribution to draw from."""
        actual = "an improper one: density 1 everywhere has no distribution"
        fixes = ["fit an ex-post density to the codes vae.encode(x), draw z from it, vae.decode(z)"]
        fixes += ["prior=priors.StandardNormal, for a model that can be sampled as it is"]
        raise UndefinedError("priors.Flat", "a proper prior to draw z from", actual, fixes)

    sample = rsample


@named.put("flat")
class Flat(Unconditional):
    """The improper flat prior, density 1 everywhere: the prior of a plain autoencoder.

    It can be scored but not sampled; to generate, fit an ex-post density to the codes and decode
    its draws.

    References:
        From Variational to Deterministic Autoencoders (Ghosh et al., 2020),
        https://arxiv.org/abs/1903.12436

    Example:
        >>> Flat(2)().log_prob(torch.randn(5, 2))
        tensor([0., 0., 0., 0., 0.])
    """

    def __init__(self, event_shape: Shape) -> None:
        super().__init__(event_shape)

    def distribution(self) -> Dist:
        """The flat density."""
        return FlatDistribution(self.event_shape)
