"""How known factors of variation are laid out in codes: scores of disentanglement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.stats import entropy
from torch import Tensor

from pvae.annotations import strict
from pvae.data.arrays import as_array
from pvae.devices import double
from pvae.diagnostics.result import Finding, Result
from pvae.errors import DataError, check_int, check_number
from pvae.latent.coding import as_matrix

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

__all__ = [
    "DCI",
    "MEANINGS",
    "ArrayLike",
    "Score",
    "as_codes_and_factors",
    "dci",
    "factor_vae_score",
    "irs",
    "mig",
    "sap",
]


ArrayLike = Tensor | np.ndarray | Sequence[float] | Sequence[Sequence[float]]
"""What codes and factors may be: shape ``(N, d)``, or ``(N,)`` for one factor."""


@dataclass(frozen=True, repr=False)
class Score(Result):
    """A score of codes against factors, in double precision, on the CPU.

    Attributes:
        name: Name of the score.
        value: The score.
        parts: What it is the mean of, one for each factor or each dimension; see the function.
        matrix: The relation of each of d dimensions with each of f factors, ``(d, f)``.
    """

    name: str
    value: float
    parts: Tensor
    matrix: Tensor

    def findings(self) -> list[Finding]:
        """The score, and what it is made of."""
        parts = ", ".join(f"{part:.2f}" for part in self.parts)
        return [Finding(self.name, self.value, meaning=f"{MEANINGS[self.name]}; from {parts}")]


MEANINGS = {
    "MIG": "gap of mutual information between the two best dimensions",
    "SAP": "gap of predictability between the two best dimensions",
    "D": "each dimension is about one factor",
    "C": "each factor is in one dimension",
    "I": "factors can be predicted from all dimensions",
    "FactorVAE": "the stillest dimension tells the factor held still",
    "IRS": "dimensions are still while their factor is",
}


class DCI(NamedTuple):
    """The three scores of `dci`; the matrix of each is that of importances."""

    disentanglement: Score
    completeness: Score
    informativeness: Score


@strict
def mig(codes: ArrayLike, factors: ArrayLike, *, bins: int = 20) -> Score:
    r"""The mutual information gap: how far one dimension alone is about a factor.

    .. math:: \frac{1}{f} \sum_j \frac{I(z_{(1)}; v_j) - I(z_{(2)}; v_j)}{H(v_j)}

    with the two dimensions that have the most mutual information with :math:`v_j`, of counts in
    bins of equal width. It is 1 if each factor fills one dimension. A factor that is spread over
    two dimensions, as by a rotation of the codes by 45 degrees, or that two dimensions repeat,
    counts 0. Two factors in one dimension aren't punished as such.

    Counts overstate mutual information by about (bins - 1) (values - 1) / (2 N) nats, most of which
    falls out of the gap. Codes that are a crooked function of a continuous factor, or have
    outliers, come out lower. Compare only with the same bins and N.

    References:
        Isolating Sources of Disentanglement in Variational Autoencoders (Chen et al., 2018),
        https://arxiv.org/abs/1802.04942

    Arguments:
        codes: Shape ``(N, d)``, d at least 2.
        factors: Shape ``(N, f)``: integers for classes, other numbers for what is continuous.
        bins: For codes and continuous factors. What has no more values than that is kept.

    Returns:
        The gaps by factor, ``(f,)``, and the mutual information in nats, ``(d, f)``.

    Raises:
        DataError: If codes or factors aren't finite matrices of N rows, or a factor is constant.

    Example:
        >>> v = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        >>> mig(v.double(), v)
          MIG                  1                      gap of ... dimensions; from 1.00, 1.00
    """
    from sklearn.metrics import mutual_info_score

    z, v = as_codes_and_factors("mig", codes, factors)
    check_int("bins", bins, minimum=2)
    z_bins = [_levels(column, bins) for column in z.T]
    v_bins = [_levels(column, bins) for column in v.T]
    information = np.array([[mutual_info_score(a, b) for b in v_bins] for a in z_bins])
    entropies = np.array([entropy(np.bincount(b)) for b in v_bins])
    return _score("MIG", _gaps(information) / entropies, information)


@strict
def sap(codes: ArrayLike, factors: ArrayLike, *, seed: int = 0) -> Score:
    r"""The separated attribute predictability: how much better one dimension predicts a factor.

    .. math:: \frac{1}{f} \sum_j S_{(1) j} - S_{(2) j}

    with the two dimensions that predict :math:`v_j` best, each alone. S is, for a continuous
    factor, the squared correlation, and for one of K classes the accuracy of K - 1 thresholds,
    on rows that they weren't chosen on, averaged over classes and rescaled so that guessing has 0:
    (accuracy - 1/K) / (1 - 1/K). Without that, which the paper hasn't, a perfect code of a binary
    factor would score 0.5.

    As `mig`, it falls where codes are rotated or a factor is repeated. A continuous factor has to
    be a linear function of the dimension for 1.

    References:
        Variational Inference of Disentangled Latent Concepts from Unlabeled Observations (Kumar et
        al., 2018), https://arxiv.org/abs/1711.00848

    Arguments:
        codes: Shape ``(N, d)``, d at least 2.
        factors: As for `mig`, each class on at least 4 rows.
        seed: Seed of the split of rows in two halves.

    Returns:
        The gaps by factor, ``(f,)``, and S, ``(d, f)``.

    Raises:
        DataError: As for `mig`, or if there are too few rows of a class.

    Example:
        >>> v = torch.arange(4).repeat(10)[:, None]
        >>> sap(torch.cat([-3.0 * v, torch.randn(40, 1)], 1), v).matrix[0]
        tensor([1.], dtype=torch.float64)
    """
    from sklearn.tree import DecisionTreeClassifier

    z, v = as_codes_and_factors("sap", codes, factors, rows=4)
    skill = np.empty((z.shape[1], v.shape[1]))
    for j, factor in enumerate(v.T):
        if _is_discrete(factor):
            leaves = len(np.unique(factor))
            tree = DecisionTreeClassifier(
                max_leaf_nodes=leaves, class_weight="balanced", random_state=0
            )
            skill[:, j] = [_skill(tree, column[:, None], factor, seed) for column in z.T]
        else:
            skill[:, j] = _squared_correlations(z, factor)
    return _score("SAP", _gaps(skill), skill)


@strict
def dci(codes: ArrayLike, factors: ArrayLike, *, num_trees: int = 20, seed: int = 0) -> DCI:
    r"""Disentanglement, completeness and informativeness, by what predicts the factors.

    A random forest predicts each factor from all dimensions; R are its importances (decrease of
    impurity), which sum to 1 for each factor. With P the rows or columns of R, normalised:

    .. math::
        \text{D} = \sum_d \rho_d \, (1 - H_f(P_{d \cdot})), \qquad
        \text{C} = \frac{1}{f} \sum_j (1 - H_d(P_{\cdot j}))

    with entropies to base f and d, and :math:`\rho_d` the share of dimension d in all importance.
    D is 1 if no dimension is about two factors, C if no factor is in two dimensions. I is how well
    factors are predicted on the other half of the rows, on average: R² for continuous factors, the
    rescaled accuracy of `sap` for classes. The paper's is an error; here 1 is best, and guessing
    has 0, or less. D and C say little where I is low.

    Compare only numbers of one predictor: others use boosted trees or the lasso. All dimensions
    are offered to each split, so that none is credited only because the better one wasn't on
    offer; leaves have at least 5 rows, as importances of noise grow with depth. Decreases of
    impurity favour dimensions with many values.

    References:
        A Framework for the Quantitative Evaluation of Disentangled Representations (Eastwood &
        Williams, 2018), https://openreview.net/forum?id=By-7dz-AZ

    Arguments:
        codes: Shape ``(N, d)``, d at least 2.
        factors: As for `sap`, f at least 2.
        num_trees: Number of trees of each forest.
        seed: Seed of forests and the split of rows in two halves.

    Returns:
        D, from dimensions ``(d,)``; C and I, from factors ``(f,)``; the matrix is R, ``(d, f)``.

    Raises:
        DataError: As for `sap`, or if there is one factor alone.
    """
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    z, v = as_codes_and_factors("dci", codes, factors, rows=4, least=2)
    check_int("num_trees", num_trees)
    importance = np.empty((z.shape[1], v.shape[1]))
    skill = np.empty(v.shape[1])
    for j, factor in enumerate(v.T):
        kind = RandomForestClassifier if _is_discrete(factor) else RandomForestRegressor
        forest = kind(num_trees, max_features=None, min_samples_leaf=5, random_state=seed % 2**32)
        skill[j] = _skill(forest, z, factor, seed)
        importance[:, j] = forest.feature_importances_
    share = importance.sum(1) / max(importance.sum(), 1e-300)
    by_dimension, by_factor = _concentration(importance), _concentration(importance.T)
    return DCI(
        _score("D", by_dimension, importance, share @ by_dimension),
        _score("C", by_factor, importance),
        _score("I", skill, importance),
    )


@strict
def factor_vae_score(
    codes: ArrayLike,
    factors: ArrayLike,
    *,
    bins: int = 20,
    num_votes: int = 400,
    batch_size: int = 64,
    seed: int = 0,
) -> Score:
    r"""Whether the dimension that is still tells which factor was held still.

    A vote: a factor j is fixed at the value that a random row has, a batch is drawn among the rows
    with that value, and the dimension whose variance, divided by that over all rows, is least votes
    for j. Each dimension is then given the factor that most of its votes are for, and the score is
    the share of further votes that this gets right.

    By guessing it is 1 / f, not 0. It is 1 also where a factor is repeated, or where dimensions
    that never win hold anything. The rows stand in for a simulator, so factors should be
    independent in them: one that goes with another can't be held alone.

    References:
        Disentangling by Factorising (Kim & Mnih, 2018), https://arxiv.org/abs/1802.05983

    Arguments:
        codes: Shape ``(N, d)``, d at least 2. A dimension that is constant doesn't vote.
        factors: As for `sap`, f at least 2.
        bins: Number of bins of equal width, for continuous factors. Those with one row are never
            fixed.
        num_votes: For each factor, half of them to give dimensions their factors.
        batch_size: Rows of a batch, drawn with replacement.
        seed: Seed of votes.

    Returns:
        The accuracies by factor, ``(f,)``, and the further votes, as counts, ``(d, f)``.

    Raises:
        DataError: As for `dci`.
    """
    z, v = as_codes_and_factors("factor_vae_score", codes, factors, rows=4, least=2)
    for name, value in (("bins", bins), ("num_votes", num_votes), ("batch_size", batch_size)):
        check_int(name, value, minimum=2)
    random = np.random.default_rng(seed)
    spread = z.std(0)
    moves = spread > 1e-9 * np.abs(z).max(0)
    scaled = z[:, moves] / spread[moves]
    half = num_votes // 2
    votes = np.zeros((2, z.shape[1], v.shape[1]))
    for j, factor in enumerate(v.T):
        levels = _levels(factor, bins)
        order, sizes = np.argsort(levels, kind="stable"), np.bincount(levels)
        where, fixes = f"factor_vae_score, factor {j}", ["more rows", "fewer bins"]
        _require(sizes.max() > 1, where, "a value, or bin, with two rows", "one row in each", fixes)
        starts = np.cumsum(sizes) - sizes
        fixed = levels[random.choice(np.flatnonzero(sizes[levels] > 1), 2 * half)]
        place = random.random((2 * half, batch_size)) * sizes[fixed, None]
        batches = order[starts[fixed, None] + place.astype(int)]
        winners = np.array([scaled[rows].var(0).argmin() for rows in batches])
        winners = np.flatnonzero(moves)[winners].reshape(2, half)
        votes[:, :, j] = [np.bincount(some, minlength=z.shape[1]) for some in winners]
    given = votes[0].argmax(1)
    right = np.array([votes[1][given == j, j].sum() for j in range(v.shape[1])])
    return _score("FactorVAE", right / half, votes[1])


@strict
def irs(codes: ArrayLike, factors: ArrayLike, *, bins: int = 20, quantile: float = 0.99) -> Score:
    r"""The interventional robustness score: how still a dimension is while its factor is.

    .. math::
        \sum_d w_d \max_j \left( 1 - \frac{E_{v_j} Q(|z_d - E[z_d | v_j]| \mid v_j)}
        {Q(|z_d - E[z_d]|)} \right)

    Q is a high quantile, and :math:`w_d` the share of dimension d in the denominators. It is 1 if
    each dimension is a function of one factor. A factor in several dimensions isn't punished, nor
    one in none: a code of one factor alone, repeated, has 1. A factor that sets only the spread
    counts, too. Where few rows have each value, their deviations come out too small, and the score
    too great: random codes then score above 0. The paper takes the maximum for Q, and others divide
    a quantile by the maximum, which gives codes with tails a score for nothing; here it is one
    quantile in both places.

    References:
        Robustly Disentangled Causal Mechanisms (Suter et al., 2019),
        https://arxiv.org/abs/1811.00007

    Arguments:
        codes: Shape ``(N, d)``, d at least 2. A dimension that is constant has no weight.
        factors: As for `mig`.
        bins: Number of bins of equal width, for continuous factors. Codes vary within them, so
            that the score of a perfect code is about 1 - 1 / bins.
        quantile: Quantile of Q, above 0 and at most 1; 1 is the maximum.

    Returns:
        The scores by dimension, ``(d,)``, and all of them, ``(d, f)``.

    Raises:
        DataError: As for `mig`.
    """
    z, v = as_codes_and_factors("irs", codes, factors)
    check_int("bins", bins, minimum=2)
    check_number("quantile", quantile, above=0, maximum=1)
    total = np.quantile(np.abs(z - z.mean(0)), quantile, axis=0)
    moves = total > 1e-9 * np.abs(z).max(0)
    within = np.zeros((z.shape[1], v.shape[1]))
    for j, factor in enumerate(v.T):
        levels = _levels(factor, bins)
        for level in np.unique(levels):
            some = z[levels == level]
            deviation = np.quantile(np.abs(some - some.mean(0)), quantile, axis=0)
            within[:, j] += deviation * len(some) / len(z)
    robust = np.where(moves[:, None], 1 - within / np.where(moves, total, 1.0)[:, None], 0.0)
    best = robust.max(1)
    return _score("IRS", best, robust, np.average(best, weights=np.where(moves, total, 0.0)))


def as_codes_and_factors(
    where: str, codes: ArrayLike, factors: ArrayLike, *, rows: int = 1, least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Both as matrices on the CPU, or a `DataError`.

    Arguments:
        where: Who asks.
        codes: Shape ``(N, d)``.
        factors: Shape ``(N, f)``, or ``(N,)`` for one.
        rows: How many rows each value of a discrete factor has to have.
        least: How many factors there have to be.
    """
    z = as_matrix(f"{where}, codes", double(_tensor(f"{where}, codes", codes))).cpu().numpy()
    given = _tensor(f"{where}, factors", factors).detach()
    given = given[:, None] if given.dim() == 1 else given
    as_matrix(f"{where}, factors", double(given))
    v = double(given).cpu().numpy() if given.is_floating_point() else given.cpu().numpy()
    v = v.astype(np.int64) if _is_discrete(v) else v
    size, dims = z.shape
    fewest, of_codes, of_factors = max(4, 2 * rows), f"{where}, codes", f"{where}, factors"
    _require(len(v) == size, of_factors, f"{size} rows, as the codes have", len(v))
    _require(size >= fewest, where, f"at least {fewest} rows", size)
    _require(dims > 1, of_codes, "at least two dimensions", dims)
    _require(np.ptp(z, axis=0).any(), of_codes, "a dimension that varies", "constants alone")
    _require(v.shape[1] >= least, of_factors, f"at least {least} factors", v.shape[1])
    fixes = ["factors.double(), if it is continuous", "leave rare values out, or merge them"]
    for j, factor in enumerate(v.T):
        of_factor = f"{where}, factor {j}"
        values, counts = np.unique(factor, return_counts=True)
        _require(len(values) > 1, of_factor, "one that varies", f"the value {values[0]} alone")
        rarest = f"{counts.min()} of {values[counts.argmin()]}"
        is_enough = not _is_discrete(factor) or counts.min() >= rows
        _require(is_enough, of_factor, f"at least {rows} rows of each value", rarest, fixes)
    return z, v


