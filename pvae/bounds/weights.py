"""The log importance weights of a pair, and their sums over chunks of bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from pvae.bounds.possible import Possible
from pvae.bounds.sums import Sums
from pvae.devices import double
from pvae.errors import UndefinedError, check_int, oxford, warn
from pvae.estimate import BoundKind, Estimate
from pvae.options import Options, tool
from pvae.pair import PairLike, Structure
from pvae.terms import Evaluation, prepared, stream

__all__ = [
    "Influence",
    "WeightSums",
    "facts",
    "log_weights",
    "require_evidence",
    "require_local",
]


@tool
def log_weights(
    pair: PairLike, data: object, num_particles: int = 1000, **options: Unpack[Options]
) -> Tensor:
    r"""The log importance weight of each draw from the guide, for each datum.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} | x_n), \quad z_{kn} \sim q(z | x_n)

    Their mean over k estimates the ELBO, the log of the mean of the weights estimates the evidence.
    All K * N of them are kept; `bounds.elbo` and `bounds.evidence` keep only their sums.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_particles: K, draws for each datum.
        options: As in `pvae.options.Options`.

    Returns:
        Shape ``(K, N)`` in nats, double precision, on the pair's device.

    Raises:
        UndefinedError: If a latent has a point-mass guide or an improper prior, or there are sites
            outside the data plate, whose weight is no single datum's.

    Warns:
        PvaeWarning: If the numbers can't be, with sites and reasons, as `evidence` marks them.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> log_weights(vae, torch.zeros(5, 4), 10).shape
        torch.Size([10, 5])
    """
    check_int("num_particles", num_particles)
    with prepared(pair, data, options, "log_weights") as evaluation:
        require_evidence(evaluation.structure, "importance weights")
        possible = Possible(evaluation.structure)
        weights = torch.cat(list(weights_by_chunk(evaluation, num_particles, possible)), 1)
    if reasons := possible.mark(Estimate.of_evidence("evidence", weights)).reasons:
        warn(f"log_weights, impossible: {'; '.join(reasons)}.")
    return weights


def weights_by_chunk(
    evaluation: Evaluation, num_particles: int, possible: Possible | None = None
) -> Iterator[Tensor]:
    """log weights ``(K, n)`` in double precision, of one chunk of data after another.

    ``possible`` takes in what the same passes say of them.
    """
    passes = stream(evaluation, num_particles)
    for _, same in itertools.groupby(passes, key=lambda part: part[0].start):
        parts = []
        for rows, terms in same:
            parts.append(double(terms.log_weight))
            if possible is not None:
                possible.take(rows, terms)
        yield torch.cat(parts)


def require_evidence(
    structure: Structure, what: str, *, by_datum: bool = True, density: bool = True
) -> None:
    """Refuses a pair that has no evidence, or none that importance weights can estimate.

    That is for the quantity ``what``: ``by_datum`` if it is one of single data, for which all sites
    that have a density must be inside the data plate; ``density`` if it needs the guide's.
    """
    if density:
        structure.require_density(what)
    structure.require_proper(what)
    if by_datum:
        require_local(structure, what)


def require_local(structure: Structure, what: str) -> None:
    """Refuses a quantity of single data where a site that has a density is outside the plate."""
    if structure.global_sites:
        expected = "a pair whose sites are all inside the data plate"
        fixes = [
            "bounds.evidence(pair, x), of the data set",
            "diagnostics.importance(pair, x).log_weights, of joint draws",
        ]
        actual = f"global site {oxford(structure.shared_sites)}"
        raise UndefinedError(f"{what} of single data", expected, actual, fixes)


def require_whole(what: str, structure: Structure, num_rows: int) -> None:
    """Refuses some of the data where all that global latents are conditioned on are needed."""
    if structure.is_scaled and structure.full_size != num_rows:
        expected = f"all {structure.full_size} data, on which global latents are conditioned"
        raise UndefinedError(what, expected, f"{num_rows} of them", ["the whole data set"])


class Facts(TypedDict):
    """Fields of an `Estimate` that a pair's structure decides."""

    kind: BoundKind
    global_sites: tuple[str, ...]
    remarks: tuple[str, ...]


