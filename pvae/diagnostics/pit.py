"""PIT: where each datum stands among the model's draws of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Unpack

import torch
from scipy import stats
from torch import Tensor

from pvae import terms
from pvae.devices import beside, double
from pvae.diagnostics.predictive import Function
from pvae.diagnostics.result import Finding, Result
from pvae.errors import ArgumentError, UndefinedError, check_int
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.simulate import CheckKind, Replicates

__all__ = ["PIT", "pit"]


@dataclass(frozen=True, repr=False)
class PIT(Result):
    r"""Probability integral transforms of data, and whether they are uniform.

    Attributes:
        kind: Where the latents of a draw come from.
        site: The observed site.
        values: u, shape ``(N, *event_shape)`` or what the statistic makes of it, on the CPU; NaN
            where masked out.
        p_values: p-values of uniformity over data (Kolmogorov-Smirnov), shape
            ``values.shape[1:]``; None where u isn't uniform even under the model.
        reason: Why there are no p-values; empty if there are.
        num_particles: S, draws of each datum.
    """

    kind: CheckKind
    site: str
    values: Tensor
    p_values: Tensor | None
    reason: str
    num_particles: int

    @property
    def p_value(self) -> float | None:
        """The smallest p-value times the number of dimensions (Bonferroni); None without any."""
        if self.p_values is None:
            return None
        known = self.p_values[~self.p_values.isnan()]
        return min(1.0, float(known.min()) * known.numel())

    @property
    def mean(self) -> tuple[float, float]:
        """The mean of u, and its standard error over data; 1/2 where the model is right."""
        return _mean_over_data(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The mean of 12 (u - 1/2)^2, and its standard error over data; 1 if the model is right.

        Above 1 data lie at the ends of the predictive distributions, which are too narrow; below
        1 these are too wide.
        """
        return _mean_over_data(12 * (self.values - 0.5).square())

    @property
    def title(self) -> str:
        """What was drawn, and how often."""
        return (
            f"calibration ({self.kind}) of site '{self.site}': "
            f"{self.num_particles} draws of each of {len(self.values)} data"
        )

    def findings(self) -> list[Finding]:
        """Uniformity, the mean and the spread."""
        mean, spread = self.mean, self.spread
        lines, middle = [], self.reason
        if (p := self.p_value) is not None:
            middle = "of the ranks of data among draws, from 0 to 1; 1/2 if the model is right"
            meaning = f"the least of {self.values[0].numel()} dimension(s), times their number"
            lines = [Finding.of_test("PIT p-value", p, meaning, self._advice(*mean, spread[0]))]
        shape = "1 if the model is right; more: draws too narrow; less: too wide"
        lines.append(Finding("PIT mean", *mean, meaning=middle))
        return [*lines, Finding("PIT spread", *spread, meaning=shape)]

    def _advice(self, mean: float, mean_error: float, spread: float) -> str:
        if abs(mean - 0.5) > 3 * mean_error:
            side = "above" if mean > 0.5 else "below"
            return f"data lie {side} the model's draws: a bias or location is missing"
        if spread > 1:
            return "draws are too narrow: a larger or learned scale, heavier tails"
        return "draws are too wide or of another shape: a smaller or learned scale"


