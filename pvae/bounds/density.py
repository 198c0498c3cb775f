"""The log densities of a pair as functions of its latents, in unconstrained coordinates."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import Constraint
from tqdm import tqdm

from pvae.bounds.weights import require_local
from pvae.distributions import is_transformed
from pvae.errors import PairError, UndefinedError
from pvae.modes import evaluating
from pvae.options import progress_bar
from pvae.pair import Batch, Structure, rows_from
from pvae.simulate import Simulation, simulate_batch
from pvae.terms.chunks import chunks_of
from pvae.terms.evaluation import Evaluation
from pvae.terms.passes import can_vectorize, compute, no_guide
from pvae.terms.result import Terms, stack
from pvae.terms.support import with_constant_bounds
from pvae.types import Dist

__all__ = ["LatentDensity", "densities", "groups_of", "moments", "spread"]


@dataclass(frozen=True)
class _Site:
    """The columns of the flat vector that hold a latent, and its shape in the programs."""

    name: str
    transform: Transform  # unconstrained -> support
    shape: tuple[int, ...]  # of one datum, unconstrained
    columns: slice
    axis: int | None  # of the data, in a value with particles first
    num_plates: int  # dimensions of a value that plates take


class LatentDensity:
    r"""The densities of one batch of a pair as functions of u, its latents as one flat vector.

    The latents of a datum, of all sites that have a guide, are mapped from their supports to the
    real line by torch's bijections, and concatenated to a vector u. All densities are those of u:

    .. math:: \log p(x, u) = \log p(x, z(u)) + \log |\det \partial z / \partial u|

    Gradients are meant to be taken in u alone, by ``torch.autograd.grad``. The programs run in the
    mode, training or evaluation, that their modules are in. They must treat the data of a batch
    independently.

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
        batch: Batch | Tensor,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.structure, self.batch = structure, structure.place(batch)
        self.given = dict(given or {})
        self.watch: Callable[[Terms], None] | None = None  # sees the terms, but those of gradients
        self._has_inverse = True  # of the guide's flows, if it has any
        _check_pair(structure)
        with torch.no_grad():
            terms = self._compute(1, {})
        self.num_rows = terms.num_rows
        self._sites: list[_Site] = []
        self.num_dims = 0
        for name in structure.latents:
            self._add(name, terms)
        guides = [terms.sites[name].guide for name in structure.latents]
        if any(fn is not None and is_transformed(fn) for fn in guides):
            self._check_inverse()

    def _check_inverse(self) -> None:
        """Leaves out a guide whose flows score their own draws alone."""
        with torch.no_grad():
            try:
                self.terms(self.from_guide(1))
            except UndefinedError:
                self._has_inverse = False

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the latents, in the order in which u has them."""
        return tuple(site.name for site in self._sites)

    def terms(self, u: Tensor) -> Terms:
        """The pair's terms at u, shape ``(K, N, D)``; without the bijections' determinants."""
        k = len(u)
        if k > 1 and not can_vectorize(self.structure, self.batch):
            return stack(self.terms(one) for one in u.split(1))
        terms = self._compute(k, self._as_given(self.values(u)))
        if self.watch is not None and not torch.is_grad_enabled():
            self.watch(terms)
        return terms

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

    @property
    def has_log_q(self) -> bool:
        """Whether the guide has a density at any u.

        It has none where other draws make its latents, or a flow without an inverse does.
        """
        return self._has_inverse and not (self.structure.auxiliary or self.structure.fed)

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """The latents by site, each of shape ``(K, N, ...)``, at u of shape ``(K, N, D)``."""
        return {site.name: site.transform(self._part(site, u)) for site in self._sites}

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `values`: u of shape ``(K, N, D)``."""
        parts = [site.transform.inv(values[site.name]) for site in self._sites]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], 2)

    def from_guide(self, num_draws: int) -> Tensor:
        """Draws from q(u | x), shape ``(num_draws, N, D)``."""
        terms = compute(self.structure, self.batch, num_particles=num_draws, given=self.given)
        sites = terms.sites.items()
        return self.flatten({n: s.value for n, s in sites if s.is_local and s.value is not None})

    def from_prior(self, num_draws: int) -> Tensor:
        """Draws from p(u), given what the model doesn't observe of the batch."""
        return self._latents_of(self._simulate(num_draws, "draws from the prior", draw_data=False))

    def simulated(self) -> tuple[LatentDensity, Tensor]:
        """The densities of data drawn from the model, and u that they were drawn with.

        There is one datum a row, and u, of shape ``(1, N, D)``, is a draw from its exact posterior.

        Raises:
            UndefinedError: If the model has factors, the prior is improper, or a site observes
                anything but a tensor of the batch, as it is or reshaped.
        """
        with torch.no_grad():
            run = self._simulate(1, "simulated data")
            settled = run.settled()
            filled, run.traces = settled.batch, [settled.trace]
        return LatentDensity(self.structure, filled, self.given), self._latents_of(run)

    def _simulate(self, num_draws: int, where: str, *, draw_data: bool = True) -> Simulation:
        return simulate_batch(
            self.structure,
            self.batch,
            num_particles=num_draws,
            given=self.given,
            draw_data=draw_data,
            where=where,
        )

    def _latents_of(self, run: Simulation) -> Tensor:
        return self.flatten({name: run.value(name) for name in self.sites})

    def _compute(self, num_particles: int, given: Mapping[str, Tensor]) -> Terms:
        structure, given = self.structure, {**self.given, **given}
        if not self._has_inverse:
            structure = replace(structure, guide=no_guide)
        with pyro.validation_enabled(is_validate=False):  # a trajectory may leave finite numbers
            return compute(
                structure, self.batch, num_particles=num_particles, vectorize=True, given=given
            )

    def _add(self, name: str, terms: Terms) -> None:
        site = terms.sites[name]
        value = site.value
        assert value is not None  # noqa: S101
        support = _support(name, site.model)
        is_fed = name in self.structure.fed
        if not is_fed and not _same_map(support, other := _support(name, site.guide), value):
            actual, fixes = f"{support} and {other}", ["a guide with the prior's support"]
            raise PairError(f"site '{name}'", "one support in model and guide", actual, fixes)
        transform = biject_to(support)
        shape = tuple(transform.inv(value).shape[2:])
        columns = slice(self.num_dims, self.num_dims + math.prod(shape))
        num_plates = value.dim() - 1 - len(self.structure.shapes[name])  # the one datum's, too
        self._sites.append(_Site(name, transform, shape, columns, site.data_axis, num_plates))
        self.num_dims = columns.stop

    def _part(self, site: _Site, u: Tensor) -> Tensor:
        return u[..., site.columns].reshape(*u.shape[:2], *site.shape)

    def _as_given(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values in the layout that the programs have them in: particles first, if many."""
        given = {}
        for site in self._sites:
            value = rows_from(1, site.axis, values[site.name])
            between = (1,) * (self.structure.nesting - site.num_plates + (site.axis is None))
            shape = value.shape[:1] + between + value.shape[1:]
            given[site.name] = value.reshape(shape) if len(value) > 1 else value[0]
        return given


@contextlib.contextmanager
def densities(
    evaluation: Evaluation, num_particles: int = 1, title: str = ""
) -> Iterator[tuple[Iterator[tuple[slice, LatentDensity]], tqdm]]:
    """Each chunk's rows and densities, in evaluation mode, and a progress bar whose total is 1.

    The rows of a chunk, times ``num_particles``, are at most the evaluation's ``max_rows``. A pair
    that runs on one number of rows alone has its last chunk filled up with other rows; those that
    count are the first, as many as the slice has. Without a title there is no bar.
    """
    structure, source, max_rows = evaluation.structure, evaluation.source, evaluation.max_rows
    chunks = chunks_of(source, structure, num_particles, max_rows)
    shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    is_shown = bool(title) and evaluation.progress
    bar = progress_bar(total=1.0, title=title, shown=is_shown, bar_format=shown)
    with evaluating(structure.modules), bar:
        yield ((rows, LatentDensity(structure, b, given)) for rows, _, b, given in chunks), bar


def moments(draw: Callable[[int], Tensor], num_dims: int) -> Dist:
    """The Gaussian with the mean and covariance of draws ``(K, N, D)``, for each datum.

    Its covariance is diagonal where D is too large for the draws, 512 of them.
    """
    draws = torch.cat([draw(8) for _ in range(_DRAWS // 8)])
    mean, sd = draws.mean(0), draws.std(0)
    sd = torch.where(sd.isfinite() & (sd > 0), sd, 1.0)
    if num_dims > _DRAWS // 4:
        return dist.Normal(mean, sd).to_event(1)
    white = (draws - mean) / sd
    correlation = torch.einsum("kni,knj->nij", white, white) / (_DRAWS - 1)
    correlation = correlation + 1e-6 * torch.eye(num_dims).to(correlation)
    factor = sd.unsqueeze(-1) * torch.linalg.cholesky(correlation)
    return dist.MultivariateNormal(mean, scale_tril=factor, validate_args=False)


_DRAWS = 512


def groups_of(count: int, at_most: int) -> list[int]:
    """Numbers of draws that add up to a count, each at most so many, and at least one."""
    size = max(1, min(count, at_most))
    return [min(size, count - done) for done in range(0, count, size)]


def spread(draw: Callable[[int], Tensor], at_once: int = 1) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of 32 draws, ``(N, D)``; a deviation that isn't finite is 1."""
    draws = torch.cat([draw(min(at_once, 32)) for _ in range(-(-32 // at_once))])
    scale = draws.std(0)
    return draws.mean(0), torch.where(scale.isfinite() & (scale > 0), scale, 1.0)


def _check_pair(structure: Structure) -> None:
    what = "densities of the latents"
    require_local(structure, what)
    if isinstance(poutine.unwrap(structure.guide), Messenger):
        raise PairError("guide", "a guide that runs alone", "an AutoMessenger", ["AutoNormal"])
    if not structure.latents:
        raise UndefinedError(what, "a latent of the data that has a guide", "none")


def _support(name: str, fn: Dist) -> Constraint:
    """A support that is the same for all data, or a refusal."""
    actual, fixes = type(fn).__name__, list[str]()
    with contextlib.suppress(NotImplementedError):
        support = fn.support
        general = with_constant_bounds(support)
        if support.is_discrete:
            mark = "infer={'enumerate': 'parallel'} at it in the model, and no guide for it"
            actual, fixes = f"{actual}, which is discrete", [mark]
        elif general is None or constraints.is_dependent(support):
            actual, fixes = f"{support}, whose bounds change", ["bounds that are numbers"]
        else:
            actual = str(support)
            biject_to(general)
            return general
    raise UndefinedError(
        f"unconstrained coordinates of site '{name}'",
        "a continuous distribution with a fixed support that maps onto the real line",
        actual,
        fixes,
    )


def _same_map(one: Constraint, other: Constraint, like: Tensor) -> bool:
    """Whether two supports are one, by the bijections that they have."""
    try:
        u = biject_to(one).inv(like)
        return torch.allclose(biject_to(other)(u), like, rtol=1e-4, equal_nan=True)
    except (RuntimeError, ValueError):
        return False
