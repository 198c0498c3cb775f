"""A training that is set up: what its steps need, and how far it has come."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyro
from torch import Tensor, nn

from pvae.data import Batches, Mixed, Source
from pvae.engine import Asked, MixedStepper, Stepper
from pvae.errors import DataError, check_number, oxford, warn
from pvae.fitting.generators import Generators, States
from pvae.fitting.history import History
from pvae.fitting.identity import PairRecord, Values, identity_of, of_data
from pvae.fitting.midepoch import Reading
from pvae.fitting.settings import Settings
from pvae.lock import Lock
from pvae.objectives import Objective
from pvae.pair import Pair
from pvae.schedules import Constant, Schedule, Timed

__all__ = ["Progress", "Training", "named_tensors"]


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        epochs: Number of epochs that the training is to have.
        epoch: Number of whole epochs.
        step: Steps taken in the epoch after those.
        global_step: Steps taken in all.
        best: Best validation value so far; None before the first.
        best_epoch: Its epoch.
        seconds: Time spent in training.
        stopped_early: Whether validation ended it.
        history: One record an epoch.
        best_tensors: Parameters and buffers after the best epoch, if they are kept.
    """

    epochs: int = 0
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    best: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    stopped_early: bool = False
    history: History = field(default_factory=History)
    best_tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Training:
    """A pair, its data and its stepper, ready for the loop, and how far they have come.

    Attributes:
        pair: What is trained.
        settings: What `pvae.fit` was told.
        batches: The data, cut into batches; of several kinds, each with its kind's name.
        valid: The validation data, if there are any.
        stepper: Runs a step.
        objective, structure, world: Those of the stepper.
        source: The data.
        steps_per_epoch: Number of steps in an epoch.
        num_steps: Steps of the whole training, at least one, which schedules may span.
        buffers: Buffers and frozen parameters of the pair's networks, by name.
        tensors: These and the parameters.
        record: What the pair was at the start.
        chosen: The engine that the training has chosen, or was told.
        progress: How far it has come.
        drawing: The random generators.
        generators: Their states where the training was left; None before.
        reading: The batches, from any step of an epoch on.
        interrupted: Whether the last training was stopped by Ctrl-C, at a step's end.
        lock: That of the folder, in the process that writes there.
        store: Names in Pyro's parameter store that were there before the last epoch.
        made: How the pair was made, as its checkpoints say.
    """

    pair: Pair
    settings: Settings
    batches: Batches | Mixed
    valid: Source | None
    stepper: Stepper | MixedStepper
    record: PairRecord
    generators: States | None = None
    interrupted: bool = False
    lock: Lock | None = None

    def __post_init__(self) -> None:
        batches, stepper = self.batches, self.stepper
        self.source, self.world = batches.source, stepper.world
        self.objective, self.structure = stepper.objective, stepper.structure
        self.steps_per_epoch = batches.steps_per_epoch
        if (size := self.structure.subsample_size) is not None:  # as many as its subsamples take
            self.steps_per_epoch = -(-self.source.num_rows // size)
        self.buffers = named_tensors(self.pair, self.structure.modules, trainable=False)
        self.tensors = {**self.structure.parameters, **self.buffers}
        self.drawing = Generators(self.pair.model, self.pair.guide, batches)
        self.reading = Reading(batches, self.drawing)
        self.chosen: Asked = self.settings.engine
        self._named = identity_of(self.settings, self.objective, stepper.optimizer, batches)
        self.progress = Progress(epochs=self.settings.epochs)
        self.store = set(pyro.get_param_store().keys())
        self.made = {} if self.settings.folder is None else dict(self.settings.folder.made)
        self._lrs = [float(group["lr"]) for group in stepper.optimizer.param_groups]
        self.set_epochs(self.settings.epochs)

    @property
    def identity(self) -> Values:
        """What a resumed training must have in common with the first one, beside the pair."""
        return {**self._named, "engine": self.chosen, **self._data}

    @cached_property
    def _data(self) -> Values:
        """Fingerprints of the data, which take a while where there are many."""
        return of_data(self.batches, self.valid)

    # Schedules

    def set_epochs(self, epochs: int) -> None:
        """Gives the training its length; warns if schedules span it, and it had another one."""
        named = {"lr_schedule": self.settings.schedule}
        if isinstance(self.objective, Objective):
            named |= self.objective.schedules
        spanning = [name for name, s in named.items() if isinstance(s, Timed) and s.length is None]
        before = self.progress.epochs
        if epochs != before and spanning:
            warn(
                f"{oxford(spanning)} spans the whole training, which was {before} epoch(s) "
                f"and now is {epochs}: it goes on as the longer one would at this step, so the "
                "result isn't that of one training of that length."
            )
        self.progress.epochs = epochs
        self.num_steps = max(1, epochs * self.steps_per_epoch)
        length = self.steps_per_epoch, self.num_steps
        self._lr_factor: Schedule = named.pop("lr_schedule").resolve(*length)
        for step in range(0, self.num_steps, -(-self.num_steps // 1000)):
            self._factor_at(step)
        if self.stepper.state is not None:
            self.stepper.state.resolve(named, *length)

    def set_lr(self) -> None:
        """Sets the learning rates of the step to come."""
        if isinstance(self._lr_factor, Constant) and self._lr_factor.number == 1.0:
            return  # the optimiser's own, which it may change itself
        factor = self._factor_at(self.progress.global_step)
        for group, lr in zip(self.stepper.optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * factor

    def _factor_at(self, step: int) -> float:
        """The learning rate's factor; below 0 the loss would be made larger."""
        return check_number(f"lr_schedule at step {step}", self._lr_factor(step), minimum=0)

    # Steps

    def batches_left(self) -> Iterator[Any]:
        """What is left of the epoch's batches.

        Raises:
            DataError: If a batch of a ``DataLoader`` can't be used, or the epoch has none.
        """
        epoch, start = self.progress.epoch, self.progress.step
        try:
            if self.structure.subsample_size is None:
                yield from self.reading.epoch(epoch, start)
            else:
                whole = next(self.batches.epoch(epoch))
                yield from itertools.repeat(whole, self.steps_per_epoch - start)
        except DataError as error:
            where = f"epoch {epoch}, {error.where}"
            fixes = ["the pair is as it was before that batch", *error.fixes]
            raise DataError(where, error.expected, error.actual, fixes) from error
        if (number := self.progress.step) != self.steps_per_epoch:
            warn(
                f"Epoch {epoch} had {number} batch(es) where the data promise "
                f"{self.steps_per_epoch}: schedules go by that length. A stream has to start anew "
                "at each pass, and its __len__ has to be right."
            )

    def go_back_to(self, step: int) -> None:
        """Takes back the steps from ``step`` on, which failed; all are of the epoch going on."""
        self.progress.step -= self.progress.global_step - step
        self.progress.global_step = step
        self.stepper.recover(step)


def named_tensors(
    pair: Pair, modules: Iterable[nn.Module] = (), *, trainable: bool
) -> dict[str, Tensor]:
    """Trainable parameters, or else buffers and frozen parameters, as a trace names them.

    Each is there once; those of functions are in the modules that these use.
    """
    named: dict[int, tuple[str, Tensor]] = {}
    numbered = ((f"module{i}", module) for i, module in enumerate(modules))
    for prefix, root in (("model", pair.model), ("guide", pair.guide), *numbered):
        if isinstance(root, nn.Module):
            buffers = [] if trainable else [*root.named_buffers()]
            parameters = [
                (n, p) for n, p in root.named_parameters() if p.requires_grad == trainable
            ]
            for name, tensor in (*buffers, *parameters):
                named.setdefault(id(tensor), (f"{prefix}.{name}", tensor))
    return dict(named.values())
