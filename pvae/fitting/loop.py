"""The training loop."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from tqdm import tqdm

from pvae import bounds, checkpoint, randomness
from pvae import terms as t
from pvae.data import Batches, as_source, check_rows
from pvae.data.sources import LoaderSource
from pvae.engine import OptimizerLike, Stepper, make_optimizer
from pvae.errors import (
    ArgumentError,
    CheckpointError,
    PairError,
    PvaeWarning,
    TrainingError,
    check_int,
    check_number,
    oxford,
)
from pvae.fitting.checks import check_batch_norm, check_data, check_parameters
from pvae.fitting.history import History
from pvae.fitting.state import Progress, buffers_of, copy_into, restore, snapshot
from pvae.objectives import ELBO, Objective
from pvae.schedules import Schedule, as_schedule

__all__ = ["Fit", "fit", "place"]

LOOK_EVERY = 50
"""Steps between looks at the device: for the progress bar, and for a step that failed."""


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    objective: PyroELBO | None = None,
    *,
    epochs: int = 10,
    batch_size: int | None = 128,
    optimizer: OptimizerLike = torch.optim.Adam,
    lr: float = 1e-3,
    lr_schedule: Schedule | None = None,
    clip_norm: float | None = None,
    valid: Any = None,
    patience: int | None = None,
    plate: str | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = 1,
    save_steps: int | None = None,
    progress: bool = True,
) -> Fit:
    """Fits a model and its guide to data.

    The loss is divided by the data plate's full size, so losses and learning rates are per datum;
    otherwise it is what ``pyro.infer.SVI`` minimises. Pyro's validation is on for the first step
    and off after it. The generators and settings of the process are left as they were found; the
    pair's networks are in training mode during the training and get their own mode back.

    Arguments:
        model: A Pyro program: a module, or a function whose parameters are in Pyro's store.
        guide: Its guide.
        data: An array, tensor, ``np.memmap`` or tuple of them; a torch ``Dataset``; a
            ``DataLoader``; a `pvae.data.Data`. Batches are passed as ``model(*batch)``.
        objective: What to maximise; None, or Pyro's ``Trace_ELBO``, is `pvae.objectives.ELBO`.
            Pyro's other ELBOs run as they are.
        epochs: Passes over the data.
        batch_size: Rows of a batch; None for all of the data, which is also what a pair that
            subsamples itself gets.
        optimizer: A torch optimiser class, or a function of (parameters, lr). One optimiser
            holds all parameters, fused where the device has that.
        lr: Learning rate.
        lr_schedule: Factor on it, step by step, such as ``schedules.Cosine()``.
        clip_norm: Largest norm of the whole gradient.
        valid: Validation data, whose ELBO is estimated after each epoch with one fixed draw.
        patience: Stop after that many epochs without a better validation ELBO, and end with the
            best epoch's parameters.
        plate: Name of the data plate, where the batch's length doesn't tell.
        device: ``"auto"`` is CUDA where there is one, for modules; for functions, where their
            parameters are.
        seed: Of the order of data, of draws, and of dynamic binarisation.
        folder: Where to write ``checkpoint.safetensors`` and ``history.jsonl``.
        resume: Continue from the folder's checkpoint, if there is one. The result is bit for bit
            that of a training that was never stopped, on the same machine, versions and threads.
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
        CheckpointError: If the folder holds another training.
        TrainingError: If a loss or gradient isn't finite; names epoch, batch and site, and
            leaves the pair in the state before that step.

    Example:
        >>> from pvae import recipes
        >>> x = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)).round()
        >>> vae = recipes.vae(16, latent_dim=2, hidden=(8,))
        >>> run = fit(vae.model, vae.guide, x, epochs=2, batch_size=32, progress=False)
        >>> len(run.history), run.history[-1]["elbo"] < 0
        (2, True)
    """
    run = Fit(
        model,
        guide,
        data,
        objective,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr,
        lr_schedule=lr_schedule,
        clip_norm=clip_norm,
        valid=valid,
        patience=patience,
        plate=plate,
        device=device,
        seed=seed,
        folder=folder,
        resume=resume,
        overwrite=overwrite,
        save_every=save_every,
        save_steps=save_steps,
        progress=progress,
        epochs=epochs,
    )
    run._train()
    return run


class Fit:
    """A pair and its training so far; made by `fit`.

    Attributes:
        model: The model.
        guide: The guide.
        structure: What the pair is made of.
        history: One record an epoch; ``fit.history["valid_elbo"]`` is a column.
        objective: What is maximised.
        interrupted: Whether the last training was stopped by Ctrl-C, at a step's end.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: Any,
        objective: PyroELBO | None,
        *,
        epochs: int,
        batch_size: int | None,
        optimizer: OptimizerLike,
        lr: float,
        lr_schedule: Schedule | None,
        clip_norm: float | None,
        valid: Any,
        patience: int | None,
        plate: str | None,
        device: str | torch.device,
        seed: int,
        folder: str | Path | None,
        resume: bool,
        overwrite: bool,
        save_every: int,
        save_steps: int | None,
        progress: bool,
    ) -> None:
        self.model, self.guide, self.seed = model, guide, check_int("seed", seed, minimum=0)
        self.epochs = check_int("epochs", epochs, minimum=0)
        self.lr = check_number("lr", lr, above=0)
        self.patience = None if patience is None else check_int("patience", patience)
        self.save_every = check_int("save_every", save_every)
        self.save_steps = None if save_steps is None else check_int("save_steps", save_steps)
        self.show_progress, self.interrupted = progress, False
        if clip_norm is not None:
            check_number("clip_norm", clip_norm, above=0)
        if patience is not None and valid is None:
            raise ArgumentError(
                "patience", "validation data to look at", "valid=None", ["valid=x_valid"]
            )
        self.objective = _as_objective(objective, plate)
        self.folder = None if folder is None else Path(folder)
        self._check_folder(resume=resume, overwrite=overwrite)

        where, dtype = place(model, guide, device)
        source = as_source(data, where, dtype)
        rows = source.num_rows if batch_size is None else check_int("batch_size", batch_size)
        try:
            num_rows = min(rows, source.num_rows)
            self.structure = t.inspect_source(model, guide, source, num_rows, plate)
        except PairError:
            check_rows(source)  # was it the data?
            raise
        check_parameters(self.structure)
        if self.structure.subsample_size is not None:
            rows = source.num_rows
        self.source = as_source(data, self.structure.device, self.structure.dtype)
        self.valid = (
            None if valid is None else as_source(valid, self.structure.device, self.structure.dtype)
        )
        check_data(model, guide, self.source, "data")
        if self.valid is not None:
            check_data(model, guide, self.valid, "valid")
        self.batches = Batches(
            self.source, rows, self.seed, shuffle=self.structure.subsample_size is None
        )
        check_batch_norm(self.structure, source.num_rows, self.batches.batch_size)
        if self.save_steps is not None and isinstance(self.source, LoaderSource):
            raise ArgumentError(
                "save_steps", "data by index", "a DataLoader", ["pass loader.dataset"]
            )

        self.steps_per_epoch = self.batches.steps_per_epoch
        if (size := self.structure.subsample_size) is not None:
            self.steps_per_epoch = -(-source.num_rows // size)  # as many as its subsamples take
        total = self.epochs * self.steps_per_epoch
        self.lr_schedule = as_schedule("lr_schedule", 1.0 if lr_schedule is None else lr_schedule)
        self.lr_factor = self.lr_schedule.resolve(self.steps_per_epoch, max(total, 1))
        optimiser = make_optimizer(optimizer, list(self.structure.parameters.values()), self.lr)
        state = None
        if isinstance(self.objective, Objective):
            like = next(iter(self.structure.parameters.values()))
            state = self.objective.make_state(like, self.steps_per_epoch, max(total, 1))
            _warn_of_long_schedules(state.schedules, total)
        self.stepper = Stepper(
            model, guide, self.objective, self.structure, optimiser, state, clip_norm
        )
        self.buffers = buffers_of(model, guide, self.structure.modules)
        self.progress = Progress()
        self._rng: dict[str, Tensor] | None = None
        self._settings = {
            "seed": self.seed,
            "batch_size": self.batches.batch_size,
            "num_rows": source.num_rows,
            "objective": repr(self.objective),
            "optimizer": type(optimiser).__name__,
            "lr": self.lr,
            "lr_schedule": repr(self.lr_schedule),
            "clip_norm": clip_norm,
            "patience": self.patience,
        }
        if resume and self.folder is not None and self._checkpoint_file.exists():
            with randomness.forked():
                saved = checkpoint.load(self._checkpoint_file)
                self.progress = restore(
                    saved, self.stepper, self.buffers, self._settings, str(self._checkpoint_file)
                )
                self._rng = randomness.get_state()
            self.history.write(self._history_file)
        elif overwrite and self.folder is not None:  # everything has been checked by now
            self._checkpoint_file.unlink(missing_ok=True)
            self._history_file.unlink(missing_ok=True)

    @property
    def history(self) -> History:
        """One record an epoch."""
        return self.progress.history

    @property
    def _checkpoint_file(self) -> Path:
        assert self.folder is not None  # noqa: S101
        return self.folder / "checkpoint.safetensors"

    @property
    def _history_file(self) -> Path:
        assert self.folder is not None  # noqa: S101
        return self.folder / "history.jsonl"

    def __repr__(self) -> str:
        done = self.progress
        lines = [
            f"Fit of {len(self.structure.parameters)} parameter tensors to {self.source.num_rows} "
            f"data, {done.epoch} epoch(s), {done.global_step} steps, {done.seconds:.0f} s"
        ]
        if self.history:
            last = self.history[-1]
            names = [k for k in last if k.endswith(("elbo", "log_joint", "loss", "rate"))]
            lines += [f"  {k}: {last[k]:.2f}" for k in names if last[k] is not None]
        if done.best is not None:
            lines.append(f"  best validation value {done.best:.2f}, epoch {done.best_epoch}")
        lines.append("  next: pvae.bounds.evidence(model, guide, x), or .refine(epochs)")
        return "\n".join(lines)

    def refine(self, epochs: int) -> Fit:
        """Trains for more epochs, from where the last training ended; returns itself."""
        self.epochs = self.progress.epoch + check_int("epochs", epochs)
        self.progress.stopped_early = False
        self._train()
        return self

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint of the pair and the training to a file."""
        with randomness.forked():
            if self._rng is not None:
                randomness.set_state(self._rng)
            checkpoint.save(path, self._snapshot())

    # The loop

    def _train(self) -> None:
        done = self.progress
        with self._surroundings() as (bar, stop):
            first = True
            while done.epoch < self.epochs and not done.stopped_early:
                self._mode(training=True)
                started = time.perf_counter()
                for batch in self._steps():
                    self._set_lr()
                    with pyro.validation_enabled(is_validate=first):
                        self.stepper(batch, done.global_step)
                    first = False
                    done.step += 1
                    done.global_step += 1
                    bar.update()
                    if done.global_step % LOOK_EVERY == 0:
                        self._look(bar)
                    if self.save_steps and done.global_step % self.save_steps == 0:
                        self._save_checkpoint()
                    if stop.is_set():
                        break
                self._look(bar)
                done.seconds += time.perf_counter() - started
                if done.step == self.steps_per_epoch:
                    self._end_epoch(bar)
                if stop.is_set():
                    self.interrupted = True
                    break
            self._save_checkpoint()
            self._rng = randomness.get_state()
        if done.best_tensors and not self.interrupted:
            present = {**self.structure.parameters, **self.buffers}
            copy_into(done.best_tensors, present, "best epoch", "tensors")

    def _steps(self) -> Iterator[tuple[Tensor, ...]]:
        """What is left of the epoch's batches."""
        epoch, start = self.progress.epoch, self.progress.step
        if self.structure.subsample_size is None:
            yield from self.batches.epoch(epoch, start)
        else:
            whole = next(self.batches.epoch(epoch))
            yield from itertools.repeat(whole, self.steps_per_epoch - start)

    def _set_lr(self) -> None:
        factor = self.lr_factor(self.progress.global_step)
        for group in self.stepper.optimizer.param_groups:
            group["lr"] = self.lr * factor

    def _look(self, bar: Any) -> None:
        """Waits for the device: shows the average so far, and stops if a step has failed."""
        failure = self.stepper.look(self.progress.global_step - 1)
        if failure is not None:
            epoch, batch = divmod(failure.step, self.steps_per_epoch)
            self.progress.global_step = failure.step
            self.progress.epoch, self.progress.step = epoch, batch
            what = (
                f"a value that isn't finite at site {oxford(failure.sites)}"
                if failure.sites
                else f"a gradient that isn't finite, of {oxford(failure.parameters[:3])}"
            )
            raise TrainingError(
                f"epoch {epoch}, batch {batch}",
                "a finite loss and gradient",
                what,
                [
                    "the pair is as it was before that step: save it, or look at it",
                    "a lower learning rate, or clip_norm=10",
                    "a floor under scales; logits instead of probabilities",
                ],
            )
        average = self.stepper.averages()
        bar.set_postfix_str(f"{self._name} {_shown(average):.2f}", refresh=False)

    @property
    def _name(self) -> str:
        """What the bound is called: with a point-mass guide it is none."""
        return "log_joint" if self.structure.has_points else "elbo"

    def _end_epoch(self, bar: Any) -> None:
        done, average = self.progress, self.stepper.averages()
        record: dict[str, Any] = {"epoch": done.epoch, "step": done.global_step}
        record["loss"] = average["loss"]
        record[self._name] = average["elbo"]
        record["log_likelihood"] = average["log_likelihood"]
        record["rate"] = None if self.structure.has_points else average["rate"]
        record["grad_norm"] = average["grad_norm"]
        record["lr"] = self.stepper.optimizer.param_groups[0]["lr"]
        if self.stepper.state is not None:
            for name in self.stepper.state.schedules:
                record[name] = float(getattr(self.stepper.state, name))
        if self.valid is not None:
            record.update(self._validate())
        record = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        record["seconds"] = round(done.seconds, 3)
        done.history.append(record)
        done.epoch, done.step = done.epoch + 1, 0
        self.stepper.reset()
        if self.valid is not None:
            value = record[f"valid_{self._name}"]
            self._note_best(value)
            if value is not None:
                bar.set_postfix_str(f"valid {self._name} {value:.2f}")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            done.history.write_last(self._history_file)
        if done.epoch % self.save_every == 0 and done.epoch < self.epochs:
            self._save_checkpoint()

    def _validate(self) -> dict[str, Any]:
        """The validation ELBO and its parts, by one draw that is the same after each epoch."""
        bound = bounds.elbo(
            self.model, self.guide, self.valid, structure=self.structure, seed=self.seed
        )
        parts = {f"valid_{self._name}": bound.mean}
        if bound.distortion is not None:
            parts["valid_log_likelihood"] = -bound.distortion.mean
        if bound.rate is not None:
            parts["valid_rate"] = bound.rate.mean
        return parts

    def _note_best(self, value: float | None) -> None:
        done = self.progress
        if value is not None and (done.best is None or value > done.best):
            done.best, done.best_epoch = value, done.epoch - 1
            if self.patience is not None:
                tensors = {**self.structure.parameters, **self.buffers}
                done.best_tensors = {k: v.detach().clone() for k, v in tensors.items()}
        elif self.patience is not None:
            since = done.epoch - 1 - (done.best_epoch or 0)
            done.stopped_early = since >= self.patience

    # What is around the loop

    @contextmanager
    def _surroundings(self) -> Iterator[tuple[Any, threading.Event]]:
        """Own generators, validation off, a bar, Ctrl-C at a step's end; all undone afterwards."""
        total = self.epochs * self.steps_per_epoch
        modes = [(m, m.training) for m in self.structure.modules]
        bar = tqdm(
            total=total,
            initial=self.progress.global_step,
            unit="step",
            desc="fit",
            disable=not self.show_progress,
        )
        with (
            bar,
            randomness.forked(self.seed),
            pyro.validation_enabled(is_validate=False),
            _on_interrupt() as stop,
        ):
            if self._rng is not None:
                randomness.set_state(self._rng)
            try:
                yield bar, stop
            finally:
                for module, training in modes:
                    module.training = training

    def _mode(self, *, training: bool) -> None:
        for module in self.structure.modules:
            module.training = training

    def _save_checkpoint(self) -> None:
        if self.folder is not None:
            checkpoint.save(self._checkpoint_file, self._snapshot())

    def _snapshot(self) -> checkpoint.Checkpoint:
        return snapshot(self.progress, self.stepper, self.buffers, self._settings)

    def _check_folder(self, *, resume: bool, overwrite: bool) -> None:
        if self.folder is None:
            if resume:
                raise ArgumentError("resume", "a folder to resume from", "folder=None")
        elif resume and overwrite:
            raise ArgumentError("overwrite", "either resume or overwrite", "both")
        elif not resume and not overwrite and self._checkpoint_file.exists():
            raise CheckpointError(
                str(self.folder),
                "a folder without a training in it",
                "a checkpoint",
                ["resume=True, to go on with it", "overwrite=True", "another folder"],
            )


@contextmanager
def _on_interrupt() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event; the second one interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: Any) -> None:
        if stop.is_set() and callable(before):
            before(signum, frame)
        stop.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _as_objective(objective: PyroELBO | None, plate: str | None) -> PyroELBO:
    """Exactly ``Trace_ELBO`` runs as our own ELBO: the same numbers, and the parts logged."""
    if objective is None:
        return ELBO(plate=plate)
    if type(objective) is Trace_ELBO:
        return ELBO(
            objective.num_particles,
            vectorize_particles=True if objective.vectorize_particles else None,
            plate=plate,
        )
    if not isinstance(objective, PyroELBO):
        raise ArgumentError(
            "objective",
            "an instance of one of pyro.infer's ELBOs or of pvae.objectives",
            repr(objective),
            ["objectives.ELBO(beta=0.5)", "pyro.infer.TraceMeanField_ELBO()"],
        )
    return objective


