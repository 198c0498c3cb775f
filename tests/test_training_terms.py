"""Factors of a guide: in the loss as Pyro has them, and in no density unless the pair says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pvae
from pvae import Pair, bounds, export, objectives
from pvae.errors import ArgumentError, PairError, PvaeWarning
from pvae.objectives.table import ALL
from pvae.sites import penalty

pytestmark = pytest.mark.usefixtures("store")
N = 12


def series() -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(0)) * 2**0.5


def exact(x: Tensor) -> Tensor:
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def model(x: Tensor) -> None:
    with pyro.plate("data", N, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def posterior(x: Tensor) -> Tensor:
    weight = pyro.param("weight", torch.tensor(0.5))
    z: Tensor = pyro.sample("z", dist.Normal(weight * x, 0.5**0.5))
    return z


def plain(x: Tensor) -> None:
    with pyro.plate("data", N, subsample_size=len(x)):
        posterior(x)


def local(x: Tensor) -> None:
    with pyro.plate("data", N, subsample_size=len(x)):
        z = posterior(x)
        slope = pyro.param("slope", torch.tensor(0.3))
        pyro.factor("extra", slope * (z + x.square()), has_rsample=True)


def without_gradient(x: Tensor) -> None:
    """Pyro then takes the score function of the factor."""
    with pyro.plate("data", N, subsample_size=len(x)):
        z = posterior(x)
        slope = pyro.param("slope", torch.tensor(0.3))
        pyro.factor("extra", slope * z.square(), has_rsample=False)


def several(x: Tensor) -> None:
    with pyro.plate("data", N, subsample_size=len(x)):
        z = posterior(x)
        pyro.factor("extra", pyro.param("slope", torch.tensor(0.3)) * z, has_rsample=True)
        with poutine.scale(scale=3.0):
            pyro.factor("scaled", z.square(), has_rsample=True)
        with poutine.mask(mask=x > 0):
            pyro.factor("masked", z.exp(), has_rsample=True)


def nested(x: Tensor) -> None:
    """In a plate of its own, within that of the data."""
    with pyro.plate("data", N, subsample_size=len(x), dim=-1):
        z = posterior(x)
        with pyro.plate("classes", 3, dim=-2):
            slope = pyro.param("slope", torch.tensor([[0.1], [0.2], [0.3]]))
            pyro.factor("extra", slope * z, has_rsample=True)


def outside(x: Tensor) -> None:
    with pyro.plate("data", N, subsample_size=len(x)):
        posterior(x)
    pyro.factor("extra", pyro.param("slope", torch.tensor(0.3)).square(), has_rsample=True)


def of_all(x: Tensor) -> None:
    """Outside the plate, of the latents of all data."""
    with pyro.plate("data", N, subsample_size=len(x)):
        z = posterior(x)
    pyro.factor(
        "extra", pyro.param("slope", torch.tensor(0.3)) * z.sum(-1, keepdim=True), has_rsample=True
    )


KINDS = [local, without_gradient, several, nested, outside, of_all]


@pytest.mark.parametrize("guide", KINDS)
def test_no_evidence_has_them(guide: Callable[..., None]) -> None:
    """The guide is the posterior: every weight is p(x)."""
    x = series()
    pair = Pair(model, guide)
    how = bounds.AIS(num_temperatures=3)
    for found in (
        bounds.elbo(pair, x, 3),
        bounds.evidence(pair, x, 3),
        bounds.evidence(pair, x, 3, method="ais", ais=how, progress=False),
        bounds.evidence(pair, x, 3, method="cubo"),
    ):
        torch.testing.assert_close(found.per_datum, exact(x), rtol=1e-9, atol=1e-9)
        assert "left out: factor 'extra' of the guide" in found.remarks
    torch.testing.assert_close(bounds.log_weights(pair, x, 2), exact(x).expand(2, N))
    structure = pair.inspect((x,))
    assert not structure.global_sites
    assert not structure.removed_scales
    diagnosis = pvae.diagnose(pair, x, checks=["elbo", "importance"], progress=False)
    assert "left out: factor 'extra' of the guide" in str(diagnosis)
    tree = export.to_arviz(pair, x, num_particles=3, groups=["sample_stats"], progress=False)
    assert tree["sample_stats"]["log_weight"].to_numpy()[0, 0] == pytest.approx(exact(x).numpy())
    assert "extra" in tree.attrs["training_terms"]


def discrete(x: Tensor) -> None:
    """Beside a binary latent, whose draws have no gradient."""
    with pyro.plate("data", N, subsample_size=len(x)):
        slope = pyro.param("slope", torch.tensor(0.3))
        z = pyro.sample("z", dist.Bernoulli(logits=slope * x))
        pyro.factor("extra", slope.square() * (x - z), has_rsample=True)


def binary(x: Tensor) -> None:
    with pyro.plate("data", N, subsample_size=len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


PROGRAMS = [*((model, guide) for guide in KINDS), (binary, discrete)]


@pytest.mark.filterwarnings("ignore:Found plate statements in guide but not model")  # Pyro's
@pytest.mark.parametrize("programs", PROGRAMS, ids=lambda pair: pair[1].__name__)
def test_training_is_pyros_svi(programs: tuple[Callable[..., None], Callable[..., None]]) -> None:
    x = series()
    svi = SVI(*programs, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    torch.manual_seed(1)
    theirs = [svi.step(x) / N for _ in range(20)]
    expected = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    pyro.clear_param_store()
    run = pvae.fit(
        programs,
        x,
        epochs=20,
        lr=0.02,
        seed=1,
        batch_size=None,
        progress=False,
    )
    ours = torch.tensor([row["loss"] for row in run.history])
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-7, atol=1e-7)
    for name, value in pyro.get_param_store().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-7)
    for row in run.history:  # what isn't the bound is told apart from it
        assert row["loss"] == pytest.approx(row["penalty"] - row["elbo"], rel=1e-9)


OPTIONS: dict[str, dict[str, Any]] = {
    "Capacity": {"capacity": 0.5, "gamma": 3.0},
    "GECO": {"tolerance": 8.0},
    "TCVAE": {"num_data": 100},
    "FreeBits": {"per": "site"},
    "ELBO": {"beta": 0.3, "penalty_weight": 5.0},
}


def loss_of(
    objective: objectives.Objective, guide: Callable[..., None], x: Tensor
) -> tuple[float, Tensor]:
    """The loss, and the gradient of the factor's parameter, which moves no draw."""
    structure = Pair(model, guide).inspect((x,))
    objective.check(structure)
    torch.manual_seed(2)
    terms = objective.compute_terms(structure, (x,))
    loss = objective.surrogate(terms, objective.make_state(structure))
    slope = structure.parameters.get("slope")
    if slope is None:
        return float(loss.detach()), torch.zeros(())
    return float(loss.detach()), torch.autograd.grad(loss, slope)[0]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_objective_has_them_beside_its_weights(kind: type[objectives.Objective]) -> None:
    """They add their mean over draws, scaled up to all data, whatever the bound and its weights."""
    x = series()[:8]

    def by_size(x: Tensor) -> None:
        with pyro.plate("data", N, subsample_size=len(x)):
            posterior(x)
            slope = pyro.param("slope", torch.tensor(0.3))
            pyro.factor("extra", slope * x.square(), has_rsample=True)

    objective = kind(**OPTIONS.get(kind.__name__, {}))
    without, _ = loss_of(objective, plain, x)
    found, gradient = loss_of(objective, by_size, x)
    size = N / 8 * float(x.square().sum())
    if kind is objectives.CUBO:  # its value is the upper bound, which penalties raise, too
        assert objective.form == "log"
    assert found == pytest.approx(without + 0.3 * size, rel=1e-9)
    assert float(gradient) == pytest.approx(size, rel=1e-9)


