"""The pair of a model and its guide: the object at which parts and tools meet.

`Pair` holds two Pyro programs and remembers what one traced batch of them has shown: a `Structure`.
Parts build pairs, tools work on them.
"""

from pvae.pair.base import Pair, PairLike, as_pair
from pvae.pair.messages import is_penalty, mask_of
from pvae.pair.modules import probing
from pvae.pair.observed import Observed, is_inside, observed_sites
from pvae.pair.probe import Batch, as_batch, num_rows_of, run_pair
from pvae.pair.structure import Structure

__all__ = [
    "Batch",
    "Observed",
    "Pair",
    "PairLike",
    "Structure",
    "as_batch",
    "as_pair",
    "is_inside",
    "is_penalty",
    "mask_of",
    "num_rows_of",
    "observed_sites",
    "probing",
    "run_pair",
]
