"""Pyro's SVI in the way of Pyro's own VAE example.

``pyro.module`` in model and guide, ``pyro.optim.Adam``, ``Trace_ELBO``, validation as it is by
default, which is on. With the option ``"same"`` the networks are those of all sides: one layer
gives location and logarithm of the variance, and the decoder gives logits. With ``"example"`` they
are as the example has them: a layer each for location and logarithm of the scale, and probabilities
from a sigmoid, not validated. The loss is a sum over the batch, which Adam doesn't see, and the
rate is drawn.
"""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn

from peers.common import HIDDEN, LATENT, LR, PIXELS, Case, Side, images
from peers.hand import layers, stream


class Same(nn.Module):
    """Model and guide as methods, on the networks of all sides."""

    encoder: Any

    def __init__(self) -> None:
        super().__init__()
        self.encoder = layers((PIXELS, *HIDDEN["mlp"], 2 * LATENT["mlp"]))
        self.decoder = layers((LATENT["mlp"], *HIDDEN["mlp"], PIXELS))

    def posterior(self, x: Tensor) -> Any:
        loc, log_var = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, (0.5 * log_var).exp()).to_event(1)

    def likelihood(self, z: Tensor) -> Any:
        return dist.Bernoulli(logits=self.decoder(z)).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            loc = x.new_zeros((len(x), LATENT["mlp"]))
            scale = x.new_ones((len(x), LATENT["mlp"]))
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            pyro.sample("obs", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("latent", self.posterior(x))


class Example(Same):
    """The same on the example's layers."""

    def __init__(self) -> None:
        super().__init__()
        (hidden,), latent = HIDDEN["mlp"], LATENT["mlp"]
        self.encoder = nn.ModuleDict(
            {
                "hidden": nn.Sequential(nn.Linear(PIXELS, hidden), nn.ReLU()),
                "loc": nn.Linear(hidden, latent),
                "log_scale": nn.Linear(hidden, latent),
            }
        )
        self.decoder.append(nn.Sigmoid())

    def posterior(self, x: Tensor) -> Any:
        h = self.encoder["hidden"](x)
        scale = self.encoder["log_scale"](h).exp()
        return dist.Normal(self.encoder["loc"](h), scale).to_event(1)

    def likelihood(self, z: Tensor) -> Any:
        return dist.Bernoulli(self.decoder(z), validate_args=False).to_event(1)


def make(case: Case, option: str) -> Side:
    torch.set_num_threads(1)
    pyro.set_rng_seed(case.seed)
    vae = (Example() if option == "example" else Same()).to(case.device)
    svi = SVI(vae.model, vae.guide, Adam({"lr": LR}), loss=Trace_ELBO())
    source = stream(torch.from_numpy(images(case)).to(case.device), case.batch)

    def run(steps: int) -> float:
        losses = [svi.step(batch) for batch in itertools.islice(source, steps)]
        return sum(losses) / (steps * case.batch)

    return Side(run, sum(p.numel() for p in vae.parameters()), ("pyro-ppl", "torch"))
