"""Which data an estimate is of, whether it is a mass or a density, and what can be compared.

x is a normal variable in bins of width h, scored as a density, or by the bins' probabilities, which
are differences of the distribution function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pvae import Pair, bounds, diagnostics, likelihoods, recipes
from pvae.errors import ArgumentError, UndefinedError
from pvae.estimate import Estimate
from tests import exact

if int(arviz.__version__.split(".")[0]) < 1:
    import arviz.preview as az
else:
    az = arviz

N, D, LEVELS, SIGMA = 40, 3, 41, 4.0
Make = Callable[[Tensor], dist.TorchDistribution]


def idle(likelihood: Make) -> tuple[Any, Any]:
    """A latent that x doesn't depend on: log p(x) is the likelihood's, without noise."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood(x), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    return model, guide


def counts() -> Tensor:
    return (20 + SIGMA * torch.randn(N, D)).round().clamp(0, LEVELS - 1)


def binned(x: Tensor) -> dist.TorchDistribution:
    """Probabilities of bins of width 1 around the whole numbers."""
    edges = dist.Normal(20.0, SIGMA).cdf(torch.arange(LEVELS + 1) - 0.5)
    return dist.Categorical(edges.diff()).expand(x.shape).to_event(1)


def normal(x: Tensor, unit: float = 1.0) -> dist.TorchDistribution:
    return dist.Normal(20.0 * unit, SIGMA * unit).expand(x.shape).to_event(1)


def of(likelihood: Make, x: Tensor) -> Estimate:
    return bounds.elbo(idle(likelihood), x, 2)


def test_estimates_say_what_they_are_of() -> None:
    x = counts()
    mass, density = of(binned, x), of(normal, x)
    assert mass.measure is not None
    assert density.measure is not None
    assert (mass.measure.kind, density.measure.kind) == ("mass", "density")
    assert density.to_dict()["measure"] == "density"
    assert density.measure.continuous.tolist() == [D] * N
    found = bounds.evidence(idle(normal), x, 4, progress=False)
    assert "on average, of a density" in str(found)
    grey = recipes.vae(D, 2, hidden=(4,))
    grey.model.likelihood = likelihoods.Bernoulli(torch.nn.Linear(2, D), D, grey_values=True)
    scored = bounds.elbo(grey, x / LEVELS)
    assert scored.measure is not None
    assert scored.measure.kind == "unnormalised"
    assert scored.measure.words == "which isn't normalised"


def test_a_density_is_compared_with_a_mass_by_its_bins() -> None:
    """A bin's probability is its density times its width, but for h^2 / (24 sigma^2), or so."""
    x = counts()
    found = {"bins": of(binned, x), "density": of(normal, x)}
    with pytest.raises(ArgumentError, match="a mass of 'bins', a density of 'density'") as caught:
        bounds.compare(found)
    assert "bin_width=h" in str(caught.value)
    with pytest.raises(ArgumentError, match="of masses or of densities"):
        _ = found["bins"] - found["density"]
    expected = normal(x).log_prob(x) - binned(x).log_prob(x)
    together = bounds.compare(found, bin_width=1.0)
    (apart,) = (d for d in together.differences.values() if bool(d.values.any()))
    assert abs(apart.mean) == pytest.approx(abs(float(expected.mean())), abs=1e-9)
    assert abs(apart.mean) < D / SIGMA**2 / 12


def test_densities_in_other_units_have_bins_of_other_widths() -> None:
    """x in units of 40 levels: a density of x is 3 log 40 nats higher, and no better."""
    x, unit = counts(), 1 / 40
    small = of(lambda y: normal(y, unit), x * unit)
    large = of(normal, x)
    assert small.mean - large.mean == pytest.approx(D * math.log(40), abs=1e-9)
    with pytest.raises(ArgumentError, match="of other data: 40 of 40 rows differ"):
        bounds.compare({"small": small, "large": large})
    widths = {"small": unit, "large": 1.0}
    same = bounds.compare({"small": small, "large": large}, bin_width=widths)
    assert max(abs(d.mean) for d in same.differences.values()) < 1e-9
    bins = of(binned, x)
    assert (small.in_bins(unit) - bins).mean == pytest.approx((large.in_bins(1) - bins).mean)
    with pytest.raises(ArgumentError, match="names of 'bins'"):
        bounds.compare({"bins": bins, "large": large}, bin_width={"Large": 1.0})


