"""Guide families q(z | x)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from pvae.conditional import FromNetwork, NetworkLike, positive

__all__ = ["MeanField", "Point"]


class MeanField(FromNetwork):
    r"""The diagonal normal guide :math:`q(z | x) = N(\mu(x), \mathrm{diag}\,\sigma^2(x))`.

    A draw is reparametrised: :math:`z = \mu + \sigma w` with :math:`w \sim N(0, I)`, so that
    :math:`\partial z / \partial \mu = 1` and :math:`\partial z / \partial \sigma = w`.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), https://arxiv.org/abs/1312.6114

    Arguments:
        network: The encoder; its output, of size ``2 * latent_dim``, is split into location and
            raw scale.
        event_shape: Shape of the latent, an integer for a vector.
        to_scale: Map from the raw output to a positive scale; for an encoder that gives the
            logarithm of the variance, ``lambda raw: (0.5 * raw).exp()``.

    Example:
        >>> q = MeanField(torch.nn.Linear(64, 2 * 8), 8)(torch.zeros(5, 64))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([8]))
    """

    num_params = 2

    def __init__(
        self,
        network: NetworkLike,
        event_shape: int | Sequence[int],
        to_scale: Callable[[Tensor], Tensor] = positive,
    ) -> None:
        super().__init__(network, event_shape)
        self.to_scale = to_scale

    def distribution(self, *params: Tensor) -> Any:
        """The normal distribution with this location and raw scale."""
        loc, raw_scale = params
        assert self.event_shape is not None  # noqa: S101
        return dist.Normal(loc, self.to_scale(raw_scale)).to_event(len(self.event_shape))


class Point(FromNetwork):
    r"""The degenerate guide :math:`q(z | x) = \delta(z - e(x))`: a deterministic encoder.

    With a flat prior, ``Trace_ELBO`` is then the reconstruction loss :math:`-\log p(x | e(x))`.
    A point mass has no density, so evidence, KL and the like aren't defined for it.

    Arguments:
        network: The encoder e, with one output for each entry of the latent.
        event_shape: Shape of the latent, an integer for a vector.

    Example:
        >>> Point(torch.nn.Linear(64, 8), 8)(torch.zeros(5, 64)).log_density
        tensor([0., 0., 0., 0., 0.])
    """

    @property
    def is_point(self) -> bool:
        """True."""
        return True

    def distribution(self, *params: Tensor) -> Any:
        """The point mass at the code."""
        assert self.event_shape is not None  # noqa: S101
        return dist.Delta(params[0], event_dim=len(self.event_shape))
