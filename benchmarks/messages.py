"""What pvae says, and said before, of inputs that went wrong without a word or with the wrong one.

    python benchmarks/messages.py [--check]

Each row tries something small and takes what is said: an error, a warning, or the line that counts.
Writes ``docs/messages.md``; with ``--check`` it says whether the page is still what is said.
"""

from __future__ import annotations

import argparse
import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import easy_guide
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import bounds, diagnostics, export, guides, latent, likelihoods, priors, recipes, testing
from pvae.engine.stepper import Engine
from pvae.errors import PvaeError, PvaeWarning
from pvae.types import Program

PAGE = Path(__file__).parents[1] / "docs" / "messages.md"
Try = Callable[[], object]
ROWS: list[tuple[str, str, Try]] = []
N = 40
fit = functools.partial(pvae.fit, epochs=1, progress=False, engine="eager")


def row(tried: str, before: str) -> Callable[[Try], Try]:
    """Adds a row: what is tried, and what was said of it before."""

    def add(function: Try) -> Try:
        ROWS.append((tried, before, function))
        return function

    return add


def data(*shape: int) -> Tensor:
    """The same normal numbers each time."""
    return torch.randn(shape or (N,), generator=torch.Generator().manual_seed(0)) * 2**0.5


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    weight = pyro.param("weight", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * x, 0.5**0.5))


def exact(x: Tensor) -> float:
    return float(dist.Normal(0.0, 2**0.5).log_prob(x).mean())


def shared(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def vae() -> pvae.VAE:
    torch.manual_seed(0)
    return recipes.vae(6, 2, hidden=(8,))


def bits(n: int = 50) -> Tensor:
    return (data(n, 6) > 0).float()


# Pairs


@row(
    "a classification term in the guide, `pyro.factor(..., has_rsample=True)`",
    "counted as part of log q: evidence -1.00 where log p(x) is -1.70, called a lower bound",
)
def training_term() -> str:  # fmt: skip
    def with_factor(x: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight * x, 0.5**0.5))
            pyro.factor("class_loss", torch.full((len(x),), -0.7), has_rsample=True)

    found = bounds.evidence((model, with_factor), data(), 5, progress=False)
    return f"evidence {found.mean:.2f}, exact {exact(data()):.2f}; {'; '.join(found.remarks)}"


@row(
    "`obs_mask=` with a guide whose copy isn't masked",
    "a lower bound of +1.05 where log p(x) is -0.81",
)
def one_sided_mask() -> str:
    def partial(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    def of_partial(x: Tensor, seen: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            scale = torch.where(seen, 0.5**0.5, 1.0)
            pyro.sample("z", dist.Normal(weight * x * seen, scale))
            pyro.sample("x_unobserved", dist.Normal(torch.zeros(len(x)), 1.0))

    x, seen = data(), torch.arange(N) % 2 == 0
    found = bounds.evidence((partial, of_partial), (x, seen), 100, progress=False)
    right = dist.Normal(0.0, 2**0.5).log_prob(x)[seen].sum() / N
    return f"evidence {found.mean:.2f}, exact {float(right):.2f}; {found.remarks[0]}"


@row("a latent masked in the guide alone, and read", "a number, without a word")
def masked_and_read() -> object:
    def masked(x: Tensor) -> None:
        with poutine.mask(mask=torch.arange(len(x)) > 3):
            guide(x)

    return bounds.elbo((model, masked), data())


@row("time-major data, the plate named", "five rows are reported for forty")
def second_axis() -> str:
    def by_time(x: Tensor) -> None:
        with pyro.plate("data", x.shape[1]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for t in range(len(x)):
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t])

    def of_time(x: Tensor) -> None:
        with pyro.plate("data", x.shape[1]):
            pyro.sample("z", dist.Normal(x.sum(0) / 6, 6**-0.5))

    pair = pvae.Pair(by_time, of_time, plate="data")
    found = bounds.evidence(pair, data(5, 40), 5, progress=False)
    marginal = dist.MultivariateNormal(torch.zeros(5), torch.eye(5) + 1)
    right = float(marginal.log_prob(data(5, 40).T).mean())
    return f"evidence of {found.num_data} data {found.mean:.2f}, exact {right:.2f}"


@row("an encoder that centres its input in place", "-10.5, where the same out of place gives -85.5")
def in_place() -> object:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.sub_(x.mean(-1, keepdim=True)))

    likelihood = likelihoods.Gaussian(nn.Linear(2, 6), 6, sigma=1.0)
    guide = guides.MeanField(Encoder(), 2)
    return bounds.elbo(pvae.VAE(priors.StandardNormal(2), likelihood, guide), data(50, 6))


