"""The log importance weights of a pair, all of them, and what their averages estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from pvae import terms as t
from pvae.bounds.result import Bound, Kind
from pvae.errors import UndefinedError, check_int, oxford
from pvae.options import Options, tool
from pvae.pair import PairLike

__all__ = ["Estimate", "log_weights"]


@tool
def log_weights(
    pair: PairLike,
    data: Any,
    num_particles: int = 1000,
    **options: Unpack[Options],
) -> Tensor:
    r"""The log importance weight of each draw from the guide, for each datum.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} | x_n), \quad z_{kn} \sim q(z | x_n)

    Their mean over k estimates the ELBO, the log of the mean of the weights estimates the evidence.
    All K * N of them are kept; `bounds.elbo` and `bounds.evidence` keep only their sums.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: K, draws for each datum.
        options: As in `pvae.options.Options`.

    Returns:
        Shape ``(K, N)`` in nats, double precision, on the pair's device.

    Raises:
        UndefinedError: If a latent of a datum has a point-mass guide or an improper prior, or
            there are sites outside the data plate, whose weight is no single datum's.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> log_weights(vae, torch.zeros(5, 4), 10).shape
        torch.Size([10, 5])
    """
    check_int("num_particles", num_particles)
    with t.prepared(pair, data, options, "log_weights") as evaluation:
        structure = evaluation.structure
        structure.require_density("importance weights")
        structure.require_proper("importance weights")
        if structure.global_sites:
            raise UndefinedError(
                "importance weights per datum",
                "a pair whose sites are all inside the data plate",
                f"global site {oxford(structure.global_sites)}",
                ["bounds.evidence, for the data set"],
            )
        found: dict[int, list[Tensor]] = {}  # by a chunk's first row: its particles, in parts
        for rows, terms in t.stream(evaluation, num_particles):
            found.setdefault(rows.start, []).append(terms.log_weight.double())
        return torch.cat([torch.cat(parts) for parts in found.values()], 1)


@dataclass(frozen=True)
class Estimate:
    """An estimate for each datum from K draws, and what each draw does to it.

    Differences of estimates from the same draws have the right error: what is common cancels.

    Attributes:
        values: Shape ``(N,)``.
        influence: By how much each draw moves it, times K, around 0; shape ``(K, N)``.

    Example:
        >>> log_weights = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> Estimate.of_elbo(log_weights).values
        tensor([1., 1.])
    """

    values: Tensor
    influence: Tensor

    @classmethod
    def of_elbo(cls, log_weights: Tensor) -> Estimate:
        """The mean of log weights ``(K, N)``."""
        mean = log_weights.mean(0)
        return cls(mean, log_weights - mean)

    @classmethod
    def of_evidence(cls, log_weights: Tensor) -> Estimate:
        """The log of the mean of the weights, with the error of the delta method."""
        k = len(log_weights)
        return cls(log_weights.logsumexp(0) - math.log(k), k * log_weights.softmax(0) - 1)

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference, for each datum."""
        return Estimate(self.values - other.values, self.influence - other.influence)

    @property
    def variance(self) -> Tensor:
        """Over draws, of each datum's value, shape ``(N,)``."""
        k = len(self.influence)
        return self.influence.square().sum(0) / (k * max(k - 1, 1))

    def bound(self, name: str, kind: Kind = "none") -> Bound:
        """As a result that has both standard errors."""
        k, n = self.influence.shape
        error = math.sqrt(float(self.variance.sum())) if k > 1 else None
        return Bound(name, self.values, float(self.values.sum()), error, n, k, kind=kind)
