"""Loading and resuming compare the whole pair: other numbers are refused, the same is taken."""

from __future__ import annotations

import argparse
import copy
import functools
import linecache
import math
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import pvae
from pvae import VAE, checkpoint, corruptions, guides, likelihoods, penalties, priors
from pvae.errors import CheckpointError, PvaeWarning
from pvae.networks import MLP

pytestmark = pytest.mark.usefixtures("store")

D, Q = 4, 2
X = torch.rand(12, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FACTOR = 1.0
SETTINGS = {"scale": 1.0, "epochs": 2}
OPTIONS = argparse.Namespace(scale=1.0, epochs=2)


def train(pair: Any, folder: Path, **options: Any) -> pvae.Fit:
    settings = {"epochs": 1, "progress": False, "engine": "eager", "resume": True}
    return pvae.fit(pair, X, folder=folder, **{**settings, **options})


def functions(scale: Callable[[Tensor], Any], loc: Callable[[Tensor], Any] | None = None) -> Any:
    """A pair of functions whose model's scale is what a function of the data says."""
    torch.manual_seed(0)
    net = nn.Linear(D, Q)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), scale(x)).expand([len(x), D])
                        .to_event(1), obs=x)  # fmt: skip

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            centre = net(x) if loc is None else loc(net(x))
            pyro.sample("z", dist.Normal(centre, 1.0).to_event(1))

    return model, guide


def helper(x: Tensor) -> float:
    return FACTOR


def module(value: float) -> types.ModuleType:
    made = types.ModuleType("tests_settings")
    made.__dict__["SCALE"] = value
    return made


class Object:
    """A callable thing with a number of its own, and one that nothing reads."""

    level = 1.0

    def __init__(self, value: float, name: str = "") -> None:
        self.value, self.name = value, name

    def __call__(self, x: Tensor) -> float:
        return self.value * self.level

    def method(self, x: Tensor) -> float:
        return self.inner()

    def inner(self) -> float:
        return self.value

    def unused(self) -> str:
        return self.name


class Leveled(Object):
    level = 2.0


@dataclass(frozen=True)
class Chosen:
    scale: float
    epochs: int = 1


def entered(value: float) -> Callable[[Tensor], Any]:
    chosen = {"scale": value, "epochs": 3}
    return lambda x: chosen["scale"]


def spread(value: float) -> Callable[[Tensor], Any]:
    chosen = {"loc": 0.0, "scale": value}
    return lambda x: dist.Normal(**chosen).scale


def closed(value: Any) -> Callable[[Tensor], Any]:
    return lambda x: torch.as_tensor(value).sum()


def attribute(value: Any) -> Callable[[Tensor], Any]:
    return lambda x: value.scale


def defaulted(value: float) -> Callable[[Tensor], Any]:
    def scale(x: Tensor, factor: float = value) -> float:
        return factor

    return scale


def keyword(value: float) -> Callable[..., Any]:
    def scale(x: Tensor, *, factor: float = value) -> float:
        return factor

    return scale


def deep(value: float) -> Callable[[Tensor], Any]:
    def inner() -> float:
        return value

    return lambda x: max(inner() for _ in range(2))


def of_module(value: float) -> Callable[[Tensor], Any]:
    settings = module(value)
    return lambda x: settings.SCALE


def bound(value: float) -> Any:
    """A pair of methods."""
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale, self.calls = nn.Linear(D, Q), value, 0
            self.cache: Tensor | None = None

        def model(self, x: Tensor) -> None:
            self.calls += 1
            self.cache = x.mean() if self.cache is None else self.cache
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(Q), self.scale).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), D])
                            .to_event(1), obs=x)  # fmt: skip

        def guide(self, x: Tensor) -> None:
            pyro.module("both", self)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))

    both = Both()
    return both.model, both.guide


class Net(nn.Module):
    """A user's own network, with every way to keep a number."""

    shift: Tensor

    def __init__(self, slope: float = 0.1, shift: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.first, self.slope = nn.Linear(Q, D), slope
        self.register_buffer("shift", torch.tensor(shift))
        self.gain = nn.Parameter(torch.tensor(gain), requires_grad=False)
        self.path = f"results/{slope}"

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.first(z), self.slope) * self.gain + self.shift


def vae(
    *layers: nn.Module, decoder: nn.Module | None = None, prior: Any = None, sigma: Any = 1.0,
    guide: dict[str, Any] | None = None, **options: Any,
) -> VAE:  # fmt: skip
    torch.manual_seed(0)
    decoder = decoder or nn.Sequential(nn.Linear(Q, D), *layers)
    return VAE(
        prior or priors.StandardNormal(Q),
        likelihoods.Gaussian(decoder, D, sigma=sigma),
        guides.MeanField(MLP(D, 2 * Q, (3,)), Q, **(guide or {})),
        **options,
    )


