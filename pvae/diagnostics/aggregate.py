"""The aggregated posterior against the prior, and how latents correlate."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Unpack

import torch
from scipy.stats import ks_2samp
from torch import Tensor

from pvae import terms
from pvae.devices import double
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import DISTANCE, P_VALUE, Verdict
from pvae.errors import UndefinedError, check_int
from pvae.latent.coding import means_and_noise
from pvae.mmd import TwoSampleTest, two_sample_test
from pvae.options import Options, tool
from pvae.pair import PairLike
from pvae.simulate import draws as simulated_draws
from pvae.simulate import flat_values, names_of_dimensions, require_rows

__all__ = ["AggregatedPosterior", "aggregated_posterior"]


@dataclass(frozen=True, repr=False)
class AggregatedPosterior(Result):
    """Draws from q(z) and from p(z), and how they differ.

    Attributes:
        draws: From q(z | x), one for each of n data, flattened latents side by side, ``(n, D)``.
        prior: From the model, on the same rows' context, ``(n, D)``.
        names: Names of the D dimensions.
        joint: The two-sample test of all dimensions together (`pvae.mmd.two_sample_test`).
        ks: The Kolmogorov-Smirnov distance of each dimension, ``(D,)``.
        ks_p: Its p-values, times D (Bonferroni).
        correlation: Correlation of the draws, ``(D, D)``; NaN for a dimension that is constant.
        mean_correlation: Correlation of the means of q(z | x); None where they aren't known.
    """

    draws: Tensor
    prior: Tensor
    names: tuple[str, ...]
    joint: TwoSampleTest
    ks: Tensor
    ks_p: Tensor
    correlation: Tensor
    mean_correlation: Tensor | None

    @property
    def title(self) -> str:
        """How many draws were compared."""
        return f"Aggregated posterior: {len(self.draws)} draws, {len(self.names)} dimension(s)"

    def findings(self) -> list[Finding]:
        """Both tests, and the strongest correlation."""
        worst = int(self.ks.argmax())
        distance, p_value = float(self.ks[worst]), min(1.0, 2 * float(self.ks_p.min()))
        of_joint = min(1.0, 2 * self.joint.p_value)  # one of two tests
        joint: Verdict = "good" if P_VALUE.verdict(of_joint) == "good" else "look"
        is_alike = P_VALUE.verdict(p_value) == "good"
        single: Verdict = "good" if is_alike else DISTANCE.verdict(distance)
        advice = "a richer prior, or latent.fit_density, for samples"
        advice = "" if joint == single == "good" else advice
        meaning = "that codes, jointly, are distributed as the prior is"
        of_one = f"Kolmogorov-Smirnov distance in {self.names[worst]}, the greatest"
        size = "" if single == "good" else "diagnostics.surgery, for its size in nats"
        lines = [
            Finding("q(z) = p(z), p-value", of_joint, None, "", joint, meaning, advice, of_joint),
            Finding("q(z_d) from p(z_d)", distance, None, "", single, of_one, size, p_value),
        ]
        if len(self.names) > 1:
            lines.append(self._correlation())
        return lines

    def _correlation(self) -> Finding:
        apart = self.correlation.nan_to_num().triu(1)
        first, second = divmod(int(apart.abs().argmax()), len(self.names))
        value = float(apart[first, second])
        error = (1 - value**2) / (len(self.draws) - 1) ** 0.5
        both = f"{self.names[first]} and {self.names[second]}"
        return Finding("correlation", value, error, meaning=f"of {both} under q(z), the strongest")


@tool
def aggregated_posterior(
    pair: PairLike,
    data: object,
    *,
    num_rows: int = 1000,
    num_permutations: int = 999,
    site: str | None = None,
    **options: Unpack[Options],
) -> AggregatedPosterior:
    r"""Whether codes are where the prior is: draws from q(z) against draws from p(z).

    .. math:: q(z) = E_x[q(z | x)]

    One draw for each of n random rows is a sample of q(z), and one run of the model on the same
    rows one of p(z). All dimensions together, divided by their standard deviations, are compared
    by `pvae.mmd.two_sample_test`, each by the test of Kolmogorov and Smirnov. Both hold their
    false-alarm rate whatever the distributions are, and say nothing of size: with enough data any
    difference is found. So a difference (p at most 0.05) is worth a "look" at most, unless a
    dimension's distribution function is off by a quarter, which is "bad"; by less than a tenth it
    is "good". A point-mass guide, which has codes, can be compared.

    References:
        ELBO surgery (Hoffman & Johnson, 2016),
        http://approximateinference.org/accepted/HoffmanJohnson2016.pdf

    Arguments:
        pair: A model and its guide.
        data: An array, tensor, tuple of them, data set or source.
        num_rows: n at most; the test holds (2 n, 2 n) numbers.
        num_permutations: Permutations of the kernel test; 1 more is its p-value's denominator.
        site: The latent; None for all of them.
        options: As in `pvae.options.Options`.

    Raises:
        UndefinedError: If a prior is improper, the model has factors, there are latents outside
            the data plate, or the pair subsamples its data.

    Example:
        >>> vae = pvae.recipes.vae(4, 2, hidden=(8,))
        >>> aggregated_posterior(vae, torch.rand(50, 4).round()).draws.shape
        torch.Size([50, 2])
    """
    check_int("num_rows", num_rows, minimum=2)
    with terms.prepared(pair, data, options, "aggregated_posterior") as evaluation:
        structure, source = evaluation.structure, evaluation.in_memory().source
        check_int("aggregated_posterior, rows of data", source.num_rows, minimum=2)
        require_rows("aggregated_posterior", structure)
        sites = structure.latents
        if site is not None:
            sites = (terms.only_site("aggregated_posterior", "latent", sites, site),)
        chosen = torch.randperm(source.num_rows, device=source.device)[:num_rows]
        subset = evaluation.on(source.rows(chosen))
        parts = (one for _, one in terms.stream(subset))
        draws = torch.cat([_side_by_side(p.sites[n].value[0] for n in sites) for p in parts])
        runs = []
        for *_, run in simulated_draws(subset, 1, "prior"):
            runs.append(flat_values(run, sites))
        names, prior = names_of_dimensions(run, sites), torch.cat(runs)
        try:
            means = _side_by_side(means_and_noise(subset, name)[0] for name in sites)
            mean_correlation = _correlations(means)
        except UndefinedError:  # a distribution that has no mean, as of classes
            mean_correlation = None
    scale = torch.cat([draws, prior]).std(0)  # of both, so that they stay exchangeable
    scale = torch.where(scale > 0, scale, 1.0)
    ours, theirs, seed = draws / scale, prior / scale, evaluation.seed
    joint = two_sample_test(ours, theirs, "imq", num_permutations=num_permutations, seed=seed)
    columns = zip(draws.T.cpu().numpy(), prior.T.cpu().numpy(), strict=True)
    with warnings.catch_warnings():  # ties, as discrete latents have, have no exact p-value
        warnings.filterwarnings("ignore", message="ks_2samp", category=RuntimeWarning)
        found = [tuple(ks_2samp(q, p)) for q, p in columns]
    tests = torch.tensor(found, dtype=torch.float64)
    ks, ks_p = tests[:, 0], (tests[:, 1] * len(tests)).clamp(max=1)
    correlation = _correlations(draws)
    return AggregatedPosterior(draws, prior, names, joint, ks, ks_p, correlation, mean_correlation)


def _side_by_side(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([double(value).reshape(len(value), -1) for value in values], 1)


def _correlations(values: Tensor) -> Tensor:
    centred = double(values) - double(values).mean(0)
    norm = centred.square().sum(0).sqrt()
    tiny = 1e-9 * double(values).abs().amax(0).clamp(min=1e-300) * len(values) ** 0.5
    unit = centred / torch.where(norm > tiny, norm, torch.nan)
    return unit.T @ unit
