"""Steps as CUDA graphs, on a GPU or the pretend one: an eager step's numbers, or an eager step."""

from __future__ import annotations

import functools
import gc
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pvae import SVI, VAE, guides, likelihoods, penalties, priors, recipes, schedules
from pvae import objectives as o
from pvae.engine import Stepper, captured, make_optimizer
from pvae.errors import PvaeWarning
from tests import fits
from tests import test_compiled as c

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("store")]
ENGINES: list[Any] = ["eager", "cudagraph"]
RATE = 2.0**-7  # which float32 has, too, as fused kernels read it


def made(
    pair: Any, engine: Any, objective: Any = None, optimizer: Any = torch.optim.Adam, **options: Any
) -> Stepper:
    objective = objective or o.ELBO()
    structure = c.Pair(*pair[:2]).inspect(pair[2])
    state = objective.make_state(structure, 100)
    own = make_optimizer(optimizer, list(structure.parameters.values()), RATE)
    return Stepper(
        structure, objective, own, state, options.pop("clip_norm", None), engine, **options
    )


def steps(stepper: Stepper, batch: tuple[Tensor, ...], number: int) -> None:
    for step in range(number):
        stepper(batch, step)


def ends(stepper: Stepper) -> list[Tensor]:
    return [x.detach().clone().cpu() for x in (*stepper.parameters, *stepper.passes.changing())]


def check_same(build: Callable[[], Stepper], train: Callable[[Stepper], None]) -> None:
    """A training with graphs ends where the eager one does."""
    found = []
    for engine in ENGINES:
        pyro.clear_param_store()
        torch.manual_seed(0)
        stepper = build()
        stepper.engine = engine
        torch.manual_seed(1)
        train(stepper)
        assert stepper.engine == engine
        found.append(ends(stepper))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


PAIRS: dict[str, tuple[Callable[[torch.device], Any], o.Objective]] = {
    "ELBO": (c.vae, o.ELBO()),
    "a schedule": (c.vae, o.ELBO(beta=schedules.Warmup(7))),
    "particles": (c.vae, o.IWAE(3)),
    "DReG": (c.vae, o.DReG(3)),
    "TVO": (c.vae, o.TVO(3)),
    "total correlation": (c.vae, o.TCVAE()),
    "a classifier": (c.vae, o.FactorVAE(hidden=(4,), lr=1e-2)),
    "a multiplier": (c.vae, o.GECO(tolerance=4.0, speed=0.1)),
    "dropout and batch norm": (c.noisy, o.ELBO()),
    "flows": (c.flow, o.ELBO()),
    "a codebook": (c.codebook, o.ELBO()),
    "derivatives by the data": (c.contractive, o.ELBO()),
    "numbers among parameters": (lambda d: student(d), o.ELBO()),
}


def student(device: torch.device) -> Any:
    """Distributions that make tensors of numbers, which copies would wait for."""
    pair = VAE(
        priors.StudentT(c.Q),
        likelihoods.Bernoulli(lambda p: nn.Linear(c.Q, p * c.D), c.D),
        guides.MeanField(nn.Linear(c.D, 2 * c.Q), c.Q),
        penalties=[penalties.Activations(0.1, code=True), penalties.WeightDecay(0.1)],
    ).to(device)

    def model(x: Tensor) -> None:
        pair.model(x)
        pyro.sample("w", dist.Normal(torch.tensor([0.5, 1.0], device=device), 2.0).to_event(1))

    def guide(x: Tensor) -> None:
        pair.guide(x)
        pyro.sample("w", dist.Normal(torch.zeros(2, device=device), 1.0).to_event(1))

    return model, guide, (torch.rand(c.N, c.D, device=device).round(),)