def _tensor(where: str, array: ArrayLike) -> Tensor:
    return torch.as_tensor(as_array(where, array))


def _score(name: str, parts: np.ndarray, matrix: np.ndarray, value: float | None = None) -> Score:
    value = parts.mean() if value is None else value
    return Score(name, float(value), torch.from_numpy(parts), torch.from_numpy(matrix))


def _is_discrete(factor: np.ndarray) -> bool:
    return not np.issubdtype(factor.dtype, np.floating)


def _levels(column: np.ndarray, bins: int) -> np.ndarray:
    """Values as 0, 1, ...: those of a class as they are, too many others in bins of equal width."""
    values, index = np.unique(column, return_inverse=True)
    if _is_discrete(column) or len(values) <= bins:
        return np.asarray(index)
    inner = np.linspace(column.min(), column.max(), bins + 1)[1:-1]
    return np.asarray(np.unique(np.digitize(column, inner), return_inverse=True)[1])


def _gaps(matrix: np.ndarray) -> np.ndarray:
    """The greatest of each column less the second."""
    second, first = np.sort(matrix, 0)[-2:]
    return np.asarray(first - second)


def _require(
    is_met: object, where: str, expected: str, actual: object, fixes: Sequence[str] = ()
) -> None:
    if not is_met:
        raise DataError(where, expected, str(actual), fixes)


