"""Penalties: values and gradients against independent formulas, in Pyro's own Trace_ELBO."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import stats
from torch import Tensor, nn

import pvae
from pvae import (
    VAE,
    bounds,
    guides,
    jacobian,
    likelihoods,
    networks,
    penalties,
    priors,
    recipes,
    schedules,
)
from pvae import mmd as mmd_module
from pvae.errors import ArgumentError, PairError
from pvae.networks import MLP, ConvDecoder, ConvEncoder
from pvae.objectives import ELBO

D, Q, N = 6, 3, 5
SIGMAS = 4.42  # two-sided false-alarm rate 1e-5


def pair(*own: penalties.Penalty, **options: Any) -> VAE:
    return recipes.ae(
        D, Q, hidden=(8,), activation=options.pop("activation", nn.Tanh), penalties=own, **options
    )


def encoder(vae: VAE) -> nn.Module:
    return vae.guide.posterior.get_submodule("network")


def decoder(vae: VAE) -> nn.Module:
    return vae.model.likelihood.get_submodule("network")


def data() -> Tensor:
    return torch.rand(N, D)


def layers(network: nn.Module) -> list[Any]:
    return list(network.get_submodule("layers").children())


def activations_by_hand(vae: VAE, x: Tensor) -> Tensor:
    first, act, last = layers(encoder(vae))
    h = act(first(x))
    z = last(h)
    g = layers(decoder(vae))[1](layers(decoder(vae))[0](z))
    return h.abs().sum() + z.abs().sum() + g.abs().sum()


def jacobian_by_hand(vae: VAE, x: Tensor) -> Tensor:
    """Row by row, by torch.func."""
    return torch.func.vmap(torch.func.jacrev(encoder(vae)))(x).square().sum((1, 2))


def decay_by_hand(network: nn.Module) -> Tensor:
    first, _, last = layers(network)
    return first.weight.square().sum() + last.weight.square().sum()


TABLE: dict[str, tuple[Callable[[], penalties.Penalty], Callable[[VAE, Tensor], Tensor]]] = {
    "custom": (
        lambda: penalties.Custom(lambda x, z: (x.sum(-1) * z.square().sum(-1)), 0.7),
        lambda v, x: 0.7 * (x.sum(-1) * encoder(v)(x).square().sum(-1)).sum(),
    ),
    "activations": (
        lambda: penalties.Activations(0.3),
        lambda v, x: 0.3 * activations_by_hand(v, x),
    ),
    "contractive": (
        lambda: penalties.Contractive(0.4),
        lambda v, x: 0.4 * jacobian_by_hand(v, x).sqrt().sum(),
    ),
    "contractive, squared": (
        lambda: penalties.Contractive(0.4, squared=True, max_entries=40),
        lambda v, x: 0.4 * jacobian_by_hand(v, x).sum(),
    ),
    "weight decay": (
        lambda: penalties.WeightDecay(0.2),
        lambda v, x: 0.2 * N * (decay_by_hand(encoder(v)) + decay_by_hand(decoder(v))),
    ),
    "weight decay of the decoder": (
        lambda: penalties.WeightDecay(0.2, ("model",)),
        lambda v, x: 0.2 * N * decay_by_hand(decoder(v)),
    ),
    "mmd": (
        lambda: penalties.MMD(2.0, target=lambda n: torch.linspace(-1, 1, n * Q).reshape(n, Q)),
        lambda v, x: 2.0 * N * mmd_by_hand(
            encoder(v)(x), torch.linspace(-1, 1, N * Q, device=x.device).reshape(N, Q)
        ),
    ),
}  # fmt: skip


def mmd_by_hand(x: Tensor, y: Tensor) -> Tensor:
    """Pair by pair."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        d2 = (a - b).square().sum()
        scales = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
        c = [2 * x.shape[1] * s for s in scales]
        return torch.stack([v / (v + d2) for v in c]).mean()

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(k(a, b) for a in x for b in y) / (n * m)
    return torch.as_tensor(xx + yy - 2 * xy)


