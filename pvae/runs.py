"""Run folders: what the command line writes, and how a pair is built again from it.

A run folder holds ``config.json``, ``checkpoint.safetensors``, ``history.jsonl``, ``figures/`` and
``summary.txt``. The checkpoint, under its digest, says what is in the others; readers go by it, and
tell what has been changed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pvae import checkpoint, fitting, recipes
from pvae.config import Config, options
from pvae.config.values import values_in
from pvae.data import Splits, as_source, first_batch
from pvae.distributed import job
from pvae.errors import CheckpointError, check_path, quoted, warn
from pvae.files import telling
from pvae.fitting import CHECKPOINT, Folder, History
from pvae.fitting.fingerprint import fingerprint
from pvae.pair import Pair
from pvae.vae import VAE

__all__ = ["Run", "edits", "folder_of", "job_of", "open_run"]

MOVED = ("epochs", "data", "data_dir", "max_file_bytes", "max_file_rows")
"""Options that may be changed in ``config.json``: what the pair is doesn't depend on them."""

_MOST = 5  # differences that are told one by one


def folder_of(path: Path, config: Config, splits: Splits, vae: VAE) -> Folder:
    """The folder of a run, with what its ``config.json`` and its checkpoints are to say."""
    content = dict.fromkeys(options()) | config.model_dump()
    content["resolved"] = _resolved(config, splits, vae)
    if (name := job()) is not None:
        content["job"] = name
    return Folder(path, {"config": content})


def _resolved(config: Config, splits: Splits, vae: VAE) -> dict[str, object]:
    """What recipe and data have decided where the configuration says ``None``."""
    penalties = [*vae.model.penalties, *vae.guide.penalties]
    return {
        "prior": type(vae.model.prior).__name__,
        "likelihood": config.likelihood_for(splits),
        "guide": type(vae.guide.posterior).__name__,
        "corruption": None if vae.guide.corruption is None else str(vae.guide.corruption),
        "penalties": {type(p).__name__: float(p.weight) for p in penalties},
        "hidden": list(config.widths),
        "event_shape": list(splits.event_shape),
        "levels": splits.levels,
        "rows": [len(splits.train), len(splits.valid), len(splits.test)],
    }


def job_of(folder: Path) -> str | None:
    """The job of ``torchrun`` that a run was last trained by; None if there is no run, or no job.

    See `pvae.distributed.job`.
    """
    with contextlib.suppress(CheckpointError):
        name = values_in(folder / "config.json").get("job")
        return name if isinstance(name, str) else None
    return None


def _digest(path: Path) -> str:
    with telling(path, "a file that can be read"):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def edits(trained: Mapping[str, object], present: Mapping[str, object]) -> list[str]:
    """What a configuration says that isn't what a run was trained with, option by option.

    Example:
        >>> edits({"seed": 0, "epochs": 5}, {"seed": 1, "epochs": 9})
        ['seed was 0, is 1']
    """
    names = sorted({*trained, *present} - {*MOVED, "resolved", "job"})
    odd = [n for n in names if trained.get(n) != present.get(n)]
    told = [f"{n} was {quoted(trained.get(n))}, is {quoted(present.get(n))}" for n in odd[:_MOST]]
    return [*told, f"{len(odd) - _MOST} more"] if len(odd) > _MOST else told


