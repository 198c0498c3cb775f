"""What a fit is worth: bound, posterior, latent space, model, training.

Each diagnostic returns its numbers as data, and what they mean as `Finding`s.
"""

from pvae.diagnostics.aggregate import AggregatedPosterior, aggregated_posterior
from pvae.diagnostics.calibration import SBC, sbc
from pvae.diagnostics.codes import hoyer, near_zero, sensitivity
from pvae.diagnostics.disentanglement import Disentanglement, disentanglement
from pvae.diagnostics.factors import DCI, Score, dci, factor_vae_score, irs, mig, sap
from pvae.diagnostics.finding import Finding, Verdict
from pvae.diagnostics.gap import Gap, gap
from pvae.diagnostics.gradients import (
    GradientNoise,
    ObjectiveComparison,
    compare_objectives,
    gradient_noise,
)
from pvae.diagnostics.importance import Importance, importance, khat
from pvae.diagnostics.joint import TARP, tarp
from pvae.diagnostics.learning import LearningCurve, learning_curve
from pvae.diagnostics.pit import Calibration, pit
from pvae.diagnostics.predictive import PredictiveCheck, Statistic, predictive
from pvae.diagnostics.screen import CHECKS, DEFAULT, Diagnosis, diagnose
from pvae.diagnostics.surgery import Part, Surgery, surgery
from pvae.diagnostics.uniformity import Uniformity
from pvae.diagnostics.units import active_units

__all__ = [
    "CHECKS",
    "DCI",
    "DEFAULT",
    "SBC",
    "TARP",
    "AggregatedPosterior",
    "Calibration",
    "Diagnosis",
    "Disentanglement",
    "Finding",
    "Gap",
    "GradientNoise",
    "Importance",
    "LearningCurve",
    "ObjectiveComparison",
    "Part",
    "PredictiveCheck",
    "Score",
    "Statistic",
    "Surgery",
    "Uniformity",
    "Verdict",
    "active_units",
    "aggregated_posterior",
    "compare_objectives",
    "dci",
    "diagnose",
    "disentanglement",
    "factor_vae_score",
    "gap",
    "gradient_noise",
    "hoyer",
    "importance",
    "irs",
    "khat",
    "learning_curve",
    "mig",
    "near_zero",
    "pit",
    "predictive",
    "sap",
    "sbc",
    "sensitivity",
    "surgery",
    "tarp",
]
