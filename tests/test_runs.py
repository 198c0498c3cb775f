"""Run folders: one thing under the checkpoint's digest, in one format, whoever has written them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import bounds, checkpoint, recipes
from pvae.errors import ArgumentError, CheckpointError, PvaeError, PvaeWarning, UndefinedError
from pvae.runs import Run, open_run
from tests.test_cli import call

TRAIN = ("train", "--hidden", "4", "--latent-dim", "2", "--epochs", "3", "--device", "cpu")


@pytest.fixture(autouse=True)
def _single_precision() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command line, and what its bound is."""
    torch.set_default_dtype(torch.float32)
    place = tmp_path_factory.mktemp("runs")
    np.save(place / "x.npy", np.random.default_rng(0).random((120, 6), dtype=np.float32))
    options = ["--data", str(place / "x.npy"), "--prior", "laplace", "--activation", "Tanh"]
    call(*TRAIN, *options, "--out", str(place / "run"))
    (place / "bound").write_text(str(bound(place / "run")))
    return place


def bound(folder: Path) -> float:
    _, vae, splits = open_run(folder, "cpu")
    return bounds.elbo(vae, splits.test.unlabelled()).mean


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def edit(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=3))


# What was changed is told, and not used


EDITS: dict[str, tuple[dict[str, object], str]] = {
    "the seed": ({"seed": 1}, "seed was 0, is 1"),
    "the prior": ({"prior": "standard_normal"}, "prior was 'laplace', is 'standard_normal'"),
    "an activation": ({"activation": "ReLU"}, "activation was 'Tanh', is 'ReLU'"),
    "a width": ({"hidden": [4, 4]}, r"hidden was \[4\], is \[4, 4\]"),
    "a latent": ({"latent_dim": 3}, "latent_dim was 2, is 3"),
    "another kind": ({"recipe": "ae"}, "recipe was 'vae', is 'ae'"),
    "the learning rate": ({"lr": 0.5}, "lr was 0.001, is 0.5"),
    "binarisation": ({"binarize": "static"}, "binarize was 'none', is 'static'"),
    "a number more": ({"noise": 0.5}, "noise was None, is 0.5"),
    "a type": ({"seed": "0"}, "seed was 0, is '0'"),
    "an unknown name": ({"colour": "red"}, "colour was None, is 'red'"),
    "a long name": (
        {"hidden": "x" * 9999},
        r"hidden was \[4\], is 'x{119}\.\.\. .10001 characters.",
    ),
    "two": ({"seed": 1, "lr": 0.5}, "lr was 0.001, is 0.5; seed was 0, is 1"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_configuration_is_told_and_the_trained_one_is_used(
    name: str, run: Path, trained: Path
) -> None:
    values, words = EDITS[name]
    edit(run, **values)
    with pytest.warns(PvaeWarning, match=f"{words}. What the run was trained with is used"):
        found = bound(run)
    assert found == float((trained / "bound").read_text())


REFUSED_BEFORE = {"an unknown name": "colour", "a type": "seed", "a long name": "widths such as"}


@pytest.mark.parametrize("name", EDITS)
def test_a_run_doesnt_go_on_by_an_edited_configuration(name: str, run: Path) -> None:
    values, words = EDITS[name]
    edit(run, **values)
    before = (run / "checkpoint.safetensors").read_bytes()
    with pytest.raises(PvaeError, match=REFUSED_BEFORE.get(name, words)):
        call("train", "--resume", "--out", str(run), "--device", "cpu")
    assert (run / "checkpoint.safetensors").read_bytes() == before


def test_what_may_be_changed_is_checked_where_it_stands(run: Path) -> None:
    edit(run, epochs="many")
    with pytest.raises(CheckpointError, match=r"config\.json, epochs: .*integer; got 'many'"):
        Run(run)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 9999, "\x00", '{"seed": 1', None])
def test_a_broken_configuration_is_told_and_the_checkpoints_is_used(
    text: str | None, run: Path, trained: Path
) -> None:
    (run / "config.json").unlink() if text is None else (run / "config.json").write_text(text)
    with pytest.warns(PvaeWarning, match=r"config\.json: .*What the checkpoint says is used"):
        found = bound(run)
    assert found == float((trained / "bound").read_text())


def test_what_moves_with_the_data_may_be_changed(run: Path, trained: Path, tmp_path: Path) -> None:
    """Its layout, too."""
    shutil.copy(trained / "x.npy", tmp_path / "moved.npy")
    edit(run, data=str(tmp_path / "moved.npy"), epochs=4)
    assert bound(run) == float((trained / "bound").read_text())
    said = call("train", "--resume", "--out", str(run), "--device", "cpu")
    assert "4 epoch(s)" in said
    assert Run(run).config == Run(run).config


