"""A recorded step notices every change of what it has read of Python: the numbers are Pyro's.

What was recorded runs as it is, without torch's compiler, which would take seconds each time.
"""

from __future__ import annotations

import functools
import math
import random
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import pvae
from pvae.errors import PvaeWarning

pytestmark = pytest.mark.usefixtures("store")
Pair = tuple[Callable[..., None], Callable[..., None]]
Case = tuple[Callable[..., None], Callable[..., None], Callable[[float], object]]
N, START = 20, 0.25
WEIGHT = START
"""A KL weight that is a global."""


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many graphs were made."""
    made: list[int] = []

    def as_it_is(graph: Any, inputs: list[Tensor]) -> Any:
        made.append(len(inputs))
        return graph

    monkeypatch.setattr("pvae.engine.compiler.compile_graph", as_it_is)
    return made


def model(x: Tensor, weight: Any = 1.0) -> None:
    with pyro.plate("data", len(x)), poutine.scale(scale=weight):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor, weight: Any = 1.0) -> None:
    slope = pyro.param("slope", torch.tensor(0.2))
    with pyro.plate("data", len(x)), poutine.scale(scale=weight):
        pyro.sample("z", dist.Normal(slope * x, 0.5))


def weighted(weight: Callable[[], Any]) -> Pair:
    return (lambda x: model(x, weight())), (lambda x: guide(x, weight()))


def in_a_dictionary() -> Case:
    kept = {"weight": START}
    return *weighted(lambda: kept["weight"]), lambda w: kept.update(weight=w)


def in_a_list() -> Case:
    kept = [START]
    return *weighted(lambda: kept[0]), lambda w: kept.__setitem__(0, w)


def in_a_closure() -> Case:
    weight = START

    def change(w: float) -> None:
        nonlocal weight
        weight = w

    return *weighted(lambda: weight), change


def in_a_global() -> Case:
    def change(w: float) -> None:
        global WEIGHT
        WEIGHT = w

    change(START)
    return *weighted(lambda: WEIGHT), change


def in_a_handler() -> Case:
    kept = {"weight": START}

    def scaled(program: Callable[..., None]) -> Callable[..., None]:
        return lambda x: poutine.scale(program, kept["weight"])(x)

    return scaled(model), scaled(guide), lambda w: kept.update(weight=w)


def of_a_module() -> Case:
    """The class has it at first."""

    class Model(nn.Module):
        weight = START

        def forward(self, x: Tensor) -> None:
            model(x, self.weight)

    made = Model()
    return made, (lambda x: guide(x, made.weight)), lambda w: setattr(made, "weight", w)


def of_a_class() -> Case:
    class Settings:
        weight = START

    return *weighted(lambda: Settings.weight), lambda w: setattr(Settings, "weight", w)


def of_a_method() -> Case:
    class Settings:
        def weight(self) -> float:
            return START

    kept = Settings()
    return *weighted(lambda: kept.weight()), lambda w: setattr(Settings, "weight", lambda _: w)


def behind_a_property() -> Case:
    class Settings:
        def __init__(self) -> None:
            self._weight = START

        @property
        def weight(self) -> float:
            return self._weight

    kept = Settings()
    return *weighted(lambda: kept.weight), lambda w: setattr(kept, "_weight", w)


def in_a_slot() -> Case:
    class Settings:
        __slots__ = ("weight",)

    kept = Settings()
    kept.weight = START  # type: ignore[attr-defined]
    return *weighted(lambda: kept.weight), lambda w: setattr(kept, "weight", w)  # type: ignore[attr-defined]


def of_a_part_of_an_object() -> Case:
    @dataclass
    class Inner:
        weight: float = START

    @dataclass
    class Outer:
        inner: Inner = field(default_factory=Inner)

    kept = Outer()
    return *weighted(lambda: kept.inner.weight), lambda w: setattr(kept, "inner", Inner(w))


def of_a_users_module() -> Case:
    kept = types.ModuleType("settings_of_mine")
    kept.__file__ = "settings_of_mine.py"
    setattr(kept, "weight", START)  # noqa: B010
    return *weighted(lambda: kept.weight), lambda w: setattr(kept, "weight", w)


def of_a_schedule() -> Case:
    class Schedule:
        def __init__(self) -> None:
            self.step = 1.0

        def __call__(self) -> float:
            return self.step * START

    kept = Schedule()
    return *weighted(kept), lambda w: setattr(kept, "step", w / START)


def of_a_function() -> Case:
    def own(x: Tensor) -> None:
        model(x, own.weight)  # type: ignore[attr-defined]

    own.weight = START  # type: ignore[attr-defined]
    return own, (lambda x: guide(x, own.weight)), lambda w: setattr(own, "weight", w)  # type: ignore[attr-defined]


def by_default() -> Case:
    def own(x: Tensor, weight: float = START) -> None:
        model(x, weight)

    def change(w: float) -> None:
        own.__defaults__ = (w,)

    return own, guide, change


def in_a_partial() -> Case:
    both = functools.partial(model, weight=START), functools.partial(guide, weight=START)
    return *both, lambda w: [part.keywords.update(weight=w) for part in both]


def in_an_array() -> Case:
    kept = np.array([START])
    return *weighted(lambda: float(kept[0])), lambda w: kept.fill(w)


def in_another_tensor() -> Case:
    kept = {"weight": torch.tensor(START)}
    return *weighted(lambda: kept["weight"]), lambda w: kept.update(weight=torch.tensor(w))


def in_a_mode() -> Case:
    network = nn.Dropout(0.5)
    return *weighted(lambda: START if network.training else 1.0), lambda w: network.train(
        w == START
    )


def by_a_hook() -> Case:
    def change(w: float) -> None:
        if w != START:
            store = pyro.get_param_store().named_parameters()
            [p.register_hook(lambda g: 2 * g) for _, p in store]

    return model, guide, change


def in_the_store() -> Case:
    def change(w: float) -> None:
        if w != START:
            pyro.clear_param_store()

    return model, guide, change


def by_late_parameters() -> Case:
    kept = {"late": False}

    def own(x: Tensor) -> None:
        model(x - (pyro.param("late", torch.tensor(0.1)) if kept["late"] else 0.0))

    return own, guide, lambda w: kept.update(late=w != START)


CASES = (
    in_a_dictionary, in_a_list, in_a_closure, in_a_global, in_a_handler, of_a_module, of_a_class,
    of_a_method, behind_a_property, in_a_slot, of_a_part_of_an_object, of_a_users_module,
    of_a_schedule, of_a_function, by_default, in_a_partial, in_an_array, in_another_tensor,
    in_a_mode, by_a_hook, in_the_store, by_late_parameters,
)  # fmt: skip


def losses(
    make: Callable[[], Case], weights: Sequence[float], **options: Any
) -> tuple[list[float], Any]:
    """Of steps, before each of which something is set, unless it is so already."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    *programs, change = make()
    x, svi = torch.randn(N), cast("Any", pvae.SVI if options else infer.SVI)
    run, found = svi(*programs, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), **options), []
    before = START
    for weight in weights:
        if weight != before:
            change(weight)
        before = weight
        found.append(run.step(x))
    return found, run


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_a_change_is_noticed(make: Callable[[], Case], recorded: list[int]) -> None:
    """And the step is recorded anew."""
    weights = [START, START, 0.5, 0.5]
    expected, _ = losses(make, weights)
    found, _ = losses(make, weights, engine="compiled")
    assert found == pytest.approx(expected, rel=1e-7)
    assert len(recorded) == 2


