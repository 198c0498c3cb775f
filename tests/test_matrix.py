"""Every tool on every kind of pair: a number that is known, or a refusal with its reason.

The guides are the exact posteriors (`tests.exact`), so that one number, log p(x), is what most
tools have to give, without noise. Where draws are compared with an expectation, the limit is six
standard errors: under normal noise that fails by chance less than once in 1e8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvae
from pvae import bounds, diagnostics, export, latent, testing
from pvae.errors import PvaeError
from tests import exact
from tests.exact import KINDS, Exact

pytestmark = [
    pytest.mark.usefixtures("store"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pvae.PvaeWarning"),  # of looped particles, say
]


def data_of(e: Exact) -> Tensor | tuple[Tensor, ...]:
    return e.batch if len(e.batch) > 1 else e.batch[0]


def per_datum(found: pvae.Estimate, e: Exact) -> None:
    """Each datum's value is log p(x); with global latents the total is."""
    assert e.log_evidence is not None
    if e.log_evidence.dim():
        torch.testing.assert_close(found.per_datum.double(), e.log_evidence, rtol=1e-8, atol=1e-8)
    else:
        assert found.total == pytest.approx(float(e.log_evidence), rel=1e-8)


def near(found: Tensor | float, expected: Tensor | float, error: Tensor | float) -> None:
    """Within six standard errors."""
    off = (torch.as_tensor(found) - torch.as_tensor(expected)).abs()
    assert bool((off <= 6 * torch.as_tensor(error) + 1e-9).all()), (off, error)


def elbo(e: Exact) -> None:
    found = bounds.elbo(e.pair, data_of(e), 3)
    if e.log_evidence is not None:
        per_datum(found, e)
        assert found.kind == "lower"
        return
    assert (found.kind, found.name) in {("none", "log joint"), ("none", "unnormalised ELBO")}
    if found.name == "log joint":  # the density at the code
        z = e.means["z"]
        joint = dist.Normal(z @ exact.WEIGHT.T, exact.SIGMA).log_prob(e.x).sum(1)
        joint = joint + dist.Normal(0.0, 1.0).log_prob(z).sum(1)
        torch.testing.assert_close(found.per_datum, joint, rtol=1e-8, atol=1e-8)


def importance_sampling(e: Exact) -> None:
    per_datum(bounds.evidence(e.pair, data_of(e), 3, progress=False), e)


def annealing(e: Exact) -> None:
    how = bounds.AIS(num_temperatures=4)
    found = bounds.evidence(e.pair, data_of(e), 3, method="ais", ais=how, progress=False)
    if e.pair.inspect(e.batch).auxiliary:  # a Gaussian with the guide's moments is at the start
        assert e.log_evidence is not None
        near(found.total, e.log_evidence.sum(), 0.05)
    else:
        per_datum(found, e)


def chi_bound(e: Exact) -> None:
    per_datum(bounds.evidence(e.pair, data_of(e), 3, method="cubo", progress=False), e)


def local_fit(e: Exact) -> None:
    """The family has the posterior in it."""
    found = bounds.evidence(e.pair, data_of(e), 100, method="local", progress=False)
    assert e.log_evidence is not None
    values = found.per_datum if e.log_evidence.dim() else found.total
    near(values, e.log_evidence, 0.01)


def log_weights(e: Exact) -> None:
    found = bounds.log_weights(e.pair, data_of(e), 3)
    assert e.log_evidence is not None
    torch.testing.assert_close(found, e.log_evidence.expand(3, -1), rtol=1e-8, atol=1e-8)


def iwae_curve(e: Exact) -> None:
    found = bounds.iwae_curve(e.pair, data_of(e), 16)
    assert e.log_evidence is not None
    for estimate in found.estimates.values():
        torch.testing.assert_close(estimate.values, e.log_evidence, rtol=1e-8, atol=1e-8)


def bdmc(e: Exact) -> None:
    """Both bounds are log p(x) of what was simulated."""
    found = bounds.bdmc(e.pair, data_of(e), 2, ais=bounds.AIS(num_temperatures=4), progress=False)
    torch.testing.assert_close(found.upper.per_datum, found.lower.per_datum, rtol=1e-8, atol=1e-8)
    if e.marginal is not None and len(e.batch) == 1 and e.num_data > 1:
        expected = exact.log_marginal(found.batch[0].movedim(e.axis, 0))
        if torch.allclose(e.marginal[1], exact.marginal_of()[1]):
            torch.testing.assert_close(found.lower.per_datum, expected, rtol=1e-8, atol=1e-8)


def gap(e: Exact) -> None:
    found = diagnostics.gap(e.pair, data_of(e), num_particles=100, flow=False, progress=False)
    for part in (found.amortisation, found.approximation):
        near(part.mean, 0.0, 0.01)


def khat(e: Exact) -> None:
    """Constant weights have no tail."""
    found = diagnostics.importance(e.pair, data_of(e), num_particles=50)
    assert bool((found.khat < 0).all() | found.khat.isnan().all()), found.khat


def sbc(e: Exact) -> None:
    found = diagnostics.sbc(
        e.pair, data_of(e), num_simulations=400, num_particles=19, progress=False
    )
    assert found.ranks.shape[0] == 400
    assert found.p_value > 1e-5


