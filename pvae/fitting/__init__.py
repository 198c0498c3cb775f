"""Fitting a pair: data -> steps -> history, with checkpoints and exact resume."""

from pvae.fitting.api import fit
from pvae.fitting.history import History
from pvae.fitting.loop import Fit
from pvae.fitting.state import load

__all__ = ["Fit", "History", "fit", "load"]
