"""Several kinds of data in one training: semi-supervised pairs against loops by hand in Pyro."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import bounds, data, randomness
from pvae.data import as_source
from pvae.errors import ArgumentError, DataError, PairError, TrainingError
from tests.fits import same, state

pytestmark = pytest.mark.usefixtures("store")

fit = functools.partial(pvae.fit, progress=False, engine="eager", batch_size=10)
D, CLASSES = 6, 3


class M2(nn.Module):
    """p(x | y, z) with labels that are seen or not (Kingma et al., 2014, the model M2)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classify = nn.Linear(D, CLASSES)
        self.encode = nn.Linear(D + CLASSES, 4)
        self.decode = nn.Linear(2 + CLASSES, D)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(CLASSES)), obs=y)
            logits = self.decode(_joined(z, F.one_hot(y, CLASSES)))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    @config_enumerate
    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.Categorical(logits=self.classify(x)))
            loc, raw = self.encode(_joined(x, F.one_hot(y, CLASSES))).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class Regression(nn.Module):
    """The same with a number for a label, whose guide can be reparametrised."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.predict = nn.Linear(D, 1)
        self.decode = nn.Linear(1, D)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("regression", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(0.0, 1.0).expand([len(x)]), obs=y)
            pyro.sample("x", dist.Normal(self.decode(y[:, None]), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("regression", self)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.Normal(self.predict(x)[:, 0], 0.5))
            pyro.sample("w", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})


def _joined(x: Tensor, y: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    return torch.cat([part.expand(*shape, part.shape[-1]).to(x.dtype) for part in (x, y)], -1)


def kinds(*, number: bool = False) -> dict[str, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(60, D, generator=generator).round()
    y = torch.randn(60, generator=generator) if number else torch.arange(60) % CLASSES
    return {"labelled": (x[:20], y[:20]), "unlabelled": (x[20:],)}


PAIRS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "M2": (M2, lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)),
    "regression": (Regression, Trace_ELBO),
}


def by_hand(
    pair: Any, arrays: dict[str, tuple[Tensor, ...]], loss: Any, order: str, epochs: int
) -> dict[str, list[float]]:
    """SVI of Pyro, step by step: of the sum over a batch divided by its length."""
    adam = pyro.optim.Adam({"lr": 1e-2})
    losses: dict[str, list[float]] = {name: [] for name in arrays}
    names = {name[0]: name for name in arrays}
    passes: dict[str, Iterator[Any]] = {name: iter(()) for name in arrays}
    counts = dict.fromkeys(arrays, 0)
    with randomness.forked(seed=0):
        for initial in order * epochs:
            name = names[initial]
            batch = next(passes[name], None)
            if batch is None:
                seed = 0 if name == "labelled" else randomness.derive_seed(0, 1)
                source = as_source(arrays[name], dtype=torch.float64)
                passes[name] = data.Batches(source, 10, seed).epoch(counts[name])
                counts[name] += 1
                batch = next(passes[name])
            scaled = [poutine.scale(p, 1 / len(batch[0])) for p in (pair.model, pair.guide)]
            losses[name].append(SVI(*scaled, adam, loss).step(*batch))
    return losses


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    ("mix", "order"),
    [(None, "uluulu"), ({"labelled": 1, "unlabelled": 1}, "lulululu")],
    ids=["one pass each", "in turn"],
)
def test_two_kinds_of_data_train_as_pyros_loop_does(kind: str, mix: Any, order: str) -> None:
    """20 labelled and 40 unlabelled rows in batches of 10; parameters and both losses to 1e-7."""
    make, loss = PAIRS[kind]
    ours, theirs, arrays = make(), make(), kinds(number=kind != "M2")
    run = fit((ours.model, ours.guide), arrays, loss(), mix=mix, epochs=3, lr=1e-2)
    pyro.clear_param_store()
    losses = by_hand(theirs, arrays, loss(), order, epochs=3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    for name, values in losses.items():
        each = torch.tensor(values).reshape(3, -1).mean(1).tolist()
        assert run.history[f"loss_{name}"] == pytest.approx(each, abs=1e-7)
    assert run.progress.global_step == 3 * len(order)


def test_losses_and_bounds_of_each_kind_are_logged() -> None:
    pair = Regression()
    run = fit((pair.model, pair.guide), kinds(number=True), epochs=2)
    record = run.history[-1]
    for name in ("labelled", "unlabelled"):
        assert record[f"elbo_{name}"] == pytest.approx(-record[f"loss_{name}"])
    mean = (20 * record["loss_labelled"] + 40 * record["loss_unlabelled"]) / 60
    assert record["loss"] == pytest.approx(mean)
    assert "to 60 data" in repr(run)


def test_a_training_of_two_kinds_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Stopped within an epoch, and within a pass over each kind."""
    whole, parts, arrays = Regression(), Regression(), kinds(number=True)
    mix = {"labelled": 2, "unlabelled": 3}
    fit((whole.model, whole.guide), arrays, mix=mix, epochs=4)
    pyro.clear_param_store()
    options: Any = {"mix": mix, "folder": tmp_path, "resume": True}
    fit((parts.model, parts.guide), arrays, epochs=1, **options)
    pyro.clear_param_store()
    again = Regression()
    run = fit((again.model, again.guide), arrays, epochs=4, **options)
    assert same(state(again), state(whole))
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss_labelled"] for line in lines] == run.history["loss_labelled"]
    with pytest.raises(pvae.errors.CheckpointError, match="mix"):
        fit((again.model, again.guide), arrays, epochs=5, folder=tmp_path, resume=True)


