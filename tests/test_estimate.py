"""Estimates against formulae written out, and against ArviZ's comparison of models."""

from __future__ import annotations

import json
import math
import warnings

import arviz
import numpy as np
import pytest
import torch

from pvae.errors import ArgumentError, UndefinedError
from pvae.estimate import Estimate, with_error

if int(arviz.__version__.split(".")[0]) < 1:
    import arviz.preview as az
else:
    az = arviz

STEPS = 4.5  # standard errors; two-sided, a false alarm in 1.5e5


def test_mean_and_both_errors_by_hand() -> None:
    values, variances = [-1.0, -2.0, -6.0], [0.1, 0.2, 0.6]
    found = Estimate("bound", torch.tensor(values), torch.tensor(variances), kind="lower")
    assert found.num_data == 3
    assert found.total == -9.0
    assert found.mean == -3.0
    assert found.se_data == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert found.se_total == pytest.approx(math.sqrt(0.9))
    assert found.se_draws == pytest.approx(math.sqrt(0.9) / 3)
    assert str(found) == "bound: -3.00 +- 1.5 (over draws 0.32) nats per datum, N = 3, K = 1"


def test_what_is_not_known_is_nan_and_not_said() -> None:
    one = Estimate("bound", torch.tensor([-1.0]))
    assert math.isnan(one.se_data)
    assert math.isnan(one.se_draws)
    assert str(one) == "bound: -1 nats, K = 1"
    exact = Estimate("bound", torch.tensor([-1.0, -3.0]), num_particles=None)
    assert exact.se_draws == 0.0
    assert str(exact) == "bound: -2.00 +- 1 nats per datum, N = 2, exact"


def test_totals_by_draw() -> None:
    """Two joint draws of what ten data share: no datum has a value, and none has an error."""
    found = Estimate("ELBO", torch.tensor([-20.0, -24.0]), by="draw", num_data=10)
    assert found.total == -22.0
    assert found.mean == -2.2
    assert math.isnan(found.se_data)
    assert found.se_total == pytest.approx(np.std([-20.0, -24.0], ddof=1) / math.sqrt(2))
    assert found.se_draws == pytest.approx(found.se_total / 10)
    with pytest.raises(UndefinedError, match="ELBO per datum"):
        _ = found.per_datum
    with pytest.raises(UndefinedError, match="ELBO per datum"):
        _ = found - found
    single = Estimate("ELBO", torch.tensor([-20.0]), by="draw", num_data=10)
    assert math.isnan(single.se_total)


def test_mean_and_evidence_of_weights_written_out() -> None:
    log_weights = torch.randn(50, 4)
    elbo = Estimate.of_mean("ELBO", log_weights, kind="lower")
    torch.testing.assert_close(elbo.values, log_weights.mean(0))
    torch.testing.assert_close(elbo.variances, log_weights.var(0) / 50)
    evidence = Estimate.of_evidence("evidence", log_weights)
    w = log_weights.exp()
    torch.testing.assert_close(evidence.values, w.mean(0).log())
    torch.testing.assert_close(evidence.variances, w.var(0) / w.mean(0) ** 2 / 50)
    torch.testing.assert_close(evidence.ess, w.sum(0) ** 2 / w.square().sum(0))
    assert "ESS: median" in str(evidence)
    assert "a lower bound of log p(x) on average" in str(evidence)
    alone = Estimate.of_mean("ELBO", log_weights[:1])
    assert alone.variances is None


def test_a_datum_whose_draws_have_no_weight() -> None:
    log_weights = torch.zeros(4, 2)
    log_weights[:, 1] = -math.inf
    found = Estimate.of_evidence("evidence", log_weights)
    assert found.values.tolist() == [0.0, -math.inf]
    assert found.ess is not None
    assert found.ess.tolist() == [4.0, 0.0]
    assert str(found).startswith("evidence: -infinite, K = 4")
    assert "1 of 2 data rest on a few draws" in str(found)


def test_the_error_of_a_difference_from_the_same_draws() -> None:
    """Against the scatter of 400 repeats, whose own error is 4 %: 20 % is more than 4.5 of it."""
    gaps, stated, apart = [], [], []
    for _ in range(400):
        log_weights = 0.8 * torch.randn(200, 5) - 3
        evidence = Estimate.of_evidence("evidence", log_weights)
        elbo = Estimate.of_mean("ELBO", log_weights)
        gap = evidence - elbo
        torch.testing.assert_close(
            gap.values, log_weights.exp().mean(0).log() - log_weights.mean(0)
        )
        gaps.append(gap.mean)
        stated.append(gap.se_draws)
        apart.append(math.hypot(evidence.se_draws, elbo.se_draws))
    scatter = float(np.std(gaps, ddof=1))
    assert np.mean(stated) == pytest.approx(scatter, rel=0.2)
    assert np.mean(apart) > 1.5 * scatter  # as if the draws were others


