"""The result of a training, which a user holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae import randomness
from pvae.errors import check_int
from pvae.fitting.history import History
from pvae.fitting.loop import train
from pvae.fitting.saving import save_checkpoint
from pvae.fitting.training import Progress, Training

if TYPE_CHECKING:
    from pvae.diagnostics import Diagnosis

__all__ = ["Fit"]


class Fit:
    """A pair and its training so far; made by `pvae.fit`.

    Attributes:
        pair: What is trained.
        objective: What is maximised.
        structure: What the pair is made of.
        training: Data, batches, settings and the stepper, for those who look closer.
    """

    def __init__(self, training: Training) -> None:
        self.pair, self.training = training.pair, training
        self.objective, self.structure = training.objective, training.structure

    @property
    def progress(self) -> Progress:
        """How far the training has come: epochs, steps, the best epoch, seconds."""
        return self.training.progress

    @property
    def history(self) -> History:
        """One record an epoch; ``fit.history["valid_elbo"]`` is a column."""
        return self.progress.history

    @property
    def interrupted(self) -> bool:
        """Whether the last training was stopped by Ctrl-C, at a step's end."""
        return self.training.interrupted

    def __repr__(self) -> str:
        progress, num_rows = self.progress, self.training.source.num_rows
        lines = [
            f"Fit of {len(self.structure.parameters)} parameter tensors to {num_rows} data, "
            f"{progress.epoch} epoch(s), {progress.global_step} steps, {progress.seconds:.0f} s"
        ]
        if self.history:
            last = self.history[-1]
            names = [k for k in last if k.endswith(("elbo", "log_joint", "loss", "rate"))]
            lines += [f"  {k}: {last[k]:.2f}" for k in names if last[k] is not None]
        if progress.best is not None:
            epoch = progress.best_epoch
            lines.append(f"  best validation value {progress.best:.2f}, epoch {epoch}")
        lines.append("  next: .diagnose(), or .refine(epochs)")
        return "\n".join(lines)

    def refine(self, epochs: int) -> Fit:
        """Trains for more epochs, from where the last training ended; returns itself."""
        self.training.set_epochs(self.progress.epoch + check_int("epochs", epochs))
        self.progress.stopped_early = False
        train(self.training)
        return self

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint of the pair and the training to a file.

        Of several processes all have to call this, and the first one writes.
        """
        with randomness.forked():
            if self.training.generators is not None:
                randomness.set_state(self.training.generators)
            save_checkpoint(self.training, Path(path))

    def diagnose(self, data: object = None, **options: Any) -> Diagnosis:
        """What the fit is worth, on one screen: `pvae.diagnose`.

        Arguments:
            data: Held out, best; None for the validation data, or else the training data.
            options: Those of `pvae.diagnose`.
        """
        from pvae.diagnostics import diagnose  # ArviZ takes a second to import

        if data is None:
            valid = self.training.valid
            data = self.training.source if valid is None else valid
        return diagnose(self.pair, data, **{"history": self.history, **options})

    def to_arviz(self, data: object = None, **options: Any) -> Any:
        """Draws from the fitted pair for ArviZ: `pvae.export.to_arviz`.

        Arguments:
            data: What it is conditioned on; None for the training data.
            options: Those of `pvae.export.to_arviz`.
        """
        from pvae import export  # ArviZ takes a second to import

        return export.to_arviz(self.pair, self.training.source if data is None else data, **options)
