"""A run folder opened for a command: its pair, and the data that the command looks at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pvae.cli.user_code import made_by, names_code
from pvae.errors import ArgumentError, DataError, UndefinedError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pvae.data import Limits, Splits
    from pvae.pair import Pair
    from pvae.runs import Run
    from pvae.vae import VAE

__all__ = ["Opened", "open_folder"]


@dataclass(frozen=True)
class Opened:
    """A run that is opened.

    Attributes:
        run: The folder, read.
        pair: Its pair, with the trained parameters.
        splits: The data of a run of the command line; None of one of `pvae.fit`.
        given: What ``--data`` names; None without it.
    """

    run: Run
    pair: Pair
    splits: Splits | None
    given: object

    @property
    def data(self) -> object:
        """What is looked at: what was given, or the test data.

        Raises:
            ArgumentError: If neither is there.
        """
        if self.given is not None:
            return self.given
        if self.splits is None:
            raise _no_data(self.run.folder)
        return self.splits.test.unlabelled()

    @property
    def training_data(self) -> object:
        """The data that codes are fitted to: those of the training, or what was given."""
        return self.data if self.splits is None else self.splits.train.unlabelled()

    @property
    def x(self) -> Tensor:
        """These data as one tensor."""
        import torch

        from pvae.data import as_source, check_rows

        source = as_source(self.data, dtype=self.pair.home().dtype)
        check_rows(source, where="data" if self.given is None else "--data")
        return torch.cat([batch[0] for _, batch in source.all()])

    def vae(self, command: str) -> VAE:
        """The pair, where it is a VAE.

        Raises:
            UndefinedError: If it isn't.
        """
        from pvae.vae import VAE

        if not isinstance(self.pair, VAE):
            raise UndefinedError(f"pvae {command}", "a pvae.VAE", f"{self.pair}")
        return self.pair


def _no_data(folder: Path) -> ArgumentError:
    expected = f"data to look at, as {folder} holds none"
    return ArgumentError("--data", expected, "nothing", ["--data x.npy", "--data mymodel:data"])


def open_folder(folder: Path, device: str, pair: str | None, data: Path | None) -> Opened:
    """Reads a folder, and builds its pair as it was made, or by the code that ``pair`` names.

    Raises:
        CheckpointError: If the folder isn't that of a training, or its pair can't be built.
    """
    from pvae.pair import as_pair
    from pvae.runs import Run

    run = Run(folder)
    splits = None if run.config is None else run.load_data(run.config)
    limits = None if run.config is None else run.config.limits
    given = None if data is None else _given(data, splits, limits)
    if pair is None:
        built: Pair = run.build(splits)
    else:
        built = as_pair(made_by("--pair", pair), "--pair")
    looked = given if splits is None else splits.train.unlabelled()
    run.load_into(built, device, looked)
    return Opened(run, built, splits, given)


def _given(data: Path, splits: Splits | None, limits: Limits | None) -> object:
    """What ``--data`` names: a file of the kind that the run was trained on, or code."""
    import os

    import numpy as np

    from pvae.data import load

    if not os.path.isfile(data):  # noqa: PTH113  which raises nothing, whatever the name
        if names_code(str(data)):
            return made_by("--data", str(data))
        raise DataError("--data", "a file, or module:function", f"{data}, which is neither")
    own = load(data, valid=0, test=0, shuffle=False, limits=limits)
    if splits is None:
        return own.train.unlabelled()
    if own.event_shape != splits.event_shape:
        expected = f"data of shape {splits.event_shape}"
        raise DataError(str(data), expected, f"shape {own.event_shape}")
    _check_kind(data, np.asarray(own.train.arrays[0]), splits)
    return replace(splits.test, arrays=own.train.arrays[:1], origin=None).unlabelled()


def _check_kind(path: Path, x: np.ndarray, splits: Splits) -> None:
    """Refuses numbers of another kind than those of the training: bytes for real numbers, say."""
    levels = splits.raw_levels
    if levels is None and x.dtype == "uint8":
        expected = "real numbers, as the run was trained on"
        raise DataError(str(path), expected, "bytes", ["x / 255, say"])
    if levels is not None:
        off = (x < 0) | (x > levels - 1) | (x != x.round())
        if off.any() or (levels > 2 and x.size and x.max() <= 1 and x.dtype.kind == "f"):
            expected = f"whole numbers from 0 to {levels - 1}, as the run was trained on"
            fixes = [f"x * {levels - 1}, rounded, if they are parts of 1"]
            raise DataError(str(path), expected, f"values from {x.min():g} to {x.max():g}", fixes)
