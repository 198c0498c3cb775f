"""The command line: a run folder from real images, everything that reads one, and mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
from typer.testing import CliRunner

import pvae
from pvae import bounds, diagnostics
from pvae.cli import app
from pvae.config import Config
from pvae.errors import ArgumentError, PvaeError
from pvae.runs import open_run

FAST = ["--epochs", "3", "--hidden", "16", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _single_precision() -> None:
    torch.set_default_dtype(torch.float32)


def pvae_command(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the command as users do, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(pvae.__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, "-m", "pvae", *arguments],
        capture_output=True,
        text=True,
        check=check,
        env=environment,
    )


def call(*arguments: str) -> str:
    """Runs the command in this process, which saves the imports."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    torch.set_default_dtype(torch.float32)
    call("train", "--out", str(folder), "--latent-dim", "2", *FAST)
    return folder


def test_a_run_folder_has_everything(run: Path) -> None:
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    figures = {"training", "latent", "reconstructions", "samples", "sample_means", "manifold"}
    assert files == {
        "config.json",
        "checkpoint.safetensors",
        "history.jsonl",
        "summary.txt",
        *(f"figures/{name}.png" for name in figures),
    }
    assert len((run / "history.jsonl").read_text().splitlines()) == 3
    summary = (run / "summary.txt").read_text()
    for name in ("ELBO", "evidence", "rate", "distortion", "bits per dimension", "active units"):
        assert re.search(rf"^[ +?!] {name}\b", summary, re.MULTILINE)
    assert "+-" in summary
    assert summary.splitlines()[-1].startswith("next: ")


def test_the_summary_says_what_the_saved_pair_is_worth(run: Path) -> None:
    config, vae, splits = open_run(run, "auto")
    found = bounds.elbo(vae, splits.test.arrays[0], 10, seed=config.seed)
    number = diagnostics.Finding.of(found).number
    assert number in (run / "summary.txt").read_text()
    assert number in call("evaluate", str(run), "-K", "20")


def test_the_evidence_by_other_methods(run: Path) -> None:
    _, vae, splits = open_run(run, "auto")
    x = splits.test.arrays[0]
    upper = bounds.evidence(vae, x[:3], 20, method="cubo")
    assert str(upper) in call("evaluate", str(run), "-K", "20", "-n", "3", "--method", "cubo")
    loose = bounds.evidence(vae, x[:2], 20)
    output = call("evaluate", str(run), "-K", "2", "-n", "2", "--method", "ais")
    found = re.search(r"evidence, AIS-100: (-[\d.]+) \+-.* N = 2, K = 2", output)
    assert found is not None
    assert loose.mean - 1 < float(found[1]) < upper.mean + 10


def test_sample(run: Path, tmp_path: Path) -> None:
    output = call("sample", str(run), "-n", "7", "--to", str(tmp_path / "x.npy"))
    assert "7 draws of shape (64,)" in output
    x = np.load(tmp_path / "x.npy")
    assert x.shape == (7, 64)
    assert (x == x.round()).all()
    call("sample", str(run), "-n", "7", "--to", str(tmp_path / "again.npy"))
    np.testing.assert_array_equal(x, np.load(tmp_path / "again.npy"))
    call("sample", str(run), "-n", "7", "--mean", "--to", str(tmp_path / "means.npy"))
    means = np.load(tmp_path / "means.npy")
    assert (means != means.round()).any()
    assert (tmp_path / "x.png").exists()


def test_reconstruct_and_encode(run: Path, tmp_path: Path) -> None:
    _, vae, splits = open_run(run, "cpu")
    test = splits.test.arrays[0]
    call("encode", str(run), "--to", str(tmp_path / "z.npy"))
    np.testing.assert_allclose(
        np.load(tmp_path / "z.npy"), vae.encode(test).detach().numpy(), rtol=1e-5
    )
    np.save(tmp_path / "some.npy", test[:5])
    some = str(tmp_path / "some.npy")
    call("reconstruct", str(run), "--data", some, "--to", str(tmp_path / "y.npy"))
    expected = vae.reconstruct(test[:5]).detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-5)


