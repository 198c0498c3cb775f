"""The pair made of parts: Model p(z) p(x | z), Guide q(z | x), and VAE, which holds both.

Both are plain ``nn.Module`` whose ``forward(*batch)`` runs a Pyro program, so plain Pyro works on
them: ``SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x)``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import pyro
import torch
from torch import Tensor, nn

from pvae import randomness
from pvae.annotations import strict
from pvae.conditional import Called, Conditional, as_conditional
from pvae.data.arrays import as_array
from pvae.described import Described
from pvae.distributions import mean_of
from pvae.errors import ArgumentError, PairError, UndefinedError, check_count, check_int
from pvae.jacobian import differentiable_twice
from pvae.modes import in_mode
from pvae.origin import builder
from pvae.pair import Pair, Uses
from pvae.pair.home import devices_of
from pvae.pair.running import first_floating, networks_of, tensors_of
from pvae.penalties import Penalty, SideOutputs, on_side, penalise, recorded_activations
from pvae.sites import DATA_PLATE, LATENT, OBSERVED, announce_parameters
from pvae.threads import alone
from pvae.types import Dist

__all__ = ["VAE", "Guide", "Model"]


class Model(Described):
    r"""The generative model :math:`p(x, z | y) = p(z | y)\, p(x | z, y)` as a Pyro program.

    Sites: ``"z"`` and ``"x"`` in the plate ``"data"``. Labels y are optional.

    Arguments:
        prior: p(z), or p(z | y): a `Conditional`, a distribution, a function, a module, a flow.
        likelihood: p(x | z), or p(x | z, y): the same.
        penalties: What training subtracts from the objective; see `pvae.penalties`.
    """

    def __init__(
        self, prior: object, likelihood: object, penalties: Penalty | Sequence[Penalty] = ()
    ) -> None:
        super().__init__()
        self.prior = as_conditional(prior, "prior")
        self.likelihood = as_conditional(likelihood, "likelihood")
        self.penalties = on_side("model", penalties)

    def forward(self, x: Tensor | None, *context: Tensor, size: int | None = None) -> Tensor:
        """Runs the program on a batch, or generates one.

        Arguments:
            x: Data, shape ``(N, *event_shape)``, or None to draw them.
            context: Labels and the like, N of each.
            size: N, where neither x nor a context tells.

        Returns:
            The data at site ``"x"``.
        """
        announce_parameters(self, "model")
        size = _batch_size(x, context, size)
        with pyro.plate(DATA_PLATE, size):
            prior = self.prior(*context)
            _check_prior(prior, context, size)
            z = pyro.sample(LATENT, prior)
            _check_latent(z, prior)
            active = self.penalties if self.training and x is not None else ()
            with recorded_activations(self.likelihood, active) as activations:
                likelihood = self.likelihood(z, *context)
            _check_batch(OBSERVED, likelihood, z.shape[: z.dim() - len(prior.event_shape)])
            if x is not None:
                _check_event(x, likelihood)
            x = pyro.sample(OBSERVED, likelihood, obs=x)
            outputs = (x, z, context, likelihood, activations)
            penalise(SideOutputs("model", self.likelihood, *outputs), active)
            return x


class Guide(Described):
    r"""The guide :math:`q(z | x)`, or :math:`q(z | x, y)`, as a Pyro program.

    Arguments:
        posterior: The guide family: a `Conditional`, a function, a module, a conditional flow.
        corruption: From x to what the guide sees of it in training; see `pvae.corruptions`.
        penalties: What training subtracts from the objective; see `pvae.penalties`.
    """

    def __init__(
        self,
        posterior: object,
        corruption: Callable[[Tensor], Tensor] | None = None,
        penalties: Penalty | Sequence[Penalty] = (),
    ) -> None:
        super().__init__()
        self.posterior = as_conditional(posterior, "guide")
        if corruption is not None and not callable(corruption):
            fixes = ["corruption=None"]
            expected = "a function or module of x"
            raise ArgumentError("corruption", expected, repr(corruption), fixes)
        self.corruption = corruption
        self.penalties = on_side("guide", penalties)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Runs the program on a batch and returns the latent, shape ``(N, *latent_shape)``."""
        announce_parameters(self, "guide")
        if self.training and self.corruption is not None:
            x = _corrupted(x, self.corruption)
        active = self.penalties if self.training else ()
        differentiates = any(p.differentiates_x for p in active)
        with pyro.plate(DATA_PLATE, len(x)):
            with (
                recorded_activations(self.posterior, active) as activations,
                torch.set_grad_enabled(torch.is_grad_enabled() or differentiates),
                differentiable_twice() if differentiates else contextlib.nullcontext(),
            ):
                if differentiates:
                    x = _floating(x)
                    x = x if x.requires_grad else x.detach().requires_grad_()
                posterior = self.posterior(x, *context)
            _check_batch(LATENT, posterior, x.shape[:1])
            z = pyro.sample(LATENT, posterior)
            outputs = (x, z, context, posterior, activations)
            penalise(SideOutputs("guide", self.posterior, *outputs), active)
            return z


