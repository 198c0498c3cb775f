"""``fit``, and the `Fit` that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import ELBO as PyroELBO

from pvae.distributed import current
from pvae.engine import Asked, OptimizerLike, Precision
from pvae.errors import check_int, check_path, telling_memory
from pvae.fitting.folder import Folder, as_folder
from pvae.fitting.loop import train
from pvae.fitting.saving import save_checkpoint
from pvae.fitting.settings import BatchSize, Settings
from pvae.fitting.setup import set_up
from pvae.fitting.training import Training
from pvae.lock import held_by_first
from pvae.objectives import named
from pvae.options import tool
from pvae.pair import PairLike, as_pair
from pvae.schedules import Schedule
from pvae.threads import alone, check_outside

if TYPE_CHECKING:
    from pvae.diagnostics import Diagnosis

__all__ = ["Fit", "fit"]


@tool
def fit(
    pair: PairLike,
    data: object,
    objective: PyroELBO | str | None = None,
    *,
    epochs: int = 10,
    batch_size: BatchSize = "auto",
    mix: Mapping[str, int] | None = None,
    optimizer: OptimizerLike = torch.optim.Adam,
    lr: float = 1e-3,
    lr_schedule: Schedule | None = None,
    clip_norm: float | None = None,
    valid: object = None,
    patience: int | None = None,
    device: str | torch.device = "auto",
    engine: Asked = "auto",
    precision: Precision = "full",
    seed: int = 0,
    folder: str | Path | Folder | None = None,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = 1,
    save_steps: int | None = None,
    progress: bool = True,
) -> Fit:
    """Fits a pair to data.

    The loss is divided by the data plate's full size, so losses and learning rates are per datum;
    otherwise it is what ``pyro.infer.SVI`` minimises. Pyro's validation is on for the first step
    and off after it. The generators and settings of the process are left as they were found; the
    pair's networks are in training mode during the training and get their own mode back.

    In a process group (see `pvae.distributed`) all processes call this alike, and train the first
    one's pair together, each on its rows of every batch: loss and gradients are means over all
    rows, draws are each process's own, and the first process alone writes files and validates.
    Data that meet in a batch are refused. Ctrl-C ends the processes at once.

    Arguments:
        pair: A model and its guide: modules, or functions whose parameters are in Pyro's store.
        data: An array, tensor, ``np.memmap`` or tuple of them; a torch ``Dataset``; a
            ``DataLoader``; a `pvae.data.Data`. Batches are passed as ``model(*batch)``. A
            dictionary of several of these, by name, is several kinds of data in one training:
            ``{"labelled": (x, y), "unlabelled": x_more}`` for a ``model(x, y=None)``. Each step is
            on a batch of one of them; losses are logged by name, too.
        objective: What to maximise: one of `pvae.objectives`, or its name in small letters, such
            as ``"dreg"``; None, or Pyro's ``Trace_ELBO``, is `pvae.objectives.ELBO`.
            Pyro's other ELBOs run as they are.
        epochs: Passes over the data.
        batch_size: Rows of a batch, of all processes together; ``"auto"`` is 128, or what a
            ``DataLoader`` has; None is all of the data, which is also what a pair that subsamples
            itself gets.
        mix: How many batches of each kind of data come in turn, by name, such as
            ``{"labelled": 1, "unlabelled": 3}``; a kind with less of them than the epoch asks for
            begins again. None for one pass over each in every epoch. Each step's loss is divided
            by the full size of its own data plate, as always: with None, and batches of one
            length, every datum counts alike.
        optimizer: A torch optimiser class, or a function of (parameters, lr). One optimiser
            holds all parameters, fused where the device has that.
        lr: Learning rate.
        lr_schedule: Factor on it, step by step, such as ``schedules.Cosine()``.
        clip_norm: Largest norm of the whole gradient.
        valid: Validation data, whose ELBO is estimated after each epoch with one fixed draw.
        patience: Stop after that many epochs without a better validation ELBO, and end with the
            best epoch's parameters.
        device: Where to train. ``"auto"`` is CUDA where there is one, or else, in float32, Apple's
            MPS: modules, and those whose methods are the programs, are moved there; with a warning
            they are where they were, if they make tensors on the host. A pair of functions stays
            where its tensors are, or the data, if it has none. Data go where the pair is.
        engine: How a step runs: ``"eager"``, as Python; ``"compiled"``, as one graph, after up to
            half a minute of compiling for each shape of batch, with the same numbers up to
            rounding; ``"cudagraph"``, captured and replayed, on CUDA; ``"auto"``, compiled where
            the training is long enough for that to pay. A resumed training goes on with what it
            had.
        precision: ``"full"``, the pair's own type; or ``"bf16"``, for pairs in float32:
            networks compute in bfloat16, densities in float32.
        seed: Seed of the order of data, of draws, and of dynamic binarisation.
        folder: Where to write ``checkpoint.safetensors`` and ``history.jsonl``. One process at a
            time writes there; ``.lock`` names it.
        resume: Continue from the folder's checkpoint, if there is one. The result is bit for bit
            that of a training that was never stopped, on the same machine, versions and threads.
            Pair, data and settings have to be those of before, in every number.
        overwrite: Replace the folder's training, once everything has been checked.
        save_every: Epochs between checkpoints.
        save_steps: Steps between checkpoints within an epoch, for long ones; not for a
            ``DataLoader``, whose order is its own.
        progress: Show a progress bar.

    Returns:
        The `Fit`: history, and what to do next.

    Raises:
        ArgumentError: If an argument can't be used.
        DataError: If the data can't be used; names the first offending row.
        PairError: If model and guide don't fit each other or the data.
        CheckpointError: If the folder holds another training; names what differs.
        FileError: If the folder can't be written to, or another process is writing there. The
            last checkpoint is then as it was, and so is the pair.
        TrainingError: If a loss or gradient isn't finite; names epoch, batch and site, and
            leaves the pair in the state before that step.

    Example:
        >>> from pvae import recipes
        >>> x = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)).round()
        >>> vae = recipes.vae(16, latent_dim=2, hidden=(8,))
        >>> run = fit(vae, x, epochs=2, batch_size=32, progress=False)
        >>> len(run.history), run.history[-1]["elbo"] < 0
        (2, True)
    """
    settings = Settings(
        epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr, lr_schedule=lr_schedule,
        clip_norm=clip_norm, patience=patience, device=device, engine=engine, precision=precision,
        seed=seed, folder=as_folder(folder), resume=resume, overwrite=overwrite,
        save_every=save_every, save_steps=save_steps, progress=progress, mix=mix,
    )  # fmt: skip
    if isinstance(objective, str):
        objective = named(objective)()
    path = None if settings.folder is None else settings.folder.path
    with held_by_first(path, current()) as lock:
        training = set_up(as_pair(pair, "fit"), data, objective, valid, settings)
        train(training, lock)
    return Fit(training)


class Fit:
    """A pair and its training so far; made by `pvae.fit`.

    Attributes:
        pair: What is trained.
        objective: What is maximised.
        structure: What the pair is made of.
        progress: How far the training has come: epochs, steps, the best epoch, seconds.
        history: One record an epoch; ``fit.history["valid_elbo"]`` is a column.
        training: Data, batches, settings and the stepper, for those who look closer.
    """

    def __init__(self, training: Training) -> None:
        self.pair, self.training = training.pair, training
        self.objective, self.structure = training.objective, training.structure
        self.progress, self.history = training.progress, training.progress.history

    @property
    def interrupted(self) -> bool:
        """Whether the last training was stopped by Ctrl-C, at a step's end."""
        return self.training.interrupted

    def __repr__(self) -> str:
        progress, num_rows = self.progress, self.training.batches.num_rows
        lines = [
            f"Fit of {len(self.structure.parameters)} parameter tensors to {num_rows} data, "
            f"{progress.epoch} epoch(s), {progress.global_step} steps, {progress.seconds:.0f} s"
        ]
        if self.history:
            last = self.history[-1]
            names = [k for k in last if k.endswith(("elbo", "log_joint", "loss", "rate"))]
            lines += [f"  {k}: {last[k]:.2f}" for k in names if last[k] is not None]
            lines += [f"  IMPOSSIBLE: {last['impossible']}"] if "impossible" in last else []
        if progress.best is not None:
            epoch = progress.best_epoch
            lines.append(f"  best validation value {progress.best:.2f}, epoch {epoch}")
        lines.append("  next: .diagnose(), or .refine(epochs)")
        return "\n".join(lines)

    def refine(self, epochs: int) -> Fit:
        """Trains for more epochs, from where the last training ended; returns itself."""
        check_int("epochs", epochs)
        self.training.record.renew()
        with alone(), telling_memory("refine", self.training.batches.batch_size, "batch_size"):
            check_outside("refine")
            folder, world = self.training.settings.folder, self.training.world
            with held_by_first(None if folder is None else folder.path, world) as lock:
                self.training.set_epochs(self.progress.epoch + epochs)
                self.progress.stopped_early = False
                train(self.training, lock)
        return self

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint of the pair and the training to a file.

        Of several processes all have to call this, and the first one writes.
        """
        with alone():
            save_checkpoint(self.training, check_path("path", path), self.training.generators)

    def diagnose(self, data: object = None, **options: Any) -> Diagnosis:
        """What the fit is worth, on one screen: `pvae.diagnose`.

        Arguments:
            data: Held out, best; None for the validation data, or else the training data, of
                which it takes the first kind where there are several.
            options: Those of `pvae.diagnose`.
        """
        from pvae.diagnostics import diagnose  # ArviZ takes a second to import

        if data is None:
            valid = self.training.valid
            data = self.training.source if valid is None else valid
        return diagnose(self.pair, data, **{"history": self.history, **options})

    def to_arviz(self, data: object = None, **options: Any) -> Any:
        """Draws from the fitted pair for ArviZ: `pvae.export.to_arviz`.

        Arguments:
            data: What it is conditioned on; None for the training data.
            options: Those of `pvae.export.to_arviz`.
        """
        from pvae import export  # ArviZ takes a second to import

        return export.to_arviz(self.pair, self.training.source if data is None else data, **options)
