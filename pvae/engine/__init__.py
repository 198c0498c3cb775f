"""How one training step runs: terms, loss, gradients, update, all without waiting for the device.

`Stepper` runs steps of any pair and objective, as Python (``"eager"``), as one compiled graph
(``"compiled"``), or as a CUDA graph (``"cudagraph"``); all give the same numbers.
"""

from pvae.engine.compiler import UncompilableError, compile_function
from pvae.engine.mixed import MixedStepper
from pvae.engine.monitor import PARTS, Failure
from pvae.engine.of_pyro import OptimizerOfPyro
from pvae.engine.optimizers import Backup, OptimizerLike, make_optimizer
from pvae.engine.precision import PRECISIONS, Precision
from pvae.engine.repeated import Repeated
from pvae.engine.stepper import ASKED, ENGINES, Asked, Engine, Stepper, choose

__all__ = [
    "ASKED",
    "ENGINES",
    "PARTS",
    "PRECISIONS",
    "Asked",
    "Backup",
    "Engine",
    "Failure",
    "MixedStepper",
    "OptimizerLike",
    "OptimizerOfPyro",
    "Precision",
    "Repeated",
    "Stepper",
    "UncompilableError",
    "choose",
    "compile_function",
    "make_optimizer",
]
