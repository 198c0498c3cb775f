"""Impossible numbers are marked, with site and reason; possible ones never are.

Pairs whose densities are wrong, or whose draws floating point has rounded away, against what is
known of them: shares of draws by distribution functions, rates by a constant that was put in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvae
from pvae import PvaeWarning, bounds, diagnostics
from pvae.errors import ArgumentError, UndefinedError
from pvae.limits import largest_log_prob
from tests import exact, pairs

pytestmark = pytest.mark.usefixtures("store")

N = 30
Make = Callable[[], dist.TorchDistribution]


def pair_of(prior: Make, guide: Make, sigma: float = 1.0) -> tuple[Any, Any]:
    """x normal around the sum of z; neither prior nor guide depends on x."""
    event_dim = len(prior().event_shape)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            z = z.double().sum(tuple(range(-event_dim, 0))) if event_dim else z.double()
            pyro.sample("x", dist.Normal(z.to(x.dtype), sigma), obs=x)

    def q(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", guide().expand([len(x)]))

    return model, q


def tensor(*values: float) -> Tensor:
    return torch.tensor(values) if len(values) > 1 else torch.tensor(values[0])


# --- the largest density of data


FAMILIES: dict[str, Make] = {
    "normal": lambda: dist.Normal(0.3, 0.2),
    "half normal": lambda: dist.HalfNormal(0.4),
    "log normal": lambda: dist.LogNormal(0.3, 0.7),
    "laplace": lambda: dist.Laplace(0.1, 2.0),
    "cauchy": lambda: dist.Cauchy(0.0, 3.0),
    "half cauchy": lambda: dist.HalfCauchy(2.0),
    "logistic": lambda: dist.Logistic(1.0, 0.5),
    "gumbel": lambda: dist.Gumbel(1.0, 2.0),
    "exponential": lambda: dist.Exponential(3.0),
    "uniform": lambda: dist.Uniform(1.0, 1.5),
    "gamma": lambda: dist.Gamma(3.0, 2.0),
    "beta": lambda: dist.Beta(2.0, 3.0),
    "flat beta": lambda: dist.Beta(1.0, 1.0),
    "student": lambda: dist.StudentT(3.0, 1.0, 2.0),
    "von mises": lambda: dist.VonMises(1.0, 2.0),
    "chi2": lambda: dist.Chi2(5.0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_no_value_has_a_larger_density(name: str) -> None:
    """The largest of a fine grid comes within 1e-4 of it, and never above."""
    fn = FAMILIES[name]()
    grid = torch.cat([torch.linspace(-20, 20, 400_001), torch.linspace(1e-9, 1, 20_001)])
    largest = fn.log_prob(grid[fn.support.check(grid)]).max()
    limit = largest_log_prob(fn)
    assert float(largest) <= float(limit) + 1e-12
    assert float(limit - largest) < 1e-4


def test_densities_of_several_values_and_those_without_a_largest() -> None:
    several = dist.Normal(torch.zeros(3, 4), 2.0).to_event(1)
    alone = float(largest_log_prob(dist.Normal(0.0, 2.0)))
    torch.testing.assert_close(largest_log_prob(several), torch.full((3,), 4 * alone))
    masked = dist.Normal(torch.zeros(3), 2.0).mask(torch.tensor([True, False, True]))
    assert largest_log_prob(masked).tolist() == [alone, 0.0, alone]
    assert float(largest_log_prob(dist.Gamma(0.5, 1.0))) == math.inf
    assert largest_log_prob(dist.Poisson(torch.ones(2))).tolist() == [0.0, 0.0]
    weights = dist.Categorical(tensor(0.3, 0.7))
    mixture = dist.MixtureSameFamily(weights, dist.Normal(tensor(-5.0, 5.0), tensor(0.5, 1.0)))
    grid = torch.linspace(-8, 8, 10_001)
    assert float(mixture.log_prob(grid).max()) <= float(largest_log_prob(mixture))

    class Own(dist.Normal):  # scored by a function of its own, whose largest value isn't known
        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value) + 3

    assert float(largest_log_prob(Own(0.0, 1.0))) == math.inf


# --- draws on the edge of their support


EDGES: dict[str, tuple[Make, Make]] = {
    "relaxed bernoulli": (
        lambda: dist.RelaxedBernoulli(tensor(0.1), logits=tensor(0.0)),
        lambda: dist.RelaxedBernoulli(tensor(0.1), logits=tensor(20.0)),
    ),
    "beta": (lambda: dist.Beta(0.5, 0.5), lambda: dist.Beta(tensor(0.01), tensor(0.01))),
    "gamma": (lambda: dist.Gamma(1.0, 1.0), lambda: dist.Gamma(tensor(0.001), tensor(1.0))),
    "logit normal": (
        lambda: dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform()]
        ),
        lambda: dist.TransformedDistribution(
            dist.Normal(tensor(0.0), tensor(50.0)), [dist.transforms.SigmoidTransform()]
        ),
    ),
    "dirichlet": (
        lambda: dist.Dirichlet(torch.ones(4)),
        lambda: dist.Dirichlet(torch.full((4,), 0.001)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EDGES)
def test_draws_on_the_edge(name: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)  # put back by the fixture
    pair, x = pair_of(*EDGES[name]), torch.linspace(-1, 1, N)
    for found in (
        bounds.elbo(pair, x, 40),
        bounds.evidence(pair, x, 40, progress=False),
    ):
        assert found.kind == "impossible"
        assert any("site 'z'" in why and "on the edge" in why for why in found.reasons)
        assert "IMPOSSIBLE" in found.headline
        assert "bound of log p(x) on average" not in str(found)


@pytest.mark.slow
def test_every_tool_says_so() -> None:
    """A saturated relaxed Bernoulli: above the largest density, and below a rate of 0."""
    prior, guide = (
        lambda: dist.RelaxedBernoulli(tensor(0.1), logits=torch.zeros(2)).to_event(1),
        lambda: dist.RelaxedBernoulli(tensor(0.1), logits=torch.full((2,), 60.0)).to_event(1),
    )
    pair, x = pair_of(prior, guide), torch.full((8,), 2.0)
    elbo = bounds.elbo(pair, x, 40)
    assert elbo.rate is not None
    assert (elbo.kind, elbo.rate.kind) == ("impossible", "impossible")
    assert elbo.mean > float(largest_log_prob(dist.Normal(0.0, 1.0)))
    assert any("no data have a density above -0.9189 at site 'x'" in why for why in elbo.reasons)
    assert any("below 0" in why for why in elbo.reasons)
    few = bounds.AIS(num_temperatures=2, num_leapfrog=2)
    how = bounds.LocalFit(max_steps=1, num_particles=2)
    for options in ({}, {"method": "ais", "ais": few}, {"method": "cubo"}):
        found = bounds.evidence(pair, x, 8, progress=False, **options)
        assert found.kind == "impossible", options
        with pytest.raises(UndefinedError, match="site 'z'"):
            found.to_elpd()
    assert bounds.iwae_curve(pair, x, 16)[16].kind == "impossible"
    assert (elbo - bounds.elbo(pair, x, 40)).kind == "impossible"
    with pytest.raises(ArgumentError, match=r"possible.*site 'z'"):
        bounds.compare({"a": elbo, "b": elbo})
    assert "IMPOSSIBLE" in elbo._repr_html_()
    assert elbo.to_dict()["kind"] == "impossible"
    for result in (
        diagnostics.importance(pair, x, num_particles=50),
        diagnostics.surgery(pair, x),
        diagnostics.gap(pair, x, num_particles=20, flow=False, local=how, progress=False),
        pvae.diagnose(pair, x, checks=["elbo", "evidence"], num_particles=50, progress=False),
    ):
        line = next(line for line in result.findings() if "impossible" in line.meaning)
        assert line.verdict == "bad"
        assert "site 'z'" in str(result)


# --- draws where the prior has no mass


def test_draws_outside_the_priors_support_have_their_share() -> None:
    """P(z < 0) of the guide, a normal one, to six standard errors."""
    share = float(dist.Normal(0.5, 0.6).cdf(tensor(0.0)))
    prior = lambda: dist.HalfNormal(1.0, validate_args=False)  # noqa: E731
    pair, x = pair_of(prior, lambda: dist.Normal(tensor(0.5), 0.6)), torch.zeros(N)
    found = bounds.elbo(pair, x, 200)
    assert (found.mean, found.kind) == (-math.inf, "impossible")
    (reason,) = found.reasons
    shown = float(reason.split(": ")[1].split("%")[0]) / 100
    assert abs(shown - share) < 6 * math.sqrt(share / (200 * N)) + 5e-4
    assert reason.startswith("site 'z'")
    assert "outside the prior's support" in reason


OUTSIDE: dict[str, tuple[Callable[[bool | None], dist.TorchDistribution], float]] = {
    "uniform": (lambda check: dist.Uniform(0.0, 9.0, validate_args=check), 0.0),
    "gamma": (lambda check: dist.Gamma(2.0, 1.0, validate_args=check), 0.0),
    "exponential": (lambda check: dist.Exponential(1.0, validate_args=check), 0.0),
    "beta": (lambda check: dist.Beta(tensor(2.0), 2.0, validate_args=check), 0.0),
    "pareto": (lambda check: dist.Pareto(tensor(0.3), 2.0, validate_args=check), 0.3),
    "poisson": (lambda check: dist.Poisson(tensor(1.0), validate_args=check), math.inf),
    "binomial": (lambda check: dist.Binomial(3, tensor(0.4), validate_args=check), math.inf),
}
"""Priors, checked by torch or not, and below which value a draw is outside of their support."""


@pytest.mark.parametrize("is_checked", [None, False])
@pytest.mark.parametrize("name", OUTSIDE)
def test_every_tool_marks_draws_outside_a_support_alike(
    name: str, *, is_checked: bool | None
) -> None:
    """Whether torch looks at values or not: the share of draws, to six standard errors."""
    prior, end = OUTSIDE[name]
    spread = dist.Normal(tensor(0.5), 0.2 if name == "beta" else 0.6)
    pair, x = pair_of(lambda: prior(is_checked), lambda: spread), torch.zeros(N)
    share = 1.0 if end == math.inf else float(spread.cdf(tensor(end)))
    share += 1 - float(spread.cdf(tensor(1.0))) if name == "beta" else 0.0
    elbo, evidence = bounds.elbo(pair, x, 200), bounds.evidence(pair, x, 200, progress=False)
    surgery = diagnostics.surgery(pair, x, num_particles=200, progress=False)
    curve = bounds.iwae_curve(pair, x, 256)[1]
    for found in (elbo, evidence, surgery.rate, curve):
        assert found.kind == "impossible"
        reason = found.reasons[0]
        assert reason.startswith("site 'z'")
        assert reason.endswith("of the guide's draws are outside the prior's support")
        shown = float(reason.split(": ")[1].split("%")[0]) / 100
        assert abs(shown - share) < 6 * math.sqrt(share / (200 * N)) + 5e-4
    with pytest.warns(PvaeWarning, match=r"log_weights, impossible: site 'z': .* outside the pri"):
        bounds.log_weights(pair, x, 10)


def test_a_draw_outside_another_guides_support_is_no_error() -> None:
    """q(z) is a mixture of uniform densities, each 0 outside of its own: 0.5 where one covers."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x - 1, x + 1))

    x = torch.tensor([-3.0, 0.0, 3.0, 6.0])
    found = diagnostics.surgery((model, guide), x, num_particles=50, progress=False)
    assert found.rate.kind != "impossible"
    assert found.information is not None
    assert found.information.mean == pytest.approx(math.log(len(x)), rel=1e-6)
    for tool in (bounds.elbo, bounds.evidence, bounds.log_weights):
        tool((model, guide), x, 5)


