"""A pair and data for ArviZ: draws and log densities as a tree of labelled arrays, and LOO."""

from pvae.export.plan import GROUPS
from pvae.export.trees import loo, to_arviz

__all__ = ["GROUPS", "loo", "to_arviz"]