def tarp(e: Exact) -> None:
    found = diagnostics.tarp(
        e.pair, data_of(e), num_simulations=400, num_particles=19, progress=False
    )
    assert float(found.tests.p_values.min()) > 1e-5


def surgery(e: Exact) -> None:
    found = diagnostics.surgery(e.pair, data_of(e), num_particles=200, progress=False)
    if e.rate is not None:
        near(found.rate.mean, e.rate.mean(), found.rate.se_draws or math.nan)
    if found.information is not None and found.marginal_kl is not None:
        total = found.information.mean + found.marginal_kl.mean
        assert total == pytest.approx(found.rate.mean, rel=1e-8)
    for name, mean in e.means.items():
        activity = found.activity[name]
        near(activity, mean.var(0), 0.02)


def aggregated(e: Exact) -> None:
    found = diagnostics.aggregated_posterior(e.pair, data_of(e))
    means = torch.cat([mean.reshape(e.num_data, -1) for mean in e.means.values()], 1)
    near(found.draws.mean(0), means.mean(0), e.num_data**-0.5)


def predictive(e: Exact) -> None:
    """The mean over replicates of a linear statistic is the model's own mean of it."""
    statistics = {"mean": lambda x: x.mean()}
    found = diagnostics.predictive(
        e.pair, data_of(e), statistics, site=e.site, kind="mixed", num_particles=400, progress=False
    )
    drawn = found.statistics["mean"].replicated
    expected = e.marginal[0].mean() if e.marginal is not None else drawn.mean()
    near(drawn.mean(), expected, drawn.std() / 20)


def pit(e: Exact) -> None:
    """u is the model's distribution function at x."""
    found = diagnostics.pit(
        e.pair, data_of(e), site=e.site, kind="mixed", num_particles=400, progress=False
    )
    rows = e.x.shape[1:] if e.num_data > 1 else e.x.shape
    assert found.values.shape == (e.num_data, *rows)
    if e.marginal is not None:
        u = dist.Normal(*e.marginal).cdf(e.x)
        known = ~found.values.isnan()
        error = (u * (1 - u) / 400).sqrt() + 1 / 400
        near(found.values[known], u[known], error[known])


def active_units(e: Exact) -> None:
    found = diagnostics.active_units(e.pair, data_of(e))
    (mean,) = e.means.values()
    assert found.tolist() == (mean.var(0) > 0.01).tolist()


def sensitivity(e: Exact) -> None:
    """The posterior's mean is linear in x; of the binary latents it is a sigmoid."""
    found = diagnostics.sensitivity(e.pair, data_of(e))
    slope = exact.WEIGHT / exact.SIGMA**2 * exact.variance()
    (mean,) = e.means.values()
    if bool(((mean > 0) & (mean < 1)).all()):
        slope = mean[:, None] * (1 - mean[:, None]) * exact.WEIGHT / exact.SIGMA**2
    if e.num_data == 1:  # one posterior of all data
        each = exact.WEIGHT / exact.SIGMA**2 / (1 / exact.variance() - 1).mul(exact.N).add(1)
        slope = exact.N**0.5 * each
    expected = slope.square().sum((-2, -1)).sqrt().expand(e.num_data)
    if e.site != "x":  # where nothing is seen q is the prior
        expected = torch.where(e.batch[1], expected, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def codes(e: Exact) -> None:
    for name, mean in e.means.items():
        draws = latent.codes(e.pair, data_of(e), site=name, num_particles=300)
        near(draws.mean(0), mean, draws.std(0).clamp(min=0.05) / 300**0.5)
    if len(e.means) == 1:
        found = latent.codes(e.pair, data_of(e))
        if found.shape[0] == e.num_data and e.log_evidence is not None and e.log_evidence.dim():
            torch.testing.assert_close(found, mean, rtol=1e-8, atol=1e-8)
    elif not e.means:
        latent.codes(e.pair, data_of(e))


def sample(e: Exact) -> None:
    found = latent.sample(e.pair, data_of(e), site=e.site)
    assert bool(found.isfinite().all())
    if e.marginal is not None:
        mean, sd = e.marginal
        near(found.mean(), mean.mean(), float(sd.mean()))


def to_arviz(e: Exact) -> None:
    tree = export.to_arviz(e.pair, data_of(e), num_particles=3, progress=False)
    assert set(tree["posterior"].data_vars) >= set(e.means)
    if e.log_evidence is None:
        assert "log_weight" not in tree["sample_stats"]
        return
    found = tree["sample_stats"]["log_weight"].to_numpy()[0]
    expected = e.log_evidence.numpy()
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-8)


def loo(e: Exact) -> None:
    """p(x_n | others) of a normal with a normal mean."""
    found = export.loo(e.pair, data_of(e), num_particles=2000)
    x = e.x
    precision = 1 + (e.num_data - 1) / exact.SIGMA**2
    mean = (x.sum() - x) / exact.SIGMA**2 / precision
    each = dist.Normal(mean, (1 / precision + exact.SIGMA**2) ** 0.5).log_prob(x)
    assert float(found.elpd) == pytest.approx(float(each.sum()), abs=0.1)


