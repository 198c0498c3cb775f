"""Estimates of the evidence, each a bound with its standard errors, for any pair."""

from pvae.bounds.annealing import AIS
from pvae.bounds.comparison import Comparison, compare
from pvae.bounds.curve import Curve, iwae_curve
from pvae.bounds.evidence import evidence
from pvae.bounds.local import FAMILIES, Family, LocalFit, Refinement, fit_locally, refined
from pvae.bounds.lower import elbo
from pvae.bounds.result import Bound
from pvae.bounds.sandwich import Sandwich, bdmc
from pvae.bounds.weights import Estimate, log_weights

__all__ = [
    "AIS",
    "FAMILIES",
    "Bound",
    "Comparison",
    "Curve",
    "Estimate",
    "Family",
    "LocalFit",
    "Refinement",
    "Sandwich",
    "bdmc",
    "compare",
    "elbo",
    "evidence",
    "fit_locally",
    "iwae_curve",
    "log_weights",
    "refined",
]