class VAE(Pair, nn.Module):
    r"""A variational autoencoder: ``vae.model`` is p(z) p(x | z), ``vae.guide`` is q(z | x).

    With a point-mass guide (`pvae.guides.Point`) it is a deterministic autoencoder.

    `sample`, `encode`, `decode` and `reconstruct` run in evaluation mode and are differentiable, in
    what they are given and in the parameters, so they may be used inside another Pyro program: a
    decoder as a prior, an inverse problem. Where no gradient is wanted, ``with torch.no_grad():``
    around them saves its memory.

    Attributes:
        recipe: The recipe that has made it, with its arguments, where these are words and numbers.

    Arguments:
        prior: p(z), or p(z | y).
        likelihood: p(x | z), or p(x | z, y).
        guide: q(z | x), or q(z | x, y).
        corruption: What the guide sees of x in training; makes it a denoising autoencoder.
        penalties: What training subtracts from the objective, on either side.

    Raises:
        PairError: If the pair has no best fit: a point mass beside a likelihood or a prior whose
            scale is learned, where the density can grow without bound.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), https://arxiv.org/abs/1312.6114

    Example:
        >>> from pvae import guides, likelihoods, networks, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Bernoulli(networks.MLP(2, 64), 64),
        ...     guide=guides.MeanField(networks.MLP(64, 2 * 2), 2),
        ... )
        >>> vae.sample(5).shape, vae.encode(torch.zeros(3, 64)).shape
        (torch.Size([5, 64]), torch.Size([3, 2]))
    """

    recipe: dict[str, object] | None = None

    def __init__(
        self,
        prior: object,
        likelihood: object,
        guide: object,
        *,
        corruption: Callable[[Tensor], Tensor] | None = None,
        penalties: Penalty | Sequence[Penalty] = (),
    ) -> None:
        nn.Module.__init__(self)
        self.model = Model(prior, likelihood, penalties)
        self.guide = Guide(guide, corruption, penalties)
        self.plate, self.builder = DATA_PLATE, builder()
        _check_bounded(self)

    @strict
    def sample(
        self,
        num_samples: int,
        *context: object,
        mean: bool = False,
        seed: int | None = None,
        max_rows: int = 8192,
    ) -> Tensor:
        """The sampling algorithm: draw z from the prior, decode it. No encoder is used.

        Arguments:
            num_samples: N, how many data are drawn (not K draws for each datum).
            context: Labels and the like, N of each.
            mean: Return the likelihood's mean instead of a draw of x. A grid of means looks
                smoother than what the model says that data look like.
            seed: Seed of the draws, which then leave the caller's generators as they are; None to
                draw from these.
            max_rows: Bound on the rows in the networks at once.

        Returns:
            Shape ``(N, *event_shape)``, on the pair's device.
        """
        check_int("num_samples", num_samples)
        check_count(
            "num_samples", num_samples, 4 * math.prod(self.model.likelihood.event_shape or ())
        )
        arrays = self._tensors(*context)
        for part in arrays:
            if not part.dim() or len(part) != num_samples:
                expected = f"{num_samples} labels or the like, one for each sample"
                raise ArgumentError("context", expected, f"shape {tuple(part.shape)}")

        def drawn(rows: Tensor, *context: Tensor) -> Tensor:
            prior = self.model.prior(*context)
            _check_prior(prior, context, len(rows))
            z, likelihood = prior.expand([len(rows)])(), self.model.likelihood
            if mean:
                return _drawn(OBSERVED, likelihood, None, z, *context)
            return likelihood(z, *context)()

        uses = Uses(arrays)
        own = contextlib.nullcontext() if seed is None else randomness.forked(seed)
        with alone(), own, uses:
            samples = self._by_rows(drawn, (torch.arange(num_samples), *arrays), max_rows)
        if len(uses.used) < len(arrays):
            expected = "labels that the prior or the likelihood takes"
            fixes = [f"sample({num_samples})", "MLP(..., context_dim=10), for labels of 10 classes"]
            raise ArgumentError("context", expected, "labels that neither uses", fixes)
        return samples

    @strict
    def encode(
        self, x: object, *context: object, num_particles: int | None = None, max_rows: int = 8192
    ) -> Tensor:
        """The latent of each datum.

        Arguments:
            x: Data, shape ``(N, *event_shape)``.
            context: Labels and the like, N of each.
            num_particles: K draws from q(z | x); None for its mean, which is deterministic.
            max_rows: Bound on the rows in the networks at once.

        Returns:
            Shape ``(N, *latent_shape)``, or ``(S, N, *latent_shape)``, on the pair's device.
        """
        encoded = partial(_drawn, LATENT, self.guide.posterior, num_particles)
        return self._by_rows(encoded, self._tensors(x, *context), max_rows, num_particles)

    @strict
    def decode(
        self, z: object, *context: object, num_particles: int | None = None, max_rows: int = 8192
    ) -> Tensor:
        """The data that a latent stands for.

        Arguments:
            z: Latents, shape ``(..., *latent_shape)``.
            context: Labels and the like.
            num_particles: K draws from p(x | z); None for its mean.
            max_rows: Counted along the first axis; with a context only where z has two axes.

        Returns:
            Shape ``(..., *event_shape)``, or ``(S, ..., *event_shape)``.
        """
        batch = self._tensors(z, *context)
        if context and batch[0].dim() > 2:  # the first axis may be one of draws
            max_rows = max(check_int("max_rows", max_rows), len(batch[0]))
        decoded = partial(_drawn, OBSERVED, self.model.likelihood, num_particles)
        return self._by_rows(decoded, batch, max_rows, num_particles)

    @strict
    def reconstruct(
        self, x: object, *context: object, num_particles: int | None = None, max_rows: int = 8192
    ) -> Tensor:
        """Each datum encoded and decoded: p(x | z)'s mean at q(z | x)'s mean.

        Arguments:
            x: Data, shape ``(N, *event_shape)``.
            context: Labels and the like, N of each.
            num_particles: K draws of z instead of its mean, each decoded to a mean of x.
            max_rows: Counted for each draw.

        Returns:
            Shape ``(N, *event_shape)``, or ``(S, N, *event_shape)``.
        """

        def rebuilt(*batch: Tensor) -> Tensor:
            z = _drawn(LATENT, self.guide.posterior, num_particles, *batch)
            return _drawn(OBSERVED, self.model.likelihood, None, z, *batch[1:])

        return self._by_rows(rebuilt, self._tensors(x, *context), max_rows, num_particles)

    def _tensors(self, *arrays: object) -> tuple[Tensor, ...]:
        """Arrays as tensors on the pair's device, floating ones in its type."""
        tensors = [torch.as_tensor(as_array("array", a)) for a in arrays]
        known = [*tensors_of([self])]
        device = known[0].device if known else next(devices_of((self,), tensors), None)
        floating = first_floating((*known, *tensors)).dtype
        dtypes = [floating if t.is_floating_point() else t.dtype for t in tensors]
        own = zip(tensors, dtypes, strict=True)
        return tuple(t.to(device, dtype, copy=True) for t, dtype in own)  # networks may write

    def _by_rows(
        self,
        function: Callable[..., Tensor],
        arrays: tuple[Tensor, ...],
        max_rows: int,
        num_particles: int | None = None,
    ) -> Tensor:
        """The function of arrays with a common first axis, some rows at a time, in evaluation mode.

        Gradients are the caller's, on or off.

        With ``num_particles``, what it returns has an axis of draws before that of rows.
        """
        check_int("max_rows", max_rows)
        lengths = {len(a) if a.dim() else None for a in arrays}
        size = lengths.pop()
        called = [m.function for m in self.modules() if isinstance(m, Called)]
        with in_mode([*self.modules(), *networks_of(called)], training=False):
            if lengths or size is None or size <= max_rows:
                return function(*arrays)
            starts = range(0, size, max_rows)
            parts = [function(*(a[i : i + max_rows] for a in arrays)) for i in starts]
            return torch.cat(parts, 0 if num_particles is None else 1)


