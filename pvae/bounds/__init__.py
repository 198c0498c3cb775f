"""Estimates of the evidence, each with its standard errors, for any pair."""

from pvae.bounds.annealing import AIS, Sandwich, bdmc
from pvae.bounds.comparison import Comparison, compare
from pvae.bounds.curve import Curve, iwae_curve
from pvae.bounds.evidence import elbo, evidence
from pvae.bounds.local import FAMILIES, Family, LocalFit, fit_locally
from pvae.bounds.weights import log_weights

__all__ = [
    "AIS",
    "FAMILIES",
    "Comparison",
    "Curve",
    "Family",
    "LocalFit",
    "Sandwich",
    "bdmc",
    "compare",
    "elbo",
    "evidence",
    "fit_locally",
    "iwae_curve",
    "log_weights",
]
