"""Every objective on every kind of pair: it trains, or it refuses before anything has moved."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

import pvae
from pvae import objectives as o
from pvae import recipes
from pvae.errors import PvaeError, PvaeWarning
from pvae.objectives.table import ALL
from pvae.pair import Pair
from tests import pairs

pytestmark = [pytest.mark.usefixtures("store"), pytest.mark.slow]
OPTIONS: dict[str, dict[str, Any]] = {
    "Capacity": {"capacity": 0.5, "gamma": 3.0},
    "GECO": {"tolerance": 8.0, "speed": 1e-2},
    "TCVAE": {"num_data": 100},
    "InfoVAE": {"scale": 5.0},
    "FactorVAE": {"hidden": (16,), "gamma": 1.0, "lr": 1e-2},
}


def vae(device: torch.device) -> pairs.Pair:
    pair = recipes.vae(pairs.D, 2, hidden=(8,), likelihood=pvae.likelihoods.Gaussian).to(device)
    return pair.model, pair.guide, (pairs.data(12, device),)


def autoencoder(device: torch.device) -> pairs.Pair:
    pair = recipes.ae(pairs.D, 2, hidden=(8,)).to(device)
    return pair.model, pair.guide, (pairs.data(12, device),)


KINDS = {**pairs.PAIRS, "vae": vae, "point": autoencoder}
REFUSED: dict[
    str, dict[str, str]
] = {  # the ELBO is for all of them; what the others say no to, and why
    "autoguide": {"local": "global site"},
    "global_latent": {"local": "global site"},
    "discrete": {"gradient": "whose draws have no gradient"},
    "enumerated": {"split": "c"},
    "point": {"density": "a point mass"},
}


def expected_refusal(kind: type[o.Objective], pair: str) -> str | None:
    reasons = REFUSED.get(pair, {})
    for need in kind.needs:
        if need in reasons:
            return reasons[need]
    aggregates = (o.TCVAE, o.InfoVAE, o.FactorVAE, o.DIPVAE)
    if kind in aggregates and pair == "two_sites":
        return "one latent site"
    if kind in aggregates and pair == "masked":
        return "without a mask"
    return None


def value(objective: Any, model: Any, guide: Any, batch: Any) -> float:
    """The loss, averaged over draws; of an upper bound, which a better model raises, the ELBO."""
    measured = o.ELBO() if objective.bound == "upper" else objective
    total = 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        total += measured.loss(model, guide, *batch)
    return total / 20


@pytest.mark.parametrize("pair", KINDS)
@pytest.mark.parametrize("kind", ALL, ids=lambda k: k.__name__)
def test_it_trains_or_refuses(
    kind: type[o.Objective], pair: str, device: torch.device, tmp_path: Path
) -> None:
    model, guide, batch = KINDS[pair](device)
    options = OPTIONS.get(kind.__name__, {})
    if "num_particles" in inspect.signature(kind).parameters:
        options = {**options, "vectorize_particles": True}
    objective = kind(**options)
    reason = expected_refusal(kind, pair)
    parameters = Pair(model, guide).inspect(batch).parameters
    before = {name: p.detach().clone() for name, p in parameters.items()}
    if reason is not None:
        with pytest.raises(PvaeError, match=reason):
            pvae.fit((model, guide), batch, objective, epochs=2, progress=False, device=device)
        for name, p in parameters.items():
            assert torch.equal(p, before[name])
        with pytest.raises(PvaeError, match=reason):
            kind(**options).differentiable_loss(model, guide, *batch)
        return
    first = value(objective, model, guide, batch)
    objective.loss_and_grads(model, guide, *batch)
    for name, p in parameters.items():
        assert p.grad is not None, f"no gradient of {name}"
        assert bool(p.grad.isfinite().all()), f"a gradient of {name} that isn't finite"
        p.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PvaeWarning)
        run = pvae.fit(
            (model, guide),
            batch,
            kind(**options),
            epochs=60,
            batch_size=None,
            lr=2e-2,
            progress=False,
            device=device,
        )
    assert value(kind(**options), model, guide, batch) < first
    assert all(torch.isfinite(torch.tensor(run.history["loss"])))
    assert all(torch.isfinite(torch.tensor(run.history[run.structure.quantity])))


@pytest.mark.parametrize("kind", ALL, ids=lambda k: k.__name__)
def test_it_runs_in_pyros_svi(kind: type[o.Objective], device: torch.device) -> None:
    model, guide, batch = vae(device)
    objective = kind(**OPTIONS.get(kind.__name__, {}))
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), objective)
    losses = [svi.step(*batch) for _ in range(3)]
    assert all(isinstance(loss, float) for loss in losses)
    for p, old in zip((*model.parameters(), *guide.parameters()), before, strict=True):
        assert not torch.equal(p, old)
    torch.manual_seed(0)
    svi.evaluate_loss(*batch)
