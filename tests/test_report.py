"""The summary of a fit, and the numbers in it."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pvae import VAE, bounds, diagnostics, guides, likelihoods, priors, recipes, report
from pvae.errors import UndefinedError
from pvae.networks import MLP
from tests import pairs

D, Q = 6, 3


def lines(summary: report.Summary) -> dict[str, tuple[str, str]]:
    return {name: (value, remark) for name, value, remark in summary.lines}


def test_the_numbers_are_those_of_bounds(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    x = torch.rand(50, D).round()
    summary = report.summarize(vae, x, levels=2, num_particles=40, seconds=3.2)
    found = lines(summary)
    lower = bounds.elbo(vae, x, 10)
    best = bounds.evidence(vae, x, 40)
    assert found["ELBO"][0].startswith(f"{lower.mean:.2f} +- {lower.se_data:.2g}")
    assert found["evidence"][0].startswith(f"{best.mean:.2f} +- ")
    assert lower.rate is not None
    assert found["rate"][0] == f"{lower.rate.mean:.2f}"
    bits = -best.mean / D / math.log(2)
    assert found["bits per dimension"][0] == f"{bits:.3f}"
    assert found["training"][0] == "3 s"
    assert str(summary).splitlines()[-1].startswith("next: ")
    assert len(str(summary).splitlines()) < 24
    assert max(map(len, str(summary).splitlines())) < 100


def test_bits_per_dimension_are_left_out_or_have_a_bin(device: torch.device) -> None:
    vae = VAE(
        priors.StandardNormal(Q),
        likelihoods.Gaussian(MLP(Q, D, (8,)), D, sigma=1.0),
        guides.MeanField(MLP(D, 2 * Q, (8,)), Q),
    ).to(device)
    x = torch.rand(20, D)
    plain = lines(report.summarize(vae, x, num_particles=5))
    assert "bits per dimension" not in plain
    binned = lines(report.summarize(vae, x, num_particles=5, bin_width=1 / 255))
    value = bounds.evidence(vae, x, 5).mean
    expected = -(value / D + math.log(1 / 255)) / math.log(2)
    assert binned["bits per dimension"][0] == f"{expected:.3f}"
    assert "bins of 0.003922" in binned["bits per dimension"][1]


def test_uniform_noise_costs_its_bits() -> None:
    """256 equally likely levels are 8 bits; a uniform density in bins of 1/256 is the same."""
    assert report.bits_per_dimension(-10 * math.log(256), 10) == pytest.approx(8)
    assert report.bits_per_dimension(0.0, 10, bin_width=1 / 256) == pytest.approx(8)


def test_an_autoencoder_gets_what_is_defined_and_why_the_rest_isnt(device: torch.device) -> None:
    ae = recipes.ae(D, Q, hidden=(8,)).to(device)
    summary = report.summarize(ae, torch.rand(20, D), bin_width=0.1)
    found = lines(summary)
    assert "ELBO" not in found
    assert found["evidence"] == ("not defined", "a point mass (Delta) at site 'z'")
    assert found["rate"][0] == "not defined"
    assert found["bits per dimension"][0] == "not defined"
    assert float(found["distortion"][0]) > 0
    assert "stochastic" in summary.advice


def test_an_improper_prior_has_no_evidence(device: torch.device) -> None:
    vae = VAE(
        priors.Flat(Q),
        likelihoods.Bernoulli(MLP(Q, D, (8,)), D),
        guides.MeanField(MLP(D, 2 * Q, (8,)), Q),
    ).to(device)
    summary = report.summarize(vae, torch.rand(20, D).round(), levels=2)
    found = lines(summary)
    assert "ELBO" not in found
    assert "unnormalised ELBO" in found
    for name in ("evidence", "rate", "bits per dimension"):
        assert found[name][0] == "not defined"


@pytest.mark.usefixtures("store")
def test_any_pair_has_a_summary(device: torch.device) -> None:
    for name in ("two_sites", "global_latent", "masked", "functions"):
        model, guide, batch = pairs.PAIRS[name](device)
        assert "ELBO" in lines(report.summarize((model, guide), batch, num_particles=5))


def history(values: list[float]) -> list[dict[str, float]]:
    return [{"epoch": i, "valid_elbo": v} for i, v in enumerate(values)]


def test_advice_follows_the_trouble(device: torch.device) -> None:
    vae = recipes.vae(D, Q, hidden=(8,)).to(device)
    last = vae.guide.posterior.get_parameter("network.layers.2.weight")
    last.data *= 20  # far from collapse
    x = torch.rand(50, D).round()

    def advice(values: list[float]) -> str:
        return report.summarize(vae, x, num_particles=5, history=history(values)).advice

    assert "still rises" in advice([-50.0 + i for i in range(20)])
    assert "fell after its best epoch" in advice([-50.0 + i for i in range(10)] + [-60.0] * 20)
    torch.nn.init.zeros_(last)
    assert "posterior collapse" in advice([-50.0] * 3)
    assert "still rises" in advice([-50.0 + i for i in range(20)])  # first things first


# Active units


def test_active_units_are_those_that_depend_on_the_data(device: torch.device) -> None:
    """The encoder's mean is x's first two features, times 2 and 0.05, and a constant."""

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = torch.nn.Parameter(torch.zeros(Q))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scale = torch.tensor([2.0, 0.05, 0.0], device=x.device)
            return x[:, :Q] * scale, self.raw.expand(len(x), Q)

    vae = VAE(
        priors.StandardNormal(Q),
        likelihoods.Gaussian(MLP(Q, D, (8,)), D, sigma=1.0),
        guides.MeanField(Encoder(), Q),
    ).to(device)
    x = torch.randn(500, D)
    active = diagnostics.active_units(vae, x)
    assert active.tolist() == [True, False, False]
    lower = diagnostics.active_units(vae, x, threshold=1e-3)
    assert lower.tolist() == [True, True, False]


def test_a_latent_fed_by_another_draw_isnt_active_by_that(device: torch.device) -> None:
    """q(z1 | x) q(z2 | z1): what z2 varies by given z1 is no dependence on the data."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("z2", dist.Normal(z1, 1.0))

    x = torch.randn(400, device=device)
    assert not diagnostics.active_units((model, guide), x, site="z2", num_particles=400)
    with pytest.raises(UndefinedError, match="'nope'; there are: 'z1' and 'z2'"):
        diagnostics.active_units((model, guide), x, site="nope")


def test_active_units_without_a_known_mean(device: torch.device) -> None:
    """By draws, whose noise is taken off: variance over data of the mean of 32 draws is 1/32."""

    class Opaque(pyro_distribution()):  # type: ignore[misc]
        @property
        def mean(self) -> torch.Tensor:
            raise NotImplementedError

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(Q))

        def forward(self, x: torch.Tensor) -> object:
            loc = x[:, :Q] * torch.tensor([2.0, 0.0, 0.0], device=x.device)
            return Opaque(loc, self.scale.expand(len(x), Q)).to_event(1)

    vae = VAE(
        priors.StandardNormal(Q), likelihoods.Gaussian(MLP(Q, D, (8,)), D, sigma=1.0), Encoder()
    ).to(device)
    active = diagnostics.active_units(vae, torch.randn(2000, D))
    assert active.tolist() == [True, False, False]


def pyro_distribution() -> type:
    import pyro.distributions as dist

    return dist.Normal


def test_which_site(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    with pytest.raises(UndefinedError, match="site='z2'"):
        diagnostics.active_units((model, guide), batch)
    assert diagnostics.active_units((model, guide), batch, site="z1").shape == (2,)