@pytest.mark.parametrize("make", [in_a_dictionary, by_default, by_late_parameters])
def test_an_old_graph_runs_where_all_is_as_it_was(
    make: Callable[[], Case], recorded: list[int]
) -> None:
    weights = [START, 0.5, START, 0.5, START]
    expected, _ = losses(make, weights)
    assert losses(make, weights, engine="compiled")[0] == pytest.approx(expected, rel=1e-7)
    assert len(recorded) == 2


@pytest.mark.parametrize("make", [in_a_dictionary, of_a_schedule, in_another_tensor])
def test_what_changes_all_the_time_ends_recording(
    make: Callable[[], Case], recorded: list[int]
) -> None:
    weights = [0.25, 0.5, 0.75, 1.0, 1.25]
    expected, _ = losses(make, weights)
    with pytest.warns(PvaeWarning, match="what a step reads changes from step to step: .*fill_"):
        found, _ = losses(make, weights, engine="compiled")
    assert found == pytest.approx(expected, rel=1e-7)
    assert len(recorded) == 2


def test_a_number_in_a_tensor_is_an_input(recorded: list[int]) -> None:
    def make() -> Case:
        kept = torch.tensor(START)
        return *weighted(lambda: kept), lambda w: kept.fill_(w)

    weights = [0.25, 0.5, 0.75, 1.0]
    expected, _ = losses(make, weights)
    assert losses(make, weights, engine="compiled")[0] == pytest.approx(expected, rel=1e-7)
    assert len(recorded) == 1


