"""Trouble with files: one line, the last good checkpoint unharmed, everything as it was found."""

from __future__ import annotations

import errno
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
from torch import Tensor

import pvae
from pvae import checkpoint, recipes
from pvae.errors import FileError
from pvae.files import write_atomically
from pvae.lock import Owner

ROOT = Path(pvae.__file__).parent.parent


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# One file


@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_what_fails_while_it_is_written_leaves_the_old_file(
    function: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "x", b"old")

    def fails(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os if function == "fsync" else Path, function, fails)
    with pytest.raises(FileError, match=os.strerror(number)):
        write_atomically(tmp_path / "x", b"new")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_folder_that_cant_be_synchronised_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synchronise = os.fsync

    def files_alone(number: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{number}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, "Invalid argument")
        synchronise(number)

    monkeypatch.setattr(os, "fsync", files_alone)
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


# A training in Python


def pair() -> pvae.VAE:
    torch.manual_seed(0)
    return recipes.vae(6, 2, hidden=(8,))


def binary(n: int = 40) -> Tensor:
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(n)).round()


def fit(vae: pvae.VAE, folder: Any, epochs: int = 2, **options: Any) -> pvae.Fit:
    settings: dict[str, Any] = {"batch_size": 16, "progress": False, "folder": folder, **options}
    return pvae.fit(vae, binary(), epochs=epochs, **settings)


def places(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Folders that can't be, and what is said of them."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "a file": (tmp_path / "file", "expected a folder; got a file"),
        "below a file": (tmp_path / "file" / "x", "got Not a directory"),
        "a dangling link": (tmp_path / "link", "a link to .*nowhere, which isn't there"),
        "below one": (tmp_path / "link" / "x", "got "),
        "a loop of links": (tmp_path / "loop", "got "),
        "a long name": (tmp_path / ("x" * 300), "got File name too long.\n  Try: a shorter name"),
        "a long path": (tmp_path.joinpath(*["x" * 200] * 30), "got File name too long"),
        "bytes": (tmp_path / os.fsdecode(b"\xff"), "a name that is text in UTF-8"),
        "the system's": (Path("/proc/pvae"), "expected a folder that can be made"),
    }


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_folders_that_cant_be(options: dict[str, Any], tmp_path: Path) -> None:
    for name, (folder, words) in places(tmp_path).items():
        vae = pair()
        before = [p.clone() for p in vae.parameters()]
        with pytest.raises(FileError, match=words):
            fit(vae, folder, **options)
        assert all(map(torch.equal, before, vae.parameters())), name
    assert {p.name for p in tmp_path.iterdir()} == {"file", "link", "loop"}
    assert (tmp_path / "file").read_text() == "mine"


def test_a_refused_training_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(pvae.PvaeError):
        fit(pair(), tmp_path / "a" / "b", valid=torch.ones(3, 7))
    assert not list(tmp_path.iterdir())


TROUBLE: dict[str, Callable[[Path], object]] = {
    "removed": lambda folder: shutil.rmtree(folder),
    "moved": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "a file now": lambda folder: folder.rename(folder.with_name("b")).with_name("run").touch(),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_a_folder_that_goes_in_a_training(name: str, tmp_path: Path) -> None:
    """The pair keeps its steps, in the mode it had; generators are as they were."""
    folder, vae, steps = tmp_path / "run", pair().eval(), []

    def act(*_: object) -> None:
        steps.append(1)
        if len(steps) == 10:
            TROUBLE[name](folder)

    vae.guide.register_forward_hook(act)
    state, before = torch.get_rng_state(), [p.clone() for p in vae.parameters()]
    with pytest.raises(FileError, match="the folder that this training has begun"):
        fit(vae, folder, 9)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in vae.modules())
    assert not any(map(torch.equal, before, vae.parameters()))
    assert not folder.is_dir()