@pytest.mark.parametrize("name", TABLE)
def test_values_and_gradients_in_trace_elbo(name: str, device: torch.device) -> None:
    """The loss and its gradients are those of squared error plus penalty, written out."""
    make, by_hand = TABLE[name]
    vae, x = pair(make()).to(device), data().to(device)
    names, parameters = zip(*vae.named_parameters(), strict=True)
    ours = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
    error = (x - decoder(vae)(encoder(vae)(x))).square().sum()
    expected = error + N * D / 2 * math.log(math.pi) + by_hand(vae, x)
    torch.testing.assert_close(ours, expected)
    gradients = torch.autograd.grad(ours, parameters)
    for name_of, mine, theirs in zip(
        names, gradients, torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, msg=name_of)


@pytest.mark.parametrize("name", TABLE)
def test_the_same_through_our_objective_and_fit(name: str, device: torch.device) -> None:
    make, _ = TABLE[name]
    vae, x = pair(make()).to(device), data().to(device)
    ours = ELBO().differentiable_loss(vae.model, vae.guide, x)
    theirs = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
    torch.testing.assert_close(ours, theirs)
    run = pvae.fit(vae, x, epochs=2, progress=False, valid=x, device=device)
    for record in run.history:
        assert record["loss"] == pytest.approx(-record["log_joint"] + record["penalty"])
        assert record["penalty"] > 0
    assert np.isfinite(run.history["valid_log_joint"]).all()


def test_there_is_no_penalty_outside_training(device: torch.device) -> None:
    vae, x = pair(penalties.Custom(lambda x, z: 0 * z.sum(-1) + 1e3, 1.0)).to(device), data()
    bound = bounds.elbo(vae, x.to(device))
    assert bound.mean > -100
    vae.eval()
    assert Trace_ELBO().loss(vae.model, vae.guide, x.to(device)) < 1000


def test_a_schedule_on_penalties(device: torch.device) -> None:
    vae, x = pair(penalties.Custom(lambda x, z: 0 * z.sum(-1) + 2.0, 3.0)), torch.rand(40, D)
    objective = ELBO(penalty_weight=schedules.Warmup(4, "steps"))
    run = pvae.fit(
        vae, x, objective, epochs=6, batch_size=None, progress=False,
        device=device, lr=1e-12,
    )  # fmt: skip
    extra = np.array(run.history["loss"]) + np.array(run.history["log_joint"])
    np.testing.assert_allclose(extra, 6.0 * np.minimum(np.arange(6) / 4, 1), atol=1e-9)
    np.testing.assert_allclose(run.history["penalty"], 6.0)


@pytest.mark.parametrize("name", TABLE)
def test_with_a_stochastic_guide(name: str, device: torch.device) -> None:
    """Any penalty beside any guide, on corrupted data: vectorised particles count as looped ones.
    The guide's scale is next to 0, so that every draw is the same code."""
    make, _ = TABLE[name]
    vae = VAE(
        priors.StandardNormal(Q),
        likelihoods.Gaussian(MLP(Q, D, (8,), nn.Tanh), D, sigma=1.0),
        guides.MeanField(MLP(D, 2 * Q, (8,), nn.Tanh), Q, lambda raw: torch.full_like(raw, 1e-9)),
        penalties=[make(), penalties.Custom(lambda x, z: z.abs().sum(-1), 0.1)],
        corruption=lambda x: x + 0.1,
    ).to(device)
    x = data().to(device)
    together, apart = (
        pvae.terms.compute(vae.inspect((x,)), (x,), num_particles=3, vectorize=v)
        for v in (True, False)
    )
    one = pvae.terms.compute(vae.inspect((x,)), (x,))
    assert len(together.penalties) >= 2
    for site, values in together.penalties.items():
        torch.testing.assert_close(values, apart.penalties[site], rtol=1e-6, atol=1e-7)
        expected = one.penalties[site].expand(3, -1)
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)
    codes = encoder(vae)(x + 0.1)[:, :Q]  # of what the guide sees
    *_, own = (v for k, v in together.penalties.items() if k.startswith("custom"))
    torch.testing.assert_close(own[0], -0.1 * codes.abs().sum(1), rtol=1e-6, atol=1e-7)


# Jacobians


