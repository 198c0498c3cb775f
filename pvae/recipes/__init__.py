"""Named variants: functions that give a pair, ready to fit.

``RECIPES`` maps a name to the function and to the objective that goes with the pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyro.infer import ELBO as PyroELBO

from pvae.objectives import ELBO
from pvae.recipes.deterministic import (
    ae,
    contractive_ae,
    denoising_ae,
    rae,
    sparse_activations_ae,
    sparse_ae,
    vq_vae,
    wae,
)
from pvae.recipes.variational import NETWORKS, vae
from pvae.vae import VAE

__all__ = [
    "NETWORKS",
    "RECIPES",
    "Recipe",
    "ae",
    "contractive_ae",
    "denoising_ae",
    "rae",
    "sparse_activations_ae",
    "sparse_ae",
    "vae",
    "vq_vae",
    "wae",
]


@dataclass(frozen=True)
class Recipe:
    """A named variant: what builds the pair, and the objective that goes with it."""

    build: Callable[..., VAE]
    objective: Callable[..., PyroELBO] = ELBO
    has_point: bool = True


RECIPES: dict[str, Recipe] = {
    "vae": Recipe(vae, has_point=False),
    **{
        f.__name__: Recipe(f)
        for f in (
            ae,
            sparse_ae,
            sparse_activations_ae,
            contractive_ae,
            denoising_ae,
            rae,
            wae,
            vq_vae,
        )
    },
}
