"""The training loop."""

from __future__ import annotations

import itertools
import math
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
from pyro.infer import ELBO as PyroELBO
from torch import Tensor, nn
from tqdm import tqdm

from pvae import bounds, checkpoint, distributed, randomness
from pvae import terms as t
from pvae.data import Batches, Source, as_source, check_rows, first_batch
from pvae.data.sources import LoaderSource
from pvae.engine import Engine, Stepper, choose, make_optimizer
from pvae.errors import (
    ArgumentError,
    DataError,
    PairError,
    PvaeWarning,
    TrainingError,
    check_int,
    oxford,
)
from pvae.fitting.checks import (
    check_batches,
    check_objective,
    check_overcomplete,
    check_parameters,
)
from pvae.fitting.history import History
from pvae.fitting.options import Options
from pvae.fitting.state import (
    Progress,
    buffers_of,
    copy_into,
    fingerprint,
    restore,
    snapshot,
    without_addresses,
)
from pvae.fitting.surroundings import on_interrupt
from pvae.fitting.together import agree, check_parts, warn_if_apart
from pvae.modes import in_mode
from pvae.objectives import Objective, ObjectiveState, as_objective
from pvae.pair import Pair
from pvae.schedules import Constant, Schedule, Timed

if TYPE_CHECKING:
    from pvae.diagnostics import Diagnosis

__all__ = ["Fit"]

LOOK_EVERY = 50
"""Steps between looks at the device: for the progress bar, and for a step that failed."""


