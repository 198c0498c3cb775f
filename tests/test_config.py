"""The configuration: help, names, files and the Python recipes all come from one place."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import corruptions, guides, likelihoods, objectives, penalties, priors, recipes
from pvae.conditional import Unconditional
from pvae.config import Config, flag, options
from pvae.corruptions import Corruption
from pvae.errors import ArgumentError, CheckpointError, PvaeError
from pvae.objectives import DReG
from pvae.penalties import Penalty
from pvae.runs import open_run
from pvae.shelf import Shelf
from pvae.types import Dist, Shape
from tests.test_cli import FAST, call

D = 6


def help_of_train() -> str:
    """The help as one line, without the lines of its boxes."""
    return " ".join(call("train", "--help").replace("│", " ").split())


# Help


def test_every_option_is_in_the_help_with_default_and_example() -> None:
    text = help_of_train()
    for name, option in options().items():
        assert f"{flag(name)} {option.kind} {option.text(name)}" in text
        for choice in option.choices or ():
            assert choice in option.text(name)
    for name, value in Config().model_dump().items():
        start = text.index(f" {flag(name)} <")
        words = text[start : text.index("Example:", start)]
        assert "Default: " in words
        assert value is None or f"Default: {value}. " in words


def test_examples_can_be_typed() -> None:
    """Each by itself; what needs another option beside it says so when the pair is built."""
    for name, option in options().items():
        assert getattr(Config(**{name: option.example}), name) is not None


def test_lines_fit_a_terminal() -> None:
    assert max(map(len, call("train", "--help").splitlines())) <= 80


class Cauchy(Unconditional):
    """A prior with heavy tails, as a user writes one."""

    loc: Tensor
    scale: Tensor

    def __init__(self, event_shape: Shape) -> None:
        super().__init__(event_shape, loc=0.0, scale=1.0)

    def distribution(self) -> Dist:
        return dist.Cauchy(self.loc, self.scale)


class Smooth(Penalty):
    """The size of the mean reconstruction."""

    def forward(self, outputs: penalties.SideOutputs) -> Tensor:
        return outputs.fn.mean.square().sum(-1)


class Dimming(Corruption):
    """Dimming: all entries are multiplied by a factor.

    Arguments:
        factor: Factor that all entries are multiplied by.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Poisson(likelihoods.Likelihood):
    """Counts without a largest one."""

    def distribution(self, *params: Tensor) -> Dist:
        return dist.Poisson(params[0].exp())


def tiny(event_shape: Shape, latent_dim: int, *, depth: int = 2, **options: object) -> pvae.VAE:
    """A recipe of one's own.

    Arguments:
        event_shape: Shape of one datum.
        latent_dim: Size of the code.
        depth: Number of hidden layers.
        options: As in `recipes.vae`.
    """
    return recipes.vae(event_shape, latent_dim, **{**options, "hidden": (4,) * depth})  # type: ignore[arg-type]


NEW: dict[str, tuple[Shelf, Callable[..., object], list[str], str]] = {
    "prior": (priors.named, Cauchy, ["--prior", "new"], "student_t, flat, new. Default"),
    "likelihood": (
        likelihoods.named,
        Poisson,
        ["--likelihood", "new"],
        "categorical, gaussian, new. Default",
    ),
    "guide": (guides.named, guides.MeanField, ["--guide", "new"], "mean_field, point, new. "),
    "penalty": (
        penalties.named,
        Smooth,
        ["--new", "0.1"],
        "--new <float> Weight of a penalty: the size of the mean reconstruction. Default: none.",
    ),
    "corruption": (
        corruptions.named,
        Dimming,
        ["--new", "0.5"],
        "--new <float> Factor that all entries are multiplied by. Default: none. Example:",
    ),
    "objective": (objectives.named, DReG, ["--objective", "new"], "vae, new. Default: elbo"),
    "recipe": (
        recipes.named,
        tiny,
        ["--recipe", "new", "--depth", "3"],
        "--depth <int> Number of hidden layers (new only). Default: 2. Example: --depth 2",
    ),
}


