"""A training step but for its update: a function of tensors, which may be compiled.

A pass whose loss or gradient isn't finite changes nothing, and nor does any pass after it: what it
did is undone on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.distributed import World
from pvae.engine.measure import PARTS, Measure, Measured, gradient_norms, refuse_sparse
from pvae.engine.monitor import Monitor
from pvae.engine.optimizers import Backup
from pvae.errors import PairError, oxford
from pvae.internals import multiply

__all__ = ["LocalResult", "PassResult", "Passes"]


class PassResult(NamedTuple):
    """What a pass gives.

    Attributes:
        ok: Whether it is good, and so may be followed by an update.
        measured: What the objective's state is to learn from, if anything.
        gradients: Of the loss by the name of the parameter, clipped.
    """

    ok: Tensor
    measured: Tensor | None
    gradients: dict[str, Tensor]


class LocalResult(NamedTuple):
    """What one of several processes gives for its rows.

    Attributes:
        parts: All of `PARTS` but the last, per datum.
        gradients: Of the loss by the name of the parameter.
    """

    parts: Tensor
    gradients: dict[str, Tensor]


class Passes:
    """Runs passes of a pair, and keeps track of what they change.

    Arguments:
        measure: Gives the loss and its gradients.
        monitor: Judges them.
        clip_norm: Largest norm of the whole gradient; None for no clipping.
        world: The processes that share each batch.

    Attributes:
        may_look: Whether values may be read where that costs nothing.
        moving: The buffers that a pass changes, where it is known, as while one is recorded.
        names: Of the parameters that the last pass had gradients of.
    """

    def __init__(
        self, measure: Measure, monitor: Monitor, clip_norm: float | None, world: World
    ) -> None:
        self.measure, self.monitor, self.clip_norm, self.world = measure, monitor, clip_norm, world
        self.state, self.parameters = measure.state, measure.structure.parameters
        self.buffers = [b for m in measure.structure.modules for b in m.buffers(recurse=False)]
        self.may_look = True
        self.moving: list[Tensor] | None = None
        self.names: list[str] = []
        self._agreed: list[str] | None = None
        """Names of parameters with a gradient in any process, after a pass of several."""

    def run(self, *batch: Tensor) -> PassResult:
        """A whole pass, by one process alone."""
        buffers = Backup(self.buffers if self.moving is None else self.moving)
        return self._judge(buffers, self.measure(batch))

    def run_local(self, *batch: Tensor) -> LocalResult:
        """What one of several processes has to do by itself, on its own rows."""
        measured = self.measure(batch)
        refuse_sparse(measured.gradients)
        with torch.no_grad():
            self.monitor.note_sites(measured.densities)
            return LocalResult(torch.stack(measured.parts), measured.gradients)

    def run_shared(
        self, batch: tuple[Tensor, ...], local: Callable[[tuple[Tensor, ...]], LocalResult]
    ) -> PassResult:
        """What `run` does, by all processes together, each on its own rows.

        Arguments:
            batch: This process's rows; empty where there are none for it.
            local: `run_local`, or its graph.
        """
        buffers, first = Backup(self.buffers), next(iter(self.parameters.values()))
        own = LocalResult(first.new_zeros(len(PARTS) - 1), {})
        if batch:
            own = local(batch)
        with torch.no_grad():
            gradients = self._complete(own.gradients)
            rows = len(batch[0]) if batch else 0
            total, [parts, *means] = self.world.mean(rows, [own.parts, *gradients.values()])
        return self._judge(
            buffers, Measured(list(parts), total, dict(zip(gradients, means, strict=True)))
        )

    def _complete(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the same parameters in every process, zero where it has none."""
        if self._agreed is None:
            anywhere = {name for names in self.world.gather([*gradients]) for name in names}
            self._agreed = [name for name in self.parameters if name in anywhere]
        if late := gradients.keys() - self._agreed:
            raise PairError(
                f"gradient of {oxford(sorted(late)[:3])}",
                "the same parameters in each step of several processes",
                "one more than in the first step",
            )
        return {
            n: gradients[n] if n in gradients else torch.zeros_like(self.parameters[n])
            for n in self._agreed
        }

    def _judge(self, buffers: Backup, measured: Measured) -> PassResult:
        """Says whether a pass is good, undoes it if not, clips its gradients, adds to the sums."""
        gradients, is_recorded = measured.gradients, self.moving is not None
        with torch.no_grad():
            norms = gradient_norms(gradients, is_fused=is_recorded)
            norm = torch.linalg.vector_norm(norms)
            ok = self.monitor.judge(
                [*measured.parts, norm],
                measured.num_rows,
                norms,
                measured.densities,
                may_look=self.may_look,
            )
            buffers.restore_unless(ok, may_wait=not is_recorded)
            if self.clip_norm is not None:
                factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
                clipped = multiply([*gradients.values()], factor)
                gradients = dict(zip(gradients, clipped, strict=True))
        self.names = [*gradients]
        return PassResult(ok, None if self.state is None else self.state.measured, gradients)

    def changing(self) -> list[Tensor]:
        """What a pass may change."""
        of_state = [] if self.state is None else list(self.state.tensors().values())
        return [*self.buffers, *of_state, *self.monitor.tensors()]

    def numbers(self, result: PassResult | LocalResult) -> list[Tensor]:
        """Copies of the loss and the gradients that the last pass gave."""
        loss = result.parts[0] if isinstance(result, LocalResult) else self.monitor.loss
        return [loss.clone(), *(g.detach().clone() for g in result.gradients.values())]
