"""Wrong inputs of every public function, made from its signature: each is refused in four parts.

A parameter's annotation says its kind, and each kind has its wrong values. What is accepted all the
same stands in `ACCEPTED`, with the reason; what isn't tried stands in `LEFT_OUT`. A new public
function is tried by itself, or the test fails and says what it needs.
"""

from __future__ import annotations

import enum
import fnmatch
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvae
from pvae import VAE, bounds, data, networks, recipes
from pvae.errors import OutOfMemoryError, PvaeError
from pvae.networks import MLP

nan, inf = float("nan"), float("inf")
D, Q, N = 6, 2, 24


@functools.cache
def x() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(N, D, generator=generator, dtype=torch.float64).round()


@functools.cache
def z() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, Q, generator=generator, dtype=torch.float64)


@functools.cache
def vae() -> VAE:
    with pvae.randomness.forked(0):
        return recipes.vae(D, Q, hidden=(4,)).double()


@functools.cache
def run() -> pvae.Fit:
    return pvae.fit(recipes.vae(D, Q, hidden=(4,)).double(), x(), epochs=13, progress=False)


@functools.cache
def ranks() -> pvae.diagnostics.SBC:
    return pvae.diagnostics.sbc(vae(), x(), num_simulations=100, progress=False)


@functools.cache
def aggregated() -> pvae.diagnostics.AggregatedPosterior:
    return pvae.diagnostics.aggregated_posterior(vae(), x(), progress=False)


# Wrong values, by kind

INT = [0, -1, 2.5, "3", None, True, nan, inf, 10**30, [1], {}, 1j, object()]
NUMBER = ["1", None, True, nan, inf, -inf, 10**400, [1.0], {}, 1j, object()]
BOOL = [2, "yes", None, [], 0.0]
TEXT = ["nope", 3, None, [], b"x", object()]
SHAPE = [0, -1, 2.5, "3", None, (0,), (-1, 2), (2.5,), ("a",), 10**13, (10**7, 10**7), [[2]], nan]
PATH: list[Any] = [None, 3, "", [], "a\0b", b"x", 2.5]
FUNCTION = [3, "nope", [], {}, 2.5]
THING = [3, "nope", object(), 2.5]


def tensors() -> list[Any]:
    array = torch.full((4, 2), 1.0)
    return [
        None, "x", 3, [], {}, object(), np.array([["a"]]), [[1.0], [1.0, 2.0]],
        array.to(torch.complex64), array.to_sparse(), array.to("meta"),
    ]  # fmt: skip


def finite_tensors() -> list[Any]:
    array = torch.full((4, 2), 1.0)
    empty = [array[:0], array[0, 0], array[:0, :0]]
    return [*tensors(), *empty, array * nan, array / 0.0]


def data_of_pairs() -> list[Any]:
    return [
        None, "x", 3, [], {}, object(), iter([1]), np.array([["a"] * D] * N), [[1.0], [1.0, 2.0]],
        x()[:0], x()[:, :5], x() * nan, x() / 0.0, x().to(torch.complex64), x().to_sparse(),
        x().to("meta"), x()[0, 0], x() * 7, np.array([None] * N),
        np.ma.masked_equal(x().numpy(), 1),
    ]  # fmt: skip


def pairs() -> list[Any]:
    model, guide = vae().model, vae().guide
    return [
        None, "x", 3, [], {}, object(), (1, 2), (model,), (model, guide, 1), x(), VAE,
        recipes.vae, model,
    ]  # fmt: skip


KINDS: list[tuple[str, Callable[[], list[Any]]]] = [  # beginnings of annotations, first match
    ("Finite", finite_tensors),
    ("Tensor", tensors),
    ("ArrayLike", finite_tensors),
    ("Array", finite_tensors),
    ("str | Path", lambda: PATH),
    ("Path", lambda: PATH),
    ("int", lambda: INT),
    ("Annotated[int", lambda: INT),
    ("float", lambda: NUMBER),
    ("Extended", lambda: [value for value in NUMBER if not isinstance(value, float)]),
    ("Weight", lambda: NUMBER),
    ("AtLeastZero", lambda: NUMBER),
    ("Positive", lambda: NUMBER),
    ("Annotated[float", lambda: NUMBER),
    ("bool", lambda: BOOL),
    ("Shape", lambda: SHAPE),
    ("Sequence[int]", lambda: SHAPE),
    ("tuple[int, ...", lambda: SHAPE),
    ("Callable", lambda: FUNCTION),
    ("str", lambda: TEXT),
    ("Literal", lambda: TEXT),
    ("Binarize", lambda: TEXT),
    ("Asked", lambda: TEXT),
    ("Method", lambda: TEXT),
    ("", lambda: THING),
]


