"""Pairs of every kind whose guide is the exact posterior, with what is known about them.

For such a pair every draw of z has the same weight, p(x, z) / q(z | x) = p(x): the ELBO, the
evidence, chains from the guide to the posterior, and each local fit are all log p(x), without
noise, so that one number is the oracle of many tools.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pvae import VAE, Conditional, Pair, guides, likelihoods, priors

N, D, Q, SIGMA = 24, 4, 2, 0.8
WEIGHT = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 1.2], [0.0, -0.4]], dtype=torch.float64)
"""Its columns are orthogonal, so that latents are independent in the posterior, too."""


@dataclass(frozen=True)
class Exact:
    """A pair, a batch of N data, and its exact numbers; None where there is no such number.

    Attributes:
        pair: The pair.
        batch: What it is called with.
        log_evidence: log p(x) of each datum, ``(N,)``; with global latents, of all data, ``()``.
        means: Posterior means by local latent site, ``(N, *event_shape)``.
        rate: KL(q(z | x) || p(z)) of each datum, ``(N,)``.
        marginal: Mean and standard deviation of each entry of x under the model, ``(N, D)``.
        num_data: N; 1 where the whole data set is one datum.
        axis: The axis of the first entry that counts the data.
        site: The site that observes x.
    """

    pair: Pair
    batch: tuple[Tensor, ...]
    log_evidence: Tensor | None
    means: dict[str, Tensor]
    rate: Tensor | None = None
    marginal: tuple[Tensor, Tensor] | None = None
    num_data: int = N
    axis: int = 0
    site: str = "x"

    @property
    def x(self) -> Tensor:
        """The first entry of the batch, data first."""
        return self.batch[0].movedim(self.axis, 0)


def variance() -> Tensor:
    """Of the posterior, by dimension."""
    return 1 / (1 + WEIGHT.square().sum(0) / SIGMA**2)


def posterior_mean(x: Tensor, prior_mean: Tensor | float = 0.0) -> Tensor:
    return variance() * (x @ WEIGHT / SIGMA**2 + prior_mean)


def log_marginal(x: Tensor, mean: Tensor | float = 0.0) -> Tensor:
    covariance = WEIGHT @ WEIGHT.T + SIGMA**2 * torch.eye(D)
    return dist.MultivariateNormal(torch.zeros(D) + mean, covariance).log_prob(x)


def marginal_of(mean: Tensor | float = 0.0, extra: float = 0.0) -> tuple[Tensor, Tensor]:
    sd = (WEIGHT.square().sum(1) + SIGMA**2 + extra).sqrt()
    return torch.zeros(N, D) + mean, sd.expand(N, D)


def rate_of(mean: Tensor, prior_mean: Tensor | float = 0.0) -> Tensor:
    q, p = dist.Normal(mean, variance().sqrt()), dist.Normal(torch.zeros(Q) + prior_mean, 1.0)
    return torch.distributions.kl_divergence(q, p).sum(-1)


def data() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(N, Q, generator=generator, dtype=torch.float64)
    noise = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return z @ WEIGHT.T + SIGMA * noise


class Generate(nn.Module):
    """p(z) p(x | z), with its weights as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(Q, D, bias=False)
        with torch.no_grad():
            self.decoder.weight.copy_(WEIGHT)

    def draw(self, x: Tensor, prior_mean: Tensor | float = 0.0) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(Q) + prior_mean, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(self.decoder(z), SIGMA).to_event(1), obs=x)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            self.draw(x)


