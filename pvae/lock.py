"""One writer in a folder: a file that names the process which writes there.

The file is made by a hard link, which succeeds in one process alone, on a network's file system
too. An owner on this machine is dead when its process is, or when another process has its number
since. One on another machine gives a sign of life every few seconds, by the file's time: who wants
the folder compares that with the time that the folder's own file system gives to a new file.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from uuid import getnode

from pvae.distributed import World
from pvae.errors import FileError, warn
from pvae.files import make_folder, telling

__all__ = ["BEAT", "NAME", "PATIENCE", "Lock", "Owner", "held", "held_by_first"]

NAME = ".lock"
"""Name of the file in the folder."""

BEAT = 5.0
"""Seconds between an owner's signs of life."""

PATIENCE = 60.0
"""Seconds without one after which an owner on another machine counts as dead."""

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)


@dataclass(frozen=True)
class Owner:
    """A process, as the file names it.

    Attributes:
        host: Name of its machine.
        process: Its number there.
        started: When it started, as the system counts.
        machine: The running system and its table of processes, of which a host may have several.
        token: Tells two locks of one process apart.
    """

    host: str
    process: int
    started: str
    machine: str
    token: str

    def __str__(self) -> str:
        host = "".join(c if c.isprintable() else "?" for c in self.host[:80])
        return f"process {self.process} on host {host}"

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        started = _started(os.getpid()) or ""
        token = secrets.token_hex(8)
        return cls(platform.node(), os.getpid(), started, _machine(), token)

    @classmethod
    def of(cls, text: str) -> Owner | None:
        """The one that a file names; None if it names none."""
        with suppress(ValueError, TypeError, RecursionError):
            owner = cls(**json.loads(text))
            texts = (owner.host, owner.started, owner.machine, owner.token)
            is_number = type(owner.process) is int and 0 < owner.process < 2**31
            return owner if is_number and all(isinstance(x, str) for x in texts) else None
        return None

    def lives(self) -> bool | None:
        """Whether the process runs; None where that can't be told from here."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except OSError:  # another user's
            pass
        started = _started(self.process)
        return None if started is None else started == self.started


@cache
def _machine() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{platform.node()} {getnode():x}"


def _started(process: int) -> str | None:
    """When a process started; nothing if it has ended, None if the system doesn't say."""
    with suppress(OSError):
        text = Path(f"/proc/{process}/stat").read_text(errors="replace")
        state, *fields = text.rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    with suppress(OSError):
        asked = ["ps", "-o", "stat=,lstart=", "-p", str(process)]
        state, _, started = subprocess.run(
            asked, capture_output=True, text=True, check=False
        ).stdout.partition(" ")
        return None if not state or state.startswith("Z") else " ".join(started.split())
    return None


# Making the file