def bayesian(scale: float) -> Any:
    torch.manual_seed(0)

    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = PyroSample(dist.Normal(torch.zeros(D), scale).to_event(1))

        def forward(self, x: Tensor) -> None:
            weight = self.weight
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(weight, 1.0).to_event(1), obs=x)

    model = Regression()
    return model, AutoNormal(model)


def scaled(factor: float) -> Any:
    model, guide = functions(lambda x: 1.0)
    return poutine.scale(model, scale=factor), poutine.scale(guide, scale=factor)


def enumerated(kind: str) -> Any:
    model, guide = functions(lambda x: 1.0)
    return model, config_enumerate(guide, default=kind)


def lambdas(number: int) -> Callable[[Tensor], Any]:
    return [lambda x: 1.0 * 1, lambda x: 1.0 * 2][number]


def squares(x: Tensor, z: Tensor) -> Tensor:
    return z.square().sum(-1)


def absolute(x: Tensor, z: Tensor) -> Tensor:
    return z.abs().sum(-1)


# Each has a function that builds a pair, and two values of its argument: the pairs differ.
DIFFERENT: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "closed over": (lambda v: functions(closed(v)), 1.0, 2.0),
    "tuple": (lambda v: functions(closed(v)), (1.0, 2.0), (1.0, 3.0)),
    "list": (lambda v: functions(closed(v)), [1.0, 2.0], [2.0, 1.0]),
    "tensor": (lambda v: functions(closed(v)), torch.ones(99), torch.arange(1.0, 100.0)),
    "array": (lambda v: functions(closed(v)), np.ones(3), np.full(3, 2.0)),
    "last number": (lambda v: functions(closed(v)), 0.1, math.nextafter(0.1, 1)),
    "default": (lambda v: functions(defaulted(v)), 1.0, 2.0),
    "keyword default": (lambda v: functions(keyword(v)), 1.0, 2.0),
    "partial": (lambda v: functions(functools.partial(keyword(1.0), factor=v)), 1.0, 2.0),
    "lambda on one line": (lambda v: functions(lambdas(v)), 0, 1),
    "function within a function": (lambda v: functions(deep(v)), 1.0, 2.0),
    "entry": (lambda v: functions(entered(v)), 1.0, 2.0),
    "all entries": (lambda v: functions(spread(v)), 1.0, 2.0),
    "data class": (lambda v: functions(attribute(Chosen(v))), 1.0, 2.0),
    "name space": (lambda v: functions(attribute(argparse.Namespace(scale=v))), 1.0, 2.0),
    "distribution": (lambda v: functions(attribute(dist.Normal(0.0, v))), 1.0, 2.0),
    "user's module": (lambda v: functions(of_module(v)), 1.0, 2.0),
    "callable object": (lambda v: functions(Object(v)), 1.0, 2.0),
    "method": (lambda v: functions(Object(v).method), 1.0, 2.0),
    "class attribute": (lambda v: functions(v(1.0)), Object, Leveled),
    "bound methods": (bound, 1.0, 2.0),
    "prior of a weight": (bayesian, 1.0, 2.0),
    "scale of a handler": (scaled, 1.0, 2.0),
    "setting of a decorator": (enumerated, "parallel", "sequential"),
    "guide": (lambda v: functions(lambda x: 1.0, lambda loc: loc * v), 1.0, 2.0),
    "plate": (lambda v: pvae.Pair(*functions(lambda x: 1.0), plate=v), None, "data"),
    "densities": (lambda v: pvae.Pair(*functions(lambda x: 1.0), densities=v), (), ("f",)),
    "attribute of a network": (lambda v: vae(decoder=Net(v)), 0.1, 0.2),
    "buffer": (lambda v: vae(decoder=Net(shift=v)), 0.0, 1.0),
    "frozen number": (lambda v: vae(decoder=Net(gain=v)), 1.0, 2.0),
    "dropout": (lambda v: vae(nn.Dropout(v)), 0.1, 0.2),
    "epsilon": (lambda v: vae(nn.LayerNorm(D, eps=v)), 1e-5, 1e-3),
    "momentum": (lambda v: vae(nn.BatchNorm1d(D, momentum=v)), 0.1, 0.2),
    "activation": (lambda v: vae(v()), nn.ReLU, nn.Tanh),
    "slope": (lambda v: vae(nn.LeakyReLU(v)), 0.1, 0.2),
    "softness": (lambda v: vae(nn.Softplus(beta=v)), 1.0, 2.0),
    "sigma": (lambda v: vae(sigma=v), 1.0, 3.0),
    "kind of sigma": (lambda v: vae(sigma=v), 1.0, "optimal"),
    "rate": (lambda v: vae(prior=priors.Laplace(Q, rate=v)), 1.0, 5.0),
    "df": (lambda v: vae(prior=priors.StudentT(Q, df=v)), 3.0, 30.0),
    "prior": (lambda v: vae(prior=v(Q)), priors.StandardNormal, priors.Laplace),
    "prior's instance": (
        lambda v: vae(prior=dist.Normal(torch.zeros(Q), v).to_event(1)), 1.0, 2.0,
    ),
    "prior's function": (
        lambda v: vae(prior=lambda: dist.Normal(torch.zeros(Q), v).to_event(1)), 1.0, 2.0,
    ),
    "scale's function": (
        lambda v: vae(guide={"to_scale": [lambda r: r.exp(), lambda r: (r / 2).exp()][v]}), 0, 1,
    ),
    "corruption": (lambda v: vae(corruption=corruptions.Noise(v)), 0.1, 0.2),
    "penalty": (lambda v: vae(penalties=penalties.Contractive(v)), 0.1, 0.2),
    "penalty's function": (
        lambda v: vae(penalties=penalties.Custom(v, 0.1)), squares, absolute,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_pair_is_refused_and_the_same_one_taken(name: str, tmp_path: Path) -> None:
    make, first, second = DIFFERENT[name]

    def told(call: Callable[[], object]) -> str:
        with pyro.get_param_store().scope(), pytest.raises(CheckpointError) as error:
            call()
        return str(error.value)

    with pyro.get_param_store().scope():
        train(make(first), tmp_path)
    for again in (make(first), make(copy.deepcopy(first))):
        with pyro.get_param_store().scope():
            pvae.load_parameters(again, tmp_path, X)
    by_load = told(lambda: pvae.load_parameters(make(second), tmp_path, X))
    by_resume = told(lambda: train(make(second), tmp_path, epochs=2))
    for message in (by_load, by_resume):
        assert "the pair" in message
        assert ": saved " in message
        assert ", now " in message
    with pyro.get_param_store().scope():
        train(make(first), tmp_path, epochs=2)


# What may differ

PROGRAM = """
import argparse, sys, torch, pyro, pyro.distributions as dist
from torch import nn
import pvae

EPOCHS, OUT = {epochs}, "{name}"
LEVELS = {{"low", "middle", "high"}}
options = argparse.Namespace(scale=2.0, epochs=EPOCHS, out=OUT)
settings = {{"loc": 0.5, "epochs": EPOCHS, "out": OUT}}

{comment}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls, self.out, self.cache = nn.Linear(4, 2), 0, OUT, {{}}
        self.made_by = object()

    def forward(self, x):
        self.calls += 1
        self.cache[self.calls] = x.mean()
        return self.layer(x)

    def draw(self):
        return "{name}"

net = Net()

def scale_of(x):
    "{name}"
    return options.scale if "low" in LEVELS else 1.0

def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z.sum(-1, keepdim=True) + settings["loc"]
        pyro.sample("x", dist.Normal(loc, scale_of(x)).expand([len(x), 4]).to_event(1), obs=x)

def guide(x):
    pyro.module("net", net)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

"""
RUN = """
if __name__ == "__main__":
    x = torch.linspace(0, 1, 48).reshape(12, 4)
    pvae.fit((model, guide), x, epochs=EPOCHS, folder=sys.argv[1], resume=True, progress=False,
             engine="eager")
"""


def program(name: str, epochs: int = 1, comment: str = "") -> str:
    return PROGRAM.format(name=name, epochs=epochs, comment=comment)


def by_script(folder: Path, file: str, text: str) -> None:
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + RUN)
    root = str(Path(pvae.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path), str(folder / "run")],
        env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(len(file))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def by_cell(text: str) -> Any:
    """What a notebook's cell makes: its source is known by a name that is no file's."""
    name = "<ipython-input-1-0123456789ab>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, name, "exec", dont_inherit=True), space)  # noqa: S102
    return space["model"], space["guide"]


