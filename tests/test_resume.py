"""Exact resume: killed at any moment, a training ends bit for bit as if it had never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae import checkpoint, guides, likelihoods, networks, priors, recipes
from pvae.errors import ArgumentError, CheckpointError, PvaeWarning

SCRIPT = Path(__file__).with_name("training_process.py")


def train(folder: Path, kind: str, kill_at: int | None = None) -> bool:
    """Runs the training, killing it with SIGKILL when a step starts; whether it finished."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(SCRIPT), str(folder), kind],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        for count, _ in enumerate(process.stdout, start=1):
            if count == kill_at:
                process.send_signal(signal.SIGKILL)
    return process.returncode == 0


def results(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "final.safetensors")


def history(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("array", (2, 4, 7, 8, 12)),
        ("tensor", (9,)),
        ("memmap", (9,)),
        ("dataset", (12, 6)),
        ("dynamic", (9, 5)),
    ],
)
def test_killed_and_resumed_is_as_if_never_stopped(
    kind: str, kills: tuple[int, ...], tmp_path: Path
) -> None:
    """Killed in the nth step of each start: before the first checkpoint, within an epoch, right
    after a checkpoint, in later epochs. There is a checkpoint every third step and every epoch."""
    assert train(tmp_path / "whole", kind)
    expected = results(tmp_path / "whole")
    for kill_at in kills:
        assert not train(tmp_path / "killed", kind, kill_at)
    assert train(tmp_path / "killed", kind)
    found = results(tmp_path / "killed")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert history(tmp_path / "killed") == history(tmp_path / "whole")


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """A partial file never takes the checkpoint's place, and doesn't disturb the next start."""
    assert train(tmp_path / "whole", "array")
    assert not train(tmp_path / "killed", "array", kill_at=13)
    partial = tmp_path / "killed" / ".checkpoint.safetensors.1.partial"
    partial.write_bytes(b"cut short")
    with (tmp_path / "killed" / "history.jsonl").open("a") as file:
        file.write('{"epoch": 2, "st')
    assert train(tmp_path / "killed", "array")
    for name, tensor in results(tmp_path / "whole").items():
        assert torch.equal(results(tmp_path / "killed")[name], tensor), name
    assert history(tmp_path / "killed") == history(tmp_path / "whole")


def pair() -> pvae.VAE:
    torch.manual_seed(0)
    return recipes.vae(6, 2, hidden=(8,))


def binary(n: int = 40) -> Tensor:
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(n)).round()


def fit(vae: pvae.VAE, folder: Path, epochs: int = 2, **options: object) -> pvae.Fit:
    x = options.pop("data", binary())
    settings: dict[str, Any] = {"batch_size": 16, "progress": False, "folder": folder, **options}
    return pvae.fit(vae, x, epochs=epochs, **settings)


def test_resume_in_process_with_more_epochs(tmp_path: Path, device: torch.device) -> None:
    whole, parts = pair(), pair()
    fit(whole, tmp_path / "whole", 5, device=device)
    fit(parts, tmp_path / "parts", 2, device=device)
    fresh = pair()
    torch.nn.init.zeros_(fresh.model.likelihood.get_parameter("network.layers.0.weight"))
    run = fit(fresh, tmp_path / "parts", 5, resume=True, device=device)
    assert [r["epoch"] for r in run.history] == list(range(5))
    for a, b in zip(fresh.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    again = fit(pair(), tmp_path / "parts", 5, resume=True, device=device)  # nothing left to do
    assert len(again.history) == 5


def test_the_global_generators_are_no_part_of_it(tmp_path: Path) -> None:
    fit(pair(), tmp_path / "run")
    before = torch.get_rng_state()
    fit(pair(), tmp_path / "run", 3, resume=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_resumes_at_epoch_ends(tmp_path: Path) -> None:
    def loader() -> DataLoader:
        return DataLoader(TensorDataset(binary()), batch_size=16, shuffle=True)

    def run(folder: str, epochs: int, *, resume: bool = False) -> pvae.VAE:
        vae = pair()
        pvae.fit(
            vae,
            loader(),
            epochs=epochs,
            folder=tmp_path / folder,
            resume=resume,
            progress=False,
        )
        return vae

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, resume=True)
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ArgumentError, match=r"pass loader\.dataset"):
        pvae.fit(whole, loader(), save_steps=3, progress=False)


# What is refused


def test_a_training_is_never_overwritten(tmp_path: Path) -> None:
    fit(pair(), tmp_path)
    content = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"resume=True, to go on with it"):
        fit(pair(), tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 3}, "seed: saved 0, now 3"),
        ({"lr": 0.5}, r"lr: saved 0\.001, now 0\.5"),
        ({"batch_size": 8}, "batch_size: saved 16, now 8"),
        ({"optimizer": torch.optim.RMSprop}, "optimizer: saved Adam, now RMSprop"),
        ({"data": binary(41)}, "num_rows: saved 40, now 41"),
    ],
)
def test_another_training_isnt_resumed(
    options: dict[str, object], words: str, tmp_path: Path
) -> None:
    fit(pair(), tmp_path)
    with pytest.raises(CheckpointError, match=words):
        fit(pair(), tmp_path, 3, resume=True, **options)


