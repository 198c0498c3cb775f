"""Guide families q(z | x): an encoder and the distribution of a latent of shape ``event_shape``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.conditional import FromNetwork, NetworkLike, positive_scale
from pvae.errors import as_shape, check_int, check_number
from pvae.shelf import Shelf
from pvae.types import Dist, Shape

__all__ = ["CodeDelta", "MeanField", "NearestCode", "Point", "named"]

named: Shelf[Callable[..., FromNetwork]] = Shelf("guide")
"""Guide families by name: each is built from an encoder and the shape of the latent."""


@named.put("mean_field")
class MeanField(FromNetwork):
    r"""The diagonal normal guide :math:`q(z | x) = N(\mu(x), \mathrm{diag}\,\sigma^2(x))`.

    A draw is reparametrised: :math:`z = \mu + \sigma w` with :math:`w \sim N(0, I)`, so that
    :math:`\partial z / \partial \mu = 1` and :math:`\partial z / \partial \sigma = w`.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), https://arxiv.org/abs/1312.6114

    Arguments:
        network: The encoder; its output, of size ``2 * latent_dim``, is split into location and
            raw scale.
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
        event_shape: Shape,
        to_scale: Callable[[Tensor], Tensor] = positive_scale,
    ) -> None:
        super().__init__(network, event_shape)
        self.to_scale = to_scale

    def distribution(self, *params: Tensor) -> Dist:
        """The normal distribution with this location and raw scale."""
        loc, raw_scale = params
        return dist.Normal(loc, self.to_scale(raw_scale))


@named.put("point")
class Point(FromNetwork):
    r"""The degenerate guide :math:`q(z | x) = \delta(z - e(x))`: a deterministic encoder.

    With a flat prior, ``Trace_ELBO`` is then the reconstruction loss :math:`-\log p(x | e(x))`.
    A point mass has no density, so evidence, KL and the like aren't defined for it.

    Arguments:
        network: The encoder e, with one output for each entry of the latent.

    Example:
        >>> Point(torch.nn.Linear(64, 8), 8)(torch.zeros(5, 64)).log_density
        tensor([0., 0., 0., 0., 0.])
    """

    @property
    def is_point(self) -> bool:
        """True."""
        return True

    def distribution(self, *params: Tensor) -> Dist:
        """The point mass at the code."""
        return dist.Delta(params[0], event_dim=len(self.event_shape))


class CodeDelta(dist.Delta):
    """A point mass at the nearest codes, which remembers what the encoder had given.

    Attributes:
        encoded: The encoder's output, shape ``(..., *event_shape)``.
        quantised: The codes nearest to it; the point itself has this value, and the gradient of
            ``encoded``.
    """

    def __init__(self, encoded: Tensor, quantised: Tensor, event_dim: int) -> None:
        self.encoded, self.quantised = encoded, quantised
        through = quantised.detach() + (encoded - encoded.detach())
        super().__init__(through, event_dim=event_dim)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> CodeDelta:
        """The same point for more data."""
        shape = (*batch_shape, *self.event_shape)
        encoded, quantised = self.encoded.expand(shape), self.quantised.expand(shape)
        return CodeDelta(encoded, quantised, len(self.event_shape))


class NearestCode(FromNetwork):
    r"""The point-mass guide of a VQ-VAE: each vector of the latent is its nearest code.

    .. math:: z_m = e_k, \quad k = \arg\min_j \|e_\theta(x)_m - e_j\|

    Gradients pass straight through to the encoder. The codes follow the vectors that chose them by
    exponential moving averages, so they are no parameters; a code that nothing has chosen for long
    is put where an encoding of the batch is. `pvae.penalties.Commitment` keeps the encoder near
    its codes.

    References:
        Neural Discrete Representation Learning (van den Oord et al., 2017),
        https://arxiv.org/abs/1711.00937

    Arguments:
        network: The encoder, with one output for each entry of the latent.
        event_shape: Shape of the latent, ``(M, D)``: M vectors of D entries.
        num_codes: Size of the codebook.
        decay: Decay of the moving averages, in [0, 1).
        dead: A code that fewer vectors than this have chosen, on average over batches, is replaced
            by an encoding of the batch.

    Example:
        >>> q = NearestCode(torch.nn.Linear(64, 4 * 2), (4, 2), num_codes=16)(torch.zeros(5, 64))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([4, 2]))
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        network: NetworkLike,
        event_shape: Shape,
        num_codes: int = 64,
        decay: float = 0.99,
        dead: float = 0.01,
    ) -> None:
        super().__init__(network, event_shape)
        as_shape("NearestCode.event_shape", self.event_shape, least=1)
        size = (check_int("NearestCode.num_codes", num_codes), self.event_shape[-1])
        self.decay = check_number("NearestCode.decay", decay, minimum=0, below=1)
        self.dead = check_number("NearestCode.dead", dead, minimum=0)
        self.register_buffer("codes", torch.randn(size))
        self.register_buffer("counts", torch.zeros(size[0]))
        self.register_buffer("sums", torch.zeros(size))

    @property
    def is_point(self) -> bool:
        """True."""
        return True

    def nearest(self, vectors: Tensor) -> Tensor:
        """The index of the nearest code for each vector, from shape ``(..., D)`` to ``(...)``."""
        flat = vectors.detach().reshape(-1, vectors.shape[-1])
        distances = torch.cdist(flat, self.codes, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.argmin(1).reshape(vectors.shape[:-1])

    def distribution(self, *params: Tensor) -> Dist:
        """The point mass at the nearest codes."""
        encoded = params[0]
        if self.training and torch.is_grad_enabled():
            self._follow(encoded.detach().reshape(-1, encoded.shape[-1]))
        quantised = self.codes[self.nearest(encoded)]
        return CodeDelta(encoded, quantised, len(self.event_shape))

    @torch.no_grad()
    def _follow(self, vectors: Tensor) -> None:
        """Moves each code towards the vectors that chose it; nothing waits for the device."""
        numbers = torch.arange(len(self.codes), device=vectors.device)
        chosen = (self.nearest(vectors)[:, None] == numbers).to(vectors.dtype)
        self.counts.lerp_(chosen.sum(0), 1 - self.decay)
        self.sums.lerp_(chosen.T @ vectors, 1 - self.decay)
        other = vectors[torch.randint(len(vectors), (len(self.codes),), device=vectors.device)]
        is_dead = (self.counts < self.dead)[:, None]
        mean = self.sums / self.counts.clamp(min=1e-12)[:, None]
        self.codes.copy_(torch.where(is_dead, other, mean))
        self.sums.copy_(torch.where(is_dead, self.codes, self.sums))
        self.counts.copy_(torch.where(is_dead[:, 0], 1.0, self.counts))