def test_the_jacobian_of_one_layer() -> None:
    """Rifai et al.: for a sigmoid layer, sum_j (h_j (1 - h_j))^2 ||W_j||^2."""
    layer = nn.Sequential(nn.Linear(D, Q), nn.Sigmoid())
    x = data()
    h = layer(x)
    weight = layer[0].weight
    assert isinstance(weight, Tensor)
    expected = (h * (1 - h)).square() @ weight.square().sum(1)
    torch.testing.assert_close(jacobian.squared_jacobian_norm(layer, x), expected.detach())


@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid, nn.SiLU, nn.ELU, nn.GELU, nn.LeakyReLU])
@pytest.mark.parametrize("max_entries", [10**9, 40])
def test_jacobians_and_their_gradients(act: type[nn.Module], max_entries: int) -> None:
    network = nn.Sequential(nn.Linear(D, 7), act(), nn.Linear(7, Q))
    x = data()
    expected = torch.func.vmap(torch.func.jacrev(network))(x).square().sum((1, 2))
    found = jacobian.squared_jacobian_norm(network, x, max_entries=max_entries, create_graph=True)
    torch.testing.assert_close(found, expected)
    weights = [p for n, p in network.named_parameters() if "weight" in n]
    ours = torch.autograd.grad(found.sum(), weights)
    for mine, theirs in zip(ours, torch.autograd.grad(expected.sum(), weights), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_jacobians_of_images(device: torch.device) -> None:
    network = ConvEncoder((1, 7, 5), 2, (3,), 8).to(device)
    x = torch.rand(4, 1, 7, 5, device=device)
    rows = []
    for row in x:
        j = torch.autograd.functional.jacobian(lambda v: network(v[None])[0], row)
        assert isinstance(j, Tensor)
        rows.append(j.square().sum())
    torch.testing.assert_close(jacobian.squared_jacobian_norm(network, x), torch.stack(rows))


def test_the_stochastic_estimate() -> None:
    """Unbiased for the square, with the variance stated; the root is low by what is stated."""
    weight = torch.randn(Q, D)
    gram = weight @ weight.T
    exact, probes, draws = float(gram.trace()), 4, 40_000
    x = torch.zeros(draws, D)
    found = jacobian.squared_jacobian_norm(lambda v: v @ weight.T, x, num_probes=probes)
    variance = 2 * float(gram.square().sum()) / probes
    assert abs(float(found.mean()) - exact) < SIGMAS * math.sqrt(variance / draws)
    assert float(found.var()) == pytest.approx(variance, rel=0.1)
    bias = float(found.sqrt().mean()) - math.sqrt(exact)
    stated = -float(gram.square().sum()) / (4 * probes * exact**1.5)
    assert bias == pytest.approx(stated, rel=0.5)


def test_the_gradient_at_a_jacobian_of_zero_is_finite(device: torch.device) -> None:
    vae = pair(penalties.Contractive(1.0)).to(device)
    for parameter in encoder(vae).parameters():
        nn.init.zeros_(parameter)
    loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, data().to(device))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


def test_the_code_of_a_stochastic_guide_is_its_mean(device: torch.device) -> None:
    vae = recipes.vae(
        D, Q, hidden=(8,), penalties=penalties.Contractive(1.0, squared=True)
    ).to(device)  # fmt: skip
    x = data().to(device).round()
    terms = pvae.terms.compute(vae.inspect((x,)), (x,))
    (found,) = terms.penalties.values()
    mean = torch.func.vmap(torch.func.jacrev(lambda v: encoder(vae)(v)[:Q]))(x)
    torch.testing.assert_close(-found[0], mean.square().sum((1, 2)))


def test_batch_norm_is_refused(device: torch.device) -> None:
    vae = VAE(
        priors.Flat(Q),
        likelihoods.Gaussian(MLP(Q, D, (8,)), D, sigma=1.0),
        guides.Point(nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, Q)), Q),
        penalties=penalties.Contractive(1.0),
    ).to(device)
    with pytest.raises(PairError, match=r"(?s)BatchNorm1d at network.0 in training.*LayerNorm"):
        vae.guide(data().to(device))
    vae.eval()
    vae.guide(data().to(device))


