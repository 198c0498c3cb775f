"""The settings of a training, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from pvae.annotations import check_fields
from pvae.data import LoaderSource, Source
from pvae.engine import ASKED, Asked, OptimizerLike, Precision
from pvae.errors import ArgumentError, CheckpointError, check_int, check_number, oxford
from pvae.fitting.folder import Folder
from pvae.schedules import Schedule, as_schedule

__all__ = ["BatchSize", "Settings"]

BatchSize = int | Literal["auto"] | None


@dataclass(frozen=True)
class Settings:
    """The arguments of `pvae.fit` beside pair, data and objective; they mean what they do there."""

    epochs: int
    batch_size: BatchSize
    optimizer: OptimizerLike
    lr: float
    lr_schedule: Schedule | None
    clip_norm: float | None
    patience: int | None
    device: str | torch.device
    engine: Asked
    precision: Precision
    seed: int
    folder: Folder | None
    resume: bool
    overwrite: bool
    save_every: int
    save_steps: int | None
    progress: bool
    mix: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_int("epochs", self.epochs, minimum=0)
        check_int("seed", self.seed, minimum=0)
        check_number("lr", self.lr, above=0)
        for name in ("batch_size", "patience", "save_every", "save_steps"):
            if getattr(self, name) not in (None, "auto"):
                check_int(name, getattr(self, name))
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, above=0)
        if self.engine not in ASKED:
            raise ArgumentError("engine", f"one of {oxford(ASKED)}", repr(self.engine))
        if self.resume and self.folder is None:
            raise ArgumentError("resume", "a folder to resume from", "folder=None")
        if self.resume and self.overwrite:
            raise ArgumentError("overwrite", "either resume or overwrite", "both")

    def rows_of_batch(self, source: Source) -> int:
        """Rows of a batch of these data.

        Raises:
            ArgumentError: If a size was asked for beside a ``DataLoader`` that has another one.
        """
        asked = self.batch_size
        if isinstance(source, LoaderSource):
            own = source.batch_size
            if asked != "auto" and asked != own and (asked, source.num_batches) != (None, 1):
                has = f"batch_size={asked} beside batches of {own or 'a size of their own'}"
                fixes = [f"fit(..., loader.dataset, batch_size={asked})", "no batch_size="]
                raise ArgumentError("batch_size", "the DataLoader's own", has, fixes)
            return own or source.num_rows
        rows = 128 if asked == "auto" else asked or source.num_rows
        return min(rows, source.num_rows)

    def check_folder(self) -> None:
        """Refuses to begin a training where there is one, unless that is to go on or be replaced.

        Raises:
            CheckpointError: If the folder has a checkpoint.
        """
        is_new = not self.resume and not self.overwrite
        if self.folder is not None and is_new and self.folder.has_checkpoint():
            fixes = ["resume=True, to go on with it", "overwrite=True", "another folder"]
            expected = "a folder without a training in it"
            raise CheckpointError(str(self.folder.path), expected, "a checkpoint", fixes)

    @property
    def schedule(self) -> Schedule:
        """The learning rate's factor, step by step."""
        return as_schedule("lr_schedule", 1.0 if self.lr_schedule is None else self.lr_schedule)
