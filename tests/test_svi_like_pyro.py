"""pvae.SVI beside Pyro's own class: losses, parameters and optimiser's state, step by step."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.contrib.gp.kernels as kernels
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pvae
from pvae.errors import ArgumentError

pytestmark = [
    pytest.mark.usefixtures("store"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Found no sample sites configured for enumeration"),
    pytest.mark.filterwarnings("ignore:weight was not registered in the param store"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
]
N, D, Q = 20, 3, 2
SVIS = (infer.SVI, pvae.SVI)
Programs = tuple[Callable[..., None], Callable[..., None], Tensor]


def gaussian(flags: dict[str, Any] | None = None) -> Programs:
    """A linear autoencoder; ``flags`` say what the programs do on top of that."""
    flags = flags if flags is not None else {}
    encoder, decoder = nn.Linear(D, 2 * Q), nn.Linear(Q, D)

    def model(x: Tensor, y: Tensor | None = None, beta: float = 1.0) -> None:
        pyro.module("decoder", decoder)
        shift = pyro.param("shift", torch.zeros(D)) if flags.get("announced") else x.new_zeros(D)
        shift = shift if flags.get("used") else torch.zeros(D)
        if y is not None:
            shift = shift + pyro.param("of_label", torch.zeros(D)) * y[:, None]
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)), poutine.scale(scale=beta):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z) + shift, scale).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor | None = None, beta: float = 1.0) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)), poutine.scale(scale=beta):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, torch.randn(N, D)


def coin() -> Programs:
    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.4), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=slope * x))

    return model, guide, torch.randn(N)


def mixture() -> Programs:
    @infer.config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        means = pyro.param("means", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)

    return model, lambda x: None, torch.randn(N)


def no_parameters() -> Programs:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    return model, guide, torch.randn(N)


def in_containers() -> Programs:
    """Programs that are called with a dictionary."""
    model, guide, x = gaussian()

    def unpacked(program: Any) -> Any:
        return lambda batch, config: program(batch["x"][0], beta=config["beta"])

    return unpacked(model), unpacked(guide), x


def rbf() -> Any:
    """A kernel whose parameters aren't trained."""
    kernel = kernels.RBF(Q, lengthscale=torch.tensor(1.0), variance=torch.tensor(1.0))
    return kernel.requires_grad_(requires_grad=False).eval()


def adam() -> Any:
    return pyro.optim.Adam({"lr": 1e-2})


def scheduled(name: str, optimizer: Any = torch.optim.Adam, lr: float = 1e-2, **rest: Any) -> Any:
    settings = {"optimizer": optimizer, "optim_args": {"lr": lr}, **rest}
    return getattr(pyro.optim, name)(settings)


def by_name(name: str) -> dict[str, float]:
    return {"lr": 1e-2 if "bias" in name else 1e-3}


def by_two_names(module: str, name: str) -> dict[str, float]:
    return {"lr": 1e-2 if module == "encoder" or name == "scale" else 1e-3}


def clip_by_two_names(_: str, name: str) -> dict[str, float]:
    return {"clip_value": 0.5} if name == "weight" else {"clip_norm": 1.0}