def _drawn(
    site: str, conditional: Conditional, num_particles: int | None, *context: Tensor
) -> Tensor:
    """Draws of a distribution given a context; its mean where no number of them is given."""
    fn = conditional(*context)
    if num_particles is not None:
        k = check_int("num_particles", num_particles)
        check_count("num_particles", k, 4 * math.prod((*fn.batch_shape, *fn.event_shape)))
        return fn(torch.Size([k]))
    mean = mean_of(fn)
    if mean is None:
        expected, fixes = (
            "a distribution whose mean is known",
            ["num_particles=100, and the mean over them"],
        )
        raise UndefinedError(f"site '{site}'", expected, type(fn).__name__, fixes)
    return mean


def _batch_size(x: Tensor | None, context: Sequence[Tensor], size: int | None) -> int:
    for part in (x, *context[:1]):
        if part is not None:
            return len(part)
    if size is None:
        raise PairError("model", "data, a context or size=N to know how many", "none of them")
    return size


def _corrupted(x: Tensor, corruption: Callable[[Tensor], Tensor]) -> Tensor:
    corrupted = corruption(_floating(x))
    if corrupted.shape != x.shape:
        expected = f"data of the shape that they had, {tuple(x.shape)}"
        fixes = ["small images in the size of the large ones, as corruptions.Downsampling has them"]
        raise PairError("corruption", expected, f"shape {tuple(corrupted.shape)}", fixes)
    return corrupted


