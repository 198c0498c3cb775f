"""Disentanglement: every score against a closed form, a count by hand, or a slow twin.

Statistical bounds are at five standard errors or more (false alarms below 1e-6), unless they say
otherwise.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from pvae import diagnostics, latent, recipes
from pvae.diagnostics import dci, disentanglement, factor_vae_score, irs, mig, sap
from pvae.errors import ArgumentError, DataError, PvaeError
from tests import pairs

ALL: list[Callable[..., Any]] = [mig, sap, dci, factor_vae_score, irs, disentanglement]


def grid(*sizes: int, copies: int) -> Tensor:
    """Every combination of factors, equally often, so that they're exactly independent."""
    return torch.cartesian_prod(*map(torch.arange, sizes)).repeat(copies, 1)


def perfect(v: Tensor) -> Tensor:
    """Factors in another order, of other scales, signs and origins."""
    columns = [(-1.0) ** j * 10.0**j * v[:, j] + j for j in range(v.shape[1])]
    return torch.stack(columns[1:] + columns[:1], 1)


def rotated(v: Tensor, angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return (v.double() - v.double().mean(0)) @ torch.tensor([[c, s], [-s, c]])


def information(a: list[Any], b: list[Any]) -> float:
    n, joint, first, second = len(a), Counter(zip(a, b, strict=True)), Counter(a), Counter(b)
    return sum(k / n * math.log(k * n / (first[x] * second[y])) for (x, y), k in joint.items())


def test_mig_by_hand() -> None:
    """A table of two dimensions and one factor, counted with Python's own numbers."""
    table = {(0, 0, 0): 5, (0, 1, 0): 2, (1, 0, 0): 1, (1, 1, 1): 6, (0, 0, 1): 1, (2, 1, 1): 3}
    rows = [key for key, count in table.items() for _ in range(count)]
    x, y, v = map(list, zip(*rows, strict=True))
    expected = [information(x, v), information(y, v)]
    found = mig(torch.tensor([x, y]).T.double(), v)
    assert found.matrix[:, 0].tolist() == pytest.approx(expected, rel=1e-12)
    assert found.value == pytest.approx(abs(expected[0] - expected[1]) / information(v, v))
    assert found.parts.shape == (1,)


def test_mig_of_a_known_channel() -> None:
    """A binary symmetric channel: log 2 - H(0.1) nats, exactly, with the counts exact."""
    v = torch.tensor([0, 1]).repeat_interleave(100)
    z = v.clone()
    z[:10], z[100:110] = 1, 0
    h = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    found = mig(torch.stack([z, torch.zeros(200)], 1), v)
    assert found.value == pytest.approx((math.log(2) - h) / math.log(2), rel=1e-12)


def test_a_perfect_code_scores_one() -> None:
    v = grid(2, 3, 5, copies=40)
    z = perfect(v)
    assert mig(z, v).value == pytest.approx(1, abs=1e-12)
    assert [score.value for score in dci(z, v)] == pytest.approx([1, 1, 1], abs=1e-12)
    assert factor_vae_score(z, v).value == 1
    assert irs(z, v).value == pytest.approx(1, abs=1e-12)
    alone = torch.cat([z[:, :1], torch.zeros(len(z), 1)], 1)  # S of a constant is 0 exactly
    assert sap(alone, v[:, 1]).value == 1
    assert 0.75 < sap(z, v).value <= 1 + 5 * 0.02
    u = torch.rand(2000, 2)
    assert mig(torch.stack([3 - 2 * u[:, 0], torch.ones(2000)], 1), u[:, :1]).value == (
        pytest.approx(1, abs=1e-12)
    )
    assert sap(torch.stack([3 - 2 * u[:, 0], torch.ones(2000)], 1), u[:, :1]).value == (
        pytest.approx(1, abs=1e-12)
    )
    assert all(score.value > 0.999 for score in dci(u.flip(1), u))


def test_a_random_code_scores_nothing() -> None:
    """False alarms: 1e-6 each, by the law of 2 N I and of N r^2 where there is no relation."""
    size = 4000
    z, v = torch.randn(size, 4), torch.stack([torch.randint(0, k, (size,)) for k in (2, 4)], 1)
    assert mig(z, v).value < chi2.isf(1e-6 / 8, 19 * 3) / (2 * size) / math.log(2)
    assert sap(z, torch.rand(size, 2)).value < chi2.isf(1e-6 / 8, 1) / size
    accuracy_se = 2 * (0.25 / (size / 2)) ** 0.5
    assert sap(z, v).value < 5.5 * accuracy_se
    found = dci(z, v)
    assert abs(found.informativeness.value) < 5.5 * accuracy_se
    assert found.disentanglement.value < 0.03
    assert found.completeness.value < 0.03
    assert factor_vae_score(z, v).value == pytest.approx(0.5, abs=5.5 * (0.25 / 400) ** 0.5)
    assert abs(irs(z, v).value) < 0.05


@pytest.mark.parametrize("angle", [0.0, 0.2, 0.5, math.pi / 4])
def test_rotation_takes_the_gaps(angle: float) -> None:
    """Squared correlations are cos^2 and sin^2 of the angle, so SAP is cos(2 angle)."""
    v = grid(6, 6, copies=10)
    z = rotated(v, angle)
    assert sap(z, v.double()).value == pytest.approx(math.cos(2 * angle), abs=1e-12)
    if angle == math.pi / 4:  # sums and differences: either tells as much of either factor
        whole = torch.stack([v[:, 0] + v[:, 1], v[:, 0] - v[:, 1]], 1)
        assert mig(whole, v).value == pytest.approx(0, abs=1e-12)
        found = dci(z, v)
        assert found.disentanglement.value < 0.1
        assert found.completeness.value < 0.1
        assert found.informativeness.value > 0.6
        assert irs(z, v).value == pytest.approx(0.5, abs=0.02)


def test_sap_is_accuracy_by_thresholds_above_guessing() -> None:
    """A code that is wrong on every fifth row: accuracy 0.8 of 2 classes, 0.6 above guessing."""
    v = torch.tensor([0, 1]).repeat(10_000)
    wrong = torch.rand(20_000) < 0.2
    z = torch.stack([torch.where(wrong, 1 - v, v).double(), torch.zeros(20_000)], 1)
    assert sap(z, v).value == pytest.approx(0.6, abs=5 * 2 * (0.16 / 10_000) ** 0.5)
    many = torch.arange(7).repeat(30)  # classes in the middle need two thresholds
    z = torch.stack([many**2 + 0.1, torch.zeros(210)], 1)
    assert sap(z, many).value == 1


def test_dci_is_entropy_of_importances() -> None:
    """Both averages from the importances, by hand."""
    v = torch.stack([torch.randint(0, 3, (600,)) for _ in range(3)], 1)
    z = torch.cat(
        [v[:, :2].double() @ torch.tensor([[1.0, 0.3], [0.2, 1.0]]), v[:, 2:], v[:, 2:]], 1
    )
    z = z + 0.2 * torch.randn_like(z)
    found = dci(z, v)
    r = found.disentanglement.matrix.tolist()
    assert torch.tensor(r).sum(0).tolist() == pytest.approx([1.0] * 3)

    def one_less_entropy(weights: list[float]) -> float:
        total = sum(weights)
        shares = [w / total for w in weights if w > 0]
        return 1 + sum(p * math.log(p) for p in shares) / math.log(len(weights))

    share = [sum(row) / 3 for row in r]
    expected = sum(s * one_less_entropy(row) for s, row in zip(share, r, strict=True))
    assert found.disentanglement.value == pytest.approx(expected)
    columns = [list(column) for column in zip(*r, strict=True)]
    assert found.completeness.value == pytest.approx(sum(map(one_less_entropy, columns)) / 3)


def test_dci_of_codes_that_lack_one_virtue() -> None:
    v = grid(2, 2, copies=100)
    both_in_one = torch.stack([2.0 * v[:, 0] + v[:, 1], torch.zeros(400)], 1)
    found = dci(both_in_one, v)
    assert found.disentanglement.value == pytest.approx(0, abs=1e-12)
    assert found.completeness.value == found.informativeness.value == 1
    twice = torch.cat([v, v], 1).double()
    found = dci(twice, v)
    assert found.disentanglement.value == found.informativeness.value == 1
    assert found.completeness.value < 0.8
    assert mig(twice, v).value == 0


def test_informativeness_is_the_variance_explained() -> None:
    """Signal and noise of equal variance: half at best, and a forest comes near."""
    v = torch.randn(4000, 2)
    noisy = v + torch.randn(4000, 2)
    for part in dci(noisy, v).informativeness.parts.tolist():
        assert 0.35 < part < 0.5 + 5 * 0.02


def slow_factor_vae(z: np.ndarray, v: np.ndarray, votes: int, batch: int) -> float:
    """The score as the paper tells it, a vote at a time."""
    generator = np.random.default_rng(5)
    counts: list[Counter[tuple[int, int]]] = [Counter(), Counter()]
    for part in counts:
        for _ in range(votes):
            j = int(generator.integers(v.shape[1]))
            rows = np.flatnonzero(v[:, j] == v[generator.integers(len(v)), j])
            some = z[generator.choice(rows, batch)]
            part[int((some.var(0) / z.var(0)).argmin()), j] += 1
    factors = range(v.shape[1])
    given = {d: max(factors, key=lambda j: counts[0][d, j]) for d in range(z.shape[1])}
    return sum(k for (d, j), k in counts[1].items() if given[d] == j) / votes


def test_factor_vae_score_against_a_slow_twin() -> None:
    v = torch.stack([torch.randint(0, k, (3000,)) for k in (3, 4)], 1)
    z = v.double() @ torch.tensor([[1.0, 0.5, 0.0], [0.7, 1.0, 0.0]])
    z = z + torch.tensor([0.6, 0.6, 3.0]) * torch.randn(3000, 3)
    expected = slow_factor_vae(z.numpy(), v.numpy(), 2000, 16)
    found = factor_vae_score(z, v, num_votes=2000, batch_size=16)
    assert 0.55 < expected < 0.95  # far from both ends, so that the comparison can fail
    assert found.value == pytest.approx(expected, abs=5 * (2 * 0.25 / 2000) ** 0.5)
    assert found.matrix.sum(0).tolist() == [1000, 1000]


def test_a_constant_dimension_never_votes() -> None:
    v = grid(3, 4, copies=20)
    z = torch.cat([torch.full((240, 1), 0.1), v], 1)
    found = factor_vae_score(z, v)
    assert found.value == 1
    assert found.matrix[0].tolist() == [0, 0]
    assert irs(z, v).value == pytest.approx(1)


@pytest.mark.parametrize("quantile", [0.9, 1.0])
def test_irs_by_hand(quantile: float) -> None:
    v = np.random.default_rng(0).integers(0, 3, (200, 2))
    z = v @ np.array([[1.0, 0.2], [0.3, 2.0]]) + np.random.default_rng(1).normal(size=(200, 2))
    total, weight = 0.0, 0.0
    for column in z.T:
        widest = np.quantile(abs(column - column.mean()), quantile)
        best = -math.inf
        for factor in v.T:
            deviations = []
            for value in factor:  # the mean over rows is that over values, by how often they are
                some = column[factor == value]
                deviations.append(np.quantile(abs(some - some.mean()), quantile))
            best = max(best, 1 - float(np.mean(deviations)) / widest)
        total, weight = total + widest * best, weight + widest
    assert irs(z, v, quantile=quantile).value == pytest.approx(total / weight)


def test_irs_of_a_continuous_factor_is_less_by_the_width_of_a_bin() -> None:
    u = torch.cartesian_prod(*[(torch.arange(200) + 0.5) / 200] * 2)
    for bins in (10, 20):
        assert irs(u, u, bins=bins).value == pytest.approx(1 - 1 / bins, abs=5e-3)


def test_the_table_catches_what_is_mixed() -> None:
    v = grid(4, 4, copies=40)
    arguments: dict[str, Any] = {"num_replicates": 6, "num_trees": 5}
    good = disentanglement(perfect(v), v, **arguments)
    assert [line.verdict for line in good.findings()] == ["none"] * 7
    assert "640 rows, 2 dimensions, 2 factors" in str(good)
    assert repr(good) == str(good)
    nothing = disentanglement(torch.randn(640, 2), v, **arguments)
    assert all(line.verdict == "bad" and line.advice for line in nothing.findings())
    assert float(nothing.chance[5]) == pytest.approx(0.5, abs=0.15)
    mixed = disentanglement(rotated(v, math.pi / 4), v, **arguments)
    verdicts = {line.name: line.verdict for line in mixed.findings()}
    assert (verdicts["MIG"], verdicts["SAP"], verdicts["I"]) == ("bad", "bad", "none")


def test_standard_errors_are_those_of_fresh_data() -> None:
    """Halves of one data set against the spread over 200 others, within a factor of 1.8.

    With 60 halves the estimate's own spread is about a tenth.
    """

    def draw() -> tuple[Tensor, Tensor]:
        v = torch.randn(400, 2)
        return v + 0.5 * torch.randn(400, 2), v

    fresh = [draw() for _ in range(200)]
    found = disentanglement(*draw(), num_trees=1, num_replicates=60)
    for index, score in ((0, mig), (1, sap)):
        spread = float(torch.tensor([score(z, v).value for z, v in fresh]).std())
        assert 1 / 1.8 < float(found.errors[index]) / spread < 1.8


def test_rows_are_bounded_and_seeds_repeat() -> None:
    v = grid(3, 3, copies=100)
    z = perfect(v) + 0.5 * torch.randn(900, 2)
    arguments: dict[str, Any] = {"num_trees": 2, "num_replicates": 2, "max_rows": 400}
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    first, again = (disentanglement(z, v, seed=3, **arguments) for _ in range(2))
    assert first.num_rows == 400
    assert str(first) == str(again)
    assert str(first) != str(disentanglement(z, v, seed=4, **arguments))
    assert bool((states[0] == torch.get_rng_state()).all())
    assert str(states[1]) == str(np.random.get_state())  # noqa: NPY002
    assert states[2] == random.getstate()


def test_arrays_lists_and_integer_codes() -> None:
    v = grid(3, 3, copies=10)
    z = perfect(v).float().requires_grad_()
    expected = mig(z, v).value
    assert mig(z.detach().numpy(), v.numpy().astype(np.uint8)).value == expected
    assert mig(v.tolist(), (v + 1).tolist()).value == expected
    assert mig(z, v[:, 0] > 0).parts.shape == (1,)
    assert str(mig(z, v)).endswith("between the two best dimensions; from 1.00, 1.00")


@pytest.mark.parametrize("score", ALL)
def test_what_is_refused(score: Callable[..., Any]) -> None:
    v = grid(3, 3, copies=40)
    z = perfect(v)
    for codes, factors, message in (
        (z[:, :1], v, "at least two dimensions"),
        (z[:-1], v, "359 rows"),
        (z.flatten(), v, "shape"),
        (torch.zeros_like(z), v, "that varies"),
        (z.clone().index_fill_(0, torch.tensor([7]), math.nan), v, "7"),
        (z, v.double().index_fill_(0, torch.tensor([7]), math.inf), "7"),
        (z, v * torch.tensor([1, 0]), "the value 0 alone"),
        (z[:3], v[:3], "rows"),
    ):
        with pytest.raises(DataError, match=message):
            score(codes, factors)
    if score in (sap, dci, factor_vae_score, disentanglement):
        with pytest.raises(DataError, match="rows of each value"):
            score(z, torch.stack([torch.arange(360), v[:, 0]], 1))
    if score in (dci, factor_vae_score, disentanglement):
        with pytest.raises(DataError, match="at least 2 factors"):
            score(z, v[:, :1])


def test_arguments_that_are_refused() -> None:
    v = grid(3, 3, copies=40)
    z = perfect(v)
    for call in (
        lambda: mig(z, v, bins=1),
        lambda: irs(z, v, bins=1),
        lambda: irs(z, v, quantile=0.0),
        lambda: irs(z, v, quantile=1.1),
        lambda: dci(z, v, num_trees=0),
        lambda: factor_vae_score(z, v, num_votes=1),
        lambda: factor_vae_score(z, v, batch_size=1),
        lambda: disentanglement(z, v, num_replicates=1),
        lambda: disentanglement(z, v, max_rows=10),
    ):
        with pytest.raises(ArgumentError):
            call()
    with pytest.raises(DataError, match="one row in each"):
        factor_vae_score(torch.rand(10, 2), torch.rand(10, 2))


def test_codes_of_pairs(device: torch.device) -> None:
    """Codes come from any pair that has them; they may be on any device."""
    v = grid(2, 2, copies=50).to(device)
    x = torch.cat([v, 1 - v], 1).double()
    vae = recipes.ae(4, 2, hidden=()).to(device)
    with torch.no_grad():
        for parameter in vae.guide.parameters():
            parameter.copy_(torch.eye(2, 4) if parameter.dim() == 2 else torch.zeros(2))
    codes = latent.codes(vae, x)
    assert mig(codes, v).value == pytest.approx(1)
    assert factor_vae_score(codes, v).value == 1


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("make", [pairs.labels, pairs.two_sites])
def test_kinds_of_pairs(make: Callable[..., Any], device: torch.device) -> None:
    model, guide, batch = make(device)
    v = torch.arange(len(batch[0])) % 2
    if make is pairs.two_sites:
        with pytest.raises(PvaeError, match="site="):
            latent.codes((model, guide), batch)
        return
    codes = latent.codes((model, guide), batch)
    assert 0 <= mig(codes, v).value <= 1


def test_names() -> None:
    for score in ALL:
        assert score.__name__ in diagnostics.__all__
