"""The public names of pvae: each is stated here, once."""

from . import bounds as bounds
from . import checkpoint as checkpoint
from . import conditional as conditional
from . import corruptions as corruptions
from . import data as data
from . import diagnostics as diagnostics
from . import distributed as distributed
from . import engine as engine
from . import errors as errors
from . import export as export
from . import guides as guides
from . import jacobian as jacobian
from . import latent as latent
from . import likelihoods as likelihoods
from . import mmd as mmd
from . import networks as networks
from . import objectives as objectives
from . import penalties as penalties
from . import plots as plots
from . import priors as priors
from . import randomness as randomness
from . import recipes as recipes
from . import report as report
from . import schedules as schedules
from . import sites as sites
from . import svi as svi
from . import terms as terms
from . import testing as testing
from .conditional import Conditional as Conditional
from .diagnostics import diagnose as diagnose
from .divergence import kl as kl
from .errors import PvaeError as PvaeError
from .errors import PvaeWarning as PvaeWarning
from .fitting import Fit as Fit
from .fitting import fit as fit
from .fitting import load as load
from .pair import VAE as VAE
from .pair import Guide as Guide
from .pair import Model as Model
from .svi import SVI as SVI

__version__: str
