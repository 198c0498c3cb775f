"""A pair and data for ArviZ: draws and log densities as a tree of labelled arrays, and LOO."""

from pvae.export.leave_one_out import loo
from pvae.export.plan import GROUPS
from pvae.export.trees import to_arviz

__all__ = ["GROUPS", "loo", "to_arviz"]