@pytest.mark.parametrize("kind", [objectives.IWAE, objectives.DReG, objectives.STL])
def test_their_gradient_goes_through_the_draws(kind: type[objectives.Objective]) -> None:
    """E[slope z] for z = weight x + noise: its derivative by the weight is slope sum(x)."""
    x = series()[:8]
    gradients = []
    for guide in (plain, local):
        structure = Pair(model, guide).inspect((x,))
        torch.manual_seed(2)
        objective = kind(3)
        terms = objective.compute_terms(structure, (x,))
        loss = objective.surrogate(terms, objective.make_state(structure))
        gradients.append(torch.autograd.grad(loss, structure.parameters["weight"])[0])
    expected = N / 8 * 0.3 * x.sum()
    torch.testing.assert_close(gradients[1] - gradients[0], expected)


def lognormal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)


def by_hand(x: Tensor) -> None:
    """z = exp(u): log q(z) = log q(u) - u."""
    with pyro.plate("data", len(x)):
        weight = pyro.param("weight", torch.tensor(0.5))
        normal = dist.Normal(weight * x, 0.5**0.5)
        u = pyro.sample("u", normal, infer={"is_auxiliary": True})
        pyro.factor("jacobian", -u, has_rsample=True)
        pyro.factor("extra", u.square(), has_rsample=True)
        pyro.sample("z", dist.Delta(u.exp()))


