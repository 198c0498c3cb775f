"""Measures of codes: which units are active, sparsity and sensitivity."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, nn

import pvae
from pvae import VAE, diagnostics, guides, likelihoods, priors, recipes
from pvae.errors import PvaeError, UndefinedError
from pvae.networks import MLP
from tests import pairs

D, Q = 6, 3


def test_hoyer_at_its_ends_and_between() -> None:
    """0 for entries alike, 1 for a single one, the formula between, whatever the scale."""
    ends = torch.tensor([[2.0, -2.0, 2.0, 2.0], [0.0, 0.0, -5.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert diagnostics.hoyer(ends).tolist() == pytest.approx([0.0, 1.0, 1.0])
    z = torch.randn(20, 7)
    expected = [
        (math.sqrt(7) - sum(map(abs, row)) / math.hypot(*row)) / (math.sqrt(7) - 1)
        for row in z.tolist()
    ]
    assert diagnostics.hoyer(z).tolist() == pytest.approx(expected)
    torch.testing.assert_close(diagnostics.hoyer(z), diagnostics.hoyer(1e-3 * z))
    with pytest.raises(PvaeError, match="entries of a code"):
        diagnostics.hoyer(torch.zeros(5, 1))


def test_near_zero_has_the_codes_own_scale() -> None:
    z = torch.tensor([[1.0, 1e-9, 0.0], [1.0, 2.0, 3.0]])
    for scale in (1.0, 1e-6):
        assert diagnostics.near_zero(scale * z).tolist() == pytest.approx([2 / 3, 0.0])


def test_sensitivity_is_the_norm_of_the_jacobian(device: torch.device) -> None:
    x = torch.rand(10, D, device=device).round()
    for make in (recipes.ae, recipes.vae):
        vae = make(D, Q, hidden=(8,)).to(device)
        encoder = vae.guide.posterior.get_submodule("network")
        jacobians = torch.func.vmap(torch.func.jacrev(lambda v: encoder(v)[:Q]))(x)  # noqa: B023
        expected = jacobians.flatten(1).norm(dim=1)
        found = diagnostics.sensitivity(vae, x, max_rows=4)
        torch.testing.assert_close(found, expected)
        many = diagnostics.sensitivity(vae, x, num_probes=4000)
        torch.testing.assert_close(many, expected, rtol=0.15, atol=0)
    assert all(p.grad is None for p in vae.parameters())


@pytest.mark.usefixtures("store")
def test_sensitivity_of_any_pair(device: torch.device) -> None:
    model, guide, batch = pairs.labels(device)
    found = diagnostics.sensitivity((model, guide), batch)
    weight = guide.encoder.weight[:2, : batch[0].shape[1]]
    torch.testing.assert_close(found, weight.norm().detach().expand(12))
    model, guide, batch = pairs.two_sites(device)
    with pytest.raises(UndefinedError, match="site=NAME"):
        diagnostics.sensitivity((model, guide), batch)


@pytest.mark.usefixtures("store")
def test_sensitivity_where_there_is_none(device: torch.device) -> None:
    model, guide, batch = pairs.subsample_drawn(device)
    with pytest.raises(UndefinedError, match="one that subsamples its data"):
        diagnostics.sensitivity((model, guide), batch)
    vae = recipes.vae(D, 2, hidden=(8,)).to(device)
    x = torch.rand(12, D, device=device).round()
    point = AutoDelta(vae.model)
    point(x)
    screen = pvae.diagnose((vae.model, point), x, checks=["codes"])
    assert "subsamples its data" in screen.missing["sensitivity"]
    step = recipes.ae(D, Q).to(device)
    step.guide.posterior.network = nn.Sequential(Step(), nn.Linear(D, Q)).to(device)
    assert diagnostics.sensitivity(step, x).tolist() == [0.0] * 12
    counts = torch.randint(0, 5, (12, D), device=device)
    ae = recipes.ae(D, Q).to(device)
    found = diagnostics.sensitivity(ae, counts)
    torch.testing.assert_close(found, diagnostics.sensitivity(ae, counts.double()))


class Step(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0.5).to(x.dtype)


def test_the_screen_of_an_autoencoder_has_no_scale(device: torch.device) -> None:
    """A code that shrinks and a decoder that grows change neither line."""
    ae = recipes.ae(D, Q, hidden=()).to(device)
    x = torch.rand(50, D, device=device)
    before = pvae.diagnose(ae, x, checks=["codes"]).findings()
    with torch.no_grad():
        for parameter in ae.guide.parameters():
            parameter.mul_(1e-3)
        for name, parameter in ae.model.named_parameters():
            if "weight" in name:
                parameter.mul_(1e3)
    after = pvae.diagnose(ae, x, checks=["codes"]).findings()
    assert [line.name for line in before] == ["sparsity", "sensitivity"]
    assert [line.number for line in before] == [line.number for line in after]


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

    class Opaque(dist.Normal):
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


def test_which_site(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    with pytest.raises(UndefinedError, match="site='z2'"):
        diagnostics.active_units((model, guide), batch)
    assert diagnostics.active_units((model, guide), batch, site="z1").shape == (2,)


def test_one_check_is_asked_for_by_its_name() -> None:
    vae = pvae.recipes.vae(6, 2, hidden=(4,))
    x = torch.rand(20, 6).round()
    one = pvae.diagnose(vae, x, checks="codes").findings()
    assert one == pvae.diagnose(vae, x, checks=["codes"]).findings()
