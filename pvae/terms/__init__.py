"""Terms: one traced pass of a pair, as log densities per particle, datum and site.

Every tool (objectives, bounds, diagnostics, export) reads these; nobody else traces a pair.
`inspect_pair` finds out once what a pair is made of, `compute` runs it on a batch, `stream` on a
data set in chunks of bounded memory, `draws` on one that shares global latents.
"""

from pvae.terms.chunks import first_batch, home_of, inspect_source, stream
from pvae.terms.density import LatentDensity, stream_densities
from pvae.terms.drawing import (
    Kind,
    check_generative,
    draw_globals,
    draws,
    held,
    is_inside,
    kept_of,
    observed,
    replicate,
)
from pvae.terms.messages import is_penalty
from pvae.terms.passes import compute, draw_guide, score_guide
from pvae.terms.probe import inspect_pair, probing, run_pair
from pvae.terms.result import SiteTerms, Terms
from pvae.terms.structure import Structure
from pvae.terms.support import check_data

__all__ = [
    "Kind",
    "LatentDensity",
    "SiteTerms",
    "Structure",
    "Terms",
    "check_data",
    "check_generative",
    "compute",
    "draw_globals",
    "draw_guide",
    "draws",
    "first_batch",
    "held",
    "home_of",
    "inspect_pair",
    "inspect_source",
    "is_inside",
    "is_penalty",
    "kept_of",
    "observed",
    "probing",
    "replicate",
    "run_pair",
    "score_guide",
    "stream",
    "stream_densities",
]
