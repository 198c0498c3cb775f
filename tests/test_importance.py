"""Importance weights, what they say of the evidence, and the k-hat of their tails."""

from __future__ import annotations

import pytest
import torch

from pvae import bounds, priors, recipes
from pvae import terms as t
from pvae.errors import ArgumentError, UndefinedError
from tests import gaussian, pairs

# log weights


def test_log_weights_are_those_written_out(device: torch.device) -> None:
    """At the draws of a pass with the same generators."""
    model, guide = gaussian.pair(device)
    x = torch.randn(6, device=device)
    structure = t.inspect_pair(model, guide, x)
    found = bounds.log_weights(model, guide, x, 4, seed=3, structure=structure)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        terms = t.compute(model, guide, x, structure=structure, num_particles=4)
        z = terms.sites["z"].value
        assert z is not None
        expected = gaussian.log_weights(model, guide, x, z)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("max_rows", [1, 7, 10_000])
def test_log_weights_in_chunks(max_rows: int, device: torch.device) -> None:
    """With the exact guide every weight is the evidence, whatever the chunks."""
    model = gaussian.GaussianModel().to(device)
    guide, x = gaussian.exact_guide(model).to(device), torch.randn(9, device=device)
    found = bounds.log_weights(model, guide, x, 20, max_rows=max_rows)
    expected = gaussian.log_evidence(model, x).detach().expand(20, 9)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("name", pairs.PAIRS)
def test_log_weights_of_any_pair(name: str, device: torch.device) -> None:
    """What `bounds.evidence` makes of the same draws, or a refusal by name."""
    model, guide, batch = pairs.PAIRS[name](device)
    if name in pairs.GLOBAL:
        with pytest.raises(UndefinedError, match="global site"):
            bounds.log_weights(model, guide, batch, 5)
        return
    found = bounds.log_weights(model, guide, batch, 5, seed=1)
    evidence = bounds.evidence(model, guide, batch, 5, seed=1)
    torch.testing.assert_close(found.logsumexp(0) - torch.tensor(5.0).log(), evidence.per_datum)


def test_log_weights_need_densities(device: torch.device) -> None:
    x = torch.rand(20, 5).round()
    ae = recipes.ae(5, 2, hidden=(8,)).to(device)
    with pytest.raises(UndefinedError, match=r"point mass \(Delta\) at site 'z'"):
        bounds.log_weights(ae.model, ae.guide, x)
    vae = recipes.vae(5, 2, prior=priors.Flat, hidden=(8,)).to(device)
    with pytest.raises(UndefinedError, match="improper prior"):
        bounds.log_weights(vae.model, vae.guide, x)
    with pytest.raises(ArgumentError, match="num_particles"):
        bounds.log_weights(vae.model, vae.guide, x, 0)
