"""Objectives: what to maximise, each a few lines over terms.

An objective is a ``pyro.infer.ELBO``, so it runs in Pyro's own ``SVI`` and returns what Pyro's
ELBOs return there: the plate-scaled sum in nats. `pvae.fit` divides by the number of data. It is a
frozen dataclass of its settings; what changes during training (the step of a schedule, a
multiplier) lives in an `ObjectiveState` made for one pair and one training, which a checkpoint
saves. The number of draws K comes first, ``IWAE(5)``; all else goes by keyword, and what all of
them take is said in `Objective`.
"""

from pvae.objectives.aggregate import DIPVAE, TCVAE, FactorVAE, InfoVAE
from pvae.objectives.base import Objective
from pvae.objectives.elbo import ELBO, as_objective
from pvae.objectives.gradients import RWS, STL, TVO, VIMCO
from pvae.objectives.rate import GECO, Capacity, FreeBits
from pvae.objectives.state import ObjectiveState
from pvae.objectives.table import named, table
from pvae.objectives.weighted import CIWAE, CUBO, IWAE, PIWAE, DReG, MultiplyWeightedIWAE, Renyi

__all__ = [
    "CIWAE",
    "CUBO",
    "DIPVAE",
    "ELBO",
    "GECO",
    "IWAE",
    "PIWAE",
    "RWS",
    "STL",
    "TCVAE",
    "TVO",
    "VIMCO",
    "Capacity",
    "DReG",
    "FactorVAE",
    "FreeBits",
    "InfoVAE",
    "MultiplyWeightedIWAE",
    "Objective",
    "ObjectiveState",
    "Renyi",
    "as_objective",
    "named",
    "table",
]