def test_weights_count_as_they_act(device: torch.device) -> None:
    """Unit columns have a constant norm; scales and norms of layers are no weights."""
    decay = penalties.WeightDecay(1.0, ("model",))
    vae = recipes.sparse_ae(D, Q, hidden=(8,), decoder_hidden=None, penalties=decay).to(device)
    x = data().to(device)
    (found,) = pvae.terms.compute(vae.inspect((x,)), (x,)).penalties.values()
    torch.testing.assert_close(-found, torch.full_like(found, Q + 8.0))  # one for each column
    net = nn.Sequential(nn.Linear(Q, 4), nn.LayerNorm((5, 4)), nn.Linear(4, 4)).to(device)
    part = likelihoods.Gaussian(net, (5, 4), sigma="feature").to(device)
    run = penalties.SideOutputs(
        "model", part, x, x, (), part(torch.rand(2, 5, Q, device=device)), []
    )
    expected = sum(net.get_parameter(n).square().sum() for n in ("0.weight", "2.weight"))
    torch.testing.assert_close(penalties.WeightDecay(1.0)(run), expected)


def test_contractive_runs_the_encoder_once(device: torch.device) -> None:
    """Dropout is the same draw, and a codebook moves once a step."""
    calls = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, Q)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(x)
            return self.layer(x)

    vae = pair(penalties.Contractive(1.0)).to(device)
    counting = Counting().to(device)
    layer = counting.layer
    vae.guide.posterior = guides.Point(counting, Q)
    x = data().to(device)
    Trace_ELBO().differentiable_loss(vae.model, vae.guide, x).backward()
    assert len(calls) == 1
    with torch.no_grad():
        value = Trace_ELBO().loss(vae.model, vae.guide, x)
    norm = layer.weight.norm() * N  # of a linear code, for each datum
    error = (x - decoder(vae)(layer(x))).square().sum()
    expected = error + N * D / 2 * math.log(math.pi) + norm
    assert value == pytest.approx(float(expected.detach()))
    plain = pair(penalties.Contractive(1.0), corruption=nn.Identity()).to(device)
    whole = [pvae.terms.compute(plain.inspect((v,)), (v,)) for v in (x.round().long(), x.round())]
    first, second = (t.penalties["contractive_guide"] for t in whole)
    torch.testing.assert_close(first, second)  # integers, too


# Activations


def test_which_activations_count(device: torch.device) -> None:
    x = data().to(device)
    totals = {}
    for code, output in ((True, False), (False, False), (True, True), (False, True)):
        torch.manual_seed(0)
        own = penalties.Activations(1.0, code=code, output=output)
        vae = pair(own).to(device)
        terms = pvae.terms.compute(vae.inspect((x,)), (x,))
        totals[code, output] = -sum(v.sum() for v in terms.penalties.values())
    z = encoder(vae)(x)
    hidden = activations_by_hand(vae, x) - z.abs().sum()
    torch.testing.assert_close(totals[False, False], hidden)
    torch.testing.assert_close(totals[True, False], hidden + z.abs().sum())
    out = decoder(vae)(z).abs().sum()
    torch.testing.assert_close(totals[True, True], hidden + z.abs().sum() + out)
    torch.testing.assert_close(totals[False, True], hidden + out)


def test_activations_of_networks_that_merge_particles_and_data(device: torch.device) -> None:
    """Convolutions see (K N, C, H, W); each datum still gets its own sum."""
    vae = VAE(
        priors.StandardNormal(Q),
        likelihoods.Gaussian(ConvDecoder(Q, (1, 5, 5), (3,), 8), (1, 5, 5), sigma=1.0),
        guides.MeanField(ConvEncoder((1, 5, 5), 2 * Q, (3,), 8), Q),
        penalties=penalties.Activations(1.0),
    ).to(device)
    x = torch.rand(4, 1, 5, 5, device=device)
    together = pvae.terms.compute(vae.inspect((x,)), (x,), num_particles=3, vectorize=True)
    name = "activations_model"
    z = together.sites["z"].value
    assert z is not None
    seen: list[Tensor] = []
    for module in vae.model.likelihood.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, i, o: seen.append(o.abs().sum()))
    for k in range(3):
        for n in range(4):
            seen.clear()
            vae.model.likelihood(z[k, n : n + 1])
            torch.testing.assert_close(-together.penalties[name][k, n], torch.stack(seen).sum())