@pytest.mark.slow
@pytest.mark.float32
def test_the_same_pair_is_taken_wherever_it_is_built_again(tmp_path: Path) -> None:
    """Another process, file, path, name of the module; a notebook's cell; no source at all.

    Epochs, paths, comments, docstrings, methods that nothing calls, counters and caches differ.
    """
    by_script(tmp_path, "one.py", program("one"))
    by_script(tmp_path, "there/another.py", program("two", 2, "# another comment\n"))
    x = torch.linspace(0, 1, 48).reshape(12, 4)
    with pyro.get_param_store().scope():
        pair = by_cell(program("cell", 9))
        for epochs in (3, 4):
            for _ in range(30):
                pvae.load_parameters(pair, tmp_path / "run", x)
                pair[1](x)  # its counters and caches move
            pvae.fit(pair, x, epochs=epochs, folder=tmp_path / "run", resume=True, progress=False)
    linecache.cache.clear()
    space: dict[str, Any] = {"__name__": "elsewhere"}
    exec(program("nowhere"), space)  # noqa: S102
    with pyro.get_param_store().scope():
        pvae.load_parameters((space["model"], space["guide"]), tmp_path / "run", x)
    changed = program("cell").replace("else 1.0", "else 1.5")
    with pyro.get_param_store().scope(), pytest.raises(CheckpointError, match=r"else 1\.5"):
        pvae.load_parameters(by_cell(changed), tmp_path / "run", x)