def test_another_pair_isnt_resumed(tmp_path: Path) -> None:
    fit(pair(), tmp_path)
    other = recipes.vae(6, 3, hidden=(8,))
    with pytest.raises(
        CheckpointError,
        match=r"model\.prior\.event_shape: saved \(2,\), now \(3,\)",
    ):
        fit(other, tmp_path, 3, resume=True)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (priors.Laplace(2, rate=1.0), priors.Laplace(2, rate=1.01), r"rate: .*1\.0.*1\.01"),
        (priors.StudentT(2, df=3.0), priors.StudentT(2, df=4.0), r"df: .*3\.0.*4\.0"),
        (
            dist.Normal(torch.zeros(2), 1.0).to_event(1),
            dist.Normal(torch.zeros(2), 2.0).to_event(1),
            r"scale: .*1\.0.*2\.0",
        ),
    ],
    ids=["laplace", "student", "instance"],
)
def test_a_part_with_another_number_isnt_resumed(
    first: object, second: object, words: str, tmp_path: Path
) -> None:
    """A checkpoint would put the first pair's buffers in the second one's place."""

    def vae(prior: object) -> pvae.VAE:
        return pvae.VAE(
            prior,
            likelihoods.Bernoulli(networks.MLP(2, 6, (8,)), 6),
            guides.MeanField(networks.MLP(6, 4, (8,)), 2),
        )

    fit(vae(first), tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.prior\..*" + words):
        fit(vae(second), tmp_path, 3, resume=True)
    fit(vae(first), tmp_path, 3, resume=True)


def test_another_machine_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(pair(), tmp_path)
    here = checkpoint.environment
    monkeypatch.setattr(checkpoint, "environment", lambda d: {**here(d), "threads": 99})
    with pytest.warns(PvaeWarning, match="not bit for bit as before: threads was 1, is 99"):
        fit(pair(), tmp_path, 3, resume=True)


def test_resume_needs_a_folder() -> None:
    vae = pair()
    with pytest.raises(ArgumentError, match="resume"):
        pvae.fit(vae, binary(), resume=True)


def test_truncated_foreign_and_tampered_files(tmp_path: Path) -> None:
    fit(pair(), tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    content = path.read_bytes()

    def refused(new: bytes, words: str) -> None:
        path.write_bytes(new)
        with pytest.raises(CheckpointError, match=words):
            fit(pair(), tmp_path, 3, resume=True)

    refused(content[: len(content) // 2], "a safetensors file; got SafetensorError")
    refused(b"", "a safetensors file")
    refused(b"\x80\x04K\x01.", "a safetensors file")  # a pickle is never opened
    tampered = bytearray(content)
    tampered[-1] ^= 1
    refused(bytes(tampered), "content that matches its digest")
    refused(content.replace(b'\\"seed\\": 0', b'\\"seed\\": 1'), "matches its digest")
    from safetensors.torch import save

    refused(save({"a": torch.zeros(3)}), "a checkpoint that pvae wrote")
    refused(content.replace(b'"pvae_format":"1"', b'"pvae_format":"9"'), "format 1; got format 9")
    path.write_bytes(content)
    fit(pair(), tmp_path, 3, resume=True)


# Loading


def test_load_gives_the_pair_back(tmp_path: Path, device: torch.device) -> None:
    vae = pair()
    run = fit(vae, tmp_path / "run", device=device)
    run.save(tmp_path / "elsewhere.safetensors")
    for path in (tmp_path / "run", tmp_path / "elsewhere.safetensors"):
        other = recipes.vae(6, 2, hidden=(8,)).to(device)
        meta = pvae.load_parameters(other, path)
        assert meta["progress"]["epoch"] == 2
        for a, b in zip(other.parameters(), vae.parameters(), strict=True):
            assert torch.equal(a, b)


def test_load_takes_the_best_epoch(tmp_path: Path, device: torch.device) -> None:
    vae = pair()
    fit(vae, tmp_path, 60, lr=3e-2, valid=binary(9), patience=3, device=device)
    other = pair().to(device)
    pvae.load_parameters(other, tmp_path)
    for a, b in zip(other.parameters(), vae.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("store")
def test_load_into_functions(tmp_path: Path, device: torch.device) -> None:
    from tests import pairs

    model, guide, batch = pairs.functions(device)
    run = pvae.fit((model, guide), batch, epochs=2, folder=tmp_path, progress=False, device=device)
    expected = {k: v.detach().clone() for k, v in run.structure.parameters.items()}
    for parameter in run.structure.parameters.values():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(CheckpointError, match="batch to trace"):
        pvae.load_parameters((model, guide), tmp_path)
    pvae.load_parameters((model, guide), tmp_path, batch)
    for name, parameter in run.structure.parameters.items():
        assert torch.equal(parameter, expected[name])


def test_nothing_in_a_run_is_a_pickle(tmp_path: Path) -> None:
    fit(pair(), tmp_path, valid=binary(8))
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["checkpoint.safetensors", "history.jsonl"]
    saved = checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert {k.split(".")[0] for k in saved.tensors} == {
        "param",
        "buffer",
        "optimizer",
        "rng",
        "sums",
    }
    assert saved.meta["settings"]["engine"] == "eager"


def test_every_generator_is_saved(tmp_path: Path) -> None:
    """NumPy's and Python's, too, which a user's own code may draw from."""
    import random

    class Drawing(pvae.Guide):
        def forward(self, x: Tensor, *context: Tensor) -> Tensor:
            if self.training:
                x = x + np.random.normal() + random.gauss(0.0, 1.0)  # noqa: NPY002
            return super().forward(x, *context)

    def drawing() -> pvae.VAE:
        vae = pair()
        vae.guide.__class__ = Drawing
        return vae

    whole = drawing()
    fit(whole, tmp_path / "whole", 4)
    fit(drawing(), tmp_path / "parts", 2)
    parts = drawing()
    fit(parts, tmp_path / "parts", 4, resume=True)
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