def test_diagnose(run: Path, tmp_path: Path) -> None:
    """The screen, and its lines as JSON."""
    said = call("diagnose", str(run), "--rows", "60", "-K", "30", "--to", str(tmp_path / "d.json"))
    assert "Diagnosis, N = 60\n" in said
    found = json.loads((tmp_path / "d.json").read_text())
    elbo, *_ = (line for line in found["findings"] if line.pop("check") == "elbo")
    assert str(diagnostics.Finding(**elbo)) in said
    assert found["next"] in said


@pytest.mark.parametrize("command", ["diagnose", "export"])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(
    command: str, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder.nc").mkdir()
    (tmp_path / "file").touch()
    for bad, reason in [("folder.nc", "expected a file;"), ("file/x.nc", "a folder that can be")]:
        with pytest.raises(ArgumentError, match=reason):
            call(command, str(run), "--to", str(tmp_path / bad))
    with pytest.raises(PvaeError):
        call(command, str(tmp_path / "no run"), "--to", str(tmp_path / "x.nc"))
    assert not (tmp_path / "no run").exists()


def test_export_for_arviz(run: Path, tmp_path: Path) -> None:
    """The file has the test data's first rows, and codes that scatter about the guide's means."""
    _, vae, splits = open_run(run, "cpu")
    path = tmp_path / "new" / "draws.nc"
    said = call("export", str(run), "-n", "5", "-K", "40", "--to", str(path))
    assert str(path) in said
    with xarray.open_datatree(path) as tree:
        x = torch.as_tensor(splits.test.arrays[0][:5])
        np.testing.assert_array_equal(tree["observed_data"]["x"].to_numpy(), x.numpy())
        z = tree["posterior"]["z"].to_numpy()
        assert z.shape == (1, 40, 5, 2)
        spread = z.std((0, 1)) / 40**0.5
        assert (abs(z.mean((0, 1)) - vae.encode(x).detach().numpy()) < 5.5 * spread).all()
    assert [p.name for p in path.parent.iterdir()] == ["draws.nc"]


def test_resume_trains_more_epochs(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call("train", "--out", str(whole), *FAST)
    call("train", "--out", str(parts), *FAST[:1], "2", *FAST[2:])
    call("train", "--out", str(parts), "--resume", "--epochs", "3", "--device", "cpu")
    a, b = (pvae.checkpoint.load(p / "checkpoint.safetensors") for p in (whole, parts))
    for name, tensor in a.part("param").items():
        assert torch.equal(tensor, b.part("param")[name]), name
    assert Config.read(parts).epochs == 3
    resolved = json.loads((parts / "config.json").read_text())["resolved"]
    assert resolved["likelihood"] == "binomial"
    assert resolved["rows"] == [1437, 180, 180]


@pytest.mark.slow
def test_ctrl_c_can_be_resumed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(pvae.__file__).parent.parent)}
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "pvae", "train", "--out", str(folder), "--epochs", "2000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while not (folder / "checkpoint.safetensors").exists():
            time.sleep(0.1)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == f"interrupted; to go on: pvae train --resume --out {folder}"
    epochs = len((folder / "history.jsonl").read_text().splitlines())
    done = pvae_command("train", "--resume", "--out", str(folder), "--epochs", str(epochs + 1))
    assert f"{epochs + 1} epoch(s)" in done.stdout


