"""Measures of codes: sparsity and sensitivity."""

from __future__ import annotations

import math

import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, nn

from pvae import diagnostics, recipes, report
from pvae.errors import PvaeError, UndefinedError
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
    summary = report.summarize((vae.model, point), x)
    assert ("sensitivity", "not defined") in [line[:2] for line in summary.lines]
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


def test_the_report_of_an_autoencoder_has_no_scale(device: torch.device) -> None:
    """A code that shrinks and a decoder that grows change neither line."""
    ae = recipes.ae(D, Q, hidden=()).to(device)
    x = torch.rand(50, D, device=device)
    before = report.summarize(ae, x)
    with torch.no_grad():
        for parameter in ae.guide.parameters():
            parameter.mul_(1e-3)
        for name, parameter in ae.model.named_parameters():
            if "weight" in name:
                parameter.mul_(1e3)
    after = report.summarize(ae, x)
    for name in ("sparsity", "sensitivity"):
        first, second = ({k: v for k, v, _ in s.lines}[name] for s in (before, after))
        assert first == second
