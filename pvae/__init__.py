"""pvae: variational autoencoders as probabilistic programs, on Pyro.

A model p(x, z) and a guide q(z | x) are two Pyro programs; the evidence lower bound between them is
explicit; prior, likelihood, guide and objective are each swapped by one argument. Importing this
package imports neither torch nor anything else; names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    import pvae.bounds as bounds
    import pvae.checkpoint as checkpoint
    import pvae.conditional as conditional
    import pvae.corruptions as corruptions
    import pvae.data as data
    import pvae.diagnostics as diagnostics
    import pvae.distributed as distributed
    import pvae.engine as engine
    import pvae.errors as errors
    import pvae.export as export
    import pvae.guides as guides
    import pvae.jacobian as jacobian
    import pvae.latent as latent
    import pvae.likelihoods as likelihoods
    import pvae.mmd as mmd
    import pvae.networks as networks
    import pvae.objectives as objectives
    import pvae.penalties as penalties
    import pvae.plots as plots
    import pvae.priors as priors
    import pvae.randomness as randomness
    import pvae.recipes as recipes
    import pvae.report as report
    import pvae.schedules as schedules
    import pvae.sites as sites
    import pvae.svi as svi
    import pvae.terms as terms
    import pvae.testing as testing
    from pvae.conditional import Conditional
    from pvae.diagnostics import diagnose
    from pvae.divergence import kl
    from pvae.errors import PvaeError, PvaeWarning
    from pvae.fitting import Fit, fit, load
    from pvae.svi import SVI
    from pvae.vae import VAE, Guide, Model

_MODULES = (
    "bounds",
    "checkpoint",
    "conditional",
    "corruptions",
    "data",
    "diagnostics",
    "distributed",
    "engine",
    "errors",
    "export",
    "guides",
    "jacobian",
    "latent",
    "likelihoods",
    "mmd",
    "networks",
    "objectives",
    "penalties",
    "plots",
    "priors",
    "randomness",
    "recipes",
    "report",
    "schedules",
    "sites",
    "svi",
    "terms",
    "testing",
)
_NAMES = {
    "Conditional": "conditional",
    "Fit": "fitting",
    "Guide": "vae",
    "Model": "vae",
    "Pair": "pair",
    "PvaeError": "errors",
    "PvaeWarning": "errors",
    "SVI": "svi",
    "VAE": "vae",
    "diagnose": "diagnostics",
    "fit": "fitting",
    "kl": "divergence",
    "load": "fitting",
}

__all__ = [
    "SVI",
    "VAE",
    "Conditional",
    "Fit",
    "Guide",
    "Model",
    "Pair",
    "PvaeError",
    "PvaeWarning",
    "bounds",
    "checkpoint",
    "conditional",
    "corruptions",
    "data",
    "diagnose",
    "diagnostics",
    "distributed",
    "engine",
    "errors",
    "export",
    "fit",
    "guides",
    "jacobian",
    "kl",
    "latent",
    "likelihoods",
    "load",
    "mmd",
    "networks",
    "objectives",
    "penalties",
    "plots",
    "priors",
    "randomness",
    "recipes",
    "report",
    "schedules",
    "sites",
    "svi",
    "terms",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pvae.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"pvae.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'pvae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
