"""The settings of a training, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pvae.distributed import current
from pvae.engine import ASKED, Asked, OptimizerLike, Precision
from pvae.errors import ArgumentError, CheckpointError, check_int, check_number, oxford
from pvae.schedules import Schedule, as_schedule

__all__ = ["CHECKPOINT", "Settings"]

CHECKPOINT = "checkpoint.safetensors"
"""Name of a training's checkpoint in its folder."""


@dataclass(frozen=True)
class Settings:
    """The arguments of `pvae.fit` beside pair, data and objective; they mean what they do there."""

    epochs: int
    batch_size: int | None
    optimizer: OptimizerLike
    lr: float
    lr_schedule: Schedule | None
    clip_norm: float | None
    patience: int | None
    device: str | torch.device
    engine: Asked
    precision: Precision
    seed: int
    folder: Path | None
    resume: bool
    overwrite: bool
    save_every: int
    save_steps: int | None
    progress: bool

    def __post_init__(self) -> None:
        check_int("epochs", self.epochs, minimum=0)
        check_int("seed", self.seed, minimum=0)
        check_number("lr", self.lr, above=0)
        for name in ("batch_size", "patience", "save_every", "save_steps"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, above=0)
        if self.engine not in ASKED:
            raise ArgumentError("engine", f"one of {oxford(ASKED)}", repr(self.engine))
        if self.folder is not None:
            self._check_folder(self.folder)
        elif self.resume:
            raise ArgumentError("resume", "a folder to resume from", "folder=None")

    def _check_folder(self, folder: Path) -> None:
        is_new = not self.resume and not self.overwrite
        if self.resume and self.overwrite:
            raise ArgumentError("overwrite", "either resume or overwrite", "both")
        if is_new and current().is_first and self.checkpoint_file.exists():
            fixes = ["resume=True, to go on with it", "overwrite=True", "another folder"]
            expected = "a folder without a training in it"
            raise CheckpointError(str(folder), expected, "a checkpoint", fixes)

    @property
    def schedule(self) -> Schedule:
        """The learning rate's factor, step by step."""
        return as_schedule("lr_schedule", 1.0 if self.lr_schedule is None else self.lr_schedule)

    @property
    def checkpoint_file(self) -> Path:
        """Where the checkpoint is."""
        assert self.folder is not None  # noqa: S101
        return self.folder / CHECKPOINT

    @property
    def history_file(self) -> Path:
        """Where the history is."""
        assert self.folder is not None  # noqa: S101
        return self.folder / "history.jsonl"
