"""Draws of latents and data from a pair: the one ancestral sampler that every tool has.

`run_model` runs a model once with its data drawn; `simulate_batch` draws K times for a batch, with
latents of the model or of the guide; `draws` does so for a data set, in chunks of bounded memory.
`draw_jointly` and `Replicates` are what simulation-based calibration and predictive checks make of
them.
"""

from pvae.simulate.ancestral import (
    Origin,
    RunOptions,
    Simulation,
    require_mean,
    run_model,
    simulate_batch,
)
from pvae.simulate.draws import CheckKind, Replicates, check_generative, draws
from pvae.simulate.joint import (
    JointDraws,
    draw_jointly,
    flat_values,
    names_of_dimensions,
    random_rank,
    require_rows,
)

__all__ = [
    "CheckKind",
    "JointDraws",
    "Origin",
    "Replicates",
    "RunOptions",
    "Simulation",
    "check_generative",
    "draw_jointly",
    "draws",
    "flat_values",
    "names_of_dimensions",
    "random_rank",
    "require_mean",
    "require_rows",
    "run_model",
    "simulate_batch",
]