def test_a_full_disk_at_every_write_harms_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nth write fails, for every n; what resumes is as if nothing had been."""
    whole = pair()
    fit(whole, tmp_path / "whole", 2, save_steps=2)
    calls, count = [0], 0
    synchronise = os.fsync
    while True:
        folder = tmp_path / f"run{(count := count + 1)}"
        calls[0] = 0

        def failing(number: int) -> None:
            calls[0] += 1
            if calls[0] == count:
                full()
            synchronise(number)

        monkeypatch.setattr(os, "fsync", failing)
        try:
            fit(pair(), folder, 2, save_steps=2)
        except FileError as error:
            assert "No space left on device" in str(error)  # noqa: PT017
            left = {p.name for p in folder.glob("*")} if folder.exists() else set()
            assert left <= {"checkpoint.safetensors", "history.jsonl"}
            if "checkpoint.safetensors" in left:
                checkpoint.load(folder / "checkpoint.safetensors")
        else:
            break
        finally:
            monkeypatch.undo()
        resumed = pair()
        fit(resumed, folder, 2, save_steps=2, resume=True)
        assert all(map(torch.equal, resumed.parameters(), whole.parameters()))
    assert count > 6


def test_a_training_that_cant_begin_leaves_the_one_it_was_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(pair(), tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="free some room"):
        fit(pair(), tmp_path, seed=1, overwrite=True)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    fit(pair(), tmp_path, 3, resume=True)


# The command line


def command(*arguments: str | bytes, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pvae", *arguments],
        capture_output="stdout" not in options,
        encoding="utf-8",
        errors="surrogateescape",
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        **options,
    )


TRAIN = ("train", "--data", "x.npy", "--hidden", "4", "--latent-dim", "1", "--epochs", "2")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((60, 4), dtype=np.float32))
    return tmp_path


@pytest.mark.slow
def test_a_limit_on_files_is_one_line(place: Path) -> None:
    """The system refuses what is longer than 4 KiB, as a quota or a full disk does."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = command(*TRAIN, "--device", "cpu", "--out", "run", cwd=place, preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr.startswith("pvae: run/checkpoint.safetensors: expected a file that can be ")
    assert len(done.stderr.splitlines()) == 1
    files = {p.name for p in (place / "run").iterdir()}
    assert files == {"config.json", "history.jsonl"}
    done = command("train", "--resume", "--device", "cpu", "--out", "run", cwd=place)
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(place / "run" / "checkpoint.safetensors").meta["progress"]["epoch"] == 2


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command in this process."""
    from pvae import cli

    monkeypatch.setattr(sys, "argv", ["pvae", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize("reading", ["train", "evaluate", "diagnose", "encode", "sample"])
def test_folders_that_cant_be_are_one_line(
    reading: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    for name, (folder, words) in places(place).items():
        arguments = (*TRAIN, "--out", str(folder)) if reading == "train" else (reading, str(folder))
        assert main(monkeypatch, *arguments) == 2, name
        said = capsys.readouterr().err
        assert said.startswith("pvae: "), name
        assert len(said.splitlines()) == 1
        if reading == "train":
            assert words.split("\n")[0].split(".*")[0] in said


@pytest.mark.float32
def test_a_run_killed_before_its_configuration_was_written_can_be_started_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "run").mkdir()
    (place / "run" / ".config.json.7.partial").write_text("{")
    (place / "run" / ".lock.0a1b2c3d4e5f6071.partial").write_text("{")
    gone = {"host": "here", "process": 2**31 - 1, "started": "1", "token": "a"}
    machine = Owner.here().machine
    (place / "run" / ".lock").write_text(json.dumps({**gone, "machine": machine}))
    assert main(monkeypatch, *TRAIN, "--out", "run") == 0
    assert not [p for p in (place / "run").iterdir() if p.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.float32
def test_a_warning_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert main(monkeypatch, *TRAIN, "--out", "run") == 0
    path = place / "run" / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    done = command("encode", "run", cwd=place)
    assert done.returncode == 0
    said = "seed was 0, is 1. What the run was trained with is used."
    assert done.stderr == f"pvae: run/config.json: {said}\n"


@pytest.mark.slow
def test_a_full_standard_output_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no such device")
    with Path("/dev/full").open("w") as output:
        done = command("doctor", cwd=ROOT, stdout=output, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == "pvae: the standard output, or a file: No space left on device\n"
