"""The scores of disentanglement together, with standard errors and what chance gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pvae.annotations import strict
from pvae.diagnostics.factors import (
    MEANINGS,
    ArrayLike,
    Score,
    as_codes_and_factors,
    dci,
    factor_vae_score,
    irs,
    mig,
    sap,
)
from pvae.diagnostics.result import Finding, Result
from pvae.diagnostics.thresholds import CHANCE, Verdict
from pvae.errors import check_int
from pvae.options import progress_bar

__all__ = ["Disentanglement", "disentanglement"]


@dataclass(frozen=True, repr=False)
class Disentanglement(Result):
    """Scores of codes against known factors.

    Attributes:
        scores: MIG, SAP, D, C, I, FactorVAE and IRS, S = 7 of them, with what they are made of.
        errors: Standard errors over rows, ``(S,)``; seeds of the guide's training aren't in them.
        chance: The scores of the same codes and factors paired at random, mean, ``(S,)``.
        chance_sd: The standard deviation of those, ``(S,)``.
        num_rows: N.
    """

    scores: tuple[Score, ...]
    errors: Tensor
    chance: Tensor
    chance_sd: Tensor
    num_rows: int

    @property
    def title(self) -> str:
        """How many rows, dimensions and factors there are."""
        dimensions, factors = self.scores[0].matrix.shape
        return f"Disentanglement: {self.num_rows} rows, {dimensions} dimensions, {factors} factors"

    def findings(self) -> list[Finding]:
        """Every score; "bad" where it is within three standard errors of chance."""
        noise = (self.errors.tolist(), self.chance.tolist(), self.chance_sd.tolist())
        return [self._finding(*line) for line in zip(self.scores, *noise, strict=True)]

    def _finding(self, score: Score, error: float, chance: float, spread: float) -> Finding:
        above = (score.value - chance) / max((error**2 + spread**2) ** 0.5, 1e-300)
        verdict: Verdict = "bad" if CHANCE.verdict(above) == "bad" else "none"
        advice = "objectives.TCVAE or FactorVAE, with several seeds" if verdict == "bad" else ""
        if advice and score.name == "I":
            advice = "diagnostics.surgery: whether codes hold anything of the data"
        meaning = f"{MEANINGS[score.name]} (by chance {chance:.2f})"
        return Finding(score.name, score.value, error, "", verdict, meaning, advice)


@strict
def disentanglement(
    codes: ArrayLike,
    factors: ArrayLike,
    *,
    bins: int = 20,
    num_trees: int = 20,
    num_replicates: int = 20,
    max_rows: int = 10_000,
    seed: int = 0,
    progress: bool = False,
) -> Disentanglement:
    """How known factors are laid out in codes, by all the scores that the field uses.

    The scores disagree, as they ask different things (see each), and all depend much on the seed of
    the training: compare pairs over several trainings. Codes are means of q(z | x) as a rule
    (`pvae.latent.codes`), of the dimensions that `active_units` finds in use.

    Standard errors are over rows, from random halves of them: with a half drawn without
    replacement, the spread of a smooth statistic is the standard error at all N rows. The usual
    bootstrap would put copies of one row on both sides of the predictors' split, and add to mutual
    information. Three permutations of the rows tell what chance gives.

    References:
        Challenging Common Assumptions in the Unsupervised Learning of Disentangled Representations
        (Locatello et al., 2019), https://arxiv.org/abs/1811.12359
        A General Theory for Jackknife Variance Estimation (Shao & Wu, 1989),
        https://doi.org/10.1214/aos/1176347263

    Arguments:
        codes: Shape ``(N, d)``, d at least 2.
        factors: As for `dci`, each class on at least 40 rows.
        bins: As for `mig`, `factor_vae_score` and `irs`.
        num_trees: As for `dci`.
        num_replicates: Halves for the standard errors.
        max_rows: Rows that are used, chosen at random.
        seed: Seed of all that is random.
        progress: Whether a bar is shown.

    Raises:
        DataError: As for `dci`.

    Example:
        >>> v = torch.cartesian_prod(torch.arange(3), torch.arange(4)).repeat(20, 1)
        >>> result = disentanglement(torch.cat([-v, torch.randn(240, 1)], 1), v, num_replicates=2)
        >>> result.scores[0].value > 0.9
        True
    """
    check_int("bins", bins, minimum=2)
    check_int("num_trees", num_trees)
    check_int("num_replicates", num_replicates, minimum=2)
    check_int("max_rows", max_rows, minimum=80)
    z, v = as_codes_and_factors("disentanglement", codes, factors, rows=40, least=2)
    random = np.random.default_rng(seed)
    if len(z) > max_rows:
        chosen = random.permutation(len(z))[:max_rows]
        z, v = as_codes_and_factors("disentanglement", z[chosen], v[chosen], rows=40, least=2)

    def scores(codes: np.ndarray, factors: np.ndarray) -> tuple[Score, ...]:
        new = int(random.integers(2**32))
        return (
            mig(codes, factors, bins=bins),
            sap(codes, factors, seed=new),
            *dci(codes, factors, num_trees=num_trees, seed=new),
            factor_vae_score(codes, factors, bins=bins, seed=new),
            irs(codes, factors, bins=bins),
        )

    own, values = scores(z, v), []
    for i in progress_bar(range(num_replicates + 3), title="disentanglement", shown=progress):
        order = random.permutation(len(z))
        half = order[: len(z) // 2]
        pairing = (z[half], v[half]) if i < num_replicates else (z[order], v)
        values.append([score.value for score in scores(*pairing)])
    halves, shuffled = torch.tensor(values, dtype=torch.float64).split([num_replicates, 3])
    return Disentanglement(own, halves.std(0), shuffled.mean(0), shuffled.std(0), len(z))
