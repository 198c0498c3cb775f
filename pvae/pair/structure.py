"""What a pair is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pvae.errors import UndefinedError, oxford
from pvae.pair.messages import in_plates
from pvae.types import Program, Site

__all__ = ["Structure", "is_inside", "only_site"]


@dataclass(frozen=True)
class Structure:
    """What a pair is made of.

    Attributes:
        model: The model.
        guide: The guide.
        plate: Name of the data plate.
        plates: All its names; model and guide may differ.
        dim: Its dimension, counted from the right.
        nesting: Number of dimensions that plates take.
        subsample_size: Rows that the pair draws by itself; None if it takes the batch as it is.
        full_size: The data plate's full size.
        is_scaled: Whether the plate's size is larger than the batch's, so that Pyro scales it up.
        tied_to: The batch's length, if the pair runs on no other, as with parameters for each row.
        latents: Latent sites inside the data plate.
        global_latents: Latent sites outside it.
        global_sites: All sites outside it that have a density, auxiliary ones and factors too.
        observed: Observed sites.
        auxiliary: Sites of the guide that the model doesn't have.
        points: Latents whose guide is a point mass, which has no density.
        improper: Latents whose prior is improper, so that there is no evidence.
        enumerated: Latents that the model sums out.
        fed: Latents of data that the guide draws at another site, and sets to what that gave.
        removed_scales: ``poutine.scale`` factors by site, which no evidence contains.
        not_reparametrised: Sites of the guide whose draws have no gradient.
        shapes: Event shapes of latents that have a guide.
        parameters: Trainable parameters (unconstrained) by name.
        sides: By the same names: ``"model"``, ``"guide"``, or both.
        modules: The networks that the pair uses, however its programs reach them.
        anchor: A floating tensor of the pair, or of the batch where the pair has none itself.
        oddities: What a modeller should know of the parameters; the pair warns of each once.
        notes: What else one batch told; filled when first asked for.
    """

    model: Program
    guide: Program
    plate: str
    plates: frozenset[str]
    dim: int
    nesting: int
    subsample_size: int | None
    full_size: int
    is_scaled: bool
    tied_to: int | None
    latents: tuple[str, ...]
    global_latents: tuple[str, ...]
    global_sites: tuple[str, ...]
    observed: tuple[str, ...]
    auxiliary: tuple[str, ...]
    points: frozenset[str]
    improper: tuple[str, ...]
    enumerated: tuple[str, ...]
    fed: tuple[str, ...]
    removed_scales: dict[str, float]
    not_reparametrised: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    parameters: dict[str, Tensor]
    sides: dict[str, frozenset[str]]
    modules: tuple[nn.Module, ...]
    anchor: Tensor
    oddities: tuple[str, ...]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of parameters that model and guide both have."""
        return tuple(name for name, sides in self.sides.items() if len(sides) > 1)

    @property
    def has_points(self) -> bool:
        """Whether some latent of a datum has a point-mass guide."""
        return bool(self.points & set(self.latents))

    @property
    def quantity(self) -> str:
        """What log p - log q is: ``elbo``, or what it is instead where it is no bound.

        With a point mass, of a datum or shared, it is ``log_joint``; with an improper prior,
        ``unnormalised_elbo``.
        """
        if self.points:
            return "log_joint"
        return "unnormalised_elbo" if self.improper else "elbo"

    @property
    def device(self) -> torch.device:
        """Where the pair lives."""
        return self.anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its first floating tensor."""
        return self.anchor.dtype

    def divisor(self, num_rows: int) -> int:
        """By what a plate-scaled sum over a batch is divided to be per datum."""
        return self.full_size if self.is_scaled else num_rows

    def require_density(self, what: str, *, shared: bool = False) -> None:
        """Refuses a quantity that needs a density of q where a local latent is a point mass.

        With ``shared`` those outside the data plate need one, too.
        """
        needed = self.latents + self.global_latents * shared
        if points := [name for name in needed if name in self.points]:
            fixes = [
                "read the reconstruction log p(x | z) instead: bounds.elbo(...).distortion",
                "a stochastic guide, such as guides.MeanField",
                "an ex-post density on the codes, for sampling",
            ]
            actual = f"a point mass (Delta) at site {oxford(points)}"
            raise UndefinedError(what, "a guide with a density", actual, fixes)

    def require_proper(self, what: str) -> None:
        """Refuses a quantity that needs p(z) to be a distribution."""
        if self.improper:
            fixes = ["a proper prior, such as priors.StandardNormal"]
            actual = f"an improper prior at site {oxford(self.improper)}"
            raise UndefinedError(what, "a prior that is a distribution", actual, fixes)


def is_inside(structure: Structure, site: Site) -> bool:
    """Whether a site is inside the data plate."""
    return in_plates(structure.plates, site)


def only_site(where: str, what: str, names: Sequence[str], chosen: str | None) -> str:
    """The site that was chosen, or the only one there is."""
    if chosen is None and len(names) == 1:
        return names[0]
    if chosen is not None and chosen in names:
        return chosen
    expected, actual = f"site=NAME, as there isn't exactly one {what}", oxford(names) or "none"
    if chosen:
        expected, actual = f"the name of a {what}", f"'{chosen}'; there are: {actual}"
    raise UndefinedError(where, expected, actual, [f"site='{name}'" for name in names[:2]])
