"""The result of a pass: terms per site, and their sums."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from pyro.poutine import Trace
from torch import Tensor

from pvae.errors import UndefinedError
from pvae.pair import Structure
from pvae.types import Dist

__all__ = ["SiteTerms", "Terms", "joined", "stack"]

Kind = Literal["observed", "latent", "auxiliary", "factor", "penalty", "enumerated"]


@dataclass
class SiteTerms:
    """One site of a pass over N data with K particles.

    Log densities have shape ``(K, N)`` inside the data plate (``is_local``) and ``(K,)`` outside.
    Masks are applied. The data plate's scale and ``poutine.scale`` are not; the ``scaled_``
    versions have them, as Pyro's own ELBOs do.

    Attributes:
        name: The site's name.
        kind: ``"observed"``, ``"latent"``, ``"auxiliary"`` (guide only), ``"factor"``,
            ``"penalty"`` (a marked factor), or ``"enumerated"`` (sites summed out together).
        is_local: Whether it is inside the data plate.
        draws: Its value as the programs see it, particles first; None for enumerated ones.
        data_axis: The axis of ``draws`` that counts the data.
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
    data_axis: int = 1
    model: Dist = None
    guide: Dist = None
    log_p: Tensor | None = None
    log_q: Tensor | None = None
    log_p_dims: Tensor | None = None
    log_q_dims: Tensor | None = None
    scaled_log_p: Tensor | None = None
    scaled_log_q: Tensor | None = None

    @property
    def value(self) -> Tensor | None:
        """The value, shape ``(K, N, ...)`` inside the data plate and ``(K, ...)`` outside."""
        if self.draws is None or not self.is_local:
            return self.draws
        return self.draws.movedim(self.data_axis, 1)

    def first_rows(self, count: int) -> None:
        """Keeps the first rows of what is inside the data plate."""
        if not self.is_local:
            return
        if self.draws is not None:
            self.draws = self.draws.narrow(self.data_axis, 0, count)
        for key in PER_DATUM:
            tensor = getattr(self, key)
            if tensor is not None:
                setattr(self, key, tensor[:, :count])


PER_DATUM = (
    "log_p",
    "log_q",
    "log_p_dims",
    "log_q_dims",
    "scaled_log_p",
    "scaled_log_q",
)


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
        shape = (self.num_particles, self.num_rows) if local else (self.num_particles,)
        total: Tensor | None = None
        for site in self.sites.values():
            if site.is_local != local or site.kind == "penalty":
                continue
            value = pick(site)
            if value is not None:
                total = value if total is None else total + value
        return self.like.new_zeros(shape) if total is None else total

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
        found = [s for s in self.sites.values() if s.kind == "penalty"]
        of_model = {s.name: s.log_p for s in found if s.log_p is not None}
        return of_model | {s.name: -s.log_q for s in found if s.log_q is not None}

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

    def scaled(self, pick: Literal["likelihood", "prior", "q", "penalty"]) -> Tensor:
        """A part of the plate-scaled objective, local and global: one number a particle, ``(K,)``.

        These have every scale in them, ``poutine.scale`` too, and add up to what Pyro's ELBOs
        return: likelihood + prior - q + penalty.
        """
        parts = []
        for site in self.sites.values():
            p, q = site.scaled_log_p, site.scaled_log_q
            if site.kind == "penalty":
                signed = [x for x in (p, None if q is None else -q) if x is not None]
                parts += signed if pick == "penalty" else []
            elif pick == "q":
                parts += [] if q is None else [q]
            elif pick == ("prior" if site.kind == "latent" else "likelihood"):
                parts += [] if p is None else [p]
        if not parts:
            return self.like.new_zeros(self.num_particles)
        return functools.reduce(operator.add, (p.sum(1) if p.dim() == 2 else p for p in parts))

    @property
    def has_penalties(self) -> bool:
        """Whether there are marked factors."""
        return any(site.kind == "penalty" for site in self.sites.values())

    @property
    def has_globals(self) -> bool:
        """Whether something outside the data plate has a density."""
        return any(not site.is_local for site in self.sites.values())

    def require_split(self) -> None:
        """Refuses the parts where one sum over states has both data and latents in it."""
        for site in self.sites.values():
            if site.kind == "enumerated" and self.is_joint:
                raise UndefinedError(
                    "log p(x | z) and log p(z) apart",
                    "data and latents that don't share an enumerated latent",
                    f"sites summed out together: {site.name}",
                    ["log_joint, which is defined"],
                )


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
    all_terms = list(passes)
    first = all_terms[0]
    sites = {name: joined([t.sites[name] for t in all_terms]) for name in first.sites}
    result = Terms(
        sites,
        len(all_terms),
        first.num_rows,
        first.structure,
        first.like,
        first.data_scale,
        is_joint=first.is_joint,
        looped=all_terms,
    )
    for key in ("stopped_log_q", "stopped_global_log_q"):
        if getattr(first, key) is not None:
            setattr(result, key, torch.cat([getattr(t, key) for t in all_terms]))
    return result
