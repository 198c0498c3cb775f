"""Networks, however a program reaches them: numbers are read in evaluation mode.

The network has a dropout and a batch norm of its own, so that in training mode the ELBO is another,
differs from draw to draw, and moves running statistics.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.nn import functional as F

import pvae
from pvae import Pair, bounds, diagnostics, export, latent
from pvae.errors import PvaeWarning

D, Q = 6, 2

pytestmark = pytest.mark.usefixtures("store")


class Network(nn.Module):
    """An encoder and a decoder, called by methods of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 2 * Q), nn.Linear(Q, D)
        self.norm = nn.BatchNorm1d(D)

    @property
    def mean(self) -> Tensor:
        assert self.norm.running_mean is not None
        return self.norm.running_mean

    def encode(self, x: Tensor) -> Tensor:
        return self.first(F.dropout(self.norm.forward(x), 0.5, self.training))

    def decode(self, z: Tensor) -> Tensor:
        return self.second(F.dropout(z.tanh(), 0.5, self.training))


def programs(network: Any, encode: Callable[..., Any], decode: Callable[..., Any]) -> Any:
    def model(x: Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            loc, log_scale = encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


@dataclasses.dataclass
class Box:
    network: Any


class Slots:
    __slots__ = ("network",)
    network: Any


class OfClass:
    network: Any = None


class Owner:
    def __init__(self, network: Network) -> None:
        self.inner = programs(network, network.encode, network.decode)

    def model(self, x: Tensor) -> None:
        self.inner[0](x)

    def guide(self, x: Tensor) -> None:
        self.inner[1](x)


class Callable_:  # noqa: N801
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Any:
        return self.function(x)


class Wrapper(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.functions = [function]

    def forward(self, x: Tensor) -> Any:
        return self.functions[0](x)


GLOBALS: dict[str, Any] = {}


def got(network: Network, get: Callable[[], Any]) -> Any:
    return programs(network, lambda x: get().encode(x), lambda z: get().decode(z))


def methods(network: Network) -> Any:
    return got(network, lambda: network)


def bound(network: Network) -> Any:
    return programs(network, network.encode, network.decode)


def partials(network: Network) -> Any:
    encode, decode = (functools.partial(f, network) for f in (Network.encode, Network.decode))
    return programs(network, encode, decode)


def nested(network: Network) -> Any:
    held = {"networks": [(network,)]}
    return got(network, lambda: held["networks"][0][0])


def dataclass(network: Network) -> Any:
    box = Box(network)
    return got(network, lambda: box.network)


def namespace(network: Network) -> Any:
    box = types.SimpleNamespace(network=network)
    return got(network, lambda: box.network)


def slots(network: Network) -> Any:
    box = Slots()
    box.network = network
    return got(network, lambda: box.network)


def class_attribute(network: Network) -> Any:
    OfClass.network = network
    return got(network, lambda: OfClass.network)


def global_dictionary(network: Network) -> Any:
    GLOBALS["network"] = network
    return got(network, lambda: GLOBALS["network"])


def wrapped(network: Network) -> Any:
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inner(*args: Any) -> Any:
            return function(*args)

        return inner

    return tuple(map(wrap, methods(network)))


def cached(network: Network) -> Any:
    return got(network, functools.lru_cache(maxsize=None)(lambda: network))


def owner(network: Network) -> Any:
    both = Owner(network)
    return both.model, both.guide


def callables(network: Network) -> Any:
    return tuple(map(Callable_, methods(network)))


def in_a_module(network: Network) -> Any:
    return tuple(map(Wrapper, methods(network)))


def function_attribute(network: Network) -> Any:
    inner = methods(network)

    def model(x: Tensor) -> None:
        model.inner(x)  # type: ignore[attr-defined]

    def guide(x: Tensor) -> None:
        guide.inner(x)  # type: ignore[attr-defined]

    model.inner, guide.inner = inner  # type: ignore[attr-defined]
    return model, guide


def pyro_module(network: Network) -> Any:
    to_pyro_module_(network)
    return bound(network)


def weak(network: Network) -> Any:
    return got(network, weakref.ref(network))


def generator(network: Network) -> Any:
    endless = iter(lambda: network, None)
    return got(network, lambda: next(endless))


WAYS = [
    methods,
    bound,
    partials,
    nested,
    dataclass,
    namespace,
    slots,
    class_attribute,
    global_dictionary,
    wrapped,
    cached,
    owner,
    callables,
    in_a_module,
    function_attribute,
    pyro_module,
    weak,
    generator,
]

READS: dict[str, Callable[[Any, Tensor], Any]] = {
    "elbo": lambda pair, x: bounds.elbo(pair, x, 2).mean,
    "evidence": lambda pair, x: bounds.evidence(pair, x, 2, progress=False).mean,
    "codes": lambda pair, x: latent.codes(pair, x).sum().item(),
    "sample": lambda pair, x: latent.sample(pair, x).sum().item(),
    "surgery": lambda pair, x: diagnostics.surgery(pair, x, progress=False).findings()[0].value,
    "export": lambda pair, x: float(
        export.to_arviz(pair, x, num_particles=2, progress=False)["posterior"]["z"].mean()
    ),
}


def made(way: Callable[[Network], Any]) -> tuple[Network, Any, Tensor]:
    torch.manual_seed(0)
    network = Network()
    return network, way(network), torch.randn(20, D)


@pytest.mark.parametrize("read", [*READS])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_numbers_are_read_in_evaluation_mode(way: Callable[[Network], Any], read: str) -> None:
    network, pair, x = made(way)
    before, found = network.mean.clone(), []
    for training in (True, False, True):
        network.train(training)
        network.first.train(not training)  # each module has its own back
        found.append(READS[read](pair, x))
        modes = [network.training, network.norm.training, network.first.training]
        assert modes == [training, training, not training]
    assert found[0] == found[1] == found[2]
    assert torch.equal(network.mean, before)
    network.eval()
    assert READS[read](methods(network), x) == found[0]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_training_is_in_training_mode(way: Callable[[Network], Any]) -> None:
    network, pair, x = made(way)
    network.eval()
    how: dict[str, Any] = {"valid": x, "epochs": 1, "lr": 1e-12, "progress": False}
    history = pvae.fit(pair, x, **how).history
    assert not network.mean.eq(0).any()
    assert not any(module.training for module in network.modules())
    other, usual, x = made(methods)
    pyro.clear_param_store()
    expected = pvae.fit(usual, x, **how).history
    assert history["loss"] == expected["loss"]
    assert history["valid_elbo"] == expected["valid_elbo"]
    assert torch.equal(network.mean, other.mean)


@pytest.mark.filterwarnings("ignore::pvae.PvaeWarning")  # nothing announces the new one
def test_a_network_put_in_the_place_of_another_is_found() -> None:
    network, _, x = made(methods)
    box = Box(network)
    pair = Pair(*got(network, lambda: box.network))
    bounds.elbo(pair, x)
    box.network = Network()
    found = []
    for training in (True, False):
        box.network.train(training)
        found.append(bounds.elbo(pair, x, 2).mean)
    assert found[0] == found[1]


def test_a_scripted_network_is_asked_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Linear(Q, D), nn.Dropout(0.5)))
    network, _, x = made(methods)
    pair = programs(nn.ModuleList([network, scripted]), network.encode, lambda z: scripted(z))
    found = []
    for training in (True, False):
        scripted.train(training)
        found.append(bounds.elbo(pair, x, 2).mean)
        assert scripted.training is training
    assert found[0] == found[1]


def said(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, PvaeWarning)]


def test_a_network_made_anew_in_each_run_is_said() -> None:
    network, _, x = made(methods)
    pair = programs(network, network.encode, lambda z: nn.Dropout(0.5)(network.decode(z)))
    (text,) = said(lambda: bounds.elbo(pair, x))
    assert "makes 'Dropout' anew in each run" in text


def test_trainable_tensors_of_no_network_within_reach_are_said() -> None:
    network, _, x = made(methods)
    weight = nn.Parameter(torch.randn(Q, D))
    hidden = iter(lambda: weight, None)
    get = functools.partial(next, hidden)
    pair = programs(network, network.encode, lambda z: z @ get())
    (text,) = said(lambda: bounds.elbo(pair, x))
    assert f"1 trainable tensor(s), of shape ({Q}, {D})" in text
    assert "no program announces" in text
