"""Whether a pair is trained, where no history says so: what a few steps of training would gain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from pvae import bounds, randomness, terms
from pvae.devices import double
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import ERRORS, TRIAL, WHOLE
from pvae.engine import Backup
from pvae.errors import UndefinedError, check_int
from pvae.estimate import Estimate
from pvae.modes import in_mode
from pvae.objectives import ELBO
from pvae.options import Options, tool
from pvae.pair import Batch, PairLike, Structure

__all__ = ["Trial", "trial"]

_RATES = (1e-3, 1e-2, 1e-1)
_DRAWS = 10


@dataclass(frozen=True, repr=False)
class Trial(Result):
    """What a few steps of training gain.

    Attributes:
        gain: The bound after the best of the trials less the bound before, of rows that no step has
            seen; for a pair that belongs to its rows of these, by draw.
        lr: The learning rate of the best trial.
        num_steps: Steps of each.
        num_rows: Rows in a step.
        num_data: By how many data a gain of the whole data set is divided; 1 for gains by datum.
    """

    gain: Estimate
    lr: float
    num_steps: int
    num_rows: int
    num_data: int

    @property
    def title(self) -> str:
        """How many steps were tried."""
        return f"Trial: {self.num_steps} steps of Adam, lr = {self.lr:g}, on {self.num_rows} rows"

    @property
    def is_unfinished(self) -> bool:
        """Whether these steps gain more than chance and than next to nothing."""
        gain, error = self.gain.mean, self._error
        least = TRIAL.look if self.num_data == 1 else min(TRIAL.look * self.num_data, WHOLE)
        return gain >= least and gain > ERRORS * error

    @property
    def _error(self) -> float:
        values = double(self.gain.values)
        return float(values.std()) / len(values) ** 0.5

    def findings(self) -> list[Finding]:
        """The gain a datum, and whether to go on."""
        gain, error = self.gain.mean / self.num_data, self._error / self.num_data
        steps = f"{self.num_steps} steps of Adam"
        if self.is_unfinished:
            meaning, advice = f"so much {steps} add to the bound: it isn't trained", TRAIN_ON
            return [Finding("trial steps", gain, error, "nats", "look", meaning, advice)]
        meaning = f"{steps} gain nothing that counts"
        return [Finding("trial steps", gain, error, "nats", "good", meaning)]


TRAIN_ON = "train on: fit.refine(epochs), or pvae.fit(pair, x, epochs=...)"


@tool
def trial(
    pair: PairLike, data: object, *, num_steps: int = 50, **options: Unpack[Options]
) -> Trial:
    """Takes a few steps of training, says what they gain, and takes them back.

    Half of the rows are stepped on, by Adam at learning rates of 0.001, 0.01 and 0.1, each from the
    pair's own parameters; the other half says what the best of these does to the ELBO, before and
    after with the same draws. So what is gained isn't learned by heart. A pair with latents outside
    the data plate, or that belongs to its rows, is stepped on and judged by all of them.

    It is for pairs without a history, and for the ELBO: a pair trained with another objective, as
    one with a weight on the rate, may gain by it although its training is done.

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source; at least four rows.
        num_steps: Steps of each trial.
        options: As in `pvae.options.Options`; ``max_rows`` bounds the rows of a step.

    Raises:
        UndefinedError: Without trainable parameters, or if all rows have to be in a step and are
            more than ``max_rows``.

    Example:
        >>> x = (torch.arange(100) % 2).float()[:, None].expand(100, 8)
        >>> trial(pvae.recipes.vae(8, 2, hidden=(8,)), x).is_unfinished
        True
    """
    check_int("num_steps", num_steps)
    with terms.prepared(pair, data, options, "trial") as evaluation:
        evaluation = evaluation.in_memory()
        parameters = [p for p in evaluation.structure.parameters.values() if p.requires_grad]
        if not parameters:
            raise UndefinedError("trial", "a pair with trainable parameters", "none")
        step_on, judged_by = _halves(evaluation)

        def bound() -> Tensor:
            on, seed = judged_by, evaluation.seed
            return bounds.elbo(on.pair, on.source, _DRAWS, max_rows=on.max_rows, seed=seed).values

        gains: dict[float, Tensor] = {}
        before = bound()
        for lr in _RATES:
            with _taken_back(evaluation.structure, parameters), randomness.forked(evaluation.seed):
                _train(evaluation.structure, step_on, parameters, lr, num_steps)
                gains[lr] = (bound() - before).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    lr = max(gains, key=lambda rate: float(gains[rate].mean()))
    num_data = evaluation.num_rows if evaluation.structure.global_sites else 1
    found = Estimate("trial steps", gains[lr], by="draw" if num_data > 1 else "datum")
    num_rows = evaluation.structure.num_rows_of(step_on)
    return Trial(found, lr, num_steps, num_rows, num_data)


def _halves(evaluation: terms.Evaluation) -> tuple[Batch, terms.Evaluation]:
    """Rows for steps, and those that judge; all for both, of a pair that belongs to its rows."""
    structure, source = evaluation.structure, evaluation.source
    count = source.num_rows
    order = torch.arange(count, device=source.device)
    is_whole = bool(structure.global_sites) or structure.tied_to is not None
    is_whole = is_whole or structure.subsample_size is not None
    if is_whole and count > evaluation.max_rows:
        expected = f"at most max_rows={evaluation.max_rows} rows, all of which are in each step"
        raise UndefinedError("trial", expected, f"{count}", [f"max_rows={count}"])
    if is_whole:
        return source.rows(order), evaluation
    check_int("trial, rows of data", count, minimum=4)
    half, order = min(count // 2, evaluation.max_rows), order[torch.randperm(count)]
    return source.rows(order[:half]), evaluation.on(source.rows(order[half : 2 * half]))


def _train(
    structure: Structure, batch: Batch, parameters: Sequence[Tensor], lr: float, num_steps: int
) -> None:
    objective = ELBO()
    objective.check(structure)
    state = objective.make_state(structure, structure.num_rows_of(batch))
    optimizer = torch.optim.Adam(parameters, lr)
    with in_mode(structure.modules, training=True), torch.enable_grad():
        for _ in range(num_steps):
            evaluated = objective.compute_terms(structure, batch)
            loss = objective.surrogate(evaluated, state) / structure.divisor(evaluated.num_rows)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            if not bool(loss.isfinite()):
                return
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()


@contextmanager
def _taken_back(structure: Structure, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Undoes what is done to parameters, their gradients, and buffers."""
    buffers = [b for m in structure.modules for b in m.buffers(recurse=False)]
    backup, gradients = Backup([*parameters, *buffers]), [p.grad for p in parameters]
    try:
        yield
    finally:
        backup.restore()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
