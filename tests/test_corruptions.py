"""Corruptions: what they do to data, and when a pair uses them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pvae
from pvae import bounds, corruptions, recipes
from pvae.errors import ArgumentError, PairError

SIGMAS = 4.42  # two-sided false-alarm rate 1e-5


def test_noise_is_normal(device: torch.device) -> None:
    noise = corruptions.Noise(0.5)(torch.full((400, 100), 2.0, device=device)) - 2.0
    count = noise.numel()
    assert abs(float(noise.mean())) < SIGMAS * 0.5 / math.sqrt(count)
    assert abs(float(noise.var()) - 0.25) < SIGMAS * 0.25 * math.sqrt(2 / count)


def test_masking_puts_entries_to_zero(device: torch.device) -> None:
    x = 1 + torch.rand(400, 100, device=device)
    seen = corruptions.Masking(0.3)(x)
    lost = seen == 0
    assert torch.equal(seen[~lost], x[~lost])
    error = math.sqrt(0.3 * 0.7 / x.numel())
    assert abs(float(lost.double().mean()) - 0.3) < SIGMAS * error
    assert torch.equal(corruptions.Masking(0.0)(x), x)
    assert not corruptions.Masking(1.0)(x).any()


def test_salt_and_pepper(device: torch.device) -> None:
    x = torch.full((400, 100), 0.5, device=device)
    seen = corruptions.SaltAndPepper(0.3, low=-1.0, high=2.0)(x)
    for value, share in ((-1.0, 0.15), (2.0, 0.15), (0.5, 0.7)):
        found = float((seen == value).double().mean())
        assert abs(found - share) < SIGMAS * math.sqrt(share * (1 - share) / x.numel())


def test_a_block_is_lost_anywhere_inside(device: torch.device) -> None:
    seen = corruptions.BlockMasking(3, fill=-1.0)(torch.ones(3000, 2, 6, 5, device=device))
    lost = seen == -1.0
    assert torch.equal(lost[:, 0], lost[:, 1])
    assert (lost[:, 0].sum((1, 2)) == 9).all()
    rows, columns = lost[:, 0].any(2).double().argmax(1), lost[:, 0].any(1).double().argmax(1)
    for start, places in ((rows, 4), (columns, 3)):
        counts = torch.bincount(start, minlength=places).double()
        expected = len(start) / places
        assert float(((counts - expected) ** 2 / expected).sum()) < 30  # chi2(3): 1.4e-6
    with pytest.raises(PairError, match=r"at least 3 pixels a side; got 2x5"):
        corruptions.BlockMasking(3)(torch.ones(2, 1, 2, 5))
    with pytest.raises(PairError, match=r"(?s)images.*Masking, for data without"):
        corruptions.BlockMasking(3)(torch.ones(2, 5))


@pytest.mark.parametrize(("size", "factor"), [((6, 8), 2), ((7, 5), 3)])
def test_downsampling_keeps_the_means_of_blocks(size: tuple[int, int], factor: int) -> None:
    x = torch.rand(4, 2, *size)
    part = corruptions.Downsampling(factor)
    small, seen = part.small(x), part(x)
    assert seen.shape == x.shape
    assert small.shape[-2:] == (-(-size[0] // factor), -(-size[1] // factor))
    for i in range(0, size[0], factor):
        for j in range(0, size[1], factor):
            block = x[..., i : i + factor, j : j + factor]
            mean = block.mean((-2, -1))
            torch.testing.assert_close(small[..., i // factor, j // factor], mean)
            there = seen[..., i : i + factor, j : j + factor]
            torch.testing.assert_close(there, mean[..., None, None].expand_as(block))


NUMBER: Any = 0.3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: corruptions.Noise(-1.0), r"Noise\.sigma"),
        (lambda: corruptions.Masking(1.5), r"Masking\.rate: expected a probability"),
        (lambda: corruptions.Downsampling(1), r"Downsampling\.factor"),
        (lambda: recipes.ae(6, 2, corruption=NUMBER), "corruption: expected a function or module"),
    ],
)
def test_bad_arguments(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(ArgumentError, match=words):
        make()


# In a pair


class Adds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 100


def test_the_guide_sees_corrupted_data_and_the_model_scores_clean_ones(
    device: torch.device,
) -> None:
    vae = recipes.ae(6, 2, hidden=(8,), corruption=Adds()).to(device)
    x = torch.rand(5, 6, device=device)
    loss = Trace_ELBO().loss(vae.model, vae.guide, x)
    network, decoder = vae.guide.posterior.get_submodule("network"), vae.model.likelihood
    back = decoder.get_submodule("network")(network(x + 100))
    expected = (x - back).square().sum().detach() + 5 * 3 * math.log(math.pi)
    assert loss == pytest.approx(float(expected), rel=1e-9)


def test_there_is_no_corruption_outside_training(device: torch.device) -> None:
    torch.manual_seed(0)
    clean = recipes.vae(6, 2, hidden=(8,)).to(device)
    torch.manual_seed(0)
    noisy = recipes.vae(6, 2, hidden=(8,), corruption=Adds()).to(device)
    x = torch.rand(5, 6, device=device).round()
    torch.testing.assert_close(noisy.encode(x), clean.encode(x))
    first, second = (bounds.elbo(v, x).mean for v in (clean, noisy))
    assert first == second


def test_corruption_is_fresh_and_a_function_of_the_seed(device: torch.device) -> None:
    x = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    class Watching(corruptions.Masking):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.append(out.clone())
            return out

    for seed in (1, 1, 2):
        torch.manual_seed(0)
        vae = recipes.ae(6, 2, hidden=(8,), corruption=Watching(0.5))
        pvae.fit(
            vae, x, epochs=3, batch_size=None, seed=seed, progress=False,
            device=device,
        )  # fmt: skip
    first, second, third = seen[:3], seen[3:6], seen[6:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], third[0])


def test_several_in_a_row(device: torch.device) -> None:
    both = nn.Sequential(corruptions.Masking(1.0), corruptions.Noise(1.0))
    vae = recipes.vae(6, 2, hidden=(8,), corruption=both).to(device)
    x = torch.rand(50, 6).round()
    run = pvae.fit(vae, x, epochs=2, progress=False, valid=x, device=device, batch_size=25)
    assert np.isfinite(run.history["valid_elbo"]).all()


def test_a_corruption_that_changes_the_shape_is_refused() -> None:
    vae = recipes.ae(6, 2, hidden=(8,), corruption=lambda x: x[:, :3])
    with pytest.raises(PairError, match=r"corruption: expected data of the shape that they had"):
        vae.guide(torch.rand(5, 6))
    assert len(pyro.get_param_store()) == 0