def plainly(weight: float) -> Any:
    return weight


def with_arithmetic(weight: float) -> Any:
    return 0.5 * (1 - weight) ** 2 + weight


def with_mathematics(weight: float) -> Any:
    return math.exp(-weight)


def with_a_branch(weight: float) -> Any:
    return weight if weight > 0.6 else 0.6


def of_arguments(
    change: Callable[[float], Any], weights: Sequence[float], kind: type[infer.SVI], **options: Any
) -> list[float]:
    """Losses of steps whose weight of the KL is an argument, in a dictionary."""
    pyro.clear_param_store()
    torch.manual_seed(0)

    def of_pair(program: Callable[..., None]) -> Callable[..., None]:
        return lambda x, more: program(x, change(more["weight"]))

    adam = pyro.optim.Adam({"lr": 0.01})
    svi = kind(of_pair(model), of_pair(guide), adam, Trace_ELBO(), **options)
    x = torch.linspace(-2.0, 2.0, N)
    return [svi.step(x, more={"weight": weight}) for weight in weights]


@pytest.mark.parametrize("change", [plainly, with_arithmetic])
def test_a_float_among_the_arguments_becomes_an_input(
    change: Callable[[float], Any], recorded: list[int]
) -> None:
    """Its first value is recorded; when it changes, the graph takes it, and no other is made."""
    weights = [0.1 + k / 7 for k in range(7)]
    expected = of_arguments(change, weights, infer.SVI)
    found = of_arguments(change, weights, pvae.SVI, engine="compiled")
    assert found == pytest.approx(expected, rel=1e-7)
    assert len(recorded) == 2


@pytest.mark.parametrize("change", [with_mathematics, with_a_branch])
def test_a_float_that_python_computes_with_is_no_input(
    change: Callable[[float], Any], recorded: list[int]
) -> None:
    """The warning names it, and what to write."""
    weights = [0.25, 0.5, 0.75, 1.0, 1.25]
    expected = of_arguments(change, weights, infer.SVI)
    with pytest.warns(PvaeWarning, match=r"argument.1, from 0.5 to 0.75.*torch.tensor\(0.5\)"):
        found = of_arguments(change, weights, pvae.SVI, engine="compiled")
    assert found == pytest.approx(expected, rel=1e-7)
    assert len(recorded) == 2


