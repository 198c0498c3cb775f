"""The pair of a model and its guide: the object at which parts and tools meet.

`Pair` holds two Pyro programs and remembers what one traced batch of them has shown: a `Structure`.
Parts build pairs, tools work on them.
"""

from pvae.pair.account import Account, Entry
from pvae.pair.base import Pair, PairLike, as_pair
from pvae.pair.messages import is_penalty, mask_of
from pvae.pair.observed import Observed, observed_sites
from pvae.pair.running import Batch, as_batch, probing, put_back, run_pair
from pvae.pair.structure import Structure, is_inside, only_site, rows_from, rows_to
from pvae.pair.uses import Uses

__all__ = [
    "Account",
    "Batch",
    "Entry",
    "Observed",
    "Pair",
    "PairLike",
    "Structure",
    "Uses",
    "as_batch",
    "as_pair",
    "is_inside",
    "is_penalty",
    "mask_of",
    "observed_sites",
    "only_site",
    "probing",
    "put_back",
    "rows_from",
    "rows_to",
    "run_pair",
]
