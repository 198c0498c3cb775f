"""The training loop."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
from tqdm import tqdm

from pvae import randomness
from pvae.errors import TrainingError, oxford
from pvae.fitting.epochs import end_epoch
from pvae.fitting.interrupts import on_interrupt
from pvae.fitting.saving import copy_into, save_checkpoint
from pvae.fitting.training import Training
from pvae.modes import in_mode

__all__ = ["train"]

LOOK_EVERY = 50
"""Steps between looks at the device: for the progress bar, and for a step that failed."""


def train(training: Training) -> None:
    """Trains up to ``training.progress.epochs`` epochs in all."""
    progress, save_steps = training.progress, training.settings.save_steps
    training.interrupted, is_first = False, True
    with _at_work(training) as (bar, interrupt):
        while progress.epoch < progress.epochs and not progress.stopped_early:
            started = time.perf_counter()
            for batch in training.batches_left():
                training.set_lr()
                with pyro.validation_enabled(is_validate=is_first):
                    training.stepper(batch, progress.global_step)
                is_first = False
                progress.step += 1
                progress.global_step += 1
                bar.update()
                is_due = save_steps is not None and progress.global_step % save_steps == 0
                if is_due or progress.global_step % LOOK_EVERY == 0:
                    _look(training, bar)
                if is_due:
                    save_checkpoint(training)
                if interrupt.is_set():
                    break
            _look(training, bar)
            progress.seconds += time.perf_counter() - started
            if not interrupt.is_set() or progress.step >= training.steps_per_epoch:
                end_epoch(training, bar)
            if interrupt.is_set():
                training.interrupted = True
                break
        save_checkpoint(training)
        training.generators = randomness.get_state()
    if progress.best_tensors and not training.interrupted:
        copy_into(progress.best_tensors, training.tensors, "best epoch", "tensors")


def _look(training: Training, bar: tqdm) -> None:
    """Waits for the device: shows the average so far, and stops if a step has failed."""
    failure = training.stepper.look(training.progress.global_step - 1)
    if failure is not None:
        training.go_back_to(failure.step)
        what = f"a loss of {type(training.objective).__name__} that isn't finite"
        if failure.sites:
            what = f"a value that isn't finite at site {oxford(failure.sites)}"
        elif failure.parameters:
            what = f"a gradient that isn't finite, of {oxford(failure.parameters[:3])}"
        raise TrainingError(
            f"epoch {training.progress.epoch}, batch {training.progress.step}",
            "a finite loss and gradient",
            what,
            [
                "the pair is as it was before that step: save it, or look at it",
                "a lower learning rate, or clip_norm=10",
                "a floor under scales; logits instead of probabilities",
            ],
        )
    average = training.stepper.averages()
    value = average["elbo"] if math.isfinite(average["elbo"]) else -average["loss"]
    bar.set_postfix_str(f"{training.structure.quantity} {value:.2f}", refresh=False)


@contextmanager
def _at_work(training: Training) -> Iterator[tuple[tqdm, threading.Event]]:
    """Training mode, generators of its own, Pyro's validation off; all is put back afterwards.

    Yields:
        A progress bar, and an event that is set when Ctrl-C is pressed.
    """
    settings, world = training.settings, training.world
    bar = tqdm(
        total=training.progress.epochs * training.steps_per_epoch,
        initial=training.progress.global_step,
        unit="step",
        desc="fit",
        disable=not (settings.progress and world.is_first),
    )
    with (
        bar,
        randomness.forked(world.seed(settings.seed)),
        in_mode(training.structure.modules, training=True),
        pyro.validation_enabled(is_validate=False),
        on_interrupt(alone=world.size == 1) as interrupt,
    ):
        if training.generators is not None:
            randomness.set_state(training.generators)
        yield bar, interrupt
