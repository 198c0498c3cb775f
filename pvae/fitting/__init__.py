"""Fitting a pair: data -> steps -> history, with checkpoints and exact resume."""

from pvae.fitting.api import Fit, fit
from pvae.fitting.folder import CHECKPOINT, Folder, checkpoint_in, history_of, training_in
from pvae.fitting.history import History
from pvae.fitting.saving import load_parameters

__all__ = [
    "CHECKPOINT",
    "Fit",
    "Folder",
    "History",
    "checkpoint_in",
    "fit",
    "history_of",
    "load_parameters",
    "training_in",
]