def test_differences_of_other_draws_and_of_what_is_exact() -> None:
    a = Estimate("a", torch.tensor([1.0, 2.0]), torch.tensor([0.3, 0.4]), num_particles=5)
    b = Estimate("b", torch.tensor([0.5, 3.0]), torch.tensor([0.1, 0.2]), num_particles=7)
    found = a - b
    assert found.name == "a - b"
    assert found.kind == "none"
    torch.testing.assert_close(found.values, torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(found.variances, torch.tensor([0.4, 0.6]))
    exact = Estimate("exact", torch.tensor([1.0, 1.0]), num_particles=None)
    for difference in (a - exact, exact - a):
        assert difference.num_particles == 5
        torch.testing.assert_close(difference.variances, a.variances)
    assert (a - Estimate("c", torch.zeros(2))).variances is None
    with pytest.raises(ArgumentError, match="2 and 1 data"):
        _ = a - Estimate("c", torch.zeros(1))


def full() -> Estimate:
    log_weights = torch.randn(9, 3)
    rate, distortion = (Estimate(name, torch.rand(3)) for name in ("rate", "distortion"))
    return Estimate(
        "bound",
        log_weights.mean(0),
        torch.rand(3),
        num_particles=9,
        kind="lower",
        distortion=distortion,
        rate=rate,
        ess=torch.full((3,), 9.0),
        acceptance=torch.tensor([0.5, 0.6, 0.7]),
        remarks=("left out: <nothing>",),
    )


def test_text_and_html_say_the_same() -> None:
    found = full()
    lines = str(found).splitlines()
    assert repr(found) == str(found)
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "a lower bound of log p(x) on average",
        "ESS",
        "acceptance",
        "distortion",
        "rate",
        "left out",
    ]
    page = found._repr_html_()
    assert "acceptance: mean 0.60, least 0.50" in page
    assert "&lt;nothing&gt;" in page


def test_a_dictionary_that_json_takes_and_gives_back() -> None:
    found = full()
    said = found.to_dict()
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert said["mean"] == found.mean
    assert said["num_particles"] == 9
    assert said["rate"]["mean"] == found.rate.mean  # type: ignore[index, union-attr]
    infinite = Estimate("KL", torch.tensor([math.inf]), num_particles=None, by="distribution")
    assert infinite.to_dict()["mean"] is None
    assert json.dumps(infinite.to_dict(), allow_nan=False)


def test_a_table_with_a_row_for_each_datum() -> None:
    found = full()
    table = found.to_frame()
    assert list(table.columns) == ["value", "se_draws", "ess"]
    assert table.index.name == "datum"
    assert found.variances is not None
    np.testing.assert_allclose(table["value"], found.values.numpy())
    np.testing.assert_allclose(table["se_draws"], found.variances.sqrt().numpy())
    assert list(Estimate("ELBO", torch.zeros(2), by="draw").to_frame().columns) == ["value"]


def test_arviz_ranks_estimates_of_the_evidence() -> None:
    """elpd, se, elpd_diff and dse by hand; ArviZ's variances divide by N."""
    values = {
        "a": np.array([-3.0, -1.0, -2.5, -2.0]),
        "b": np.array([-2.0, -1.5, -2.0, -1.0]),
        "c": np.array([-9.0, -9.0, -8.0, -7.0]),
    }
    elpds = {
        name: Estimate("evidence, IWAE-9", torch.tensor(v), kind="lower").to_elpd()
        for name, v in values.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ArviZ's use of pandas
        table = az.compare(elpds)
    assert list(table.index) == ["b", "a", "c"]
    assert list(table["rank"]) == [0, 1, 2]
    for name, v in values.items():
        difference = values["b"] - v
        row = table.loc[name]
        assert row["elpd"] == pytest.approx(v.sum())
        assert row["se"] == pytest.approx(math.sqrt(4 * v.var()))
        assert row["elpd_diff"] == pytest.approx(difference.sum())
        assert row["dse"] == pytest.approx(math.sqrt(4 * difference.var()))
    assert not table["warning"].any()
    assert "evidence, IWAE-9" in str(elpds["a"])
    other = Estimate("ELBO", torch.tensor(values["a"]), kind="lower").to_elpd()
    with pytest.raises(ValueError, match="incompatible"):  # bounds that are loose differently
        az.compare({"a": other, "b": elpds["b"]})


def test_weights_that_rest_on_a_few_draws_warn_in_arviz_too() -> None:
    log_weights = 8 * torch.randn(100, 3)
    assert Estimate.of_evidence("evidence", log_weights).to_elpd().warning
    assert not Estimate.of_evidence("evidence", 0.1 * log_weights).to_elpd().warning


def test_what_is_no_evidence_has_no_elpd() -> None:
    with pytest.raises(UndefinedError, match="rate, which is no bound of log p"):
        Estimate("rate", torch.zeros(2)).to_elpd()
    whole = Estimate("ELBO", torch.zeros(2), by="draw", num_data=5, kind="lower")
    with pytest.raises(UndefinedError, match="ELBO per datum"):
        whole.to_elpd()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.3141, 0.02, "0.314 +- 0.020 nats"),
        (-1e-9, 1e-7, "0.000000 +- 0.000000 nats"),
        (3.14159, None, "3.142 nats"),
        (3.14159, math.nan, "3.142 nats"),
        (1234.5, 20.0, "1234 +- 20 nats"),
        (math.inf, 1.0, "inf"),
    ],
)
def test_a_number_has_the_digits_that_its_error_leaves(
    value: float, error: float | None, text: str
) -> None:
    assert with_error(value, error, "nats") == text


def test_estimates_can_be_looked_for_in_a_list() -> None:
    """Two estimates are equal if they are one: equality of tensors has no single answer."""
    a, b = (Estimate("bound", torch.tensor([-1.0, -2.0])) for _ in range(2))
    assert [a, b].index(b) == 1
    assert a != b
