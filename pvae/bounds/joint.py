"""Importance weights of joint draws: of what all data share, and of the latents of each datum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pvae.bounds.possible import Possible
from pvae.bounds.sums import Sums
from pvae.bounds.weights import facts, weights_by_chunk
from pvae.devices import double
from pvae.errors import PairError
from pvae.estimate import Estimate
from pvae.options import progress_bar
from pvae.pair import Structure
from pvae.terms import Evaluation, draw_globals, fits_particles, stream

__all__ = ["JointWeights", "is_joint", "is_nested", "joint_weights", "num_draws"]


@dataclass(frozen=True)
class JointWeights:
    r"""Log weights of the whole data set, one for each of S draws of what all data share.

    .. math::
        \log w_s = \log p(g_s) - \log q(g_s) + \sum_n \log \tfrac1K \sum_k w_{nk}(g_s)

    The weight is an unbiased estimate of p(x), as is each factor of p(x_n | g_s).

    Attributes:
        log_weights: Shape ``(S,)``, in double precision.
        noise: Variance of each over its local draws, by the delta method, ``(S,)``; 0 with none.
        num_particles: K; 1 where no latent of the data is drawn once the shared ones are known.
        num_data: N.
        possible: What else the draws say, by which impossible numbers are marked.
    """

    log_weights: Tensor
    noise: Tensor
    num_particles: int
    num_data: int
    possible: Possible

    @property
    def name(self) -> str:
        """S and K, for the name of an estimate."""
        local = f", {self.num_particles} local draws each" if self.num_particles > 1 else ""
        return f"joint IWAE-{len(self.log_weights)}{local}"

    def evidence(self, structure: Structure) -> Estimate:
        """The log of the mean weight, a lower bound of log p(x) on average."""
        found = Estimate.of_evidence(f"evidence, {self.name}", self.log_weights[:, None])
        about = facts(structure)
        whole = replace(found, by="data set", num_data=self.num_data, **about)
        return self.possible.mark(whole)


def is_joint(structure: Structure) -> bool:
    """Whether draws of latents are of the whole data set, so that it has one weight."""
    return bool(structure.global_sites) or (not structure.has_plate and bool(structure.latents))


def is_nested(structure: Structure) -> bool:
    """Whether latents of data are drawn, still, once what all data share is known."""
    if not structure.has_plate:
        return False
    sites = {*structure.latents, *structure.auxiliary}
    return bool(sites - {*structure.fed, *structure.global_sites, *structure.points})


def num_draws(
    evaluation: Evaluation, num_global: int | None, num_particles: int | None
) -> tuple[int, int]:
    """S and K, by default bounded so that the passes take seconds, whatever N is.

    Where no latent of the data is drawn, K draws of the pair are K draws of what all data share.
    """
    if not is_nested(evaluation.structure):
        asked = num_global or num_particles
        most = 4000 if evaluation.structure.has_plate else 1000
        return asked or min(most, _affordable(evaluation, 1)), 1
    k = num_particles or 20
    return num_global or min(200, _affordable(evaluation, k)), k


def _affordable(evaluation: Evaluation, num_particles: int) -> int:
    """Draws of what all data share that take at most so many passes, or rows; at least 50."""
    if fits_particles(evaluation):
        return max(50, _MOST_ROWS // (evaluation.num_rows * num_particles))
    chunks = -(-evaluation.num_rows // 1024)
    return max(50, _MOST_PASSES // (chunks * num_particles))


_MOST_ROWS, _MOST_PASSES = 2**23, 2000


def joint_weights(
    evaluation: Evaluation, num_global: int, num_particles: int, title: str = "joint draws"
) -> JointWeights:
    """Weights of S draws of what is outside the data plate, with K local ones for each.

    As many of the S go through the pair at once as fit the evaluation's ``max_rows``.
    """
    if not evaluation.structure.has_plate:
        return _of_one_datum(evaluation, num_global)
    k = num_particles if is_nested(evaluation.structure) else 1
    parts, possible = [], Possible(evaluation.structure)
    shown = evaluation.progress
    with progress_bar(total=num_global, title=title, unit="draw", shown=shown) as bar:
        for weights, noise in _blocks(evaluation.in_memory(), num_global, k, possible):
            parts.append((weights, noise))
            bar.update(len(weights))
    log_weights, noises = map(torch.cat, zip(*parts, strict=True))
    return JointWeights(log_weights, noises, k, evaluation.num_rows, possible)


def _of_one_datum(evaluation: Evaluation, num_draws: int) -> JointWeights:
    """Weights of a data set that no plate counts: all its latents are of the one datum."""
    possible = Possible(evaluation.structure)
    weights = torch.cat([*weights_by_chunk(evaluation, num_draws, possible)])[:, 0]
    return JointWeights(weights, torch.zeros_like(weights), 1, 1, possible)


def _blocks(
    evaluation: Evaluation, num_global: int, k: int, possible: Possible
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log weights and their noise, of a few draws of what all data share after another."""
    done = 0
    at_once = max(1, evaluation.max_rows // (_rows_at_once(evaluation) * k))
    while done < num_global:
        drawn = draw_globals(evaluation, min(at_once, num_global - done))
        given, count = drawn.given, drawn.count
        if count > 1:
            given = {name: value.repeat_interleave(k, 0) for name, value in given.items()}
        sums, log_p = Sums(torch.logaddexp), None
        for rows, terms in stream(evaluation, count * k, given):
            now = double(terms.global_log_p).view(count, -1)[:, 0]
            log_p = now if log_p is None else _same(log_p, now)
            sums.add(rows, _reduced(terms.log_weight, count))
            possible.take(rows, terms)
        first, second = sums.all
        inverse_size = torch.where(first == -math.inf, math.inf, (second - 2 * first).exp())
        assert log_p is not None  # noqa: S101
        local = first.sum(-1) - first.shape[-1] * math.log(k)
        yield log_p - drawn.log_q + local, (inverse_size - 1 / k).clamp(min=0).sum(-1)
        done += count


def _rows_at_once(evaluation: Evaluation) -> int:
    """Rows that a chunk has, or the guide, which is given all of them if it can be."""
    structure, total = evaluation.structure, evaluation.num_rows
    if is_nested(structure) and total <= evaluation.max_rows:
        return total
    return structure.subsample_size or structure.tied_to or min(total, 1024)


def _same(log_p: Tensor, now: Tensor) -> Tensor:
    """The density of what all data share, which has to be the same under any rows."""
    if not torch.allclose(log_p, now, rtol=1e-4, atol=1e-4):
        expected = "p(g), of what is outside the data plate, that is the same for any rows"
        actual = f"log p that differs by {float((log_p - now).abs().max()):.3g} between chunks"
        raise PairError("model", expected, actual, ["what it reads of all data as a constant"])
    return log_p


def _reduced(log_weight: Tensor, count: int) -> Tensor:
    """Log sums over local draws of weights and of their squares, ``(2, count, n)``."""
    each = double(log_weight).view(count, -1, log_weight.shape[-1])
    return torch.stack([each.logsumexp(1), (2 * each).logsumexp(1)])
