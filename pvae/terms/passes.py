"""One traced pass of guide and replayed model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pvae.errors import PairError, PvaeWarning, UndefinedError, check_int
from pvae.terms.result import Kind, SiteTerms, Terms, stack
from pvae.terms.structure import (
    Batch,
    Structure,
    _probing,
    _sample_sites,
    delta_of,
    inspect_pair,
    is_factor,
    is_penalty,
    plate_scale,
    run_pair,
)

__all__ = ["compute"]

_PARTICLES = "pvae_particles"
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


class _Given(Messenger):
    """Sets the values of some sites, expanded over particles where those are vectorised."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is None or msg["is_observed"]:
            return
        inside = any(f.name == _PARTICLES for f in msg["cond_indep_stack"])
        if inside and isinstance(msg["fn"], TorchDistributionMixin):
            shape = msg["fn"].batch_shape + msg["fn"].event_shape
            value = value.reshape((1,) * (len(shape) - value.dim()) + value.shape).expand(shape)
        msg["value"] = value
        msg["done"] = True


def compute(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    *,
    structure: Structure | None = None,
    plate: str | None = None,
    num_particles: int = 1,
    vectorize: bool | None = None,
    per_dimension: bool = False,
    stop_guide: bool = False,
    given: Mapping[str, Tensor] | None = None,
) -> Terms:
    """Runs guide and replayed model once and returns their terms.

    Arguments:
        model: A Pyro program; a module, a function or a method.
        guide: Its guide.
        batch: What they are called with, N data.
        structure: What `inspect_pair` found; None to find it now.
        plate: Name of the data plate, where its length doesn't tell.
        num_particles: K draws from the guide.
        vectorize: Whether particles go through the networks at once. None: yes, unless a
            comparison on this batch, made once, shows that it changes the numbers, or batch norm
            is training.
        per_dimension: Fill ``log_p_dims`` and ``log_q_dims`` of local latents.
        stop_guide: Fill ``stopped_log_q``: log q at the same draws, which keep their gradient,
            with the guide's parameters stopped.
        given: Values of guide sites, and of the data plate's indices, that aren't to be drawn.

    Raises:
        PairError: If the pair doesn't fit the batch.
        UndefinedError: If a site has no density per dimension.
    """
    check_int("num_particles", num_particles)
    structure = structure or inspect_pair(model, guide, batch, plate)
    if num_particles > 1 and vectorize is None:
        vectorize = _can_vectorize(structure, model, guide, batch)
    options: dict[str, Any] = {
        "per_dimension": per_dimension,
        "stop_guide": stop_guide,
        "given": given or {},
    }
    if num_particles == 1 or vectorize:
        return _one_pass(model, guide, batch, structure, num_particles, **options)
    return stack(
        _one_pass(model, guide, batch, structure, 1, **options) for _ in range(num_particles)
    )


def _can_vectorize(
    structure: Structure, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch
) -> bool:
    """Whether particles may go through the networks at once; found out once, on this batch."""
    if any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in structure.modules
    ):
        return False
    if "looped_because" not in structure.notes:
        reason = _compare(structure, model, guide, batch)
        structure.notes["looped_because"] = reason
        if reason:
            warnings.warn(
                f"Particles are looped, not vectorised: {reason}. The numbers are right, the "
                "speed is that of one pass a particle. Networks that take any leading "
                "dimensions, (K, N, ...), can be vectorised.",
                PvaeWarning,
                stacklevel=3,
            )
    return not structure.notes["looped_because"]


def _compare(structure: Structure, model: Any, guide: Any, batch: Batch) -> str:
    """Scores the same draws vectorised and one by one; returns why they differ, or nothing."""
    with _probing((model, guide)):
        try:
            both = _one_pass(model, guide, batch, structure, 2)
        except Exception as error:
            return f"two particles at once fail with {str(error).strip().splitlines()[0]}"
        for k in range(2):
            values = {
                name: site.value[k]
                for name, site in both.sites.items()
                if site.value is not None and site.kind in ("latent", "auxiliary")
            }
            values |= _subsample_of(both.guide_trace, structure)
            one = _one_pass(model, guide, batch, structure, 1, given=values)
            for name, site in both.sites.items():
                for key in ("log_p", "log_q"):
                    ours, theirs = getattr(site, key), getattr(one.sites[name], key)
                    if ours is None:
                        continue
                    worst = (ours[k] - theirs[0]).abs().max()
                    size = theirs[0].abs().max().clamp(min=1.0)
                    tolerance = _TOLERANCE.get(ours.dtype, 1e-2)
                    if not bool(worst <= tolerance * size):
                        return f"at site '{name}' {key} then differs by {float(worst):.3g} nats"
    return ""