@tool
def pit(
    pair: PairLike,
    data: object,
    *,
    kind: CheckKind = "mixed",
    statistic: Function | None = None,
    site: str | None = None,
    num_particles: int = 200,
    **options: Unpack[Options],
) -> PIT:
    r"""Probability integral transforms: each value's rank among draws of it, made uniform.

    .. math::
        u_{nd} = \frac{\#\{s : x^{rep}_{snd} < x_{nd}\} + V_{nd}\,
                 (\#\{s : x^{rep}_{snd} = x_{nd}\} + 1)}{S + 1}, \quad V_{nd} \sim U(0, 1)

    Data that the model made have u uniform, exactly so for each S and for discrete values too, by
    the randomised V. Each dimension is tested for that over data; the smallest p-value times the
    number of dimensions is worth a look up to 0.05 and "bad" up to 0.001.

    Where u isn't uniform or not independent over data even under the model, there is no test and
    the reason is said: with ``kind="posterior"`` and latents of data (each datum was decoded from
    its own code, which brings u to 1/2), and with ``kind="prior"`` and global latents (all data
    share one).

    References:
        Predictive Model Assessment for Count Data (Czado, Gneiting & Held, 2009),
        https://doi.org/10.1111/j.1541-0420.2009.01191.x

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        kind: Where the latents of a draw come from; see `predictive`. For a regression with
            global latents ``"mixed"`` on held-out data is the posterior predictive's calibration.
        statistic: A statistic of each datum: a function of data ``(N, *event_shape)`` to ``(N,)``
            or ``(N, d)``, whose values are transformed in the place of x; None for x itself.
        site: The observed site; None if there is one.
        num_particles: S, draws of each datum.
        options: As in `pvae.options.Options`.

    Returns:
        A `PIT`; ``arviz.plot_ecdf_pit`` draws its values.

    Raises:
        UndefinedError: If the values have no order (classes, angles), or nothing can be drawn.
        ArgumentError: If the statistic doesn't give finite numbers for each datum.

    Example:
        >>> vae = pvae.recipes.vae(3, 1, hidden=(8,))
        >>> pit(vae, torch.ones(50, 3)).values.shape
        torch.Size([50, 3])
    """
    check_int("num_particles", num_particles)
    with terms.prepared(pair, data, options, "pit") as evaluation, torch.no_grad():
        replicates = Replicates.of("pit", evaluation, site, kind)
        if statistic is None:
            replicates.require_order("pit")
        own = _per_datum(statistic, replicates.observed, len(replicates.observed))
        below, equal = torch.zeros_like(own), torch.zeros_like(own)
        for block in replicates.blocks(num_particles):
            for one in block:
                values = _per_datum(statistic, one, len(own))
                below += values < own
                equal += values == own
        u = (below + torch.rand_like(below) * (equal + 1)) / (num_particles + 1)
    if statistic is None and replicates.mask is not None:
        u[~beside(replicates.mask, u).expand(u.shape)] = math.nan
    u, reason = u.cpu(), ""
    if not replicates.has_honest_p_values:
        reason = "not uniform even if right: each datum was decoded from its own code"
    elif kind == "prior" and evaluation.structure.global_latents:
        reason = "not independent even if right: all data share a global latent"
    return PIT(kind, replicates.site, u, None if reason else _uniform(u), reason, num_particles)


def _per_datum(statistic: Function | None, x: Tensor, num_rows: int) -> Tensor:
    value = x if statistic is None else torch.as_tensor(statistic(x))
    if not value.dim() or len(value) != num_rows or not bool(value.isfinite().all()):
        raise ArgumentError(
            "statistic",
            f"finite numbers for each of {num_rows} data, shape ({num_rows},) or ({num_rows}, d)",
            f"shape {tuple(value.shape)}" if value.dim() else f"the number {float(value):g}",
            ["diagnostics.predictive, for one number of a whole data set"],
        )
    return double(value)


def _uniform(u: Tensor) -> Tensor:
    """p-values of the Kolmogorov-Smirnov test, dimension by dimension; NaN without data."""
    known = [own[~own.isnan()].numpy() for own in u.reshape(len(u), -1).T]
    if not any(map(len, known)):
        raise UndefinedError("pit", "data that aren't masked out", "none")
    p_values = [stats.kstest(x, "uniform").pvalue if len(x) else math.nan for x in known]
    return torch.tensor(p_values, dtype=torch.float64).reshape(u.shape[1:])


def _mean_over_data(values: Tensor) -> tuple[float, float]:
    """A mean of all known entries, and its standard error over data, whose entries depend."""
    flat = values.reshape(len(values), -1)
    known = ~flat.isnan()
    filled, counts = flat.nan_to_num(), known.sum(1)
    mean = float(filled.sum() / counts.sum())
    off = (filled - mean * known).sum(1)  # linearised ratio of sums over data
    n = int((counts > 0).sum())  # rows that are masked out whole are no data
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(float(off.square().sum()) * n / (n - 1)) / float(counts.sum())
