"""What a fit is worth: bound, posterior, latent space, model, training.

Each diagnostic returns its numbers as data, and what they mean as `Finding`s.
"""

from pvae.diagnostics.aggregate import AggregatedPosterior, aggregated_posterior
from pvae.diagnostics.checks import CHECKS, DEFAULT, SUMMARY, bits_per_dimension
from pvae.diagnostics.codes import active_units, hoyer, near_zero, sensitivity
from pvae.diagnostics.diagnose import NOTHING, RUN_ALL, Diagnosis, diagnose
from pvae.diagnostics.disentanglement import Disentanglement, disentanglement
from pvae.diagnostics.factors import DCI, Score, dci, factor_vae_score, irs, mig, sap
from pvae.diagnostics.gap import Gap, gap
from pvae.diagnostics.gradients import (
    GradientNoise,
    ObjectiveComparison,
    compare_objectives,
    gradient_noise,
)
from pvae.diagnostics.importance import Importance, JointImportance, importance, khat
from pvae.diagnostics.learning import LearningCurve, learning_curve
from pvae.diagnostics.nuts import AgainstNUTS, against_nuts
from pvae.diagnostics.pit import PIT, pit
from pvae.diagnostics.predictive import PredictiveCheck, PredictiveChecks, Statistic, predictive
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.sbc import SBC, sbc
from pvae.diagnostics.surgery import Surgery, surgery
from pvae.diagnostics.tarp import TARP, tarp
from pvae.diagnostics.thresholds import Threshold, Verdict, table
from pvae.diagnostics.trial import Trial, trial
from pvae.diagnostics.uniformity import Uniformity

__all__ = [
    "CHECKS",
    "DCI",
    "DEFAULT",
    "NOTHING",
    "PIT",
    "RUN_ALL",
    "SBC",
    "SUMMARY",
    "TARP",
    "AgainstNUTS",
    "AggregatedPosterior",
    "Diagnosis",
    "Disentanglement",
    "Finding",
    "Gap",
    "GradientNoise",
    "Importance",
    "JointImportance",
    "LearningCurve",
    "ObjectiveComparison",
    "PredictiveCheck",
    "PredictiveChecks",
    "Result",
    "Score",
    "Statistic",
    "Surgery",
    "Threshold",
    "Trial",
    "Uniformity",
    "Verdict",
    "active_units",
    "against_nuts",
    "aggregated_posterior",
    "bits_per_dimension",
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
    "table",
    "tarp",
    "trial",
]