class Fit:
    """A pair and its training so far; made by `fit`.

    Attributes:
        pair: What is trained.
        objective: What is maximised.
        structure: What the pair is made of.
        history: One record an epoch; ``fit.history["valid_elbo"]`` is a column.
        interrupted: Whether the last training was stopped by Ctrl-C, at a step's end.
    """

    def __init__(
        self,
        pair: Pair,
        data: Any,
        objective: PyroELBO | None,
        valid: Any,
        options: Options,
    ) -> None:
        self.pair, self.options, self.epochs = pair, options, options.epochs
        self.world = distributed.current()
        warn_if_apart(self.world)
        with randomness.forked():  # data sets and samplers may draw, too
            self._set_up(data, objective, valid)

    def _set_up(self, data: Any, objective: PyroELBO | None, valid: Any) -> None:
        options, pair = self.options, self.pair
        self.objective = as_objective(objective)
        self.interrupted = False
        if options.patience is not None and valid is None:
            raise ArgumentError(
                "patience", "validation data to look at", "valid=None", ["valid=x_valid"]
            )
        self.structure, self.source, self.valid = self._inspect(data, valid)
        self.batches = self._make_batches()
        self.steps_per_epoch = self.batches.steps_per_epoch
        if (size := self.structure.subsample_size) is not None:
            self.steps_per_epoch = -(
                -self.source.num_rows // size
            )  # as many as its subsamples take
        parameters = list(self.structure.parameters.values())
        optimizer = make_optimizer(options.optimizer, parameters, options.lr)
        self.stepper = Stepper(
            pair.model,
            pair.guide,
            self.objective,
            self.structure,
            optimizer,
            self._make_state(),
            options.clip_norm,
            precision=options.precision,
            world=self.world,
        )
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._set_length()
        self.buffers = buffers_of(pair, self.structure.modules)
        self.progress = Progress()
        self._rng: dict[str, Tensor] | None = None
        self._settings = {
            **options.fixed(),
            "batch_size": self.batches.batch_size,
            "num_rows": self.source.num_rows,
            "objective": without_addresses(repr(self.objective)),
            "optimizer": f"{type(optimizer).__name__}({_plain(optimizer.defaults)})",
            "data": fingerprint(self.source),
            "model": _made_of(pair.model),
            "guide": _made_of(pair.guide),
            "engine": options.engine,
        }
        agree(self.world, self._settings, {**self.structure.parameters, **self.buffers})
        self._store = set(pyro.get_param_store().keys())
        self._open_folder()

    def _inspect(self, data: Any, valid: Any) -> tuple[t.Structure, Source, Source | None]:
        """Looks at pair and data together, on the device, and refuses what can't be trained."""
        options, pair = self.options, self.pair
        where, dtype = pair.place(options.device, data)
        source = as_source(data, where, dtype)
        num_rows = min(options.batch_size or source.num_rows, source.num_rows)
        try:
            structure = pair.inspect_source(source, num_rows)
        except PairError:
            check_rows(source)  # was it the data?
            raise
        check_parameters(structure)
        if isinstance(self.objective, Objective):
            self.objective.check(structure)
        source = as_source(data, structure.device, structure.dtype)
        t.check_data(structure, source)
        check_overcomplete(structure, source)
        if valid is None:
            return structure, source, None
        validation = as_source(valid, structure.device, structure.dtype)
        t.check_data(structure, validation, "valid")
        pair.checked_sources.add(validation)
        return structure, source, validation

    def _make_batches(self) -> Batches:
        options, source = self.options, self.source
        is_whole = options.batch_size is None or self.structure.subsample_size is not None
        rows = source.num_rows if is_whole else options.batch_size
        assert rows is not None  # noqa: S101
        # With one batch an epoch the order is no matter, but to parameters of single rows.
        world = self.world
        batches = Batches(source, rows, options.seed, shuffle=rows < source.num_rows, world=world)
        size = batches.batch_size
        check_parts(world, self.objective, self.structure, source, size)
        check_batches(self.structure, source, size, world)
        if isinstance(self.objective, Objective) and self.objective.refuses_batches:
            check_objective(self.objective, self.structure, source, size, world)
        if options.save_steps is not None and isinstance(source, LoaderSource):
            raise ArgumentError(
                "save_steps", "data by index", "a DataLoader", ["pass loader.dataset"]
            )
        return batches

    def _make_state(self) -> ObjectiveState | None:
        """The objective's state for this training; Pyro's own objectives have none."""
        if not isinstance(self.objective, Objective):
            return None
        total = max(1, self.epochs * self.steps_per_epoch)
        state = self.objective.make_state(
            self.structure, self.source.num_rows, self.steps_per_epoch, total
        )
        _warn_of_long_schedules(state.schedules, total)
        return state

    def _set_length(self) -> None:
        """Gives schedules over the whole training its length."""
        total = max(1, self.epochs * self.steps_per_epoch)
        self.lr_factor = self.options.schedule.resolve(self.steps_per_epoch, total)
        if isinstance(self.objective, Objective) and self.stepper.state is not None:
            self.stepper.state.resolve(self.objective.schedules, self.steps_per_epoch, total)

    @property
    def _spanning(self) -> list[str]:
        """Names of schedules that span the whole training, whatever its length."""
        named = {"lr_schedule": self.options.schedule}
        if isinstance(self.objective, Objective):
            named |= self.objective.schedules
        return [name for name, s in named.items() if isinstance(s, Timed) and s.length is None]

    def _open_folder(self) -> None:
        """Goes on from the folder's checkpoint, or empties the folder, all else being checked."""
        options, saved = self.options, self.world.from_first(self._saved)
        if saved is not None:
            with randomness.forked():
                self._set_engine(saved.meta["settings"].get("engine"))
                self.progress = restore(
                    saved,
                    self.stepper,
                    self.buffers,
                    self._settings,
                    str(options.checkpoint_file),
                    self.world,
                    options.seed,
                )
                self._rng = randomness.get_state()
            if self.world.is_first:
                self.history.write(options.history_file)
            if self.progress.epochs != self.epochs:
                self._warn_of_stretching(self.progress.epochs)
        else:
            self._set_engine()
            if options.overwrite and options.folder is not None and self.world.is_first:
                options.checkpoint_file.unlink(missing_ok=True)
                options.history_file.unlink(missing_ok=True)

    def _saved(self) -> checkpoint.Checkpoint | None:
        """What there is to go on from."""
        if not self.options.resume or not self.options.checkpoint_file.exists():
            return None
        return checkpoint.load(self.options.checkpoint_file)

    def _set_engine(self, before: Engine | None = None) -> None:
        """The engine asked for; ``"auto"`` is the one before, or the one that pays."""
        asked = self.options.engine
        if asked == "auto":
            chosen = self.world.from_first(self._choose_engine) if before is None else before
            asked = chosen
        self.stepper.engine = self._settings["engine"] = asked

    def _choose_engine(self) -> Engine:
        steps, rows = self.epochs * self.steps_per_epoch, self.batches.batch_size
        own = max(self.world.shares(rows))
        return choose(self.stepper, lambda: first_batch(self.source, own), steps)

    def _warn_of_stretching(self, before: int) -> None:
        if self._spanning:
            warnings.warn(
                f"{oxford(self._spanning)} spans the whole training, which was {before} epoch(s) "
                f"and now is {self.epochs}: it goes on as the longer one would at this step, so "
                "the result isn't that of one training of that length.",
                PvaeWarning,
                stacklevel=5,
            )

    @property
    def history(self) -> History:
        """One record an epoch."""
        return self.progress.history

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
        lines.append("  next: .diagnose(), or .refine(epochs)")
        return "\n".join(lines)

    def refine(self, epochs: int) -> Fit:
        """Trains for more epochs, from where the last training ended; returns itself."""
        before, self.epochs = self.epochs, self.progress.epoch + check_int("epochs", epochs)
        self.progress.stopped_early = False
        if self.epochs != before:
            self._warn_of_stretching(before)
            self._set_length()
        self.train()
        return self

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint of the pair and the training to a file.

        Of several processes all have to call this, and the first one writes.
        """
        with randomness.forked():
            if self._rng is not None:
                randomness.set_state(self._rng)
            self._write_checkpoint(Path(path))

    def diagnose(self, data: Any = None, **options: Any) -> Diagnosis:
        """What the fit is worth, on one screen: `pvae.diagnose`.

        Arguments:
            data: Held out, best; None for the validation data, or else the training data.
            options: Those of `pvae.diagnose`.
        """
        from pvae.diagnostics import diagnose  # ArviZ takes a second to import

        options = {"history": self.history} | options
        if data is None:
            data = self.source if self.valid is None else self.valid
        return diagnose(self.pair, data, **options)

    def to_arviz(self, data: Any = None, **options: Any) -> Any:
        """Draws from the fitted pair for ArviZ: `pvae.export.to_arviz`.

        Arguments:
            data: What it is conditioned on; None for the training data.
            options: Those of `pvae.export.to_arviz`.
        """
        from pvae import export  # ArviZ takes a second to import

        return export.to_arviz(self.pair, self.source if data is None else data, **options)

    # The loop

    def train(self) -> None:
        """Trains up to ``epochs`` epochs in all; `fit` and `refine` call this."""
        done = self.progress
        done.epochs, self.interrupted = self.epochs, False
        with self._surroundings() as (bar, stop):
            first = True
            while done.epoch < self.epochs and not done.stopped_early:
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
                    if self.options.save_steps and done.global_step % self.options.save_steps == 0:
                        self._look(bar)
                        self._save_checkpoint()
                    if stop.is_set():
                        break
                if done.step == 0:
                    raise DataError("data", "at least one batch in an epoch", "none")
                self._look(bar)
                done.seconds += time.perf_counter() - started
                if not stop.is_set() or done.step >= self.steps_per_epoch:
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
        if isinstance(self.lr_factor, Constant) and self.lr_factor.number == 1.0:
            return  # the optimiser's own, which it may change itself
        factor = self.lr_factor(self.progress.global_step)
        for group, lr in zip(self.stepper.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * factor

    def _look(self, bar: Any) -> None:
        """Waits for the device: shows the average so far, and stops if a step has failed."""
        failure = self.stepper.look(self.progress.global_step - 1)
        if failure is not None:
            done = self.progress  # a step that failed is one of the epoch that is going on
            done.step -= done.global_step - failure.step
            done.global_step = failure.step
            self.stepper.recover(failure.step)
            epoch, batch = done.epoch, done.step
            what = (
                f"a value that isn't finite at site {oxford(failure.sites)}"
                if failure.sites
                else f"a gradient that isn't finite, of {oxford(failure.parameters[:3])}"
                if failure.parameters
                else f"a loss of {type(self.objective).__name__} that isn't finite"
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
        """What log p - log q is called: with a point mass it is no bound."""
        return self.structure.quantity

    def _end_epoch(self, bar: Any) -> None:
        done, average = self.progress, self.stepper.averages()
        record: dict[str, Any] = {"epoch": done.epoch, "step": done.global_step}
        record["loss"] = average["loss"]
        record[self._name] = average["elbo"]
        record["log_likelihood"] = average["log_likelihood"]
        no_rate = self.structure.has_points or self.structure.improper
        record["rate"] = None if no_rate else average["rate"]
        if self.stepper.has_penalties:
            record["penalty"] = average["penalty"]
        record["grad_norm"] = average["grad_norm"]
        record["lr"] = self.stepper.optimizer.param_groups[0]["lr"]
        if self.stepper.state is not None:
            record |= self.stepper.state.report()
            for name, schedule in self.stepper.state.schedules.items():
                if schedule == Constant(1.0):
                    continue
                record[name] = float(getattr(self.stepper.state, name))
        if self.valid is not None:
            record.update(self.world.from_first(self._validate))
        record = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        record["seconds"] = round(done.seconds, 3)
        done.history.append(record)
        done.epoch, done.step = done.epoch + 1, 0
        self.stepper.reset()
        self._warn_of_late_parameters()
        if self.valid is not None:
            value = record[f"valid_{self._name}"]
            self._note_best(value)
            if value is not None:
                bar.set_postfix_str(f"valid {self._name} {value:.2f}")
        if self.options.folder is not None and self.world.is_first:
            self.options.folder.mkdir(parents=True, exist_ok=True)
            done.history.write_last(self.options.history_file)
        if done.epoch % self.options.save_every == 0 and done.epoch < self.epochs:
            self._save_checkpoint()

    def _warn_of_late_parameters(self) -> None:
        late = set(pyro.get_param_store().keys()) - self._store
        if late:
            self._store |= late
            warnings.warn(
                f"{oxford(sorted(late))} came up during training, after the optimiser had taken "
                "the parameters of the first batch: not trained. Announce every parameter on every "
                "batch.",
                PvaeWarning,
                stacklevel=5,
            )

    def _validate(self) -> dict[str, Any]:
        """The validation ELBO and its parts, by one draw that is the same after each epoch.

        The draws are one sequence over the rows, so one process makes them all, and the number
        doesn't depend on how many there are.
        """
        bound = bounds.elbo(self.pair, self.valid, seed=self.options.seed)
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
            if self.options.patience is not None:
                tensors = {**self.structure.parameters, **self.buffers}
                done.best_tensors = {k: v.detach().clone() for k, v in tensors.items()}
        elif self.options.patience is not None:
            since = done.epoch - 1 - (done.best_epoch or 0)
            done.stopped_early = since >= self.options.patience

    # What is around the loop

    @contextmanager
    def _surroundings(self) -> Iterator[tuple[Any, threading.Event]]:
        """Own generators, validation off, a bar, Ctrl-C at a step's end; all undone afterwards."""
        total = self.epochs * self.steps_per_epoch
        bar = tqdm(
            total=total,
            initial=self.progress.global_step,
            unit="step",
            desc="fit",
            disable=not (self.options.progress and self.world.is_first),
        )
        with (
            bar,
            randomness.forked(self.world.seed(self.options.seed)),
            in_mode(self.structure.modules, training=True),
            pyro.validation_enabled(is_validate=False),
            on_interrupt(alone=self.world.size == 1) as stop,
        ):
            if self._rng is not None:
                randomness.set_state(self._rng)
            yield bar, stop

    def _save_checkpoint(self) -> None:
        if self.options.folder is not None:
            self._write_checkpoint(self.options.checkpoint_file)

    def _write_checkpoint(self, path: Path) -> None:
        generators = self.world.gather(randomness.get_state())
        if self.world.is_first:
            parts = (self.progress, self.stepper, self.buffers, self._settings, generators)
            checkpoint.save(path, snapshot(*parts))


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


def _made_of(program: Any) -> str:
    """What a module says it is made of: layers, dropout, corruptions, penalties."""
    if not isinstance(program, nn.Module):
        return type(program).__name__
    return without_addresses(repr(program))


def _shown(average: dict[str, float]) -> float:
    return average["elbo"] if math.isfinite(average["elbo"]) else -average["loss"]


def _plain(defaults: dict[str, Any]) -> str:
    """An optimiser's settings but for the learning rate, which is checked apart."""
    hidden = ("lr", "fused", "foreach", "capturable", "differentiable")
    return ", ".join(f"{k}={v}" for k, v in sorted(defaults.items()) if k not in hidden)
