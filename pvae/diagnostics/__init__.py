"""What a fit is worth: bound, posterior, latent space, model, training.

Each diagnostic returns its numbers as data, and what they mean as `Finding`s.
"""

from pvae.diagnostics.calibration import SBC, sbc
from pvae.diagnostics.codes import hoyer, near_zero, sensitivity
from pvae.diagnostics.finding import Finding, Verdict
from pvae.diagnostics.joint import TARP, tarp
from pvae.diagnostics.uniformity import Uniformity
from pvae.diagnostics.units import active_units

__all__ = [
    "SBC",
    "TARP",
    "Finding",
    "Uniformity",
    "Verdict",
    "active_units",
    "hoyer",
    "near_zero",
    "sbc",
    "sensitivity",
    "tarp",
]
