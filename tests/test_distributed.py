"""Several processes: torchrun starts two on gloo, and what they do is what one process does."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import pvae
from pvae import bounds, checkpoint, distributed, objectives, recipes
from pvae import terms as t
from pvae.cli import app, training
from pvae.data import Batches, Data, as_source
from pvae.distributed import World
from pvae.errors import PvaeWarning
from pvae.objectives.table import ALL
from tests import distributed_process as process

SCRIPT = Path(process.__file__)
ROOT = Path(pvae.__file__).parent.parent


def launch(
    *arguments: str, restarts: int = 0, output: int | IO[str], **variables: str
) -> subprocess.Popen[str]:
    """Starts the script in two processes."""
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", f"--max-restarts={restarts}", str(SCRIPT), *arguments),
        ],
        stdout=output,
        stderr=output,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            **variables,
        },
    )


def torchrun(*arguments: str, restarts: int = 0, **variables: str) -> str:
    """Runs the script in two processes, and returns what they print."""
    with launch(*arguments, restarts=restarts, output=subprocess.PIPE, **variables) as done:
        output, errors = done.communicate()
    assert done.returncode == 0, errors[-6000:]
    return output


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of everything that two processes do in one go."""
    folder = tmp_path_factory.mktemp("together")
    torchrun("together", str(folder))
    return folder


