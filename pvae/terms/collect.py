"""The sites of a pass, reduced to shape (K, N) or (K,)."""

from __future__ import annotations

import math

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pvae.distributions import log_density_of_delta
from pvae.errors import PairError, UndefinedError
from pvae.internals import ENUMERATE_DIM
from pvae.pair import Structure
from pvae.pair.messages import is_factor, is_penalty, plate_scale, score
from pvae.terms.result import Kind, SiteTerms, Terms
from pvae.types import Site

__all__ = ["PARTICLES", "Collector"]

PARTICLES = "pvae_particles"
"""Name of the plate in which particles are vectorised."""


class Collector:
    """Reduces the sites of a pass to shape (K, N) or (K,)."""

    def __init__(self, structure: Structure, num_particles: int, per_dimension: bool) -> None:  # noqa: FBT001
        self.structure, self.num_particles = structure, num_particles
        self.per_dimension = per_dimension
        self.vectorized = num_particles > 1
        self.rank = structure.nesting + self.vectorized
        self.axis = self.rank + structure.dim  # of the data, in a log density of full rank
        self.sites: dict[str, SiteTerms] = {}
        self.summed_out: list[tuple[Site, Tensor]] = []
        self.num_rows = 0
        self.data_scale = 1.0
        self.like: Tensor | None = None

    def guide(self, site: Site, *, in_model: bool) -> None:
        """Takes in a site of the guide."""
        if is_factor(site):
            kind: Kind = "penalty" if is_penalty(site) else "factor"
        else:
            kind = "latent" if in_model else "auxiliary"
        entry = self._entry(site, kind)
        entry.guide = site["fn"]
        raw = log_density_of_delta(site["fn"])
        raw = score(site) if raw is None else raw
        entry.log_q, entry.scaled_log_q = self._both(site, raw, entry.is_local)
        if self.per_dimension and kind == "latent" and entry.is_local:
            entry.log_q_dims = self._dims(site)

    def model(self, site: Site) -> None:
        """Takes in a site of the model."""
        if getattr(site["fn"], "couples_data", False) and isinstance(site["mask"], Tensor):
            raise PairError(
                f"site '{site['name']}'",
                "no mask on data whose scale is estimated from the batch",
                "a mask, whose padding would count",
                ["likelihoods.Gaussian(..., sigma='shared')", "batches without padding"],
            )
        raw = score(site)
        if raw.dim() > self.rank and self.structure.enumerated:
            self.summed_out.append((site, raw))
            return
        kind: Kind = "penalty" if is_penalty(site) else "factor" if is_factor(site) else "observed"
        kind = kind if site["is_observed"] else "latent"
        entry = self._entry(site, kind)
        entry.model = site["fn"]
        entry.log_p, entry.scaled_log_p = self._both(site, raw, entry.is_local)
        if self.per_dimension and kind == "latent" and entry.is_local:
            entry.log_p_dims = self._dims(site)

    def terms(self) -> Terms:
        """What has been taken in, enumerated latents summed out."""
        is_joint = bool(self.summed_out) and self._sum_out()
        assert self.like is not None  # noqa: S101
        return Terms(
            self.sites,
            self.num_particles,
            self.num_rows,
            self.structure,
            self.like,
            self.data_scale,
            is_joint=is_joint,
        )

    def _entry(self, site: Site, kind: Kind) -> SiteTerms:
        name = site["name"]
        if name not in self.sites:
            frames = [f for f in site["cond_indep_stack"] if f.name in self.structure.plates]
            local = bool(frames)
            for frame in frames:
                if frame.full_size not in (None, -1):
                    self.data_scale = frame.full_size / frame.size
            draws, axis = self._draws(site, is_local=local)
            self.sites[name] = SiteTerms(name, kind, local, draws, axis)
        return self.sites[name]

    def _draws(self, site: Site, *, is_local: bool) -> tuple[Tensor, int]:
        """The value with particles first, without plates that it isn't in; its axis of data."""
        value: Tensor = site["value"]
        batch = value.dim() - len(site["fn"].event_shape)
        if not self.vectorized:
            draws, own = value.unsqueeze(0), batch
        elif batch < self.rank:  # data, which are the same for all particles
            draws, own = value.unsqueeze(0).expand(self.num_particles, *value.shape), batch
        else:
            plates = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
            own = max((-f.dim for f in plates), default=0)
            draws = value.reshape(value.shape[:1] + value.shape[batch - own :])
        return draws, 1 + own + self.structure.dim if is_local else 1

    def _both(self, site: Site, raw: Tensor, is_local: bool) -> tuple[Tensor, Tensor]:  # noqa: FBT001
        masked = scale_and_mask(raw, mask=site["mask"])
        scale = site["scale"]
        keep = plate_scale(site, without=self.structure.plates)
        kept = masked if keep == 1.0 else masked * keep
        plain = self._reduce(kept, site["name"], is_local=is_local)
        if isinstance(scale, Tensor):
            return plain, self._reduce(masked * scale, site["name"], is_local=is_local)
        return plain, plain if scale == keep else plain * (scale / keep)

    def _reduce(self, log_prob: Tensor, name: str, *, is_local: bool) -> Tensor:
        """Sums out all dimensions but particles and, inside the data plate, data."""
        if log_prob.dim() > self.rank:
            raise PairError(
                f"site '{name}'",
                f"a log density with at most {self.rank} dimension(s), one a plate",
                f"shape {tuple(log_prob.shape)}",
                [".to_event(k) on the site's distribution", "a plate around the site"],
            )
        if self.like is None:
            self.like = log_prob.detach()
        if is_local and log_prob.dim() == self.rank and self.structure.nesting == 1:
            full = log_prob if self.vectorized else log_prob.unsqueeze(0)
        else:
            full = log_prob.reshape((1,) * (self.rank - log_prob.dim()) + log_prob.shape)
            kept = {0} if self.vectorized else set()
            kept |= {self.axis} if is_local else set()
            out = [i for i in range(self.rank) if i not in kept]
            full = full.sum(out) if out else full
            full = full if self.vectorized else full.unsqueeze(0)
        if is_local:
            self.num_rows = max(self.num_rows, full.shape[1])
        if full.shape[0] != self.num_particles:
            full = full.expand(self.num_particles, *full.shape[1:])
        return full

    def _dims(self, site: Site) -> Tensor:
        fn, value = site["fn"], site["value"]
        frames = [f.name for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
        alone = len(frames) == 1 and frames[0] in self.structure.plates
        if not (isinstance(fn, torch.distributions.Independent) and alone):
            raise UndefinedError(
                f"terms per dimension at site '{site['name']}'",
                "independent dimensions: a distribution made with .to_event(k), in the data plate",
                f"{type(fn).__name__} in plates {', '.join(frames)}",
                ["the sum over dimensions, log_p and log_q"],
            )
        each = fn.base_dist.log_prob(value)
        mask = site["mask"]
        if isinstance(mask, Tensor):
            mask = mask.reshape(mask.shape + (1,) * fn.reinterpreted_batch_ndims)
        each = scale_and_mask(each, mask=mask)
        rows = value.shape[value.dim() - len(fn.event_shape) + self.structure.dim]
        return each.reshape(self.num_particles, rows, *fn.event_shape)

    def _sum_out(self) -> bool:
        """Sums out enumerated latents with everything that depends on them, datum by datum.

        Returns:
            Whether data and latents are summed out together, so that they have no parts.
        """
        names = [s["name"] for s, _ in self.summed_out]
        scale = self._common_scale(names)
        total: Tensor | None = None
        for site, raw in self.summed_out:
            masked = scale_and_mask(raw, mask=site["mask"])
            if site["name"] in self.structure.enumerated:
                masked = self._without_padding(site, masked)
            extra = masked.dim() - self.rank
            kept = {*range(extra), extra + self.axis} | ({extra} if self.vectorized else set())
            out = [i for i in range(masked.dim()) if i not in kept]
            part = masked.sum(out, keepdim=True) if out else masked
            total = part if total is None else total + part
        assert total is not None  # noqa: S101
        summed = total.logsumexp(tuple(range(total.dim() - self.rank)))
        others = {
            "observed" if s["is_observed"] else "latent"
            for s, _ in self.summed_out
            if s["name"] not in self.structure.enumerated
        }
        kind: Kind = "latent" if others == {"latent"} else "enumerated"
        for site, _ in self.summed_out:
            if site["name"] in self.sites:
                self.sites[site["name"]].model = site["fn"]
        entry = SiteTerms("+".join(names), kind, is_local=True)
        entry.log_p = self._reduce(summed, entry.name, is_local=True)
        entry.scaled_log_p = entry.log_p * scale
        self.sites[entry.name] = entry
        return len(others) > 1

    def _common_scale(self, names: list[str]) -> float:
        """The scale of sites summed out together: inside a logarithm there can be only one."""
        scales = [s["scale"] for s, _ in self.summed_out]
        keeps = [plate_scale(s, without=self.structure.plates) for s, _ in self.summed_out]
        numbers = [s for s in scales if not isinstance(s, Tensor)]
        if len(numbers) != len(scales) or len({*numbers}) > 1 or any(k != 1.0 for k in keeps):
            raise PairError(
                f"sites {', '.join(names)}, summed out together",
                "one common scale, a number",
                f"scales {', '.join(map(str, scales))}",
                ["no poutine.scale and no subsampled inner plate there", "a guide for the latent"],
            )
        dims = [
            s["infer"].get(ENUMERATE_DIM)
            for s, _ in self.summed_out
            if s["name"] in self.structure.enumerated
        ]
        if len(set(dims)) != len(dims):
            raise PairError(
                "enumerated sites",
                "one dimension each",
                f"a shared one in {', '.join(names)}",
                ["no pyro.markov around them"],
            )
        return scales[0]

    def _without_padding(self, site: Site, masked: Tensor) -> Tensor:
        """Where an enumerated latent is masked out, its states count as one, not as many."""
        mask = site["mask"]
        if mask is None or mask is True:
            return masked
        count = masked.shape[masked.dim() + site["infer"][ENUMERATE_DIM]]
        masked_out = torch.as_tensor(mask, device=masked.device).logical_not()
        return masked - masked_out.to(masked.dtype) * math.log(count)