OPTIMISERS: dict[str, Callable[[], Any]] = {
    "Adam": adam,
    "AdamW": lambda: pyro.optim.AdamW({"lr": 1e-2, "weight_decay": 0.1}),
    "SGD with momentum": lambda: pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1}),
    "Adagrad": lambda: pyro.optim.Adagrad({"lr": 1e-2}),
    "Rprop": lambda: pyro.optim.Rprop({"lr": 1e-2}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.9, "clip_norm": 1.0}),
    "AdagradRMSProp": lambda: pyro.optim.AdagradRMSProp({"eta": 1e-2}),
    "DCTAdam": lambda: pyro.optim.DCTAdam({"lr": 1e-2}),
    "by name": lambda: pyro.optim.Adam(by_name),
    "by two names": lambda: pyro.optim.Adam(by_two_names),
    "clipped": lambda: pyro.optim.Adam({"lr": 1e-2}, {"clip_norm": 0.5}),
    "clipped by name": lambda: pyro.optim.SGD({"lr": 1e-3}, clip_by_two_names),
    "ExponentialLR": lambda: scheduled("ExponentialLR", gamma=0.5),
    "StepLR": lambda: scheduled("StepLR", torch.optim.SGD, 1e-3, step_size=2),
    "OneCycleLR": lambda: scheduled("OneCycleLR", max_lr=0.1, total_steps=9),
    "ReduceLROnPlateau": lambda: scheduled("ReduceLROnPlateau", patience=1, factor=0.1),
}
LOSSES: dict[str, tuple[Callable[[], Programs], Callable[[], Any]]] = {
    "K": (gaussian, lambda: Trace_ELBO(num_particles=3)),
    "K at once": (gaussian, lambda: Trace_ELBO(3, vectorize_particles=True)),
    "K at once, nesting": (gaussian, lambda: Trace_ELBO(3, 1, vectorize_particles=True)),
    "score function": (coin, Trace_ELBO),
    "score function, K": (coin, lambda: Trace_ELBO(num_particles=2)),
    "no parameters": (no_parameters, Trace_ELBO),
    "TraceMeanField": (gaussian, infer.TraceMeanField_ELBO),
    "TraceGraph": (coin, infer.TraceGraph_ELBO),
    "TraceEnum": (mixture, infer.TraceEnum_ELBO),
    "TraceTMC": (gaussian, lambda: infer.TraceTMC_ELBO(max_plate_nesting=1)),
    "Renyi": (gaussian, lambda: infer.RenyiELBO(alpha=0.5, num_particles=3)),
    "ReweightedWakeSleep": (coin, lambda: infer.ReweightedWakeSleep(num_particles=3)),
    "EnergyDistance": (gaussian, infer.EnergyDistance),
    "MMD": (gaussian, lambda: infer.Trace_MMD(kernel=rbf(), num_particles=4)),
    "JitTrace": (gaussian, lambda: infer.JitTrace_ELBO(ignore_jit_warnings=True)),
    "JitTraceGraph": (gaussian, lambda: infer.JitTraceGraph_ELBO(ignore_jit_warnings=True)),
    "JitTraceEnum": (mixture, lambda: infer.JitTraceEnum_ELBO(1, 1, ignore_jit_warnings=True)),
    "JitTraceMeanField": (
        gaussian,
        functools.partial(infer.JitTraceMeanField_ELBO, ignore_jit_warnings=True),
    ),
    "a function": (gaussian, lambda: Trace_ELBO().differentiable_loss),
}
CALLS: dict[str, Callable[[int, Tensor], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "a keyword": lambda i, x: ((x,), {"beta": 0.5}),
    "data by keyword": lambda i, x: ((), {"x": x, "beta": 0.5}),
    "None and a number": lambda i, x: ((x, None, 0.5), {}),
    "a number that changes": lambda i, x: ((x, None, 0.1 * (i + 1)), {}),
    "an integer": lambda i, x: ((x, None, i + 1), {}),
    "a tensor that changes": lambda i, x: ((x,), {"beta": torch.tensor(0.1 * (i + 1))}),
    "labels now and then": lambda i, x: ((x, x[:, 0]) if i % 2 else (x,), {}),
    "batches of other sizes": lambda i, x: ((x[: N - i],), {}),
}


def flat(losses: list[Any]) -> list[float]:
    return [float(x) for loss in losses for x in (loss if isinstance(loss, tuple) else (loss,))]


def trained(
    svi: type[infer.SVI],
    make: Callable[[], Programs] = gaussian,
    optim: Callable[[], Any] = adam,
    loss: Callable[[], Any] = Trace_ELBO,
    calls: Callable[[int, Tensor], Any] = lambda i, x: ((x,), {}),
) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    """Losses of some steps, the store, and the optimiser's state, after the same seeds."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    (model, guide, x), made = make(), optim()
    run, losses = svi(model, guide, made, loss()), []
    for i in range(5):
        args, kwargs = calls(i, x)
        losses.append(run.step(*args, **kwargs))
        if isinstance(made, pyro.optim.PyroLRScheduler):
            made.step(*([1.0] if "Plateau" in made.pt_scheduler_constructor.__name__ else []))
    losses.append(run.evaluate_loss(*args, **kwargs))
    store = {name: x.detach().clone() for name, x in pyro.get_param_store().items()}
    return flat(losses), store, made.get_state()


def check_same(**case: Any) -> None:
    theirs, ours = (trained(svi, **case) for svi in SVIS)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-7, abs=1e-7)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=1e-7, atol=1e-9)
    for name, state in theirs[2].items():
        if numbers := _of_parameter(state):
            torch.testing.assert_close(_of_parameter(ours[2][name]), numbers)


def _of_parameter(state: dict[str, Any]) -> dict[str, Tensor]:
    """An optimiser's state of one parameter, and its learning rate; nothing if it has made none."""
    state = state.get("optimizer", state)
    numbers = state["state"].get(0, {})
    numbers = numbers and {"lr": state["param_groups"][0].get("lr", 0.0), **numbers}
    return {name: torch.as_tensor(x).double() for name, x in numbers.items() if x is not None}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers(name: str) -> None:
    check_same(optim=OPTIMISERS[name])


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    make, loss = LOSSES[name]
    check_same(make=make, loss=loss)


@pytest.mark.parametrize("name", CALLS)
def test_arguments(name: str) -> None:
    check_same(calls=CALLS[name])


def test_arguments_in_containers() -> None:
    def calls(i: int, x: Tensor) -> Any:
        return ({"x": (x, "words")},), {"config": {"beta": 0.5 * i + 0.1, "name": "a"}}

    check_same(make=in_containers, calls=calls)


def test_pyros_objectives_with_such_arguments() -> None:
    for name in ("a keyword", "labels now and then", "a number that changes"):
        check_same(calls=CALLS[name], loss=infer.TraceMeanField_ELBO)


# What changes in the middle of a training: each is a generator of numbers that both classes give


def late_parameter(svi: Any) -> Iterator[float]:
    """And one that is announced before and after it is used: momentum goes on without gradients."""
    flags: dict[str, Any] = {}
    model, guide, x = gaussian(flags)
    run = svi(model, guide, adam(), Trace_ELBO())
    for i in range(12):
        flags.update(announced=i > 2 and i != 9, used=i in (4, 5, 8))
        yield run.step(x)
    yield from pyro.param("shift").tolist()


def cleared_store(svi: Any) -> Iterator[float]:
    model, guide, x = coin()
    run = svi(model, guide, adam(), Trace_ELBO())
    for i in range(9):
        if i == 4:
            pyro.clear_param_store()
        if i == 7:
            pyro.get_param_store()["slope"] = torch.tensor(2.0)
        yield run.step(x)
    yield pyro.param("slope").item()


def frozen_and_freed(svi: Any) -> Iterator[float]:
    flags = {"announced": True, "used": True}
    model, guide, x = gaussian(flags)
    run = svi(model, guide, adam(), Trace_ELBO())
    run.step(x)
    store = dict(pyro.get_param_store().named_parameters())
    for i in range(9):
        store["decoder$$$weight"].requires_grad_(not 2 <= i < 5)
        store["shift"].requires_grad_(not 3 <= i < 7)
        yield run.step(x)
    yield from pyro.param("shift").tolist()


def replaced_network(svi: Any) -> Iterator[float]:
    vae, x = pvae.recipes.vae(D, Q, hidden=()), torch.rand(N, D).round()
    run = svi(vae.model, vae.guide, adam(), Trace_ELBO())
    for i in range(6):
        if i == 3:
            encoder = vae.guide.posterior.network
            for name, layer in [*encoder.named_modules()]:
                if isinstance(layer, nn.Linear):
                    *path, last = name.split(".")
                    inner = encoder.get_submodule(".".join(path))
                    setattr(inner, last, nn.Linear(layer.in_features, layer.out_features))
        yield run.step(x)
    yield from (p.sum().item() for p in vae.parameters())


def another_svi_with_the_same_optimiser(svi: Any) -> Iterator[float]:
    (model, guide, x), optim = gaussian(), adam()
    for loss in (Trace_ELBO, infer.TraceMeanField_ELBO, Trace_ELBO):
        run = svi(model, guide, optim, loss())
        yield from (run.step(x) for _ in range(3))


def saved_and_loaded(svi: Any) -> Iterator[float]:
    (model, guide, x), first, second = gaussian(), adam(), adam()
    yield from (svi(model, guide, first, Trace_ELBO()).step(x) for _ in range(3))
    second.set_state(first.get_state())
    run = svi(model, guide, second, Trace_ELBO())
    yield from (run.step(x) for _ in range(3))


def another_learning_rate(svi: Any) -> Iterator[float]:
    (model, guide, x), optim = gaussian(), adam()
    run = svi(model, guide, optim, Trace_ELBO())
    for i in range(6):
        if i == 3:
            for one in optim.optim_objs.values():
                one.param_groups[0]["lr"] = 0.5
        yield run.step(x)


def hooks_on_gradients(svi: Any) -> Iterator[float]:
    model, guide, x = gaussian()
    run, norms = svi(model, guide, adam(), Trace_ELBO()), []
    run.step(x)
    for _, p in pyro.get_param_store().named_parameters():
        p.register_hook(lambda g: norms.append(g.norm().item()))
    yield from (run.step(x) for _ in range(2))
    yield from sorted(norms)


def runs(svi: Any) -> Iterator[float]:
    """``run``, and the two functions that loops of one's own take from an SVI."""
    model, guide, x = gaussian()
    run = svi(model, guide, adam(), Trace_ELBO(), num_samples=4, num_steps=3)
    run.run(x)
    yield from (trace.log_prob_sum().item() for trace in run.exec_traces)
    yield run.loss(run.model, run.guide, x)
    yield run.loss_and_grads(run.model, run.guide, x)


def gradients_of_ones_own(svi: Any) -> Iterator[float]:
    """``loss_and_grads=`` beside a function."""
    (model, guide, x), elbo = gaussian(), Trace_ELBO()

    def halved(*args: Any) -> float:
        loss = elbo.differentiable_loss(*args)
        (loss / 2).backward()
        return float(loss.detach())

    run = svi(model, guide, pyro.optim.SGD({"lr": 1e-3}), elbo.loss, loss_and_grads=halved)
    yield from (run.step(x) for _ in range(3))


CHANGES = (
    late_parameter, cleared_store, frozen_and_freed, replaced_network, saved_and_loaded,
    another_svi_with_the_same_optimiser, another_learning_rate, hooks_on_gradients, runs,
    gradients_of_ones_own,
)  # fmt: skip


@pytest.mark.parametrize("numbers", CHANGES, ids=lambda f: f.__name__)
def test_what_happens_between_steps(numbers: Callable[[Any], Iterator[float]]) -> None:
    found = []
    for svi in SVIS:
        pyro.clear_param_store()
        torch.manual_seed(1)
        found.append([*numbers(svi)])
    assert all(map(math.isfinite, found[0]))
    assert found[1] == pytest.approx(found[0], rel=1e-7, abs=1e-7)


def test_it_is_one_of_pyros() -> None:
    model, guide, _ = gaussian()
    assert isinstance(pvae.SVI(model, guide, adam(), Trace_ELBO()), infer.SVI)


def test_a_torch_optimiser_takes_late_parameters_too() -> None:
    flags: dict[str, Any] = {}
    model, guide, x = gaussian(flags)
    svi = pvae.SVI(model, guide, functools.partial(torch.optim.Adam, lr=1e-2), Trace_ELBO())
    svi.step(x)
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]
    given = pvae.SVI(model, guide, torch.optim.Adam(parameters, lr=1e-2), Trace_ELBO())
    given.step(x)
    flags.update(announced=True, used=True)
    for run in (svi, given):
        before = pyro.param("shift", torch.zeros(D)).tolist()
        run.step(x)
        assert pyro.param("shift").tolist() != before


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        (pyro.optim.multi.Newton(), "a torch optimiser or its class; got Newton"),
        ({"lr": 1e-3}, "a torch optimiser or its class; got dict"),
    ],
    ids=["a multi-optimiser", "settings"],
)
def test_what_is_refused(optim: Any, words: str) -> None:
    model, guide, _ = gaussian()
    with pytest.raises(ArgumentError, match=words) as refused:
        pvae.SVI(model, guide, optim, Trace_ELBO())
    works = re.search("Try: (.*)", str(refused.value))
    assert works is not None
    made = eval(works[1], {"pyro": pyro})  # noqa: S307
    assert pvae.SVI(model, guide, made, Trace_ELBO()).step(torch.randn(N, D)) > 0