class Lock:
    """A folder's file, which this process has made.

    Arguments:
        folder: The folder, which is there.

    Raises:
        FileError: If another process owns the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.owner = folder, folder / NAME, Owner.here()
        self._over = threading.Event()
        with telling(folder, "a folder that can be written to"):
            while not self._make(self.path):
                self._step_over(self.path)
            _clear_partials(folder)
        self._beating = threading.Thread(target=self._beat, name="pvae lock", daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Refuses to write where the file is gone, or another process has taken the folder over.

        Raises:
            FileError: Which says what has happened to the folder.
        """
        text = _read(self.path)
        if text == self._text:
            return
        expected, other = "the folder that this training has begun", Owner.of(text or "")
        actual = "no such folder: it was moved or removed meanwhile"
        if self.folder.exists():
            actual = f"one that {other} has taken over" if other else f"one without {NAME}"
        raise FileError(str(self.folder), expected, actual, ["another folder"])

    def release(self) -> None:
        """Lets others have the folder."""
        self._over.set()
        self._beating.join()
        with suppress(OSError):
            if _read(self.path) == self._text:
                self.path.unlink()

    @property
    def _text(self) -> str:
        return json.dumps(asdict(self.owner))

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):
                if _read(self.path) == self._text:
                    os.utime(self.path)

    def _make(self, path: Path) -> bool:
        """Makes a file with this owner's name, if there is none."""
        partial = path.with_name(f"{NAME}.{self.owner.token}.partial")
        try:
            partial.write_text(self._text)
            os.link(partial, path)
        except FileExistsError:
            with suppress(FileNotFoundError):  # a network may repeat a request that has succeeded
                return partial.stat().st_nlink == 2
            return False
        except FileNotFoundError:  # cleared away by another owner, unless the folder is gone
            self.folder.stat()
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._make_plain(path)
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _make_plain(self, path: Path) -> bool:
        """The same where a file system has no links; for a moment the file is empty."""
        with suppress(FileExistsError), path.open("x") as file:
            file.write(self._text)
            return True
        return False

    # Taking it over

    def _step_over(self, path: Path) -> None:
        """Removes a dead owner's file; of several that want to, one at a time."""
        text = _read(path)
        if text is None:
            return
        if self._lives(path, text):
            owner = Owner.of(text) or f"a process that {path} doesn't name"
            expected = "a folder in which no other training writes"
            fixes = ["wait until that has ended, or stop it", "another folder"]
            raise FileError(str(self.folder), expected, f"that of {owner}", fixes)
        guard = path.with_name(f"{NAME}.guard")
        if not self._make(guard):
            held = _read(guard)
            if held is not None and not self._lives(guard, held):
                guard.unlink(missing_ok=True)
            time.sleep(0.01)
            return
        try:
            if _read(path) == text:
                path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def _lives(self, path: Path, text: str) -> bool:
        owner = Owner.of(text)
        lives = None if owner is None else owner.lives()
        return self._shows_life(path, text) if lives is None else lives

    def _shows_life(self, path: Path, text: str) -> bool:
        """Whether the owner, elsewhere, gives a sign of life before patience is over."""
        seen = _time(path)
        if seen is None or _read(path) != text:  # gone, or another's: look again
            return False
        left = PATIENCE - max(0.0, (self._now() - seen) / 1e9)
        if left > 0:
            who = Owner.of(text) or "a process without a name"
            warn(f"Waits up to {left:.0f} s for a sign of life of {who}, which owns {self.folder}.")
        end = time.monotonic() + left
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT / 4))
            if _read(path) != text:
                return False
            if _time(path) != seen:
                return True
        return False

    def _now(self) -> int:
        """The time by the clock of the folder's file system, in nanoseconds."""
        partial = self.path.with_name(f"{NAME}.{self.owner.token}.partial")
        try:
            with partial.open("w") as file:
                file.write(self._text)
                file.flush()
                os.fsync(file.fileno())
                return os.fstat(file.fileno()).st_mtime_ns
        finally:
            partial.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    """What a file says; None if there is none."""
    try:
        with path.open(errors="replace") as file:
            return file.read(4096)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _time(path: Path) -> int | None:
    """A file's time; opened, as a network's file system then asks for it anew."""
    with suppress(FileNotFoundError), path.open() as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return None


_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.partial")
_OWNED = ("checkpoint.safetensors", "config.json", "history.jsonl", "summary.txt")


def _clear_partials(folder: Path) -> None:
    """Removes what killed writers have left; what a living one writes beside it is left alone."""
    for path in (*folder.glob(".*.partial"), *folder.glob("figures/.*.partial")):
        found = _PARTIAL.fullmatch(path.name)
        if found is None or found["name"] in _OWNED or not _started(int(found["process"])):
            path.unlink(missing_ok=True)


# Holding it

_held: dict[str, Lock] = {}
"""The locks of this process, by folder."""


@contextmanager
def held(folder: Path) -> Iterator[Lock]:
    """Owns a folder, which is made if there is none; a block inside of another has the same lock.

    What is left empty at the end, of folders that weren't there, is removed again.

    Raises:
        FileError: If another process owns the folder, or it can't be made or written to.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> with held(folder / "run") as lock:
        ...     lock.owner.process == os.getpid(), (folder / "run" / NAME).exists()
        (True, True)
        >>> list(folder.iterdir())
        []
    """
    with telling(folder, "a folder that can be made"):
        name = os.path.realpath(folder)
    if name in _held and _held[name].owner.process == os.getpid():
        yield _held[name]
        return
    made = make_folder(folder)
    try:
        _held[name] = lock = Lock(folder)
        try:
            yield lock
        finally:
            del _held[name]
            lock.release()
    finally:
        with suppress(OSError):
            for empty in made:
                empty.rmdir()


@contextmanager
def held_by_first(folder: Path | None, world: World) -> Iterator[Lock | None]:
    """Owns a folder in the first of several processes; None in the others, and without a folder."""
    with ExitStack() as stack:
        locks: list[Lock] = []
        if folder is not None:
            world.from_first(lambda: locks.append(stack.enter_context(held(folder))))
        yield locks[0] if locks else None