@pytest.mark.parametrize("kind", [pyro.infer.SVI, pvae.SVI])
def test_densities_reach_loops_of_ones_own(kind: type[pyro.infer.SVI]) -> None:
    """At the posterior each weight is p(x), whatever the draws; "extra" is in the loss beside it.

    E[u^2] = (x / 2)^2 + 1 / 2; ten standard errors.
    """
    x, adam = series(), pyro.optim.Adam({"lr": 1e-12})
    objective = objectives.IWAE(2000, densities="jacobian")
    loss = kind(lognormal, by_hand, adam, objective).step(x)
    mean = (x / 2).square() + 0.5
    error = (2 * 0.25 + 4 * 0.5 * (x / 2).square()).sum().div(2000).sqrt()
    assert abs(loss - float((mean - exact(x)).sum())) < 10 * float(error)
    with pytest.warns(PvaeWarning, match=r"Factor 'jacobian' and 'extra' .*densities=\('jac"):
        untold = kind(lognormal, by_hand, adam, objectives.IWAE(2000)).step(x)
    assert abs(untold - loss) > 1
    for silent in (objectives.IWAE(5, densities=()), objectives.IWAE(1), objectives.ELBO(5)):
        kind(lognormal, by_hand, adam, silent).step(x)
    with pytest.raises(PairError, match=r"densities: expected names of factors .*got 'jacobean'"):
        kind(lognormal, by_hand, adam, objectives.IWAE(5, densities="jacobean")).step(x)


def test_a_pair_and_its_objective_have_to_name_the_same_densities() -> None:
    objective = objectives.IWAE(5, densities="jacobian")
    with pytest.raises(ArgumentError, match=r"(?s)densities: .*Pair\(model, guide, densities='jac"):
        pvae.fit((lognormal, by_hand), series(), objective, epochs=1, progress=False)
    pair = Pair(lognormal, by_hand, densities="jacobian")
    pvae.fit(pair, series(), objective, epochs=1, batch_size=None, progress=False)


def test_a_jacobian_is_a_density_where_the_pair_says_so() -> None:
    x = series()
    pair = Pair(lognormal, by_hand, densities=["jacobian"])
    for found in (bounds.elbo(pair, x, 3), bounds.evidence(pair, x, 3)):
        torch.testing.assert_close(found.per_datum, exact(x), rtol=1e-9, atol=1e-9)
        assert found.remarks == ("left out: factor 'extra' of the guide",)
    assert repr(pair) == "Pair(lognormal, by_hand, densities=('jacobian',))"
    untold = bounds.evidence(Pair(lognormal, by_hand), x, 3)
    assert "left out: factor 'jacobian' of the guide" in untold.remarks
    with pytest.raises(PairError, match=r"names of factors in the guide.*got 'jacobean'"):
        Pair(lognormal, by_hand, densities="jacobean").inspect((x,))


def test_a_factor_beside_an_autoguide() -> None:
    """The wrapped guide draws the latents, the wrapper adds a term."""
    x = series()
    auto = AutoNormal(model)
    auto(x)

    def guide(x: Tensor) -> None:
        auto(x)
        pyro.factor("extra", auto.scales.z.sum(), has_rsample=True)

    def weights(program: Callable[..., None]) -> Tensor:
        return bounds.log_weights((model, program), x, 3)

    torch.testing.assert_close(weights(guide), weights(auto))
    found = bounds.elbo((model, guide), x, 3)
    assert found.remarks == ("left out: factor 'extra' of the guide",)


def test_a_factor_of_the_model_is_in_the_density_and_said_by_site() -> None:
    """Its value, 0.3 a datum, is in every bound; a penalty's isn't, nor is it named."""

    def with_factor(x: Tensor) -> None:
        with pyro.plate("data", N, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("potential", 0.3 * torch.ones(len(x)))
        penalty("small", torch.ones(()))

    pair = with_factor, guide_of
    for found in (bounds.elbo(pair, series(), 3), bounds.evidence(pair, series(), 3)):
        torch.testing.assert_close(found.per_datum, exact(series()) + 0.3, rtol=1e-9, atol=1e-9)
        assert found.remarks == ("in the density: factor 'potential' of the model",)
    tree = export.to_arviz(pair, series(), num_particles=2, progress=False)
    assert tree.attrs["factors"] == "'potential'"
    screen = pvae.diagnose(pair, series(), checks=["elbo"], progress=False)
    assert "in the density: factor 'potential' of the model" in str(screen)


def guide_of(x: Tensor) -> None:
    """The posterior."""
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("z", dist.Normal(pyro.param("weight", torch.tensor(0.5)) * x, 0.5**0.5))