@pytest.mark.parametrize("more", [0, 1])
def test_other_data_under_the_same_name_are_refused(
    more: int, run: Path, trained: Path, tmp_path: Path
) -> None:
    """A row more, and the split is another one: rows of the training would be in the test."""
    x = np.load(trained / "x.npy")
    x[0, 0] += 1 - more
    np.save(tmp_path / "other.npy", np.concatenate([x, x[:more]]))
    edit(run, data=str(tmp_path / "other.npy"))
    with pytest.raises(CheckpointError, match=r"the data that the run was trained on, \w+ of all"):
        open_run(run)
    with pytest.raises(CheckpointError, match="was trained on"):
        call("evaluate", str(run))


HISTORY: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "a number": (
        lambda lines: [lines[0], lines[1].replace('"loss": ', '"loss": 1'), lines[2]],
        "line 2: loss was .*, is 1",
    ),
    "a line that is gone": (lambda lines: lines[1:], "line 1: .*epoch was 0, is 1"),
    "the end": (lambda lines: lines[:2], "line 3: the epoch's record isn't there"),
    "cut short": (lambda lines: [*lines[:2], lines[2][:9]], "line 3: the epoch's"),
    "no text": (lambda _: ["\x00"], "line 1: the epoch's"),
    "nested to death": (lambda _: ["[" * 99999], "line 1: the epoch's"),
    "another thing": (lambda _: ["3"], "line 1: the epoch's"),
    "one more field": (
        lambda lines: [lines[0][:-1] + ', "x": 1}', *lines[1:]],
        "line 1: x was None, is 1",
    ),
}


@pytest.mark.parametrize("name", HISTORY)
def test_a_history_that_was_changed_is_told_and_rebuilt(name: str, run: Path) -> None:
    change, words = HISTORY[name]
    path = run / "history.jsonl"
    expected = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    with pytest.warns(PvaeWarning, match=rf"history\.jsonl, {words}"):
        assert list(Run(run).history) == expected
    path.unlink()
    with pytest.warns(PvaeWarning, match="No such file"):
        assert list(Run(run).history) == expected


def test_a_history_that_goes_on_after_the_checkpoint_is_no_change(run: Path) -> None:
    """As a kill leaves it, in the middle of a line."""
    with (run / "history.jsonl").open("a") as file:
        file.write('{"epoch": 3, "loss": 1.0}\n{"epo')
    assert len(Run(run).history) == 3


def test_a_history_that_is_no_file_is_told(run: Path) -> None:
    (run / "history.jsonl").unlink()
    os.mkfifo(run / "history.jsonl")  # which would be waited for
    with pytest.warns(PvaeWarning, match=r"history\.jsonl: a pipe"):
        assert len(Run(run).history) == 3


def test_figures_and_the_summary_are_under_the_digest(run: Path) -> None:
    files = Run(run).saved.meta["files"]
    there = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    own = {"checkpoint.safetensors", "config.json", "history.jsonl"}
    assert files.keys() == there - own
    (run / "figures" / "latent.png").write_bytes(b"another picture")
    (run / "figures" / "training.png").unlink()  # which says nothing that isn't so
    with pytest.warns(PvaeWarning, match=r"latent\.png: not what the training wrote") as caught:
        Run(run)
    assert len(caught) == 1


