"""The pair of a model and its guide: the object at which parts and tools meet.

`Pair` holds two Pyro programs and remembers what one traced batch of them has shown: a `Structure`.
Parts build pairs, tools work on them.
"""

from pvae.pair.base import Pair, PairLike, as_pair
from pvae.pair.messages import is_penalty
from pvae.pair.modules import probing
from pvae.pair.probe import Batch, as_batch, num_rows_of, run_pair
from pvae.pair.structure import Structure

__all__ = [
    "Batch",
    "Pair",
    "PairLike",
    "Structure",
    "as_batch",
    "as_pair",
    "is_penalty",
    "num_rows_of",
    "probing",
    "run_pair",
]