def facts(structure: Structure) -> Facts:
    """What an average of a pair's log weights is, and what is not in it."""
    return {
        "kind": "lower" if structure.quantity == "elbo" else "none",
        "global_sites": structure.shared_sites,
        "remarks": left_out(structure),
    }


def left_out(structure: Structure) -> tuple[str, ...]:
    """What is in no density, or in it though it is no site's, and what one datum is; by line."""
    scales = structure.removed_scales.items()
    lines = [f"left out: poutine.scale of {scale:g} at site '{site}'" for site, scale in scales]
    lines += [f"left out: factor '{name}' of the guide" for name in structure.training_terms]
    lines += [
        f"left out: what one program alone masks of latent '{name}'"
        for name in structure.masked_apart
    ]
    lines += [f"left out: '{name}', missing values of no guide" for name in structure.imputed]
    lines += [f"in the density: factor '{name}' of the model" for name in structure.factors]
    whole = "no plate counts the data: the one datum is the whole data set"
    return (*lines, *([] if structure.has_plate else [whole]))


class Influence:
    """What each draw moves each datum's mean by; kept where there are few enough draws.

    With it the difference of two estimates has the right error where their draws are common, as
    those of two pairs with one seed are.
    """

    def __init__(self, evaluation: Evaluation, num_particles: int) -> None:
        self.is_kept = num_particles > 1 and evaluation.num_rows * num_particles <= _KEPT
        self._parts: dict[int, list[Tensor]] = {}

    def add(self, rows: slice, log_weight: Tensor) -> None:
        """Takes in the log weights of a chunk's particles, ``(k, n)``."""
        if self.is_kept:
            self._parts.setdefault(rows.start, []).append(double(log_weight))

    @property
    def _draws(self) -> Tensor | None:
        every = [torch.cat(parts) for parts in self._parts.values()]
        return torch.cat(every, 1) if every else None

    @property
    def of_mean(self) -> Tensor | None:
        """That of the mean of log weights, ``(K, N)``; None where there are too many."""
        draws = self._draws
        return None if draws is None else draws - draws.mean(0)

    def of_log_mean(self, power: float = 1.0) -> Tensor | None:
        """That of the log of the mean of a power of the weights, over the power."""
        draws = self._draws
        return None if draws is None else (len(draws) * (power * draws).softmax(0) - 1) / power


_KEPT = 2**22  # draws of all data, 32 MiB


class WeightSums(Sums):
    r"""log-sum-exp of a power of weights and of its square.

    Of these, for each datum: :math:`\frac1n \log \frac1K \sum_k w_k^n` with n the power, its
    variance over draws (delta method), and the effective sample size
    :math:`(\sum_k w_k^n)^2 / \sum_k w_k^{2n}`.
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__(torch.logaddexp)
        self.power = power

    def reduce(self, log_weight: Tensor) -> Tensor:
        """Both sums of log weights ``(K, n)`` over their K particles, ``(2, n)``."""
        powers = self.power * double(log_weight)
        return torch.stack([powers.logsumexp(0), (2 * powers).logsumexp(0)])

    def estimate(
        self, name: str, k: int, structure: Structure, influence: Influence | None = None
    ) -> Estimate:
        """The estimate that the sums over K particles make, with what each draw moves it by."""
        first, second = self.all
        nothing = first == -math.inf  # no draw has any weight: none counts, and no error is known
        inverse_size = torch.where(nothing, math.inf, (second - 2 * first).exp())
        variances = (inverse_size - 1 / k).clamp(min=0) / self.power**2
        return Estimate(
            name,
            (first - math.log(k)) / self.power,
            variances if k > 1 else None,
            num_particles=k,
            ess=1 / inverse_size,
            influence=None if influence is None else influence.of_log_mean(self.power),
            **facts(structure),
        )