def test_weights_that_are_possible_come_without_a_word() -> None:
    pair = pair_of(lambda: dist.Normal(tensor(0.0), 1.0), lambda: dist.Normal(tensor(0.0), 0.7))
    assert bounds.log_weights(pair, torch.zeros(N), 50).shape == (50, N)


def test_weights_above_any_density_are_said_to_be_impossible() -> None:
    """log q is too low by 2 nats, and so all weights are too high by as much."""
    pair = pair_of(
        lambda: dist.Normal(tensor(0.0), 1.0), lambda: Off(tensor(0.0), tensor(0.1), 2.0)
    )
    with pytest.warns(PvaeWarning, match="log_weights, impossible: .*at site 'x'"):
        bounds.log_weights(pair, torch.zeros(N), 50)


@pytest.mark.parametrize("kind", ["categorical", "one hot", "bernoulli", "logits"])
def test_states_that_the_prior_lacks(kind: str) -> None:
    """torch clamps a probability of 0 to 1e-16, so that the ELBO is finite, and wrong."""
    p, q = tensor(0.5, 0.5, 0.0), tensor(0.4, 0.3, 0.3)
    made: dict[str, tuple[Make, Make]] = {
        "categorical": (lambda: dist.Categorical(p), lambda: dist.Categorical(q)),
        "one hot": (lambda: dist.OneHotCategorical(p), lambda: dist.OneHotCategorical(q)),
        "bernoulli": (lambda: dist.Bernoulli(0.0), lambda: dist.Bernoulli(tensor(0.3))),
        "logits": (lambda: dist.Categorical(logits=p.log()), lambda: dist.Categorical(q)),
    }
    pair, x = pair_of(*made[kind]), torch.zeros(N)
    found = bounds.elbo(pair, x, 50)
    assert found.kind == "impossible"
    assert "30" in found.reasons[0] or "29" in found.reasons[0] or "31" in found.reasons[0]


