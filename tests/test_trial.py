"""Trial steps: what is trained gains nothing, what isn't does, and nothing is left changed."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae import VAE, diagnostics, guides, likelihoods, priors
from pvae.diagnostics import trial
from pvae.errors import UndefinedError
from tests import exact

pytestmark = pytest.mark.usefixtures("store")


@pytest.mark.parametrize("kind", ["modules", "functions", "vae", "labels", "discrete", "autoguide"])
def test_an_exact_pair_gains_nothing(kind: str) -> None:
    """Its guide is the posterior, and its data are the model's; a new seed's data, for size."""
    e = exact.KINDS[kind]()
    found = trial(e.pair, e.batch if len(e.batch) > 1 else e.batch[0])
    assert not found.is_unfinished
    assert found.findings()[0].verdict == "good"


def test_rows_are_counted_along_their_axis() -> None:
    e = exact.KINDS["second_axis"]()
    x, _ = e.batch
    found = trial(e.pair, e.batch)
    assert found.num_rows == x.shape[1] // 2 != len(x)
    assert not found.is_unfinished


def test_the_gain_is_the_elbos_of_rows_that_were_not_stepped_on() -> None:
    """One mean of a Gaussian, by hand: Adam moves it by lr a step, and z doesn't matter."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
                pyro.sample("x", dist.Normal(self.mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))

    x = 50 + torch.arange(20.0)
    found = trial((Model(), guide), x, num_steps=3)
    assert found.lr == 0.1
    each = dist.Normal(0.3, 1.0).log_prob(x) - dist.Normal(0.0, 1.0).log_prob(x)
    gains = found.gain.values
    seen = (gains[:, None] - each).abs().argmin(1)  # each is another
    torch.testing.assert_close(gains, each[seen], rtol=1e-3, atol=1e-3)
    assert len(seen.unique()) == 10


def test_nothing_is_left_changed(device: torch.device) -> None:
    """Parameters, gradients, running statistics, modes and generators."""
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    likelihood = likelihoods.Bernoulli(nn.Linear(2, 6), 6)
    vae = VAE(priors.StandardNormal(2), likelihood, guides.MeanField(encoder, 2)).to(device)
    first = next(vae.parameters())
    first.grad = torch.ones_like(first)
    vae.train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    x = torch.rand(40, 6, device=device).round()
    state = torch.get_rng_state()
    trial(vae, x)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert first.grad is not None
    assert bool((first.grad == 1).all())
    assert all(p.grad is None for p in list(vae.parameters())[1:])
    assert vae.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shared_latent_counts_in_nats_of_all_data() -> None:
    """An AutoNormal as it starts is far from the posterior of a hundred data."""
    e = exact.autoguide()
    assert not trial(e.pair, e.batch[0]).is_unfinished
    with torch.no_grad():
        e.pair.guide.locs.g.sub_(1.0)
    found = trial(e.pair, e.batch[0])
    assert found.is_unfinished
    assert found.num_data == exact.N
    (line,) = found.findings()
    assert line.value == pytest.approx(found.gain.mean / exact.N)


def test_refusals() -> None:
    e = exact.frozen()
    with pytest.raises(UndefinedError, match="trainable parameters; got none"):
        trial(e.pair, e.batch[0])
    assert "trial" not in pvae.diagnose(e.pair, e.batch[0], checks=["trial"]).undefined
    e = exact.autoguide()
    with pytest.raises(UndefinedError, match="max_rows=10 rows"):
        diagnostics.trial(e.pair, e.batch[0], max_rows=10)
