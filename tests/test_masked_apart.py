"""Latents that one program alone masks: left out of both, or refused by site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pvae
from pvae import Pair, bounds, diagnostics, export, objectives, testing
from pvae.errors import PairError, PvaeError, TrainingError

pytestmark = pytest.mark.usefixtures("store")
N, D = 12, 3
Programs = tuple[Callable[..., None], Callable[..., None]]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, generator=generator) * 2**0.5
    return x, torch.arange(N) % 3 > 0


def exact(x: Tensor) -> Tensor:
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def posterior(x: Tensor) -> dist.Normal:
    return dist.Normal(pyro.param("weight", torch.tensor(0.5)) * x, 0.5**0.5)


def model(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", posterior(x))


def rows_of_the_model() -> Programs:
    """Rows of padding, masked in the model alone."""

    def masked(x: Tensor, seen: Tensor) -> None:
        with poutine.mask(mask=seen):
            model(x, seen)

    return masked, guide


def distributions_of_the_model() -> Programs:
    def masked(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(x.shape).mask(seen))
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen), obs=x)

    return masked, guide


def the_guide_alone() -> Programs:
    """Where x is left out, nothing else reads z: its prior integrates to 1."""

    def likelihood_masked(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def masked(x: Tensor, seen: Tensor) -> None:
        with poutine.mask(mask=seen):
            guide(x, seen)

    return likelihood_masked, masked


def binary() -> Programs:
    """A draw without a gradient, by a marginal that is a mixture."""

    def masked(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(2 * z - 1, 1.0), obs=x)

    def unmasked(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("slope", torch.tensor(2.0)) * x))

    return masked, unmasked


def mixture(x: Tensor) -> Tensor:
    each = torch.stack([dist.Normal(mean, 1.0).log_prob(x) for mean in (-1.0, 1.0)])
    return each.logsumexp(0) - torch.tensor(2.0).log()


KINDS: dict[Callable[[], Programs], Callable[[Tensor], Tensor]] = {
    rows_of_the_model: exact,
    distributions_of_the_model: exact,
    the_guide_alone: exact,
    binary: mixture,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_particles", [1, 3])
def test_they_are_left_out_of_both(kind: Callable[[], Programs], num_particles: int) -> None:
    """The guide is the posterior: where a row counts its weight is p(x), elsewhere 1."""
    x, seen = data()
    expected = torch.where(seen, KINDS[kind](x), 0.0)
    pair = Pair(*kind())
    for found in (bounds.elbo(pair, (x, seen), num_particles), bounds.evidence(pair, (x, seen), 4)):
        torch.testing.assert_close(found.per_datum, expected, rtol=1e-9, atol=1e-9)
        assert "left out: what one program alone masks of latent 'z'" in found.remarks
    weights = bounds.log_weights(pair, (x, seen), 2)
    torch.testing.assert_close(weights, expected.expand(2, N), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("in_model", [True, False])
def test_entries_of_a_latent(in_model: bool) -> None:
    """Masks by dimension on one side; a dimension is a latent of its own in p, x and q."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator) * 2**0.5
    seen = torch.rand(N, D, generator=generator) < 0.6

    def masked(fn: dist.TorchDistribution, *, here: bool) -> dist.TorchDistribution:
        return (fn.mask(seen) if here else fn).to_event(1)

    def by_entry(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros(D), 1.0).expand(x.shape)
            z = pyro.sample("z", masked(prior, here=in_model))
            pyro.sample("x", masked(dist.Normal(z, 1.0), here=True), obs=x)

    def of_entries(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", masked(posterior(x), here=not in_model))

    pair = Pair(by_entry, of_entries)
    expected = torch.where(seen, exact(x), 0.0).sum(1)
    for found in (bounds.elbo(pair, x, 2), bounds.evidence(pair, x, 3)):
        torch.testing.assert_close(found.per_datum, expected, rtol=1e-9, atol=1e-9)
    objective = objectives.STL(2)
    structure = pair.inspect((x,))
    terms = objective.compute_terms(structure, (x,))
    loss = objective.surrogate(terms, objective.make_state(structure))
    assert float(loss.detach()) == pytest.approx(-float(expected.sum()), rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, structure.parameters["weight"])
    assert float(gradient) == pytest.approx(0.0, abs=1e-9)  # as at every exact guide


def partial(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)


def test_missing_values_under_an_autoguide() -> None:
    """Pyro masks what it observes of ``x_unobserved``, and not the autoguide's copy of it."""
    x, seen = data()
    auto = AutoNormal(partial)
    run = pvae.fit((partial, auto), (x, seen), epochs=400, batch_size=None, lr=0.05, progress=False)
    expected = torch.where(seen, exact(x), 0.0)
    found = bounds.evidence((partial, auto), (x, seen), 2000)
    torch.testing.assert_close(found.per_datum, expected, rtol=0, atol=0.2)
    assert found.total == pytest.approx(float(expected.sum()), abs=0.3)
    assert run.history[-1]["elbo"] < found.mean < 0  # a bound
    khat = diagnostics.importance((partial, auto), (x, seen), num_particles=200)
    assert bool(khat.log_weights[:, seen].std(0).max() < 0.5)
    testing.check_pair((partial, auto), (x, seen))
    tree = export.to_arviz((partial, auto), (x, seen), num_particles=2, progress=False)
    assert "x_unobserved" in tree["posterior"]


def refused() -> dict[str, tuple[Programs, str]]:
    def prior_alone(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=seen):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def masked_guide(x: Tensor, seen: Tensor) -> None:
        with poutine.mask(mask=seen):
            guide(x, seen)

    def shared(x: Tensor, seen: Tensor) -> None:
        with poutine.mask(mask=False):
            g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)

    def of_shared(x: Tensor, seen: Tensor) -> None:
        pyro.sample("g", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    return {
        "the prior alone": ((prior_alone, guide), "latent 'z'.*site 'x', whose density changes"),
        "q of what counts": ((model, masked_guide), "latent 'z'.*site 'x', whose density changes"),
        "shared by all": ((shared, of_shared), "latent 'g'.*outside the data plate"),
        "drawn jointly": (
            (partial, AutoMultivariateNormal(partial)),
            "latent 'x_unobserved'.*jointly with others",
        ),
    }


@pytest.mark.parametrize("name", refused())
def test_where_it_would_be_wrong_it_is_refused(name: str) -> None:
    programs, words = refused()[name]
    for look in (lambda: bounds.elbo(programs, data()), lambda: pvae.fit(programs, data())):
        with pytest.raises(PairError, match=words) as caught:
            look()
        assert "poutine.mask(mask=...) around" in str(caught.value)


def read_apart() -> Programs:
    """What the guide's mask leaves out is read at x: with q in place of the prior, wrong."""

    def masked(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x).mask(seen))

    return model, masked