@pytest.mark.parametrize("case", PAIRS)
def test_the_numbers_are_the_eager_ones(case: str, gpu: torch.device) -> None:
    """With a batch of another size now and then, and gradients clipped."""
    make, objective = PAIRS[case]
    batch: Tensor

    def build() -> Stepper:
        nonlocal batch
        pair = make(gpu)
        batch = pair[2][0]
        return made(pair, "eager", objective, clip_norm=0.5)

    def train(stepper: Stepper) -> None:
        for step in range(14):
            stepper((batch.roll(step, 0)[: 5 if step % 3 == 2 else None],), step)

    check_same(build, train)


OPTIMIZERS: dict[str, Any] = {
    "AdamW": torch.optim.AdamW,
    "amsgrad": functools.partial(torch.optim.Adam, amsgrad=True),
    "foreach": functools.partial(torch.optim.Adam, foreach=True),
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, momentum=0.9, centered=True),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "Adadelta": torch.optim.Adadelta,
    "Rprop": torch.optim.Rprop,
    "ASGD": functools.partial(torch.optim.ASGD, t0=3),
    "decaying rates": functools.partial(torch.optim.Adagrad, lr_decay=0.25),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers(name: str, gpu: torch.device) -> None:
    """What they count goes on, rates change, and a step that isn't finite changes nothing."""
    pair = c.contractive(gpu)
    start = [p.detach().clone() for p in c.Pair(*pair[:2]).inspect(pair[2]).parameters.values()]
    x = pair[2][0]

    def build() -> Stepper:
        stepper = made(pair, "eager", optimizer=OPTIMIZERS[name])
        for p, value in zip(stepper.parameters, start, strict=True):
            p.data.copy_(value)
        return stepper

    def train(stepper: Stepper) -> None:
        for step in range(12):
            stepper.optimizer.param_groups[0]["lr"] = RATE / (1 + step // 4)
            stepper((x * torch.nan if step in (5, 8) else x,), step)
            assert (stepper.look() is not None) == (step in (5, 8))
            stepper.recover(step + 1)

    check_same(build, train)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cpus_numbers(dtype: torch.dtype, gpu: torch.device) -> None:
    """Of a pair without draws."""
    found = {}
    for where, engine in zip((torch.device("cpu"), gpu), ENGINES, strict=True):
        torch.manual_seed(0)
        pair = recipes.ae(c.D, c.Q, hidden=(8,)).to(dtype)
        rows = torch.utils.data.TensorDataset(fits.binary().to(dtype))
        run = fits.fit(
            pair, torch.utils.data.DataLoader(rows, 16), epochs=6, lr=RATE, device=where,
            engine=engine, objective=o.ELBO(penalty_weight=schedules.Warmup(9)), clip_norm=1.0,
            lr_schedule=schedules.Cosine(),
        )  # fmt: skip
        assert run.training.stepper.engine == engine
        found[engine] = [*run.history["loss"], *run.history["grad_norm"]]
        found[engine] += [p.detach().cpu() for p in pair.parameters()]
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-6}[dtype]  # rates are in float32
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def waiting(device: torch.device, wait: Callable[[Tensor], Any]) -> Any:
    net = nn.Linear(c.D, 2 * c.Q).to(device)
    decoder = nn.Linear(c.Q, c.D).to(device)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(c.Q), x.new_ones(c.Q)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        loc, log_scale = net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + wait(x), log_scale.exp()).to_event(1))

    return model, guide, (torch.rand(c.N, c.D, device=device).round(),)


class Host:
    """Tensors of the host, which a graph would have as they were."""

    number, moving = torch.tensor(0.25), torch.tensor(0.25)

    def counted(self, _: Tensor) -> Tensor:
        return self.moving.add_(1e-3)


WAITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a value": (lambda x: x.sum().item() * 1e-9, r"synchronizing CUDA operation.*test_graphs.py"),
    "a branch": (lambda x: 0.1 if x.sum() > 0 else 0.2, "synchronizing CUDA operation"),
    "a mask": (lambda x: x[x > 2].sum(), "synchronizing CUDA operation"),
    "to the device": (lambda x: torch.zeros(c.Q).to(x.device), "synchronizing|between CPU"),
    "in the background": (
        lambda x: torch.zeros(c.Q).to(x.device, non_blocking=True),
        "it moves a tensor between CPU and device at test_graphs.py",
    ),
    "to the host": (lambda x: x.mean().cpu().to(x.device), "synchronizing|between CPU"),
    "the CPU's draws": (lambda _: torch.rand(()), "it draws on the CPU at test_graphs.py"),
    "Python's draws": (lambda _: float(np.random.rand()), "NumPy's generator"),  # noqa: NPY002
    "the host's counter": (Host().counted, r"it changes a tensor of shape \(\) on the CPU"),
}