def test_networks_without_activations_are_refused(device: torch.device) -> None:
    vae = VAE(
        priors.Flat(Q),
        likelihoods.Gaussian(nn.Linear(Q, D), D, sigma=1.0),
        guides.Point(nn.Linear(D, Q), Q),
        penalties=penalties.Activations(1.0),
    ).to(device)
    x = data().to(device)
    z = vae.encode(x)
    terms = pvae.terms.compute(vae.inspect((x,)), (x,))
    penalty = sum(v.sum() for v in terms.penalties.values())
    torch.testing.assert_close(-penalty, z.abs().sum())  # linear both ways: the code alone

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(D, 8), nn.Linear(8, Q)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    vae.guide.posterior = guides.Point(Functional().to(device), Q)
    with pytest.raises(PairError, match=r"Activations in the guide.*(.|\n)*nn\.ReLU\(\)"):
        vae.guide(x)


def test_activations_of_every_kind(device: torch.device) -> None:
    """Subclasses count; what is changed in place afterwards counts as it was."""

    class Mine(nn.Tanh):
        pass

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.last = nn.Linear(D, D), nn.ReLU(), nn.Linear(D, Q)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.first(x))
            h += 10 * x
            return self.last(h)

    x = data().to(device)
    torch.manual_seed(0)
    ours = pair(penalties.Activations(1.0), activation=Mine).to(device)
    torch.manual_seed(0)
    theirs = pair(penalties.Activations(1.0)).to(device)
    losses = [Trace_ELBO().loss(v.model, v.guide, x) for v in (ours, theirs)]
    assert losses[0] == losses[1]
    part = Residual().to(device)
    ours.guide.posterior = guides.Point(part, Q)
    terms = pvae.terms.compute(ours.inspect((x,)), (x,))
    found = -terms.penalties["activations_guide"].sum()
    expected = part.act(part.first(x)).abs().sum() + part(x).abs().sum()
    torch.testing.assert_close(found, expected)


# Discrepancies


def test_mmd_against_every_pair() -> None:
    x, y = torch.randn(6, 2), torch.randn(9, 2) + 1
    torch.testing.assert_close(mmd_module.mmd(x, y), mmd_by_hand(x, y))
    biased = mmd_module.mmd(x, y, "rbf", unbiased=False)

    def k(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(-(p - q).square().sum() / 4).exp() for p in a for q in b]).mean()

    torch.testing.assert_close(biased, k(x, x) + k(y, y) - 2 * k(x, y))
    assert biased > 0
    together = mmd_module.mmd(torch.stack([x, x + 1]), torch.stack([y, y]))
    torch.testing.assert_close(together[1], mmd_by_hand(x + 1, y))


def test_the_unbiased_mmd_of_one_distribution_is_zero_in_the_mean() -> None:
    values = mmd_module.mmd(torch.randn(3000, 10, 2), torch.randn(3000, 10, 2))
    error = float(values.std()) / math.sqrt(3000)
    assert abs(float(values.mean())) < SIGMAS * error
    moved = mmd_module.mmd(torch.randn(300, 10, 2), torch.randn(300, 10, 2) + 1)
    assert float(moved.mean()) > 10 * error


def test_mmd_refuses_what_it_cant_do() -> None:
    with pytest.raises(ArgumentError, match="at least 2 points"):
        mmd_module.mmd(torch.zeros(1, 2), torch.zeros(5, 2))
    with pytest.raises(ArgumentError, match="'imq' or 'rbf'"):
        mmd_module.mmd(torch.zeros(3, 2), torch.zeros(5, 2), "cubic")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="points of 2 entries"):
        mmd_module.mmd(torch.zeros(3, 2), torch.zeros(5, 3))


# What is refused


