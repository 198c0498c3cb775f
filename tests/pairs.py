"""Pairs that pvae did not build, in plain Pyro style, as modellers write them.

Each constructor returns (model, guide, batch): a batch is what both are called with. Parameters in
Pyro's store go into the scope that the test has opened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

D, Q = 6, 2
Pair = tuple[Any, Any, tuple[Tensor, ...]]


def data(n: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, D, generator=generator).to(device)


def functions(device: torch.device, n: int = 12) -> Pair:
    """Functions with ``pyro.module``, as Pyro's VAE tutorial has them."""
    decoder = nn.Sequential(nn.Linear(Q, 8), nn.Tanh(), nn.Linear(8, D)).to(device)
    encoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 2 * Q)).to(device)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q), x.new_ones(Q)).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, (data(n, device),)


class _PyroModel(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(Q, D)
        self.sigma = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q), x.new_ones(Q)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.sigma).to_event(1), obs=x)


class _PyroGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, 2 * Q)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def pyro_modules(device: torch.device, n: int = 12) -> Pair:
    return _PyroModel().to(device), _PyroGuide().to(device), (data(n, device),)


class _TwoSitesModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.middle, self.decoder = nn.Linear(1, Q), nn.Linear(Q, D)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), x.new_ones(1)).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.middle(z2), x.new_tensor(0.7)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z1), x.new_tensor(1.0)).to_event(1), obs=x)


class _TwoSitesGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 2 * Q), nn.Linear(Q, 2)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, log_scale = self.first(x).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc, log_scale = self.second(z1).chunk(2, -1)
            pyro.sample("z2", dist.Normal(loc, log_scale.exp()).to_event(1))


def two_sites(device: torch.device, n: int = 12) -> Pair:
    """q(z1 | x) q(z2 | z1): the second site's distribution depends on the first's value."""
    return _TwoSitesModel().to(device), _TwoSitesGuide().to(device), (data(n, device),)


class _LabelModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.prior = nn.Linear(Q + 3, D), nn.Embedding(3, Q)

    def forward(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.prior(y), x.new_tensor(1.0)).to_event(1))
            onehot = torch.nn.functional.one_hot(y, 3).to(z.dtype)
            h = torch.cat([z, onehot.expand(*z.shape[:-1], 3)], -1)
            pyro.sample("x", dist.Normal(self.decoder(h), x.new_tensor(1.0)).to_event(1), obs=x)


class _LabelGuide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D + 3, 2 * Q)

    def forward(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            h = torch.cat([x, torch.nn.functional.one_hot(y, 3).to(x.dtype)], -1)
            loc, log_scale = self.encoder(h).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def labels(device: torch.device, n: int = 12) -> Pair:
    y = (torch.arange(n) % 3).to(device)
    return _LabelModel().to(device), _LabelGuide().to(device), (data(n, device), y)


class Generator(nn.Module):
    """A linear model written by hand; subclasses say what its data plate is."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(Q, D)

    def generate(self, x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_zeros(Q), x.new_ones(Q)).to_event(1))
        pyro.sample("x", dist.Normal(self.decoder(z), x.new_tensor(1.0)).to_event(1), obs=x)


class Inference(nn.Module):
    """Its guide."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, 2 * Q)

    def infer(self, x: Tensor) -> None:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def subsample_given(device: torch.device, n: int = 12, full: int = 100) -> Pair:
    """``plate(..., subsample=)``: the caller passes the minibatch, the plate scales it up."""

    class Model(Generator):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", full, subsample=torch.arange(len(x), device=x.device)):
                self.generate(x)

    class Guide(Inference):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", full, subsample=torch.arange(len(x), device=x.device)):
                self.infer(x)

    return Model().to(device), Guide().to(device), (data(n, device),)


def subsample_drawn(device: torch.device, n: int = 12, size: int = 5) -> Pair:
    """``plate(..., subsample_size=)``: the pair gets all data and draws its own minibatch."""

    class Model(Generator):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), subsample_size=size, device=x.device) as index:
                self.generate(x[index])

    class Guide(Inference):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), subsample_size=size, device=x.device) as index:
                self.infer(x[index])

    return Model().to(device), Guide().to(device), (data(n, device),)