@pytest.mark.parametrize("case", WAITS)
def test_what_waits_is_not_captured(case: str, gpu: torch.device) -> None:
    """And goes on as an eager step, with the eager numbers, after which others are captured."""
    wait, words = WAITS[case]
    found = []
    for engine in ENGINES:
        pyro.clear_param_store()
        torch.manual_seed(0)
        Host.moving.fill_(0.25)
        pair = waiting(gpu, wait)
        stepper = made(pair, engine)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(1)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            for step in range(10):
                stepper(pair[2], step)
        assert stepper.engine == "eager"
        found.append(ends(stepper))
    (text,) = [str(w.message) for w in heard]
    assert "Steps run as Python, not captured: " in text
    assert re.search(words, text), text
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_a_number_of_the_host_that_changes(gpu: torch.device) -> None:
    """What is kept in a tensor on the CPU is looked at; each value has its graph."""
    host = torch.tensor(0.25)
    pair = waiting(gpu, lambda _: host)

    def train(stepper: Stepper) -> None:
        for step in range(50):
            host.fill_(0.25 if step < 30 else 0.5)
            stepper(pair[2], step)

    parameters = [p.detach().clone() for p in made(pair, "eager").parameters]

    def build() -> Stepper:
        stepper = made(pair, "eager")
        for p, value in zip(stepper.parameters, parameters, strict=True):
            p.data.copy_(value)
        return stepper

    check_same(build, train)


def test_another_memory_and_another_optimiser_state(gpu: torch.device) -> None:
    """Graphs have addresses: tensors that were put in a parameter's place, a state loaded."""
    pair = c.contractive(gpu)
    start = [p.detach().clone() for p in made(pair, "eager").parameters]

    def build() -> Stepper:
        stepper = made(pair, "eager")
        for p, value in zip(stepper.parameters, start, strict=True):
            p.data = value.clone()
        return stepper

    def train(stepper: Stepper) -> None:
        for step in range(60):
            if step == 25:
                kept = [p.data for p in stepper.parameters]  # so that its memory isn't used again
                for p, value in zip(stepper.parameters, start, strict=True):
                    p.data = value.clone()
                assert len(kept) == len(start)
            if step == 50:
                stepper.optimizer.load_state_dict(stepper.optimizer.state_dict())
            stepper(pair[2], step)

    check_same(build, train)


@pytest.mark.parametrize("is_spoilt", [True, False])
def test_after_a_capture_that_failed(is_spoilt: bool, gpu: torch.device) -> None:
    """Generators, streams and memory are usable, and another step is captured."""

    def fails(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            if is_spoilt:
                x.sum().item()
            raise ValueError("no, thanks")
        return x.new_zeros(())

    stepper = made(pair := waiting(gpu, fails), "cudagraph")
    words = "not permitted when stream is capturing" if is_spoilt else "no, thanks at"
    with pytest.warns(PvaeWarning, match=f"the capture fails with .*{words}"):
        steps(stepper, pair[2], 8)
    assert stepper.engine == "eager"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(3, device=gpu).isfinite().all()
    torch.manual_seed(5)
    first = torch.rand(3, device=gpu)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3, device=gpu), first)
    batch = torch.rand(c.N, c.D, device=gpu).round()
    check_same(lambda: made(c.vae(gpu), "eager"), lambda stepper: steps(stepper, (batch,), 8))


