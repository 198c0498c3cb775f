"""Data: arrays, tensors and datasets turned into batches on a device; readers; toys.

`as_source` takes whatever a user has, `Batches` cuts it into batches whose order is a function of
(seed, epoch, step), `load` reads data sets by name or from a file.
"""

from pvae.data.arrays import Data
from pvae.data.batches import Batches
from pvae.data.checks import RowCheck, Support
from pvae.data.fetched import LoaderSource
from pvae.data.formats import Limits, read_idx
from pvae.data.intake import as_source, check_rows, in_memory, joined
from pvae.data.mixed import Mixed
from pvae.data.readers import Splits, load
from pvae.data.remote import download
from pvae.data.sources import Axes, Source, first_batch, num_rows_of
from pvae.data.toys import LinearGaussian, principal_components

__all__ = [
    "Axes",
    "Batches",
    "Data",
    "Limits",
    "LinearGaussian",
    "LoaderSource",
    "Mixed",
    "RowCheck",
    "Source",
    "Splits",
    "Support",
    "as_source",
    "check_rows",
    "download",
    "first_batch",
    "in_memory",
    "joined",
    "load",
    "num_rows_of",
    "principal_components",
    "read_idx",
]
