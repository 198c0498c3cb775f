"""Networks in bfloat16, densities in float32."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pvae
from pvae import VAE, bounds, guides, likelihoods, priors, recipes
from pvae.errors import ArgumentError, PairError
from tests import fits


class _Spy(nn.Linear):
    """Notes the types that it computes in."""

    def __init__(self, size: int, end: int) -> None:
        super().__init__(size, end)
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        self.seen.add(result.dtype)
        return result


class _Bare(nn.Module):
    """A guide with a matrix product outside any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fits.Q, fits.D) / 10)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = F.linear(x, self.weight)
            pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))


def build() -> VAE:
    torch.manual_seed(0)
    layers = nn.Sequential(_Spy(fits.D, 8), nn.Tanh(), nn.Linear(8, 2 * fits.Q))
    pair = VAE(
        priors.StandardNormal(fits.Q),
        likelihoods.Gaussian(nn.Linear(fits.Q, fits.D), fits.D, sigma=1.0),
        guides.MeanField(layers, fits.Q),
    )
    return pair.float()


def trained(device: torch.device, **options: Any) -> tuple[VAE, pvae.Fit]:
    pair = build()
    x = fits.binary().float()
    return pair, fits.fit(pair, x, epochs=3, lr=1e-2, device=device, **options)


def test_layers_are_narrow_and_nothing_else_is(device: torch.device) -> None:
    narrow, run = trained(device, precision="bf16")
    spy = next(m for m in narrow.modules() if isinstance(m, _Spy))
    assert torch.bfloat16 in spy.seen
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    spy.seen.clear()
    bounds.elbo(narrow, fits.binary().float().to(device))
    assert set(spy.seen) == {torch.float32}
    full = trained(device)[1]
    ours, theirs = ([r["elbo"] for r in f.history] for f in (run, full))
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert ours[-1] > ours[0]


@pytest.mark.slow
def test_compiled_steps_are_the_same(device: torch.device) -> None:
    ends = [
        trained(device, precision="bf16", engine=engine)[1].history[-1]["elbo"]
        for engine in ("eager", "compiled")
    ]
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)


def test_a_narrow_density_is_refused(device: torch.device) -> None:
    model, guide = build().model, _Bare().float()
    with pytest.raises(PairError, match=r"site 'z'.*float32 with precision='bf16'.*bfloat16"):
        fits.fit((model, guide), fits.binary().float(), precision="bf16", device=device)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, "'full' or 'bf16'"),
        ({"precision": "bf16", "objective": pyro.infer.TraceMeanField_ELBO()}, "of pvae's"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str, device: torch.device) -> None:
    pair = build()
    with pytest.raises(ArgumentError, match=words):
        fits.fit(pair, fits.binary().float(), device=device, **options)


def test_double_pairs_are_refused(device: torch.device) -> None:
    pair = recipes.vae(fits.D, fits.Q, hidden=(8,))
    with pytest.raises(ArgumentError, match="a pair in float32"):
        fits.fit(pair, fits.binary(), precision="bf16", device=device)