def _subsample_of(trace: Any, structure: Structure) -> dict[str, Tensor]:
    if structure.subsample_size is None:
        return {}
    return {structure.plate: trace.nodes[structure.plate]["value"]}


def _one_pass(
    model: Any,
    guide: Any,
    batch: Batch,
    structure: Structure,
    num_particles: int,
    *,
    per_dimension: bool = False,
    stop_guide: bool = False,
    given: Mapping[str, Tensor] | None = None,
) -> Terms:
    def wrapped(program: Any) -> Any:
        """The program under the particle plate, with the given values set."""
        if num_particles > 1:
            plate = pyro.plate(_PARTICLES, num_particles, dim=-structure.nesting - 1)
            program = plate(program)
        return _Given(given)(program) if given else program

    rank = structure.nesting + (num_particles > 1)
    target = model
    if structure.enumerated:
        target = poutine.enum(wrapped(model), first_available_dim=-rank - 1)
    elif given or num_particles > 1:
        target = wrapped(model)
    wrapped_guide = wrapped(guide) if given or num_particles > 1 else guide
    guide_trace, model_trace = run_pair(target, wrapped_guide, batch)
    collect = _Collector(structure, num_particles, per_dimension)
    for site in _sample_sites(guide_trace):
        collect.guide(site, in_model=site["name"] in model_trace.nodes)
    for site in _sample_sites(model_trace):
        collect.model(site)
    terms = collect.terms()
    terms.guide_trace, terms.model_trace = guide_trace, model_trace
    if stop_guide:
        _score_stopped(wrapped(guide), batch, structure, terms)
    return terms


def _score_stopped(guide: Any, batch: Batch, structure: Structure, terms: Terms) -> None:
    """A second guide pass at the same values, while no parameter requires a gradient.

    Stopping the parameters of the distributions instead would also cut what one latent
    contributes to the next one's distribution, and can't be done for a flow at all.
    """
    if isinstance(poutine.unwrap(guide), Messenger):
        raise PairError("guide", "a guide that can be replayed", "an AutoMessenger", ["AutoNormal"])
    collect = _Collector(structure, terms.num_particles, per_dimension=False)
    with _stopped(structure.parameters.values()):
        replayed = poutine.replay(guide, trace=terms.guide_trace)
        trace = poutine.trace(replayed).get_trace(*batch)
        for site in _sample_sites(trace):  # a flow runs its networks only when it is scored
            collect.guide(site, in_model=site["name"] in terms.sites)
    stopped = collect.terms()
    terms.stopped_log_q, terms.stopped_global_log_q = stopped.log_q, stopped.global_log_q


@contextmanager
def _stopped(parameters: Any) -> Iterator[None]:
    trainable = [p for p in parameters if p.requires_grad]
    with warnings.catch_warnings():  # pyro.module warns of each parameter that has no gradient
        warnings.filterwarnings("ignore", message=".*was not registered in the param store")
        for p in trainable:
            p.requires_grad_(False)  # noqa: FBT003
        try:
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)  # noqa: FBT003