VARIANTS = {
    "an autoencoder": ["--recipe", "ae", "--latent-dim", "2"],
    "gaussian": ["--likelihood", "gaussian", "--sigma", "shared"],
    "categorical": ["--likelihood", "categorical"],
    "bernoulli": ["--binarize", "dynamic"],
    "laplace": ["--prior", "laplace"],
    "warm-up": ["--warmup", "2", "--patience", "2"],
    "one latent": ["--latent-dim", "1"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    call("train", "--out", str(tmp_path / "run"), *FAST, *VARIANTS[name])
    output = call("evaluate", str(tmp_path / "run"), "-K", "5")
    if name == "an autoencoder":
        assert "evidence" in output
        assert "not defined" in output
        assert "log joint" in output
    else:
        assert "ELBO" in output
    if name == "gaussian":
        assert "bins of 0.0625" in output


def test_files_and_images(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (60, 9, 7)).astype(np.uint8)
    np.save(tmp_path / "images.npy", x)
    call(
        "train", "--data", str(tmp_path / "images.npy"), "--out", str(tmp_path / "run"),
        "--network", "conv", "--binarize", "dynamic", "--epochs", "2", "--hidden", "4,4",
        "--device", "cpu",
    )  # fmt: skip
    assert (tmp_path / "run" / "figures" / "samples.png").exists()
    table = np.random.default_rng(0).normal(size=(60, 7))
    np.savez(tmp_path / "table.npz", x=table)
    call("train", "--data", str(tmp_path / "table.npz"), "--out", str(tmp_path / "table"), *FAST)
    assert not (tmp_path / "table" / "figures" / "samples.png").exists()
    assert "bits per dimension" not in (tmp_path / "table" / "summary.txt").read_text()


def test_doctor() -> None:
    output = call("doctor")
    assert f"torch {torch.__version__}" in output
    assert "known trouble" in output


# Mistakes: one line, an exit code, no traceback, nothing overwritten


MISTAKES = {
    "data": (["train", "--data", "mnits"], "expected one of digits, mnist"),
    "data set missing": (["train", "--data", "mnist"], "PVAE_DATA=DIR"),
    "recipe": (["train", "--recipe", "gan"], "--recipe: expected one of vae, ae, sparse_ae"),
    "prior": (["train", "--prior", "cauchy"], "--prior: expected one of standard_normal"),
    "likelihood": (["train", "--likelihood", "poisson"], "--likelihood: expected one of bernoulli"),
    "not binary": (["train", "--likelihood", "bernoulli"], "--binarize dynamic"),
    "hidden": (["train", "--hidden", "a,b"], "--hidden: expected widths such as 256,256"),
    "latent": (["train", "--latent-dim", "0"], "--latent-dim: expected an integer of at least 1"),
    "device": (["train", "--device", "gpu", "--epochs", "1"], "device: expected 'auto'"),
    "activation": (["train", "--activation", "Relu"], "a torch.nn activation"),
    "sigma": (["train", "--likelihood", "gaussian", "--sigma", "big"], "Gaussian.sigma"),
    "both": (["train", "--resume", "--overwrite"], "either --resume or --overwrite"),
    "sigma of a binomial": (["train", "--sigma", "0.5"], "a gaussian likelihood beside it"),
    "method": (
        ["evaluate", "nowhere", "-n", "3"],
        "--rows: expected --method ais or --method cubo",
    ),
    "no run": (["evaluate", "nowhere"], "expected a run: a folder with the checkpoint"),
    "nothing to resume": (["train", "--resume", "--out", "nowhere"], "a run to resume"),
    "codes of a vae": (["train", "--num-codes", "8"], "--recipe vq_vae"),
    "two priors": (["train", "--l1", "1", "--prior", "flat"], "--l1: expected an option of the"),
    "rate of noise": (["train", "--mask", "1.5"], "Masking.rate: expected a probability"),
    "small codes": (["train", "--recipe", "sparse_ae", "--l1", "0"], "l1: expected a finite"),
    "l1 and a prior": (
        ["train", "--recipe", "sparse_ae", "--l1", "5", "--prior", "student_t"],
        "either l1, for a Laplace prior, or another prior",
    ),
    "prior of a codebook": (["train", "--recipe", "vq_vae", "--prior", "flat"], "vq_vae: expected"),
    "flat prior": (["train", "--prior", "normal", "--recipe", "ae"], "a prior without parameters"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, words = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PVAE_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["pvae", *arguments])
    with pytest.raises(SystemExit) as stop:
        pvae.cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("pvae: ")
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not captured.out
    assert not list(tmp_path.rglob("*.json"))


def test_a_mistake_in_a_process_of_its_own() -> None:
    done = pvae_command("evaluate", "nowhere", check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    unknown = pvae_command("train", "--colour", "red", check=False)
    assert unknown.returncode == 2
    assert "No such option" in unknown.stderr


def test_a_run_is_never_overwritten_unasked(run: Path, capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    before = (run / "checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(sys, "argv", ["pvae", "train", "--out", str(run), *FAST])
    with pytest.raises(SystemExit):
        pvae.cli.main()
    assert "--resume, to go on with it" in capsys.readouterr().err
    assert (run / "checkpoint.safetensors").read_bytes() == before
    (run.parent / "mine").mkdir()
    (run.parent / "mine" / "thesis.txt").write_text("my thesis")
    arguments = ["pvae", "train", "--out", str(run.parent / "mine"), "--overwrite", *FAST]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        pvae.cli.main()
    assert "a folder with other files" in capsys.readouterr().err
    assert (run.parent / "mine" / "thesis.txt").read_text() == "my thesis"


def test_overwriting_when_asked(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    call("train", "--out", folder, *FAST)
    call("train", "--out", folder, "--overwrite", "--seed", "3", *FAST)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3


def test_a_refused_training_leaves_the_run_as_it_was(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    arguments = [
        "pvae",
        "train",
        "--out",
        str(copy),
        "--overwrite",
        "--device",
        "gpu",
        "--seed",
        "7",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        pvae.cli.main()
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def test_resume_refuses_other_options(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pvae", "train", "--out", str(run), "--resume", "--lr", "0.5", "--latent-dim", "5"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        pvae.cli.main()
    assert (
        "the options of the run: --latent-dim 2, --lr 0.001; got 5, 0.5" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.full((3, 64), 0.5), "whole numbers from 0 to 16"),
        (np.full((3, 64), 99.0), "whole numbers from 0 to 16"),
        (np.full((3, 64), np.nan), "whole numbers from 0 to 16"),
        (np.zeros((3, 63)), r"data of shape (64,)"),
    ],
)
def test_data_of_another_kind_arent_encoded(
    x: np.ndarray,
    words: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(
        sys, "argv", ["pvae", "encode", str(run), "--data", str(tmp_path / "x.npy")]
    )
    with pytest.raises(SystemExit):
        pvae.cli.main()
    assert words in capsys.readouterr().err


def test_bad_test_data_are_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever the row lands, and by its number in the file."""
    x = np.random.default_rng(0).normal(size=(30, 4))
    x[7, 2] = np.nan
    for seed in range(12):  # in one of these it is in the test part
        np.save(tmp_path / "x.npy", x)
        arguments = ["pvae", "train", "--data", str(tmp_path / "x.npy"), "--seed", str(seed)]
        monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "run")])
        with pytest.raises(SystemExit):
            pvae.cli.main()
        assert "row 7: expected finite values" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_damaged_run_is_named(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "config.json").write_text('{"data": "digits", "colour": "red"}')
    with pytest.warns(
        pvae.PvaeWarning, match=r"config\.json: .*colour was None, is 'red'; .*8 more"
    ):
        open_run(copy, "cpu")
    shutil.copy(run / "config.json", copy / "config.json")
    content = (copy / "checkpoint.safetensors").read_bytes()
    (copy / "checkpoint.safetensors").write_bytes(content[:-100])
    with pytest.raises(pvae.PvaeError, match="a safetensors file"):
        open_run(copy)
