"""The screen: what is wrong is said, what isn't defined is said, and nothing else is blamed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae import VAE, bounds, diagnostics, guides, likelihoods, priors, recipes
from pvae.data import LinearGaussian
from pvae.errors import ArgumentError
from pvae.networks import MLP
from tests import exact, linear, pairs

pytestmark = pytest.mark.usefixtures("store")
D, Q = 6, 3
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
    assert found.results["elbo"].estimate.mean == pytest.approx(
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
    assert "importance: not defined, " in str(found)


def test_rows_and_refusals(device: torch.device) -> None:
    toy, x = toy_data(100)
    model, guide = linear.pair(toy, linear.exact)
    found = pvae.diagnose((model, guide), x.to(device), checks=["elbo"], num_data=30)
    assert found.num_data == 30
    assert list(found.seconds) == ["elbo"]
    with pytest.raises(ArgumentError, match=r"checks: expected some of 'elbo', .*; got 'nothing'"):
        pvae.diagnose((model, guide), x, checks=["nothing"])
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
    assert found.advice.startswith("train on: fit.refine(epochs)")
    assert found.advice.endswith("(learning curve)")
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
    assert str(int(found.worst()[0])) in found.notes[-1]
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
    assert "sbc: not defined, x: expected y; got z." in str(found)


def test_a_check_that_was_made_is_not_advised() -> None:
    bad = diagnostics.Finding(
        "k-hat above 0.7", 0.5, verdict="bad", advice="diagnostics.gap, first"
    )
    gap = diagnostics.Finding("amortisation gap", 2.0, verdict="bad", advice="a larger encoder")

    @dataclass(frozen=True, repr=False)
    class Found(diagnostics.Result):
        line: diagnostics.Finding

        def findings(self) -> list[diagnostics.Finding]:
            return [self.line]

    without = diagnostics.Diagnosis({"importance": Found(bad)}, {}, {})
    assert without.advice == "diagnostics.gap, first (k-hat above 0.7)"
    both = diagnostics.Diagnosis({"importance": Found(bad), "gap": Found(gap)}, {}, {})
    assert both.advice == "a larger encoder (amortisation gap)"


def test_a_p_value_below_the_least_number_is_no_zero() -> None:
    assert "< 1e-300" in str(diagnostics.Finding("SBC p-value", 0.0))
    assert "< 1e-300" not in str(diagnostics.Finding("share", 0.0))


# What the last line says


def exact_on(n: int) -> tuple[Any, Tensor]:
    toy, x = toy_data(n)
    return linear.pair(toy, linear.exact), x


@pytest.mark.parametrize(
    ("checks", "missing"),
    [
        (["elbo"], "importance, sbc, predictive, trial wasn't asked for"),
        (["importance", "sbc", "trial"], "predictive wasn't asked for"),
        (diagnostics.SUMMARY, "importance, sbc, predictive, trial wasn't asked for"),
    ],
)
def test_no_all_clear_without_the_main_checks(checks: Any, missing: str) -> None:
    pair, x = exact_on(40)
    said = pvae.diagnose(pair, x, checks=checks).advice
    assert said == f"no all-clear, as {missing}: pvae.diagnose(pair, x)"


def test_no_all_clear_from_few_rows() -> None:
    said = pvae.diagnose(*exact_on(10)).advice
    assert said.startswith("no all-clear, as importance, predictive saw 10 rows, fewer than 20")
    assert pvae.diagnose(*exact_on(20)).advice == diagnostics.NOTHING


def test_no_all_clear_where_a_main_check_is_not_defined() -> None:
    """What to try is the check's own: here, for a pair that takes its rows by itself."""
    found = pvae.diagnose(exact.subsampling().pair, exact.data())
    assert "sbc isn't defined here" in found.advice
    assert found.advice.endswith(found.remedies["sbc"])


