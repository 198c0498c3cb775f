"""One writer in a folder: who owns it, when an owner counts as dead, what a killed one has left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pvae import lock
from pvae.errors import FileError, PvaeWarning
from pvae.lock import NAME, Lock, Owner, held

ROOT = Path(lock.__file__).parent.parent

HOLD = """
import sys, pathlib
from pvae.lock import held
with held(pathlib.Path(sys.argv[1])):
    print("owned", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns the folder until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        try:
            yield process
        finally:
            process.kill()


def owner_of(folder: Path) -> Owner:
    found = Owner.of((folder / NAME).read_text())
    assert found is not None
    return found


@pytest.mark.slow
def test_of_two_processes_one_is_refused_until_the_other_has_ended(tmp_path: Path) -> None:
    with another(tmp_path) as process:
        words = f"process {process.pid} on host {os.uname().nodename}"
        with pytest.raises(FileError, match=words), held(tmp_path):
            pass
        process.communicate("")
    with held(tmp_path) as mine:
        assert owner_of(tmp_path) == mine.owner
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_owner_is_stepped_over_and_its_leftovers_go(tmp_path: Path) -> None:
    with another(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        time.sleep(0.1)  # it isn't waited for: as a zombie it still has its number
        left = [".config.json.7.partial", f".codes.npy.{process.pid}.partial", ".lock.ab.partial"]
        (tmp_path / "figures").mkdir()
        for name in (*left, "figures/.samples.png.99999999.partial", ".history.jsonl.1.partial"):
            (tmp_path / name).write_text("{")
        (tmp_path / ".codes.npy.1.partial").write_text("of a process that runs")
        (tmp_path / "notes.partial").write_text("a user's")
        with held(tmp_path):
            files = {p.name for p in tmp_path.rglob("*")}
    assert files == {NAME, ".codes.npy.1.partial", "notes.partial", "figures"}


def test_a_process_that_has_the_number_of_a_dead_owner_is_another(tmp_path: Path) -> None:
    with held(tmp_path) as mine:
        text = (tmp_path / NAME).read_text()
    started = json.loads(text)
    assert mine.owner.lives()
    parent = {**started, "process": os.getppid(), "started": "1"}
    (tmp_path / NAME).write_text(json.dumps(parent))
    with held(tmp_path):  # the parent runs, but has started at another time
        assert owner_of(tmp_path).process == os.getpid()
    real = {**parent, "started": lock._started(os.getppid())}
    (tmp_path / NAME).write_text(json.dumps(real))
    with pytest.raises(FileError, match=f"process {os.getppid()} "), held(tmp_path):
        pass


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "PATIENCE", 0.5)


def elsewhere(folder: Path, text: str | None = None) -> Path:
    """The file of an owner on another machine."""
    owner = {"host": "far", "process": 1, "started": "1", "machine": "another", "token": "t"}
    (folder / NAME).write_text(json.dumps(owner) if text is None else text)
    return folder / NAME


WAITS = "ignore:Waits up to:pvae.errors.PvaeWarning"


@pytest.mark.usefixtures("_quick")
@pytest.mark.filterwarnings(WAITS)
@pytest.mark.parametrize("text", [None, "", "{", "[1]", "[" * 3000, '{"process": -1}', "\0"])
def test_an_owner_elsewhere_lives_while_it_gives_signs(tmp_path: Path, text: str | None) -> None:
    path, over = elsewhere(tmp_path, text), threading.Event()

    def beat() -> None:
        while not over.wait(0.02):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    words = "process 1 on host far" if text is None else f"a process that {path} doesn't name"
    try:
        with pytest.raises(FileError, match=words), held(tmp_path):
            pass
    finally:
        over.set()
        beating.join()
    with held(tmp_path) as mine:  # no sign for half a second
        assert owner_of(tmp_path) == mine.owner


def test_an_owner_elsewhere_that_has_long_been_silent_isnt_waited_for(tmp_path: Path) -> None:
    path = elsewhere(tmp_path)
    long_ago = time.time() - lock.PATIENCE - 5
    os.utime(path, (long_ago, long_ago))
    started = time.monotonic()
    with held(tmp_path):
        assert time.monotonic() - started < 1


def test_who_waits_for_a_sign_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    elsewhere(tmp_path)
    with pytest.warns(PvaeWarning, match="a sign of life of process 1 on host far"), held(tmp_path):
        pass


@pytest.mark.usefixtures("_quick")
def test_an_owner_gives_signs_of_life(tmp_path: Path) -> None:
    with held(tmp_path):
        first = (tmp_path / NAME).stat().st_mtime_ns
        end = time.monotonic() + 5
        while (tmp_path / NAME).stat().st_mtime_ns == first:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_an_owner_that_was_stepped_over_writes_no_more(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder) as mine:
        mine.check()
        elsewhere(folder)
        with pytest.raises(FileError, match="process 1 on host far has taken over"):
            mine.check()
        (folder / NAME).unlink()
        with pytest.raises(FileError, match=r"got one without \.lock"):
            mine.check()
        folder.rmdir()
        with pytest.raises(FileError, match="it was moved or removed"):
            mine.check()
    elsewhere(tmp_path)
    mine.release()
    assert (tmp_path / NAME).exists()


def test_a_block_inside_of_another_has_the_same_lock(tmp_path: Path) -> None:
    with held(tmp_path / "run") as outer:
        with held(tmp_path / "x" / ".." / "run") as inner:
            assert inner is outer
        outer.check()
    assert not (tmp_path / "run").exists()


def test_of_many_that_find_a_dead_owner_one_gets_the_folder(tmp_path: Path) -> None:
    """Threads, each with a lock of its own, at the same moment."""
    refused, owners, lock_of = [], list[Lock](), threading.Barrier(8)
    for _ in range(5):
        path = elsewhere(tmp_path)
        os.utime(path, (0, 0))

        def take() -> None:
            lock_of.wait()
            try:
                owners.append(Lock(tmp_path))
            except FileError as error:
                refused.append(error)

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(owners) == 1
        owners.pop().release()
    assert len(refused) == 5 * 7
    assert not list(tmp_path.iterdir())


def test_without_links_the_file_is_made_exclusively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with held(tmp_path) as mine:
        assert owner_of(tmp_path) == mine.owner
        with pytest.raises(FileError, match=f"process {os.getpid()} "):
            Lock(tmp_path)


def test_a_link_that_a_network_repeats_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    with held(tmp_path) as mine:
        assert owner_of(tmp_path) == mine.owner
