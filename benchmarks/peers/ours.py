"""pvae: `pvae.SVI` over `pvae.data.Batches`; the option is the engine.

The scale is a softplus, and the rate is drawn, log p(z) - log q(z | x).
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import pvae
from peers.common import FLOW, HIDDEN, LATENT, LR, PIXELS, Case, Side, images
from pvae import VAE, likelihoods, priors, recipes
from pvae import objectives as o
from pvae.data import Batches, as_source
from pvae.errors import PvaeWarning
from pvae.networks import MLP


def build(model: str) -> VAE:
    latent, hidden = LATENT[model], HIDDEN[model]
    if model == "conv":
        return recipes.vae((1, 28, 28), latent, network="conv", hidden=hidden)
    if model == "flow":
        import zuko

        return VAE(
            priors.StandardNormal(latent),
            likelihoods.Bernoulli(lambda p: MLP(latent, p * PIXELS, hidden), PIXELS),
            zuko.flows.NICE(latent, PIXELS, **FLOW),
        )
    activation = nn.Tanh if model == "iwae" else nn.ReLU
    return recipes.vae(PIXELS, latent, hidden=hidden, activation=activation)


def stepping(pair: VAE, objective: o.Objective, engine: Any) -> Callable[[Tensor], float]:
    """From a batch to its loss, after a step on it."""
    optimizer = functools.partial(torch.optim.Adam, lr=LR)
    return pvae.SVI(pair.model, pair.guide, optimizer, objective, engine=engine).step


def make(case: Case, option: str) -> Side:
    torch.set_num_threads(1)
    torch.manual_seed(case.seed)
    warnings.simplefilter("error", PvaeWarning)  # that it isn't compiled after all
    pair = build(case.model).to(case.device)
    objective = o.IWAE(case.draws) if case.model == "iwae" else o.ELBO()
    step = stepping(pair, objective, option)
    x = torch.from_numpy(images(case)).to(case.device)
    if case.model == "conv":
        x = x.reshape(-1, 1, 28, 28)
    batches = Batches(as_source(x, case.device), case.batch, case.seed)

    def stream() -> Iterator[Tensor]:
        for epoch in itertools.count():
            for (batch,) in batches.epoch(epoch):
                yield batch

    source = stream()

    def run(steps: int) -> float:
        losses = [step(batch) for batch in itertools.islice(source, steps)]
        return float(sum(losses)) / (steps * case.batch)

    return Side(run, sum(p.numel() for p in pair.parameters()), ("pvae", "torch", "pyro-ppl"))