class _GlobalModel(nn.Module):
    def __init__(self, full: int) -> None:
        super().__init__()
        self.full, self.decoder = full, nn.Linear(Q, D)

    def forward(self, x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(D), x.new_ones(D)).to_event(1))
        with pyro.plate("data", self.full, subsample=torch.arange(len(x), device=x.device)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q), x.new_ones(Q)).to_event(1))
            loc = self.decoder(z) + shift
            pyro.sample("x", dist.Normal(loc, x.new_tensor(1.0)).to_event(1), obs=x)


class _GlobalGuide(nn.Module):
    def __init__(self, full: int) -> None:
        super().__init__()
        self.full, self.encoder = full, nn.Linear(D, 2 * Q)
        self.loc, self.log_scale = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> None:
        pyro.sample("shift", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))
        with pyro.plate("data", self.full, subsample=torch.arange(len(x), device=x.device)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def global_latent(device: torch.device, n: int = 12) -> Pair:
    """A latent outside the data plate, which all data share."""
    return _GlobalModel(n).to(device), _GlobalGuide(n).to(device), (data(n, device),)


def autoguide(device: torch.device, n: int = 12) -> Pair:
    """Bayesian linear regression with ``AutoNormal``: all latents are global."""
    x = data(n, device)
    y = x.sum(1) + 0.1 * x[:, 0] ** 2

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(D), x.new_ones(D)).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(x.new_tensor(0.0), x.new_tensor(1.0)))
        with pyro.plate("data", n, subsample=torch.arange(len(x), device=x.device)):
            loc = (x * weight).sum(-1)
            pyro.sample("y", dist.Normal(loc, sigma), obs=y)

    guide = AutoNormal(model)
    guide(x, y)
    return model, guide, (x, y)


def masked(device: torch.device, n: int = 12) -> Pair:
    """``poutine.mask``: some data are padding."""

    class Model(Generator):
        def forward(self, x: Tensor, keep: Tensor) -> None:
            with pyro.plate("data", len(x)), poutine.mask(mask=keep):
                self.generate(x)

    class Guide(Inference):
        def forward(self, x: Tensor, keep: Tensor) -> None:
            with pyro.plate("data", len(x)), poutine.mask(mask=keep):
                self.infer(x)

    keep = (torch.arange(n) % 4 != 0).to(device)
    return Model().to(device), Guide().to(device), (data(n, device), keep)


def enumerated(device: torch.device, n: int = 12) -> Pair:
    """A class that the model sums out, over a Gaussian latent that has a guide."""

    class Model(Generator):
        def __init__(self) -> None:
            super().__init__()
            self.logits, self.shift = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, D))

        @config_enumerate
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(Q), x.new_ones(Q)).to_event(1))
                c = pyro.sample("c", dist.Categorical(logits=self.logits))
                loc = self.decoder(z) + self.shift[c]
                pyro.sample("x", dist.Normal(loc, x.new_tensor(1.0)).to_event(1), obs=x)

    class Guide(Inference):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                self.infer(x)

    return Model().to(device), Guide().to(device), (data(n, device),)


def discrete(device: torch.device, n: int = 12) -> Pair:
    """A binary latent that can't be reparametrised: score-function gradients."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(Q, D)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(x.new_full((Q,), 0.5)).to_event(1))
                loc = self.decoder(z)
                pyro.sample("x", dist.Normal(loc, x.new_tensor(1.0)).to_event(1), obs=x)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(D, Q)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))

    return Model().to(device), Guide().to(device), (data(n, device),)


PAIRS: dict[str, Callable[..., Pair]] = {
    f.__name__: f
    for f in (
        functions,
        pyro_modules,
        two_sites,
        labels,
        subsample_given,
        subsample_drawn,
        global_latent,
        autoguide,
        masked,
        enumerated,
        discrete,
    )
}
"""Name -> constructor; a new kind of pair goes in here and is then tested everywhere."""

GLOBAL = ("global_latent", "autoguide")
