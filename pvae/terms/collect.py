"""The sites of a pass, reduced to shape (K, N) or (K,)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pvae.devices import beside
from pvae.distributions import log_density_of_delta
from pvae.errors import PairError, UndefinedError
from pvae.internals import ENUMERATE_DIM
from pvae.pair import Structure, is_inside, is_penalty
from pvae.pair.messages import is_factor, plate_scale, score
from pvae.terms.result import Kind, SiteTerms, Terms
from pvae.terms.states import Factor, States
from pvae.types import Site

__all__ = ["PARTICLES", "Collector"]

PARTICLES = "pvae_particles"
"""Name of the plate in which particles are vectorised."""


class Collector:
    """Reduces the sites of a pass to shape (K, N) or (K,)."""

    def __init__(
        self,
        structure: Structure,
        num_particles: int,
        *,
        per_dimension: bool = False,
        states: States | None = None,
    ) -> None:
        self.structure, self.num_particles = structure, num_particles
        self.device = structure.device  # where all log densities go, wherever they are computed
        self.per_dimension, self.states = per_dimension, states
        self.vectorized = num_particles > 1
        self.rank = structure.nesting + self.vectorized
        self.axis = self.rank + structure.dim  # of the data, in a log density of full rank
        self.sites: dict[str, SiteTerms] = {}
        self.summed_out: list[Factor] = []
        self.num_rows = 0
        self.data_scale = 1.0
        self.like: Tensor | None = None

    def guide(self, site: Site, *, in_model: bool) -> None:
        """Takes in a site of the guide."""
        kind: Kind = "latent" if in_model else "auxiliary"
        if is_factor(site):
            is_density = site["name"] in self.structure.densities
            kind = "penalty" if is_penalty(site) else "factor" if is_density else "training"
        raw = log_density_of_delta(site["fn"])
        raw = score(site, self.device) if raw is None else raw.to(self.device)
        if self._is_summed_out(site, raw, in_model=False):
            # a state's own probability cancels in the weight, of which training terms are no part
            if ENUMERATE_DIM not in site["infer"] and kind not in ("penalty", "training"):
                self.summed_out.append((site, scale_and_mask(-raw, mask=site["mask"])))
            return
        entry = self._entry(site, kind)
        entry.guide = site["fn"]
        entry.log_q, entry.scaled_log_q = self._both(site, raw)
        if self.per_dimension and kind == "latent" and entry.is_local:
            entry.log_q_dims = self._dims(site)

    def model(self, site: Site) -> None:
        """Takes in a site of the model."""
        if getattr(site["fn"], "couples_data", False) and isinstance(site["mask"], Tensor):
            expected = "no mask on data whose scale is estimated from the batch"
            fixes = ["likelihoods.Gaussian(..., sigma='shared')", "batches without padding"]
            actual = "a mask, whose padding would count"
            raise PairError(f"site '{site['name']}'", expected, actual, fixes)
        raw = score(site, self.device)
        if self._is_summed_out(site, raw):
            if is_penalty(site):
                expected, fixes = (
                    "a penalty apart from states that are summed out",
                    ["a guide for them"],
                )
                raise PairError(
                    f"penalty '{site['name']}'", expected, "one that depends on them", fixes
                )
            # states' probabilities sum to 1 where they are masked out, too
            mask = None if ENUMERATE_DIM in site["infer"] else site["mask"]
            self.summed_out.append((site, scale_and_mask(raw, mask=mask)))
            return
        kind: Kind = "observed" if site["is_observed"] else "latent"
        if is_factor(site):
            kind = "penalty" if is_penalty(site) else "factor"
        entry = self._entry(site, kind)
        entry.model = site["fn"]
        entry.log_p, entry.scaled_log_p = self._both(site, raw)
        if self.per_dimension and kind == "latent" and entry.is_local:
            entry.log_p_dims = self._dims(site)

    def spoil(self, wrong: Mapping[str, Tensor]) -> None:
        """Makes log p NaN at sites where something is wrong, for a pass that can't wait for it."""
        for name in wrong.keys() & self.sites.keys():
            entry = self.sites[name]
            if entry.log_p is not None and entry.scaled_log_p is not None:
                entry.log_p = torch.where(wrong[name], math.nan, entry.log_p)
                entry.scaled_log_p = torch.where(wrong[name], math.nan, entry.scaled_log_p)

    def _is_summed_out(self, site: Site, raw: Tensor, *, in_model: bool = True) -> bool:
        """Whether a log density is over states that are summed out."""
        if self.states is None or raw.dim() <= self.rank:
            return False
        if not in_model:
            return self.states.of_guide == "summed"
        return not self.states.are_averaged(site, raw)

    def terms(self) -> Terms:
        """What has been taken in, enumerated latents summed out."""
        is_joint = bool(self.summed_out) and self._sum_out()
        assert self.like is not None  # noqa: S101
        sizes = (self.num_particles, self.num_rows)
        scale = self.data_scale
        return Terms(self.sites, *sizes, self.structure, self.like, scale, is_joint=is_joint)

    def _entry(self, site: Site, kind: Kind) -> SiteTerms:
        name = site["name"]
        if name not in self.sites:
            for frame in site["cond_indep_stack"]:
                if frame.name in self.structure.plates and frame.full_size not in (None, -1):
                    self.data_scale = frame.full_size / frame.size
            is_local = is_inside(self.structure, site)
            draws, axis = self._draws(site, is_local=is_local)
            self.sites[name] = SiteTerms(name, kind, is_local, draws, axis)
        return self.sites[name]

    def _draws(self, site: Site, *, is_local: bool) -> tuple[Tensor | None, int | None]:
        """The value with particles first, without plates that it isn't in; its axis of data."""
        value: Tensor = site["value"]
        batch = value.dim() - len(site["fn"].event_shape)
        if batch > self.rank:
            return None, 1  # it is another one in each state
        if not self.vectorized:
            draws, own = value.unsqueeze(0), batch
        elif batch < self.rank:  # data, which are the same for all particles
            draws, own = value.unsqueeze(0).expand(self.num_particles, *value.shape), batch
        else:
            plates = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
            own = max((-f.dim for f in plates), default=0)
            draws = value.reshape(value.shape[:1] + value.shape[batch - own :])
        return draws, self.structure.axis_in(1 + own) if is_local else 1

    def _both(self, site: Site, raw: Tensor) -> tuple[Tensor, Tensor]:
        """A log density without scales, and with all of them."""
        is_local = self.sites[site["name"]].is_local
        masked = scale_and_mask(raw, mask=site["mask"])
        if self.states is not None and masked.dim() > self.rank:
            masked = self.states.mean(site, masked)
        scale = site["scale"]
        keep = plate_scale(site, without=self.structure.plates)
        kept = masked if keep == 1.0 else masked * keep
        plain = self._reduce(kept, site["name"], is_local=is_local)
        if isinstance(scale, Tensor):
            return plain, self._reduce(masked * scale, site["name"], is_local=is_local)
        return plain, plain if scale == keep else plain * (scale / keep)

    def summed(self, site: Site, each: Tensor, *, is_masked: bool) -> Tensor:
        """Numbers of a site's batch entries, masked unless they are, summed as log p is."""
        kept = each if is_masked else scale_and_mask(each, mask=beside(site["mask"], each))
        return self._reduce(kept, site["name"], is_local=is_inside(self.structure, site))

    def _reduce(self, log_prob: Tensor, name: str, *, is_local: bool) -> Tensor:
        """Sums out all dimensions but particles and, inside the data plate, data."""
        if log_prob.dim() > self.rank:
            expected = f"a log density with at most {self.rank} dimension(s), one a plate"
            fixes = [".to_event(k) on the site's distribution", "a plate around the site"]
            raise PairError(f"site '{name}'", expected, f"shape {tuple(log_prob.shape)}", fixes)
        if self.like is None:
            self.like = log_prob.detach()
        if not is_local or log_prob.dim() != self.rank or self.structure.nesting != 1:
            log_prob = log_prob.reshape((1,) * (self.rank - log_prob.dim()) + log_prob.shape)
            kept = [0] * self.vectorized + [self.axis] * is_local
            out = [i for i in range(self.rank) if i not in kept]
            log_prob = log_prob.sum(out) if out else log_prob
        full = log_prob if self.vectorized else log_prob.unsqueeze(0)
        if is_local:
            self.num_rows = max(self.num_rows, full.shape[1])
        if full.shape[0] != self.num_particles:
            full = full.expand(self.num_particles, *full.shape[1:])
        return full

    def _dims(self, site: Site) -> Tensor:
        fn, value = site["fn"], site["value"]
        frames = [f.name for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
        plates = self.structure.plates
        alone = len(frames) == 1 and frames[0] in plates if plates else not frames
        if not (isinstance(fn, torch.distributions.Independent) and alone):
            what = f"terms per dimension at site '{site['name']}'"
            expected = (
                "independent dimensions: a distribution made with .to_event(k), in the data plate"
            )
            actual = f"{type(fn).__name__} in plates {', '.join(frames)}"
            raise UndefinedError(
                what, expected, actual, ["the sum over dimensions, log_p and log_q"]
            )
        each = fn.base_dist.log_prob(value).to(self.device)
        mask = site["mask"]
        if isinstance(mask, Tensor):
            mask = mask.reshape(mask.shape + (1,) * fn.reinterpreted_batch_ndims)
        each = scale_and_mask(each, mask=mask)
        return each.reshape(self.num_particles, -1, *fn.event_shape)

    def _sum_out(self) -> bool:
        """Sums out states with everything that depends on them.

        Returns:
            Whether data and latents are summed out together, so that they have no parts.
        """
        assert self.states is not None  # noqa: S101
        linked = self.states.sum_out(self.summed_out)
        return max([self._put_together(sites, left) for sites, left in linked])

    def _put_together(self, sites: list[Site], left: Tensor) -> bool:
        """Takes in sites that share states as one; returns whether it has data and latents."""
        keep, scale = self._common_scale(sites)
        names = [site["name"] for site in sites]
        for site in sites:
            if site["name"] in self.sites:
                self.sites[site["name"]].model = site["fn"]
        rest = {s["is_observed"] for s in sites if ENUMERATE_DIM not in s["infer"]}
        kind: Kind = "latent" if rest == {False} else "enumerated"
        is_local = all(is_inside(self.structure, site) for site in sites)
        entry = SiteTerms("+".join(names), kind, is_local)
        self.sites[entry.name] = entry
        summed = self._reduce(left, entry.name, is_local=is_local)
        entry.log_p = summed if keep == 1.0 else summed * keep
        entry.scaled_log_p = summed * scale
        return len(rest) > 1

    def _common_scale(self, sites: list[Site]) -> tuple[float, float]:
        """The scale of sites summed out together, without and with that of the data plate.

        Inside a logarithm there can be only one.
        """
        scales = [s["scale"] for s in sites]
        keeps = {plate_scale(s, self.structure.plates) for s in sites}
        if any(isinstance(s, Tensor) for s in scales) or len({*scales}) > 1 or len(keeps) > 1:
            names = ", ".join(s["name"] for s in sites)
            where, expected = f"sites {names}, summed out together", "one common scale, a number"
            fixes = ["poutine.scale around all of them, or around none", "a guide for the latent"]
            raise PairError(where, expected, f"scales {', '.join(map(str, scales))}", fixes)
        return keeps.pop(), scales[0]
