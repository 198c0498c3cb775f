"""The screen: what is wrong is said, what isn't defined is said, and nothing else is blamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae import diagnostics, recipes
from pvae.data import LinearGaussian
from pvae.errors import ArgumentError
from tests import linear, pairs

pytestmark = pytest.mark.usefixtures("store")
QUICK = [name for name in diagnostics.DEFAULT if name != "aggregated"]


def toy_data(n: int = 300) -> tuple[LinearGaussian, Tensor]:
    toy = LinearGaussian.random(5, 2)
    return toy, toy.sample(n)


def verdicts(found: diagnostics.Diagnosis) -> dict[str, str]:
    return {line.name: line.verdict for line in found.findings()}


def test_an_exact_guide_is_not_blamed(device: torch.device) -> None:
    """Every verdict is good."""
    toy, x = toy_data()
    model, guide = linear.pair(toy, linear.exact)
    found = pvae.diagnose((model, guide), x.to(device))
    assert not found.undefined
    assert set(verdicts(found).values()) == {"good", "none"}
    assert found.advice.startswith("nothing stands out")
    assert found.results["elbo"].result.mean == pytest.approx(
        float(toy.log_evidence(x).mean()), abs=1e-9
    )
    assert str(found).splitlines()[0] == "Diagnosis, N = 300"
    again = pvae.diagnose((model, guide), x.to(device))
    assert str(again) == str(found)


@pytest.mark.parametrize(
    ("make", "blamed"),
    [
        (linear.scaled(0.5), {"k-hat above 0.7", "SBC p-value"}),
        (linear.shifted(2.0), {"SBC p-value"}),
        (linear.ignorant, {"information", "collapsed units"}),
    ],
    ids=["narrow", "shifted", "collapsed"],
)
def test_a_bad_guide_is_blamed_for_what_it_is(
    make: Any, blamed: set[str], device: torch.device
) -> None:
    toy, x = toy_data()
    found = pvae.diagnose(linear.pair(toy, make), x.to(device), checks=QUICK)
    bad = {name for name, verdict in verdicts(found).items() if verdict == "bad"}
    assert blamed <= bad
    lines = str(found).splitlines()
    assert all(any(line.startswith(f"! {name}") for line in lines) for name in blamed)
    assert not found.advice.startswith("nothing")


def test_what_is_not_defined_is_said(device: torch.device) -> None:
    autoencoder = recipes.ae(6, 2, hidden=(4,)).to(device)
    found = pvae.diagnose(autoencoder, torch.rand(40, 6, device=device))
    assert "a point mass" in found.undefined["importance"]
    assert found.results["elbo"].findings()[0].name == "log joint"
    assert "-- not defined for this pair" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", pairs.PAIRS, ids=str)
def test_any_pair_has_a_screen(kind: str, device: torch.device) -> None:
    """Each check has a result or a reason, numbers are finite, and nothing is left changed."""
    model, guide, batch = pairs.PAIRS[kind](device, n=40)
    before = torch.get_rng_state()
    found = pvae.diagnose((model, guide), batch, num_particles=30)
    assert torch.equal(torch.get_rng_state(), before)
    assert {*found.results, *found.undefined} == set(diagnostics.DEFAULT)
    assert "elbo" in found.results
    assert all(found.undefined.values())
    for line in found.findings():
        assert line.value == line.value, line.name
    json.dumps(found.to_dict())


def test_rows_and_refusals(device: torch.device) -> None:
    toy, x = toy_data(100)
    model, guide = linear.pair(toy, linear.exact)
    found = pvae.diagnose((model, guide), x.to(device), checks=["elbo"], num_data=30)
    assert found.num_data == 30
    assert list(found.seconds) == ["elbo"]
    with pytest.raises(ArgumentError, match=r"checks: expected some of 'elbo', .*; got 'evidence'"):
        pvae.diagnose((model, guide), x, checks=["evidence"])
    with pytest.raises(ArgumentError, match="num_particles"):
        pvae.diagnose((model, guide), x, num_particles=10)


def test_from_a_fit(device: torch.device) -> None:
    """Of the validation data, where there are any."""
    vae = recipes.vae(6, 2, hidden=(4,)).to(device)
    x = torch.rand(60, 6, device=device).round()
    fit = pvae.fit(vae, x[:40], valid=x[40:], epochs=1, progress=False)
    assert fit.diagnose(checks=["elbo"]).num_data == 20
    assert fit.diagnose(x, checks=["elbo"]).num_data == 60


def test_training_on_comes_before_what_it_may_repair(device: torch.device) -> None:
    toy, x = toy_data()
    pair = linear.pair(toy, linear.scaled(0.5))
    rising = [{"elbo": float(e)} for e in range(30)]
    found = pvae.diagnose(pair, x.to(device), checks=["importance"], history=rising)
    assert verdicts(found)["k-hat above 0.7"] == "bad"
    assert found.advice == ".refine(epochs) (learning curve)"
    flat = [{"elbo": float(e % 2)} for e in range(30)]
    found = pvae.diagnose(pair, x.to(device), checks=["importance"], history=flat)
    assert found.advice.endswith("(k-hat above 0.7)")


def test_rows_are_the_datas_own_where_some_are_looked_at(device: torch.device) -> None:
    """60 of 300 are looked at; what is said of them is said by their rows in the 300."""
    toy, x = toy_data()
    model, guide = linear.pair(toy, linear.scaled(0.7))
    first = pvae.diagnose((model, guide), x.to(device), checks=["importance"], num_data=60)
    assert first.rows is not None
    assert len(first.rows) == len(first.rows.unique()) == 60
    assert int(first.rows.max()) > 60
    same = diagnostics.importance((model, guide), x[first.rows.cpu()].to(device), num_particles=200)
    found = first.results["importance"]
    torch.testing.assert_close(found.khat, same.khat, equal_nan=True)
    torch.testing.assert_close(found.worst(), first.rows[same.worst()])
    assert str(int(found.worst()[0])) in str(found).splitlines()[-1]
    assert first.to_dict()["rows"] == first.rows.tolist()
    assert pvae.diagnose((model, guide), x.to(device), checks=["importance"]).rows is None


def test_collapse_comes_first_and_a_failing_check_costs_no_other(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(subject: Any) -> Any:
        raise ArgumentError("x", "y", "z")

    monkeypatch.setitem(diagnostics.CHECKS, "sbc", ("the posterior", fails))
    toy, x = toy_data()
    pair = linear.pair(toy, linear.ignorant)
    found = pvae.diagnose(pair, x.to(device), checks=["importance", "sbc", "surgery"])
    assert verdicts(found)["k-hat above 0.7"] != "good"
    assert found.advice.endswith("(information)")
    assert found.undefined == {"sbc": "x: expected y; got z."}


def test_a_check_that_was_made_is_not_advised() -> None:
    bad = diagnostics.Finding(
        "k-hat above 0.7", 0.5, verdict="bad", advice="diagnostics.gap, first"
    )
    gap = diagnostics.Finding("amortisation gap", 2.0, verdict="bad", advice="a larger encoder")

    class Found:
        def __init__(self, line: diagnostics.Finding) -> None:
            self.line = line

        def findings(self) -> list[diagnostics.Finding]:
            return [self.line]

    without = diagnostics.Diagnosis({"importance": Found(bad)}, {}, {})
    assert without.advice == "diagnostics.gap, first (k-hat above 0.7)"
    both = diagnostics.Diagnosis({"importance": Found(bad), "gap": Found(gap)}, {}, {})
    assert both.advice == "a larger encoder (amortisation gap)"


def test_a_p_value_below_the_least_number_is_no_zero() -> None:
    assert "< 1e-300" in str(diagnostics.Finding("SBC p-value", 0.0))
    assert "< 1e-300" not in str(diagnostics.Finding("share", 0.0))