def _floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _shapes(fn: Dist) -> str:
    return f"batch_shape {tuple(fn.batch_shape)}, event_shape {tuple(fn.event_shape)}"


def _check_prior(prior: Dist, context: Sequence[Tensor], size: int) -> None:
    """A prior without context must have batch_shape (): with (N,) it would pass for N priors."""
    batch = tuple(prior.batch_shape)
    if batch and not (context and batch[-1] in (1, size)):
        expected = f"batch_shape () or ({size},)" if context else "batch_shape ()"
        fixes = [f".to_event({len(batch)})"]
        raise PairError(f"prior at site '{LATENT}'", expected, _shapes(prior), fixes)


def _check_latent(z: Tensor, prior: Dist) -> None:
    event = tuple(prior.event_shape)
    if tuple(z.shape[z.dim() - len(event) :]) != event:
        expected = f"a latent of shape {event}, as the prior's event_shape says"
        fixes = ["the same latent_dim in prior, decoder and guide"]
        actual = f"one of shape {tuple(z.shape)} from the guide"
        raise PairError(f"site '{LATENT}'", expected, actual, fixes)


def _check_batch(site: str, fn: Dist, batch_shape: Sequence[int]) -> None:
    if tuple(fn.batch_shape) != tuple(batch_shape):
        expected = f"a distribution with batch_shape {tuple(batch_shape)}, one for each datum"
        extra = len(fn.batch_shape) - len(batch_shape)
        fixes = [f".to_event({extra})"] if extra > 0 else []
        raise PairError(f"site '{site}'", expected, _shapes(fn), fixes)


def _check_event(x: Tensor, fn: Dist) -> None:
    if tuple(x.shape[1:]) != tuple(fn.event_shape):
        shape = ", ".join(map(str, fn.event_shape))
        expected = f"shape (N, {shape}), as the likelihood's event_shape says"
        fixes = [f"x.reshape(-1, {shape})", "change the likelihood's event_shape"]
        raise PairError(f"data at site '{OBSERVED}'", expected, f"{tuple(x.shape)}", fixes)


def _check_bounded(vae: VAE) -> None:
    """Refuses a point-mass guide where some scale adapts: the density has no maximum."""
    where, prior, likelihood = "VAE with a point-mass guide", vae.model.prior, vae.model.likelihood
    if not vae.guide.posterior.is_point:
        return
    if getattr(likelihood, "learns_scale", False):
        raise PairError(
            where,
            "a likelihood with a fixed scale",
            f"{type(likelihood).__name__} whose sigma adapts to the data: with nothing "
            "random in z it shrinks to its floor as the fit improves, and there is no best fit",
            ["Gaussian(..., sigma=0.5 ** 0.5), the squared error", "guides.MeanField"],
        )
    if any(p.requires_grad for p in prior.parameters()):
        raise PairError(
            where,
            "a prior without parameters to learn",
            f"{type(prior).__name__} with {sum(p.numel() for p in prior.parameters())} of them: "
            "prior and codes shrink together to one point, where the density is unbounded",
            ["priors.Flat, and an ex-post density on the codes", "guides.MeanField"],
        )
