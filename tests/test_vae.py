"""The pair in plain Pyro, untouched, and the learning and the sampling algorithm."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    Trace_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from torch import Tensor, nn

from pvae import VAE, guides, likelihoods, priors, randomness, recipes
from pvae.errors import ArgumentError, PairError, UndefinedError
from pvae.networks import MLP
from pvae.testing import check_pair

D, Q, N = 6, 2, 12


def vae(device: torch.device, **options: Any) -> VAE:
    return recipes.vae(D, Q, hidden=(8,), **options).to(device)


def data(device: torch.device) -> Tensor:
    return torch.rand(N, D, device=device).round()


def moved(before: dict[str, Tensor], pair: nn.Module) -> dict[str, bool]:
    return {name: bool((before[name] != p).any()) for name, p in pair.named_parameters()}


def test_plain_svi_trains_every_parameter_and_nothing_else(device: torch.device) -> None:
    pair, bystander, x = vae(device), vae(device), data(device)
    before, beside = copy.deepcopy(pair.state_dict()), copy.deepcopy(bystander.state_dict())
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    loss = svi.step(x)
    assert isinstance(loss, float)
    assert all(moved(before, pair).values())
    assert not any(moved(beside, bystander).values())
    assert len(pyro.get_param_store()) == 0
    svi.evaluate_loss(x)
    other = SVI(bystander.model, bystander.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    after = copy.deepcopy(pair.state_dict())
    other.step(x)
    assert all(moved(beside, bystander).values())
    assert not any(moved(after, pair).values())


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        pyro.infer.TraceGraph_ELBO(),
        pyro.infer.RenyiELBO(alpha=0.0, num_particles=3, vectorize_particles=True),
        pyro.infer.TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    ],
    ids=lambda e: type(e).__name__,
)
def test_pyros_elbos_train_it(elbo: Any, device: torch.device) -> None:
    pair, x = vae(device), data(device)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    losses = [svi.step(x) for _ in range(150)]
    assert sum(losses[-20:]) < sum(losses[:20])


def test_the_elbo_as_a_module_with_a_torch_optimiser(device: torch.device) -> None:
    pair, x = vae(device), data(device)
    loss_of = Trace_ELBO()(pair.model, pair.guide)
    assert {id(p) for p in loss_of.parameters()} == {id(p) for p in pair.parameters()}
    before = copy.deepcopy(pair.state_dict())
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=1e-3)
    loss_of(x).backward()
    optimizer.step()
    assert all(moved(before, pair).values())
    assert len(pyro.get_param_store()) == 0


def test_a_trained_pair_can_be_copied_and_pickled(device: torch.device) -> None:
    pair, x = vae(device), data(device)
    SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
    for other in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):  # noqa: S301
        torch.testing.assert_close(other.encode(x), pair.encode(x))


def test_model_and_guide_announce_different_names(device: torch.device) -> None:
    """SVI collects parameters of both in one trace: a shared name would hide one of them."""
    pair, x = vae(device), data(device)
    names = []
    for program in (pair.model, pair.guide):
        trace = pyro.poutine.trace(program).get_trace(x)
        names += list(trace.param_nodes)
    assert len(names) == len(set(names)) == len(list(pair.parameters()))


def test_frozen_parameters_stay(device: torch.device) -> None:
    pair, x = vae(device), data(device)
    pair.model.requires_grad_(False)  # noqa: FBT003
    before = copy.deepcopy(pair.state_dict())
    SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
    assert all(name.startswith("guide") == yes for name, yes in moved(before, pair).items())


# Sampling, encoding, decoding


def test_sampling_needs_no_encoder(device: torch.device) -> None:
    pair = vae(device)
    del pair.guide
    x = pair.sample(7)
    assert x.shape == (7, D)
    assert set(x.unique().tolist()) <= {0.0, 1.0}
    assert pair.sample(7, mean=True).unique().numel() > 2
    assert pair.decode(torch.zeros(3, Q)).shape == (3, D)


def test_samples_follow_the_sampling_algorithm(device: torch.device) -> None:
    """Draw z from the prior, then x from the likelihood, by the same generator."""
    pair = vae(device)
    torch.manual_seed(3)
    ours = pair.sample(5)
    torch.manual_seed(3)
    with torch.no_grad():
        z = torch.randn(5, Q, device=device)
        assert torch.equal(
            ours, torch.bernoulli(pair.model.likelihood.get_submodule("network")(z).sigmoid())
        )


def test_rows_go_through_the_networks_some_at_a_time(device: torch.device) -> None:
    """Whatever the number of rows, with labels and without, and the numbers are the same."""
    rows: list[int] = []
    for labels in ((), (torch.arange(N, device=device) % 3,)):
        pair = conditional(device) if labels else vae(device)
        for part in pair.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[-2]))
        x = data(device)
        z = pair.encode(x, *labels)
        for call, first in ((pair.encode, x), (pair.decode, z), (pair.reconstruct, x)):
            expected = call(first, *labels)
            rows.clear()
            torch.testing.assert_close(call(first, *labels, max_rows=5), expected)
            assert max(rows) == 5
        rows.clear()
        assert pair.sample(N, *labels, max_rows=5).shape == (N, D)
        assert pair.encode(x, *labels, num_particles=2, max_rows=5).shape == (2, N, Q)
        assert pair.reconstruct(x, *labels, num_particles=2, max_rows=5).shape == (2, N, D)
        assert max(rows) == 5
    with pytest.raises(ArgumentError, match="max_rows"):
        pair.encode(x, *labels, max_rows=0)


def test_samples_by_seed(device: torch.device) -> None:
    pair = recipes.vae(D, Q, hidden=(4,)).to(device)
    before = randomness.get_state()
    first, second, other = (pair.sample(5, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    after = randomness.get_state()
    assert all(torch.equal(after[name], state) for name, state in before.items())
    pair.sample(5)
    after = randomness.get_state()
    assert not all(torch.equal(after[name], state) for name, state in before.items())


def test_samples_have_the_models_moments(device: torch.device) -> None:
    """The mean of draws against E_z[E[x | z]], to 4.5 standard errors (false alarm < 1e-5)."""
    pair, n = vae(device), 20_000
    draws, means = pair.sample(n), pair.sample(n, mean=True)
    error = ((draws.var(0) + means.var(0)) / n).sqrt()
    # Bonferroni over the six pixels: 5 standard errors, two-sided, 6 * 5.7e-7 < 1e-5.
    assert bool(((draws.mean(0) - means.mean(0)).abs() < 5 * error).all())


def test_codes_are_deterministic_by_default(device: torch.device) -> None:
    pair, x = vae(device), data(device)
    torch.testing.assert_close(pair.encode(x), pair.encode(x), rtol=0, atol=0)
    torch.testing.assert_close(pair.encode(x), pair.guide.posterior(x).mean)
    torch.testing.assert_close(pair.reconstruct(x), pair.decode(pair.encode(x)))
    with torch.no_grad():
        assert not pair.encode(x).requires_grad
    assert pair.encode(x, num_particles=4).shape == (4, N, Q)
    assert pair.reconstruct(x, num_particles=4).shape == (4, N, D)
    assert pair.decode(pair.encode(x), num_particles=4).shape == (4, N, D)
    assert (pair.encode(x, num_particles=2)[0] != pair.encode(x, num_particles=2)[0]).any()


def test_codes_come_from_evaluation_mode(device: torch.device) -> None:
    encoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, 2 * Q))
    pair = VAE(
        priors.StandardNormal(Q),
        likelihoods.Bernoulli(MLP(Q, D, (8,)), D),
        guides.MeanField(encoder, Q),
    ).to(device)
    x = data(device)
    torch.testing.assert_close(pair.encode(x), pair.encode(x), rtol=0, atol=0)
    assert encoder[0].training


def test_numpy_and_other_types_are_taken(device: torch.device) -> None:
    pair, x = vae(device), data(device)
    expected = pair.encode(x)
    torch.testing.assert_close(pair.encode(x.cpu().numpy()), expected)
    torch.testing.assert_close(pair.encode(x.cpu().float().numpy()), expected)
    torch.testing.assert_close(pair.encode(x.cpu().tolist()), expected)


def test_a_guide_whose_mean_isnt_known_says_so(device: torch.device) -> None:
    zuko = pytest.importorskip("zuko", reason="zuko is an extra")
    torch.set_default_dtype(torch.float32)
    flow = zuko.flows.NICE(Q, context=D, hidden_features=(8,))
    pair = VAE(
        zuko.flows.NICE(Q, hidden_features=(8,)),
        likelihoods.Bernoulli(MLP(Q, D, (8,)), D),
        flow,
    ).to(device)
    x = data(device).float()
    with pytest.raises(UndefinedError, match="num_particles"):
        pair.encode(x)
    assert pair.encode(x, num_particles=3).shape == (3, N, Q)
    assert pair.sample(4).shape == (4, D)
    SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
    torch.set_default_dtype(torch.float64)


# Conditional variant


def conditional(device: torch.device) -> VAE:
    """Labels to prior, likelihood and guide."""
    return VAE(
        prior=guides.MeanField(nn.Embedding(3, 2 * Q), Q),
        likelihood=likelihoods.Bernoulli(MLP(Q, D, (8,), context_dim=3), D),
        guide=guides.MeanField(MLP(D, 2 * Q, (8,), context_dim=3), Q),
    ).to(device)


def test_labels_reach_all_three(device: torch.device) -> None:
    pair, x = conditional(device), data(device)
    y = torch.arange(N, device=device) % 3
    check_pair(pair, (x, y))
    before = copy.deepcopy(pair.state_dict())
    SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x, y)
    assert all(moved(before, pair).values())
    assert pair.sample(N, y).shape == (N, D)
    assert (pair.encode(x, y) != pair.encode(x, (y + 1) % 3)).any()
    assert pair.reconstruct(x, y, num_particles=2).shape == (2, N, D)
    recipe = recipes.vae(D, Q, num_classes=3, hidden=(8,)).to(device)
    check_pair(recipe, (x, y))


def test_labels_for_samples(device: torch.device) -> None:
    pair = conditional(device)
    assert pair.sample(3, [0, 1, 2]).shape == (3, D)
    for wrong in ([0, 1], 1):
        with pytest.raises(ArgumentError, match="3 labels or the like, one for each sample"):
            pair.sample(3, wrong)


def test_pyro_can_infer_with_the_model(device: torch.device) -> None:
    """Replayed, conditioned, enumerated, sampled by NUTS: it is a Pyro program as any other."""
    pair, x = vae(device), data(device)[:2]
    for parameter in pair.parameters():
        parameter.requires_grad_(False)  # noqa: FBT003
    mcmc = MCMC(
        NUTS(pair.model, max_tree_depth=3), num_samples=5, warmup_steps=5, disable_progbar=True
    )
    mcmc.run(x)
    assert mcmc.get_samples()["z"].shape == (5, 2, Q)
    trace = pyro.poutine.trace(config_enumerate(pair.model)).get_trace(x)
    assert "enumerate" not in trace.nodes["z"]["infer"]
    draws = Predictive(pair.model, num_samples=7)(None, size=3)
    assert draws["x"].shape[-2:] == (3, D)


def test_the_model_generates(device: torch.device) -> None:
    """As a Pyro program: without data, with a size."""
    pair = vae(device)
    trace = pyro.poutine.trace(pair.model).get_trace(None, size=5)
    assert trace.nodes["x"]["value"].shape == (5, D)
    assert not trace.nodes["x"]["is_observed"]


# Variants


VARIANTS: dict[str, dict[str, Any]] = {
    "bernoulli": {},
    "binomial": {"likelihood": functools.partial(likelihoods.Binomial, total_count=1)},
    "categorical": {"likelihood": functools.partial(likelihoods.Categorical, levels=2)},
    "gaussian": {"likelihood": functools.partial(likelihoods.Gaussian, sigma="shared")},
    "predicted": {"likelihood": functools.partial(likelihoods.Gaussian, sigma="predicted")},
    "learned prior": {"prior": priors.Normal},
    "laplace": {"prior": priors.Laplace},
    "tanh": {"activation": nn.Tanh},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_combination_is_a_pair(name: str, device: torch.device) -> None:
    pair = vae(device, **VARIANTS[name])
    check_pair(pair, data(device))


@pytest.mark.parametrize("network", ["conv", "resnet"])
def test_image_recipes(network: str, device: torch.device) -> None:
    pair = recipes.vae((1, 9, 7), 2, network=network, hidden=(4, 4)).to(device)
    x = torch.rand(N, 1, 9, 7, device=device).round()
    check_pair(pair, x)


def test_the_autoencoder_is_the_degenerate_member(device: torch.device) -> None:
    """Point guide and flat prior: Trace_ELBO is -log p(x | e(x)), the squared error."""
    pair = recipes.ae(D, Q, hidden=(8,)).to(device)
    x = data(device)
    check_pair(pair, x)
    loss = Trace_ELBO().loss(pair.model, pair.guide, x)
    squared = (x - pair.reconstruct(x).detach()).square().sum()
    assert loss == pytest.approx(float(squared) + N * D / 2 * torch.tensor(torch.pi).log().item())
    with pytest.raises(UndefinedError, match="ex-post density"):
        pair.sample(3)


@pytest.mark.parametrize("sigma", ["shared", "feature", "predicted", "optimal"])
def test_a_point_mass_with_a_free_scale_is_refused(sigma: str) -> None:
    likelihood = functools.partial(likelihoods.Gaussian, sigma=sigma)
    with pytest.raises(PairError, match="no best fit"):
        recipes.ae(D, Q, likelihood=likelihood)


def test_a_point_mass_with_a_learned_prior_is_refused() -> None:
    with pytest.raises(PairError, match="unbounded"):
        recipes.ae(D, Q, prior=priors.Normal)


def test_render_model_draws_it(device: torch.device) -> None:
    pytest.importorskip("graphviz", reason="graphviz is an extra")
    graph = pyro.render_model(vae(device).model, model_args=(data(device),))
    assert '"data"' in graph.source or "data" in graph.source
    assert "z -> x" in graph.source