def _skill(predictor: BaseEstimator, z: np.ndarray, factor: np.ndarray, seed: int) -> float:
    """How well it predicts rows that it wasn't fitted to: 0 for guessing, 1 if all are right.

    The rows are in two halves that have all values alike: every second of the sorted rows.
    """
    ties = np.random.default_rng(seed).permutation(len(factor))
    order = np.lexsort((ties, factor))
    train, test = order[::2], order[1::2]
    predicted = predictor.fit(z[train], factor[train]).predict(z[test])
    truth = factor[test]
    if not _is_discrete(factor):
        return float(1 - np.mean((predicted - truth) ** 2) / truth.var())
    recalls = [np.mean(predicted[truth == value] == value) for value in np.unique(truth)]
    chance = 1 / len(recalls)
    return float((np.mean(recalls) - chance) / (1 - chance))


def _squared_correlations(z: np.ndarray, factor: np.ndarray) -> np.ndarray:
    centred, target = z - z.mean(0), factor - factor.mean()
    norms = np.sqrt((centred**2).sum(0) * (target**2).sum())
    moves = norms > 1e-9 * np.abs(z).max(0) * np.sqrt(len(z) * (target**2).sum())
    return np.where(moves, target @ centred / np.where(moves, norms, 1.0), 0.0) ** 2


def _concentration(rows: np.ndarray) -> np.ndarray:
    """One less the entropy of each row, normalised; 0 for a row of zeros."""
    total = rows.sum(1, keepdims=True)
    shares = np.where(total > 0, rows / np.where(total > 0, total, 1.0), 1 / rows.shape[1])
    return np.asarray(1 - entropy(shares, axis=1, base=rows.shape[1]))