def test_states_are_no_settings(tmp_path: Path) -> None:
    """Running means, counters, caches, random weights and trained pairs; also of no step at all."""
    for pair in (bound(1.0), vae(nn.BatchNorm1d(D), sigma="optimal"), vae(decoder=Net())):
        folder = tmp_path / type(pair).__name__
        with pyro.get_param_store().scope():
            for epochs in (0, 2, 3):
                train(pair, folder, epochs=epochs)
            pvae.load_parameters(pair, folder, X)
            train(pair, folder, epochs=4).refine(1)
            pvae.load_parameters(pair, folder, X)
        for file in folder.iterdir():
            file.unlink()


class Random(nn.Module):
    """Features that are drawn once, without a seed; a checkpoint has them."""

    features: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(D, 20))
        self.out = nn.Linear(20, 2 * Q)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x @ self.features).sin())


def test_a_large_buffer_is_taken_from_the_checkpoint_and_said(tmp_path: Path) -> None:
    def pair() -> VAE:
        return VAE(
            priors.StandardNormal(Q),
            likelihoods.Gaussian(MLP(Q, D, ()), D),
            guides.MeanField(Random(), Q),
        )

    first, second, whole = pair(), pair(), pair()
    whole.load_state_dict(first.state_dict())
    train(first, tmp_path)
    train(whole, tmp_path / "whole", epochs=2)
    with pytest.warns(PvaeWarning, match="network.features' had other numbers"):
        train(second, tmp_path, epochs=2)
    assert all(map(torch.equal, second.state_dict().values(), whole.state_dict().values()))


def test_what_is_changed_by_hand_before_more_epochs_is_what_counts(tmp_path: Path) -> None:
    pair, same, first = vae(), vae(), vae()
    run = train(pair, tmp_path)
    for changed in (pair, same):
        changed.model.likelihood.min_sigma = 0.5
    run.refine(1)
    pvae.load_parameters(same, tmp_path)
    with pytest.raises(CheckpointError, match=r"min_sigma: saved 0\.5, now 0\.001"):
        pvae.load_parameters(first, tmp_path)


def test_another_pair_can_be_loaded_all_the_same(tmp_path: Path) -> None:
    first, second = vae(sigma=1.0), vae(sigma=2.0)
    train(first, tmp_path)
    with pytest.raises(CheckpointError, match=r"strict=False"):
        pvae.load_parameters(second, tmp_path)
    with pytest.warns(PvaeWarning, match=r"another pair: model\.likelihood\.sigma: saved 1\.0"):
        pvae.load_parameters(second, tmp_path, strict=False)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_other_versions_are_said_and_not_refused(tmp_path: Path) -> None:
    """A setting that the other version doesn't have isn't a difference; another number is."""
    train(vae(), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    saved = checkpoint.load(path)
    saved.meta["environment"] |= {"torch": "2.0", "pyro": "1.0"}
    del saved.meta["pair"]["entries"]["model.likelihood.min_sigma"]
    saved.meta["pair"]["entries"]["model.likelihood.older"] = "1"
    checkpoint.save(path, saved)
    with pytest.warns(PvaeWarning, match=r"other versions: torch was 2\.0, is .*; pyro was 1\.0"):
        pvae.load_parameters(vae(), tmp_path)
    with pytest.warns(PvaeWarning, match=r"not bit for bit as before: torch was 2\.0"):
        train(vae(), tmp_path, epochs=2)
    saved.meta["environment"] |= {"pvae": "0.0"}
    checkpoint.save(path, saved)
    with (
        pytest.warns(PvaeWarning, match=r"pvae was 0\.0"),
        pytest.raises(CheckpointError, match=r"sigma: saved 1\.0, now 2\.0"),
    ):
        pvae.load_parameters(vae(sigma=2.0), tmp_path)


def test_pyros_objectives_are_compared_by_their_settings(tmp_path: Path) -> None:
    pvae.fit(vae(), X, Trace_ELBO(num_particles=2), folder=tmp_path, epochs=1, progress=False)
    again: dict[str, Any] = {"folder": tmp_path, "epochs": 2, "progress": False, "resume": True}
    with pytest.raises(CheckpointError, match=r"objective\.num_particles: saved 2, now 3"):
        pvae.fit(vae(), X, Trace_ELBO(num_particles=3), **again)
    pvae.fit(vae(), X, Trace_ELBO(num_particles=2), **again)