def wrong_values(name: str, parameter: inspect.Parameter) -> list[Any]:
    if parameter.name == "pair":
        return pairs()
    if parameter.name == "data" and not name.startswith("data.load"):
        return data_of_pairs()
    annotation = str(parameter.annotation)
    values = next(values for start, values in KINDS if annotation.startswith(start))()
    is_default = [type(v) is type(parameter.default) and v is parameter.default for v in values]
    return [v for v, same in zip(values, is_default, strict=True) if not same]


# What a function needs beside the wrong value


def network() -> MLP:
    return MLP(D, 2 * Q, (4,))


VALID: dict[str, Callable[[], Any]] = {
    "pair": vae,
    "data": x,
    "codes": z,
    "factors": lambda: torch.arange(N * 2).reshape(N, 2) % 3,
    "x": x,
    "y": x,
    "z": z,
    "a": lambda: z()[0],
    "b": lambda: z()[1],
    "c": lambda: z()[2],
    "latent_dim": lambda: Q,
    "event_shape": lambda: D,
    "in_shape": lambda: D,
    "out_shape": lambda: D,
    "network": network,
    "steps": lambda: 3,
    "gallery": z,
    "k": lambda: 2,
    "has_attribute": lambda: torch.arange(N) % 2 == 0,
    "labels": lambda: torch.arange(N) % 2,
    "gallery_labels": lambda: torch.arange(N) % 2,
    "indices": lambda: torch.zeros(N, 2, dtype=torch.int64),
    "weight": lambda: 1.0,
    "rate": lambda: 0.1,
    "sigma": lambda: 0.1,
    "factor": lambda: 2,
    "size": lambda: 2,
    "nats": lambda: -3.0,
    "num_dims": lambda: 2,
    "total_count": lambda: 3,
    "levels": lambda: 3,
    "tolerance": lambda: 1.0,
    "capacity": lambda: 1.0,
    "log_weights": lambda: torch.randn(200, 3, generator=torch.Generator().manual_seed(0)),
    "q": lambda: dist.Normal(0.0, 1.0),
    "p": lambda: dist.Normal(0.0, 1.0),
    "q_a": lambda: dist.Normal(0.0, 1.0),
    "q_b": lambda: dist.Normal(0.0, 1.0),
    "dims": lambda: [0],
    "values": lambda: [0.0, 1.0],
    "dim": lambda: 2,
    "num_samples": lambda: 3,
    "prior": lambda: vae().model.prior,
    "likelihood": lambda: vae().model.likelihood,
    "guide": lambda: vae().guide.posterior,
    "posterior": lambda: vae().guide.posterior,
    "model": lambda: vae().model,
    "density": lambda: dist.Normal(torch.zeros(Q, dtype=torch.float64), 1.0).to_event(1),
    "arrays": x,
    "bias": lambda: z()[0],
    "source": lambda: data.as_source(x()),
    "num_rows": lambda: 2,
    "objectives": lambda: {"elbo": pvae.objectives.ELBO()},
    "reconstructed": x,
    "rows": lambda: [x()],
    "path": lambda: "nowhere.npy",
    "batch": lambda: (x(),),
    "estimates": lambda: {"a": bounds.elbo(vae(), x()), "b": bounds.elbo(vae(), x(), 2)},
    "data.load.data": lambda: "digits",
    "function": lambda: torch.sin,
    "decode": lambda: lambda z: torch.zeros(len(z), 16),
    "optim": lambda: torch.optim.Adam,
    "loss": pvae.objectives.ELBO,
    "svi.SVI.guide": lambda: vae().guide,
    "pair.Pair.guide": lambda: vae().guide,
    "history": lambda: run().history,
    "objective": lambda: "elbo",
    "plots.learning_curve.result": lambda: pvae.diagnostics.learning_curve(run().history),
    "plots.calibration.result": ranks,
    "plots.aggregated_posterior.result": aggregated,
    "schedules.Constant.number": lambda: 1.0,
    "networks.ConvEncoder.in_shape": lambda: (1, 6, 6),
    "networks.ConvDecoder.out_shape": lambda: (1, 6, 6),
    "networks.*.in_features": lambda: Q,
    "networks.*.out_features": lambda: Q,
    "latent.traverse.z": lambda: z()[0],
    "networks.activation_named.name": lambda: "ReLU",
    "mmd.kernel_named.name": lambda: "imq",
    "data.LinearGaussian.weight": lambda: z(),
    "data.LinearGaussian.sigma": lambda: 0.5,
}  # fmt: skip