def test_an_untrained_pair_is_to_be_trained() -> None:
    """With all defaults, by `diagnose`, and after the ten epochs of `fit`; no line blames."""
    vae = recipes.vae(D, Q, hidden=(8,))
    x = (torch.rand(200, 1) < 0.5).to(torch.float64).expand(200, D)
    found = pvae.diagnose(vae, x)
    assert found.advice.startswith("train on: fit.refine(epochs), or pvae.fit(pair, x, epochs=...)")
    assert [line.name for line in found.findings() if line.advice] == ["trial steps"]
    fit = pvae.fit(vae, x, progress=False)
    assert fit.diagnose().advice.startswith("train on")
    few = pvae.fit(recipes.vae(D, Q, hidden=(8,)), x, epochs=3, progress=False).diagnose()
    assert few.advice.startswith("train on")
    assert "at least 8 epochs" in few.missing["learning"]


def test_verdicts_allow_for_all_tests_of_the_screen() -> None:
    """0.02 is worth a look alone, and not as the least of four."""

    @dataclass(frozen=True, repr=False)
    class Found(diagnostics.Result):
        line: diagnostics.Finding

        def findings(self) -> list[diagnostics.Finding]:
            return [self.line]

    def screen(*p_values: float) -> diagnostics.Diagnosis:
        lines = [
            diagnostics.Finding.of_test(f"p{i}", p, "odd", "do") for i, p in enumerate(p_values)
        ]
        return diagnostics.Diagnosis({line.name: Found(line) for line in lines}, {}, {})

    assert verdicts(screen(0.02)) == {"p0": "look"}
    several = screen(0.02, 0.5, 0.6, 0.7)
    assert set(verdicts(several).values()) == {"good"}
    assert several.advice == diagnostics.NOTHING
    assert "as one of 4 tests" in several.findings()[0].meaning
    assert verdicts(screen(4e-4, 0.5, 0.6)) == {"p0": "look", "p1": "good", "p2": "good"}
    assert screen(1e-3, 1e-9, 1e-5).advice == "do (p1)"  # the worst first


def test_few_replicates_are_never_bad_and_more_are_drawn() -> None:
    """With 100 of them no p-value is below 2 / 101, whatever the data are."""
    pair, x = exact_on(40)
    found = pvae.diagnose(pair, 9 * x + 9, checks=["predictive"])
    assert found.results["predictive"].num_particles == 2000
    assert {line.verdict for line in found.findings()} == {"look"}
    assert pvae.diagnose(pair, x, checks=["predictive"]).results["predictive"].num_particles == 100


# The screen of a run: cheap checks, evidence and bits


def summary(pair: Any, x: Any, **options: Any) -> diagnostics.Diagnosis:
    return pvae.diagnose(
        pair, x, **{"checks": diagnostics.SUMMARY, "num_data": None, "progress": False} | options
    )


def numbers(found: diagnostics.Diagnosis) -> dict[str, float]:
    return {line.name: line.value for line in found.findings()}