class Infer(nn.Module):
    """q(z | x), the posterior, with its weights as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, Q, bias=False)
        self.log_scale = nn.Parameter(variance().log() / 2)
        with torch.no_grad():
            self.encoder.weight.copy_((WEIGHT / SIGMA**2 * variance()).T)

    def draw(self, x: Tensor, prior_mean: Tensor | float = 0.0) -> None:
        mean = self.encoder(x) + variance() * prior_mean
        pyro.sample("z", dist.Normal(mean, self.log_scale.exp()).to_event(1))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            self.draw(x)


def _plain(pair: Pair, batch: tuple[Tensor, ...]) -> Exact:
    x = batch[0]
    mean = posterior_mean(x)
    return Exact(pair, batch, log_marginal(x), {"z": mean}, rate_of(mean), marginal_of())


def modules() -> Exact:
    return _plain(Pair(Generate(), Infer()), (data(),))


def functions() -> Exact:
    generate, infer = Generate(), Infer()

    def model(x: Tensor) -> None:
        pyro.module("generate", generate)
        generate(x)

    def guide(x: Tensor) -> None:
        pyro.module("infer", infer)
        infer(x)

    return _plain(Pair(model, guide), (data(),))


class _PyroModel(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = PyroParam(WEIGHT.clone())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, SIGMA).to_event(1), obs=x)


class _PyroGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroParam(variance().sqrt(), dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(posterior_mean(x), self.scale).to_event(1))


def pyro_modules() -> Exact:
    return _plain(Pair(_PyroModel(), _PyroGuide()), (data(),))


class _Posterior(Conditional):
    def __init__(self) -> None:
        super().__init__(Q)
        self.infer = Infer()

    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        scale = self.infer.log_scale.exp()
        return dist.Normal(self.infer.encoder(context[0]), scale).to_event(1)


def vae() -> Exact:
    likelihood = likelihoods.Gaussian(Generate().decoder, D, sigma=SIGMA)
    return _plain(VAE(priors.StandardNormal(Q), likelihood, _Posterior()), (data(),))


def frozen() -> Exact:
    found = modules()
    for program in (found.pair.model, found.pair.guide):
        program.requires_grad_(requires_grad=False)
    return found


def labels() -> Exact:
    """The prior depends on a class that both programs are given."""
    x, y = data(), torch.arange(N) % 2
    centre = torch.tensor([[-1.0, 0.5], [1.0, 0.0]])

    class Model(Generate):
        def forward(self, x: Tensor, y: Tensor) -> None:  # type: ignore[override]
            with pyro.plate("data", len(x)):
                self.draw(x, centre[y])

    class Guide(Infer):
        def forward(self, x: Tensor, y: Tensor) -> None:  # type: ignore[override]
            with pyro.plate("data", len(x)):
                self.draw(x, centre[y])

    mean = posterior_mean(x, centre[y])
    decoded = centre[y] @ WEIGHT.T
    return Exact(
        Pair(Model(), Guide()),
        (x, y),
        log_marginal(x, decoded),
        {"z": mean},
        rate_of(mean, centre[y]),
        marginal_of(decoded),
    )


def two_sites() -> Exact:
    """z2 -> z1 -> x, in the guide z1 and then z2 given z1."""
    slope, noise = torch.tensor([0.6, -0.8]), 0.9
    x = data()
    prior = torch.outer(slope, slope) + noise**2 * torch.eye(Q)
    precision = torch.linalg.inv(prior) + WEIGHT.T @ WEIGHT / SIGMA**2
    covariance = torch.linalg.inv(precision)
    gain = covariance @ WEIGHT.T / SIGMA**2
    var2 = 1 / (1 + slope.square().sum() / noise**2)

    class Model(Generate):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                z1 = pyro.sample("z1", dist.Normal(z2 * slope, noise).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z1), SIGMA).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.MultivariateNormal(x @ gain.T, covariance))
            mean = var2 * (z1 @ slope) / noise**2
            pyro.sample("z2", dist.Normal(mean[..., None], var2.sqrt()).to_event(1))

    marginal = WEIGHT @ prior @ WEIGHT.T + SIGMA**2 * torch.eye(D)
    evidence = dist.MultivariateNormal(torch.zeros(D), marginal).log_prob(x)
    first = x @ gain.T
    second = (var2 * (first @ slope) / noise**2)[:, None]
    sd = marginal.diagonal().sqrt().expand(N, D)
    means = {"z1": first, "z2": second}
    return Exact(Pair(Model(), guide), (x,), evidence, means, None, (torch.zeros(N, D), sd))


def subsampled() -> Exact:
    """A plate that knows the full size, 100, and is given the rows."""

    class Model(Generate):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", 100, subsample_size=len(x)):
                self.draw(x)

    class Guide(Infer):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", 100, subsample_size=len(x)):
                self.draw(x)

    return _plain(Pair(Model(), Guide()), (data(),))


def subsampling() -> Exact:
    """A plate that draws its rows from all data by itself."""

    class Model(Generate):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), subsample_size=8) as rows:
                self.draw(x[rows])

    class Guide(Infer):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), subsample_size=8) as rows:
                self.draw(x[rows])

    return _plain(Pair(Model(), Guide()), (data(),))


def masked() -> Exact:
    """Every fourth datum is masked out, as padding is: it counts as nothing."""
    x, keep = data(), torch.arange(N) % 4 != 0

    class Model(Generate):
        def forward(self, x: Tensor, keep: Tensor) -> None:  # type: ignore[override]
            with pyro.plate("data", len(x)), poutine.mask(mask=keep):
                self.draw(x)

    class Guide(Infer):
        def forward(self, x: Tensor, keep: Tensor) -> None:  # type: ignore[override]
            with pyro.plate("data", len(x)), poutine.mask(mask=keep):
                self.draw(x)

    plain = _plain(Pair(Model(), Guide()), (x, keep))
    assert plain.log_evidence is not None
    assert plain.rate is not None
    evidence, rate = torch.where(keep, plain.log_evidence, 0.0), torch.where(keep, plain.rate, 0.0)
    return Exact(plain.pair, plain.batch, evidence, plain.means, rate, plain.marginal)


def masked_apart() -> Exact:
    """As `masked`, but the guide has no mask: what is left out is left out of both."""
    found = masked()

    class Guide(Infer):
        def forward(self, x: Tensor, keep: Tensor) -> None:  # type: ignore[override]
            super().forward(x)

    return replace(found, pair=Pair(found.pair.model, Guide()))


def imputed() -> Exact:
    """Every fourth datum is missing, by ``obs_mask=``, and has no guide: there q is the prior."""
    x, keep = data(), torch.arange(N) % 4 != 0

    class Model(Generate):
        def forward(self, x: Tensor, keep: Tensor) -> None:  # type: ignore[override]
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
                of_x = dist.Normal(self.decoder(z), SIGMA).to_event(1)
                pyro.sample("x", of_x, obs=x, obs_mask=keep)

    class Guide(Infer):
        def forward(self, x: Tensor, keep: Tensor) -> None:  # type: ignore[override]
            scale = torch.where(keep[..., None], self.log_scale.exp(), 1.0)
            with pyro.plate("data", len(x)):
                mean = torch.where(keep[..., None], self.encoder(x), 0.0)
                pyro.sample("z", dist.Normal(mean, scale).to_event(1))

    mean = torch.where(keep[:, None], posterior_mean(x), 0.0)
    evidence, rate = (torch.where(keep, v, 0.0) for v in (log_marginal(x), rate_of(mean)))
    found = Exact(Pair(Model(), Guide()), (x, keep), evidence, {"z": mean}, rate, marginal_of())
    return replace(found, site="x_observed")


def guide_factor() -> Exact:
    """A term of the training in the guide, as of a classifier of codes: no part of log q."""

    class Guide(Infer):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(Q, 1)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                mean = self.encoder(x)
                z = pyro.sample("z", dist.Normal(mean, self.log_scale.exp()).to_event(1))
                loss = -dist.Bernoulli(logits=self.classifier(z)[..., 0]).log_prob(torch.ones(()))
                pyro.factor("class_loss", loss, has_rsample=True)

    return _plain(Pair(Generate(), Guide()), (data(),))


def enumerated() -> Exact:
    """A class that the model sums out, of a second observed site."""
    x = data()
    y = torch.linspace(-2.0, 2.0, N)
    logits, centres = torch.tensor([0.2, -0.3]), torch.tensor([-1.0, 1.5])

    class Model(Generate):
        @config_enumerate
        def forward(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                self.draw(x)
                c = pyro.sample("c", dist.Categorical(logits=logits))
                pyro.sample("y", dist.Normal(centres[c], 0.5), obs=y)

    class Guide(Infer):
        def forward(self, x: Tensor, y: Tensor) -> None:  # type: ignore[override]
            super().forward(x)

    of_y = (logits.log_softmax(-1) + dist.Normal(centres, 0.5).log_prob(y[:, None])).logsumexp(-1)
    mean = posterior_mean(x)
    evidence = log_marginal(x) + of_y
    return Exact(Pair(Model(), Guide()), (x, y), evidence, {"z": mean}, rate_of(mean))


def discrete() -> Exact:
    """Binary latents, whose draws have no gradient."""
    x = data()
    norm = WEIGHT.square().sum(0)

    class Model(Generate):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(torch.full((Q,), 0.5)).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), SIGMA).to_event(1), obs=x)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(D, Q)
            with torch.no_grad():
                self.encoder.weight.copy_(WEIGHT.T / SIGMA**2)
                self.encoder.bias.copy_(-norm / (2 * SIGMA**2))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))

    codes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * Q)
    each = dist.Normal(codes @ WEIGHT.T, SIGMA).log_prob(x[:, None]).sum(-1)
    evidence = each.logsumexp(1) - Q * math.log(2)
    mean = torch.sigmoid(x @ WEIGHT / SIGMA**2 - norm / (2 * SIGMA**2))
    q, p = dist.Bernoulli(mean), dist.Bernoulli(torch.full_like(mean, 0.5))
    rate = torch.distributions.kl_divergence(q, p).sum(-1)
    return Exact(Pair(Model(), Guide()), (x,), evidence, {"z": mean}, rate)


def global_latent() -> Exact:
    """A shift g that all data share, beside latents of the data: z | g, x is Gaussian, too."""
    x = data()
    whole = torch.ones(D)
    noise = WEIGHT @ WEIGHT.T + SIGMA**2 * torch.eye(D)
    weight = torch.linalg.solve(noise, whole)
    precision = 1 + N * whole @ weight
    mean = (x @ weight).sum() / precision

    class Model(Generate):
        def forward(self, x: Tensor) -> None:
            g = pyro.sample("g", dist.Normal(torch.tensor(0.0), 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
                loc = self.decoder(z) + g[..., None]
                pyro.sample("x", dist.Normal(loc, SIGMA).to_event(1), obs=x)

    class Guide(Infer):
        def forward(self, x: Tensor) -> None:
            g = pyro.sample("g", dist.Normal(mean, precision**-0.5))
            with pyro.plate("data", len(x)):
                self.draw(x - g[..., None])

    both = torch.block_diag(*[noise] * N) + 1.0
    evidence = dist.MultivariateNormal(torch.zeros(N * D), both).log_prob(x.flatten())
    return Exact(Pair(Model(), Guide()), (x,), evidence, {"z": posterior_mean(x - mean)})


def autoguide() -> Exact:
    """One global latent under Pyro's AutoNormal, whose parameters are set to the posterior's."""
    x = data()[:, 0]

    def model(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(g, SIGMA), obs=x)

    guide = AutoNormal(model)
    guide(x)
    precision = 1 + N / SIGMA**2
    with torch.no_grad():
        guide.locs.g.copy_(x.sum() / SIGMA**2 / precision)
        guide.scales.g_unconstrained.copy_(torch.tensor(precision**-0.5).expm1().log())
    covariance = torch.ones(N, N) + SIGMA**2 * torch.eye(N)
    evidence = dist.MultivariateNormal(torch.zeros(N), covariance).log_prob(x)
    return Exact(Pair(model, guide), (x,), evidence, {})


def second_axis() -> Exact:
    """Data along the second axis, as in time-major batches, and a constant that they share."""

    class Model(Generate):
        def forward(self, x: Tensor, weight: Tensor) -> None:  # type: ignore[override]
            with pyro.plate("data", x.shape[1]):
                z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
                loc = self.decoder(z) * weight
                pyro.sample("x", dist.Normal(loc, SIGMA).to_event(1), obs=x.T)

    class Guide(Infer):
        def forward(self, x: Tensor, weight: Tensor) -> None:  # type: ignore[override]
            with pyro.plate("data", x.shape[1]):
                self.draw(x.T)

    plain = _plain(Pair(Model(), Guide(), plate="data"), (data(),))
    return replace(plain, batch=(data().T.contiguous(), torch.ones(D)), axis=1)


def no_plate() -> Exact:
    """One latent for the whole data set, which no plate counts: it is one datum."""
    x = data()
    precision = 1 + N * WEIGHT.square().sum(0) / SIGMA**2
    mean = (x @ WEIGHT).sum(0) / SIGMA**2 / precision

    class Model(Generate):
        def forward(self, x: Tensor) -> None:
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            loc = self.decoder(z)[..., None, :].expand(*z.shape[:-1], *x.shape)
            pyro.sample("x", dist.Normal(loc, SIGMA).to_event(2), obs=x)

    class Guide(Infer):
        def forward(self, x: Tensor) -> None:
            of_all = variance() * precision  # over the precision with one datum
            scale = self.log_scale.exp() / of_all**0.5
            pyro.sample("z", dist.Normal(self.encoder(x).sum(0) / of_all, scale).to_event(1))

    noise = WEIGHT @ WEIGHT.T
    both = torch.ones(N, N).kron(noise) + SIGMA**2 * torch.eye(N * D)
    evidence = dist.MultivariateNormal(torch.zeros(N * D), both).log_prob(x.flatten())
    q, p = dist.Normal(mean, precision**-0.5), dist.Normal(torch.zeros(Q), 1.0)
    rate = torch.distributions.kl_divergence(q, p).sum()
    found = Exact(Pair(Model(), Guide()), (x,), evidence[None], {"z": mean[None]}, rate[None])
    sd = marginal_of()[1]
    return replace(found, marginal=(torch.zeros(1, N, D), sd[None]), num_data=1)


def point() -> Exact:
    """An autoencoder: its guide is a point mass, at the posterior's mean."""
    likelihood = likelihoods.Gaussian(Generate().decoder, D, sigma=SIGMA)
    pair = VAE(priors.StandardNormal(Q), likelihood, guides.Point(Infer().encoder, Q))
    x = data()
    return Exact(pair, (x,), None, {"z": posterior_mean(x)})


def improper() -> Exact:
    """A flat prior, under which there is no evidence."""
    likelihood = likelihoods.Gaussian(Generate().decoder, D, sigma=SIGMA)
    x = data()
    pair = VAE(priors.Flat(Q), likelihood, _Posterior())
    return Exact(pair, (x,), None, {"z": posterior_mean(x)})


KINDS: dict[str, Callable[[], Exact]] = {
    f.__name__: f
    for f in (
        modules,
        functions,
        pyro_modules,
        vae,
        frozen,
        labels,
        two_sites,
        subsampled,
        subsampling,
        masked,
        masked_apart,
        imputed,
        guide_factor,
        enumerated,
        discrete,
        global_latent,
        autoguide,
        no_plate,
        second_axis,
        point,
        improper,
    )
}
"""Name -> constructor; a new kind of pair goes in here and meets every tool."""
