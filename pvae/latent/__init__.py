r"""What can be done with codes, the latents of data, for any pair.

A plain autoencoder has no distribution of codes to draw from. With a density fitted to its codes
it is a generative model, which is a pair like any other:

    density = latent.fit_density(latent.codes(ae, x), "gmm", num_components=20)
    vae = VAE(density, ae.model.likelihood, ae.guide.posterior)
    vae.sample(25)

For a pair that isn't a `pvae.VAE`, `with_prior` puts the density in the prior's place.
"""

from pvae.latent.arithmetic import (
    analogy,
    attribute_vector,
    interpolate,
    jeffreys,
    nearest,
    precision_at_k,
    traverse,
)
from pvae.latent.coding import codes
from pvae.latent.densities import fit_density
from pvae.latent.models import sample, with_prior

__all__ = [
    "analogy",
    "attribute_vector",
    "codes",
    "fit_density",
    "interpolate",
    "jeffreys",
    "nearest",
    "precision_at_k",
    "sample",
    "traverse",
    "with_prior",
]
