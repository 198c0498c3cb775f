"""The command line: what trains a run, reads it, and judges it.

Nothing heavy is imported before a command runs, so ``pvae --help`` answers at once.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import NoReturn

import typer

from pvae.cli.checkup import doctor
from pvae.cli.common import app, echo
from pvae.cli.diagnosing import diagnose
from pvae.cli.reading import encode, evaluate, export, reconstruct, sample
from pvae.cli.training import train
from pvae.errors import PvaeError, PvaeWarning, TrainingError

__all__ = [
    "app",
    "diagnose",
    "doctor",
    "encode",
    "evaluate",
    "export",
    "main",
    "reconstruct",
    "sample",
    "train",
]


_ORDER = [
    f.__name__ for f in (train, evaluate, diagnose, sample, reconstruct, encode, export, doctor)
]
app.registered_commands.sort(key=lambda c: _ORDER.index(getattr(c.callback, "__name__", "")))


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2, no traceback."""
    warnings.formatwarning = _warning
    for stream in (sys.stdout, sys.stderr):  # of names that aren't text in this encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Torch's threads spin while they wait; where other work holds a core, that costs all the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
        sys.exit(code)
    except PvaeError as error:
        echo(f"pvae: {error.one_line()}", err=True)
        sys.exit(3 if isinstance(error, TrainingError) else 2)
    except typer.TyperException as error:
        if message := " ".join(error.format_message().split()):  # it is empty below help
            echo(f"pvae: {message}", err=True)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except OSError as error:
        _stop(error)


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning as it is shown: pvae's own on one line, as no code of the user's has led to it."""
    if issubclass(category, PvaeWarning):
        return f"pvae: {message}\n"
    return _usual(message, category, filename, lineno, line)


_usual = warnings.formatwarning


def _stop(error: OSError) -> NoReturn:
    """Says in one line what the system has against a file; a pipe's reader that has left, nothing.

    Nothing more goes to the standard output, which may be what can't be written.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):
        said = error.strerror or str(error) or type(error).__name__
        name = error.filename or "the standard output, or a file"
        typer.echo(f"pvae: {name}: {said}", err=True)
    sys.exit(2)
