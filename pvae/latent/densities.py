"""Densities of codes."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import constraints
from torch import Tensor
from tqdm import tqdm

from pvae import randomness
from pvae.annotations import strict
from pvae.conditional import Conditional, as_conditional
from pvae.devices import double
from pvae.errors import ArgumentError, DataError, TrainingError, check_int, check_number
from pvae.latent.coding import as_matrix
from pvae.options import progress_bar
from pvae.types import Dist

__all__ = ["fit_density"]


@strict
def fit_density(
    codes: Tensor,
    kind: object = "gaussian",
    *,
    num_components: int = 10,
    ridge: float = 1e-6,
    num_steps: int = 2000,
    batch_size: int = 512,
    lr: float = 5e-3,
    seed: int = 0,
    progress: bool = True,
) -> Conditional:
    r"""A density fitted to codes by maximum likelihood, after the autoencoder was: ex post.

    What is fitted is the density of codes with noise of variance ``ridge`` (times the codes' mean
    variance) in each direction, so that one in which they don't vary has a density, too.

    - ``"gaussian"``: a normal distribution with full covariance, in closed form.
    - ``"gmm"``: a mixture of them, by scikit-learn's `GaussianMixture`, on the CPU.
    - A zuko flow, or whatever else `pvae.conditional.as_conditional` takes that has parameters: a
      copy is trained by Adam on standardised codes.

    References:
        From Variational to Deterministic Autoencoders (Ghosh et al., 2020),
        https://arxiv.org/abs/1903.12436

    Arguments:
        codes: Shape ``(N, d)``.
        kind: Kind of density.
        num_components: Number of components of the mixture.
        ridge: Variance of the noise.
        num_steps: Training steps.
        batch_size: Codes a step.
        lr: Learning rate, which falls to 0 along a cosine.
        seed: Seed of the mixture's start and of training; the caller's generators are left as they
            are.
        progress: Show a progress bar of the training.

    Returns:
        The density, on the codes' device and in their type. It learns no further, unless its
        parameters are told to (``requires_grad_()``).

    Raises:
        DataError: If the codes are no finite matrix, or too few.
        TrainingError: If training ends in a density that isn't finite.

    Example:
        >>> corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> fit_density(corners)().log_prob(torch.zeros(2))
        tensor(-1.8379)
    """
    codes = as_matrix("codes", codes)
    check_number("ridge", ridge, above=0)
    if len(codes) < 2:
        fixes = ["the codes of more data"]
        raise DataError("codes", "at least two, as one has no spread", "one", fixes)
    z = double(codes)
    loc, spread = z.mean(0), z.var(0, correction=0)
    unit = max(float(spread.mean()), 1e-12 * float(z.square().mean())) or 1.0
    noise = ridge * unit
    if kind == "gaussian":
        covariance = (z - loc).T @ (z - loc) / len(z) + noise * torch.eye(len(loc)).to(z)
        fn = dist.MultivariateNormal(loc, scale_tril=torch.linalg.cholesky(covariance))
        return as_conditional(fn).to(codes)
    if kind == "gmm":
        return as_conditional(_mixture(z, num_components, noise, seed)).to(codes)
    if isinstance(kind, str):
        fixes = ['kind="gaussian"', 'kind="gmm"']
        raise ArgumentError(
            "kind", "'gaussian', 'gmm', or a density with parameters", repr(kind), fixes
        )
    density = copy.deepcopy(as_conditional(kind, "kind"))
    density = _Standardised(density, loc, (spread + noise).sqrt()).to(codes)
    check_int("num_steps", num_steps)
    check_int("batch_size", batch_size)
    check_number("lr", lr, above=0)
    bar = progress_bar(range(num_steps), title="density", unit="step", shown=progress)
    with randomness.forked(seed), torch.enable_grad():
        _train(density, codes, noise, bar, batch_size, lr)
    return density.requires_grad_(requires_grad=False).eval()


class _Mixture(dist.MixtureSameFamily):
    """A mixture whose support is plain, so that HMC can run on it."""

    support = constraints.real_vector


def _mixture(z: Tensor, num_components: int, noise: float, seed: int) -> Dist:
    from sklearn.mixture import GaussianMixture

    distinct = len(z.unique(dim=0))
    if distinct < check_int("num_components", num_components):
        expected = f"at least num_components = {num_components} different ones"
        fixes = [f"num_components={distinct}", "kind='gaussian'"]
        raise DataError("codes", expected, f"{distinct} among {len(z)}", fixes)
    fit = GaussianMixture(num_components, reg_covar=noise, max_iter=1000, random_state=seed)
    fit.fit(z.cpu().numpy())
    arrays = (fit.weights_, fit.means_, fit.covariances_)
    weights, means, covariances = (torch.from_numpy(a).to(z.device) for a in arrays)
    normals = dist.MultivariateNormal(means, scale_tril=torch.linalg.cholesky(covariances))
    return _Mixture(dist.Categorical(weights), normals)


class _Standardised(Conditional):
    """The density of loc + scale * u, where u has the density given."""

    loc: Tensor
    scale: Tensor

    def __init__(self, density: Conditional, loc: Tensor, scale: Tensor) -> None:
        super().__init__(tuple(loc.shape))
        self.density = density
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    def forward(self, *context: Tensor) -> Dist:
        fn = self.density(*context)
        if (shape := tuple(fn.event_shape)) != self.event_shape:
            raise ArgumentError("kind", f"a density of event_shape {self.event_shape}", f"{shape}")
        fn = fn.dist if isinstance(fn, ZukoToPyro) else fn  # which has no rsample
        affine = dist.transforms.AffineTransform(self.loc, self.scale, event_dim=1)
        return dist.TransformedDistribution(fn, [affine])


def _train(
    density: Conditional, codes: Tensor, noise: float, steps: tqdm, batch_size: int, lr: float
) -> None:
    parameters = [p for p in density.parameters() if p.requires_grad]
    if not parameters:
        raise ArgumentError("kind", "a density with parameters to learn", "one without")
    optimizer = torch.optim.Adam(parameters, lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    rows = codes
    with pyro.validation_enabled(is_validate=False):
        for _ in steps:
            if len(codes) > batch_size:
                rows = codes[torch.randint(len(codes), (batch_size,), device=codes.device)]
            loss = -density().log_prob(rows + noise**0.5 * torch.randn_like(rows)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
        score = float(density().log_prob(rows).detach().mean())
    if not math.isfinite(score):
        raise TrainingError("fit_density", "a finite log density", f"{score}", ["lr=1e-4"])
