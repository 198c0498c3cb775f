"""The log densities of a pair as functions of its latents, in unconstrained coordinates."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pvae.errors import PairError, UndefinedError, oxford
from pvae.modes import evaluating
from pvae.pair import Structure, as_batch
from pvae.pair.messages import is_factor, is_penalty, sample_sites
from pvae.terms.chunks import chunks_of
from pvae.terms.collect import Collector
from pvae.terms.evaluation import Evaluation
from pvae.terms.passes import can_vectorize, compute, in_particles
from pvae.terms.result import Terms, stack
from pvae.terms.support import with_constant_bounds
from pvae.types import Program

__all__ = ["LatentDensity", "stream_densities"]


@dataclass(frozen=True)
class _Site:
    """Where a latent stands in the flat vector, and how it gets into the programs."""

    name: str
    transform: Any  # unconstrained -> support
    shape: tuple[int, ...]  # of one datum, unconstrained
    columns: slice
    axis: int  # of the data, in a value with particles first
    num_plates: int  # dimensions of a value that plates take


class LatentDensity:
    r"""The densities of one batch of a pair as functions of u, its latents as one flat vector.

    The latents of a datum, of all sites that have a guide, go through the bijections of torch
    from their supports to the real line, and are put in a row. Densities are those of u:

    .. math:: \log p(x, u) = \log p(x, z(u)) + \log |\det \partial z / \partial u|

    Gradients are meant to be taken in u alone, by ``torch.autograd.grad``. Programs run in the
    mode that they are in; `evaluating` around it is for the other one, and switches gradients off
    where ``torch.enable_grad`` isn't inside. Data must not meet in a batch.

    Arguments:
        structure: The pair, as `Pair.inspect` found it.
        batch: What its programs are called with, N data: a tuple, or one tensor.
        given: The data plate's indices, for a pair that draws its own.

    Raises:
        UndefinedError: If there are sites outside the data plate, a latent is discrete, or its
            support has no bijection or depends on data or on other latents.
        PairError: If model and guide have different supports, or the guide is an AutoMessenger.

    Example:
        >>> vae, x = pvae.recipes.vae(64, 2), torch.zeros(5, 64)
        >>> density = LatentDensity(vae.inspect(x), x)
        >>> u = density.from_guide(3)
        >>> u.shape, density.log_joint(u).shape
        (torch.Size([3, 5, 2]), torch.Size([3, 5]))
    """

    def __init__(
        self,
        structure: Structure,
        batch: Any,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.structure, self.batch = structure, as_batch(batch)
        self.given = dict(given or {})
        _check_pair(structure)
        with torch.no_grad():
            terms = self._compute(1, {})
        self.num_rows = terms.num_rows
        self._sites: list[_Site] = []
        self.num_dims = 0
        for name in structure.latents:
            self._add(name, terms)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the latents, in the order in which u has them."""
        return tuple(site.name for site in self._sites)

    def terms(self, u: Tensor) -> Terms:
        """The pair's terms at u, shape ``(K, N, D)``; without the bijections' determinants."""
        k = len(u)
        if k == 1 or can_vectorize(self.structure, self.batch):
            return self._compute(k, self._as_given(self.values(u)))
        return stack(self.terms(one) for one in u.split(1))

    def log_det(self, u: Tensor) -> Tensor:
        r"""log of :math:`|\det \partial z / \partial u|`, shape ``(K, N)``."""
        total = u.new_zeros(u.shape[:2])
        for site in self._sites:
            part = self._part(site, u)
            log_det = site.transform.log_abs_det_jacobian(part, site.transform(part))
            total = total + log_det.reshape(*u.shape[:2], -1).sum(-1)
        return total

    def log_joint(self, u: Tensor) -> Tensor:
        """log p(x, u), shape ``(K, N)``, enumerated latents summed out."""
        return self.terms(u).log_joint + self.log_det(u)

    def log_prior(self, u: Tensor) -> Tensor:
        """log p(u), shape ``(K, N)``."""
        self.structure.require_proper("log p(z)")
        return self.terms(u).log_prior + self.log_det(u)

    def log_q(self, u: Tensor) -> Tensor:
        """log q(u | x), shape ``(K, N)``.

        Raises:
            UndefinedError: If the guide has a point mass, or sites that the model doesn't have.
        """
        self.require_guide("log q(z | x)")
        return self.terms(u).log_q + self.log_det(u)

    def require_guide(self, what: str) -> None:
        """Refuses a quantity that needs the guide's density as a function of the latents."""
        self.structure.require_density(what)
        extra = [*self.structure.auxiliary, *self.structure.fed]
        if extra:
            raise UndefinedError(
                what,
                "a guide that draws each latent from a distribution of its own",
                f"auxiliary or deterministic site {oxford(extra)}",
                ["pyro.sample(name, q) in the guide, without auxiliary sites"],
            )

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """The latents by site, each of shape ``(K, N, ...)``, at u of shape ``(K, N, D)``."""
        return {site.name: site.transform(self._part(site, u)) for site in self._sites}

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """What `values` undoes: u of shape ``(K, N, D)``."""
        parts = [site.transform.inv(values[site.name]) for site in self._sites]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], 2)

    def from_guide(self, num_draws: int) -> Tensor:
        """Draws from q(u | x), shape ``(num_draws, N, D)``."""
        terms = compute(
            self.structure,
            self.batch,
            num_particles=num_draws,
            given=self.given,
        )
        return self.flatten(_values_of(terms))

    def from_prior(self, num_draws: int) -> Tensor:
        """Draws from p(u), given what the model doesn't observe of the batch."""
        self.structure.require_proper("draws from the prior")
        draws = [self._run_model(self.structure.model, k) for k in self._passes(num_draws)]
        return torch.cat([self.flatten(_values_of(terms)) for terms in draws])

    def simulated(self) -> tuple[LatentDensity, Tensor]:
        """Data drawn from the model, one a row, and the latents that they were drawn with.

        These are a draw from the exact posterior of the drawn data.

        Returns:
            The densities of a batch that has the drawn data, and u, shape ``(1, N, D)``.

        Raises:
            UndefinedError: If the model has factors, the prior is improper, or a site observes
                anything but a tensor of the batch as it is.
        """
        self.structure.require_proper("simulated data")
        with torch.no_grad():
            terms = self._run_model(poutine.uncondition(self.structure.model), 1)
            u = self.flatten(_values_of(terms))
        batch = list(self.batch)
        for site in sample_sites(terms.model_trace):
            infer = site["infer"] or {}
            if is_factor(site) and not is_penalty(site):
                raise UndefinedError(
                    "simulated data",
                    "a model without factors, which no draw follows",
                    f"factor '{site['name']}'",
                )
            if infer.get("was_observed") and not is_factor(site):
                batch[_place(site, infer["obs"], self.batch)] = site["value"].to(infer["obs"])
        drawn = LatentDensity(self.structure, tuple(batch), self.given)
        return drawn, u

    def _compute(self, num_particles: int, given: Mapping[str, Tensor]) -> Terms:
        with pyro.validation_enabled(is_validate=False):  # a trajectory may leave finite numbers
            return compute(
                self.structure,
                self.batch,
                num_particles=num_particles,
                vectorize=True,
                given={**self.given, **given},
            )

    def _passes(self, num_draws: int) -> list[int]:
        """How many particles each pass has."""
        if num_draws == 1 or can_vectorize(self.structure, self.batch):
            return [num_draws]
        return [1] * num_draws

    def _run_model(self, model: Program, num_particles: int) -> Terms:
        """The model alone, its latents drawn from the prior."""
        program = in_particles(model, self.structure, num_particles, self.given)
        trace = poutine.trace(program).get_trace(*self.batch)
        collect = Collector(self.structure, num_particles, per_dimension=False)
        for site in sample_sites(trace):
            collect.model(site)
        terms = collect.terms()
        terms.model_trace = trace
        return terms

    def _add(self, name: str, terms: Terms) -> None:
        found = terms.sites[name]
        value = found.value
        assert value is not None  # noqa: S101
        support = _support(name, found.model)
        fed = name in self.structure.fed
        if not fed and not _same_map(support, _support(name, found.guide), value):
            raise PairError(
                f"site '{name}'",
                "one support in model and guide",
                f"{support} and {_support(name, found.guide)}",
                ["a guide whose draws can be wherever the prior's can"],
            )
        transform = biject_to(support)
        shape = tuple(transform.inv(value).shape[2:])
        size = math.prod(shape)
        columns = slice(self.num_dims, self.num_dims + size)
        num_plates = value.dim() - 1 - len(self.structure.shapes[name])
        self._sites.append(_Site(name, transform, shape, columns, found.data_axis, num_plates))
        self.num_dims += size

    def _part(self, site: _Site, u: Tensor) -> Tensor:
        return u[..., site.columns].reshape(*u.shape[:2], *site.shape)

    def _as_given(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values in the layout that the programs have them in: particles first, if many."""
        given = {}
        for site in self._sites:
            value = values[site.name].movedim(1, site.axis)
            between = (1,) * (self.structure.nesting - site.num_plates)
            shape = value.shape[:1] + between + value.shape[1:]
            given[site.name] = value.reshape(shape) if len(value) > 1 else value[0]
        return given


def stream_densities(
    evaluation: Evaluation, num_particles: int = 1
) -> Generator[tuple[slice, LatentDensity]]:
    """The densities of all data in order, chunk by chunk, in evaluation mode without gradients.

    A chunk has so many data that ``num_particles`` for each are at most the evaluation's
    ``max_rows``. A pair
    that runs on one number of rows alone has its last chunk filled up: only so many of its rows
    count as the slice says.

    Yields:
        The rows that a chunk has, and their densities.
    """
    structure, source = evaluation.structure, evaluation.source
    with evaluating(structure.modules):
        chunks = chunks_of(source, structure, num_particles, evaluation.max_rows)
        for rows, _, batch, indices in chunks:
            yield rows, LatentDensity(structure, batch, indices)


def _check_pair(structure: Structure) -> None:
    what = "densities of the latents"
    if structure.global_sites:
        raise UndefinedError(
            f"{what} of single data",
            "a pair whose sites are all inside the data plate",
            f"global site {oxford(structure.global_sites)}",
            ["bounds.elbo or bounds.evidence, for the data set"],
        )
    if isinstance(poutine.unwrap(structure.guide), Messenger):
        raise PairError("guide", "a guide that runs alone", "an AutoMessenger", ["AutoNormal"])
    if not structure.latents:
        raise UndefinedError(what, "a latent of the data that has a guide", "none")


def _support(name: str, fn: Any) -> Any:
    """A support that is the same for all data, or a refusal."""
    try:
        support = fn.support
    except NotImplementedError:
        raise _no_bijection(name, type(fn).__name__) from None
    if support.is_discrete:
        raise _no_bijection(name, f"{type(fn).__name__}, which is discrete", ["enumeration"])
    general = with_constant_bounds(support)
    if general is None or constraints.is_dependent(support):
        raise _no_bijection(name, f"{support}, whose bounds change", ["bounds that are numbers"])
    try:
        biject_to(general)
    except NotImplementedError:
        raise _no_bijection(name, str(support)) from None
    return general


def _no_bijection(name: str, actual: str, fixes: list[str] | None = None) -> UndefinedError:
    return UndefinedError(
        f"unconstrained coordinates of site '{name}'",
        "a continuous distribution with a fixed support that maps onto the real line",
        actual,
        fixes or [],
    )


def _same_map(one: Any, other: Any, like: Tensor) -> bool:
    """Whether two supports are one, by the bijections that they have."""
    try:
        u = biject_to(one).inv(like)
        return torch.allclose(biject_to(other)(u), like, rtol=1e-4, equal_nan=True)
    except (RuntimeError, ValueError):
        return False


def _values_of(terms: Terms) -> dict[str, Tensor]:
    return {name: s.value for name, s in terms.sites.items() if s.is_local and s.value is not None}


def _place(site: Any, observed: Any, batch: tuple[Any, ...]) -> int:
    """Which tensor of the batch a site observes."""
    for i, tensor in enumerate(batch):
        if observed is tensor or (
            isinstance(tensor, Tensor)
            and tensor.shape == observed.shape
            and torch.equal(tensor.to(observed), observed)
        ):
            return i
    raise UndefinedError(
        "simulated data",
        f"site '{site['name']}' to observe a tensor of the batch as it is",
        "one that the model makes of it",
        ["pyro.sample(..., obs=x) with x as the model was given it"],
    )