def regression(x: Tensor, seen: Tensor) -> None:
    """Missing covariates, which the outcomes read; no guide draws them."""
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x, obs_mask=seen)
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=torch.ones(len(x)))


def nothing(x: Tensor, seen: Tensor) -> None:
    """A guide of no latents."""


READ = {
    "a guide's mask": (read_apart, "latent 'z'.*site 'x', whose density changes"),
    "missing covariates": (lambda: (regression, nothing), "'x_unobserved'.*site 'y', whose dens"),
    "a mask that comes later": (
        lambda: (model, masked_at_need),
        "latent 'z'.*a mask in each batch, or in none",
    ),
}


def masked_at_need(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.mask(mask=True if bool(seen.all()) else seen):
        pyro.sample("z", posterior(x))


@pytest.mark.parametrize("name", READ)
def test_a_mask_that_hides_nothing_at_first_is_looked_at_again(name: str) -> None:
    """The first 128 rows, by which pairs are looked at, are all seen; later ones aren't."""
    kind, words = READ[name]
    programs, whole = kind(), torch.arange(300) < 200
    x = torch.linspace(-2.0, 2.0, 300)
    pair = Pair(*programs)
    bounds.elbo(pair, (x[:150], whole[:150]))  # of these it is right
    looks: dict[str, Callable[[], object]] = {
        "elbo": lambda: bounds.elbo(pair, (x, whole), max_rows=128),
        "fit": lambda: pvae.fit(pair, (x, whole), epochs=1, batch_size=128, progress=False),
        "svi": lambda: steps(programs, pvae.SVI, Trace_ELBO(), x, whole),
        "Pyro's": lambda: steps(programs, pyro.infer.SVI, objectives.ELBO(), x, whole),
    }
    for look in looks.values():
        with pytest.raises(PairError, match=words):
            look()


def steps(
    programs: Programs, kind: type[pyro.infer.SVI], loss: PyroELBO, x: Tensor, seen: Tensor
) -> None:
    svi = kind(*programs, pyro.optim.Adam({"lr": 1e-3}), loss)
    for start in (0, 100, 200):
        svi.step(x[start : start + 100], seen[start : start + 100])


def masked_by(which: int) -> Callable[..., None]:
    """The posterior, masked by the second or the third argument."""

    def masked(x: Tensor, *masks: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=masks[which]):
            pyro.sample("z", posterior(x))

    return masked


def masked_by_the_first(x: Tensor, *masks: Tensor) -> None:
    with poutine.mask(mask=masks[0]):
        model(x, masks[0])


def counted() -> tuple[Tensor, Tensor, Tensor]:
    """Data, and two masks that are alike in the first 200 of 300 rows."""
    x, row = torch.linspace(-2.0, 2.0, 300), torch.arange(300)
    mask = row % 3 > 0
    return x, mask, mask ^ (row == 250)


def test_masks_that_are_alike_at_first_and_differ_later_are_refused() -> None:
    """Both programs mask the latent, by another argument each."""
    data = counted()
    pair = Pair(masked_by_the_first, masked_by(1))
    part = bounds.evidence(pair, tuple(d[:150] for d in data), 4)  # of these it is right
    expected = torch.where(data[1], exact(data[0]), 0.0)[:150]
    torch.testing.assert_close(part.per_datum, expected)
    error = "latent 'z'.*one mask in model and guide.*masks that differ"
    for tool in (bounds.evidence, bounds.log_weights, diagnostics.importance):
        with pytest.raises(PairError, match=error):
            tool(pair, data, num_particles=30)
    with pytest.raises(PairError, match=error):
        pvae.fit(pair, data, epochs=1, batch_size=100, engine="eager", progress=False)
    with pytest.raises(PairError, match=error):  # and no warning that draws go one by one
        bounds.evidence(Pair(masked_by_the_first, masked_by(1)), data, 4)


def test_compiled_steps_find_no_number_where_masks_differ() -> None:
    """They can't wait to see it; a step without a finite loss changes nothing."""
    pair = Pair(masked_by_the_first, masked_by(1))
    with pytest.raises(TrainingError, match="isn't finite at site 'z'"):
        pvae.fit(pair, counted(), epochs=1, batch_size=100, engine="compiled", progress=False)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("which", [0, 1])
def test_masks_that_are_alike_in_each_batch(
    engine: Literal["eager", "compiled"], which: int
) -> None:
    """One tensor for both programs, or one each."""
    x, mask, _ = counted()
    pair = Pair(masked_by_the_first, masked_by(which))
    data, expected = (x, mask, mask.clone())[: 2 + which], torch.where(mask, exact(x), 0.0)
    torch.testing.assert_close(bounds.evidence(pair, data, 4).per_datum, expected)
    run = pvae.fit(pair, data, epochs=1, batch_size=100, lr=1e-9, engine=engine, progress=False)
    assert run.history[0]["elbo"] == pytest.approx(float(expected.mean()), rel=1e-5)


def test_compiled_steps_wait_until_a_mask_hides_something() -> None:
    x, seen = data()
    pair = Pair(*rows_of_the_model())
    adam = pyro.optim.Adam({"lr": 1e-9})
    svi = pvae.SVI(*rows_of_the_model(), adam, Trace_ELBO(), engine="compiled")
    with pytest.warns(pvae.PvaeWarning, match="site 'z'.*leaves something out, before steps"):
        svi.step(x, torch.ones(N, dtype=torch.bool))
    assert svi.step(x, seen) == pytest.approx(-float(exact(x)[seen].sum()), rel=1e-6)
    assert "z" in pair.inspect((x, seen)).masked_apart


def with_missing(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(x.shape[:1]))
        scale = pyro.param("scale", torch.tensor(1.0))
        x = pyro.sample("x", dist.Normal(z, scale), obs=x, obs_mask=seen)


def at_the_posterior(x: Tensor, seen: Tensor) -> None:
    weight = pyro.param("weight", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        mean = torch.where(seen, weight * x, 0.0)
        pyro.sample("z", dist.Normal(mean, torch.where(seen, 0.5**0.5, 1.0)))


@pytest.mark.parametrize("first", ["all seen", "some missing"])
def test_missing_values_without_a_guide_are_left_out(first: str) -> None:
    """p(x) of what is seen; the gradient of the likelihood's scale is that of log p(x) too."""
    x, seen = data()
    pair = Pair(with_missing, at_the_posterior)
    if first == "all seen":
        pair.inspect((x, torch.ones(N, dtype=torch.bool)))
    expected = torch.where(seen, exact(x), 0.0)
    for found in (bounds.elbo(pair, (x, seen), 3), bounds.evidence(pair, (x, seen), 4)):
        torch.testing.assert_close(found.per_datum, expected, rtol=1e-9, atol=1e-9)
        assert "left out: 'x_unobserved', missing values of no guide" in found.remarks
    structure = pair.inspect((x, seen))
    objective = objectives.ELBO(20_000)
    terms = objective.compute_terms(structure, (x, seen))
    loss = objective.surrogate(terms, objective.make_state(structure))
    (gradient,) = torch.autograd.grad(loss, structure.parameters["scale"])
    scale = torch.ones((), requires_grad=True)
    evidence = dist.Normal(0.0, (1 + scale**2) ** 0.5).log_prob(x[seen]).sum()
    (right,) = torch.autograd.grad(-evidence, scale)
    assert float(gradient) == pytest.approx(float(right), abs=0.1)


def test_missing_classes_are_found_to_be_read() -> None:
    """One missing class among a hundred: draws of it repeat, and are made often enough."""

    def labelled(x: Tensor, y: Tensor, seen: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(rate), obs=y, obs_mask=seen)
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    x, seen = torch.zeros(100), torch.arange(100) != 7
    with pytest.raises(PairError, match=r"site 'y_unobserved'.*site 'x', whose density"):
        bounds.elbo((labelled, lambda *_: None), (x, torch.ones(100), seen))


def test_pyros_objectives_are_refused_missing_values_without_a_guide() -> None:
    """Pyro counts their density under the model, and none under the guide."""
    programs = with_missing, at_the_posterior
    with pytest.raises(PvaeError, match=r"TraceMeanField_ELBO, in whose loss .*'x_unobserved'"):
        pvae.fit(programs, data(), TraceMeanField_ELBO(), epochs=1, progress=False)
    svi = pvae.SVI(*programs, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    with pytest.raises(PvaeError, match=r"TraceMeanField_ELBO, in whose loss .*'x_unobserved'"):
        svi.step(*data())


def test_equal_masks_are_no_difference() -> None:
    """Two tensors of the same values, one on a distribution: as Pyro has it."""
    x, seen = data()

    def masked(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x).mask(seen.clone()))

    pair = Pair(rows_of_the_model()[0], masked)
    assert pair.inspect((x, seen)).masked_apart == ()
    expected = torch.where(seen, exact(x), 0.0)
    torch.testing.assert_close(bounds.elbo(pair, (x, seen)).per_datum, expected)
