"""The end of an epoch: its record, validation, the best epoch kept, a checkpoint."""

from __future__ import annotations

import math

import pyro
from tqdm import tqdm

from pvae import bounds
from pvae.errors import oxford, warn
from pvae.fitting.history import Record
from pvae.fitting.saving import save_checkpoint
from pvae.fitting.training import Training
from pvae.schedules import Constant

__all__ = ["end_epoch"]


def end_epoch(training: Training, bar: tqdm) -> None:
    """Records the epoch, validates, writes what is to be written, and goes on to the next one."""
    progress, settings = training.progress, training.settings
    record = _record(training)
    progress.history.append(record)
    progress.epoch, progress.step = progress.epoch + 1, 0
    training.stepper.reset()
    _warn_of_late_parameters(training)
    if training.valid is not None:
        name = training.structure.quantity
        value = record[f"valid_{name}"]
        _note_best(training, value)
        if value is not None:
            bar.set_postfix_str(f"valid {name} {value:.2f}")
    if settings.folder is not None and training.world.is_first:
        settings.folder.mkdir(parents=True, exist_ok=True)
        progress.history.write_last(settings.history_file)
    if progress.epoch % settings.save_every == 0 and progress.epoch < progress.epochs:
        save_checkpoint(training)


def _record(training: Training) -> Record:
    """The epoch's averages, validation, and what the objective and its schedules have come to."""
    stepper, structure, progress = training.stepper, training.structure, training.progress
    average = stepper.averages()
    no_rate = structure.has_points or structure.improper
    record: Record = {
        "epoch": progress.epoch,
        "step": progress.global_step,
        "loss": average["loss"],
        structure.quantity: average["elbo"],
        "log_likelihood": average["log_likelihood"],
        "rate": None if no_rate else average["rate"],
    }
    if stepper.passes.has_penalties:
        record["penalty"] = average["penalty"]
    record["grad_norm"] = average["grad_norm"]
    record["lr"] = stepper.optimizer.param_groups[0]["lr"]
    if (state := stepper.state) is not None:
        record |= state.report()
        changing = [name for name, s in state.schedules.items() if s != Constant(1.0)]
        record |= {name: float(state.get_buffer(name)) for name in changing}
    if training.valid is not None:
        record |= training.world.from_first(lambda: _validate(training))
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[name] = None
    record["seconds"] = round(progress.seconds, 3)
    return record


def _validate(training: Training) -> Record:
    """The validation ELBO and its parts, by one draw that is the same after each epoch.

    The draws are one sequence over the rows, so one process makes them all, and the number
    doesn't depend on how many there are.
    """
    bound = bounds.elbo(training.pair, training.valid, seed=training.settings.seed)
    parts: Record = {f"valid_{training.structure.quantity}": bound.mean}
    if bound.distortion is not None:
        parts["valid_log_likelihood"] = -bound.distortion.mean
    if bound.rate is not None:
        parts["valid_rate"] = bound.rate.mean
    return parts


def _note_best(training: Training, value: float | None) -> None:
    """Keeps the best epoch's tensors, and stops the training when none has been better for long."""
    progress, patience = training.progress, training.settings.patience
    if value is not None and (progress.best is None or value > progress.best):
        progress.best, progress.best_epoch = value, progress.epoch - 1
        if patience is not None:
            tensors = training.tensors.items()
            progress.best_tensors = {name: x.detach().clone() for name, x in tensors}
    elif patience is not None:
        progress.stopped_early = progress.epoch - 1 - (progress.best_epoch or 0) >= patience


def _warn_of_late_parameters(training: Training) -> None:
    late = set(pyro.get_param_store().keys()) - training.store
    if late:
        training.store |= late
        warn(
            f"{oxford(sorted(late))} came up during training, after the optimiser had taken the "
            "parameters of the first batch: not trained. Announce every parameter on every batch."
        )
