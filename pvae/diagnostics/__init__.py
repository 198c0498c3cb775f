"""What a fit is worth: bound, posterior, latent space, model, training.

Each diagnostic returns its numbers as data, and what they mean as `Finding`s.
"""

from pvae.diagnostics.aggregate import AggregatedPosterior, aggregated_posterior
from pvae.diagnostics.calibration import SBC, sbc
from pvae.diagnostics.codes import hoyer, near_zero, sensitivity
from pvae.diagnostics.finding import Finding, Verdict
from pvae.diagnostics.joint import TARP, tarp
from pvae.diagnostics.surgery import Part, Surgery, surgery
from pvae.diagnostics.uniformity import Uniformity
from pvae.diagnostics.units import active_units

__all__ = [
    "SBC",
    "TARP",
    "AggregatedPosterior",
    "Finding",
    "Part",
    "Surgery",
    "Uniformity",
    "Verdict",
    "active_units",
    "aggregated_posterior",
    "hoyer",
    "near_zero",
    "sbc",
    "sensitivity",
    "surgery",
    "tarp",
]