@pytest.mark.float32
@pytest.mark.parametrize("kind", NEW)
def test_what_has_a_name_is_an_option(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One class or function under a name, and nothing else: help, training, config.json."""
    shelf, part, arguments, words = NEW[kind]
    assert words not in help_of_train()
    monkeypatch.setitem(shelf, "new", part)
    assert words in help_of_train()
    folder = tmp_path / "run"
    call("train", "--out", str(folder), *FAST, *arguments)
    name, value = arguments[-2].removeprefix("--"), arguments[-1]
    assert str(json.loads((folder / "config.json").read_text())[name]) == value
    _, vae, _ = open_run(folder, "cpu")
    if inspect.isclass(part) and issubclass(part, nn.Module):
        assert any(isinstance(module, part) for module in vae.modules())
    if kind == "recipe":
        assert sum(isinstance(m, nn.Linear) for m in vae.guide.modules()) == 4


@pytest.mark.parametrize(
    ("shelf", "parts", "unnamed"),
    [
        (priors.named, priors, set()),
        (likelihoods.named, likelihoods, {"Likelihood"}),
        (guides.named, guides, {"CodeDelta", "NearestCode"}),
        (corruptions.named, corruptions, {"Corruption"}),
        (penalties.named, penalties, {"Penalty", "Custom", "Commitment", "SideOutputs"}),
        (objectives.named, objectives, {"Objective", "ObjectiveState", "Capacity", "GECO"}),
    ],
)
def test_every_public_part_has_a_name(shelf: Shelf, parts: object, unnamed: set[str]) -> None:
    public = {n for n in parts.__all__ if inspect.isclass(getattr(parts, n))}  # type: ignore[attr-defined]
    assert public - unnamed == {part.__name__ for part in shelf.values()}


def test_recipes_share_their_keywords() -> None:
    keywords = {
        name: parameter
        for name, parameter in inspect.signature(recipes.vae).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert keywords.keys() == recipes.PairOptions.__annotations__.keys()


# Names in Python


def test_names_stand_for_parts() -> None:
    """The same pair, number by number."""

    def made(**parts: object) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return recipes.vae(D, 2, hidden=(4,), **parts).state_dict()  # type: ignore[arg-type]

    by_class = made(prior=priors.StudentT, likelihood=likelihoods.Gaussian)
    by_name = made(prior="student_t", likelihood="gaussian", guide="mean_field", activation="ReLU")
    assert by_class.keys() == by_name.keys()
    for name, tensor in by_class.items():
        assert torch.equal(tensor, by_name[name]), name


@pytest.mark.parametrize("recipe", recipes.DETERMINISTIC)
def test_gaussian_is_the_squared_error_of_a_deterministic_recipe(recipe: str) -> None:
    vae = recipes.named(recipe)(D, 2, hidden=(4,), likelihood="gaussian", activation="SiLU")
    assert vae.model.likelihood.sigma == pytest.approx(0.5**0.5)
    assert any(isinstance(module, nn.SiLU) for module in vae.modules())


def test_levels_are_those_of_the_data() -> None:
    binomial = recipes.vae(D, 2, hidden=(4,), likelihood="binomial", levels=17).model.likelihood
    assert isinstance(binomial.total_count, Tensor)
    assert float(binomial.total_count) == 16
    categorical = recipes.vae(D, 2, hidden=(4,), likelihood="categorical", levels=5)
    assert categorical.model.likelihood.num_params == 5
    for name in ("binomial", "categorical"):
        with pytest.raises(ArgumentError, match=f"likelihood {name}: expected data with known"):
            recipes.vae(D, 2, likelihood=name)
    with pytest.raises(ArgumentError, match="likelihood bernoulli: expected binary data"):
        recipes.vae(D, 2, likelihood="bernoulli", levels=17)


def test_fit_takes_the_name_of_an_objective() -> None:
    def fitted(objective: str | DReG) -> list[Tensor]:
        torch.manual_seed(0)
        vae = recipes.vae(D, 2, hidden=(4,), likelihood="gaussian")
        x = torch.randn(16, D, generator=torch.Generator().manual_seed(1))
        pvae.fit(vae, x, objective, epochs=2, device="cpu", progress=False)
        return [*vae.parameters()]

    for a, b in zip(fitted("dreg"), fitted(DReG()), strict=True):
        assert torch.equal(a, b)


def test_an_unknown_name_lists_those_there_are() -> None:
    for make, words in (
        (lambda: recipes.vae(D, 2, prior="laplas"), 'prior: .*standard_normal.*"laplace"'),
        (lambda: recipes.vae(D, 2, guide="flow"), "guide: expected one of mean_field, point; got"),
        (lambda: recipes.ae(D, 2, likelihood="normal"), "likelihood: expected one of bernoulli, "),
        (lambda: recipes.named("gan"), "recipe: expected one of vae, ae, sparse_ae"),
        (lambda: objectives.named("vb"), "objective: expected one of elbo, "),
    ):
        with pytest.raises(ArgumentError, match=f"(?s){words}"):
            make()
    vae = recipes.vae(D, 2)
    with pytest.raises(ArgumentError, match="objective: expected one of elbo"):
        pvae.fit(vae, torch.zeros(4, D), "evidence")


# Files


def parameters(folder: Path) -> dict[str, Tensor]:
    return pvae.checkpoint.load(folder / "checkpoint.safetensors").part("param")


def assert_same(a: Path, b: Path) -> None:
    first, second = parameters(a), parameters(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.float32
def test_a_run_is_made_again_from_its_config(tmp_path: Path) -> None:
    """Bit for bit, from config.json, from the folder, and from the same options in TOML."""
    a = tmp_path / "a"
    options = ["--recipe", "sparse_ae", "--l1", "0.2", "--noise", "0.1", "--decoder-hidden", "5"]
    call("train", "--out", str(a), *FAST, *options, "--lr", "0.003", "--seed", "4")
    (tmp_path / "mine.toml").write_text(
        'recipe = "sparse_ae"\nl1 = 0.2\nnoise = 0.1\ndecoder_hidden = [5]\nhidden = [16]\n'
        "lr = 0.003\nepochs = 3\nseed = 4\n"
    )
    for i, source in enumerate((a / "config.json", a, tmp_path / "mine.toml")):
        b = tmp_path / f"b{i}"
        call("train", "--out", str(b), "--config", str(source), "--device", "cpu")
        assert Config.read(b) == Config.read(a)
        assert_same(a, b)


@pytest.mark.float32
def test_options_win_over_the_file_and_a_run_goes_on_with_its_own(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    call("train", "--out", str(a), *FAST, "--seed", "4")
    given = ["--config", str(a), "--device", "cpu"]
    call("train", "--out", str(b), *given, "--epochs", "2", "--l1", "2")
    assert Config.read(b) == Config.read(a).model_copy(update={"epochs": 2, "l1": 2})
    assert "Laplace" in (b / "config.json").read_text()
    with pytest.raises(ArgumentError, match=r"(?s)--resume: .*--l1 2; got None"):
        call("train", "--out", str(b), "--resume", *given)
    with pytest.raises(ArgumentError, match=r"(?s)--resume: .*--hidden 16; got 8,4"):
        call("train", "--out", str(a), "--resume", *given, "--hidden", "8,4")
    call("train", "--out", str(a), "--resume", *given, "--epochs", "4")
    assert len((a / "history.jsonl").read_text().splitlines()) == 4


FILES: dict[str, tuple[str | bytes, str]] = {
    "unknown": ('{"latent_dims": 3}', "latent_dims: expected an option.*Try: latent_dim"),
    "value": ('{"lr": "fast"}', "lr: expected a number; got 'fast'"),
    "choice": ('{"prior": "cauchy"}', "prior: expected one of standard_normal, "),
    "list": ("[1, 2]", "JSON or TOML file with the same names; got ValueError"),
    "text": ("prior = laplace", "JSON or TOML file with the same names; got JSONDecodeError"),
    "widths": ('{"hidden": [3, "a"]}', "hidden: expected a valid integer; got 'a'"),
    "number as text": ('{"epochs": "5"}', "epochs: expected an integer; got '5'"),
    "number as a list": ('{"epochs": [5]}', r"epochs: expected an integer; got \[5\]"),
    "number as a truth": ('{"epochs": true}', "epochs: expected an integer; got True"),
    "number as a table": ('{"lr": {"a": 1}}', "lr: expected a number; got {'a': 1}"),
    "name as a number": ('{"recipe": 3}', "recipe: expected a valid string; got 3"),
    "name as a list": ('{"data": ["a"]}', "data: expected a valid string"),
    "half an epoch": ('{"epochs": 2.5}', "epochs: expected a valid integer; got 2.5"),
    "no rate": ('{"lr": -0.0}', "lr: expected a finite number above 0; got -0.0.*Try: lr 1"),
    "no epochs": ('{"epochs": -0}', "epochs: expected an integer of at least 1; got 0"),
    "negative seed": ('{"seed": -1}', "seed: expected an integer of at least 0"),
    "infinite": ('{"lr": 1e400}', "lr: expected a finite number above 0; got inf"),
    "infinite weight": ('{"beta": 1e400}', "beta: expected a finite number of at least 0; got inf"),
    "negative weight": ('{"contractive": -1}', "contractive: expected a finite number of at least"),
    "NaN": ('{"lr": NaN}', "NaN, which is no JSON"),
    "Infinity": ('{"noise": -Infinity}', "-Infinity, which is no JSON"),
    "NaN in TOML": ("lr = nan", "lr: expected a finite number above 0; got nan"),
    "sigma": ('{"sigma": -1.0}', "sigma: expected a finite number above 0; got -1.0"),
    "sigma as text": ('{"sigma": "nan"}', "sigma: expected a finite number above 0; got nan"),
    "width": ('{"hidden": [1000000000000]}', "hidden: expected what fits into the .* GiB"),
    "wide together": ('{"hidden": [9000000, 9000000]}', "hidden: expected what fits into"),
    "width of a decoder": ('{"decoder_hidden": [10000000000000]}', "decoder_hidden: .* fits into"),
    "no width": ('{"hidden": [0]}', "hidden: expected an integer of at least 1; got 0"),
    "lists of lists": ('{"hidden": [[3], [4]]}', "hidden: expected a valid integer; got .4."),
    "table of widths": ('{"hidden": {"a": 3}}', "hidden: expected a valid tuple"),
    "latent": ('{"latent_dim": 1000000000000}', "latent_dim: expected what fits into the"),
    "no latent": ('{"latent_dim": 0}', "latent_dim: expected an integer of at least 1; got 0"),
    "draws": ('{"num_particles": 100000000000}', "num_particles: expected what.*particles \\d+"),
    "beyond 64 bits": ('{"epochs": 1' + "0" * 30 + "}", "epochs: expected an integer of at most"),
    "digits": ('{"epochs": 1' + "0" * 5000 + "}", "Exceeds the limit"),
    "nested": ("[" * 100_000, "got RecursionError"),
    "nested tables": ('{"a":' * 100_000, "got RecursionError"),
    "nested TOML": ("a = " + "[" * 100_000, "TOML|JSON"),
    "nested value": ('{"hidden": ' + "[" * 500 + "]" * 500 + "}", "hidden: expected a valid"),
    "this object": ('{"self": 1}', "self: expected an option"),
    "class": ('{"__class__": 1}', "expected an option of pvae train"),
    "a name with an escape": ('{"a\\u001b[2Jb": 1}', r"a\\x1b\[2Jb: expected an option"),
    "null": ("null", "no table of names and values"),
    "empty": ("", "got an empty one"),
    "bytes": (b"\xff\xfe{}", "got UnicodeDecodeError"),
    "two tables": ("{}{}", "got JSONDecodeError: Extra data"),
    "long": ("{" + " " * 2**20 + "}", "got one of 1048578"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_configuration(name: str, tmp_path: Path) -> None:
    """In one line, before anything is read or made."""
    content, words = FILES[name]
    path = tmp_path / ("mine.toml" if "TOML" in name else "mine.json")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=f"(?s)mine..?.?.?.?.*{words}") as error:
        Config.read(path)
    assert "\x1b" not in str(error.value)
    assert len(error.value.one_line()) < 1000


def test_a_file_is_refused_before_the_run_has_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"hidden": [1000000000000]}')
    with pytest.raises(CheckpointError, match=r"mine\.json, hidden: expected what fits into"):
        call("train", "--config", str(tmp_path / "mine.json"), "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["folder", "device", "missing", "long"])
def test_what_is_no_file_is_no_configuration(kind: str, tmp_path: Path) -> None:
    names: dict[str, str | Path] = {
        "folder": tmp_path,
        "device": "/dev/zero",
        "missing": "no",
        "long": "a" * 5000,
    }
    with pytest.raises(CheckpointError, match=r"expected the config\.json of a run"):
        Config.read(names[kind])


VALUES: dict[str, tuple[dict[str, object], str]] = {
    "unknown": ({"colour": "red"}, "--colour: expected an option of pvae train"),
    "near": ({"num_particle": 3}, "Try: --num-particles"),
    "number": ({"lr": "a"}, "--lr: expected a valid number; got 'a'"),
    "integer": ({"epochs": 2.5}, "--epochs: expected a valid integer; got 2.5"),
    "part": ({"noise": "much"}, "--noise: expected a valid number; got 'much'"),
    "widths": ({"hidden": "a,b"}, "--hidden: expected widths such as 256,256; got 'a,b'"),
    "engine": ({"engine": "fast"}, "--engine: expected one of auto, eager"),
    "binarize": ({"binarize": "yes"}, "--binarize: expected one of none, threshold"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_checked(name: str) -> None:
    values, words = VALUES[name]
    with pytest.raises(PvaeError, match=f"(?s){words}"):
        Config(**values)
