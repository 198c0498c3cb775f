"""The compiled step gives the eager one's numbers, or says why it can't be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
import zuko
from torch import Tensor, nn

from pvae import VAE, guides, likelihoods, priors, recipes, schedules
from pvae import objectives as o
from pvae import terms as t
from pvae.engine import Stepper, make_optimizer
from tests import pairs

pytestmark = [pytest.mark.usefixtures("store"), pytest.mark.slow]
D, Q, N = 6, 2, 12
Pair = tuple[Any, Any, tuple[Tensor, ...]]


def stepper(pair: Pair, objective: Any, engine: Any, **options: Any) -> Stepper:
    model, guide, batch = pair
    structure = t.inspect_pair(model, guide, batch)
    parameters = list(structure.parameters.values())
    state = objective.make_state(structure, 100) if isinstance(objective, o.Objective) else None
    optimizer = make_optimizer(torch.optim.Adam, parameters, 1e-2)
    return Stepper(
        model, guide, objective, structure, optimizer, state, options.get("clip_norm"), engine
    )


def run(made: Stepper, batches: list[tuple[Tensor, ...]]) -> list[dict[str, float]]:
    found = []
    torch.manual_seed(3)
    with pyro.validation_enabled(is_validate=False):
        for step, batch in enumerate(batches):
            made(batch, step)
            found.append(made.averages())
    return found


def vae(device: torch.device, **options: Any) -> Pair:
    pair = recipes.vae(D, Q, hidden=(8,), **options).to(device)
    return pair.model, pair.guide, (torch.rand(N, D, device=device).round(),)


def noisy(device: torch.device) -> Pair:
    """Dropout and batch norm on both sides."""

    def layers(start: int, end: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(start, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, end)
        )

    pair = VAE(
        priors.StandardNormal(Q),
        likelihoods.Bernoulli(lambda p: layers(Q, p * D), D),
        guides.MeanField(layers(D, 2 * Q), Q),
    ).to(device)
    return pair.model, pair.guide, (torch.rand(N, D, device=device).round(),)


def flow(device: torch.device) -> Pair:
    pair = VAE(
        zuko.flows.NSF(Q, transforms=1, hidden_features=[8], bins=3),
        likelihoods.Bernoulli(lambda p: nn.Linear(Q, p * D), D),
        zuko.flows.MAF(Q, D, transforms=1, hidden_features=[8]),
    ).to(device)
    return pair.model, pair.guide, (torch.rand(N, D, device=device).round(),)


def contractive(device: torch.device) -> Pair:
    pair = recipes.contractive_ae(D, Q, hidden=(8,)).to(device)
    return pair.model, pair.guide, (torch.rand(N, D, device=device),)


def codebook(device: torch.device) -> Pair:
    pair = recipes.vq_vae(D, Q, hidden=(8,)).to(device)
    return pair.model, pair.guide, (torch.rand(N, D, device=device),)


CASES: dict[str, tuple[Callable[[torch.device], Pair], o.Objective]] = {
    "warm-up": (vae, o.ELBO(beta=schedules.Warmup(4))),
    "dropout and batch norm": (noisy, o.ELBO()),
    "flows, K particles": (flow, o.IWAE(3)),
    "DReG": (vae, o.DReG(3)),
    "a multiplier": (vae, o.GECO(5.0, speed=0.1)),
    "a classifier": (vae, o.FactorVAE(hidden=(4,), lr=1e-2)),
    "two sites": (pairs.two_sites, o.STL(2)),
    "score functions": (pairs.discrete, o.VIMCO(3)),
    "the store": (pairs.functions, o.ELBO()),
    "pyro.module": (pairs.pyro_modules, o.ELBO()),
    "enumeration": (pairs.enumerated, o.ELBO()),
    "subsampling": (pairs.subsample_drawn, o.ELBO()),
    "masks": (pairs.masked, o.ELBO()),
    "an autoguide": (pairs.autoguide, o.ELBO()),
    "a global latent": (pairs.global_latent, o.ELBO(2)),
    "contractive": (contractive, o.ELBO()),
    "a codebook": (codebook, o.ELBO()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_the_eager_ones(case: str, device: torch.device) -> None:
    make, objective = CASES[case]
    found, ends = {}, {}
    for engine in ("eager", "compiled"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        pair = make(device)
        made = stepper(pair, objective, engine, clip_norm=2.0)
        batches = [tuple(x.roll(i, 0) for x in pair[2]) for i in range(6)]
        found[engine] = run(made, batches)
        assert made.engine == engine
        ends[engine] = [x.detach().clone() for x in (*made.parameters, *made._changing())]
    for eager, compiled in zip(found["eager"], found["compiled"], strict=True):
        assert compiled == pytest.approx(eager, rel=1e-6, nan_ok=True)
    for a, b in zip(ends["eager"], ends["compiled"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
