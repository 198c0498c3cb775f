"""What training steps measured, and whether one failed, kept on the device.

A step fails where its loss or its gradient isn't finite. The host finds out when it looks, every
so often, so that no step waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.devices import floats
from pvae.engine.sums import add_to, sums_of, zero_sums

__all__ = ["PARTS", "Failure", "Measured", "Monitor"]

PARTS = ("loss", "elbo", "log_likelihood", "rate", "penalty", "grad_norm")
"""What is summed over an epoch: per datum and in nats, but for the norm of the gradient."""


@dataclass(frozen=True)
class Failure:
    """The first step that wasn't finite: its number, and the sites or parameters at fault.

    Attributes:
        steps: How many steps changed nothing since, the first one among them.
    """

    step: int
    sites: tuple[str, ...]
    parameters: tuple[str, ...]
    steps: int


class Measured(NamedTuple):
    """What is measured on a batch, or by one of several processes on its rows of it.

    Attributes:
        parts: All of `PARTS` but the last, per datum.
        gradients: Gradients of the loss, by the name of the parameter; those that have one.
        densities: Log densities by site and program, not all finite where the loss isn't.
    """

    parts: Tensor
    gradients: dict[str, Tensor]
    densities: dict[tuple[str, str], Tensor]


class StepNumber:
    """The number of a step, on the device, where it is written only if it isn't the next one."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros((), dtype=torch.int64, device=device)
        self._known = 0

    def set(self, step: int) -> None:
        """Says which step comes."""
        if step != self._known:
            self.tensor.fill_(step)
        self._known = step + 1

    def advance(self) -> None:
        """Moves on with the end of a step, which may be captured."""
        self.tensor.add_(1)


class Monitor:
    """Sums of what steps measured, and the first step that failed.

    Once a step has failed, all further ones count as failed, until `recover`, unless each is to be
    judged by itself.

    Arguments:
        device: Where steps run.
        each_by_itself: Whether steps after one that failed may be good.

    Attributes:
        sums: Sums of each of `PARTS` times the step's rows, and of the rows, as `sums_of` reads
            them.
        loss: Loss of the last step.
        number: Number of the step that runs.
        failed: Whether a step has failed.
        failed_at: The number of the first one.
        skipped: How many have failed.
        may_look: Whether values may be read where that costs nothing.
    """

    def __init__(self, device: torch.device, *, each_by_itself: bool = False) -> None:
        self.each_by_itself = each_by_itself
        self.sums = zero_sums(device, len(PARTS) + 1)
        self.loss = torch.zeros((), dtype=floats(device), device=device)
        self.number = StepNumber(device)
        self.failed = torch.zeros((), dtype=torch.bool, device=device)
        self.failed_at = torch.full((), -1, dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._good = torch.ones((), dtype=torch.bool, device=device)
        self._bad: dict[tuple[str, ...], Tensor] = {}
        self.may_look = True

    def judge(
        self, measured: Measured, num_rows: int | Tensor, norms: Tensor, norm: Tensor
    ) -> Tensor:
        """Adds a step to the sums, and says whether it is good, as a tensor on the device.

        Arguments:
            measured: What the step measured.
            num_rows: How many data its parts are means of.
            norms: Norm of each parameter's gradient.
            norm: Norm of the whole gradient.
        """
        parts, densities = measured.parts, measured.densities
        row = torch.cat([parts, norm[None], norm.new_ones(1)]).to(self.loss.dtype) * num_rows
        self.loss.copy_(parts[0])
        is_readable = self.may_look and parts.device.type == "cpu"
        if is_readable and not self.failed and (parts[0] + norm).isfinite():
            add_to(self.sums, row)
            return self._good
        finite = parts[0].isfinite() & norm.isfinite()
        ok = finite if self.each_by_itself else finite & ~self.failed
        if densities:
            bad = ~torch.stack([density.sum() for density in densities.values()]).isfinite()
            self._note(("site", *(site for site, _ in densities)), bad)
        self._note(("parameter", *measured.gradients), ~norms.isfinite())
        self.failed_at.copy_(torch.where(finite | self.failed, self.failed_at, self.number.tensor))
        self.failed.logical_or_(~finite)
        self.skipped.add_(~ok)
        add_to(self.sums, torch.where(ok, row, torch.zeros_like(row)))
        return ok

    def _note(self, names: tuple[str, ...], bad: Tensor) -> None:
        """Keeps what was bad at the first failure, once there was one.

        Arguments:
            names: What ``bad`` is of: ``"site"`` or ``"parameter"``, and the name of each.
            bad: Which of them aren't finite. What is kept is written by graphs, too, so that each
                tuple of names has a tensor of its own.
        """
        if (known := self._bad.get(names)) is None:
            self._bad[names] = bad & ~self.failed
        else:
            known.copy_(torch.where(self.failed, known, bad))

    def share(self, first: Monitor, sums: Tensor) -> None:
        """Has with another monitor one record of the first step that failed; and sums elsewhere."""
        self.number, self.failed, self.failed_at = first.number, first.failed, first.failed_at
        self.skipped = first.skipped
        self.sums = sums

    def tensors(self) -> list[Tensor]:
        """What a step changes."""
        numbers = [self.number.tensor, self.failed_at, self.skipped]
        return [self.sums, self.loss, self.failed, *numbers]

    def averages(self) -> dict[str, float]:
        """Averages over data since the last `reset`, and ``"rows"``; waits for the device."""
        *sums, rows = sums_of(self.sums).tolist()
        means = {name: total / max(rows, 1.0) for name, total in zip(PARTS, sums, strict=True)}
        return means | {"rows": rows}

    def look(self) -> Failure | None:
        """Waits for the device and says whether a step has failed."""
        if not bool(self.failed):
            return None
        at_fault: dict[str, dict[str, None]] = {"site": {}, "parameter": {}}
        for (kind, *names), bad in self._bad.items():
            rows = zip(names, bad.tolist(), strict=True)
            at_fault[kind] |= dict.fromkeys(name for name, is_bad in rows if is_bad)
        sites, parameters = map(tuple, at_fault.values())
        return Failure(int(self.failed_at), sites, parameters, int(self.skipped))

    def recover(self) -> None:
        """Forgets the failure."""
        self.failed.zero_()
        self.failed_at.fill_(-1)
        self.skipped.zero_()
        for bad in self._bad.values():
            bad.zero_()
