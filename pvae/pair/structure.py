"""What a pair is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pvae.data import Axes, num_rows_of
from pvae.errors import UndefinedError, oxford
from pvae.pair.home import moved
from pvae.pair.messages import in_plates
from pvae.pair.running import Batch, as_batch
from pvae.types import Program, Site

__all__ = ["Structure", "is_inside", "only_site", "rows_from", "rows_to"]


@dataclass(frozen=True)
class Structure:
    """What a pair is made of.

    Attributes:
        model: The model.
        guide: The guide.
        plate: Name of the data plate; where there is none, of the one row that all data are.
        plates: All its names; model and guide may differ. Empty where no plate counts the data.
        dim: Its dimension, counted from the right.
        nesting: Number of dimensions that plates take.
        axes: The axis that counts the data in each entry of the batch; None where all share it.
        subsample_size: Rows that the pair draws by itself; None if it takes the batch as it is.
        full_size: The data plate's full size.
        is_scaled: Whether the plate's size is larger than the batch's, so that Pyro scales it up.
        tied_to: The batch's length, if the pair runs on no other, as with parameters for each row.
        latents: Latent sites inside the data plate.
        global_latents: Latent sites outside it.
        global_sites: All sites outside it that have a density, auxiliary ones and factors too.
        observed: Observed sites.
        factors: Factors of the model that are no penalties, and so part of its density.
        auxiliary: Sites of the guide that the model doesn't have.
        points: Latents whose guide is a point mass, which has no density.
        improper: Latents whose prior is improper, so that there is no evidence.
        enumerated: Latents that the model sums out.
        guide_states: Discrete latents of the guide that it marks to be enumerated.
        fed: Latents of data that the guide draws at another site, and sets to what that gave.
        removed_scales: ``poutine.scale`` factors by site, which no evidence contains.
        densities: Factors of the guide that the pair says are densities, as of a Jacobian.
        training_terms: All its other unmarked factors: what the loss has beside log q.
        masked_apart: Latents with different masks in model and guide, of which every entry that one
            of them leaves out is left out in both.
        imputed: Values that ``obs_mask=`` says are missing, which the guide leaves to the model; no
            other density depends on them.
        not_reparametrised: Sites of the guide whose draws have no gradient.
        shapes: Event shapes of latents that have a guide.
        parameters: Trainable parameters (unconstrained) by name.
        sides: By the same names: ``"model"``, ``"guide"``, or both.
        modules: The networks that the pair uses, however its programs reach them.
        anchor: A floating tensor of the pair, or of the batch where the pair has none itself.
        device: Where the pair lives, and batches go.
        on_host: Numbers of the batch's entries, in containers too, that stay on the host.
        categories: Places in the batch of integers that something is looked up by, as classes are.
        oddities: What a modeller should know of parameters and data; the pair warns of each once.
        notes: What else one batch told; filled when first asked for.
    """

    model: Program
    guide: Program
    plate: str
    plates: frozenset[str]
    dim: int
    nesting: int
    axes: Axes
    subsample_size: int | None
    full_size: int
    is_scaled: bool
    tied_to: int | None
    latents: tuple[str, ...]
    global_latents: tuple[str, ...]
    global_sites: tuple[str, ...]
    observed: tuple[str, ...]
    factors: tuple[str, ...]
    auxiliary: tuple[str, ...]
    points: frozenset[str]
    improper: tuple[str, ...]
    enumerated: tuple[str, ...]
    guide_states: tuple[str, ...]
    fed: tuple[str, ...]
    removed_scales: dict[str, float]
    densities: tuple[str, ...]
    training_terms: tuple[str, ...]
    masked_apart: tuple[str, ...]
    imputed: tuple[str, ...]
    not_reparametrised: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    parameters: dict[str, Tensor]
    sides: dict[str, frozenset[str]]
    modules: tuple[nn.Module, ...]
    anchor: Tensor
    device: torch.device
    categories: tuple[int, ...]
    oddities: tuple[str, ...]
    on_host: tuple[int, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def has_plate(self) -> bool:
        """Whether a plate counts the data. Else they are one datum, which every site is of.

        Its one row stands left of all plates, in a dimension that no site has.
        """
        return bool(self.plates)

    def num_rows_of(self, batch: Batch) -> int:
        """Rows of a batch, along the axes that count the data."""
        return num_rows_of(batch, self.axes)

    def axis_in(self, batch_dim: int) -> int | None:
        """The axis of the data in a tensor with so many batch dimensions; None without a plate."""
        return batch_dim + self.dim if self.has_plate else None

    @property
    def takes_any_rows(self) -> bool:
        """Whether the pair runs on any rows that it is given, of which there may be many."""
        return self.has_plate and self.subsample_size is None and self.tied_to is None

    @property
    def shared_sites(self) -> tuple[str, ...]:
        """``global_sites`` for a reader: without what an autoguide draws its latents at."""
        named = tuple(name for name in self.global_sites if name not in self.auxiliary)
        return named or self.global_sites

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

    def place(self, batch: object) -> Batch:
        """A batch as a tuple, its tensors where the pair is."""
        return moved(as_batch(batch), self.device, self.on_host)

    @property
    def dtype(self) -> torch.dtype:
        """The type of its first floating tensor."""
        return self.anchor.dtype

    def take_up(self, name: str, parameter: Tensor, side: str) -> None:
        """Adds a parameter that was first announced on a later batch, or is another one now."""
        self.parameters[name] = parameter
        self.sides[name] = self.sides.get(name, frozenset()) | {side}

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
    """Whether a site is inside the data plate; without one, every site is of the one datum."""
    return not structure.has_plate or in_plates(structure.plates, site)


def rows_to(place: int, axis: int | None, tensor: Tensor) -> Tensor:
    """A tensor whose axis of data is brought to a place; without one, it is one row there."""
    return tensor.unsqueeze(place) if axis is None else tensor.movedim(axis, place)


def rows_from(place: int, axis: int | None, tensor: Tensor) -> Tensor:
    """The inverse of `rows_to`."""
    return tensor.squeeze(place) if axis is None else tensor.movedim(place, axis)


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
