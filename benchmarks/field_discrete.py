"""Pairs with states that are summed out: mixtures, chains, topics, animals seen and not seen."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from field import Row, mlp, noise, row
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor

import pvae

STATES = 3
LONG = {"epochs": 300, "lr": 0.02}


@row("Gaussian mixture with shared parameters, assignments summed out")
def gaussian_mixture() -> Row:
    x = torch.cat([noise(30, seed=1) - 3, noise(30, seed=2) + 3])

    @config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 3.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(Vindex(locs)[..., k], 1.0), obs=x)

    guide = AutoNormal(poutine.block(model, expose=["weights", "locs"]))
    return Row((model, guide), (x,), objective=TraceEnum_ELBO, options=LONG)


@row("Gaussian mixture by maximum likelihood, no latent with a guide")
def mixture_by_likelihood() -> Row:
    x = torch.cat([noise(30, seed=1) - 3, noise(30, seed=2) + 3])

    @config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pass

    def exact() -> float:
        store = pyro.get_param_store()
        each = dist.Normal(store["locs"], 1.0).log_prob(x[:, None]) + store["weights"].log()
        return float(each.logsumexp(-1).sum())

    return Row((model, guide), (x,), exact, "all states", objective=TraceEnum_ELBO, options=LONG)


def forward(start: Tensor, move: Tensor, emit: Tensor) -> Tensor:
    """log p of observations by the forward algorithm; ``emit`` is (N, T, states)."""
    alpha = start + emit[:, 0]
    for t in range(1, emit.shape[1]):
        alpha = (alpha.unsqueeze(-1) + move).logsumexp(-2) + emit[:, t]
    return alpha.logsumexp(-1)


@row("hidden Markov model, sequences in a plate, pyro.markov")
def hidden_markov() -> Row:
    x = noise(20, 6, seed=3).cumsum(1)

    @config_enumerate
    def model(x: Tensor) -> None:
        move = pyro.param("move", torch.eye(STATES) + 0.2, constraint=constraints.simplex)
        locs = pyro.param("locs", torch.tensor([-2.0, 0.0, 2.0]))
        with pyro.plate("sequences", len(x)):
            z = 0
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Categorical(move[z]))
                pyro.sample(f"x_{t}", dist.Normal(locs[z], 1.0), obs=x[:, t])

    def guide(x: Tensor) -> None:
        pass

    def exact() -> float:
        store = pyro.get_param_store()
        move = store["move"].log()
        emit = dist.Normal(store["locs"], 1.0).log_prob(x.unsqueeze(-1))
        return float(forward(move[0], move, emit).sum())

    return Row(
        (model, guide), (x,), exact, "forward algorithm", objective=TraceEnum_ELBO, options=LONG
    )


@row("hidden Markov model, Bayesian, sequences of several lengths masked")
def bayesian_markov() -> Row:
    x, lengths = noise(20, 6, seed=3).cumsum(1), torch.arange(20) % 5 + 2

    @config_enumerate
    def model(x: Tensor, lengths: Tensor) -> None:
        move = pyro.sample("move", dist.Dirichlet(torch.eye(STATES) + 0.5).to_event(1))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 0, 2]), 1.0).to_event(1))
        with pyro.plate("sequences", len(x), dim=-1):
            z = torch.tensor(0)
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=t < lengths):
                    probs = Vindex(move)[..., z, :]
                    z = pyro.sample(f"z_{t}", dist.Categorical(probs))
                    pyro.sample(f"x_{t}", dist.Normal(Vindex(locs)[..., z], 1.0), obs=x[:, t])

    guide = AutoDelta(poutine.block(model, expose=["move", "locs"]))
    return Row((model, guide), (x, lengths), objective=TraceEnum_ELBO, options=LONG)


@row("LDA: words in a plate within documents, topics of words summed out")
def lda() -> Row:
    docs, words, vocabulary, topics = 12, 8, 10, 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(vocabulary, (docs, words), generator=generator)
    encoder = mlp(vocabulary, topics)

    start = torch.softmax(noise(topics, vocabulary, seed=4), -1)

    @config_enumerate
    def model(x: Tensor) -> None:
        beta = pyro.param("beta", start, constraint=constraints.simplex)
        with pyro.plate("documents", len(x), dim=-2):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(topics)))
            with pyro.plate("words", x.shape[1], dim=-1):
                z = pyro.sample("z", dist.Categorical(theta))
                pyro.sample("w", dist.Categorical(beta[z]), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("documents", len(x), dim=-2):
            counts = torch.nn.functional.one_hot(x, vocabulary).sum(1).to(beta_type())
            concentration = torch.nn.functional.softplus(encoder(counts)) + 0.1
            pyro.sample("theta", dist.Dirichlet(concentration.unsqueeze(-2)))

    def exact() -> float:
        beta = pyro.get_param_store()["beta"]
        share = (torch.arange(20000) + 0.5) / 20000
        theta = torch.stack([share, 1 - share], -1)  # uniform, as Dirichlet(1, 1) is
        each = (theta @ beta).log()[:, x].sum(-1)
        return float((each.logsumexp(0) - torch.tensor(20000.0).log()).sum())

    return Row((model, guide), (x,), exact, "quadrature", objective=TraceEnum_ELBO, options=LONG)


def beta_type() -> torch.dtype:
    return torch.get_default_dtype()


@row("capture-recapture (Cormack-Jolly-Seber): alive or not summed out along time")
def capture_recapture() -> Row:
    animals, years = 20, 5
    generator = torch.Generator().manual_seed(0)
    seen = (torch.rand(animals, years, generator=generator) < 0.5).to(beta_type())
    seen[:, 0] = 1.0

    def model(seen: Tensor) -> None:
        survival = pyro.sample("survival", dist.Beta(torch.tensor(1.0), 1.0))
        detection = pyro.sample("detection", dist.Beta(torch.tensor(1.0), 1.0))
        with pyro.plate("animals", len(seen), dim=-1):
            alive = torch.ones(len(seen))
            for t in pyro.markov(range(1, seen.shape[1])):
                alive = pyro.sample(
                    f"alive_{t}",
                    dist.Bernoulli(survival * alive),
                    infer={"enumerate": "parallel"},
                )
                fn = dist.Bernoulli(detection * alive)
                pyro.sample(f"seen_{t}", fn, obs=seen[:, t])

    def exact() -> float:
        points = (torch.arange(100) + 0.5) / 100
        total = torch.stack([torch.stack([histories(s, d) for d in points]) for s in points])
        return float(total.flatten().logsumexp(0) - torch.tensor(1e4).log())

    def histories(survival: Tensor, detection: Tensor) -> Tensor:
        move = torch.stack([torch.tensor([1.0, 0.0]), torch.stack([1 - survival, survival])])
        emit = torch.stack([seen < 0, seen < 0], -1).to(beta_type())
        emit[..., 0] = (1 - seen).log()
        emit[..., 1] = torch.where(seen > 0, detection, 1 - detection).log()
        start = torch.tensor([0.0, 1.0]).log()
        emit = emit[:, 1:]
        first = (start[:, None] + move.log()).logsumexp(0)
        return forward(first, move.log(), emit).sum()

    guide = AutoNormal(poutine.block(model, expose=["survival", "detection"]))
    options = {"epochs": 400, "lr": 0.05}
    pair = (model, guide)
    return Row(pair, (seen,), exact, "quadrature", objective=TraceEnum_ELBO, options=options)


@row("a discrete latent that all data share, summed out")
def global_discrete() -> Row:
    x = 1.0 + noise(20, seed=5)

    @config_enumerate
    def model(x: Tensor) -> None:
        sigma = pyro.param("sigma", torch.tensor(1.0), constraint=constraints.positive)
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[k], sigma), obs=x)

    def guide(x: Tensor) -> None:
        pass

    def exact() -> float:
        sigma = pyro.get_param_store()["sigma"]
        locs = torch.tensor([-1.0, 1.0])
        each = dist.Normal(locs, sigma).log_prob(x[:, None]).sum(0) - torch.tensor(2.0).log()
        return float(each.logsumexp(0))

    return Row((model, guide), (x,), exact, "both states", objective=TraceEnum_ELBO, options=LONG)


@row("a class enumerated in the guide, alone")
def guide_enumerated() -> Row:
    encoder = mlp(4, STATES)
    x, start = noise(40, 4, seed=6), noise(STATES, 4, seed=7)

    def model(x: Tensor) -> None:
        locs = pyro.param("locs", start)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(STATES)))
            pyro.sample("x", dist.Normal(locs[k], 1.0).to_event(1), obs=x)

    @config_enumerate
    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=encoder(x)))

    def exact() -> float:
        locs = pyro.get_param_store()["locs"]
        each = dist.Normal(locs, 1.0).to_event(1).log_prob(x[:, None])
        return float((each.logsumexp(-1) - torch.tensor(float(STATES)).log()).sum())

    return Row((model, guide), (x,), exact, "all states", objective=TraceEnum_ELBO, options=LONG)


@row("mixture prior with the component summed out")
def mixture_prior() -> Row:
    encoder, decoder = mlp(4, 4), mlp(2, 4)
    x, start = noise(40, 4, seed=8), noise(STATES, 2, seed=9)

    @config_enumerate
    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        centres = pyro.param("centres", start)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(STATES)))
            z = pyro.sample("z", dist.Normal(centres[k], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.7).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Row(pvae.Pair(model, guide), (x,), objective=TraceEnum_ELBO, options=LONG)
