"""docs/cluster.md's programs, run by a stand-in for the scheduler in two processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pvae
from pvae import checkpoint
from pvae.cli import app

ROOT = Path(pvae.__file__).parent.parent
PAGE = ROOT / "docs" / "cluster.md"
PATIENCE = 240.0

COMMANDS = {
    "srun": 'for _ in $(seq $SLURM_NNODES); do setsid "$@" & echo $! >>"$STATE/step"; done; wait',
    "scancel": 'for one in $(cat "$STATE/step"); do kill -TERM -- "-$one"; done; rm "$STATE/step"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$2" >"$STATE/queue"; fi',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}
"""Slurm's, for a job that is alone on this machine; a node is a process group."""


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(text)


def environment(folder: Path) -> dict[str, str]:
    commands = folder / "bin"
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "STATE": str(folder),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "2",
    }


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


OPTIONS = ["--recipe", "ae", "--hidden", "16", "--device", "cpu", "--lr", "1e-2", "--epochs"]


@pytest.mark.slow
@pytest.mark.float32
def test_a_slurm_job_saves_is_requeued_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """The signal comes within an epoch, the second one or later; all epochs are there at the end.

    The oracle is one process that is never interrupted.
    """
    (tmp_path / "train.sh").write_text(block("bash"))
    folder, many = tmp_path / "run", "40"
    command = ["bash", str(tmp_path / "train.sh"), str(folder), *OPTIONS, many]
    pipe, variables = subprocess.PIPE, environment(tmp_path)
    with subprocess.Popen(command, env=variables, text=True, stderr=pipe) as job:
        wait_for((folder / "history.jsonl").exists, job)
        job.send_signal(signal.SIGUSR1)
        _, errors = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, errors
    assert "SIGTERM: the training ends here" in errors
    assert (tmp_path / "queue").read_text().strip() == variables["SLURM_JOB_ID"]
    saved = checkpoint.load(folder / "checkpoint.safetensors").meta["progress"]
    assert 1 <= saved["epoch"] < int(many), "the signal came too late"
    done = subprocess.run(command, env=variables, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (folder / "history.jsonl").read_text().splitlines()
    epochs = [json.loads(line)["epoch"] for line in lines]
    assert epochs == list(range(int(many)))
    alone = CliRunner().invoke(app, ["train", *OPTIONS, many, "--out", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    one, two = (checkpoint.load(f / "checkpoint.safetensors") for f in (tmp_path / "one", folder))
    for name, tensor in one.part("param").items():
        torch.testing.assert_close(two.part("param")[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.float32
def test_a_submitit_job_is_requeued_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is the same program, never interrupted."""
    submitit = pytest.importorskip("submitit", reason="needs submitit")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names: dict[str, object] = {"__name__": "__page__"}
    exec(compile(block("python"), str(PAGE), "exec"), names)  # noqa: S102
    training: Callable[..., object] = names["Training"]  # type: ignore[assignment]
    results = []
    for name in ("whole", "interrupted"):
        folder = tmp_path / name
        executor = submitit.LocalExecutor(tmp_path / f"{name}-jobs")
        executor.update_parameters(tasks_per_node=2, timeout_min=5)
        job = executor.submit(training(folder, epochs=60))
        if name == "interrupted":
            end = time.monotonic() + PATIENCE
            while not (folder / "history.jsonl").exists():
                assert not job.done(), job.results()
                assert time.monotonic() < end
                time.sleep(0.05)
            for task in _tasks_of(int(job.job_id)):
                os.kill(task, signal.SIGUSR2)
        results.append(job.results())
    assert results[0] == results[1]
    assert "Caught signal SIGUSR2" in job.stderr()


def _tasks_of(controller: int) -> list[int]:
    """The processes that submitit's controller has started."""
    found = Path(f"/proc/{controller}/task/{controller}/children").read_text()
    return [int(number) for number in found.split()]
