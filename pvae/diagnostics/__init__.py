"""What a fit is worth: bound, posterior, latent space, model, training.

Each diagnostic returns its numbers as data, and what they mean as `Finding`s.
"""

from pvae.diagnostics.codes import hoyer, near_zero, sensitivity
from pvae.diagnostics.finding import Finding, Verdict
from pvae.diagnostics.gap import Gap, gap
from pvae.diagnostics.importance import Importance, importance, khat
from pvae.diagnostics.units import active_units

__all__ = [
    "Finding",
    "Gap",
    "Importance",
    "Verdict",
    "active_units",
    "gap",
    "hoyer",
    "importance",
    "khat",
    "near_zero",
    "sensitivity",
]
