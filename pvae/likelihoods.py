"""Likelihoods p(x | z): normalised densities, log probabilities in nats.

A likelihood is a decoder network and the distribution whose parameters it computes, for data of
shape ``event_shape``. The one exception to 'normalised' is `Bernoulli` with ``grey_values=True``,
which has to be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from pvae.conditional import FromNetwork, NetworkLike, positive_scale
from pvae.errors import ArgumentError, check_int, check_number, quoted
from pvae.shelf import Shelf
from pvae.types import Dist, Shape

__all__ = ["Bernoulli", "Binomial", "Categorical", "Gaussian", "Likelihood", "named"]


class Likelihood(FromNetwork):
    """The abstract likelihood that has a name: a decoder and the distribution of its outputs.

    To write one, see `pvae.conditional.FromNetwork`; define `for_levels` where the distribution
    depends on how many values the data can have.
    """

    @classmethod
    def for_levels(cls, levels: int | None) -> Callable[..., Likelihood]:
        """What builds the likelihood of data that can have so many values; None for real numbers.

        Raises:
            ArgumentError: If it is no likelihood of such data.
        """
        return cls


named: Shelf[type[Likelihood]] = Shelf("likelihood")
"""Likelihoods by name."""


def _known(name: str, levels: int | None) -> int:
    """The number of levels, for likelihoods that need to know it."""
    if levels is None:
        expected = "data with known levels (bytes, digits, binarised data)"
        fixes = ['"gaussian"', "levels=256, in Python, for data that are bytes"]
        raise ArgumentError(f"likelihood {name}", expected, "real numbers", fixes)
    return levels


class _GreyBernoulli(dist.Bernoulli):
    """A Bernoulli mass function evaluated at values in between: binary cross-entropy."""

    support = constraints.unit_interval


@named.put("bernoulli")
class Bernoulli(Likelihood):
    r"""Independent binary values, with a logit for each.

    .. math:: \log p(x | z) = \sum_d x_d \log p_d + (1 - x_d) \log(1 - p_d)

    Arguments:
        network: The decoder; one logit for each value.
        grey_values: Accept values between 0 and 1, too. The formula above is then the negative
            binary cross-entropy and *no normalised density*: summed over what x can be it isn't 1
            (it would have to be divided by the continuous Bernoulli's constant), so ELBOs from it
            compare with each other but with nothing else, and bits per dimension mean nothing.

    References:
        The continuous Bernoulli: fixing a pervasive error in variational autoencoders
        (Loaiza-Ganem & Cunningham, 2019), https://arxiv.org/abs/1907.06845

    Example:
        >>> p = Bernoulli(torch.nn.Linear(8, 64), 64)(torch.zeros(5, 8))
        >>> p.log_prob(torch.ones(5, 64)).shape
        torch.Size([5])
    """

    def __init__(
        self, network: NetworkLike, event_shape: Shape, *, grey_values: bool = False
    ) -> None:
        super().__init__(network, event_shape)
        self.grey_values = grey_values

    @classmethod
    def for_levels(cls, levels: int | None) -> Callable[..., Bernoulli]:
        """Refuses data that aren't binary."""
        if levels not in (None, 2):
            fixes = ['--binarize dynamic, or load(..., binarize="dynamic")', '"binomial"']
            actual = f"data with {levels} levels"
            raise ArgumentError("likelihood bernoulli", "binary data", actual, fixes)
        return cls

    def distribution(self, *params: Tensor) -> Dist:
        """The Bernoulli distribution with these logits."""
        kind = _GreyBernoulli if self.grey_values else dist.Bernoulli
        return kind(logits=params[0])


@named.put("binomial")
class Binomial(Likelihood):
    r"""Independent counts from 0 to ``total_count``, :math:`x_d \sim \mathrm{Bin}(n, p_d)`.

    The likelihood of scikit-learn's digits, where each pixel counts the lit cells of a 4x4 block
    (n = 16); with n = 255, one for bytes.

    Arguments:
        network: The decoder; one logit for each value.
        total_count: n.

    Example:
        >>> p = Binomial(torch.nn.Linear(8, 64), 64, total_count=16)(torch.zeros(5, 8))
        >>> p.log_prob(torch.full((5, 64), 16.0)).shape
        torch.Size([5])
    """

    total_count: Tensor

    def __init__(self, network: NetworkLike, event_shape: Shape, total_count: int) -> None:
        super().__init__(network, event_shape)
        count = check_int("Binomial.total_count", total_count)
        self.register_buffer("total_count", torch.tensor(float(count)))

    @classmethod
    def for_levels(cls, levels: int | None) -> Callable[..., Binomial]:
        """The likelihood of counts from 0 to ``levels - 1``."""
        return partial(cls, total_count=_known("binomial", levels) - 1)

    def distribution(self, *params: Tensor) -> Dist:
        """The binomial distribution with these logits."""
        return dist.Binomial(self.total_count, logits=params[0])


class _Levels(dist.Categorical):
    """A categorical distribution over the levels 0, 1, ..., whose mean is the expected level."""

    @property
    def mean(self) -> Tensor:
        levels = torch.arange(self.probs.shape[-1], device=self.probs.device)
        return self.probs @ levels.to(self.probs.dtype)


@named.put("categorical")
class Categorical(Likelihood):
    r"""Independent levels 0, ..., L - 1, each with its own probability: no order is assumed.

    Arguments:
        network: The decoder; L logits for each value.
        levels: L.

    Example:
        >>> p = Categorical(torch.nn.Linear(8, 17 * 64), 64, levels=17)(torch.zeros(5, 8))
        >>> p.sample().shape, p.mean.shape
        (torch.Size([5, 64]), torch.Size([5, 64]))
    """

    def __init__(self, network: NetworkLike, event_shape: Shape, levels: int) -> None:
        self.num_params = check_int("Categorical.levels", levels, minimum=2)
        super().__init__(network, event_shape)

    @classmethod
    def for_levels(cls, levels: int | None) -> Callable[..., Categorical]:
        """The likelihood of so many levels."""
        return partial(cls, levels=_known("categorical", levels))

    def distribution(self, *params: Tensor) -> Dist:
        """The categorical distribution with these logits, one tensor a level."""
        return _Levels(logits=torch.stack(params, -1))


Observe = Callable[[Tensor], None]
SIGMAS = ("shared", "feature", "predicted", "optimal")


@named.put("gaussian")
class Gaussian(Likelihood):
    r"""Independent normal values, :math:`\log p(x | z) = \sum_d \log N(x_d; \mu_d(z), \sigma^2)`.

    ============== ==================================================================
    ``sigma``      what :math:`\sigma` is
    ============== ==================================================================
    a number       fixed; :math:`\sqrt{1/2}` makes the log density minus the squared
                   error, up to the constant :math:`-\tfrac D2 \log\pi`
    ``"shared"``   one learned number for all values
    ``"feature"``  one learned number for each value of a datum
    ``"predicted"`` a second output of the decoder
    ``"optimal"``  the maximum-likelihood one: in training, from the batch's own
                   squared errors; in evaluation, a buffer
    ============== ==================================================================

    The buffer of ``"optimal"`` is the running mean of squared errors over the training batches
    (all of them equally at first, the last thousand or so later), so that in evaluation
    log p(x_n | z_n) never depends on what else is in the batch. In training it does, so padding
    can't be masked out; that is refused.

    References:
        Simple and Effective VAE Training with Calibrated Decoders (Rybkin et al., 2021),
        https://arxiv.org/abs/2006.13202

    Arguments:
        network: The decoder; the mean of each value, and the raw scale where it is predicted.
        sigma: See the table.
        min_sigma: Floor under every sigma that isn't a number; without it a decoder that gets
            one value right everywhere has no maximum of the likelihood.

    Example:
        >>> p = Gaussian(torch.nn.Linear(8, 64), 64, sigma="shared")(torch.zeros(5, 8))
        >>> p.log_prob(torch.zeros(5, 64)).shape
        torch.Size([5])
    """

    fixed_sigma: Tensor
    mean_square: Tensor
    batches_seen: Tensor

    def __init__(
        self,
        network: NetworkLike,
        event_shape: Shape,
        sigma: float | str = "optimal",
        min_sigma: float = 1e-3,
    ) -> None:
        self.num_params = 2 if sigma == "predicted" else 1
        super().__init__(network, event_shape)
        is_named = isinstance(sigma, str)
        self.sigma = sigma if is_named else check_number("Gaussian.sigma", sigma, above=0)
        self.min_sigma = check_number("Gaussian.min_sigma", min_sigma, above=0)
        if is_named and sigma not in SIGMAS:
            expected = f"a positive number or one of {', '.join(SIGMAS)}"
            raise ArgumentError("Gaussian.sigma", expected, quoted(sigma), ['sigma="optimal"'])
        if isinstance(self.sigma, float):
            self.register_buffer("fixed_sigma", torch.tensor(self.sigma))
        if self.sigma in ("shared", "feature"):
            shape = self.event_shape if self.sigma == "feature" else ()
            self.raw_sigma = nn.Parameter(torch.zeros(shape))
        if self.sigma == "optimal":
            self.register_buffer("mean_square", torch.ones(()))
            self.register_buffer("batches_seen", torch.zeros(()))

    @property
    def learns_scale(self) -> bool:
        """Whether sigma adapts to the data; with a point-mass guide there is then no maximum."""
        return isinstance(self.sigma, str)

    def distribution(self, *params: Tensor) -> Dist:
        """The normal distribution with this mean (and raw scale)."""
        loc = params[0]
        if self.sigma == "optimal":
            sigma = self.mean_square.sqrt().clamp(min=self.min_sigma)
            if self.training and torch.is_grad_enabled():
                event_dim = len(self.event_shape)
                return _OptimalNormal(loc, sigma, event_dim, self.min_sigma, self._observe)
        elif self.sigma == "predicted":
            sigma = positive_scale(params[1]) + self.min_sigma
        elif isinstance(self.sigma, float):
            sigma = self.fixed_sigma
        else:
            sigma = positive_scale(self.raw_sigma) + self.min_sigma
        return dist.Normal(loc, sigma)

    def _observe(self, mean_square: Tensor) -> None:
        with torch.no_grad():
            self.batches_seen += 1
            weight = self.batches_seen.reciprocal().clamp(min=1e-3)
            self.mean_square.lerp_(mean_square.to(self.mean_square.dtype), weight)


class _OptimalNormal(dist.TorchDistribution):
    """Normal values, scored with the mean squared error of the very values scored as variance.

    The mean is over data and entries, apart for each particle. Draws have the scale ``sigma``,
    since there is nothing to take an error from. ``couples_data`` says that a datum's density
    depends on the others: a mask can't leave any out.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}
    has_rsample = True
    couples_data = True

    def __init__(
        self, loc: Tensor, sigma: Tensor, event_dim: int, min_sigma: float, observe: Observe | None
    ) -> None:
        self.loc, self.sigma, self.min_sigma, self.observe = loc, sigma, min_sigma, observe
        rank = loc.dim() - event_dim
        super().__init__(loc.shape[:rank], loc.shape[rank:], validate_args=False)

    @property
    def support(self) -> Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Tensor:
        return self.loc

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> _OptimalNormal:
        if tuple(batch_shape) == tuple(self.batch_shape):
            return self
        loc = self.loc.expand(*batch_shape, *self.event_shape)
        return _OptimalNormal(loc, self.sigma, len(self.event_shape), self.min_sigma, self.observe)

    def log_prob(self, value: Tensor) -> Tensor:
        square = (value - self.loc).square()
        own = len(self.event_shape) + bool(self.batch_shape)  # entries, and data
        mean_square = square.mean(tuple(range(-own, 0)), keepdim=True)
        if self.observe is not None:
            self.observe(mean_square.detach().mean())
            self.observe = None  # a score may be asked for twice
        variance = mean_square.clamp(min=self.min_sigma**2)
        each = -0.5 * (square / variance + variance.log() + math.log(2 * math.pi))
        return sum_rightmost(each, len(self.event_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self.shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.sigma * noise