def test_rare_states_are_no_missing_ones() -> None:
    """Probabilities far below what torch clamps to, by their logits, and one of exactly that."""
    logits = tensor(0.0, -60.0, -800.0)
    pair = pair_of(
        lambda: dist.Categorical(logits=logits), lambda: dist.Categorical(tensor(0.4, 0.3, 0.3))
    )
    assert bounds.elbo(pair, torch.zeros(N), 50).kind == "lower"
    pair = pair_of(lambda: dist.Bernoulli(logits=-60.0), lambda: dist.Bernoulli(tensor(0.3)))
    assert bounds.elbo(pair, torch.zeros(N), 50).kind == "lower"


# --- densities that are off by a constant


class Off(dist.Normal):
    """A normal whose log density is too low by some nats, as a forgotten determinant makes it."""

    def __init__(self, loc: Tensor, scale: Tensor, nats: float) -> None:
        self.nats = nats
        super().__init__(loc, scale)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Off:
        return Off(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.nats)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - self.nats


def off_by(nats: float) -> tuple[Any, Any]:
    return pair_of(lambda: dist.Normal(0.0, 1.0), lambda: Off(tensor(0.0), torch.ones(()), nats))


def test_a_rate_below_zero() -> None:
    """q is the prior but for its density: the rate is minus the nats, at every draw."""
    found = bounds.elbo(off_by(2.0), torch.zeros(N), 4)
    assert found.rate is not None
    assert found.rate.mean == pytest.approx(-2.0)
    assert found.kind == "impossible"
    assert "site 'z': a rate of -2 nats" in found.reasons[0]