def test_other_rows_and_other_data_are_refused() -> None:
    x = counts()
    whole = of(normal, x)
    for other, why in (
        (x.flip(0), "same rows in another order"),
        (x.roll(1, 0), "same rows in another order"),
        (torch.cat([x[:-1], x[-1:] + 1]), "1 of 40 rows differ"),
        (x.flip(1), "rows differ"),
        (counts(), "rows differ"),
    ):
        with pytest.raises(ArgumentError, match=why):
            bounds.compare({"a": whole, "b": of(normal, other)})
        with pytest.raises(ArgumentError, match=why):
            _ = whole - of(normal, other)
    with pytest.raises(ArgumentError, match="40 of 'a', 39 of 'b'"):
        bounds.compare({"a": whole, "b": of(normal, x[1:])})
    reshaped = of(lambda y: normal(y).to_event(1), x.reshape(N, D, 1))
    assert (whole - reshaped).mean == pytest.approx(0.0, abs=1e-9)
    single = of(lambda y: normal(y), x.float())
    assert (whole - single).mean == pytest.approx(0.0, abs=1e-3)


def test_masks_count() -> None:
    """Half the values: other entries than all of them, and no other than the same half's."""
    x, seen = counts(), torch.arange(D) < 2

    def half(y: Tensor) -> dist.TorchDistribution:
        return dist.Normal(20.0, SIGMA).expand(y.shape).mask(seen).to_event(1)

    found = of(half, x)
    assert found.measure is not None
    assert found.measure.continuous.tolist() == [2] * N
    with pytest.raises(ArgumentError, match="numbers of values"):
        bounds.compare({"half": found, "all": of(normal, x)})
    filled = torch.where(seen, x, 7.0)
    assert (found - of(half, filled)).mean == pytest.approx(0.0, abs=1e-12)


def test_arviz_refuses_densities_with_masses() -> None:
    x = counts()
    kinds = {name: of(make, x).to_elpd() for name, make in (("a", binned), ("b", normal))}
    with pytest.raises(ValueError, match="incompatible"):
        az.compare(kinds, method="pseudo-bma")


def test_a_gap_takes_the_evidence_of_its_data_alone() -> None:
    kind = exact.modules()
    (x,) = kind.batch
    other = bounds.evidence(kind.pair, x.flip(0), 4, progress=False)
    with pytest.raises(ArgumentError, match="another order"):
        diagnostics.gap(kind.pair, x, num_particles=4, evidence=other, progress=False)


def test_no_bins_of_what_has_no_measure() -> None:
    with pytest.raises(UndefinedError, match="measure is not known"):
        Estimate("ELBO", torch.zeros(3)).in_bins(0.1)
    with pytest.raises(ArgumentError, match="width"):
        of(normal, counts()).in_bins(0)


def test_differences_of_two_pairs_with_one_seed_have_the_error_of_common_draws() -> None:
    """Two decoders that hardly differ: the scatter of 100 repeats has an error of 7 %."""
    x = torch.randn(20)

    def pair(slope: float) -> Pair:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(slope * z, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 1.0))

        return Pair(model, guide)

    one, two = pair(1.0), pair(1.1)
    found = [bounds.elbo(one, x, 20, seed=s) - bounds.elbo(two, x, 20, seed=s) for s in range(100)]
    means = torch.tensor([each.mean for each in found])
    stated = torch.tensor([each.se_draws for each in found])
    assert float(stated.mean()) == pytest.approx(float(means.std()), rel=0.33)
    apart = bounds.elbo(one, x, 20).se_draws * 2**0.5
    assert apart > 3 * float(stated.mean())  # as if the draws were others
