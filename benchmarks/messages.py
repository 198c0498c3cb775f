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
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import bounds, diagnostics, export, guides, latent, likelihoods, priors, recipes
from pvae.errors import PvaeError, PvaeWarning

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


def vae(**options: Any) -> Any:
    torch.manual_seed(0)
    return recipes.vae(6, 2, hidden=(8,), **options)


def bits(n: int = 50) -> Tensor:
    return (data(n, 6) > 0).float()


# Pairs


@row(
    "a classification term in the guide, `pyro.factor(..., has_rsample=True)`",
    "counted as part of log q: evidence -1.00 where log p(x) is -1.70, called a lower bound",
)
def training_term() -> str:  # fmt: skip
    def with_factor(x: Tensor) -> None:
        guide(x)
        pyro.factor("class_loss", torch.tensor(-0.7 * len(x)), has_rsample=True)

    found = bounds.evidence(pvae.Pair(model, with_factor, plate="data"), data(), 5, progress=False)
    return f"evidence of {N} data {found.total:.2f}, exact {N * exact(data()):.2f}; " + "; ".join(
        found.remarks
    )


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
    found = bounds.elbo((partial, of_partial), (x, seen))
    right = dist.Normal(0.0, 2**0.5).log_prob(x)[seen].sum() / N
    return f"ELBO {found.mean:.2f}, exact {float(right):.2f}; {found.remarks[0]}"


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

    found = {bounds.elbo((model, of_net), data()).mean for _ in map(net.train, (True, False))}
    return "the same number in both" if len(found) == 1 else "another number in each mode"


@row("saturated relaxed draws in 32 bits", "an evidence of +3.16 where no data exceed -5.51")
def impossible() -> str:
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

    found = bounds.evidence((relaxed, of_relaxed), data(N, 6), 20, progress=False)
    return f"{found.title}; {found.reasons[0].split(' in float')[0]}"


@row("a guide whose draws are outside the prior's support", "an error that names torch's arguments")
def outside() -> str:
    def positive(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = bounds.elbo((positive, guide), data())
    return f"{found.title}; {found.reasons[0]}"


@row("a frozen parameter in a PyroModule", "moved by 0.15 in training")
def frozen() -> str:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.decode = PyroModule[nn.Linear](1, 1)
            self.decode.weight.requires_grad_(requires_grad=False)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.decode(z[..., None])[..., 0], 1.0), obs=x)

    frozen = Model()
    before = frozen.decode.weight.detach().clone()
    fit((frozen, guide), data(), epochs=3, lr=0.05)
    return f"moved by {float((frozen.decode.weight - before).abs().max()):g}"


@row("`pyro.settings.set(module_local_params=True)` with a PyroModule", "every tool crashed")
def local_parameters() -> str:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.decode = PyroModule[nn.Linear](1, 1)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.decode(z[..., None])[..., 0], 1.0), obs=x)

    with pyro.settings.context(module_local_params=True):
        return f"{bounds.elbo((Model(), guide), data()).name} of {N} data"


@row("an EasyGuide with a parameter for each row", "refused, and broken for Pyro's SVI after it")
def easy() -> str:
    @easy_guide(model)
    def by_row(self: Any, x: Tensor) -> None:
        with self.plate("data", len(x)):
            loc = pyro.param("loc", lambda: torch.zeros(N))
            pyro.sample("z", dist.Normal(loc, 1.0))

    svi = pyro.infer.SVI(model, by_row, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step(data())
    run = fit((model, by_row), data(), batch_size=None)
    return f"fit takes {run.progress.global_step} step; Pyro's loss is " + (
        "finite after it" if math.isfinite(svi.step(data())) else "broken"
    )


@row("networks made anew beside a store that was loaded", "no warning but from `fit`")
def loaded() -> object:
    def pair() -> tuple[Any, Any]:
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


# Tools


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
    "a Gaussian mixture as a prior, `method='ais'`", "refused: MixtureSameFamilyConstraint(Real())"
)
def mixture_prior() -> str:
    two = dist.Categorical(torch.ones(2))
    prior = dist.MixtureSameFamily(two, dist.Normal(torch.tensor([-2.0, 2.0]), 0.5))

    def mixed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = bounds.evidence((mixed, guide), data(10), 4, method="ais", progress=False)
    right = prior.component_distribution.loc
    each = [dist.Normal(loc, 1.25**0.5).log_prob(data(10)) for loc in right]
    expected = float(torch.stack(each).logsumexp(0).mean()) - math.log(2)
    return f"{found.name}: within 0.1 of log p(x)" if abs(found.mean - expected) < 0.1 else "off"


@row("leave-one-out of a mixture whose assignments are summed out", "refused")
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
    code = torch.zeros(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(vae().decode(code).sum(), code)
    return "a gradient" if bool((gradient != 0).all()) else "none"


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

        def scaled(program: Any) -> Any:
            return lambda x: poutine.scale(program, weight["of"])(x)

        adam = pyro.optim.Adam({"lr": 1e-3})
        svi, found = kind(scaled(model), scaled(guide), adam, Trace_ELBO(), **options), []
        for step in range(3):
            weight["of"] = 0.5 * (step + 1)
            found.append(svi.step(data()))
        return found

    ours, theirs = losses(pvae.SVI, engine="compiled"), losses(pyro.infer.SVI)
    same = all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(ours, theirs, strict=True))
    return "Pyro's losses" if same else f"{ours}, Pyro's {theirs}"


@row("a posterior thirty times too narrow, on the screen", "nothing stands out: sample with it")
def narrow() -> str:
    def thin(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.mean(), pyro.param("sd", torch.tensor(0.15 / 30))))

    with torch.random.fork_rng():
        found = diagnostics.importance((shared, thin), data(), num_global=500, progress=False)
    line = next(line for line in found.findings() if line.verdict == "bad")
    return f"! {line.name}: {line.meaning}; next: {line.advice.split(', a guide')[0]}"


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


@row("`svi.step(x, beta=0.5)`", "TypeError: unexpected keyword argument 'beta'")
def keywords() -> str:
    def with_beta(x: Tensor, beta: float = 1.0) -> None:
        with poutine.scale(scale=beta):
            model(x)

    def of_beta(x: Tensor, beta: float = 1.0) -> None:
        with poutine.scale(scale=beta):
            guide(x)

    adam = pyro.optim.Adam({"lr": 1e-3})
    found = [
        kind(with_beta, of_beta, adam, Trace_ELBO()).step(data(), beta=0.5)
        for kind in (pyro.infer.SVI, pvae.SVI)
        if pyro.clear_param_store() is None and pyro.set_rng_seed(0) is None
    ]
    return "Pyro's loss" if math.isclose(*found, rel_tol=1e-4) else f"{found}"


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
