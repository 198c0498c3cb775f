"""Fitting a pair: data -> steps -> history, with checkpoints and exact resume."""

from pvae.fitting.api import fit
from pvae.fitting.history import History
from pvae.fitting.loop import Fit
from pvae.fitting.state import load
from pvae.fitting.surroundings import place

__all__ = ["Fit", "History", "fit", "load", "place"]