def test_digests_that_stand_elsewhere_lead_nowhere(run: Path) -> None:
    """A stranger's checkpoint names files outside of its folder: those that end are only read."""
    saved = checkpoint.load(run / "checkpoint.safetensors")
    saved.meta["files"] = {"../run/config.json": "0", "nothing/there": "0", "/dev/zero": "0"}
    checkpoint.save(run / "checkpoint.safetensors", saved)
    with pytest.warns(PvaeWarning, match="not what the training wrote"):
        Run(run)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what a checkpoint says, under a digest that is right."""
    saved = checkpoint.load(folder / "checkpoint.safetensors")
    change(saved.meta)
    checkpoint.save(folder / "checkpoint.safetensors", saved)


FORMS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nothing": (dict.clear, "no 'progress' in its JSON"),
    "no settings": (lambda meta: meta.pop("settings"), "no 'settings'"),
    "a list of progress": (lambda meta: meta.update(progress=[1]), "'progress', which is a list"),
    "a text as history": (
        lambda meta: meta["progress"].update(history="x"),
        "'history', which is a str",
    ),
    "a record without an epoch": (
        lambda meta: meta["progress"].update(history=[{}]),
        "no 'epoch' in an entry of 'history'",
    ),
    "a list of versions": (lambda meta: meta.update(environment=[]), "'environment', which is a"),
    "places that are a number": (lambda meta: meta["pair"].update(changing=3), "'changing', which"),
    "a list of options": (lambda meta: meta.update(made={"config": [1]}), "'config', which is a"),
    "a list of files": (lambda meta: meta.update(files=["a"]), "'files', which is a list"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_checkpoint_of_something_else_is_refused_in_one_line(name: str, run: Path) -> None:
    change, words = FORMS[name]
    rewrite(run, change)
    said = rf"checkpoint\.safetensors: expected the checkpoint of a training; got {words}"
    with pytest.raises(CheckpointError, match=said):
        call("encode", str(run))
    with pytest.raises(CheckpointError, match=said):
        call("train", "--resume", "--out", str(run), "--device", "cpu")


def test_a_run_of_an_earlier_pvae_is_refused_as_what_it_is(run: Path) -> None:
    rewrite(run, lambda meta: [meta.pop(name) for name in ("made", "files", "pair")])
    with pytest.raises(CheckpointError, match="got one of an earlier pvae, or of"):
        call("train", "--resume", "--out", str(run), "--device", "cpu")
    with pytest.raises(CheckpointError, match="got a pair of an earlier pvae, whose checkpoints"):
        call("encode", str(run))


# One format


class Kept(nn.Module):
    """A model that a user writes as a module."""


def build() -> pvae.VAE:
    vae = recipes.vae(6, 2, hidden=(8,), likelihood="gaussian")
    return pvae.VAE(vae.model.prior, vae.model.likelihood, vae.guide.posterior)


def rows() -> Tensor:
    return torch.rand(60, 6, generator=torch.Generator().manual_seed(0))


def fit(pair: Any, folder: Path, x: Tensor | None = None, **options: Any) -> pvae.Fit:
    data = rows() if x is None else x
    return pvae.fit(pair, data, epochs=2, folder=folder, progress=False, engine="eager", **options)


def test_a_folder_of_fit_says_which_function_must_build_its_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = build()
    fit(vae, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"Try: --pair tests.test_runs:build") as caught:
        call("diagnose", str(tmp_path / "run"))
    advice = caught.value.fixes[0].split()
    monkeypatch.chdir(Path(__file__).parent.parent)
    np.save(tmp_path / "x.npy", rows().numpy())
    given = [str(tmp_path / "run"), "--data", str(tmp_path / "x.npy"), *advice]
    assert "ELBO" in call("diagnose", *given, "--rows", "60", "-K", "30")
    expected = bounds.elbo(vae, rows(), 10, seed=0)
    assert pvae.diagnostics.Finding.of(expected).number in call("evaluate", *given, "-K", "20")
    call("encode", *given, "--to", str(tmp_path / "z.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), vae.encode(rows()).detach().numpy())
    call("reconstruct", *given, "--to", str(tmp_path / "y.npy"))
    assert np.load(tmp_path / "y.npy").shape == (60, 6)
    call("sample", *given[:1], *advice, "-n", "7", "--to", str(tmp_path / "s.npy"))
    assert np.load(tmp_path / "s.npy").shape == (7, 6)
    with pytest.raises(ArgumentError, match="--data: expected data to look at"):
        call("encode", *given[:1], *advice)


def test_a_pair_of_a_recipe_is_built_without_any_code(tmp_path: Path) -> None:
    vae = recipes.vae(6, 2, hidden=(8,), likelihood="gaussian", activation=nn.Tanh).double()
    fit(vae, tmp_path / "run", rows().double())
    np.save(tmp_path / "x.npy", rows().double().numpy())
    given = [str(tmp_path / "run"), "--data", str(tmp_path / "x.npy")]
    call("encode", *given, "--to", str(tmp_path / "z.npy"))
    expected = vae.encode(rows().double()).detach().numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), expected)


def test_a_folder_of_either_loads_in_python(run: Path, tmp_path: Path) -> None:
    _, vae, splits = open_run(run, "cpu")
    again = Run(run).build(splits)
    pvae.load_parameters(again, run)
    assert all(map(torch.equal, again.model.parameters(), vae.model.parameters()))
    options: dict[str, Any] = {"batch_size": 64, "valid": splits.valid.unlabelled()}
    options |= {"resume": True, "progress": False, "engine": "eager"}
    pvae.fit(again, splits.train.unlabelled(), epochs=4, folder=run, **options)
    assert Run(run).config is not None  # it still is one of the command line


def functions() -> tuple[Any, Any]:
    import pyro
    import pyro.distributions as dist

    def model(x: Tensor) -> None:
        shift = pyro.param("shift", x.new_zeros(6))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    return model, guide


@pytest.mark.usefixtures("store")
def test_functions_are_built_by_the_one_that_they_are_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit(functions(), tmp_path / "run")
    shift = run.structure.parameters["shift"].detach().clone()
    assert shift.abs().min() > 0
    np.save(tmp_path / "x.npy", rows().numpy())
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(CheckpointError, match=r"--pair tests\.test_runs:functions"):
        call("diagnose", str(tmp_path / "run"))
    torch.nn.init.zeros_(run.structure.parameters["shift"])
    given = [str(tmp_path / "run"), "--pair", "tests.test_runs:functions"]
    assert "60 codes" in call("encode", *given, "--data", "tests.test_runs:rows")
    import pyro

    assert torch.equal(pyro.get_param_store()["shift"], shift)
    with pytest.raises(UndefinedError, match=r"pvae reconstruct: expected a pvae\.VAE"):
        call("reconstruct", *given, "--data", str(tmp_path / "x.npy"))


def test_a_pair_that_is_made_where_it_is_trained_has_no_function_to_name(tmp_path: Path) -> None:
    vae = recipes.vae(6, 2, hidden=(8,))
    pair = pvae.VAE(vae.model.prior, vae.model.likelihood, vae.guide.posterior)
    fit_here = pvae.fit
    fit_here(pair, rows().round(), epochs=1, folder=tmp_path / "run", progress=False)
    words = "made in tests.test_runs:test_a_pair_that_is_made_.*, which trained it"
    with pytest.raises(CheckpointError, match=words):
        call("diagnose", str(tmp_path / "run"))


WRONG = {
    "module": ("nowhere:build", "a module that is there; got 'nowhere'"),
    "name": ("tests.test_runs:nothing", "a name that tests.test_runs has; got 'nothing'"),
    "form": ("tests.test_runs", "expected module:function"),
    "file": ("no/such.py:build", "a file of Python code"),
    "arguments": ("tests.test_runs:fit", "a function that needs no arguments"),
    "no pair": ("tests.test_runs:rows", "a pair: "),
    "code": ("tests.test_runs:fails", r"ZeroDivisionError: .*test_runs\.py:\d+, in fails"),
    "another pair": ("tests.test_runs:another", "the pair that it was made with"),
}


def fails() -> object:
    return 1 / 0


def another() -> pvae.VAE:
    return recipes.vae(6, 3, hidden=(8,), likelihood="gaussian")


@pytest.mark.parametrize("name", WRONG)
def test_names_of_code_that_are_wrong(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    fit(build(), tmp_path / "run")
    text, words = WRONG[name]
    with pytest.raises(PvaeError, match=words):
        call("sample", str(tmp_path / "run"), "--pair", text)


@pytest.mark.slow
def test_a_strangers_folder_runs_nothing(tmp_path: Path) -> None:
    """It names modules that are at hand, and has files of names that pvae imports."""
    fit(build(), tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    trap = "import pathlib; pathlib.Path('sprung').touch()"
    for name in ("trap", "mymodel", "zuko", "pooch", "sitecustomize", "tests"):
        (tmp_path / f"{name}.py").write_text(trap)
        (tmp_path / "run" / f"{name}.py").write_text(trap)
    np.save(tmp_path / "x.npy", rows().numpy())
    for made in (
        {"builder": "trap:build"},
        {"fit": "trap.py:main"},
        {"recipe": "trap:build", "arguments": {}},
        {"recipe": "vae", "arguments": {"event_shape": 6, "latent_dim": 2, "prior": "trap:p"}},
        {"recipe": "vae", "arguments": {"event_shape": 6, "latent_dim": 2, "activation": "trap"}},
        {"recipe": "__import__", "arguments": {"name": "trap"}},
        {"recipe": "vae", "arguments": {"name": "trap"}},
    ):
        saved.meta["made"] = made
        checkpoint.save(tmp_path / "run" / "checkpoint.safetensors", saved)
        with pytest.raises(PvaeError):
            call("encode", str(tmp_path / "run"), "--data", str(tmp_path / "x.npy"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import pvae.cli; pvae.cli.main()", "encode", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert not (tmp_path / "sprung").exists()