def test_a_step_that_fails_stops_the_steps_of_all_kinds() -> None:
    pair = Regression()

    class Odd(Regression):
        def model(self, x: Tensor, y: Tensor | None = None) -> None:
            super().model(x, y)
            if y is not None and self.training:
                pyro.factor("odd", self.decode.bias.sum() * float("nan"))

    pair.__class__ = Odd
    before = state(pair)
    with (
        pytest.raises(TrainingError, match="epoch 0, batch 1"),
        pyro.validation_enabled(is_validate=False),
    ):
        fit((pair.model, pair.guide), kinds(number=True), epochs=3)
    after, first = state(pair), Regression()
    assert not same(before, after)  # the first step, of unlabelled data, stands
    pyro.clear_param_store()
    x = kinds(number=True)["unlabelled"]
    seed = randomness.derive_seed(0, 1)
    [batch] = [next(data.Batches(as_source(x, dtype=torch.float64), 10, seed).epoch(0))]
    fit((first.model, first.guide), batch, epochs=1, batch_size=None)
    assert same(state(first), after)


def test_loaders_of_two_kinds_and_validation() -> None:
    pair, arrays = M2(), kinds()
    loaders = {
        name: DataLoader(TensorDataset(*own), batch_size=10, shuffle=True)
        for name, own in arrays.items()
    }
    loss = PAIRS["M2"][1]()
    run = fit(
        (pair.model, pair.guide),
        loaders,
        loss,
        batch_size="auto",
        mix={"labelled": 1, "unlabelled": 2},
        valid=arrays["labelled"],
        epochs=2,
    )
    assert run.progress.global_step == 12
    found = bounds.elbo((pair.model, pair.guide), arrays["labelled"], seed=0)
    assert run.history["valid_elbo"][-1] == pytest.approx(found.mean)


def test_what_is_refused_of_several_kinds() -> None:
    pair, arrays = Regression(), kinds(number=True)
    programs = pair.model, pair.guide
    with pytest.raises(ArgumentError, match=r"mix: .* 'labelled' and 'unlabelled'"):
        fit(programs, arrays, mix={"labelled": 1})
    with pytest.raises(ArgumentError, match="an integer of at least 1"):
        fit(programs, arrays, mix={"labelled": 1, "unlabelled": 0})
    with pytest.raises(ArgumentError, match="several kinds of data"):
        fit(programs, arrays["labelled"], mix={"labelled": 1})
    with pytest.raises(DataError, match="at least one kind"):
        fit(programs, {})
    with pytest.raises(DataError, match="one data set; got a dictionary") as error:
        bounds.elbo(programs, arrays)
    assert "data['labelled']" in str(error.value)
    x, y = (part.clone() for part in arrays["labelled"])
    x[3] = float("nan")
    with pytest.raises(DataError, match=r"data\[0\], row 3: expected finite"):
        fit(programs, {**arrays, "labelled": (x, y)}, epochs=1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("g", dist.Normal(0.0, 1.0))
        pair.model(x, y)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("g", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        pair.guide(x, y)

    with pytest.raises(PairError, match="count once for each kind"):
        fit((model, guide), arrays, batch_size=None)


@pytest.mark.parametrize("mix", [None, {"labelled": 2, "unlabelled": 3}], ids=["all", "mix"])
@pytest.mark.parametrize("at", [4, 16])
def test_a_training_of_two_kinds_resumes_within_an_epoch(
    mix: dict[str, int] | None, at: int, tmp_path: Path
) -> None:
    """From a checkpoint of every third step, after a step that failed: bit for bit the same end."""

    cause = tmp_path / "cause"
    cause.touch()

    class Fails(Regression):
        count = 0

        def model(self, x: Tensor, y: Tensor | None = None) -> None:
            super().model(x, y)
            type(self).count += self.training
            if self.training and type(self).count > at and cause.exists():
                pyro.factor("odd", self.decode.bias.sum() * float("nan"))

    whole, failing, again = Regression(), Regression(), Regression()
    failing.__class__ = again.__class__ = Fails
    options: dict[str, Any] = {"mix": mix, "epochs": 4, "save_steps": 3}
    expected = fit((whole.model, whole.guide), kinds(number=True), **options)
    for pair, resume in ((failing, False), (again, True)):
        pyro.clear_param_store()
        with contextlib.ExitStack() as stack:
            if not resume:
                stack.enter_context(pytest.raises(TrainingError))
                stack.enter_context(pyro.validation_enabled(is_validate=False))
            run = fit((pair.model, pair.guide), kinds(number=True), folder=tmp_path,
                      resume=resume, **options)  # fmt: skip
        if not resume:
            saved = pvae.checkpoint.load(tmp_path / "checkpoint.safetensors")
            assert saved.meta["progress"]["step"] > 0  # within an epoch
            cause.unlink()
    assert same(state(again), state(whole))
    assert run.history["loss_labelled"] == expected.history["loss_labelled"]


LEARNING: dict[str, Any] = {
    "GECO": lambda: pvae.objectives.GECO(tolerance=1.0),
    "moving_average": lambda: pvae.objectives.ELBO(baseline="moving_average"),
}


@pytest.mark.parametrize("name", LEARNING)
def test_objectives_that_learn_are_refused_several_kinds_by_name(name: str) -> None:
    pair = Regression()
    with pytest.raises(ArgumentError, match=f"learns nothing by itself.*{name}"):
        fit((pair.model, pair.guide), kinds(number=True), LEARNING[name](), epochs=1)