LEFT_OUT = {
    "svi.Loss": "made by steps",
    "errors.*": "what makes errors, and is tried by each of them",
    "terms.*": "for those who write tools, on what `prepared` has checked",
    "pair.[!P]*": "the same: what a look at a pair shows",
    "engine.*": "the same: how a step runs, of what `fit` has checked",
    "options.*": "tried by each tool that takes options",
    "distributed.*": "is what torchrun has set",
    "randomness.*": "states of generators, as they were got",
    "sites.*": "called within programs, at each step",
    "checkpoint.*": "tests/test_resume.py damages checkpoints",
    "testing.*": "refuses whatever breaks a contract, which it is for",
    "estimate.*": "made by tools",
    "*.named": "names of parts, tried by recipes",
    "bounds.Comparison": "made by compare",
    "bounds.Curve": "made by iwae_curve",
    "bounds.Sandwich": "made by bdmc",
    "bounds.fit_locally": "for those who write tools",
    "diagnostics.[A-Z]*": "results, made by diagnostics",
    "diagnostics.table": "takes nothing",
    "data.Splits": "made by load",
    "data.Source": "abstract",
    "data.LoaderSource": "made by as_source",
    "data.Mixed": "made by fit",
    "data.Batches": "made by fit",
    "data.RowCheck": "made by check_rows",
    "data.Support": "made by check_data",
    "data.in_memory": "on what as_source has checked",
    "data.joined": "on what as_source has checked",
    "data.num_rows_of": "on what as_source has checked",
    "data.download": "needs an extra, and tests/test_data.py has its mistakes",
    "conditional.*": "abstract, or tried by the parts; as_conditional takes whatever makes draws",
    "objectives.Objective*": "abstract, or a state",
    "objectives.table": "takes nothing",
    "corruptions.Corruption": "abstract",
    "penalties.Penalty": "abstract",
    "penalties.Custom": "runs a user's function",
    "penalties.SideOutputs": "made in a training step",
    "penalties.[a-z]*": "called in a training step",
    "likelihoods.Likelihood": "abstract",
    "schedules.Timed": "abstract",
    "schedules.Schedule": "abstract",
    "schedules.as_schedule": "tests/test_schedules.py has its mistakes",
    "guides.CodeDelta": "made by NearestCode",
    "mmd.TwoSampleTest": "made by two_sample_test",
    "networks.check_weights": "called by networks",
    "plots.Picture": "made by plots",
    "recipes.PairOptions": "a type",
    "vae.[MG]*": "made by VAE",
}

ACCEPTED = {
    "objectives.*.plate nope": "which is the pair's, as the training says",
    "objectives.*.densities nope": "which are the pair's, as the training says",
    "objectives.*.densities []": "none is a number of them",
    "objectives.*.site nope": "which is the pair's, as the training says",
    "*.title nope": "any text is a title",
    "diagnostics.diagnose.num_data None": "all of the data",
    "diagnostics.diagnose.site nope": "checks that have no such site are left out, and said",
    "data.as_source.data *": "values and widths are looked at by the pair that they are for",
    "latent.sample.data tensor*": "of the data only the number of rows matters",
    "bounds.compare.bin_width {}": "none is a density",
    "pair.Pair.plate nope": "looked for when the programs run",
    "pair.Pair.densities *": "looked for when the programs run",
    "svi.SVI.plate nope": "looked for when the programs run",
    "data.check_rows.where nope": "any text says where",
    "mmd.kernel_named.dim *": "a number of dimensions that kernels count",
    "*.seed 0": "a seed",
    "networks.activation_named.where nope": "any text says where",
    "latent.traverse.dims (0,)": "the first dimension",
    "latent.with_prior.site nope": "looked for when the program runs",
    "pvae.fit.batch_size 3": "rows of a batch",
    "pvae.fit.epochs 0": "nothing but the checks",
    "data.Data.arrays *": "looked at when a source is made of it, as by every tool",
}


