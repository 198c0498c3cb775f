"""Latents that one program alone masks: left out of both, or refused by site."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pvae
from pvae import Pair, bounds, diagnostics, export, objectives, testing
from pvae.errors import PairError

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
