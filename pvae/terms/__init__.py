"""Terms: one traced pass of a pair, as log densities per particle, datum and site.

Every tool (objectives, bounds, diagnostics, export) reads these; nobody else traces a pair.
`prepared` makes pair and data ready, `compute` runs the pair on a batch, `stream` on a data set in
chunks of bounded memory, `draws` on one that shares global latents.
"""

from pvae.pair import Structure, run_pair
from pvae.terms.chunks import stream
from pvae.terms.drawing import (
    Kind,
    check_generative,
    draw_globals,
    draws,
    is_inside,
    kept_of,
    observed,
    replicate,
)
from pvae.terms.evaluation import Evaluation, prepared
from pvae.terms.passes import compute, draw_guide, score_guide
from pvae.terms.result import SiteTerms, Terms
from pvae.terms.support import check_data

__all__ = [
    "Evaluation",
    "Kind",
    "SiteTerms",
    "Structure",
    "Terms",
    "check_data",
    "check_generative",
    "compute",
    "draw_globals",
    "draw_guide",
    "draws",
    "is_inside",
    "kept_of",
    "observed",
    "prepared",
    "replicate",
    "run_pair",
    "score_guide",
    "stream",
]
