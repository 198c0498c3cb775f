"""What fails is told as what it is: errors in a user's program, full memory, calls inside programs.

Where it fails is the user's own line; one that fails costs nothing else.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import pvae
from pvae import Pair, bounds, diagnostics, export, latent, recipes, terms, testing, threads
from pvae.errors import OutOfMemoryError, PairError

N = 40

pytestmark = pytest.mark.usefixtures("store")


def x_of(n: int = N) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


def pair_that(act: Callable[[Tensor], object], *, in_guide: bool = False) -> Pair:
    """Normal data with the exact posterior; one program calls ``act(x)`` first."""

    def model(x: Tensor) -> None:
        if not in_guide:
            act(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        if in_guide:
            act(x)
        w = pyro.param("w", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(w * x, 0.5**0.5))

    return Pair(model, guide)


TOOLS: dict[str, Callable[[Pair, Tensor], Any]] = {
    "fit": lambda pair, x: pvae.fit(pair, x, epochs=1, progress=False),
    "elbo": lambda pair, x: bounds.elbo(pair, x),
    "evidence": lambda pair, x: bounds.evidence(pair, x, 4, progress=False),
    "codes": lambda pair, x: latent.codes(pair, x),
    "sample": lambda pair, x: latent.sample(pair, x),
    "check_pair": lambda pair, x: testing.check_pair(pair, x),
    "surgery": lambda pair, x: diagnostics.surgery(pair, x),
    "to_arviz": lambda pair, x: export.to_arviz(pair, x, num_particles=2, progress=False),
    "diagnose": lambda pair, x: pvae.diagnose(pair, x, checks=["elbo"]),
}


class TwoArguments(Exception):  # noqa: N818
    """One that can't be made of a text alone, as Pyro tries to."""

    def __init__(self, what: str, count: int) -> None:
        super().__init__(f"{what}: {count}")


def refuse(x: Tensor, error: BaseException) -> None:
    raise error


def multiply(x: Tensor) -> Tensor:
    return nn.Linear(3, 3)(x)


LINE_OF_REFUSE = refuse.__code__.co_firstlineno + 1
LINE_OF_MULTIPLY = multiply.__code__.co_firstlineno + 1


@pytest.mark.parametrize("in_guide", [False, True])
@pytest.mark.parametrize("name", [*TOOLS])
def test_an_error_in_a_program_names_the_users_line(name: str, in_guide: bool) -> None:
    if name == "sample" and in_guide:
        pytest.skip("runs no guide")
    error = RuntimeError("lengths must be sorted")
    with pytest.raises(PairError, match="RuntimeError: lengths must be sorted") as caught:
        TOOLS[name](pair_that(partial(refuse, error=error), in_guide=in_guide), x_of())
    assert f"{__file__}:{LINE_OF_REFUSE}, in refuse" in str(caught.value)


def test_an_error_in_a_library_names_the_users_line_that_called_it() -> None:
    with pytest.raises(PairError, match="shapes cannot be multiplied") as caught:
        bounds.elbo(pair_that(multiply), x_of())
    assert f"{__file__}:{LINE_OF_MULTIPLY}, in multiply" in str(caught.value)


def test_an_error_that_pyro_cannot_raise_anew_is_still_the_users() -> None:
    act = partial(refuse, error=TwoArguments("rows", 3))
    with pytest.raises(PairError, match=r"TwoArguments: rows: 3 \(.*in refuse\)"):
        bounds.elbo(pair_that(act), x_of())