def test_what_is_no_penalty(device: torch.device) -> None:
    with pytest.raises(ArgumentError, match=r"penalties\.Custom\(function, weight\)"):
        pair(lambda x, z: z.sum(-1))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"Contractive\.weight"):
        penalties.Contractive(-1.0)
    with pytest.raises(ArgumentError, match="'guide', 'model' or both"):
        penalties.WeightDecay(1.0, ("encoder",))  # type: ignore[arg-type]
    vae = pair(penalties.Custom(lambda x, z: z, 1.0)).to(device)
    with pytest.raises(PairError, match=r"one value for each datum, shape \(5,\).*\(5, 3\)"):
        pvae.terms.compute(vae.inspect((data().to(device),)), (data().to(device),))
    vae = pair(penalties.Commitment(1.0)).to(device)
    with pytest.raises(PairError, match=r"a guide with a codebook(.|\n)*NearestCode"):
        vae.guide(data().to(device))


def test_contractive_through_fused_attention(device: torch.device) -> None:
    """Torch's fused attention can be differentiated once; the penalty needs it twice."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x[..., None]).unsqueeze(-3)  # one head
            return nn.functional.scaled_dot_product_attention(h, h, h).mean((-3, -2))

    encoder = Attention().to(device)
    vae = pvae.VAE(
        priors.Flat(8),
        likelihoods.Gaussian(networks.MLP(8, D, (4,)), D, sigma=0.5),
        guides.Point(encoder, 8),
        penalties=penalties.Contractive(1.0),
    ).to(device)
    x = data().to(device)
    terms = pvae.terms.compute(vae.inspect((x,)), (x,))
    (penalty,) = terms.penalties.values()
    penalty.sum().backward()
    with jacobian.differentiable_twice():
        exact = torch.stack([torch.func.jacrev(encoder)(row[None])[0, :, 0] for row in x])
    torch.testing.assert_close(-penalty.squeeze(0), exact.flatten(1).norm(dim=1))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.guide.parameters())


def test_the_two_sample_test_keeps_its_level() -> None:
    """P-values of equal samples are uniform: 200 tests, a false alarm in one of 1e6 runs."""
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for seed in range(200):
        x, y = (torch.randn(n, 2, generator=generator) for n in (15, 20))
        p_values.append(mmd_module.two_sample_test(x, y, num_permutations=99, seed=seed).p_value)
    found = stats.kstest(p_values, "uniform")
    assert found.statistic < 0.2
    assert min(p_values) >= 0.01


def test_the_two_sample_test_against_every_permutation() -> None:
    """All 20 ways to draw 3 of 6 points, by the estimate written out."""
    x, y = torch.randn(3, 2), torch.randn(3, 2) + 1
    both = torch.cat([x, y])
    values = []
    for chosen in itertools.combinations(range(6), 3):
        rest = [i for i in range(6) if i not in chosen]
        values.append(mmd_by_hand(both[list(chosen)], both[rest]))
    exact = sum(float(v >= values[0] - 1e-12) for v in values) / 20
    found = mmd_module.two_sample_test(x, y, "imq", num_permutations=20_000)
    torch.testing.assert_close(found.mmd, float(values[0]))
    assert abs(found.p_value - exact) < 5 * (0.25 / 20_000) ** 0.5


def test_the_two_sample_test_finds_a_difference() -> None:
    x, y = torch.randn(100, 3), torch.randn(100, 3) + 1
    before = torch.get_rng_state()
    first, second = (mmd_module.two_sample_test(x, y, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second
    assert first.p_value == 0.001
    kernel = mmd_module.median_kernel(torch.cat([x, y]))
    torch.testing.assert_close(first.mmd, float(mmd_module.mmd(x, y, kernel)))
    distances = torch.pdist(x)
    middle = float(distances.square().median())
    torch.testing.assert_close(
        mmd_module.median_kernel(x)(torch.tensor(1.0)), torch.tensor(-1 / (2 * middle)).exp()
    )


def test_the_two_sample_test_refuses_what_it_cant_do() -> None:
    with pytest.raises(ArgumentError, match=r"points \(N, D\)"):
        mmd_module.two_sample_test(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ArgumentError, match="at least 2 points"):
        mmd_module.two_sample_test(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(ArgumentError, match="num_permutations"):
        mmd_module.two_sample_test(torch.rand(3, 2), torch.rand(3, 2), num_permutations=0)
    with pytest.raises(ArgumentError, match="points that differ"):
        mmd_module.median_kernel(torch.zeros(3, 2))
