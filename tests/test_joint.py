"""Weights of joint draws, of global latents and of those of data, against known evidences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pvae
from pvae import bounds, diagnostics
from pvae.errors import ArgumentError, PairError, UndefinedError
from tests.globals import EIGHT, Counted, Regression, eight_schools, eight_schools_evidence

pytestmark = [
    pytest.mark.usefixtures("store"),
    pytest.mark.filterwarnings("ignore:Particles are looped"),
]


@pytest.mark.parametrize("inside", [True, False])
def test_the_evidence_of_a_regression_is_reached(inside: bool) -> None:
    """A guide twice too wide: its ELBO is 3 nats low, its weights are not; looped or not."""
    toy = Regression(inside=inside)
    pair = toy.pair(width=2.0)
    elbo = bounds.elbo(pair, toy.batch, 100)
    found = bounds.evidence(pair, toy.batch, num_global=400, progress=False)
    assert elbo.total < toy.log_evidence - 2
    assert abs(found.total - toy.log_evidence) < 5 * found.se_total < 0.5
    assert (found.name, found.kind, found.by) == ("evidence, joint IWAE-400", "lower", "data set")
    assert found.num_data == len(toy.batch[0])
    assert found.ess is not None
    assert 1 < float(found.ess) < 400


def test_draws_of_global_latents_are_as_few_as_they_are_called() -> None:
    """One pass of the model a draw where particles are looped, and a few to look; else few."""
    for inside in (True, False):
        toy = Regression(inside=inside)
        counted = Counted(toy.pair(width=2.0))
        bounds.evidence(counted.pair, toy.batch, 2)  # finds out about the pair
        counted.runs = 0
        bounds.evidence(counted.pair, toy.batch, 50, progress=False)
        assert counted.runs <= (2 if inside else 51)  # one looks at the data's support
        counted.runs = 0
        diagnostics.predictive(counted.pair, toy.batch, num_particles=50, progress=False)
        assert counted.runs <= (6 if inside else 60)
        counted.runs = 0
        pvae.export.to_arviz(counted.pair, toy.batch, num_particles=20, progress=False)
        assert counted.runs <= (20 if inside else 100)


@pytest.mark.parametrize("k", [1, 4])
def test_local_draws_are_nested_in_those_of_global_latents(k: int) -> None:
    """Eight schools by quadrature; the schools' guide is the posterior given mu and tau, or not."""
    expected = eight_schools_evidence()
    found = bounds.evidence(
        eight_schools(width=1.3), EIGHT, num_global=2000, num_particles=k, progress=False
    )
    assert abs(found.total - expected) < 5 * found.se_total < 0.5
    local = f", {k} local draws each" if k > 1 else ""
    assert found.name == f"evidence, joint IWAE-2000{local}"
    exact = bounds.evidence(eight_schools(width=1.0), EIGHT, num_global=2000, progress=False)
    assert abs(exact.total - expected) < 5 * exact.se_total < 0.3


def test_nested_weights_are_unbiased_and_say_their_noise() -> None:
    """Over many draws with K = 2 the mean weight is p(x); the noise halves as K doubles."""
    noises = []
    for k in (2, 4):
        found = diagnostics.importance(
            eight_schools(width=1.3), EIGHT, num_global=4000, num_particles=k, progress=False
        )
        assert isinstance(found, diagnostics.JointImportance)
        ratio = (found.log_weights - eight_schools_evidence()).exp()
        assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / 4000**0.5
        noises.append(float(found.joint.noise.mean()))
    assert noises[0] / noises[1] == pytest.approx(2, rel=0.2)
    assert found.findings()[0].name == "local noise"


def test_in_any_chunks_the_weights_are_of_the_whole_data_set() -> None:
    pair = eight_schools(width=1.0)
    for max_rows in (8, 100):
        found = bounds.evidence(
            pair, EIGHT, num_global=100, num_particles=2, max_rows=max_rows, progress=False
        )
        assert abs(found.total - eight_schools_evidence()) < 5 * found.se_total < 0.9