def test_an_evidence_above_the_largest_density() -> None:
    """With x at the mean of all draws, log p(x) is at most that of its own normal density."""
    model, guide = off_by(3.0)
    limit = float(largest_log_prob(dist.Normal(0.0, 1.0)))
    found = bounds.evidence((model, guide), torch.zeros(N), 100, progress=False)
    assert found.mean > limit
    assert any("above" in why for why in found.reasons)
    start = bounds.AIS(num_temperatures=2, num_leapfrog=1, start="prior")
    right = bounds.evidence((model, guide), torch.zeros(N), 4, method="ais", ais=start)
    assert right.kind == "lower"  # no density of q is in it


def test_what_is_not_off_is_possible() -> None:
    """2000 collapsed posteriors, whose rate is 0 but for rounding, in single precision."""
    torch.set_default_dtype(torch.float32)
    for seed in range(20):
        pair, x = off_by(0.0), torch.randn(100)
        assert bounds.elbo(pair, x, 10, seed=seed).kind == "lower"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", pairs.PAIRS)
@pytest.mark.filterwarnings("ignore::pvae.PvaeWarning")  # of looped particles, say
def test_no_false_alarm_on_pairs(name: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    model, guide, batch = pairs.PAIRS[name](torch.device("cpu"))
    data = batch if len(batch) > 1 else batch[0]
    found = [bounds.elbo((model, guide), data, 20)]
    found.append(bounds.evidence((model, guide), data, 25, num_global=25, progress=False))
    assert {each.kind for each in found} == {"lower"}
    assert all(each.measure is not None for each in found)


@pytest.mark.parametrize("name", exact.KINDS)
@pytest.mark.filterwarnings("ignore::pvae.PvaeWarning")
def test_no_false_alarm_on_posteriors(name: str) -> None:
    """Where q is the posterior, weights are p(x): no slack hides an alarm."""
    kind = exact.KINDS[name]()
    data = kind.batch if len(kind.batch) > 1 else kind.batch[0]
    assert bounds.elbo(kind.pair, data, 5).kind == (
        "none" if kind.log_evidence is None else "lower"
    )


@pytest.mark.parametrize(
    ("likelihood", "edge"),
    [(dist.Beta(0.5, 1.0), 0.0), (dist.Beta(2.0, 0.5), 1.0), (dist.Gamma(0.5, 1.0), 0.0)],
)
def test_data_with_an_infinite_density_have_no_bound(likelihood: Any, edge: float) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", likelihood, obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))

    x = torch.full((10,), 0.3)
    assert bounds.elbo((model, guide), x).kind == "lower"
    x[3] = edge
    with pyro.validation_enabled(is_validate=False):
        found = [bounds.elbo((model, guide), x)]
        found.append(bounds.evidence((model, guide), x, 5, progress=False))
    for each in found:
        assert each.kind == "impossible"
        assert "site 'x': 1 of 10 data have a density that is no finite number" in str(each)


# --- in training


def test_a_training_says_so_once() -> None:
    model, _ = off_by(2.0)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", Off(loc.expand(len(x)), torch.ones(len(x)), 2.0))

    x = torch.randn(N)
    with pytest.warns(PvaeWarning, match=r"impossible numbers: site 'z'.*below 0") as caught:
        run = pvae.fit((model, guide), x, epochs=3, valid=x, progress=False, engine="eager")
    assert sum("impossible" in str(one.message) for one in caught) == 1
    assert all("site 'z'" in why for why in run.history["impossible"])
    assert "IMPOSSIBLE: site 'z'" in repr(run)