def test_what_a_step_does_not_read_may_change(recorded: list[int]) -> None:
    """A loop's own counters and records, of the object that has the programs as methods."""

    class Trainer:
        def __init__(self) -> None:
            self.epoch, self.records, self.last = 0, [0.0], torch.zeros(())

        def model(self, x: Tensor) -> None:
            model(x)

        def note(self, weight: float) -> None:
            self.epoch += 1
            self.records.append(weight)
            self.last = torch.tensor(weight)

    def make() -> Case:
        trainer = Trainer()
        return trainer.model, guide, trainer.note

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = losses(make, [0.1, 0.2, 0.3, 0.4], engine="compiled")
    assert found == pytest.approx(losses(make, [0.1, 0.2, 0.3, 0.4])[0], rel=1e-7)
    assert len(recorded) == 1


class Counting:
    """A step that changes what the next one reads."""

    def __init__(self) -> None:
        self.steps, self.last, self.seen = 0, torch.zeros(()), [1.0]

    def by_number(self, x: Tensor) -> None:
        self.steps += 1
        model(x, 1 / self.steps)

    def by_tensor(self, x: Tensor) -> None:
        model(x, 1 / (1 + self.last))
        self.last = self.last + 1

    def by_list(self, x: Tensor) -> None:
        model(x, 1 / len(self.seen))
        self.seen.append(2.0)

    def by_python(self, x: Tensor) -> None:
        model(x, random.random() + 0.1)  # noqa: S311

    def by_numpy(self, x: Tensor) -> None:
        model(x, np.random.rand() + 0.1)  # noqa: NPY002


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("by_number", r"each step changes Counting\.steps at test_watched\.py:\d+"),
        ("by_tensor", r"each step changes Counting\.last at test_watched\.py:\d+"),
        ("by_list", r"each step changes seen\[1\]|each step changes Counting\.seen\[1\]"),
        ("by_python", "draws from Python's generator"),
        ("by_numpy", "draws from NumPy's generator"),
    ],
)
def test_a_step_that_goes_on_in_python_is_run_by_it(name: str, words: str) -> None:
    def make() -> Case:
        random.seed(0)
        pyro.set_rng_seed(0)
        return getattr(Counting(), name), guide, lambda _: None

    expected, _ = losses(make, [0.0] * 4)
    with pytest.warns(PvaeWarning, match=words):
        found, _ = losses(make, [0.0] * 4, engine="compiled")
    assert found == pytest.approx(expected, rel=1e-7)


def test_arguments_are_watched_too(recorded: list[int]) -> None:
    """Numbers, words, None and containers, by position and by name."""

    def own(x: Tensor, how: Any = None, weight: Any = 1.0) -> None:
        model(x, weight * (2.0 if how == "twice" else how[0] if how else 1.0))

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}), ((), {}), (("twice",), {}), (([0.5],), {"weight": 1.0}),
        (([0.5],), {"weight": 2.0}), ((None,), {"weight": torch.tensor(0.5)}),
    ]  # fmt: skip
    found = []
    kinds: list[tuple[Any, Any]] = [(infer.SVI, {}), (pvae.SVI, {"engine": "compiled"})]
    for svi, options in kinds:
        pyro.clear_param_store()
        torch.manual_seed(0)
        x, programs = torch.randn(N), (own, lambda x, how=None, weight=1.0: guide(x))
        run = svi(*programs, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), **options)
        found.append([run.step(x, *args, **kwargs) for args, kwargs in calls])
    assert found[1] == pytest.approx(found[0], rel=1e-7)
    assert len(recorded) == 5