def test_a_mean_field_guide_of_correlated_latents_is_bad() -> None:
    """Its best fit has a tenth of the posterior's sd; the full covariance has no fault."""
    toy = Regression(inside=True, centre=10.0)
    for pair, worst in ((toy.mean_field(), "bad"), (toy.pair(width=1.1), "good")):
        for seed in range(3):
            found = pvae.diagnose(
                pair, toy.batch, checks=["elbo", "importance"], seed=seed, progress=False
            )
            verdicts = {line.verdict for line in found.findings()} - {"none"}
            assert worst in verdicts
            assert verdicts <= {worst, "bad", "look"} if worst == "bad" else verdicts == {"good"}
            assert ("AutoMultivariateNormal" in found.advice) is (worst == "bad")
    exact = diagnostics.importance(toy.pair(width=1.0), toy.batch, progress=False)
    assert exact.findings()[0].name == "exact"


def test_the_advice_on_a_mean_field_guide_can_be_typed() -> None:
    toy = Regression(inside=True, centre=10.0)
    found = diagnostics.importance(toy.mean_field(), toy.batch, num_global=1000, progress=False)
    line, *_ = found.findings()[0].advice.split(", a guide")
    names = {"pvae": pvae, "pyro": pyro, "model": toy.mean_field()[0], "x": toy.batch}
    run = eval(line, names)  # noqa: S307
    assert type(run.pair.guide) is AutoMultivariateNormal


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_a_fit_of_all_latents_together_is_exact_for_a_conjugate_model(inside: bool) -> None:
    """The data set is one datum, whose q is a full-rank Gaussian of what all data share."""
    toy = Regression(inside=inside, centre=1.0)
    few = bounds.LocalFit(max_steps=200, num_particles=4)
    found = bounds.evidence(
        toy.mean_field(), toy.batch, 20, method="local", local=few, progress=False
    )
    assert found.total == pytest.approx(toy.log_evidence, abs=0.01)
    assert (found.by, found.num_data, found.global_sites) == ("data set", 40, ("w",))


@pytest.mark.slow
def test_chains_anneal_over_all_latents_together() -> None:
    """From the guide's own density, and from a Gaussian with its moments."""
    how = bounds.AIS(num_temperatures=15)
    pair, exact = eight_schools(width=1.3), eight_schools_evidence()
    found = bounds.evidence(pair, EIGHT, method="ais", ais=how, progress=False)
    assert abs(found.total - exact) < 5 * found.se_total < 1.5
    assert (found.by, found.kind, found.num_data) == ("data set", "lower", 8)
    toy = Regression(inside=True)
    guide = AutoMultivariateNormal(toy.model, init_scale=0.15)
    guide(*toy.batch)
    guide.loc.data.copy_(toy.mean)
    how = bounds.AIS(num_temperatures=10)
    found = bounds.evidence((toy.model, guide), toy.batch, method="ais", ais=how, progress=False)
    assert abs(found.total - toy.log_evidence) < 5 * found.se_total < 1.5


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal])
def test_auxiliary_sites_of_autoguides_count(family: Callable[..., Callable[..., None]]) -> None:
    """With unconstrained coordinates and their Jacobian, one draw or many at once."""
    x = torch.tensor([0.3, 1.2, 2.0, 0.4])

    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(rate), obs=x)

    guide = family(model, init_scale=0.5)
    guide(x)
    total = float(x.sum())
    exact = math.lgamma(6) - 6 * math.log(1 + total)  # Gamma(2, 1) prior, four exponentials
    found = bounds.evidence((model, guide), x, 20_000, progress=False)
    assert abs(found.total - exact) < 5 * found.se_total < 0.2


def test_under_a_flat_prior_there_is_no_evidence_but_a_gap() -> None:
    """The posterior of a mean is N(x, 1 / N); a q half as wide is KL = log 2 - 3 / 8 away."""
    x = torch.tensor([0.3, 1.2, 2.0, 0.4])

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.mean(), 0.25))

    found = diagnostics.importance((model, guide), x, num_global=20_000, progress=False)
    assert (found.evidence.kind, found.elbo.kind) == ("none", "none")
    assert found.evidence.name == "unnormalised evidence, IWAE-20000"
    assert found.gap.total == pytest.approx(math.log(2) - 3 / 8, abs=0.1)
    assert float(found.khat) == pytest.approx(0.75, abs=0.25)
    with pytest.raises(UndefinedError, match="improper prior"):
        bounds.evidence((model, guide), x)


