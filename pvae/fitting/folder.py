"""The folder of a training: its files, of which the checkpoint alone is believed.

The checkpoint has the whole history and all that is known of how the pair was made, under one
digest. ``history.jsonl`` and ``config.json`` are copies for people; what differs in them is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pvae import checkpoint
from pvae.checkpoint import Checkpoint
from pvae.errors import CheckpointError, FileError, check_file, check_path, quoted
from pvae.files import check_text, telling, write_atomically
from pvae.fitting.history import History

__all__ = ["CHECKPOINT", "Folder", "as_folder", "checkpoint_in", "history_of", "training_in"]

CHECKPOINT = "checkpoint.safetensors"
"""Name of a training's checkpoint in its folder."""


@dataclass(frozen=True)
class Folder:
    """A folder that a training writes.

    Attributes:
        path: Where it is.
        made: How the pair was made, which its checkpoints say: ``"config"`` for a run of the
            command line, whose ``config.json`` has the same.
    """

    path: Path
    made: Mapping[str, object] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's file."""
        return self.path / CHECKPOINT

    @property
    def history(self) -> Path:
        """The file of the history, a line for each epoch."""
        return self.path / "history.jsonl"

    def has_checkpoint(self) -> bool:
        """Whether there is a training in it."""
        check_text(self.path)
        with telling(self.path, "a folder that can be read"):
            return self.checkpoint.exists()

    def write_copies(self, history: History) -> None:
        """Writes the files beside the checkpoint that say what it says."""
        if history:
            history.write(self.history)
        else:
            with telling(self.history, "a file that can be removed"):
                self.history.unlink(missing_ok=True)
        if "config" in self.made:
            text = json.dumps(self.made["config"], indent=2)
            write_atomically(self.path / "config.json", f"{text}\n".encode())


def as_folder(folder: str | Path | Folder | None) -> Folder | None:
    """A folder that `pvae.fit` was given by its path, or with how the pair was made."""
    if folder is None or isinstance(folder, Folder):
        return folder
    return Folder(check_path("folder", folder))


def checkpoint_in(path: Path) -> Path:
    """The checkpoint of a folder, or the file itself."""
    check_text(path)
    with telling(path, "a file or folder that can be read"):
        return path / CHECKPOINT if path.is_dir() else path


_FORM = {
    "progress": {"history": [{"epoch": 0}]},
    "settings": {"seed": 0},
    "environment": {},
    "optimizer": {"groups": [{}], "state": {}},
    "pair?": {"entries": {}, "changing": [""]},
    "made?": {"config?": {}},
    "files?": {},
}
"""What a training's checkpoint has beside tensors; earlier versions had no names with a mark."""


def training_in(file: Path) -> Checkpoint:
    """The checkpoint of a training.

    Raises:
        CheckpointError: If it can't be read, or is one of something else.
    """
    saved = checkpoint.load(file)
    if other := _misfit(saved.meta, _FORM, "its JSON"):
        raise CheckpointError(str(file), "the checkpoint of a training", other)
    return saved


def _misfit(value: object, form: object, name: str) -> str:
    """Where a value hasn't got a form, in words; nothing if it has."""
    if type(value) is not type(form):
        return f"{name}, which is a {type(value).__name__}"
    found = []
    if isinstance(value, dict) and isinstance(form, dict):
        inner = {key.removesuffix("?"): part for key, part in form.items()}
        found = [f"no '{key}' in {name}" for key in form if key not in value and key in inner]
        found += [_misfit(value[k], part, f"'{k}'") for k, part in inner.items() if k in value]
    elif isinstance(value, list) and isinstance(form, list):
        found = [_misfit(part, form[0], f"an entry of {name}") for part in value]
    return next(filter(None, found), "")


def history_of(saved: Checkpoint, folder: Path) -> tuple[History, str]:
    """The history that a checkpoint has, and where the folder's copy says anything else.

    The copy may go on after the checkpoint, and be cut short by a kill: that is no difference.
    """
    history = History(saved.meta["progress"]["history"])
    copy = folder / "history.jsonl"
    try:
        with telling(copy, "a file that can be read"):
            check_file(copy, FileError)
            lines = copy.read_bytes().decode(errors="replace").splitlines()
    except FileError as error:
        return history, f"{copy}: {error.actual}" if history else ""
    for number, record in enumerate(history):
        found = _parsed(lines[number]) if number < len(lines) else None
        if found != record:
            what = _difference(record, found)
            return history, f"{copy}, line {number + 1}: {what}"
    return history, ""


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _difference(record: Mapping[str, object], found: object) -> str:
    if not isinstance(found, dict):
        return "the epoch's record isn't there"
    names = [n for n in {**record, **found} if record.get(n) != found.get(n)]
    return ", ".join(
        f"{n} was {quoted(record.get(n))}, is {quoted(found.get(n))}" for n in names[:3]
    )