def matches(table: dict[str, str], key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern.replace("[]", "[[]]")) for pattern in table)


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    seen = set[int]()
    for room in dir(pvae):
        module = getattr(pvae, room)
        if not isinstance(module, types.ModuleType):
            continue
        for name in vars(module).get("__all__", ()):
            thing = getattr(module, name)
            is_ours = getattr(thing, "__module__", "").startswith("pvae")
            if callable(thing) and is_ours and id(thing) not in seen:
                seen.add(id(thing))
                yield f"{room}.{name}", thing
    for method in (VAE.sample, VAE.encode, VAE.decode, VAE.reconstruct):
        yield f"VAE.{method.__name__}", functools.partial(method, vae())
    yield "pvae.fit", pvae.fit
    yield "pvae.kl", pvae.kl


FUNCTIONS = {name: f for name, f in public() if not matches(LEFT_OUT, name)}


def valid(name: str, parameter: str) -> Any:
    keys = [k for k in VALID if fnmatch.fnmatchcase(f"{name}.{parameter}", k)] or [parameter]
    assert keys[0] in VALID, f"{name}: tests/test_wrong_inputs.py needs a right {parameter}"
    return VALID[keys[0]]()


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    every = inspect.signature(function).parameters.values()
    return [p for p in every if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def attempt(name: str, parameter: inspect.Parameter, value: Any) -> str | None:
    """What is wrong with how the value is told; None if nothing is."""
    function = FUNCTIONS[name]
    needed = [p for p in parameters_of(function) if p.default is p.empty and p is not parameter]
    arguments = {p.name: valid(name, p.name) for p in needed if p.name != parameter.name}
    accepts = inspect.signature(function).parameters
    takes = "progress" in accepts or "[Options]" in str(accepts.get("options", ""))
    if takes and parameter.name != "progress":
        arguments["progress"] = False
    label = f"{name}.{parameter.name} {value!s}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**arguments, **{parameter.name: value})
    except PvaeError as error:
        parts = (error.where, error.expected, error.actual, error.fixes)
        if not all(parts) or "\n" in error.one_line():
            return f"{label[:120]}: not in four parts: {error}"
        return None
    except Exception as error:
        return f"{label[:120]}: {type(error).__name__}: {str(error)[:200]}"
    return None if matches(ACCEPTED, label) else f"{label[:120]}: accepted"


def told(name: str, *, at_pair: bool) -> tuple[int, list[str]]:
    """How many wrong values were tried, and which were told wrongly; of pair and data, or not."""
    cases = [
        (parameter, value)
        for parameter in parameters_of(FUNCTIONS[name])
        if (parameter.name in ("pair", "data")) == at_pair
        for value in wrong_values(name, parameter)
    ]
    return len(cases), [w for p, v in cases if (w := attempt(name, p, v)) is not None]


def marked(names: list[str], is_fast: Callable[[str], bool]) -> list[Any]:
    return [n if is_fast(n) else pytest.param(n, marks=pytest.mark.slow) for n in names]


def looks(name: str) -> bool:
    return bool({"pair", "data"} & {p.name for p in parameters_of(FUNCTIONS[name])})


@pytest.mark.parametrize("name", marked([*FUNCTIONS], lambda n: n != "diagnostics.diagnose"))
def test_wrong_arguments_are_refused_in_four_parts(name: str) -> None:
    _, wrong = told(name, at_pair=False)
    assert not wrong, "\n".join(["", *wrong])


LOOKING = marked(list(filter(looks, FUNCTIONS)), ["bounds.elbo", "data.as_source"].__contains__)


@pytest.mark.parametrize("name", LOOKING)
def test_wrong_pairs_and_data_are_refused_in_four_parts(name: str) -> None:
    _, wrong = told(name, at_pair=True)
    assert not wrong, "\n".join(["", *wrong])


def test_there_are_enough_of_them() -> None:
    cases = [1 for n, f in FUNCTIONS.items() for p in parameters_of(f) for _ in wrong_values(n, p)]
    assert len(cases) > 3000
    assert len(FUNCTIONS) > 70


SIZES: dict[str, tuple[Callable[[], Any], str]] = {
    "particles": (lambda: bounds.elbo(vae(), x(), 10**9), "num_particles"),
    "particles of weights": (lambda: bounds.log_weights(vae(), x(), 10**9), "num_particles"),
    "particles of an objective": (lambda: pvae.objectives.IWAE(10**10), "num_particles"),
    "samples": (lambda: vae().sample(10**11), "num_samples"),
    "codes": (lambda: vae().encode(x(), num_particles=10**10), "num_particles"),
    "layers": (lambda: MLP(10**6, 10**6, ()), "MLP.hidden"),
    "channels": (lambda: networks.ConvEncoder((1, 8, 8), 2, channels=(10**6, 10**6)), "Conv"),
    "latent": (lambda: recipes.vae(D, 10**12), "latent_dim|MLP|event_shape"),
    "codebook": (lambda: recipes.vq_vae(D, 2, num_codes=10**12), "num_codes"),
    "simulations": (lambda: pvae.diagnostics.sbc(vae(), x(), num_simulations=10**10), "num_sim"),
}


@pytest.mark.parametrize("kind", SIZES)
def test_what_cannot_fit_is_refused_before_it_is_tried(kind: str) -> None:
    call, where = SIZES[kind]
    with pytest.raises(
        OutOfMemoryError, match=rf"^\S*({where})\S*: expected what fits into the [\d,.]+ GiB"
    ) as error:
        call()
    assert error.value.fixes


def test_a_number_that_would_fit_is_said() -> None:
    with pytest.raises(OutOfMemoryError) as error:
        pvae.objectives.IWAE(10**12)
    name, number = error.value.fixes[0].split("=")
    assert name == "num_particles"
    assert pvae.objectives.IWAE(int(number)).num_particles > 10**5


class Metric(enum.StrEnum):
    COSINE = "cosine"


def untyped(value: Any) -> Any:
    """A value of another type than annotations have, which works all the same."""
    return value


def widths_of(network: Any) -> list[int]:
    return [m.out_features for m in network.modules() if isinstance(m, torch.nn.Linear)]


RIGHT: dict[str, tuple[Callable[[], Any], Any]] = {
    "many layers": (lambda: widths_of(MLP(D, Q, (256,) * 6)), [256] * 6 + [Q]),
    "many channels": (
        lambda: len(networks.ConvEncoder((1, 32, 32), Q, (8, 16, 32, 64, 128)).convolutions),
        10,
    ),
    "an array of widths": (lambda: widths_of(MLP(D, Q, untyped(np.array([5, 4])))), [5, 4, Q]),
    "a tensor of widths": (lambda: widths_of(MLP(D, Q, untyped(torch.tensor([5, 4])))), [5, 4, Q]),
    "a range of widths": (lambda: widths_of(MLP(D, Q, range(5, 3, -1))), [5, 4, Q]),
    "widths that are read once": (
        lambda: widths_of(recipes.vae(D, Q, hidden=untyped(iter((5, 4)))).model),
        [4, 5, D],
    ),
    "one number of channels": (
        lambda: len(networks.ConvEncoder((1, 8, 8), Q, 4).convolutions),
        2,
    ),
    "bytes as sizes": (
        lambda: widths_of(untyped(MLP)(np.uint8(200), 2, [np.uint8(3)], context_dim=np.uint8(99))),
        [3, 2],
    ),
    "a byte as K": (lambda: pvae.objectives.IWAE(np.uint8(5)).num_particles, 5),
    "a tensor as K": (lambda: bounds.elbo(vae(), x(), untyped(torch.tensor(2))).num_particles, 2),
    "NumPy's truth": (lambda: vae().sample(3, mean=untyped(np.bool_(1))).shape, (3, D)),
    "NumPy's text": (
        lambda: pvae.latent.nearest(z(), z(), 1, metric=untyped(np.str_("cosine")))[0][3],
        3,
    ),
    "a member of an enumeration": (
        lambda: pvae.latent.nearest(z(), z(), 1, metric=untyped(Metric.COSINE))[0][3],
        3,
    ),
    "NumPy's number of a choice": (
        lambda: pvae.objectives.DIPVAE(kind=untyped(np.int64(2))).kind,
        2,
    ),
    "a list of modules": (
        lambda: len(
            recipes.vae(
                D, Q, penalties=untyped(torch.nn.ModuleList([pvae.penalties.WeightDecay(1.0)]))
            ).guide.penalties
        ),
        1,
    ),
    "neighbours of another library": (
        lambda: pvae.latent.precision_at_k([7, 8], [7, 7, 8], np.array([[0], [1]])).tolist(),
        [1.0, 0.0],
    ),
    "an evidence of nothing": (lambda: pvae.diagnostics.bits_per_dimension(-inf, 2), inf),
    "codes in lists": (lambda: len(pvae.plots.latent_map(z().tolist()).axes), 1),
    "a negative whole number": (lambda: pvae.diagnostics.bits_per_dimension(-2, 1) > 2, True),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_right_values_of_unusual_kinds_are_taken(kind: str) -> None:
    call, expected = RIGHT[kind]
    assert call() == expected
