"""The compiled step gives the eager one's numbers, or says why it can't be compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pvae import SVI, VAE, guides, likelihoods, priors, recipes, schedules
from pvae import objectives as o
from pvae.engine import Stepper, choose, make_optimizer
from pvae.engine.passes import PassResult
from pvae.errors import ArgumentError, CheckpointError, PvaeWarning
from pvae.pair import Pair
from tests import fits, pairs

pytestmark = [pytest.mark.usefixtures("store"), pytest.mark.slow]
D, Q, N = 6, 2, 12


def stepper(pair: pairs.Pair, objective: Any, engine: Any, **options: Any) -> Stepper:
    model, guide, batch = pair
    structure = Pair(model, guide).inspect(batch)
    parameters = list(structure.parameters.values())
    state = objective.make_state(structure, 100) if isinstance(objective, o.Objective) else None
    optimizer = make_optimizer(torch.optim.Adam, parameters, 1e-2)
    return Stepper(structure, objective, optimizer, state, options.get("clip_norm"), engine)


def run(made: Stepper, batches: list[tuple[Tensor, ...]]) -> list[dict[str, float]]:
    found = []
    torch.manual_seed(3)
    with pyro.validation_enabled(is_validate=False):
        for step, batch in enumerate(batches):
            made(batch, step)
            found.append(made.averages())
    return found


def vae(device: torch.device, **options: Any) -> pairs.Pair:
    pair = recipes.vae(D, Q, hidden=(8,), **options).to(device)
    return pair.model, pair.guide, (torch.rand(N, D, device=device).round(),)


def noisy(device: torch.device) -> pairs.Pair:
    """Dropout and batch norm on both sides."""

    def layers(start: int, end: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(start, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, end)
        )

    pair = VAE(
        priors.StandardNormal(Q),
        likelihoods.Bernoulli(lambda p: layers(Q, p * D), D),
        guides.MeanField(layers(D, 2 * Q), Q),
    ).to(device)
    return pair.model, pair.guide, (torch.rand(N, D, device=device).round(),)


def flow(device: torch.device) -> pairs.Pair:
    pair = VAE(
        zuko.flows.NSF(Q, transforms=1, hidden_features=[8], bins=3),
        likelihoods.Bernoulli(lambda p: nn.Linear(Q, p * D), D),
        zuko.flows.MAF(Q, D, transforms=1, hidden_features=[8]),
    ).to(device)
    return pair.model, pair.guide, (torch.rand(N, D, device=device).round(),)


def coupling(device: torch.device) -> pairs.Pair:
    """A flow that picks entries by a mask."""
    pair = VAE(
        priors.StandardNormal(Q),
        likelihoods.Bernoulli(lambda p: nn.Linear(Q, p * D), D),
        zuko.flows.NICE(Q, D, transforms=2, hidden_features=[8]),
    ).to(device)
    return pair.model, pair.guide, (torch.rand(N, D, device=device).round(),)


def contractive(device: torch.device) -> pairs.Pair:
    pair = recipes.contractive_ae(D, Q, hidden=(8,)).to(device)
    return pair.model, pair.guide, (torch.rand(N, D, device=device),)


def codebook(device: torch.device) -> pairs.Pair:
    pair = recipes.vq_vae(D, Q, hidden=(8,)).to(device)
    return pair.model, pair.guide, (torch.rand(N, D, device=device),)


CASES: dict[str, tuple[Callable[[torch.device], pairs.Pair], o.Objective]] = {
    "warm-up": (vae, o.ELBO(beta=schedules.Warmup(4))),
    "dropout and batch norm": (noisy, o.ELBO()),
    "flows, K particles": (flow, o.IWAE(3)),
    "masks in a flow": (coupling, o.ELBO()),
    "DReG": (vae, o.DReG(3)),
    "a multiplier": (vae, o.GECO(tolerance=5.0, speed=0.1)),
    "a classifier": (vae, o.FactorVAE(hidden=(4,), lr=1e-2)),
    "two sites": (pairs.two_sites, o.STL(2)),
    "score functions": (pairs.discrete, o.VIMCO(3)),
    "the store": (pairs.functions, o.ELBO()),
    "pyro.module": (pairs.pyro_modules, o.ELBO()),
    "enumeration": (pairs.enumerated, o.ELBO()),
    "subsampling": (pairs.subsample_drawn, o.ELBO()),
    "masks": (pairs.masked, o.ELBO()),
    "an autoguide": (pairs.autoguide, o.ELBO()),
    "a global latent": (pairs.global_latent, o.ELBO(2)),
    "contractive": (contractive, o.ELBO()),
    "a codebook": (codebook, o.ELBO()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_the_eager_ones(case: str, device: torch.device) -> None:
    make, objective = CASES[case]
    found, ends = {}, {}
    for engine in ("eager", "compiled"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        pair = make(device)
        made = stepper(pair, objective, engine, clip_norm=2.0)
        batches = [tuple(x.roll(i, 0) for x in pair[2]) for i in range(6)]
        found[engine] = run(made, batches)
        assert made.engine == engine
        ends[engine] = [x.detach().clone() for x in (*made.parameters, *made.passes.changing())]
    for eager, compiled in zip(found["eager"], found["compiled"], strict=True):
        assert compiled == pytest.approx(eager, rel=1e-6, nan_ok=True)
    for a, b in zip(ends["eager"], ends["compiled"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_batch_without_tensors(device: torch.device) -> None:
    """Where the data are in the programs, all tensors are found outside of the graph."""
    x = pairs.data(12, device)

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).expand([pairs.D]).to_event(1), obs=x)

    def guide() -> None:
        loc = pyro.param("loc", x.new_zeros(()))
        pyro.sample("mean", dist.Normal(loc, 0.5))

    losses = []
    for engine in ("eager", "compiled"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), engine=engine)
        losses.append([svi.step() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


# What can't be compiled


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 1e9) else 2 * x


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x / self.calls


class _Rebinding(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return x


class _OwnGenerator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (_OwnGenerator, "draws by a generator of its own"),
        (_Branching, r"value is read on the way, .* at test_compiled\.py:\d+"),
        (_Counting, r"each step changes _Counting\.calls at test_compiled\.py:\d+"),
        (_Rebinding, "buffer 'seen' is a new tensor"),
    ],
)
def test_what_has_no_graph_runs_as_python(
    layer: type[nn.Module], words: str, device: torch.device
) -> None:
    def build() -> pairs.Pair:
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(D, 2 * Q), layer())
        decoder = likelihoods.Bernoulli(lambda p: nn.Linear(Q, p * D), D)
        pair = VAE(priors.StandardNormal(Q), decoder, guides.MeanField(encoder, Q)).to(device)
        return pair.model, pair.guide, (torch.rand(N, D, device=device).round(),)

    eager, compiled = stepper(build(), o.ELBO(), "eager"), stepper(build(), o.ELBO(), "compiled")
    batches = [build()[2]] * 3
    expected = run(eager, batches)
    with pytest.warns(PvaeWarning, match=f"run as Python, not compiled: .*{words}"):
        found = run(compiled, batches)
    assert compiled.engine == "eager"
    assert found == expected


def test_pyros_objectives_run_as_python(device: torch.device) -> None:
    made = stepper(vae(device), TraceMeanField_ELBO(), "compiled")
    with pytest.warns(PvaeWarning, match="TraceMeanField_ELBO is one of Pyro's"):
        run(made, [vae(device)[2]])


def test_a_compiler_that_fails(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is none."""

    def missing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no C++ compiler\nmore of it")

    monkeypatch.setattr("pvae.engine.compiler.compile_graph", missing)
    made = stepper(vae(device), o.ELBO(), "compiled")
    with pytest.warns(PvaeWarning, match=r"fails with RuntimeError: no C\+\+ compiler\."):
        run(made, [vae(device)[2]])


