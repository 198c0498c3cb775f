"""What a fit is worth: bound, posterior, latent space, model, training.

Each diagnostic returns its numbers as data, and what they mean as `Finding`s.
"""

from pvae.diagnostics.codes import hoyer, near_zero, sensitivity
from pvae.diagnostics.finding import Finding, Verdict
from pvae.diagnostics.importance import Importance, importance, khat
from pvae.diagnostics.pit import Calibration, pit
from pvae.diagnostics.predictive import PredictiveCheck, Statistic, predictive
from pvae.diagnostics.units import active_units

__all__ = [
    "Calibration",
    "Finding",
    "Importance",
    "PredictiveCheck",
    "Statistic",
    "Verdict",
    "active_units",
    "hoyer",
    "importance",
    "khat",
    "near_zero",
    "pit",
    "predictive",
    "sensitivity",
]
