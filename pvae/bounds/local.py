"""q fitted to each datum by itself, from the guide's own family and from richer ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from tqdm import tqdm

from pvae import randomness
from pvae import terms as t
from pvae.bounds.families import LocalFamily, flow, full_rank, own_family, refuse_masks
from pvae.bounds.result import Bound
from pvae.bounds.sums import WeightSums
from pvae.errors import ArgumentError, check_int, check_number, oxford
from pvae.options import Options, tool
from pvae.pair import PairLike

__all__ = ["FAMILIES", "Family", "LocalFit", "Refinement", "fit_locally", "refined"]

Family = Literal["own", "full rank", "flow"]

FAMILIES: tuple[Family, ...] = ("own", "full rank", "flow")
"""The guide's own, and Gaussians and flows in unconstrained coordinates."""


@dataclass(frozen=True)
class Refinement:
    r"""How q is fitted to each datum: Adam, whose rate falls where the ELBO stands still.

    Every 50 steps the mean ELBO of all data is looked at, with the same draws each time. Where it
    has not risen, the rate falls; where it has fallen, by two standard errors of the difference,
    the fit goes back, so that it doesn't end below its start. After four falls of the rate it ends.

    Gradients leave out the score of q, whose expectation is 0, so that they vanish where q is the
    posterior. Adam works element by element, so that no datum's fit depends on another's; when to
    stop is decided by their mean.

    References:
        Sticking the Landing (Roeder et al., 2017), https://arxiv.org/abs/1703.09194

    Arguments:
        num_particles: Draws of a datum for a gradient.
        learning_rate: The first; locations move in units of standard deviations.
        max_steps: Steps after which a fit ends where it is.

    Example:
        >>> Refinement(max_steps=500)
        Refinement(num_particles=16, learning_rate=0.05, max_steps=500)
    """

    num_particles: int = 16
    learning_rate: float = 0.05
    max_steps: int = 3000

    def __post_init__(self) -> None:
        check_int("Refinement: num_particles", self.num_particles)
        check_int("Refinement: max_steps", self.max_steps)
        check_number("Refinement: learning_rate", self.learning_rate, above=0)


@dataclass(frozen=True)
class LocalFit:
    """One family, fitted to a chunk of data.

    Attributes:
        rows: The data.
        family: Which one.
        log_weights: Of fresh draws from it, ``(K, n)``.
        is_settled: Whether the ELBO stood still before the last step.
        instead: Why the guide's own family was replaced by a full-rank Gaussian, or nothing.
    """

    rows: slice
    family: Family
    log_weights: Tensor
    is_settled: bool
    instead: str = ""


@tool
def refined(
    pair: PairLike,
    data: Any,
    num_particles: int = 1000,
    *,
    family: Family = "full rank",
    refinement: Refinement | None = None,
    **options: Unpack[Options],
) -> Bound:
    r"""The evidence by importance sampling from a q that is fitted to each datum by itself.

    .. math::
        \hat\ell_n = \log \tfrac1K \sum_k \frac{p(x_n, z_{nk})}{q^*_n(z_{nk})}, \quad
        q^*_n = \arg\max_q E_q[\log p(x_n, z) - \log q(z)]

    A lower bound on average, like `bounds.evidence`, and a closer one where the guide is off. Draws
    are fresh ones, so that the fit makes no bias.

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer et al., 2018),
        https://proceedings.mlr.press/v80/cremer18a.html

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: K, draws for each datum.
        family: ``"own"``, the guide's; ``"full rank"``, a Gaussian in unconstrained coordinates;
            ``"flow"``, splines upon that.
        refinement: How to fit.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: Where there are no densities of single data in unconstrained coordinates,
            or latents are masked out.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> quick = Refinement(max_steps=50)
        >>> found = refined(vae, torch.zeros(5, 4), 50, refinement=quick,
        ...     progress=False)
        >>> found.name, found.values.shape
        ('evidence, local full rank IWAE-50', torch.Size([5]))
    """
    check_int("num_particles", num_particles)
    if family not in FAMILIES:
        raise ArgumentError("family", f"one of {oxford(FAMILIES)}", repr(family))
    wanted: tuple[Family, ...] = FAMILIES[1:] if family == "flow" else (family,)
    sums = WeightSums()
    with t.prepared(pair, data, options, "refined") as evaluation:
        structure = evaluation.structure
        how = refinement or Refinement()
        for fit in fit_locally(evaluation, how, num_particles, families=wanted):
            if fit.family == family:
                sums.add(fit.rows, sums.reduce(fit.log_weights))
    name = f"evidence, local {family} IWAE-{num_particles}"
    return sums.bound(name, num_particles, removed_scales=structure.removed_scales)


