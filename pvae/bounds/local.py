"""q fitted to each datum by itself, from the guide's own family and from richer ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pvae import randomness
from pvae.annotations import check_fields
from pvae.bounds.density import LatentDensity, densities, groups_of, spread
from pvae.bounds.families import LocalFamily, flow, full_rank, own_family, refuse_masks
from pvae.bounds.possible import Possible
from pvae.bounds.weights import require_evidence
from pvae.devices import double
from pvae.errors import check_choice, check_int, check_number
from pvae.terms import Evaluation

__all__ = ["FAMILIES", "Family", "Fitted", "LocalFit", "fit_locally"]

Family = Literal["own", "full_rank", "flow"]

FAMILIES: tuple[Family, ...] = ("own", "full_rank", "flow")
"""The guide's own, and Gaussians and flows in unconstrained coordinates."""


@dataclass(frozen=True)
class LocalFit:
    r"""Settings of the fit of q to each datum, by Adam with a falling learning rate.

    Every 50 steps the mean ELBO of all data is estimated, with the same draws each time. Where it
    has not risen, the learning rate falls to 0.3 of what it was; where it has fallen by two
    standard errors of the difference, the parameters are set back. After four falls of the
    learning rate the fit ends.

    Gradients leave out the score of q, whose expectation is 0, so that they vanish where q is the
    posterior. No datum's steps depend on another's, but for the learning rate and the end.

    References:
        Sticking the Landing (Roeder et al., 2017), https://arxiv.org/abs/1703.09194

    Arguments:
        num_particles: Number of draws of each datum for a gradient.
        lr: Learning rate at the start; locations move in units of standard deviations.
        max_steps: Number of steps after which a fit ends, settled or not.
        start: Whose mean and spread Gaussians start from, ``"guide"`` or ``"prior"``: a guide that
            has found one mode of a posterior has the fits find that one, too.

    Example:
        >>> LocalFit(max_steps=500)
        LocalFit(num_particles=16, lr=0.05, max_steps=500, start='guide')
    """

    num_particles: int = 16
    lr: float = 0.05
    max_steps: int = 3000
    start: Literal["guide", "prior"] = "guide"

    def __post_init__(self) -> None:
        check_fields(self, "LocalFit")
        check_int("LocalFit.num_particles", self.num_particles)
        check_int("LocalFit.max_steps", self.max_steps)
        check_number("LocalFit.lr", self.lr, above=0)
        check_choice("LocalFit.start", self.start, ("guide", "prior"))


@dataclass(frozen=True)
class Fitted:
    """One family, fitted to a chunk of data."""

    rows: slice  # of the data set
    family: Family
    log_weights: Tensor  # of fresh draws from the fitted q, (K, n)
    is_settled: bool  # whether the ELBO had stopped rising before ``max_steps``
    instead: str = ""  # why a full-rank Gaussian stands in for the guide's own family


def fit_locally(
    evaluation: Evaluation,
    how: LocalFit,
    num_particles: int,
    *,
    families: Sequence[Family] = FAMILIES,
    possible: Possible | None = None,
) -> Iterator[Fitted]:
    """Fits each family to each datum, chunk by chunk, in evaluation mode.

    Families are fitted in the order of `FAMILIES`; a flow starts from the full-rank Gaussian.
    ``possible`` takes in the draws that are weighted.
    """
    require_evidence(evaluation.structure, "a local fit")
    particles = min(how.num_particles, evaluation.max_rows)
    with densities(evaluation, particles, "local fits") as (chunks, bar):
        for rows, density in chunks:
            refuse_masks(density)
            count = rows.stop - rows.start
            share = count / evaluation.num_rows / len(families)
            is_prior = how.start == "prior"
            start = full_rank(*spread(density.from_prior if is_prior else density.from_guide))
            for family in families:
                q, instead = start, ""
                if family == "own":
                    q, instead = own_family(density, start)
                elif family == "flow":
                    q = flow(start)
                settled = _maximise(q, density, how, particles)
                groups = groups_of(num_particles, evaluation.max_rows // density.num_rows)
                if possible is not None:
                    density.watch = partial(possible.take, rows, of_guide=False)
                weights = torch.cat([double(q.log_weights(density, k)) for k in groups])
                density.watch = None
                bar.update(share)
                yield Fitted(rows, family, weights[:, :count], settled, instead)


_ROUND = 50  # steps between two looks
_FALL = 0.3  # of the learning rate, where the ELBO stands still
_FALLS = 4  # after which a fit has settled
_STILL = 1e-3  # nats
_LOOKS = 256  # draws of a look
_MEMORY = (0.9, 0.95)  # short: gradients are large where a fit starts, and soon small


def _maximise(q: LocalFamily, density: LatentDensity, how: LocalFit, particles: int) -> bool:
    """Fits q by gradient ascent on the ELBO; says whether it had stopped rising in the end."""
    for parameter in q.parameters:
        parameter.requires_grad_()
    optimiser = torch.optim.Adam(q.parameters, lr=how.lr, betas=_MEMORY)
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
        if gain < -2 * error:
            for parameter, value in zip(q.parameters, kept, strict=True):
                parameter.data.copy_(value)
        else:
            best, kept = now, [p.detach().clone() for p in q.parameters]
    return falls == _FALLS


def _look(q: LocalFamily, density: LatentDensity, particles: int) -> Tensor:
    """The mean ELBO of all data for each of some draws, the same at every look."""
    with torch.no_grad(), randomness.forked(0):
        draws = [q.log_weights(density, particles) for _ in range(max(1, _LOOKS // particles))]
    each = double(torch.cat(draws))
    return torch.where(each.isfinite(), each, 0.0).sum(1) / each.isfinite().sum(1).clamp(min=1)


def _step(
    q: LocalFamily, density: LatentDensity, optimiser: torch.optim.Optimizer, particles: int
) -> None:
    """One step of Adam, for all data at once."""
    with torch.enable_grad():
        elbo = q.log_weights(density, particles).mean(0)
        gradients = torch.autograd.grad(-elbo.sum(), q.parameters)
    for parameter, gradient in zip(q.parameters, gradients, strict=True):
        parameter.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
    optimiser.step()