@row(
    "a network reached by methods of its own, `net.encode(x)`, with dropout, in training mode",
    "-37.9 with dropout on, -17.4 with it off, and `valid_elbo` with it on",
)
def modes() -> str:  # fmt: skip
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def encode(self, x: Tensor) -> Tensor:
            return self.layer(F.dropout(x[:, None], 0.5, self.training))[:, 0]

    torch.manual_seed(0)
    net = Net()

    def of_net(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net.encode(x), 1.0))

    def numbers() -> tuple[object, ...]:
        run = fit((model, of_net), data(), lr=1e-9, valid=data())
        return bounds.elbo((model, of_net), data()).mean, run.history[-1]["valid_elbo"]

    found = {numbers() for _ in map(net.train, (True, False))}
    return "the same numbers in both, valid_elbo too" if len(found) == 1 else f"{found}"


def saturated() -> tuple[Program, Program]:
    """A pair whose relaxed draws are 0 or 1 in 32 bits."""
    encode, decode = nn.Linear(6, 4), nn.Linear(4, 6)
    temperature = torch.tensor(0.1)

    def relaxed(x: Tensor) -> None:
        pyro.module("decode", decode)
        with pyro.plate("data", len(x)):
            prior = dist.RelaxedBernoulli(temperature, logits=x.new_zeros(4)).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    def of_relaxed(x: Tensor) -> None:
        pyro.module("encode", encode)
        with pyro.plate("data", len(x)):
            q = dist.RelaxedBernoulli(temperature, logits=60 * torch.ones(len(x), 4)).to_event(1)
            pyro.sample("z", q)

    return relaxed, of_relaxed


@row("saturated relaxed draws in 32 bits", "an evidence of +3.16 where no data exceed -5.51")
def impossible() -> str:
    found = bounds.evidence(saturated(), data(N, 6), 20, progress=False)
    return f"{found.title}; {found.reasons[0].split(' in float')[0]}"


@row(
    "ELBO surgery of such draws",
    "a rate of -9.05 nats; the whole latent has collapsed, so does q see x?",
)
def impossible_surgery() -> str:
    found = diagnostics.surgery(saturated(), data(N, 6)).findings()
    words = [f"{one.name}: {one.meaning}" for one in found if "impossible" in one.meaning]
    return "; ".join(one.split(" in float")[0] for one in words)


