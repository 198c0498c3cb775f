"""The command line and the deterministic family: train, evaluate, sample, restore."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pvae
from pvae.config import Config
from pvae.runs import open_run
from tests.test_cli import FAST, call

RUNS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "sparse_ae": (
        ["--l1", "0.5", "--decoder-hidden", "7", "--code-activation", "Softplus"],
        {"prior": "Laplace"},
    ),
    "sparse_activations_ae": (["--l1-activations", "0.02"], {"penalties": {"Activations": 0.02}}),
    "contractive_ae": (
        ["--contractive", "0.2", "--weight-decay", "0.01"],
        {"penalties": {"Contractive": 0.2, "WeightDecay": 0.01}},
    ),
    "denoising_ae": (["--noise", "0.5", "--mask", "0.1"], {"prior": "Flat"}),
    "rae": ([], {"prior": "StandardNormal", "penalties": {"WeightDecay": 0.001}}),
    "wae": (["--mmd", "3"], {"penalties": {"MMD": 3.0}}),
    "vq_vae": (
        ["--num-codes", "16", "--num-latents", "4", "--latent-dim", "2", "--commitment", "0.5"],
        {"guide": "NearestCode", "penalties": {"Commitment": 0.5}},
    ),
    "ae": (
        ["--l1-activations", "0.01", "--contractive", "0.1"],
        {"penalties": {"Activations": 0.01, "Contractive": 0.1}},
    ),
    "vae": (
        ["--salt-and-pepper", "0.1", "--contractive", "0.1"],
        {"guide": "MeanField", "penalties": {"Contractive": 0.1}, "likelihood": "binomial"},
    ),
}


@pytest.fixture(autouse=True)
def _single_precision() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("recipe", RUNS)
def test_each_recipe_trains_and_is_opened_again(recipe: str, tmp_path: Path) -> None:
    options, expected = RUNS[recipe]
    folder = tmp_path / "run"
    call("train", "--recipe", recipe, "--out", str(folder), *FAST, *options)
    resolved = json.loads((folder / "config.json").read_text())["resolved"]
    for name, value in expected.items():
        found = resolved[name]
        if isinstance(value, dict):
            assert found == pytest.approx(value)
        else:
            assert found == value
    _, vae, splits = open_run(folder, "cpu")
    x = splits.test.unlabelled().fixed().arrays[0][:5]
    assert vae.reconstruct(x).shape == (5, 64)
    if recipe == "sparse_ae":
        decoder, encoder = ([*p.modules()] for p in (vae.model.likelihood, vae.guide.posterior))
        assert [m.out_features for m in decoder if isinstance(m, torch.nn.Linear)] == [7, 64]
        assert any(isinstance(m, torch.nn.Softplus) for m in encoder)
    text = call("evaluate", str(folder), "-K", "5")
    if recipe == "vae":
        assert "sparsity" not in text
        return
    assert re.search(r"^  evidence: not defined, a point mass", text, re.MULTILINE)
    for word in ("log joint", "distortion", "sparsity", "sensitivity"):
        assert f"  {word} " in text
    assert "ELBO" not in text


def test_an_objective_by_option(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--objective", "DReG", "--num-particles", "3"]
    call("train", "--out", str(folder), *FAST, *options)
    config = Config.read(folder)
    assert repr(config.make_objective()) == "DReG(num_particles=3)"
    assert repr(Config(beta=4.0, warmup=2).make_objective()) == (
        "ELBO(beta=Warmup(length=2, unit='epochs', start=0.0, end=4.0))"
    )
    with pytest.raises(pvae.PvaeError, match=r"(?s)--beta: expected an option.*--objective elbo"):
        Config(objective="iwae", beta=2.0).make_objective()
    with pytest.raises(pvae.PvaeError, match="--objective: expected one of elbo, iwae"):
        call("train", "--objective", "vb", "--out", str(tmp_path / "other"))
    with pytest.raises(pvae.PvaeError, match="a point mass"):
        call("train", "--recipe", "ae", "--objective", "iwae", "--out", str(tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def test_a_linear_decoder_by_option(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    call("train", "--recipe", "ae", "--decoder-hidden", "linear", "--out", str(folder), *FAST)
    config, vae, _ = open_run(folder, "cpu")
    assert config.decoder_hidden == ()
    assert sum(isinstance(m, torch.nn.Linear) for m in vae.model.likelihood.modules()) == 1
    with pytest.raises(pvae.PvaeError, match="--decoder-hidden: expected widths"):
        call("train", "--decoder-hidden", "flat", "--out", str(tmp_path / "other"))
    with pytest.raises(pvae.PvaeError, match="--code-activation: expected the name"):
        call("train", "--recipe", "ae", "--code-activation", "Re", "--out", str(tmp_path / "other"))


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    torch.set_default_dtype(torch.float32)
    call("train", "--recipe", "denoising_ae", "--noise", "0.3", "--out", str(folder), *FAST)
    return folder


def test_an_autoencoder_is_sampled_with_a_density(
    denoiser: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["pvae", "sample", str(denoiser)])
    with pytest.raises(SystemExit):
        pvae.cli.main()
    assert "a proper prior to draw z from" in capsys.readouterr().err
    for density in ("gaussian", "gmm"):
        to = str(tmp_path / f"{density}.npy")
        call("sample", str(denoiser), "--density", density, "-n", "20", "--mean", "--to", to)
        x = np.load(to)
        assert x.shape == (20, 64)
        assert x.std(0).max() > 0.01
    with pytest.raises(pvae.PvaeError, match="gaussian or gmm"):
        call("sample", str(denoiser), "--density", "flow")


def test_restoring_corrupted_data(denoiser: Path, run_of_a_vae: Path, tmp_path: Path) -> None:
    to = str(tmp_path / "y.npy")
    call("reconstruct", str(denoiser), "--corrupt", "--seed", "3", "--to", to)
    first = np.load(to)
    call("reconstruct", str(denoiser), "--corrupt", "--seed", "3", "--to", to)
    np.testing.assert_array_equal(first, np.load(to))
    call("reconstruct", str(denoiser), "--to", to)
    assert (first != np.load(to)).any()
    with pytest.raises(pvae.PvaeError, match="trained with a corruption"):
        call("reconstruct", str(run_of_a_vae), "--corrupt")


@pytest.fixture(scope="module")
def run_of_a_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "vae"
    torch.set_default_dtype(torch.float32)
    call("train", "--out", str(folder), *FAST)
    return folder


def test_salt_is_as_bright_as_the_data() -> None:
    """Counts up to 16 get salt of 16; values scaled to 1 get salt of 1."""
    for likelihood, high in (("binomial", 16.0), ("gaussian", 1.0)):
        config = Config(salt_and_pepper=0.5, likelihood=likelihood)
        vae = config.build(config.load_data())
        corruption = vae.guide.corruption
        assert isinstance(corruption, torch.nn.Module)
        assert float(corruption(torch.full((50, 64), 0.5)).max()) == high
        noisy = Config(noise=0.25, likelihood=likelihood)
        part = noisy.build(noisy.load_data()).guide.corruption
        assert str(part).count(f"sigma={0.25 * high:g}") == 1
