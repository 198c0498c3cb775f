"""pvae: variational autoencoders as probabilistic programs, on Pyro.

A model p(x, z) and a guide q(z | x) are two Pyro programs; the evidence lower bound between them is
explicit; prior, likelihood, guide and objective are each swapped by one argument. Importing this
package imports neither torch nor anything else: a name is loaded when it is first used. The names
stand in ``__init__.pyi`` and nowhere else, where editors and mypy read them, and `lazy_loader` too.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