def gradient_noise(e: Exact) -> None:
    """At the posterior the ELBO is at its maximum in q: its gradient there has mean 0."""
    found = diagnostics.gradient_noise(e.pair, data_of(e), num_repeats=100, progress=False)
    assert found.sides
    has_more = bool(e.pair.inspect(e.batch).training_terms)  # whose gradient isn't 0 there
    if "guide" in found.sides and e.log_evidence is not None and not has_more:
        side = found.sides["guide"]
        near(side.mean, torch.zeros_like(side.mean), (side.variance / 100).sqrt())


def check_pair(e: Exact) -> None:
    testing.check_pair(e.pair, data_of(e))


def diagnose(e: Exact) -> None:
    found = pvae.diagnose(e.pair, data_of(e), checks=["elbo"], progress=False)
    value = found.findings()[0].value
    assert e.log_evidence is None or value == pytest.approx(
        float(e.log_evidence.sum()) / e.num_data, rel=1e-8
    )


def fit(e: Exact) -> None:
    """One step at a rate of almost nothing reports the pair as it is."""
    run = pvae.fit(e.pair, data_of(e), epochs=1, lr=1e-12, batch_size=None, progress=False)
    if e.log_evidence is not None:
        expected = float(e.log_evidence.sum()) / e.num_data
        kept = e.log_evidence if e.log_evidence.dim() else None
        if kept is not None and run.history[0]["elbo"] != pytest.approx(expected, rel=1e-6):
            # a subsampled pair sees each datum about once an epoch, not exactly once
            assert run.structure.subsample_size is not None
            near(run.history[0]["elbo"], expected, float(kept.std()) / e.num_data**0.5)


TOOLS: dict[str, Callable[[Exact], None]] = {
    f.__name__: f
    for f in (
        elbo,
        importance_sampling,
        annealing,
        chi_bound,
        local_fit,
        log_weights,
        iwae_curve,
        bdmc,
        gap,
        khat,
        sbc,
        tarp,
        surgery,
        aggregated,
        predictive,
        pit,
        active_units,
        sensitivity,
        codes,
        sample,
        to_arviz,
        loo,
        gradient_noise,
        check_pair,
        diagnose,
        fit,
    )
}
GLOBAL = dict.fromkeys(("global_latent", "autoguide"), "got global site")
POINT, IMPROPER = {"point": "a point mass"}, {"improper": "an improper (prior|one)"}
DISCRETE, SUBSAMPLING = {"discrete": "which is discrete"}, {"subsampling": "subsamples its data"}
MASKED = dict.fromkeys(
    ("masked", "masked_apart"), "site 'z': expected latents (without a mask|that all count)"
)
SEVERAL = {"two_sites": "exactly one latent", "autoguide": "got none"}
WHOLE, ONE_ROW = {"no_plate": "whose data no plate counts"}, {"no_plate": "of at least 2; got 1"}
FEW_ROWS = {"subsampled": "400 vs 100"}  # more data than its plate knows of
WEIGHTS = {**GLOBAL, **POINT, **IMPROPER}
JOINT = {**WEIGHTS, **MASKED, **SUBSAMPLING, **FEW_ROWS, **WHOLE}
REFUSED: dict[str, dict[str, str]] = {
    "importance_sampling": {**POINT, **IMPROPER},
    "annealing": {**POINT, **IMPROPER, **DISCRETE},
    "chi_bound": WEIGHTS,
    "local_fit": {**POINT, **IMPROPER, **DISCRETE, **MASKED},
    "log_weights": WEIGHTS,
    "iwae_curve": WEIGHTS,
    "bdmc": {**WEIGHTS, **DISCRETE, "subsampling": "data of site 'x': .* got none"},
    "gap": {**WEIGHTS, **DISCRETE, **MASKED},
    "khat": {**POINT, **IMPROPER},
    "sbc": JOINT,
    "tarp": JOINT,
    "surgery": {**WEIGHTS, **ONE_ROW},
    "aggregated": {**GLOBAL, **IMPROPER, **MASKED, **SUBSAMPLING, **ONE_ROW},
    "predictive": IMPROPER,
    "pit": IMPROPER,
    "active_units": {**SEVERAL, **ONE_ROW},
    "sensitivity": {**SEVERAL, **SUBSAMPLING},
    "codes": {"autoguide": "got none"},
    "sample": IMPROPER,
    "loo": {kind: "inside it: log p" for kind in KINDS if kind != "autoguide"},
    "gradient_noise": {"frozen": "depends on parameters; got none"},
    "fit": {"frozen": "one trainable parameter"},
}
"""By tool and kind of pair: the reason."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_known_number_or_a_refusal(tool: str, kind: str) -> None:
    e = KINDS[kind]()
    reason, before = REFUSED.get(tool, {}).get(kind), torch.get_rng_state()
    if reason is None:
        TOOLS[tool](e)
    else:
        with pytest.raises(PvaeError) as caught:
            TOOLS[tool](e)
        assert re.search(reason, str(caught.value)), str(caught.value)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generators are as they were
