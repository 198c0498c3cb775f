"""The training loop, and the end of an epoch: record, validation, the best epoch, a checkpoint."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pyro
import torch
from tqdm import tqdm

from pvae import bounds, randomness
from pvae.bounds.possible import ALARM, ROUNDING
from pvae.engine import MixedStepper
from pvae.errors import TrainingError, oxford, warn
from pvae.fitting.history import History, Record
from pvae.fitting.saving import append_history, begin_folder, copy_into, save_checkpoint
from pvae.fitting.signals import Signals, waiting_for_signals
from pvae.fitting.training import Training
from pvae.lock import Lock
from pvae.modes import in_mode, with_gradients
from pvae.schedules import Constant

__all__ = ["train"]

LOOK_EVERY = 50
"""Steps between looks at the device: for the progress bar, and for a step that failed."""


def train(training: Training, lock: Lock | None) -> None:
    """Trains up to ``training.progress.epochs`` epochs in all; the lock is that of the folder."""
    progress, training.interrupted, is_first = training.progress, False, True
    training.lock = lock
    with _at_work(training) as (bar, interrupt, signals):
        begin_folder(training)
        while progress.epoch < progress.epochs and not (
            progress.stopped_early or training.interrupted
        ):
            started = time.perf_counter()
            for batch in training.batches_left():
                training.set_lr()
                with pyro.validation_enabled(is_validate=is_first):
                    training.stepper(batch, progress.global_step)
                is_first = False
                progress.step += 1
                progress.global_step += 1
                bar.update()
                _look_and_save(training, bar, signals)
                if interrupt.is_set():
                    break
            _look(training, bar)
            progress.seconds += time.perf_counter() - started
            if not interrupt.is_set() or progress.step >= training.steps_per_epoch:
                _end_epoch(training, bar)
            training.interrupted = interrupt.is_set()
        save_checkpoint(training)
        training.generators = training.drawing.get()
    if progress.best_tensors and not training.interrupted:
        copy_into(progress.best_tensors, training.tensors, "best epoch", "tensors")


def _look_and_save(training: Training, bar: tqdm, signals: Signals) -> None:
    """What is to be done within an epoch, every so many steps, or where a signal has come."""
    step, settings = training.progress.global_step, training.settings
    number = signals.agreed(step)
    is_due = number or (settings.save_steps is not None and step % settings.save_steps == 0)
    if is_due or step % LOOK_EVERY == 0:
        _look(training, bar)
    if is_due:
        save_checkpoint(training)
    if number:
        signals.deliver(number)


def _look(training: Training, bar: tqdm) -> None:
    """Waits for the device: shows the average so far, and stops if a step has failed."""
    failure = training.stepper.look()
    if failure is not None:
        training.go_back_to(failure.step)
        what = f"a loss of {type(training.objective).__name__} that isn't finite"
        if failure.sites:
            what = f"a value that isn't finite at site {oxford(failure.sites)}"
        elif failure.parameters:
            what = f"a gradient that isn't finite, of {oxford(failure.parameters[:3])}"
        fixes = [
            "the pair is as it was before that step: save it, or look at it",
            "a lower learning rate, or clip_norm=10",
            "a floor under scales; logits instead of probabilities",
        ]
        structure = training.structure
        if {*failure.sites} & {*structure.latents, *structure.global_latents}:
            fixes.append("a guide whose draws are in the prior's support")
        where = f"epoch {training.progress.epoch}, batch {training.progress.step}"
        raise TrainingError(where, "a finite loss and gradient", what, fixes)
    average = training.stepper.averages()
    value = average["elbo"] if math.isfinite(average["elbo"]) else -average["loss"]
    bar.set_postfix_str(f"{training.structure.quantity} {value:.2f}", refresh=False)


def _end_epoch(training: Training, bar: tqdm) -> None:
    """Records the epoch, validates, writes what is to be written, and goes on to the next one."""
    progress, settings = training.progress, training.settings
    record = _record(training)
    progress.history.append(record)
    progress.epoch, progress.step = progress.epoch + 1, 0
    training.stepper.reset()
    _warn_of_late_parameters(training)
    _warn_of_the_impossible(progress.history)
    if training.valid is not None:
        name = training.structure.quantity
        value = record[f"valid_{name}"]
        _note_best(training, value)
        if value is not None:
            bar.set_postfix_str(f"valid {name} {value:.2f}")
    append_history(training)
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
    if stepper.has_penalties:
        record["penalty"] = average["penalty"]
    if isinstance(stepper, MixedStepper):
        for name, own in stepper.steppers.items():
            record[f"loss_{name}"] = average[f"loss_{name}"]
            record[f"{own.structure.quantity}_{name}"] = average[f"elbo_{name}"]
    record["grad_norm"] = average["grad_norm"]
    record["lr"] = stepper.optimizer.param_groups[0]["lr"]
    if (state := stepper.state) is not None:
        changing = [name for name, s in state.schedules.items() if s != Constant(1.0)]
        record |= state.report() | {name: float(state.get_buffer(name)) for name in changing}
    if training.valid is not None:
        record |= training.world.from_first(lambda: _validate(training))
    if "impossible" not in record and (why := _impossible_rate(training, average)):
        record["impossible"] = why
    record["seconds"] = round(progress.seconds, 3)
    return {name: _finite(value) for name, value in record.items()}


def _impossible_rate(training: Training, average: dict[str, float]) -> str:
    """Says so where draws of an epoch have a rate below 0, by more than chance and rounding.

    What holds of the draws of one pass (`pvae.bounds.possible`) holds of all steps together.
    """
    structure, rate = training.structure, average["rate"]
    if structure.points or structure.improper or not structure.latents:
        return ""
    rows = average["rows"]
    sizes = abs(average["elbo"]) + abs(average["log_likelihood"])
    sizes += sum(math.prod(shape) for shape in structure.shapes.values())
    rounding = ROUNDING * torch.finfo(structure.dtype).eps * sizes
    if not -rate * rows > ALARM + rounding * rows:
        return ""
    return (
        f"site {oxford(structure.latents)}: a rate of {rate:.3g} nats, below 0, where no "
        "KL(q || p) is; bounds.elbo says more"
    )


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    if bound.reasons:
        parts["impossible"] = "; ".join(bound.reasons)
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


def _warn_of_the_impossible(history: History) -> None:
    """Of the first epoch whose numbers can't be."""
    if "impossible" in history[-1] and not any("impossible" in past for past in history[:-1]):
        warn(f"Epoch {history[-1]['epoch']} has impossible numbers: {history[-1]['impossible']}.")