def found(folder: Path, scenario: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of the two processes wrote."""
    one, two = (json.loads((folder / f"{scenario}.{rank}.json").read_text()) for rank in (0, 1))
    return one, two


def weights(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    one, two = (load_file(folder / f"{name}.{rank}.safetensors") for rank in (0, 1))
    return one, two


def without_time(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Two processes are one


@pytest.mark.slow
def test_two_processes_are_one(together: Path) -> None:
    """Uneven parts, a process without rows, clipped gradients, penalties, early stopping."""
    ae, run = process.fit_autoencoder()
    first, second = found(together, "equal")
    for of_two in (first["history"], second["history"]):
        assert len(of_two) == len(run.history) == process.EPOCHS
        for mine, theirs in zip(run.history, of_two, strict=True):
            assert mine.keys() == theirs.keys()
            assert "penalty" in mine
            for name in mine.keys() - {"seconds"}:
                expected = mine[name] if mine[name] is None else pytest.approx(mine[name], rel=1e-6)
                assert theirs[name] == expected, name
    assert min(run.history["grad_norm"]) > 0.5  # so that it was clipped
    one, two = weights(together, "equal")
    assert same(one, two)
    for name, tensor in ae.state_dict().items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-6, atol=1e-9)
    assert sorted(p.name for p in (together / "equal").iterdir()) == [
        "checkpoint.safetensors",
        "history.jsonl",
    ]
    lines = (together / "equal" / "history.jsonl").read_text().splitlines()
    assert without_time([json.loads(x) for x in lines]) == without_time(first["history"])


@pytest.mark.slow
def test_compiled_steps_are_the_same(together: Path) -> None:
    run = process.plain(engine="eager")
    for of_two in found(together, "others"):
        assert of_two["engine"] == "compiled"
        assert of_two["loss"] == pytest.approx(run.history["loss"], rel=1e-6)
    saved = checkpoint.load(together / "saved.safetensors")
    assert saved.meta["environment"]["processes"] == 2


@pytest.mark.slow
def test_every_row_is_seen_once_an_epoch(together: Path) -> None:
    one, two = (process["batches"] for process in found(together, "seen"))
    each = -(-process.N // 9)
    assert len(one) == 2 * each
    assert len(two) == 2 * (each - 1)  # of the last batch there is a single row
    for start, of_two in ((0, 0), (each, each - 1)):
        seen = [*one[start : start + each], *two[of_two : of_two + each - 1]]
        assert sorted(row for batch in seen for row in batch) == list(range(process.N))
    assert one[:each] != one[each:]


@pytest.mark.slow
def test_draws_differ_and_the_loss_falls(together: Path) -> None:
    """The data are one row, repeated, so that the processes' draws differ by their noise alone."""
    one, two = found(together, "draws")
    assert len(one["drawn"]) == len(two["drawn"]) == 80
    assert not {z[0] for z in one["drawn"]} & {z[0] for z in two["drawn"]}
    for losses in (one["loss"], two["loss"]):
        assert losses[-1] < 0.5 * losses[0]
    assert one["loss"] == two["loss"]
    assert one["binary"] != two["binary"]


@pytest.mark.slow
def test_the_validation_number_is_that_of_one_process(together: Path) -> None:
    pair = process.stochastic_pair()
    one, two = weights(together, "whole")
    assert same(one, two)
    pair.load_state_dict(one)
    bound = bounds.elbo(pair, process.rows(11).round(), seed=0)
    assert bound.rate is not None
    for of_two in found(together, "stochastic"):
        last = of_two["history"][-1]
        assert last["valid_elbo"] == bound.mean
        assert last["valid_rate"] == bound.rate.mean


@pytest.mark.slow
def test_a_row_that_breaks_the_loss_stops_all_processes(together: Path) -> None:
    one, two = found(together, "infinite")
    assert "epoch 0, batch 2" in one["error"]
    assert "isn't finite at site 'x'" in one["error"]
    assert one == two
    assert math.isfinite(sum(torch.tensor(p).sum() for p in one["weights"]))


# What several processes refuse


REFUSED = {
    "batch norm": "BatchNorm1d.*nn.LayerNorm",
    "centred": "terms of the first row that change with other rows",
    "buffer": "no buffers that training moves.*'Counting.steps'",
    "optimal sigma": "site 'x'.*a density that all rows of the batch share",
    "MMD": "got MMD",
    "codebook": "'NearestCode.codes'",
    "TCVAE": "a mean over data.*TCVAE",
    "FactorVAE": "a mean over data.*FactorVAE",
    "InfoVAE": "a mean over data.*InfoVAE",
    "DIPVAE": "a mean over data.*DIPVAE",
    "FreeBits": "a mean over data.*FreeBits",
    "Capacity": "a mean over data.*Capacity",
    "GECO": "learns nothing by itself.*GECO",
    "baseline": "learns nothing by itself.*moving_average",
    "RenyiELBO": "an objective of pvae's.*RenyiELBO",
    "loader": "pass loader.dataset",
    "few rows": "at least a row for each of 2 processes; got 1",
    "subsample_drawn": "one that subsamples by itself",
    "unscaled global": "site 'outside'.*once in each process",
}
TAKEN = {
    *("layer norm", "shared sigma", "IWAE", "DReG", "denoising", "TraceMeanField_ELBO"),
    *("global_latent", "autoguide", "two_sites", "subsample_given"),
}


@pytest.mark.slow
def test_what_several_processes_refuse(together: Path) -> None:
    for messages in found(together, "refusals"):
        assert messages.keys() == REFUSED.keys() | TAKEN
        for name, words in REFUSED.items():
            assert_matches(words, messages[name])
        assert {messages[name] for name in TAKEN} == {"nothing"}


@pytest.mark.slow
def test_processes_that_were_called_with_different_things(together: Path) -> None:
    one, two = found(together, "disagreements")
    assert_matches(r"process 0: .* process 1: batch_size 10; got batch_size 9", one["batch size"])
    assert_matches(r"process 1: .* process 0: batch_size 9; got batch_size 10", two["batch size"])
    assert_matches(r"expected the same as in process \d: data ", one["data"])
    assert_matches(r"hidden \(8,\).* got .*hidden \(9,\)", two["widths"])


def assert_matches(words: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        raise RuntimeError(message)


# Killed and restarted


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_nothing_is_lost(
    together: Path, tmp_path: Path
) -> None:
    """SIGKILL in the third epoch, a step after a checkpoint; torchrun starts all workers anew."""
    torchrun("killed", str(tmp_path), restarts=1, DIE=str(tmp_path / "died"))
    assert (tmp_path / "died").exists()
    whole, _ = weights(together, "whole")
    for state in weights(tmp_path, "killed"):
        assert same(state, whole)
    texts = [(f / "history.jsonl").read_text() for f in (together / "whole", tmp_path / "killed")]
    one, two = (without_time([json.loads(x) for x in text.splitlines()]) for text in texts)
    assert one == two
    saved = [checkpoint.load(f / "checkpoint.safetensors") for f in (together / "whole",
             tmp_path / "killed")]  # fmt: skip
    assert same(saved[0].tensors, saved[1].tensors)
    assert {name.split(".")[0] for name in saved[0].tensors} >= {"rng", "rng1"}


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_workers_stop_when_their_launcher_is_killed(tmp_path: Path) -> None:
    """And the folder is then another's, whose training goes on."""
    folder, notes = tmp_path / "endless", [tmp_path / f"process.{rank}" for rank in (0, 1)]
    with (tmp_path / "said").open("w") as said:
        launcher = launch("endless", str(tmp_path), output=said)
        try:
            wait_until((folder / "checkpoint.safetensors").exists)
        finally:
            launcher.kill()
            launcher.wait()
    workers = [int(note.read_text()) for note in notes]
    wait_until(lambda: not any(map(is_running, workers)), seconds=20)
    assert "the process that started this one is gone" in (tmp_path / "said").read_text()
    done = checkpoint.load(folder / "checkpoint.safetensors").meta["progress"]["epoch"]
    with pytest.warns(PvaeWarning, match="processes was 2, is 1"):
        _, run = process.fit_stochastic(folder, epochs=done + 1)
    assert len(run.history) == done + 1
    assert not (folder / ".lock").exists()


CHILD = """
import multiprocessing, os, sys, time
def work():
    from pvae import distributed
    distributed.stop_with_launcher()
    print(os.getpid(), flush=True)
    time.sleep(600)
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=work)
    child.start()
    child.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_a_worker_of_multiprocessing_stops_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(CHILD)
    command, environment = [sys.executable, "parent.py"], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.kill()
    wait_until(lambda: not is_running(worker), seconds=20)


def test_a_process_that_nobody_launched_isnt_watched() -> None:
    before = threading.active_count()
    distributed.stop_with_launcher()
    assert threading.active_count() == before


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_other_draws(
    together: Path, tmp_path: Path
) -> None:
    shutil.copytree(together / "whole", tmp_path / "whole")
    with pytest.warns(PvaeWarning, match="not bit for bit as before: processes was 2, is 1"):
        _, run = process.fit_stochastic(tmp_path / "whole", epochs=6)
    assert [record["epoch"] for record in run.history] == list(range(6))
    before = (together / "whole" / "history.jsonl").read_text().splitlines()
    assert list(run.history)[:4] == [json.loads(line) for line in before]


FAST = ["--recipe", "ae", "--hidden", "16", "--epochs", "3", "--device", "cpu", "--lr", "1e-2"]


@pytest.mark.slow
@pytest.mark.float32
def test_the_command_line_restarts_by_itself(tmp_path: Path) -> None:
    """Its second process is killed in the second epoch; the result is that of one process."""
    folder = tmp_path / "two"
    output = torchrun("cli", str(tmp_path), "train", *FAST, "--out", str(folder), restarts=1)
    assert (tmp_path / "died").exists()
    assert output.count("pvae ae on digits") == 1  # the first process alone talks
    alone = CliRunner().invoke(app, ["train", *FAST, "--out", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    one, two = (checkpoint.load(f / "checkpoint.safetensors") for f in (tmp_path / "one", folder))
    for name, tensor in one.part("param").items():
        torch.testing.assert_close(two.part("param")[name], tensor, rtol=1e-3, atol=1e-4)
    assert two.meta["progress"]["epoch"] == 3
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


def test_a_restart_goes_on_with_the_jobs_own_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restarted(*, resume: bool = False, overwrite: bool = False) -> tuple[bool, bool]:
        return training.restarted(tmp_path, resume=resume, overwrite=overwrite)

    def checkpoint_of(job: str) -> None:
        one = checkpoint.Checkpoint({"param.w": torch.ones(1)}, {"job": job})
        checkpoint.save(tmp_path / "checkpoint.safetensors", one)

    config = tmp_path / "config.json"
    config.write_text('{"job": "mine"}')
    assert restarted() == (False, False)  # not started by torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert restarted() == (False, False)  # the first start
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted() == (False, True)  # killed before the first checkpoint
    assert restarted(resume=True) == (True, False)
    checkpoint_of("another")
    assert restarted(overwrite=True) == (False, True)  # which it hadn't replaced yet
    checkpoint_of("mine")
    assert restarted() == restarted(overwrite=True) == (True, False)
    config.write_text('{"job": "another"}')
    assert restarted() == (False, False)
    assert restarted(overwrite=True) == (False, True)
    config.unlink()
    assert restarted() == (False, False)


def test_a_job_is_named_by_its_own_call_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert distributed.job() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert distributed.job() is None
    path = "/tmp/torchelastic_a/none_b/attempt_1/0/error.json"  # noqa: S108
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
    assert distributed.job() == "none_b"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night")
    assert distributed.job() == "night"


# Parts


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_everything_once(size: int) -> None:
    for rows in range(12):
        parts = [World(rank, size).share(rows) for rank in range(size)]
        assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
        lengths = [part.stop - part.start for part in parts]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] - lengths[-1] <= 1
        assert World(0, size).shares(rows) == set(lengths) - {0}


@pytest.mark.parametrize("shuffle", [True, False])
def test_parts_of_batches_are_the_batches(shuffle: bool) -> None:
    source = as_source(torch.arange(23), dtype=torch.float64)
    whole = Batches(source, 11, 5, shuffle=shuffle)
    parts = [Batches(source, 11, 5, shuffle=shuffle, world=World(r, 3)) for r in range(3)]
    for epoch in range(2):
        for batch, *own in zip(whole.epoch(epoch), *(p.epoch(epoch) for p in parts), strict=True):
            assert torch.equal(torch.cat([x[0] for x in own if x]), batch[0])
    assert [len(x) for x in parts[2].epoch(0)] == [1, 1, 0]  # the last batch is of one row


def test_a_process_alone_has_the_seed_and_binarisation_that_it_had() -> None:
    assert World().seed(7) == 7
    assert len({World(rank, 3).seed(7) for rank in range(3)}) == 3
    data = Data((torch.full((8, 2), 0.5),), binarize="dynamic")
    alone, first = (Batches(as_source(data), 4, world=w) for w in (None, World(0, 1)))
    for a, b in zip(alone.epoch(0), first.epoch(0), strict=True):
        assert torch.equal(a[0], b[0])


def test_without_torchrun_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with distributed.joined() as world:
        assert world == World() == distributed.current()
    total, [mean] = world.mean(3, [torch.tensor([1.0, 2.0])])
    assert total == 3
    torch.testing.assert_close(mean, torch.tensor([1.0, 2.0]))


def test_processes_that_train_apart_are_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    ae = process.autoencoder()
    with pytest.warns(PvaeWarning, match=r"each trains by itself.*distributed\.joined"):
        pvae.fit(ae, process.rows(), epochs=1, progress=False)


def made(kind: Callable[..., objectives.Objective]) -> objectives.Objective:
    """An objective with an argument where it needs one."""
    required = {"capacity": 0.1, "tolerance": 3.0}
    known = inspect.signature(kind).parameters
    floor = {"floor": 0.01} if "floor" in known else {}
    return kind(**{k: v for k, v in required.items() if k in known}, **floor)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_objectives_say_whether_they_couple_data(kind: type[objectives.Objective]) -> None:
    """Loss and gradients of the whole, and the mean of its parts', at the same draws."""
    torch.manual_seed(0)
    pair, x = recipes.vae(process.D, process.Q, hidden=(8,)), process.rows(9).round()
    structure, objective = pair.inspect((x,)), made(kind)
    parameters = list(structure.parameters.values())
    state = objective.make_state(structure, len(x), 1, 1)
    learns, k = bool(state.tensors()), objective.num_draws
    z = t.compute(pair.inspect(x), x, num_particles=k).sites["z"].value
    assert z is not None

    def numbers(part: slice) -> Tensor:
        terms = t.compute(
            structure,
            x[part],
            num_particles=k,
            given={"z": z[:, part].detach() if k > 1 else z[0, part].detach()},
            **cast("Any", dict.fromkeys(objective.pass_options, True)),
        )
        loss = objective.surrogate(terms, state)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([loss.detach()[None], *(g.reshape(-1) for g in found)])

    whole, parts = numbers(slice(0, 9)), numbers(slice(0, 5)) + numbers(slice(5, 9))
    if learns:  # which is refused by itself, whatever the loss is
        assert kind in (objectives.GECO, objectives.FactorVAE)
    elif objective.couples_data:
        assert (whole - parts).norm() > 1e-3 * whole.norm()
    else:
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