def test_the_numbers_are_those_of_bounds(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(50, D, device=device).round()
    history = [{"elbo": -3.0, "seconds": 1.5}, {"elbo": -2.0, "seconds": 3.2}]
    found = summary(vae, x, bin_width=1.0, num_particles=40, history=history)
    lower, best = bounds.elbo(vae, x, 10), bounds.evidence(vae, x, 40)
    assert lower.rate is not None
    assert lower.distortion is not None
    assert numbers(found) == pytest.approx(
        {
            "ELBO": lower.mean,
            "distortion": lower.distortion.mean,
            "rate": lower.rate.mean,
            "evidence, IWAE-40": best.mean,
            "bits per dimension": -best.mean / D / math.log(2),
            "active units": float(diagnostics.active_units(vae, x).sum()),
            "training time": 3.2,
        }
    )
    errors = {line.name: line.error for line in found.findings()}
    assert errors["ELBO"] == pytest.approx(lower.se_data)
    assert errors["evidence, IWAE-40"] == pytest.approx(best.se_data)
    assert "at least 8 epochs" in found.missing["learning"]
    lines = str(found).splitlines()
    assert lines[-1].startswith("next: ")
    assert len(lines) < 24
    assert max(map(len, lines)) < 100


def test_bits_per_dimension_are_left_out_or_have_a_bin(device: torch.device) -> None:
    vae = VAE(
        priors.StandardNormal(Q),
        likelihoods.Gaussian(MLP(Q, D, (8,)), D, sigma=1.0),
        guides.MeanField(MLP(D, 2 * Q, (8,)), Q),
    ).to(device)
    x = torch.rand(20, D, device=device)
    assert "bits per dimension" not in numbers(summary(vae, x, num_particles=5))
    found = summary(vae, x, num_particles=5, bin_width=1 / 255)
    value = bounds.evidence(vae, x, 5).mean
    expected = -(value / D + math.log(1 / 255)) / math.log(2)
    assert numbers(found)["bits per dimension"] == pytest.approx(expected)
    assert "bins of 0.003922" in str(found)
    with pytest.raises(ArgumentError, match="bin_width"):
        summary(vae, x, bin_width=0.0)


def test_uniform_noise_costs_its_bits() -> None:
    """256 equally likely levels are 8 bits; a uniform density in bins of 1/256 is the same."""
    assert diagnostics.bits_per_dimension(-10 * math.log(256), 10) == pytest.approx(8)
    assert diagnostics.bits_per_dimension(0.0, 10, bin_width=1 / 256) == pytest.approx(8)


def test_an_autoencoder_gets_what_is_defined_and_why_the_rest_isnt(device: torch.device) -> None:
    ae = recipes.ae(D, Q, hidden=(8,)).to(device)
    found = summary(ae, torch.rand(20, D, device=device), bin_width=0.1)
    assert "ELBO" not in numbers(found)
    assert numbers(found)["distortion"] > 0
    assert found.missing["evidence"] == "a point mass (Delta) at site 'z'"
    assert {"rate", "bits per dimension"} <= set(found.missing)
    assert {"sparsity", "sensitivity"} <= set(numbers(found))
    assert "stochastic" in found.advice


def test_an_improper_prior_has_no_evidence(device: torch.device) -> None:
    vae = VAE(
        priors.Flat(Q),
        likelihoods.Bernoulli(MLP(Q, D, (8,)), D),
        guides.MeanField(MLP(D, 2 * Q, (8,)), Q),
    ).to(device)
    found = summary(vae, torch.rand(20, D, device=device).round(), bin_width=1.0)
    assert "ELBO" not in numbers(found)
    assert "unnormalised ELBO" in numbers(found)
    assert {"evidence", "rate", "bits per dimension"} <= set(found.missing)


def test_any_pair_has_a_summary(device: torch.device) -> None:
    for name in ("two_sites", "global_latent", "masked", "functions"):
        model, guide, batch = pairs.PAIRS[name](device)
        assert "ELBO" in numbers(summary((model, guide), batch, num_particles=5))
    model, guide, batch = pairs.two_sites(device)
    found = numbers(summary((model, guide), batch, num_particles=5))
    assert {"active units, z1", "active units, z2"} <= set(found)


def test_advice_follows_the_trouble(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    last = vae.guide.posterior.get_parameter("network.layers.2.weight")
    last.data *= 20  # far from collapse
    x = torch.rand(50, D, device=device).round()

    def advice(values: list[float]) -> str:
        history = [{"valid_elbo": value} for value in values]
        return summary(vae, x, num_particles=5, history=history).advice

    rising = [-50.0 + i for i in range(20)]
    assert advice(rising).startswith("train on")
    assert "keeps the best epoch" in advice([-50.0 + i for i in range(10)] + [-60.0] * 20)
    torch.nn.init.zeros_(last)
    torch.nn.init.zeros_(vae.guide.posterior.get_parameter("network.layers.2.bias"))
    assert advice([-50.0] * 3).endswith("(active units)")
    assert advice(rising).startswith("train on")  # first things first


def test_a_loose_bound_is_said(device: torch.device) -> None:
    """q of four times the posterior's scale: the evidence of 2,000 draws is far above the ELBO."""
    toy, x = toy_data()
    for make, verdict in ((linear.scaled(4.0), "look"), (linear.exact, "good")):
        found = summary(linear.pair(toy, make), x.to(device), num_particles=2000)
        assert verdicts(found)["evidence, IWAE-2000"] == verdict
        assert ("diagnostics.gap" in found.advice) == (verdict == "look")
