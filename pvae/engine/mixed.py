"""Steps on batches of several kinds, which one optimiser takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from pvae.engine.monitor import PARTS, Failure
from pvae.engine.stepper import Engine, Seen, Stepper
from pvae.engine.sums import zero_sums

__all__ = ["MixedStepper"]


class MixedStepper:
    """What `Stepper` is, for batches of several kinds: each kind has a stepper of its own.

    They share parameters, optimiser and the objective's state, so that a step of one kind is a step
    of the training, and a step that failed stops the steps of all. What they measure is summed
    apart.

    Attributes:
        first: The first stepper, whose structure and passes stand for all.

    Arguments:
        steppers: By the name of the kind; all with the same parameters, optimiser and state.
    """

    def __init__(self, steppers: Mapping[str, Stepper]) -> None:
        self.steppers = dict(steppers)
        self.first = first = next(iter(self.steppers.values()))
        self.structure, self.objective, self.state = first.structure, first.objective, first.state
        self.optimizer, self.world, self.passes = first.optimizer, first.world, first.passes
        self.sums = zero_sums(self.structure.device, len(self.steppers), len(PARTS) + 1)
        for row, stepper in zip(self.sums, self.steppers.values(), strict=True):
            stepper.share(first, row)

    def __call__(self, batch: tuple[str, tuple[Tensor, ...]], step: int) -> None:
        """Runs one step on a batch of the kind that is named before it."""
        name, tensors = batch
        self.steppers[name](tensors, step)

    @property
    def engine(self) -> Engine:
        """How a step runs."""
        return self.first.engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        for stepper in self.steppers.values():
            stepper.engine = engine

    def averages(self) -> dict[str, float]:
        """Averages over all data since the last `reset`, and those of each kind by its name."""
        apart = {name: stepper.averages() for name, stepper in self.steppers.items()}
        ran = [own for own in apart.values() if own["rows"]]
        rows = sum(own["rows"] for own in ran)
        sums = {part: sum(own["rows"] * own[part] for own in ran) for part in PARTS}
        whole = {part: total / max(rows, 1.0) for part, total in sums.items()} | {"rows": rows}
        return whole | {f"{k}_{name}": v for name, own in apart.items() for k, v in own.items()}

    @property
    def has_penalties(self) -> bool:
        """Whether any step had penalties so far, of whatever kind its batch was."""
        return any(stepper.has_penalties for stepper in self.steppers.values())

    def seen(self) -> Seen:
        """What steps of all kinds have shown of the pair."""
        return self.first.seen() | {"has_penalties": self.has_penalties}

    def restore_seen(self, seen: Seen) -> None:
        """Takes in what the steps before had shown."""
        self.first.restore_seen(seen)

    def reset(self) -> None:
        """Starts new averages."""
        self.sums.zero_()

    def look(self) -> Failure | None:
        """Waits for the device and says whether a step has failed."""
        first = self.first.look()
        if first is None:
            return None
        found = [stepper.failure() or first for stepper in self.steppers.values()]
        sites = dict.fromkeys(name for failure in found for name in failure.sites)
        parameters = dict.fromkeys(name for failure in found for name in failure.parameters)
        return replace(first, sites=tuple(sites), parameters=tuple(parameters))

    def release(self) -> None:
        """Drops the graphs on the device with their memory; steps to come make others."""
        for stepper in self.steppers.values():
            stepper.release()

    def recover(self, step: int) -> None:
        """Makes itself ready to go on at ``step``, after a failure."""
        for stepper in self.steppers.values():
            stepper.recover(step)
