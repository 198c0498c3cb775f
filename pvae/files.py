"""Files that are written whole or not at all, and what the system says of them, in one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pvae.errors import FileError

__all__ = ["check_text", "make_folder", "partial_of", "telling", "write_atomically"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
_CANT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)  # a folder, on some systems


@contextmanager
def telling(path: Path, expected: str) -> Iterator[None]:
    """Tells what the system says against a file or a folder by a `FileError`.

    Arguments:
        path: The file or folder.
        expected: What it should have been, such as "a file that can be written".

    Example:
        >>> with telling(Path("no/such/file"), "a file that can be read"):
        ...     Path("no/such/file").read_bytes()
        Traceback (most recent call last):
        ...
        pvae.errors.FileError: no/such/file: expected a file that can be read; got No such file ...
    """
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        said = error.strerror or str(error) or type(error).__name__
        raise FileError(str(path), expected, said, _advice(error)) from error


def _advice(error: OSError) -> list[str]:
    if error.errno in _FULL:
        return ["free some room there, or another folder; what was written before is whole"]
    if error.errno in _NOT_ALLOWED:
        return ["another folder, in which you may write"]
    if error.errno == errno.ENAMETOOLONG:
        return ["a shorter name"]
    return ["another folder"] if error.errno in (errno.ENOTDIR, errno.EEXIST) else []


def check_text(path: Path) -> None:
    """Refuses a name that isn't text, which the format of checkpoints can't be read under."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        expected = "a name that is text in UTF-8"
        raise FileError(ascii(str(path)), expected, "other bytes", ["another name"]) from error


def make_folder(path: Path) -> list[Path]:
    """Makes a folder and those around it; returns those that weren't there, innermost first.

    Raises:
        FileError: If something else is there, or it can't be made.
    """
    check_text(path)
    with telling(path, "a folder that can be made"):
        if path.is_symlink() and not path.exists():
            actual = f"a link to {path.readlink()}, which isn't there"
            raise FileError(str(path), "a folder", actual, ["another name"])
        if path.exists() and not path.is_dir():
            raise FileError(str(path), "a folder", "a file", ["another name"])
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
    return made


def partial_of(path: Path) -> Path:
    """Where this process writes a file before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment it is the old one or the new one, whole.

    Raises:
        FileError: If it can't be written; the old one is then as it was.
    """
    partial = partial_of(path)
    with telling(path, "a file that can be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Makes renames in a folder last, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _CANT_SYNC:
            raise
    finally:
        os.close(folder)
