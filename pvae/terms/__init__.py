"""Terms: one traced pass of a pair, as log densities per particle, datum and site.

Every tool (objectives, bounds, diagnostics, export) reads these; nobody else traces a pair.
`prepared` makes pair and data ready, `compute` runs the pair on a batch, `stream` on a data set in
chunks of bounded memory.
"""

from pvae.distributions import mean_of
from pvae.pair import Structure, only_site
from pvae.terms.chunks import draw_globals, first_rows, fits_particles, stream
from pvae.terms.evaluation import Evaluation, check_place, look_at, prepared
from pvae.terms.passes import compute, draw_guide, score_guide
from pvae.terms.result import SiteTerms, Terms
from pvae.terms.rows import check_own_rows, has_own_rows
from pvae.terms.states import GuideStates
from pvae.terms.support import check_data

__all__ = [
    "Evaluation",
    "GuideStates",
    "SiteTerms",
    "Structure",
    "Terms",
    "check_data",
    "check_own_rows",
    "check_place",
    "compute",
    "draw_globals",
    "draw_guide",
    "first_rows",
    "fits_particles",
    "has_own_rows",
    "look_at",
    "mean_of",
    "only_site",
    "prepared",
    "score_guide",
    "stream",
]