# Around the loop


@contextmanager
def _at_work(training: Training) -> Iterator[tuple[tqdm, threading.Event, Signals]]:
    """Training mode, generators of its own, Pyro's validation off; all is put back afterwards.

    Yields:
        A progress bar, an event that is set when Ctrl-C is pressed, and other signals.
    """
    settings, world = training.settings, training.world
    on_cpu = training.structure.device.type == "cpu"  # where asking others waits for no device
    path = None if settings.folder is None else settings.folder.path
    signals = Signals(world, path, every=1 if on_cpu else LOOK_EVERY)
    bar = tqdm(
        total=training.progress.epochs * training.steps_per_epoch,
        initial=training.progress.global_step,
        unit="step",
        desc="fit",
        disable=not (settings.progress and world.is_first),
    )
    with (
        bar,
        with_gradients(),
        randomness.forked(world.seed(settings.seed)),
        in_mode(training.structure.modules, training=True),
        pyro.validation_enabled(is_validate=False),
        waiting_for_signals(signals),
        _on_interrupt(alone=world.size == 1) as interrupt,
    ):
        if training.generators is not None:
            training.drawing.set(training.generators)
        try:
            yield bar, interrupt, signals
        finally:
            training.stepper.release()


@contextmanager
def _on_interrupt(*, alone: bool) -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event; the second one interrupts as usual.

    Several processes, which couldn't all stop at the same step, are interrupted as usual.
    """
    stop = threading.Event()
    if not alone or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.is_set() and callable(before):
            before(signum, frame)
        stop.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
