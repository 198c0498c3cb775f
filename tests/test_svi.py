"""pvae.SVI takes the steps that Pyro's SVI takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

import pvae
from pvae import objectives, schedules
from pvae.errors import ArgumentError, PairError, PvaeWarning
from pvae.pair import Pair
from tests import pairs

pytestmark = pytest.mark.usefixtures("store")
ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.99)}


def by_name(name: str) -> dict[str, Any]:
    return {"lr": 1e-2 if "bias" in name else 1e-3}


def announced(name: str, program: Any) -> Any:
    """The program with what Pyro's SVI needs to find a plain module's parameters."""
    if isinstance(program, PyroModule) or not isinstance(program, nn.Module):
        return program

    def run(*batch: Tensor) -> Any:
        pyro.module(name, program)
        return program(*batch)

    return run


def trained(
    svi: Callable[..., Any], pair: str, optim: Any, loss: Any, device: torch.device
) -> tuple[list[float], list[Tensor]]:
    """Losses of five steps, and where the parameters end."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, batch = pairs.PAIRS[pair](device)
    if svi in (pyro.infer.SVI, pvae.SVI):
        model, guide = announced("model", model), announced("guide", guide)
    structure = Pair(model, guide).inspect(batch)
    torch.manual_seed(1)
    made = svi(model, guide, optim, loss)
    losses = [made.step(*batch) for _ in range(5)]
    return losses, [p.detach().clone() for p in structure.parameters.values()]


@pytest.mark.parametrize("optim", [ADAM, by_name], ids=["settings", "settings by name"])
@pytest.mark.parametrize("pair", ["functions", "pyro_modules", "two_sites", "subsample_given"])
def test_steps_are_pyros(pair: str, optim: Any, device: torch.device) -> None:
    ends = [
        trained(svi, pair, pyro.optim.Adam(optim), Trace_ELBO(), device)
        for svi in (pyro.infer.SVI, pvae.SVI)
    ]
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-9)
    for ours, theirs in zip(ends[1][1], ends[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "optim",
    [pyro.optim.SGD({"lr": 1e-5}), pyro.optim.ClippedAdam({"lr": 1e-2, "clip_norm": 0.1})],
    ids=["SGD", "ClippedAdam"],
)
def test_optimisers_that_see_the_size_of_the_loss(optim: Any, device: torch.device) -> None:
    ends = [
        trained(svi, "subsample_given", optim, Trace_ELBO(), device)[1]
        for svi in (pyro.infer.SVI, pvae.SVI)
    ]
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("pair", "loss"),
    [
        ("functions", TraceMeanField_ELBO()),
        ("two_sites", RenyiELBO(alpha=0, num_particles=2)),
        ("enumerated", TraceEnum_ELBO(max_plate_nesting=1)),
    ],
)
def test_pyros_objectives_run_as_they_are(pair: str, loss: Any, device: torch.device) -> None:
    (theirs, _), (ours, _) = (
        trained(svi, pair, pyro.optim.Adam(ADAM), loss, device)
        for svi in (pyro.infer.SVI, pvae.SVI)
    )
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_torch_optimisers(device: torch.device) -> None:
    expected, _ = trained(
        pvae.SVI, "two_sites", pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(), device
    )
    factory = functools.partial(torch.optim.Adam, lr=1e-3)
    assert trained(pvae.SVI, "two_sites", factory, Trace_ELBO(), device)[0] == expected

    def of_pair(model: Any, guide: Any, optim: Any, loss: Any) -> Any:
        made = factory([*model.parameters(), *guide.parameters()])
        return pvae.SVI(model, guide, made, loss)

    found, _ = trained(of_pair, "two_sites", None, Trace_ELBO(), device)
    assert found == pytest.approx([*map(float, expected)])


def test_schedules_advance_by_steps_alone(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    loss = objectives.ELBO(beta=schedules.Warmup(4))
    svi = pvae.SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), loss)
    values = []
    for _ in range(6):
        torch.manual_seed(0)
        values.append(svi.evaluate_loss(*batch))
        torch.manual_seed(0)
        assert svi.step(*batch) == pytest.approx(values[-1])
    assert len(set(values[:5])) == 5
    assert values[4] == pytest.approx(values[5])
    torch.manual_seed(0)
    assert values[5] == pytest.approx(objectives.ELBO().loss(model, guide, *batch))
    of_pyro = pvae.SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), RenyiELBO(num_particles=2))
    assert of_pyro.evaluate_loss(*batch) > 0


def test_a_step_that_fails_is_skipped(device: torch.device) -> None:
    model, guide, (x,) = pairs.two_sites(device)
    svi = pvae.SVI(model, guide, pyro.optim.Adam(ADAM), Trace_ELBO())
    svi.step(x)
    before = [p.detach().clone() for p in model.parameters()]
    bad = x.clone()
    bad[0] = float("nan")
    with pytest.warns(PvaeWarning, match=r"Step 1 isn't finite, at .*skipped"):
        svi.step(bad)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    svi.step(x)
    assert not torch.equal(next(model.parameters()), before[0])


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        (torch.optim.SGD([torch.zeros(2, requires_grad=True)]), "one without 'model"),
        (torch.optim.LBFGS, "LBFGS doesn't support"),
    ],
    ids=["other parameters", "LBFGS"],
)
def test_optimisers_that_are_refused(optim: Any, words: str, device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    with pytest.raises(ArgumentError, match=words):
        pvae.SVI(model, guide, optim, Trace_ELBO()).step(*batch)


def test_objectives_that_are_refused(device: torch.device) -> None:
    model, guide, batch = pairs.discrete(device)
    with pytest.raises(PairError, match="whose draws have no gradient"):
        pvae.SVI(model, guide, pyro.optim.Adam(ADAM), objectives.DReG(2)).step(*batch)
    with pytest.raises(ArgumentError, match=r"one of pyro\.infer's ELBOs"):
        pvae.SVI(model, guide, pyro.optim.Adam(ADAM), "elbo")


@pytest.mark.slow
def test_compiled_steps_are_pyros(device: torch.device) -> None:
    compiled = functools.partial(pvae.SVI, engine="compiled")
    (theirs, _), (ours, _) = (
        trained(svi, "two_sites", pyro.optim.Adam(ADAM), Trace_ELBO(), device)
        for svi in (pyro.infer.SVI, compiled)
    )
    assert ours == pytest.approx(theirs, rel=1e-8)