class Run:
    """A folder of a training, read: the checkpoint, and what in files beside it says anything else.

    Arguments:
        folder: The folder, of ``pvae train`` or of `pvae.fit`.

    Attributes:
        folder: The folder.
        saved: Its checkpoint.
        made: How the pair was made, as the checkpoint says.
        config: For a run of the command line, what the pair was made with; None for others.
        history: One record an epoch.

    Raises:
        CheckpointError: If the folder has no checkpoint, or a damaged one.

    Warns:
        PvaeWarning: Of what was changed: the file, where in it, what was there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = check_path("folder", folder)
        if not Folder(self.folder).has_checkpoint():
            expected = "a run: a folder with the checkpoint of a training"
            fixes = ["pvae train --out DIR first, then the folder DIR"]
            raise CheckpointError(str(self.folder), expected, "none in it", fixes)
        self.saved = fitting.training_in(self.folder / CHECKPOINT)
        self.made: dict[str, Any] = self.saved.meta.get("made", {})
        self.config = self._config()
        self.history: History
        self.history, change = fitting.history_of(self.saved, self.folder)
        changes = [change] if change else []
        for name, digest in self.saved.meta.get("files", {}).items():
            path = self.folder / name
            if path.is_file() and _digest(path) != digest:
                changes.append(f"{path}: not what the training wrote")
        for change in changes:
            warn(f"{change}. What the checkpoint says is used.")

    @property
    def seed(self) -> int:
        """Seed of the training."""
        seed: int = self.saved.meta["settings"]["seed"]
        return seed

    def _config(self) -> Config | None:
        if "config" not in self.made:
            return None
        made, known = self.made["config"], options()  # whose order is that of penalties
        trained = {name: made[name] for name in (*known, *made) if name in made}
        trained = {k: v for k, v in trained.items() if k not in ("resolved", "job")}
        try:
            present = Config.values_in(self.folder)
        except CheckpointError as error:
            warn(f"{error.one_line()} What the checkpoint says is used.")
            return Config(**trained)
        if changes := edits(trained, present):
            path, what = self.folder / "config.json", "; ".join(changes)
            warn(f"{path}: {what}. What the run was trained with is used.")
        moved = {name: present[name] for name in MOVED if name in present}
        return Config.of_file(self.folder / "config.json", {**trained, **moved})

    def load_data(self, config: Config) -> Splits:
        """The data that a run of the command line was trained on, and is tested on.

        Raises:
            CheckpointError: If they are others than they were: rows of the training may then be
                among those of the test.
        """
        splits = config.load_data()
        then = self.saved.meta["settings"].get("data")
        now = fingerprint(as_source(splits.train.unlabelled()))
        if then not in (None, now):
            fixes = [f"{config.data} as it was then", "pvae train, to train on these"]
            expected = f"the data that the run was trained on, {then}"
            raise CheckpointError(str(self.folder), expected, now, fixes)
        return splits

    def build(self, splits: Splits | None) -> Pair:
        """The pair, untrained, as it was made: by the configuration or by a recipe.

        Raises:
            CheckpointError: If code of a user's has made it; names the function.
        """
        if self.config is not None and splits is not None:
            return self.config.build(splits)
        if "recipe" in self.made:
            return recipes.rebuilt(self.made)
        expected = "--pair with the function that returns its pair"
        builder = self.made.get("builder")
        if builder is None:
            what = "a pair that no function has made alone"
            if "made" not in self.saved.meta:
                what = "a pair of an earlier pvae, whose checkpoints don't say how it was made"
            if caller := self.made.get("fit"):
                what = f"one that was made in {caller}, which trained it, too"
            raise CheckpointError(str(self.folder), expected, what, ["--pair mymodel:build"])
        fixes = [f"--pair {builder}", "load_parameters(pair, folder), in Python"]
        raise CheckpointError(str(self.folder), expected, f"a pair that {builder} has made", fixes)

    def load_into(self, pair: Pair, device: str = "auto", data: object = None) -> None:
        """Puts the trained parameters into a pair, and the pair on the device.

        Arguments:
            pair: Built as it was for the training.
            device: Where to.
            data: Data; only needed for functions, whose parameters a trace has to find.
        """
        modules = [p for p in (pair.model, pair.guide) if isinstance(p, nn.Module)]
        types = {x.dtype for x in self.saved.part("param").values()}
        for dtype in types if len(types) == 1 else ():
            for module in modules:
                module.to(dtype)
        where, dtype = pair.place(device, data)
        batch = None
        if len(modules) < 2 and data is not None:
            batch = first_batch(as_source(data, where, dtype), 128)
        fitting.load_parameters(pair, self.folder, batch)

    def seal(self, names: Iterable[str]) -> None:
        """Writes the checkpoint again, with what is in files beside it under its digest."""
        self.saved.meta["files"] = {name: _digest(self.folder / name) for name in names}
        checkpoint.save(self.folder / CHECKPOINT, self.saved)


def open_run(folder: str | Path, device: str = "auto") -> tuple[Config, VAE, Splits]:
    """The configuration, the trained pair (on the device) and the data of a run of `pvae train`.

    Raises:
        CheckpointError: If the folder isn't such a run, or its checkpoint is damaged.
    """
    run = Run(folder)
    if run.config is None:
        raise CheckpointError(str(run.folder), "a run of pvae train", "a folder of pvae.fit")
    splits = run.load_data(run.config)
    vae = run.config.build(splits)
    run.load_into(vae, device)
    return run.config, vae, splits