def test_a_graph_with_other_numbers_is_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(function: Any, example: Any) -> Any:
        def scaled(*batch: Tensor) -> PassResult:
            result: PassResult = function(*batch)
            return result._replace(gradients={n: g * 1.01 for n, g in result.gradients.items()})

        return scaled

    monkeypatch.setattr("pvae.engine.graphs.compile_function", wrong)
    made = stepper(vae(device), o.ELBO(), "compiled")
    with pytest.warns(PvaeWarning, match=r"differ from the eager ones, by 0\.01"):
        run(made, [vae(device)[2]])


def test_each_shape_has_its_graph_up_to_a_few(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[Any] = []

    def note(function: Any, example: Any) -> Any:
        shapes.append(example[0].shape)
        return function

    monkeypatch.setattr("pvae.engine.graphs.compile_function", note)
    made = stepper(vae(device), o.ELBO(), "compiled")
    x = vae(device)[2][0]
    run(made, [(x[:n],) for n in (12, 12, 5, 12, 5, 4, 3, 2, 2)])
    assert [s[0] for s in shapes] == [12, 5, 4, 3]
    assert made.engine == "compiled"


def test_a_failed_step_changes_nothing(device: torch.device) -> None:
    model, guide, (x,) = noisy(device)
    made = stepper((model, guide, (x,)), o.ELBO(), "compiled")
    bad = x.clone()
    bad[3, 2] = float("nan")
    run(made, [(x,)])
    before = [v.detach().clone() for v in (*made.parameters, *made.passes.buffers, made.sums)]
    assert made.look() is None
    run(made, [(bad,), (x,)])
    for now, then in zip((*made.parameters, *made.passes.buffers, made.sums), before, strict=True):
        assert torch.equal(now, then)
    failure = made.look()
    assert failure is not None
    assert (failure.step, set(failure.sites)) == (0, {"z", "x"})


def test_an_unknown_engine_is_refused(device: torch.device) -> None:
    with pytest.raises(ArgumentError, match="one of eager, compiled"):
        stepper(vae(device), o.ELBO(), "fast")


# In fit


def test_a_compiled_training_resumes_bit_for_bit(device: torch.device, tmp_path: Path) -> None:
    """With a last batch of another size; what "auto" finds in the folder, it obeys."""
    options: dict[str, Any] = {"device": device, "objective": o.ELBO(beta=schedules.Warmup(5))}
    whole, halves = fits.vae(), fits.vae()
    fits.fit(whole, fits.binary(), engine="compiled", epochs=4, **options)
    options |= {"folder": tmp_path}
    fits.fit(halves, fits.binary(), engine="compiled", epochs=2, **options)
    again = fits.fit(halves, fits.binary(), epochs=4, resume=True, **options)
    assert again.training.stepper.engine == "compiled"
    assert fits.same(fits.state(whole), fits.state(halves))
    with pytest.raises(CheckpointError, match="engine: saved compiled, now eager"):
        fits.fit(halves, fits.binary(), engine="eager", resume=True, **options)


def test_draws_differ_by_step_and_by_seed_alone(device: torch.device) -> None:
    ends = []
    for seed in (1, 1, 2):
        pair = fits.vae()
        fits.fit(
            pair, fits.binary(), engine="compiled", seed=seed, epochs=2,
            batch_size=40, device=device,
        )  # fmt: skip
        ends.append(fits.state(pair))
    assert fits.same(ends[0], ends[1])
    assert not fits.same(ends[0], ends[2])
    made = stepper(vae(device), o.ELBO(), "compiled")
    first, second = run(made, [vae(device)[2]] * 2)
    assert first["rate"] != second["rate"]


def test_auto_compiles_long_trainings_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stepper(vae(device), o.ELBO(), "eager")
    before = [x.clone() for x in (*made.parameters, *made.passes.changing())]
    generator = torch.get_rng_state()
    batch = vae(device)[2]
    monkeypatch.setattr("pvae.engine.stepper.time_pass", lambda *_: 0.01)
    assert choose(made, lambda: batch, 10_000) == "eager"
    assert choose(made, lambda: batch, 20_000) == "compiled"
    monkeypatch.undo()
    torch.set_rng_state(generator)
    assert choose(made, lambda: batch, 10**9) == "compiled"
    assert choose(made, lambda: batch, 1000) == "eager"
    for now, then in zip((*made.parameters, *made.passes.changing()), before, strict=True):
        assert torch.equal(now, then)
    assert torch.equal(torch.get_rng_state(), generator)
    of_pyro = stepper(vae(device), TraceMeanField_ELBO(), "eager")
    assert choose(of_pyro, lambda: batch, 10**9) == "eager"
    if device.type == "cpu":
        monkeypatch.setattr("shutil.which", lambda _: None)
        assert choose(made, lambda: batch, 10**9) == "eager"
