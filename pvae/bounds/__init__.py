"""Estimates of the evidence, each a bound with its standard errors, for any pair."""

from pvae.bounds.lower import elbo, evidence
from pvae.bounds.prepare import prepare
from pvae.bounds.result import Bound

__all__ = ["Bound", "elbo", "evidence", "prepare"]