def test_fit_watches_as_well(recorded: list[int]) -> None:
    """By its own engine: a weight that a callback of the data changes between epochs."""
    ends = []
    for engine in ("eager", "compiled"):
        pyro.clear_param_store()
        kept = {"weight": 1.0}

        class Rows(torch.utils.data.Dataset[Tensor]):
            def __len__(self) -> int:
                return N

            def __getitem__(self, i: int) -> Tensor:
                kept["weight"] = 0.5 if i == N - 1 else kept["weight"]  # noqa: B023
                return torch.tensor(i / N)

        pair = weighted(lambda: kept["weight"])  # noqa: B023
        loader = torch.utils.data.DataLoader(Rows(), batch_size=N // 2)
        pvae.fit(pair, loader, epochs=2, engine=engine, progress=False)
        ends.append(pyro.param("slope").item())
    assert ends[1] == pytest.approx(ends[0], rel=1e-7)


# Pairs that had no graph


def made_in_init(prior: Callable[[], Any]) -> Pair:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prior, self.decoder = prior(), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior)
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> None:
            loc, log_scale = self.encoder(x).chunk(2, -1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Model(), Guide()


def one_hot(family: Any) -> Pair:
    decoder, encoder = nn.Linear(3, 3), nn.Linear(3, 3)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(3)))
            pyro.sample("x", dist.Normal(decoder(y), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("y", family(logits=encoder(x)))

    return model, guide


class Bayesian(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.shift = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    def forward(self, x: Tensor) -> None:
        shift = self.shift
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shift, 1.0).to_event(1), obs=x)


def bayesian() -> Pair:
    made = Bayesian()
    return made, infer.autoguide.AutoNormal(made)


COMPILED: dict[str, Callable[[], Pair]] = {
    "a normal": lambda: made_in_init(lambda: dist.Normal(0.0, 1.0).expand([2]).to_event(1)),
    "several normals": lambda: made_in_init(
        lambda: dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    ),
    "a mixture": lambda: made_in_init(
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(3)), dist.Normal(torch.randn(3, 2), 1.0).to_event(1)
        )
    ),
    "a transformed one": lambda: made_in_init(
        lambda: dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), 1.0).to_event(1),
            [dist.transforms.AffineTransform(torch.ones(2), 2.0)],
        )
    ),
    "OneHotCategorical": lambda: one_hot(dist.OneHotCategorical),
    "straight-through": lambda: one_hot(dist.OneHotCategoricalStraightThrough),
    "PyroSample": bayesian,
}


@pytest.mark.parametrize("name", COMPILED)
def test_pairs_that_are_recorded(name: str, recorded: list[int]) -> None:
    x, found = torch.randn(N, 3), []
    for engine in ("eager", "compiled"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        programs = COMPILED[name]()
        optim = pyro.optim.Adam({"lr": 0.05})
        svi = pvae.SVI(*programs, optim, Trace_ELBO(), engine=engine, plate="data")
        found.append([svi.step(x) for _ in range(3)])
    assert found[1] == pytest.approx(found[0], rel=1e-7)
    assert len(recorded) == 1


def test_packed_sequences_run_as_python_and_the_line_is_named() -> None:
    rnn = nn.GRU(2, 2, batch_first=True)

    def guide(x: Tensor, lengths: Tensor) -> None:
        pyro.module("rnn", rnn)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, False)  # noqa: FBT003
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(rnn(packed)[1][0], 1.0).to_event(1))

    def model(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., None, :], 1.0).to_event(2), obs=x)

    x, lengths = torch.randn(6, 4, 2), torch.tensor([4, 3, 2, 1, 4, 2])
    svi = pvae.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), engine="compiled")
    with pytest.warns(PvaeWarning, match=r"value is read on the way.* at test_watched\.py:\d+"):
        assert svi.step(x, lengths) > 0


def test_a_branch_at_a_site_names_the_site() -> None:
    class Odd(dist.Normal):
        def rsample(self, sample_shape: Any = ()) -> Tensor:
            draws: Tensor = super().rsample(sample_shape)
            return draws if draws.sum() < 1e9 else -draws

    def own(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", Odd(slope * x, 0.5))

    svi = pvae.SVI(model, own, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), engine="compiled")
    with pytest.warns(PvaeWarning, match=r"at site 'z', test_watched\.py:\d+"):
        svi.step(torch.randn(N))