def test_what_has_no_joint_weights() -> None:
    toy = Regression(inside=True)
    model, _ = toy.mean_field()
    guide = AutoDelta(model)
    with pytest.raises(UndefinedError, match=r"point mass \(Delta\) at site 'w'"):
        diagnostics.importance((model, guide), toy.batch)
    for name in ("num_global", "num_particles"):
        with pytest.raises(ArgumentError, match=f"{name}: expected an integer of at least 25"):
            diagnostics.importance(toy.pair(), toy.batch, **cast("Any", {name: 20}))

    def scaled(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    with pytest.raises(UndefinedError, match=r"all 100 data, .*; got 20 of them"):
        diagnostics.importance((scaled, AutoNormal(scaled)), torch.zeros(20))


class Mean:
    """x ~ N(mean, 1), mean ~ N(0, 1), with a guide that reads the data, exact for all of them."""

    def __call__(self, x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    @staticmethod
    def guide(x: Tensor) -> None:
        precision = 1 + len(x)
        pyro.sample("mean", dist.Normal(x.sum() / precision, precision**-0.5))

    @staticmethod
    def log_evidence(x: Tensor) -> float:
        squares = float(x.square().sum() - x.sum() ** 2 / (1 + len(x)))
        return -0.5 * (len(x) * math.log(2 * math.pi) + math.log(1 + len(x)) + squares)


def test_a_guide_that_reads_the_data_has_all_of_them() -> None:
    """Its draws are of all rows, in whatever chunks these are scored; or it is refused."""
    x = torch.linspace(-1, 3, 3000, dtype=torch.float64)
    found = bounds.evidence((Mean(), Mean.guide), x, 3, progress=False)
    assert found.total == pytest.approx(Mean.log_evidence(x), rel=1e-9)
    with pytest.raises(PairError, match="reads the data, 3000 rows of which max_rows=1000"):
        bounds.evidence((Mean(), Mean.guide), x, 3, max_rows=1000, progress=False)
    assert bounds.elbo((Mean(), Mean.guide), x, 3, max_rows=3000).total == pytest.approx(
        Mean.log_evidence(x), rel=1e-9
    )

    def centred(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.mean(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    with pytest.raises(PairError, match=r"log p that differs by .* between chunks"):
        bounds.evidence((centred, Mean.guide), x, 3, progress=False)


@pytest.mark.slow
def test_default_draws_are_bounded_whatever_the_number_of_data() -> None:
    x = torch.zeros(100_000, dtype=torch.float64)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 100_001**-0.5))

    found = bounds.evidence((Mean(), guide), x, progress=False)
    assert found.name == "evidence, joint IWAE-83"
    assert found.total == pytest.approx(Mean.log_evidence(x), rel=1e-9)


def test_the_screen_says_what_its_bound_is_of_and_names_the_models_sites() -> None:
    """The ELBO is a datum's share, beside a gap of the data set; no auxiliary site is named."""
    toy = Regression(inside=True, centre=10.0)
    guide = AutoMultivariateNormal(toy.model)
    found = pvae.diagnose((toy.model, guide), toy.batch, checks=["elbo", "importance", "sbc"])
    units = {line.name: line.unit for line in found.findings()}
    assert units["ELBO"] == "nats per datum"
    assert units["joint gap, at least"] == "nats"
    elbo = bounds.elbo((toy.model, guide), toy.batch, 10)
    value = next(line.value for line in found.findings() if line.name == "ELBO")
    assert value == pytest.approx(elbo.total / elbo.num_data)
    for text in (str(found), str(elbo), found.undefined["sbc"]):
        assert "_AutoMultivariateNormal_latent" not in text
        assert "_unconstrained" not in text


def test_training_comes_first_where_noise_hides_whether_it_is_done() -> None:
    """A curve of 30 epochs as noisy as one draw makes it, of a guide that has hardly moved."""
    toy = Regression(inside=True)
    pair = toy.model, AutoMultivariateNormal(toy.model)
    run = pvae.fit(pair, toy.batch, epochs=30, batch_size=None, lr=1e-4, progress=False)
    found = run.diagnose(progress=False)
    assert "could hide" in str(found)
    assert found.advice.startswith("train on")
    assert not any("AutoIAF" in line.advice for line in found.findings())
