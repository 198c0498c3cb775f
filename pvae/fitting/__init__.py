"""Fitting a pair: data -> steps -> history, with checkpoints and exact resume."""

from pvae.fitting.api import Fit, fit
from pvae.fitting.history import History
from pvae.fitting.saving import load_parameters

__all__ = ["Fit", "History", "fit", "load_parameters"]
