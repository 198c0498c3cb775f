"""The result of a pass: terms per site, and their sums."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pyro.poutine import Trace
from torch import Tensor

from pvae.errors import UndefinedError
from pvae.pair import Structure, rows_to
from pvae.types import Dist

__all__ = ["SiteTerms", "Terms", "joined", "stack"]

Kind = Literal["observed", "latent", "auxiliary", "factor", "penalty", "training", "enumerated"]
Pick = Literal["likelihood", "prior", "q", "penalty", "training"]


@dataclass
class SiteTerms:
    """One site of a pass over N data with K particles.

    Log densities have shape ``(K, N)`` inside the data plate (``is_local``) and ``(K,)`` outside.
    Masks are applied. The data plate's scale and ``poutine.scale`` are not; the ``scaled_``
    versions have them, as Pyro's own ELBOs do.

    Attributes:
        name: The site's name.
        kind: ``"observed"``, ``"latent"``, ``"auxiliary"`` (guide only), ``"factor"``,
            ``"penalty"`` (a marked factor), ``"training"`` (a factor of the guide that is no
            density), or ``"enumerated"`` (sites summed out together).
        is_local: Whether it is inside the data plate.
        draws: Its value as the programs see it, particles first; None for enumerated ones.
        data_axis: The axis of ``draws`` that counts the data; None where no plate does.
        model: The model's distribution; where particles were looped, the last one's.
        guide: The guide's distribution; likewise.
        log_p: The model's log density.
        log_q: The guide's.
        log_p_dims: The model's log density by dimension, ``(K, N, *event_shape)``, if asked for.
        log_q_dims: The guide's.
        scaled_log_p: ``log_p`` with all scales.
        scaled_log_q: ``log_q`` with all scales.
    """

    name: str
    kind: Kind
    is_local: bool
    draws: Tensor | None = None
    data_axis: int | None = 1
    model: Dist = None
    guide: Dist = None
    log_p: Tensor | None = None
    log_q: Tensor | None = None
    log_p_dims: Tensor | None = None
    log_q_dims: Tensor | None = None
    scaled_log_p: Tensor | None = None
    scaled_log_q: Tensor | None = None

    @property
    def has_density(self) -> bool:
        """Whether it is part of a density: no penalty, and no term of the training alone."""
        return self.kind not in ("penalty", "training")

    @property
    def is_drawn(self) -> bool:
        """Whether the guide draws it."""
        return self.kind in ("latent", "auxiliary")

    @property
    def value(self) -> Tensor | None:
        """The value, shape ``(K, N, ...)`` inside the data plate and ``(K, ...)`` outside."""
        if self.draws is None or not self.is_local:
            return self.draws
        return rows_to(1, self.data_axis, self.draws)

    def scaled(self, pick: Pick) -> list[Tensor | None]:
        """What the site has of a part of the plate-scaled objective."""
        if not self.has_density:
            return [self.scaled_log_p, _negative(self.scaled_log_q)] if pick == self.kind else []
        if pick == "q":
            return [self.scaled_log_q]
        of_model = "prior" if self.kind == "latent" else "likelihood"
        return [self.scaled_log_p] if pick == of_model else []

    def first_rows(self, count: int) -> None:
        """Keeps the first rows of what is inside the data plate."""
        if not self.is_local:
            return
        if self.draws is not None and self.data_axis is not None:
            self.draws = self.draws.narrow(self.data_axis, 0, count)
        for key in PER_DATUM:
            tensor = getattr(self, key)
            if tensor is not None:
                setattr(self, key, tensor[:, :count])


PER_DATUM = ("log_p", "log_q", "log_p_dims", "log_q_dims", "scaled_log_p", "scaled_log_q")


@dataclass
class Terms:
    """The terms of N data under K particles; every sum over sites has shape ``(K, N)``.

    Attributes:
        sites: By name, in the order of the guide and then the model.
        num_particles: K.
        num_rows: N.
        structure: What the pair is made of.
        data_scale: The data plate's full size over its size in this pass.
        guide_trace: Pyro's trace of the guide; None where particles were looped.
        model_trace: Pyro's trace of the model; likewise.
        stopped_log_q: log q with the guide's parameters stopped, ``(K, N)``, if asked for.
        stopped_global_log_q: The same of global sites, ``(K,)``.
        is_joint: Whether data and latents share an enumerated latent that is summed out, so that
            log p(x | z) and log p(z) aren't known apart.
    """

    sites: dict[str, SiteTerms]
    num_particles: int
    num_rows: int
    structure: Structure
    like: Tensor
    data_scale: float = 1.0
    guide_trace: Trace = None
    model_trace: Trace = None
    stopped_log_q: Tensor | None = None
    stopped_global_log_q: Tensor | None = None
    is_joint: bool = False
    looped: list[Terms] = field(default_factory=list)

    @property
    def passes(self) -> list[Terms]:
        """The passes that these terms come from: one, or one a particle where they were looped."""
        return self.looped or [self]

    def _sum(self, pick: Callable[[SiteTerms], Tensor | None], *, local: bool) -> Tensor:
        sites = [s for s in self.sites.values() if s.is_local == local and s.has_density]
        shape = (self.num_particles, self.num_rows) if local else (self.num_particles,)
        return self._total([pick(site) for site in sites], shape)

    def _total(self, parts: Iterable[Tensor | None], shape: tuple[int, ...]) -> Tensor:
        """Their sum, in the order that they have; zeros where there are none."""
        known = [part for part in parts if part is not None]
        return functools.reduce(operator.add, known) if known else self.like.new_zeros(shape)

    def first_rows(self, count: int) -> None:
        """Keeps the first rows of what is inside the data plate."""
        for site in self.sites.values():
            site.first_rows(count)
        self.num_rows = count

    @property
    def log_likelihood(self) -> Tensor:
        """log p(x | z): observed sites and unmarked factors. Shape ``(K, N)``."""
        self.require_split()
        return self._sum(lambda s: None if s.kind == "latent" else s.log_p, local=True)

    @property
    def log_prior(self) -> Tensor:
        """log p(z) of local latents. Shape ``(K, N)``."""
        self.require_split()
        return self._sum(lambda s: s.log_p if s.kind == "latent" else None, local=True)

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z) given global latents. Shape ``(K, N)``."""
        return self._sum(lambda s: s.log_p, local=True)

    @property
    def log_q(self) -> Tensor:
        """log q of all local guide sites, auxiliary ones included. Shape ``(K, N)``."""
        return self._sum(lambda s: s.log_q, local=True)

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z | x), given global latents. Shape ``(K, N)``."""
        return self.log_joint - self.log_q

    @property
    def global_log_p(self) -> Tensor:
        """log p of what is outside the data plate. Shape ``(K,)``."""
        return self._sum(lambda s: s.log_p, local=False)

    @property
    def global_log_q(self) -> Tensor:
        """log q of what is outside the data plate. Shape ``(K,)``."""
        return self._sum(lambda s: s.log_q, local=False)

    @property
    def penalties(self) -> dict[str, Tensor]:
        """What each marked factor adds to the objective, ``(K, N)`` or ``(K,)``, by site."""
        return self._beside("penalty")

    @property
    def training(self) -> dict[str, Tensor]:
        """What each factor of the guide that is no density adds to it, likewise."""
        return self._beside("training")

    def _beside(self, kind: Kind) -> dict[str, Tensor]:
        sites = [s for s in self.sites.values() if s.kind == kind]
        of_model = {s.name: s.log_p for s in sites if s.log_p is not None}
        return of_model | {s.name: -s.log_q for s in sites if s.log_q is not None}

    def elbo_per_datum(self) -> tuple[Tensor, Tensor]:
        """The ELBO and its log likelihood per datum, averaged over particles: two scalars.

        No beta, no penalty and no ``poutine.scale`` is in them. A global latent's share is divided
        by the data plate's full size.
        """
        elbo, is_split = self.log_weight.mean(), not self.is_joint
        likelihood = self.log_likelihood.mean() if is_split else torch.full_like(elbo, math.nan)
        if not self.has_globals:
            return elbo, likelihood
        full = self.structure.divisor(self.num_rows)
        outside = (self.global_log_p - self.global_log_q).mean() / full
        data_outside = self._sum(lambda s: None if s.kind == "latent" else s.log_p, local=False)
        return elbo + outside, likelihood + data_outside.mean() / full

    def scaled(self, pick: Pick) -> Tensor:
        """A part of the plate-scaled objective, local and global: one number a particle, ``(K,)``.

        These have every scale in them, ``poutine.scale`` too, and add up to what Pyro's ELBOs
        return: likelihood + prior - q + penalty + training.
        """
        parts = [part for site in self.sites.values() for part in site.scaled(pick)]
        each = [p if p is None or p.dim() == 1 else p.sum(1) for p in parts]
        return self._total(each, (self.num_particles,))

    @property
    def has_penalties(self) -> bool:
        """Whether the objective has more than densities: penalties, terms of the training."""
        return any(not site.has_density for site in self.sites.values())

    @property
    def has_globals(self) -> bool:
        """Whether something outside the data plate has a density."""
        return any(not s.is_local and s.has_density for s in self.sites.values())

    def require_split(self) -> None:
        """Refuses the parts where one sum over states has both data and latents in it."""
        summed = [s.name for s in self.sites.values() if s.kind == "enumerated" and self.is_joint]
        if summed:
            what, fixes = "log p(x | z) and log p(z) apart", ["log_joint, which is defined"]
            expected = "data and latents that don't share an enumerated latent"
            actual = f"sites summed out together: {summed[0]}"
            raise UndefinedError(what, expected, actual, fixes)


def _negative(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else -tensor


def joined(sites: list[SiteTerms]) -> SiteTerms:
    """One site of passes of one particle each, particle by particle."""
    first, last = sites[0], sites[-1]
    merged = SiteTerms(first.name, first.kind, first.is_local, model=last.model, guide=last.guide)
    merged.data_axis = first.data_axis
    for key in ("draws", *PER_DATUM):
        if getattr(first, key) is not None:
            setattr(merged, key, torch.cat([getattr(site, key) for site in sites]))
    return merged


def stack(passes: Iterable[Terms]) -> Terms:
    """Puts passes of one particle each together, particle by particle."""
    first, *_ = looped = list(passes)
    sites = {name: joined([one.sites[name] for one in looped]) for name in first.sites}
    stacked = replace(first, sites=sites, num_particles=len(looped), looped=looped)
    stacked.guide_trace = stacked.model_trace = None
    for key in ("stopped_log_q", "stopped_global_log_q"):
        if getattr(first, key) is not None:
            setattr(stacked, key, torch.cat([getattr(one, key) for one in looped]))
    return stacked