def test_an_error_in_a_density_names_the_users_line() -> None:
    class Odd(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            raise ValueError("no density today")

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", Odd(z, 1.0), obs=x)

    with pytest.raises(PairError, match=r"no density today \(.*test_failures.py:.*in log_prob\)"):
        bounds.elbo((model, pair_that(len).guide), x_of())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("name", [*TOOLS])
def test_an_interrupt_is_never_swallowed_and_frees_the_tools(
    name: str, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        TOOLS[name](pair_that(partial(refuse, error=error)), x_of())
    with ThreadPoolExecutor(1) as other:
        found = other.submit(bounds.elbo, pair_that(len), x_of()).result(timeout=60)
    assert found.kind == "lower"


# Memory


def needs(x: Tensor, error: Exception, most: int) -> None:
    """Memory for so many rows, in the form of an error."""
    if x.numel() > most:
        raise error


FULL = [
    MemoryError("no memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
]


class Many(dist.Normal):
    """Scores at most so many values at once."""

    def log_prob(self, value: Tensor) -> Tensor:
        needs(super().log_prob(value), FULL[2], most=MOST)
        return super().log_prob(value)


MOST = 200


def scoring() -> Pair:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", Many(z, 1.0), obs=x)

    return Pair(model, pair_that(len).guide)


@pytest.mark.parametrize("full", [*FULL, None], ids=["host", "device", "torch", "in a density"])
def test_full_memory_is_told_with_rows_and_an_option_that_works(full: Exception | None) -> None:
    pair, x = scoring(), x_of(4 * MOST)
    if full is not None:
        pair = pair_that(partial(needs, error=full, most=MOST))
    with pytest.raises(OutOfMemoryError) as caught:
        bounds.evidence(pair, x, 1, progress=False)
    assert isinstance(caught.value, MemoryError)
    assert f"memory for {4 * MOST} rows at once" in str(caught.value)
    assert caught.value.fixes == (f"max_rows={MOST}",)
    found = bounds.evidence(pair, x, 1, progress=False, max_rows=MOST)
    torch.testing.assert_close(found.per_datum, dist.Normal(0.0, 2**0.5).log_prob(x))


def test_full_memory_at_the_first_look_is_no_matter_of_shapes() -> None:
    pair = pair_that(partial(needs, error=FULL[0], most=1))
    with pytest.raises(OutOfMemoryError, match=f"memory for {N} rows at once; got no memory"):
        bounds.elbo(pair, x_of())
    with pytest.raises(OutOfMemoryError, match=f"Try: batch_size={N // 4}, in a training"):
        pvae.fit(pair, x_of(), progress=False)


def test_full_memory_in_a_training_advises_the_batch_size() -> None:
    network = nn.Identity()

    def in_training(x: Tensor) -> None:
        if network.training:
            needs(x, FULL[1], most=N // 4)

    pair = pair_that(in_training)
    pair.inspect(x_of(N // 4))
    with pytest.raises(OutOfMemoryError, match=rf"fit: expected memory for {N} rows") as caught:
        pvae.fit(pair, x_of(), batch_size=N, progress=False)
    assert caught.value.fixes == (f"batch_size={N // 4}",)
    pvae.fit(pair, x_of(), batch_size=N // 4, epochs=1, progress=False)


# One check of many


def test_a_check_that_fails_costs_no_other() -> None:
    """SBC gives the model other data than these, and the model refuses them."""

    def sorted_alone(x: Tensor) -> None:
        if bool((x.diff() < 0).any()):
            raise RuntimeError("sort them first")

    x, checks = x_of().sort().values, ["elbo", "sbc", "units", "surgery"]
    found = pvae.diagnose(pair_that(sorted_alone), x, checks=checks)
    assert [*found.results] == ["elbo", "units", "surgery"]
    assert "RuntimeError: sort them first" in found.missing["sbc"]
    assert f"{__file__}:" in found.missing["sbc"]
    others = pvae.diagnose(pair_that(len), x, checks=checks)
    for name in found.results:
        ours, theirs = found.results[name].findings(), others.results[name].findings()
        assert [line.value for line in ours] == [line.value for line in theirs]


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), FULL[1]])
def test_any_error_in_a_check_is_noted(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(subject: object) -> None:
        raise error

    monkeypatch.setitem(diagnostics.CHECKS, "units", ("the latent space", fails))
    found = pvae.diagnose(pair_that(len), x_of(), checks=["units", "elbo"])
    assert [*found.results] == ["elbo"]
    assert f"{type(error).__name__}: {error}" in found.missing["units"]


# Inside of programs


@pytest.mark.parametrize(
    ("around", "name"),
    [
        (lambda: poutine.condition(data={"z": torch.zeros(N)}), "ConditionMessenger"),
        (lambda: poutine.scale(scale=0.5), "ScaleMessenger"),
        (lambda: poutine.trace(), "TraceMessenger"),
        (lambda: pyro.plate("outer", 3, dim=-2), "plate"),
    ],
)
@pytest.mark.parametrize("tool", [*TOOLS])
def test_a_tool_under_a_handler_is_refused(tool: str, around: Callable[[], Any], name: str) -> None:
    pair = pair_that(len)
    with around(), pytest.raises(PairError, match=f"outside of Pyro's .* under {name}"):
        TOOLS[tool](pair, x_of())
    assert bounds.elbo(pair, x_of()).kind == "lower"


def test_a_tool_inside_a_program_is_refused_and_says_where() -> None:
    inner = pair_that(len)
    pair = pair_that(lambda x: bounds.elbo(inner, x))
    with pytest.raises(PairError, match="elbo: expected a call outside of Pyro's programs"):
        bounds.elbo(pair, x_of())


def test_the_handler_around_the_program_works_as_the_message_says() -> None:
    pair, x = pair_that(len), x_of()
    half = Pair(poutine.scale(pair.model, scale=0.5), poutine.scale(pair.guide, scale=0.5))
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).mean()  # a scale is no part of a density
    assert bounds.evidence(half, x, 1, progress=False).mean == pytest.approx(float(exact))


def test_codes_and_samples_may_be_made_inside_a_program() -> None:
    torch.manual_seed(0)
    vae, seen = recipes.vae(1, 2, hidden=(4,)).requires_grad_(requires_grad=False), []

    def act(x: Tensor) -> None:
        z = vae.encode(x[:, None])
        seen.append((z, vae.decode(z), vae.sample(3, seed=1)))

    x = x_of().abs().clamp(max=1).round()
    bounds.elbo(pair_that(act), x)
    z = vae.encode(x[:, None])
    torch.testing.assert_close(seen[-1], (z, vae.decode(z), vae.sample(3, seed=1)))


# Threads


def test_tools_in_threads_give_the_numbers_of_one_thread() -> None:
    torch.manual_seed(0)
    x = torch.rand(60, 8).round()
    vaes = [recipes.vae(8, 2, hidden=(8,)) for _ in range(2)]

    def run(seed: int) -> list[Tensor]:
        vae = copy.deepcopy(vaes[seed % 2])  # a new one would draw its weights beside other tools
        history = pvae.fit(vae, x, epochs=2, seed=seed, progress=False).history
        evidence = bounds.evidence(vaes[0], x, 20, seed=seed, progress=False)
        drawn = vaes[1].sample(5, seed=seed)
        coded = latent.codes(vaes[0], x, num_particles=2, seed=seed)
        made = latent.sample(vaes[1], x, seed=seed)
        return [torch.tensor(history["loss"]), evidence.per_datum, drawn, coded, made]

    expected = [run(seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as several:
        found = [*several.map(run, [*range(6)] * 2)]
    for ours, theirs in zip(found, expected * 2, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_steps_beside_a_tool_of_another_thread_are_those_of_one_thread() -> None:
    """Of a deterministic pair, as steps draw from the generator that all threads share."""
    torch.manual_seed(0)
    x, first = torch.rand(60, 8), recipes.ae(8, 2, hidden=(8,))

    def losses() -> list[float]:
        ae = copied[0]
        svi = pvae.SVI(ae.model, ae.guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        return [svi.step(x) for _ in range(20)]

    copied = [copy.deepcopy(first)]
    expected = losses()
    copied, vae, done = [copy.deepcopy(first)], recipes.vae(8, 2, hidden=(8,)), threading.Event()

    def read() -> None:
        while not done.is_set():
            bounds.elbo(vae, x.round(), progress=False)

    with ThreadPoolExecutor(1) as other:
        reading = other.submit(read)
        try:
            assert losses() == expected
        finally:
            done.set()
        reading.result()


def test_networks_of_another_thread_keep_their_mode_during_a_look() -> None:
    """Plain torch in another thread isn't taken for a part of the pair that is looked at."""
    network, started, done = nn.Dropout(0.5), threading.Event(), threading.Event()
    modes: set[bool] = set()

    def train() -> None:
        while not done.is_set():
            network(torch.ones(3))
            modes.add(network.training)
            started.set()

    thread = threading.Thread(target=train)
    thread.start()
    started.wait()
    found = [pair_that(len).inspect(x_of()) for _ in range(20)]
    done.set()
    thread.join()
    assert modes == {True}
    assert all(network not in structure.modules for structure in found)


def test_a_thread_that_waits_long_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "PATIENCE", 0.05)
    with ThreadPoolExecutor(1) as other, threads.alone():
        waiting = other.submit(_caught, lambda: bounds.elbo(pair_that(len), x_of()))
        threading.Event().wait(0.3)
    assert "goes on waiting" in waiting.result(timeout=60)


def _caught(call: Callable[[], object]) -> str:
    try:
        with pytest.warns(pvae.PvaeWarning) as caught:
            call()
    except pvae.PvaeWarning as error:
        return str(error)
    return str(caught[0].message)


def test_an_error_in_the_middle_leaves_modes_and_gradients_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the error is kept, and with it what was left in the middle."""
    torch.manual_seed(0)
    vae, x = recipes.vae(4, 2, hidden=(4,)), torch.rand(30, 4).round()
    monkeypatch.setattr(terms.Terms, "require_split", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        diagnostics.surgery(vae, x, progress=False)
    monkeypatch.undo()
    assert caught.value is not None
    assert torch.is_grad_enabled()
    assert all(module.training for module in vae.modules())
    with ThreadPoolExecutor(1) as other:
        assert other.submit(bounds.elbo, vae, x).result(timeout=60).kind == "lower"


CONSUMERS: dict[str, Callable[[pvae.VAE, Tensor], object]] = {
    "elbo": lambda vae, x: bounds.elbo(vae, x, 3),
    "evidence": lambda vae, x: bounds.evidence(vae, x, 20),
    "iwae_curve": lambda vae, x: bounds.iwae_curve(vae, x, 16),
    "log_weights": lambda vae, x: bounds.log_weights(vae, x, 20),
    "codes": lambda vae, x: latent.codes(vae, x),
    "to_arviz": lambda vae, x: export.to_arviz(vae, x, num_particles=3),
    "surgery": lambda vae, x: diagnostics.surgery(vae, x),
    "sbc": lambda vae, x: diagnostics.sbc(vae, x, num_simulations=20, num_particles=9),
    "predictive": lambda vae, x: diagnostics.predictive(vae, x, num_particles=3),
    "pit": lambda vae, x: diagnostics.pit(vae, x, num_particles=3),
    "importance": lambda vae, x: diagnostics.importance(vae, x, num_particles=25),
    "stream": lambda vae, x: _read(vae, x),
}


def _read(vae: pvae.VAE, x: Tensor) -> None:
    with terms.prepared(vae, x, {"max_rows": 8}) as evaluation:
        for _ in terms.stream(evaluation):
            torch.cat([x, x])


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", CONSUMERS)
def test_an_interrupt_of_what_reads_a_stream(
    name: str, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is kept, as a notebook keeps it; modes, gradients and generators are put back."""
    vae, x = recipes.vae(4, 2, hidden=(4,)), torch.rand(30, 4).round()
    before, kept, cat = torch.get_rng_state(), [], torch.cat
    for number in range(1, 5):
        left = iter(range(number, -1, -1))

        def interrupted(*args: object, **kwargs: object) -> Tensor:
            if not next(left, 0):  # noqa: B023
                raise KeyboardInterrupt
            return cat(*args, **kwargs)  # type: ignore[arg-type]

        with torch.set_grad_enabled(gradients):
            try:
                monkeypatch.setattr(torch, "cat", interrupted)
                CONSUMERS[name](vae, x)
            except KeyboardInterrupt as error:
                kept.append(error)
            finally:
                monkeypatch.setattr(torch, "cat", cat)
            assert torch.is_grad_enabled() == gradients
        assert all(module.training for module in vae.modules())
        assert torch.equal(torch.get_rng_state(), before)
        with ThreadPoolExecutor(1) as other:
            assert other.submit(vae.reconstruct, x).result(timeout=60).shape == x.shape
    assert kept