@row("a guide whose draws are outside the prior's support", "an error that names torch's arguments")
def outside() -> str:
    def positive(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = bounds.elbo((positive, guide), data())
    return f"{found.title}; {found.reasons[0]}"


class Decoding(PyroModule):
    """A model that holds its decoder as a module of Pyro's."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = PyroModule[nn.Linear](1, 1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.decode(z[..., None])[..., 0], 1.0), obs=x)


@row("a frozen parameter in a PyroModule", "moved by 0.15 in training")
def frozen() -> str:
    decoding = Decoding()
    weight = decoding.decode.weight.requires_grad_(requires_grad=False)
    before = weight.detach().clone()
    fit((decoding, guide), data(), epochs=3, lr=0.05)
    return f"moved by {float((decoding.decode.weight - before).abs().max()):g}"


@row("`pyro.settings.set(module_local_params=True)` with a PyroModule", "every tool crashed")
def local_parameters() -> str:
    with pyro.settings.context(module_local_params=True):
        return f"{bounds.elbo((Decoding(), guide), data()).name} of {N} data"


@row("an EasyGuide with a parameter for each row", "refused, and broken for Pyro's SVI after it")
def easy() -> str:
    @easy_guide(model)
    def by_row(self: Any, x: Tensor) -> None:
        with self.plate("data", len(x)):
            loc = pyro.param("loc", lambda: torch.zeros(N))
            pyro.sample("z", dist.Normal(loc, 1.0))

    svi = SVI(model, by_row, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step(data())
    run = fit((model, by_row), data(), batch_size=None)
    return f"fit takes {run.progress.global_step} step; Pyro's loss is " + (
        "finite after it" if math.isfinite(svi.step(data())) else "broken"
    )


@row("a network that first runs after some steps", "moved by 0, with Pyro's SVI by 0.20")
def late() -> str:
    def moved(kind: type[SVI]) -> float:
        pyro.clear_param_store()
        torch.manual_seed(0)
        net = nn.Linear(1, 1)
        before = net.weight.item()

        def with_net(x: Tensor, step: int) -> None:
            shift = pyro.module("net", net)(x[:, None])[:, 0] if step > 3 else 0.0
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

        adam = pyro.optim.Adam({"lr": 0.05})
        svi = kind(with_net, lambda x, step: guide(x), adam, Trace_ELBO())
        for step in range(8):
            svi.step(data(), step)
        return net.weight.item() - before

    return "moved by {:.2f}, with Pyro's SVI by {:.2f}".format(*map(moved, (pvae.SVI, SVI)))


@row("networks made anew beside a store that was loaded", "no warning but from `fit`")
def loaded() -> object:
    def pair() -> tuple[Program, Program]:
        layer = nn.Linear(1, 1)

        def of_layer(x: Tensor) -> None:
            pyro.module("layer", layer)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(layer(x[:, None])[:, 0], 1.0))

        return model, of_layer

    fit(pair(), data())
    return bounds.elbo(pair(), data()) and None


# Data


@row(
    "minibatches of a DataLoader with a global latent, the plate unscaled",
    "posterior sd 0.143 in place of 0.050",
)
def unscaled() -> object:  # fmt: skip
    loader = DataLoader(TensorDataset(data()), batch_size=10)
    return fit((shared, AutoNormal(shared)), loader)


@row(
    "rows in another order, for an autoguide with parameters of each row", "-3273 in place of -1.24"
)
def shuffled() -> object:
    def by_index(index: Tensor, x: Tensor) -> None:
        with pyro.plate("data", N, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    own, index = AutoNormal(by_index), torch.arange(N)
    fit((by_index, own), (index, data()), batch_size=None, epochs=3, lr=0.1)
    return bounds.elbo((by_index, own), (index.flip(0), data().flip(0)))


@row("a NumPy masked array", "the mask was dropped: -5,046,794,003")
def masked_array() -> object:
    x = np.ma.masked_array(bits().numpy())
    x[3, 2] = np.ma.masked
    return bounds.elbo(vae(), x)


@row("labels for a pair whose parts take none", "the same samples of class 1 and class 7")
def labels() -> object:
    return vae().sample(50, torch.full((50,), 7))


@row("grey values after a loader's first batch", "passed without a word")
def grey() -> object:
    x = bits()
    x[40:] = 0.5
    return fit(vae(), DataLoader(TensorDataset(x), batch_size=20))


@row("`batch_size=` beside a loader", "passed without a word")
def two_sizes() -> object:
    return fit(vae(), DataLoader(TensorDataset(bits()), batch_size=10), batch_size=25)


@row("`drop_last=True` with fewer rows than a batch", "StopIteration, without a word")
def no_batch() -> object:
    return fit(vae(), DataLoader(TensorDataset(bits()), batch_size=128, drop_last=True))


@row("`DataLoader(batch_size=None)`", "site 'z': expected a distribution with batch_shape (6,)")
def single_rows() -> object:
    return fit(vae(), DataLoader(TensorDataset(bits()), batch_size=None))


@row("a sparse tensor", "NotImplementedError: Could not run 'aten::as_strided' with arguments ...")
def sparse() -> object:
    return fit(vae(), bits().to_sparse())


@row("a SciPy sparse array", "expected real numbers; got dtype object. Try: array.astype(float)")
def scipy_sparse() -> object:
    return fit(vae(), csr_matrix(bits().numpy()))


def same_as_tensor(kind: Callable[[Tensor], object]) -> str:
    """Whether a fit to the data in another form is that to the tensor."""
    losses = {fit(vae(), form(bits())).history[-1]["loss"] for form in (torch.clone, kind)}
    return "the loss of the same data in a tensor" if len(losses) == 1 else f"{losses}"


@row("NumPy's long double", "TypeError: can't convert np.ndarray of type numpy.longdouble")
def long_double() -> str:
    return same_as_tensor(lambda x: x.numpy().astype(np.longdouble))


@row("a list of rows", "site 'z': expected a distribution with batch_shape (6,)")
def list_of_rows() -> str:
    return same_as_tensor(lambda x: x.tolist())


# Tools


@row(
    "`check_pair(model, guide, (x, y))`, its batch in a tuple as `fit` takes it",
    "ValueError: setting an array element with a sequence. The requested array has ...",
)
def two_programs() -> object:
    of_vae = vae()
    call: Any = testing.check_pair
    return call(of_vae.model, of_vae.guide, (bits(), torch.arange(50)))


@row(
    "`check_pair((model, guide), (x, y))`, as that says",
    "not taken: `check_pair(model, guide, x, y)`, where other tools took `(x, y)`",
)
def one_tuple() -> str:
    pair, batch = (vae().model, vae().guide), (bits(), torch.arange(50))
    testing.check_pair(pair, batch)
    return f"checked, with the batch of which elbo takes {bounds.elbo(pair, batch).num_data} data"


@row(
    "SBC and BDMC of a model that observes `x.flatten(1)`",
    "SBC answers; BDMC: expected site 'x' to observe a tensor of the batch as it is",
)
def reshaped() -> str:
    def flat(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x.flatten(1))

    def of_flat(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1) / 2, 0.5**0.5).to_event(1))

    pair, x = (flat, of_flat), data(N, 2, 3)
    p = diagnostics.sbc(pair, x, num_simulations=40, progress=False).p_value
    ais = bounds.AIS(num_temperatures=3)
    gap = bounds.bdmc(pair, x, 4, ais=ais, progress=False).gap.mean
    return f"both answer: p {'above' if p > 0.01 else 'below'} 0.01, a gap of {abs(gap):.1f} nats"


@row(
    "evidence of a regression, whose weights are global, by a guide twice too wide",
    "IWAE-200 of -56.73, below the ELBO of -56.29; exact -53.24",
)
def of_globals() -> str:
    x, noise = data(N, 3), data()
    y = x.sum(1) + noise / 2

    def regression(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", N):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    covariance = torch.linalg.inv(torch.eye(3) + x.T @ x)

    def wide(x: Tensor, y: Tensor) -> None:
        sd = 2 * covariance.diagonal().sqrt()
        pyro.sample("w", dist.Normal(covariance @ x.T @ y, sd).to_event(1))

    marginal = dist.MultivariateNormal(torch.zeros(N), torch.eye(N) + x @ x.T)
    elbo = bounds.elbo((regression, wide), (x, y), 400, progress=False).total
    found = bounds.evidence((regression, wide), (x, y), 200, num_global=200, progress=False)
    exactly = float(marginal.log_prob(y))
    return f"{found.name} of {found.total:.2f}, ELBO {elbo:.2f}, exact {exactly:.2f}"


@row("`fit` with gradients switched off", "a loss that depends on its parameters; got none")
def no_gradients() -> str:
    with torch.no_grad():
        run = fit(vae(), bits())
    return f"trains: {run.progress.global_step} step(s)"


@row("draws of data at masked entries", "the fill value, 0")
def masked_draws() -> str:
    def masked(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen), obs=x)

    def of_masked(x: Tensor, seen: Tensor) -> None:
        guide(x)

    seen = torch.arange(N) % 2 == 0
    tree = export.to_arviz(
        (masked, of_masked), (data() * seen, seen), num_particles=50, progress=False
    )
    drawn = tree["posterior_predictive"]["x"].to_numpy()[0]
    return f"draws, of sd {float(drawn[:, ~seen.numpy()].std()):.1f} at all masked entries"


@row(
    "a Gaussian mixture as a prior, `method='ais'` and `'local'`",
    "refused: MixtureSameFamilyConstraint(Real())",
)
def mixture_prior() -> str:
    two = dist.Categorical(torch.ones(2))
    prior = dist.MixtureSameFamily(two, dist.Normal(torch.tensor([-2.0, 2.0]), 0.5))

    def mixed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    right = prior.component_distribution.loc
    each = [dist.Normal(loc, 1.25**0.5).log_prob(data(10)) for loc in right]
    expected = float(torch.stack(each).logsumexp(0).mean()) - math.log(2)
    words = []
    for method in ("ais", "local"):
        found = bounds.evidence((mixed, guide), data(10), 8, method=method, progress=False)
        near = "within" if abs(found.mean - expected) < 0.1 else "not within"
        words.append(f"{found.name}: {near} 0.1 of log p(x)")
    return "; ".join(words)


@row(
    "leave-one-out of a mixture whose assignments are summed out",
    "refused: 'k' inside the data plate has seen x",
)
def left_out() -> str:
    def mixture(x: Tensor) -> None:
        means = pyro.sample("means", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            loc = torch.where(k == 0, means[..., 0], means[..., 1])
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def of_means(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-3.0, 3.0]))
        pyro.sample("means", dist.Normal(loc, 0.3).to_event(1))

    x = torch.cat([data(20) - 3, data(20) + 3])
    found = export.loo((mixture, of_means), x, num_particles=500)
    return f"elpd of {found.n_data_points} data"


@row("inference through `decode`", "no gradient: the prior's sd, 1.00, for 0.14")
def through_decode() -> str:
    torch.manual_seed(0)
    decoder = nn.Linear(2, 6)
    likelihood = likelihoods.Gaussian(decoder, 6, sigma=1.0)
    family = guides.MeanField(nn.Linear(6, 4), 2)
    trained = pvae.VAE(priors.StandardNormal(2), likelihood, family)

    def inverse(y: Tensor) -> None:
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(trained.decode(z), 0.1).to_event(1), obs=y)

    trained.requires_grad_(requires_grad=False)
    own = AutoMultivariateNormal(inverse)
    fit((inverse, own), data(1, 6), batch_size=None, epochs=500, lr=0.05)
    right = torch.linalg.inv(torch.eye(2) + 100 * decoder.weight.T @ decoder.weight)
    scale = own.scale[:, None] * own.scale_tril
    sds = [float(c.diagonal().sqrt().mean()) for c in (scale @ scale.T, right)]
    return "a gradient: a posterior's sd of {:.2f}, exact {:.2f}".format(*sds)


@row(
    "TARP of a guide with three of 13 sds too small, ten latents idle",
    "p = 0.79, without them 1e-64",
)
def idle_and_narrow() -> str:
    def plain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(13), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :3], 0.3).to_event(1), obs=x)

    def thin(x: Tensor) -> None:
        variance = 0.09 / 1.09
        sd = torch.cat([torch.full((3,), 0.6 * variance**0.5), torch.ones(10)])
        mean = F.pad(x / 1.09, (0, 10))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, sd).to_event(1))

    p = diagnostics.tarp((plain, thin), data(N, 3), progress=False).tests.p_value
    return f"TARP: p {'below' if p < 1e-5 else 'above'} 1e-5"


@row("TARP of a guide that misses a correlation, beside four idle latents", "p = 0.38")
def idle() -> str:
    whole = torch.eye(6)
    whole[:2, :2] = torch.tensor([[1.0, 0.95], [0.95, 1.0]])

    def correlated(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(6), whole))
            pyro.sample("x", dist.Normal(z[..., :2], 1.0).to_event(1), obs=x)

    gain = whole[:, :2] @ torch.linalg.inv(whole[:2, :2] + torch.eye(2))
    sd = (whole - gain @ whole[:2]).diagonal().sqrt()

    def apart(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ gain.T, sd).to_event(1))

    tests = {
        "TARP": diagnostics.tarp((correlated, apart), data(N, 2), progress=False).tests.p_value,
        "SBC": diagnostics.sbc((correlated, apart), data(N, 2), progress=False).p_value,
    }
    return "; ".join(
        f"{name}: p {'below' if p < 1e-5 else 'above'} 1e-5" for name, p in tests.items()
    )


@row("a weight of the KL that is set between compiled steps", "the first one stays: 147 for 572")
def frozen_value() -> str:
    def losses(kind: Any, **options: Any) -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        weight = {"of": 0.0}

        def scaled(program: Program) -> Program:
            return lambda x: poutine.scale(program, weight["of"])(x)

        adam = pyro.optim.Adam({"lr": 1e-3})
        svi, found = kind(scaled(model), scaled(guide), adam, Trace_ELBO(), **options), []
        for step in range(3):
            weight["of"] = 0.5 * (step + 1)
            found.append(svi.step(data()))
        return found

    ours, theirs = losses(pvae.SVI, engine="compiled"), losses(SVI)
    same = all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(ours, theirs, strict=True))
    return "Pyro's losses" if same else f"{ours}, Pyro's {theirs}"


@row(
    "a posterior thirty times too narrow, on the screen",
    "next: nothing stands out: sample, reconstruct, encode with it",
)
def narrow() -> str:
    def thin(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.mean(), pyro.param("sd", torch.tensor(0.15 / 30))))

    with torch.random.fork_rng():
        found = pvae.diagnose((shared, thin), data(), checks=["elbo", "importance"], progress=False)
    return str(found).splitlines()[-1]


@row("SBC of a model that refuses what it simulates, on the screen", "the whole diagnosis was lost")
def refused_check() -> str:
    def sorted_rows(x: Tensor, lengths: Tensor) -> None:
        if not bool((lengths.diff() <= 0).all()):
            raise RuntimeError("lengths must be sorted in decreasing order")
        model(x)

    pair = sorted_rows, lambda x, lengths: guide(x)
    batch = data(), torch.arange(N).flip(0)
    found = pvae.diagnose(pair, batch, checks=["elbo", "sbc"], progress=False)
    error = found.undefined["sbc"].partition("got ")[2].partition(" (")[0]
    return f"{found.findings()[0].name} has its line; sbc: not defined, {error}"


@row("the mean of data that read labels, which are observed, too", "given the batch's labels")
def mean_of_labels() -> object:
    def labelled(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Bernoulli(0.5), obs=y)
            pyro.sample("x", dist.Normal(z + 2 * y, 1.0), obs=x)

    batch = data(), torch.ones(N)
    return latent.sample((labelled, lambda x, y: guide(x)), batch, site="x", mean=True)


def pyros_loss(engine: Engine, *args: object, **keywords: object) -> str:
    """Whether a step has the loss that it has with Pyro's SVI."""

    def with_beta(x: Tensor, y: object = None, beta: float = 1.0) -> None:
        with poutine.scale(scale=beta):
            model(x)

    def of_beta(x: Tensor, y: object = None, beta: float = 1.0) -> None:
        with poutine.scale(scale=beta):
            guide(x)

    found = []
    for kind in (SVI, functools.partial(pvae.SVI, engine=engine)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = kind(with_beta, of_beta, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        found.append(svi.step(data(), *args, **keywords))
    return "Pyro's loss" if math.isclose(*found, rel_tol=1e-4) else f"{found}"


NO_SHAPE = "AttributeError: 'NoneType' object has no attribute 'shape'"
NO_KEYWORD = "TypeError: unexpected keyword argument 'beta'"
row("`svi.step(x, None)`, compiled", NO_SHAPE)(lambda: pyros_loss("compiled", None))
row("`svi.step(x, None, 0.5)`, compiled", NO_SHAPE)(lambda: pyros_loss("compiled", None, 0.5))
row("`svi.step(x, beta=0.5)`", NO_KEYWORD)(lambda: pyros_loss("eager", beta=0.5))
row("`svi.step(x, beta=0.5)`, compiled", NO_KEYWORD)(lambda: pyros_loss("compiled", beta=0.5))


def said(function: Try) -> str:
    """What a user sees: the error, or else the warnings and the words."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", PvaeWarning)
        try:
            found = function()
        except PvaeError as error:
            first, *fixes = str(error).splitlines()
            return f"{type(error).__name__}: {first} {fixes[0].strip() if fixes else ''}".strip()
    words = [found] if isinstance(found, str) else [str(one.message) for one in caught]
    return "; ".join(map(str, words)) or "passes without a word"


def page() -> str:
    """The page."""
    lines = [
        "# What is said, and what was said before",
        "",
        "Inputs that once gave a wrong number without a word, crashed, or were refused for the",
        "wrong reason. `python benchmarks/messages.py` tries each and writes this page; a test",
        "compares it with what is said today. Of an error the first line to try is shown.",
        "",
        "| what is tried | before | now |",
        "|---|---|---|",
    ]
    for tried, before, function in ROWS:
        cells = [cell.replace("|", "\\|") for cell in (tried, before, said(function))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        assert text == PAGE.read_text(), "docs/messages.md isn't what is said: run this script"
        return
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