def fit_locally(
    evaluation: t.Evaluation,
    refinement: Refinement,
    num_particles: int,
    *,
    families: Sequence[Family] = FAMILIES,
) -> Iterator[LocalFit]:
    """Fits each family to each datum, chunk by chunk, in evaluation mode.

    Families are fitted in the order of `FAMILIES`; a flow starts from the full-rank Gaussian.
    """
    evaluation.structure.require_density("a local fit from the guide's")
    evaluation.structure.require_proper("a local fit")
    particles = min(refinement.num_particles, evaluation.max_rows)
    chunks = t.stream_densities(evaluation, particles)
    with contextlib.closing(chunks), _bar(progress=evaluation.progress) as bar:
        for rows, density in chunks:
            refuse_masks(density)
            count = rows.stop - rows.start
            share = count / evaluation.num_rows / len(families)
            start = full_rank(*_spread(density))
            for family in families:
                q, instead = start, ""
                if family == "own":
                    q, instead = own_family(density, start)
                elif family == "flow":
                    q = flow(start)
                settled = _maximise(q, density, refinement, particles)
                weights = _weigh(q, density, num_particles, evaluation.max_rows)[:, :count]
                bar.update(share)
                yield LocalFit(rows, family, weights, settled, instead)


def _bar(*, progress: bool) -> Any:
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    return tqdm(total=1.0, desc="local fits", bar_format=bar_format, disable=not progress)


_ROUND = 50  # steps between two looks
_FALL = 0.3  # of the learning rate, where the ELBO stands still
_FALLS = 4  # after which a fit has settled
_STILL = 1e-3  # nats
_LOOKS = 256  # draws of a look
_MEMORY = (0.9, 0.95)  # short: gradients are large where a fit starts, and soon small


def _maximise(q: LocalFamily, density: t.LatentDensity, how: Refinement, particles: int) -> bool:
    """Whether the mean ELBO stood still in the end."""
    for parameter in q.parameters:
        parameter.requires_grad_()
    optimiser = torch.optim.Adam(q.parameters, lr=how.learning_rate, betas=_MEMORY)
    best, kept = _look(q, density, particles), [p.detach().clone() for p in q.parameters]
    falls = done = 0
    while falls < _FALLS and done < how.max_steps:
        steps = min(_ROUND, how.max_steps - done)
        for _ in range(steps):
            _step(q, density, optimiser, particles)
        done += steps
        now = _look(q, density, particles)
        gain, error = float((now - best).mean()), float((now - best).std()) / math.sqrt(len(now))
        if not gain > max(_STILL, error):
            falls += 1
            optimiser.param_groups[0]["lr"] *= _FALL
        with torch.no_grad():
            if gain < -2 * error:
                _copy_into(q.parameters, kept)
            else:
                best = now
                _copy_into(kept, q.parameters)
    return falls == _FALLS


def _copy_into(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


def _look(q: LocalFamily, density: t.LatentDensity, particles: int) -> Tensor:
    """The mean ELBO of all data for each of some draws, the same at every look."""
    with torch.no_grad(), randomness.forked(0):
        found = []
        for _ in range(max(1, _LOOKS // particles)):
            u, log_q = q.draw(particles)
            found.append((density.log_joint(u) - log_q).double())
    each = torch.cat(found)
    return torch.where(each.isfinite(), each, 0.0).sum(1) / each.isfinite().sum(1).clamp(min=1)


def _step(
    q: LocalFamily, density: t.LatentDensity, optimiser: torch.optim.Optimizer, particles: int
) -> None:
    """One step of all data."""
    with torch.enable_grad():
        u, log_q = q.draw(particles)
        elbo = (density.log_joint(u) - log_q).mean(0)
        gradients = torch.autograd.grad(-elbo.sum(), q.parameters)
    for parameter, gradient in zip(q.parameters, gradients, strict=True):
        parameter.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
    optimiser.step()


def _weigh(q: LocalFamily, density: t.LatentDensity, num_particles: int, max_rows: int) -> Tensor:
    """log weights of fresh draws, ``(K, N)``."""
    at_once = max(1, min(num_particles, max_rows // density.num_rows))
    found = []
    for done in range(0, num_particles, at_once):
        u, log_q = q.draw(min(at_once, num_particles - done))
        found.append((density.log_joint(u) - log_q).double())
    return torch.cat(found)


def _spread(density: t.LatentDensity) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the guide's draws, ``(N, D)``."""
    draws = torch.cat([density.from_guide(1) for _ in range(_FOR_SPREAD)])
    scale = draws.std(0)
    return draws.mean(0), torch.where(scale.isfinite() & (scale > 0), scale, 1.0)


_FOR_SPREAD = 32
