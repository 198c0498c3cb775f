"""Pairs with a latent for each datum: autoencoders and their kin, as others write them."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from field import Row, gaussian_evidence, grid, mlp, noise, row
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.nn import functional as F

import pvae

N, D, Q = 60, 5, 2


def continuous() -> Tensor:
    return noise(N, Q, seed=1) @ noise(Q, D, seed=2) + 0.5 * noise(N, D, seed=3)


def binary() -> Tensor:
    return (continuous() > 0).to(torch.get_default_dtype())


def counts(seed: int = 4) -> Tensor:
    rate = (0.5 * noise(N, Q, seed=seed) @ noise(Q, D, seed=seed + 1) + 1.0).exp()
    return torch.poisson(rate, generator=torch.Generator().manual_seed(seed))


@row("probabilistic PCA by hand")
def probabilistic_pca() -> Row:
    x, start = continuous(), 0.5 * noise(D, Q, seed=5)

    def model(x: Tensor) -> None:
        weight = pyro.param("weight", start)
        loc = pyro.param("loc", torch.zeros(D))
        sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T + loc, sigma).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", torch.zeros(Q, D))
        tril = pyro.param("tril", torch.eye(Q), constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ gain.T, scale_tril=tril))

    def exact() -> float:
        store = pyro.get_param_store()
        return gaussian_evidence(x, store["loc"], store["weight"], store["sigma"])

    return Row((model, guide), (x,), exact, "closed form")


@row("VAE of Pyro's tutorial (Bernoulli, modules registered in the programs)")
def tutorial_vae() -> Row:
    class Guided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.encoder = mlp(Q, D), mlp(D, 2 * Q)

        def model(self, x: Tensor) -> None:
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", x.shape[0]):
                loc, scale = x.new_zeros(x.shape[0], Q), x.new_ones(x.shape[0], Q)
                z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
                probs = torch.sigmoid(self.decoder(z))
                pyro.sample("obs", dist.Bernoulli(probs).to_event(1), obs=x.reshape(-1, D))

        def guide(self, x: Tensor) -> None:
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", x.shape[0]):
                loc, log_scale = self.encoder(x).chunk(2, -1)
                pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    vae = Guided()
    return Row((vae.model, vae.guide), (binary(),), options={"batch_size": 20})


@row("VAE of pvae's parts")
def parts() -> Row:
    return Row(pvae.recipes.vae(D, Q, hidden=(16,)), (binary(),), options={"batch_size": 20})


@row("beta-VAE by poutine.scale")
def beta_vae() -> Row:
    encoder, decoder = mlp(D, 2 * Q), mlp(Q, D)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=4.0):
                z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)), poutine.scale(scale=4.0):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Row((model, guide), (continuous(),))


@row("conditional VAE: the label in both programs")
def conditional_vae() -> Row:
    encoder, decoder, prior = mlp(D + 3, 2 * Q), mlp(Q + 3, D), nn.Embedding(3, Q)

    def with_label(h: Tensor, y: Tensor) -> Tensor:
        label = F.one_hot(y, 3).to(h.dtype)
        return torch.cat([h, label.expand(*h.shape[:-1], 3)], -1)

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("decoder", decoder)
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(prior(y), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(with_label(z, y)), 0.7).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(with_label(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Row((model, guide), (continuous(), torch.arange(N) % 3))


def _m2(*, labelled: bool, enumerate_guide: bool = False, factor: bool = False) -> Row:
    classes = 3
    encoder, decoder = mlp(D + classes, 2 * Q), mlp(Q + classes, D)
    classifier = mlp(D, classes)

    def both(a: Tensor, b: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
        return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], -1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(classes)), obs=y)
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(both(z, y))).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("encoder", encoder)
        pyro.module("classifier", classifier)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=classifier(x)))
            elif factor:
                fit = dist.OneHotCategorical(logits=classifier(x)).log_prob(y)
                pyro.factor("classification", 5.0 * fit, has_rsample=True)
            loc, log_scale = encoder(both(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = binary()
    y = F.one_hot(torch.arange(N) % classes, classes).to(x.dtype)
    batch = (x, y) if labelled else (x,)
    if enumerate_guide:
        return Row((model, config_enumerate(guide)), batch, objective=TraceEnum_ELBO)
    return Row((model, guide), batch)


@row("semi-supervised VAE (M2), unlabelled, the class drawn")
def m2_unlabelled() -> Row:
    return _m2(labelled=False)


@row("semi-supervised VAE (M2), unlabelled, the class enumerated in the guide")
def m2_enumerated() -> Row:
    return _m2(labelled=False, enumerate_guide=True)


@row("semi-supervised VAE (M2), labelled, classification as a factor in the guide")
def m2_labelled() -> Row:
    return _m2(labelled=True, factor=True)


@row("scVI-like: negative binomial counts, library size a latent")
def scvi() -> Row:
    encoder, library, decoder = mlp(D, 2 * Q), mlp(D, 2), mlp(Q, D)
    x = counts()
    totals = x.sum(1).clamp(min=1).log()
    centre, spread = float(totals.mean()), float(totals.std())

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        theta = pyro.param("theta", torch.ones(D), constraint=constraints.positive)
        with pyro.plate("cells", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            size = pyro.sample("l", dist.LogNormal(torch.tensor([centre]), spread).to_event(1))
            mean = size * torch.softmax(decoder(z), -1)
            logits = (mean + 1e-6).log() - (theta + 1e-6).log()
            fn = dist.NegativeBinomial(total_count=theta, logits=logits)
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("library", library)
        with pyro.plate("cells", len(x)):
            h = torch.log1p(x)
            loc, log_scale = encoder(h).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc, log_scale = library(h).chunk(2, -1)
            pyro.sample("l", dist.LogNormal(loc + centre, log_scale.exp()).to_event(1))

    return Row((model, guide), (x,))


@row("scANVI-like: hierarchy of latents, class drawn, a factor in the guide")
def scanvi() -> Row:
    classes = 3
    first, second, classifier = mlp(D, 2 * Q), mlp(Q + classes, 2 * Q), mlp(Q, classes)
    middle, decoder = mlp(Q + classes, 2 * Q), mlp(Q, D)

    def split(net: nn.Module, *parts: Tensor) -> tuple[Tensor, Tensor]:
        shape = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
        loc, raw = net(torch.cat([p.expand(*shape, -1) for p in parts], -1)).chunk(2, -1)
        return loc, F.softplus(raw) + 1e-3

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("middle", middle)
        pyro.module("decoder", decoder)
        with pyro.plate("cells", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(classes)), obs=y)
            z = pyro.sample("z", dist.Normal(*split(middle, u, y)).to_event(1))
            pyro.sample("x", dist.Poisson(F.softplus(decoder(z)) + 1e-3).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        for name, net in {"first": first, "second": second, "classifier": classifier}.items():
            pyro.module(name, net)
        with pyro.plate("cells", len(x)):
            z = pyro.sample("z", dist.Normal(*split(first, torch.log1p(x))).to_event(1))
            fit = dist.OneHotCategorical(logits=classifier(z)).log_prob(y)
            pyro.factor("classification_loss", 10.0 * fit, has_rsample=True)
            pyro.sample("u", dist.Normal(*split(second, z, y)).to_event(1))

    y = F.one_hot(torch.arange(N) % classes, classes).to(torch.get_default_dtype())
    return Row((model, guide), (counts(), y))


@row("identifiable VAE: the prior is a network of covariates")
def ivae() -> Row:
    encoder, decoder, prior = mlp(D + 2, 2 * Q), mlp(Q, D), mlp(2, Q)

    def model(x: Tensor, u: Tensor) -> None:
        pyro.module("decoder", decoder)
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, F.softplus(prior(u)) + 0.1).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor, u: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(torch.cat([x, u], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Row((model, guide), (continuous(), noise(N, 2, seed=8)))


@row("missing values: a mask on the likelihood")
def missing() -> Row:
    encoder, decoder = mlp(D, 2 * Q), nn.Linear(Q, D)
    x, seen = continuous(), noise(N, D, seed=9) > -0.8

    def model(x: Tensor, seen: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.8).mask(seen).to_event(1), obs=x)

    def guide(x: Tensor, seen: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x * seen).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def exact() -> float:
        total = 0.0
        for one, kept in zip(x, seen, strict=True):
            if kept.any():
                weight, loc = decoder.weight[kept], decoder.bias[kept]
                total += gaussian_evidence(one[kept][None], loc, weight, 0.8)
        return total

    return Row((model, guide), (x * seen, seen), exact, "closed form")


@row("normalising-flow guide (Pyro's planar flow on an encoder's Gaussian)")
def flow_guide() -> Row:
    encoder, decoder = mlp(D, 2 * Q), mlp(Q, D)
    flow = T.planar(Q)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    return Row((model, guide), (continuous(),))


@row("zuko flow as the guide (neural spline, conditional)")
def zuko_guide() -> Row:
    import zuko
    from pyro.contrib.zuko import ZukoToPyro

    decoder = mlp(Q, D)
    flow = zuko.flows.NSF(Q, D, bins=4, transforms=1, hidden_features=(16,))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(flow(x)))

    return Row((model, guide), (continuous(),))


@row("VQ-like: a Delta at the nearest code, straight-through")
def vq() -> Row:
    encoder, decoder = mlp(D, Q), mlp(Q, D)
    book = nn.Parameter(noise(8, Q, seed=10))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        codes = pyro.param("codes", book)
        with pyro.plate("data", len(x)):
            e = encoder(x)
            nearest = codes[torch.cdist(e, codes).argmin(-1)]
            pyro.sample("z", dist.Delta(e + nearest - e.detach(), event_dim=1))

    return Row((model, guide), (continuous(),))


@row("autoencoder: AutoDelta on the codes of each datum")
def auto_delta() -> Row:
    decoder = mlp(Q, D)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    return Row((model, AutoDelta(model)), (continuous(),))


@row("latents of each datum under AutoNormal")
def auto_local() -> Row:
    decoder = nn.Linear(Q, D)
    x = continuous()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.8).to_event(1), obs=x)

    def exact() -> float:
        return gaussian_evidence(x, decoder.bias, decoder.weight, 0.8)

    return Row((model, AutoNormal(model)), (x,), exact, "closed form")


@row("EasyGuide with an amortised group")
def easy_guide() -> Row:
    decoder = nn.Linear(Q, D)
    x = continuous()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.8).to_event(1), obs=x)

    class Amortised(EasyGuide):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.encoder = mlp(D, 2 * Q)

        def guide(self, x: Tensor) -> None:
            with self.plate("data", len(x)):
                loc, log_scale = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def exact() -> float:
        return gaussian_evidence(x, decoder.bias, decoder.weight, 0.8)

    return Row((model, Amortised(model)), (x,), exact, "closed form")


@row("PyroModule pair with PyroParam")
def pyro_modules() -> Row:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(Q, D)
            self.sigma = PyroParam(torch.tensor(1.0), constraints.positive)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), self.sigma).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(D, 2 * Q)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                loc, log_scale = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    model, x = Model(), continuous()

    def exact() -> float:
        return gaussian_evidence(x, model.decoder.bias, model.decoder.weight, model.sigma)

    return Row((model, Guide()), (x,), exact, "closed form")


@row("prodLDA: logistic-normal topics, multinomial counts")
def prod_lda() -> Row:
    words, topics = 12, 3
    encoder, beta = mlp(words, 2 * topics), nn.Linear(topics, words, bias=False)
    x = torch.poisson(torch.full((N, words), 2.0), generator=torch.Generator().manual_seed(0))
    x[:, 0] += 1

    def model(docs: Tensor) -> None:
        pyro.module("beta", beta)
        with pyro.plate("documents", docs.shape[0]):
            loc = docs.new_zeros(docs.shape[0], topics)
            raw = pyro.sample("logtheta", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            probs = F.softmax(beta(F.softmax(raw, -1)), -1)
            total = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total, probs), obs=docs)

    def guide(docs: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("documents", docs.shape[0]):
            loc, raw = encoder(torch.log1p(docs)).chunk(2, -1)
            pyro.sample("logtheta", dist.Normal(loc, (0.5 * raw).exp()).to_event(1))

    return Row((model, guide), (x,))


@row("Dirichlet topics: Dirichlet in model and guide, implicit reparametrisation")
def dirichlet() -> Row:
    words, topics = 12, 3
    encoder, beta = mlp(words, topics), nn.Linear(topics, words, bias=False)
    x = torch.poisson(torch.full((N, words), 2.0), generator=torch.Generator().manual_seed(0))

    def model(docs: Tensor) -> None:
        pyro.module("beta", beta)
        with pyro.plate("documents", len(docs)):
            theta = pyro.sample("theta", dist.Dirichlet(torch.full((topics,), 0.7)))
            rate = 2.0 * words * theta @ F.softmax(beta.weight, 0).T
            pyro.sample("obs", dist.Poisson(rate).to_event(1), obs=docs)

    def guide(docs: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("documents", len(docs)):
            pyro.sample("theta", dist.Dirichlet(F.softplus(encoder(torch.log1p(docs))) + 0.1))

    return Row((model, guide), (x,))


@row("zero-inflated Poisson counts")
def zero_inflated() -> Row:
    encoder, decoder = mlp(D, 2), mlp(1, D)
    x = counts() * (noise(N, D, seed=11) > -0.5)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        gate = pyro.param("gate", torch.full((D,), 0.3), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            fn = dist.ZeroInflatedPoisson(decoder(z).exp(), gate=gate)
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(torch.log1p(x)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def exact() -> float:
        z, step = grid(-9.0, 9.0)
        gate = pyro.get_param_store()["gate"]
        fn = dist.ZeroInflatedPoisson(decoder(z[:, None]).exp()[:, None], gate=gate).to_event(1)
        joint = fn.log_prob(x) + dist.Normal(0.0, 1.0).log_prob(z)[:, None]
        return float((joint.logsumexp(0) + step).sum())

    return Row((model, guide), (x,), exact, "quadrature")


@row("item response theory, 2PL: abilities by an encoder")
def irt() -> Row:
    items = 10
    encoder = mlp(items, 2)
    x = (noise(N, 1, seed=12) + noise(items, seed=13) + noise(N, items, seed=14) > 0).double()
    x = x.to(torch.get_default_dtype())

    def model(x: Tensor) -> None:
        slope = pyro.param("slope", torch.ones(items), constraint=constraints.positive)
        difficulty = pyro.param("difficulty", torch.zeros(items))
        with pyro.plate("persons", len(x)):
            ability = pyro.sample("ability", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            logits = slope * (ability - difficulty)
            pyro.sample("answers", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("persons", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("ability", dist.Normal(loc, log_scale.exp()).to_event(1))

    def exact() -> float:
        store = pyro.get_param_store()
        z, step = grid(-9.0, 9.0)
        logits = store["slope"] * (z[:, None] - store["difficulty"])
        joint = dist.Bernoulli(logits=logits[:, None]).to_event(1).log_prob(x)
        joint = joint + dist.Normal(0.0, 1.0).log_prob(z)[:, None]
        return float((joint.logsumexp(0) + step).sum())

    return Row((model, guide), (x,), exact, "quadrature")


@row("survival: exponential times, censoring as a factor")
def survival() -> Row:
    encoder, hazard = mlp(D, 2), mlp(1 + D, 1)
    covariates = continuous()
    times = noise(N, seed=15).exp()
    censored = noise(N, seed=16) > 0.7

    def model(c: Tensor, t: Tensor, censored: Tensor) -> None:
        pyro.module("hazard", hazard)
        with pyro.plate("patients", len(c)):
            frailty = pyro.sample("frailty", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            h = torch.cat([frailty, c.expand(*frailty.shape[:-1], D)], -1)
            rate = F.softplus(hazard(h)).squeeze(-1) + 1e-2
            with poutine.mask(mask=~censored):
                pyro.sample("t", dist.Exponential(rate), obs=t)
            pyro.factor("survived", torch.where(censored, -rate * t, torch.zeros_like(rate)))

    def guide(c: Tensor, t: Tensor, censored: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("patients", len(c)):
            loc, log_scale = encoder(c).chunk(2, -1)
            pyro.sample("frailty", dist.Normal(loc, log_scale.exp()).to_event(1))

    def exact() -> float:
        z, step = grid(-9.0, 9.0)
        h = torch.cat([z[:, None, None].expand(-1, N, 1), covariates.expand(len(z), N, D)], -1)
        rate = F.softplus(hazard(h)).squeeze(-1) + 1e-2
        each = torch.where(censored, -rate * times, rate.log() - rate * times)
        joint = each + dist.Normal(0.0, 1.0).log_prob(z)[:, None]
        return float((joint.logsumexp(0) + step).sum())

    return Row((model, guide), (covariates, times, censored), exact, "quadrature")


@row("neural process: context and target points of each function")
def neural_process() -> Row:
    context, target = 4, 6
    summary, decoder = mlp(2, 2 * Q), mlp(1 + Q, 1)
    grid_of = noise(N, context + target, seed=17)
    values = torch.sin(2 * grid_of) + 0.1 * noise(N, context + target, seed=18)

    def encode(x: Tensor, y: Tensor) -> dist.TorchDistribution:
        loc, raw = summary(torch.stack([x, y], -1)).mean(-2).chunk(2, -1)
        return dist.Normal(loc, 0.1 + 0.9 * torch.sigmoid(raw)).to_event(1)

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("summary", summary)
        pyro.module("decoder", decoder)
        with pyro.plate("functions", len(x)):
            z = pyro.sample("z", encode(x[:, :context], y[:, :context]))
            z = z.unsqueeze(-2).expand(*z.shape[:-1], target, Q)
            points = x[:, context:, None].expand(*z.shape[:-1], 1)
            loc = decoder(torch.cat([points, z], -1)).squeeze(-1)
            pyro.sample("y", dist.Normal(loc, 0.2).to_event(1), obs=y[:, context:])

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.module("summary", summary)
        with pyro.plate("functions", len(x)):
            pyro.sample("z", encode(x, y))

    return Row((model, guide), (grid_of, values))


@row("deep Markov model: a latent for each step, GRU guide")
def dmm() -> Row:
    steps = 4
    transition, emission = mlp(Q, 2 * Q), mlp(Q, D)
    rnn, combiner = nn.GRU(D, 8, batch_first=True), mlp(8 + Q, 2 * Q)
    x = noise(30, steps, D, seed=19).cumsum(1)

    def model(x: Tensor) -> None:
        pyro.module("transition", transition)
        pyro.module("emission", emission)
        z = x.new_zeros(len(x), Q)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(steps)):
                loc, raw = transition(z).chunk(2, -1)
                z = pyro.sample(f"z_{t}", dist.Normal(loc, F.softplus(raw) + 0.1).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(emission(z), 0.7).to_event(1), obs=x[:, t])

    def guide(x: Tensor) -> None:
        pyro.module("rnn", rnn)
        pyro.module("combiner", combiner)
        h = rnn(x.flip(1))[0].flip(1)
        z = x.new_zeros(len(x), Q)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(steps)):
                both = torch.cat([h[:, t].expand(*z.shape[:-1], 8), z], -1)
                loc, raw = combiner(both).chunk(2, -1)
                z = pyro.sample(f"z_{t}", dist.Normal(loc, F.softplus(raw) + 0.1).to_event(1))

    return Row((model, guide), (x,))


@row("time-major sequences, the data plate named")
def time_major() -> Row:
    steps = 4
    encoder, decoder = mlp(steps, 2), nn.Linear(1, steps)
    x = noise(steps, 30, seed=20)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("sequences", x.shape[1]):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            loc = decoder(z)
            for t in range(steps):
                pyro.sample(f"x_{t}", dist.Normal(loc[..., t], 0.8), obs=x[t])

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("sequences", x.shape[1]):
            loc, log_scale = encoder(x.T).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def exact() -> float:
        return gaussian_evidence(x.T, decoder.bias, decoder.weight, 0.8)

    return Row(pvae.Pair(model, guide, plate="sequences"), (x,), exact, "closed form")


@row("AIR-like: a number of objects drawn, objects present masked")
def air() -> Row:
    most = 2
    where, count, decoder = mlp(D, 2 * Q * most), mlp(D, most + 1), mlp(Q, D)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            number = pyro.sample("number", dist.Categorical(torch.ones(most + 1)))
            loc = x.new_zeros(D)
            for i in range(most):
                there = number > i
                with poutine.mask(mask=there):
                    z = pyro.sample(f"z_{i}", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
                loc = loc + decoder(z) * there[..., None]
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("where", where)
        pyro.module("count", count)
        with pyro.plate("data", len(x)):
            number = pyro.sample("number", dist.Categorical(logits=count(x)))
            loc, log_scale = where(x).reshape(len(x), most, 2 * Q).chunk(2, -1)
            for i in range(most):
                with poutine.mask(mask=number > i):
                    fn = dist.Normal(loc[:, i], log_scale[:, i].exp()).to_event(1)
                    pyro.sample(f"z_{i}", fn)

    return Row((model, guide), (continuous(),))


@row("binary latents: score-function gradients")
def sigmoid_belief() -> Row:
    encoder, decoder = mlp(D, 3), mlp(3, D)
    x = binary()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    def exact() -> float:
        codes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
        each = dist.Bernoulli(logits=decoder(codes)[:, None]).to_event(1).log_prob(x)
        return float((each.logsumexp(0) - 3 * math.log(2)).sum())

    return Row((model, guide), (x,), exact, "all 8 states")


@row("multimodal VAE: two observed sites")
def multimodal() -> Row:
    encoder, first, second = mlp(D + 4, 2 * Q), mlp(Q, D), mlp(Q, 4)

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("first", first)
        pyro.module("second", second)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(first(z), 0.5).to_event(1), obs=x)
            pyro.sample("y", dist.Categorical(logits=second(z)), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            h = torch.cat([x, F.one_hot(y, 4).to(x.dtype)], -1)
            loc, log_scale = encoder(h).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Row((model, guide), (continuous(), torch.arange(N) % 4))