class _Collector:
    """Reduces the sites of a pass to shape (K, N) or (K,)."""

    def __init__(self, structure: Structure, num_particles: int, per_dimension: bool) -> None:  # noqa: FBT001
        self.structure, self.num_particles = structure, num_particles
        self.per_dimension = per_dimension
        self.vectorized = num_particles > 1
        self.rank = structure.nesting + self.vectorized
        self.axis = self.rank + structure.dim  # of the data, in a log density of full rank
        self.sites: dict[str, SiteTerms] = {}
        self.summed_out: list[tuple[Any, Tensor]] = []
        self.num_rows = 0
        self.like: Tensor | None = None

    def guide(self, site: Any, *, in_model: bool) -> None:
        if is_factor(site):
            kind: Kind = "penalty" if is_penalty(site) else "factor"
        else:
            kind = "latent" if in_model else "auxiliary"
        entry = self._entry(site, kind)
        entry.guide = site["fn"]
        delta = delta_of(site["fn"])
        if delta is None:
            raw = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        else:  # never x == v, which is false after any round trip
            raw = delta[0].log_density
            raw = raw.sum(tuple(range(-delta[1], 0))) if delta[1] else raw
        entry.log_q, entry.scaled_log_q = self._both(site, raw, entry.is_local)
        if self.per_dimension and kind == "latent" and entry.is_local:
            entry.log_q_dims = self._dims(site)

    def model(self, site: Any) -> None:
        raw = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        if raw.dim() > self.rank:
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
        notes: dict[str, Any] = {}
        if self.summed_out:
            self._sum_out(notes)
        assert self.like is not None  # noqa: S101
        return Terms(
            self.sites, self.num_particles, self.num_rows, self.structure, self.like, notes=notes
        )

    def _entry(self, site: Any, kind: Kind) -> SiteTerms:
        name = site["name"]
        if name not in self.sites:
            local = any(f.name == self.structure.plate for f in site["cond_indep_stack"])
            self.sites[name] = SiteTerms(name, kind, local, self._value(site))
        return self.sites[name]

    def _value(self, site: Any) -> Tensor:
        """The value with particles first: (K, ...), without the plates that it isn't in."""
        value: Tensor = site["value"]
        if not self.vectorized:
            return value.unsqueeze(0)
        batch = value.dim() - len(site["fn"].event_shape)
        if batch < self.rank:  # data, which are the same for all particles
            return value.unsqueeze(0).expand(self.num_particles, *value.shape)
        own = max(
            (-f.dim for f in site["cond_indep_stack"] if f.vectorized and f.name != _PARTICLES),
            default=0,
        )
        return value.reshape(value.shape[:1] + value.shape[batch - own :])

    def _both(self, site: Any, raw: Tensor, is_local: bool) -> tuple[Tensor, Tensor]:  # noqa: FBT001
        masked = scale_and_mask(raw, mask=site["mask"])
        scale = site["scale"]
        keep = plate_scale(site, without=self.structure.plate)
        plain = self._reduce(masked if keep == 1.0 else masked * keep, is_local=is_local)
        if isinstance(scale, Tensor):
            return plain, self._reduce(masked * scale, is_local=is_local)
        return plain, plain if scale == keep else plain * (scale / keep)

    def _reduce(self, log_prob: Tensor, *, is_local: bool) -> Tensor:
        """Sums out all dimensions but particles and, inside the data plate, data."""
        if log_prob.dim() > self.rank:
            raise PairError(
                "a site of the pair",
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

    def _dims(self, site: Any) -> Tensor:
        fn, value = site["fn"], site["value"]
        frames = [f.name for f in site["cond_indep_stack"] if f.vectorized and f.name != _PARTICLES]
        if not isinstance(fn, torch.distributions.Independent) or frames != [self.structure.plate]:
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
        return each if self.vectorized else each.unsqueeze(0)

    def _sum_out(self, notes: dict[str, Any]) -> None:
        """Sums out enumerated latents with everything that depends on them, datum by datum."""
        dims = [
            s["infer"].get("_enumerate_dim")
            for s, _ in self.summed_out
            if s["name"] in self.structure.enumerated
        ]
        names = [s["name"] for s, _ in self.summed_out]
        if len(set(dims)) != len(dims):
            raise PairError(
                "enumerated sites",
                "one dimension each",
                f"a shared one in {names}",
                ["no pyro.markov around them"],
            )
        total: Tensor | None = None
        for site, raw in self.summed_out:
            masked = scale_and_mask(raw, mask=site["mask"])
            extra = masked.dim() - self.rank
            kept = {*range(extra), extra + self.axis} | ({extra} if self.vectorized else set())
            out = [i for i in range(masked.dim()) if i not in kept]
            part = masked.sum(out, keepdim=True) if out else masked
            total = part if total is None else total + part
        assert total is not None  # noqa: S101
        extra = total.dim() - self.rank
        summed = total.logsumexp(tuple(range(extra)))
        others = {
            ("latent" if not s["is_observed"] else "observed")
            for s, _ in self.summed_out
            if s["name"] not in self.structure.enumerated
        }
        kind: Kind = "latent" if others == {"latent"} else "enumerated"
        if len(others) > 1:
            notes["joint"] = True
        for site, _ in self.summed_out:
            if site["name"] in self.sites:
                self.sites[site["name"]].model = site["fn"]
        entry = SiteTerms("+".join(names), kind, is_local=True)
        entry.log_p = self._reduce(summed, is_local=True)
        scale = self.summed_out[0][0]["scale"]
        entry.scaled_log_p = entry.log_p * scale
        self.sites[entry.name] = entry