def test_beside_a_thread_that_pins(gpu: torch.device, tmp_path: Path) -> None:
    """Data that are read ahead: the thread goes on during trial and capture."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((64, 6)).round().astype("float64"))
    data, stop = np.load(tmp_path / "x.npy", mmap_mode="r"), threading.Event()

    def pin() -> None:
        while not stop.is_set():
            torch.ones(3).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        run = fits.fit(fits.vae(), data, epochs=6, device=gpu, engine="cudagraph")
    finally:
        stop.set()
        thread.join()
    assert run.training.stepper.engine == "cudagraph"
    again = fits.fit(fits.vae(), torch.from_numpy(data.copy()), epochs=6, device=gpu)
    assert [*run.history["loss"]] == pytest.approx([*again.history["loss"]], rel=1e-6)


def test_a_resumed_training_is_the_whole_one(gpu: torch.device, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": gpu, "engine": "cudagraph", "lr": 1e-2}
    whole = fits.vae()
    fits.fit(whole, fits.binary(), epochs=7, folder=tmp_path / "whole", **options)
    options |= {"folder": tmp_path / "parts"}
    fits.fit(fits.vae(), fits.binary(), epochs=4, **options)
    parts = fits.vae(1)
    fits.fit(parts, fits.binary(), epochs=7, resume=True, **options)
    assert fits.same(fits.state(parts), fits.state(whole))


def test_memory_is_given_back(gpu: torch.device) -> None:
    """Graphs end with the training; one that goes on makes others."""
    held, runs = {}, {}
    for engine in ENGINES:
        gc.collect()
        before = torch.cuda.memory_allocated()
        runs[engine] = fits.fit(fits.vae(), fits.binary(), epochs=6, device=gpu, engine=engine)
        assert runs[engine].training.stepper.engine == engine
        gc.collect()
        held[engine] = torch.cuda.memory_allocated() - before
    assert held["cudagraph"] <= held["eager"]
    runs["cudagraph"].refine(6)
    assert runs["cudagraph"].history["epoch"] == [*range(12)]


def test_one_pool_and_the_callers_thread_alone(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    class Graph(torch.cuda.graph):
        def __init__(self, graph: Any, **options: Any) -> None:
            seen.append(options)
            super().__init__(graph, **options)

    monkeypatch.setattr(torch.cuda, "graph", Graph)
    stepper = made(pair := c.vae(gpu), "cudagraph")
    for step in range(3 * captured.WARM_UP + 3):
        stepper((pair[2][0][: 12 - 3 * (step % 3)],), step)
    assert [s["capture_error_mode"] for s in seen] == ["thread_local"] * 3
    assert len({s["pool"] for s in seen}) == 1
    assert len({id(s["stream"]) for s in seen}) == 1


def test_a_batch_that_is_read_on_the_host(gpu: torch.device) -> None:
    """A graph would have the numbers of its first batch."""
    pair = waiting(gpu, lambda _: torch.zeros((), device=gpu))
    _, guide, (x,) = pair
    model = lambda x, weight: pyro.poutine.scale(pair[0], float(weight))(x)  # noqa: E731
    batch = x, torch.tensor(0.5)
    stepper = made((model, lambda x, weight: guide(x), batch), "cudagraph")
    with pytest.warns(PvaeWarning, match="it reads a tensor of the batch on the CPU"):
        steps(stepper, batch, 5)


def test_pvae_svi(gpu: torch.device) -> None:
    """The losses of eager steps; and no step waits, but to look for one that wasn't finite."""
    found = []
    for engine in ENGINES:
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide, (x,) = c.vae(gpu)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": RATE}), o.ELBO(), engine=engine)
        torch.manual_seed(1)
        losses = [svi.step(x) for _ in range(8)]
        bad = x.clone()
        bad[0, 0] = torch.nan
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses += [svi.step(bad if step == 3 else x) for step in range(7)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with pytest.warns(PvaeWarning, match="Step 11 isn't finite, at .*, and was skipped"):
            losses.append(svi.step(x))
        found.append(np.array(losses))
        assert np.isnan(found[-1]).nonzero()[0].tolist() == [11]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-7)