def place(model: Any, guide: Any, device: str | torch.device) -> tuple[torch.device, torch.dtype]:
    """Moves modules to the device; returns it, and the type of their first floating tensor."""
    modules = [m for m in (model, guide) if isinstance(m, nn.Module)]
    tensors = [p for m in modules for p in (*m.parameters(), *m.buffers()) if p.is_floating_point()]
    if device == "auto":
        where = torch.device("cuda" if tensors and torch.cuda.is_available() else "cpu")
    else:
        try:
            where = torch.device(device)
        except RuntimeError as error:
            raise ArgumentError("device", "'auto', 'cpu', 'cuda', ...", repr(device)) from error
        if where.type == "cuda" and not torch.cuda.is_available():
            raise ArgumentError(
                "device",
                "a device of this machine",
                "cuda, and there is none",
                ["device='auto'", "pvae doctor"],
            )
    for module in modules:
        module.to(where)
    return where, tensors[0].dtype if tensors else torch.get_default_dtype()


def _warn_of_long_schedules(schedules: dict[str, Schedule], total: int) -> None:
    for name, schedule in schedules.items():
        if schedule.settles_at > total:
            warnings.warn(
                f"{name} reaches its end at step {schedule.settles_at}, but the training has "
                f"{total} steps: it ends at {schedule(total):.3g}. Shorten the schedule or train "
                "for longer.",
                PvaeWarning,
                stacklevel=5,
            )


def _shown(average: dict[str, float]) -> float:
    return average["elbo"] if math.isfinite(average["elbo"]) else -average["loss"]
