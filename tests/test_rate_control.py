"""Floors, targets and constraints on the rate, and objectives of the aggregated posterior."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import Tensor

import pvae
from pvae import VAE, guides, likelihoods, mmd, penalties, priors
from pvae import objectives as o
from pvae import terms as t
from pvae.engine import Stepper, make_optimizer
from pvae.errors import ArgumentError, PairError, UndefinedError
from pvae.networks import MLP
from pvae.objectives import aggregate
from pvae.pair import Pair
from pvae.schedules import Warmup
from tests import gaussian, pairs

pytestmark = pytest.mark.usefixtures("store")
N, D, Q = 12, pairs.D, 2


def make(device: torch.device) -> VAE:
    torch.manual_seed(0)
    likelihood = likelihoods.Gaussian(MLP(Q, D, (8,)), D, sigma=0.8)
    guide = guides.MeanField(MLP(D, 2 * Q, (8,)), Q)
    return VAE(priors.StandardNormal(Q), likelihood, guide).to(device)


def measured(
    objective: o.Objective, vae: VAE, x: Tensor, num_data: int | None = None
) -> tuple[Tensor, t.Terms, Any]:
    """The loss per datum, and the terms that it was made from."""
    structure = vae.inspect((x,))
    objective.check(structure)
    terms = objective.compute_terms(structure, (x,))
    state = objective.make_state(structure, num_data)
    return objective.surrogate(terms, state) / len(x), terms, state


def parts(terms: t.Terms, x: Tensor, vae: VAE) -> tuple[Tensor, Tensor, Tensor]:
    """Distortion, rate by dimension ``(K, N, Q)``, and z, by torch's own distributions."""
    z = terms.sites["z"].value
    assert z is not None
    loc, raw = vae.guide.posterior.get_submodule("network")(x).chunk(2, -1)
    del raw
    q = vae.guide.posterior(x).base_dist
    torch.testing.assert_close(q.loc, loc)
    rate = q.log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    return -terms.log_likelihood.mean(), rate, z


@pytest.mark.parametrize("per", ["dimension", "site"])
@pytest.mark.parametrize("floor", [0.0, 0.4, 100.0])
def test_free_bits(per: Any, floor: float, device: torch.device) -> None:
    """Value and gradient: a rate below its floor counts as the floor and has no gradient."""
    vae, x = make(device), pairs.data(N, device)
    loss, terms, _ = measured(o.FreeBits(3, floor=floor, per=per), vae, x)
    distortion, rate, _ = parts(terms, x, vae)
    by = rate.mean((0, 1)) if per == "dimension" else rate.mean((0, 1)).sum()
    expected = distortion + by.clamp(min=floor).sum()
    torch.testing.assert_close(loss, expected)
    parameters = list(vae.parameters())
    ours = torch.autograd.grad(loss, parameters, retain_graph=True)
    theirs = torch.autograd.grad(expected, parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert float(loss.detach()) >= -float(terms.elbo_per_datum()[0].detach()) - 1e-9


def test_free_bits_by_dimension_need_dimensions(device: torch.device) -> None:
    vae = make(device)
    full = VAE(
        vae.model.prior,
        vae.model.likelihood,
        lambda x: dist.MultivariateNormal(x[..., :Q], torch.eye(Q).to(x)),
    ).to(device)
    x = pairs.data(N, device)
    with pytest.raises(UndefinedError, match="independent dimensions"):
        measured(o.FreeBits(floor=0.1), full, x)
    measured(o.FreeBits(floor=0.1, per="site"), full, x)


def test_capacity(device: torch.device) -> None:
    vae, x = make(device), pairs.data(N, device)
    for target in (0.0, 50.0):  # above the rate, and below
        loss, terms, _ = measured(o.Capacity(capacity=target, gamma=7.0), vae, x)
        distortion, rate, _ = parts(terms, x, vae)
        expected = distortion + 7.0 * (rate.sum(-1).mean() - target).abs()
        torch.testing.assert_close(loss, expected)


def test_capacity_follows_its_schedule(device: torch.device) -> None:
    vae, x = make(device), pairs.data(N, device)
    objective = o.Capacity(capacity=Warmup(10, end=5.0), gamma=1.0)
    structure = vae.inspect((x,))
    state = objective.make_state(structure)
    for step, target in ((0, 0.0), (5, 2.5), (20, 5.0)):
        state.set_step(step)
        assert state.get_buffer("capacity").item() == pytest.approx(target)


def test_geco_moves_its_multiplier(device: torch.device) -> None:
    """By hand: the moving average of the constraint, and the multiplier's exponent."""
    vae, x = make(device), pairs.data(N, device)
    objective = o.GECO(tolerance=5.0, speed=0.01, decay=0.9)
    structure = vae.inspect((x,))
    state = objective.make_state(structure)
    average, exponent = 0.0, 0.0
    for step in range(4):
        terms = objective.compute_terms(structure, (x,))
        loss = objective.surrogate(terms, state)
        distortion, rate, _ = parts(terms, x, vae)
        constraint = float(distortion.detach()) - 5.0
        average = constraint if step == 0 else 0.9 * average + 0.1 * constraint
        expected = float(rate.sum(-1).mean().detach()) + math.exp(exponent) * average
        assert float(loss.detach()) / N == pytest.approx(expected)
        direct = distortion * math.exp(exponent) + rate.sum(-1).mean()
        torch.testing.assert_close(
            torch.autograd.grad(loss / N, list(vae.parameters()), retain_graph=True),
            torch.autograd.grad(direct, list(vae.parameters())),
        )
        state.advance()
        exponent += min(max(0.01 * average, -0.01), 0.01)
        assert state.get_buffer("log_multiplier").item() == pytest.approx(exponent)


def test_geco_is_not_moved_by_evaluation_or_a_value_that_isnt_finite(device: torch.device) -> None:
    vae, x = make(device), pairs.data(N, device)
    objective = o.GECO(tolerance=5.0)
    for _ in range(3):
        objective.loss(vae.model, vae.guide, x)
    state = objective.state_of(vae.model, vae.guide, x)
    assert state.get_buffer("started").item() == 0
    objective.loss_and_grads(vae.model, vae.guide, x)
    assert state.get_buffer("started").item() == 1
    before = state.get_buffer("average").clone()
    state.measured = torch.tensor(math.nan, device=device)
    state.advance()
    assert torch.equal(state.get_buffer("average"), before)
    assert bool(state.get_buffer("log_multiplier").isfinite())


def test_geco_reaches_its_tolerance(device: torch.device) -> None:
    """The distortion comes to the tolerance from either side; the multiplier pays for it."""
    x = pairs.data(200, device)
    for tolerance in (6.6, 7.6):
        vae = make(device)
        run = pvae.fit(
            vae,
            x,
            o.GECO(tolerance=tolerance, speed=0.02, decay=0.9),
            epochs=150,
            batch_size=50,
            lr=1e-2,
            progress=False,
            device=device,
        )
        reached = -sum(run.history["log_likelihood"][-10:]) / 10
        assert abs(reached - tolerance) < 0.25


# The aggregated posterior


def test_with_weights_of_one_tcvae_is_the_elbo(device: torch.device) -> None:
    vae, x = make(device), pairs.data(N, device)
    for weights in ("stratified", "weighted"):
        objective = o.TCVAE(beta=1.0, alpha=1.0, gamma=1.0, weights=weights, num_data=40)
        loss, terms, _ = measured(objective, vae, x)
        torch.testing.assert_close(loss, -terms.elbo_per_datum()[0])


def test_stratified_weights_are_unbiased_by_enumeration(device: torch.device) -> None:
    """Over all batches of 3 of 6 data with datum i in it, the mean of q(z) is q(z)."""
    vae, x = make(device), pairs.data(6, device)
    objective = o.TCVAE(num_data=6)
    structure = vae.inspect((x[:3],))
    terms = t.compute(structure, (x[:3],))
    weight = objective._log_weights(terms, objective.make_state(structure)).exp().to(device)
    loc, scale = (getattr(vae.guide.posterior(x).base_dist, k).detach() for k in ("loc", "scale"))
    z = torch.randn(6, Q, device=device)
    density = dist.Normal(loc, scale).log_prob(z[:, None]).sum(-1).exp()  # draw i, datum j
    for i in range(6):
        others = [j for j in range(6) if j != i]
        means = [
            weight[0, 0] * density[i, i]
            + weight[0, 1] * density[i, a]
            + weight[0, 2] * density[i, b]
            for a, b in itertools.combinations(others, 2)
        ]
        torch.testing.assert_close(torch.stack(means).mean(), density[i].mean())


@pytest.mark.parametrize("weights", ["stratified", "weighted"])
def test_tcvaes_parts_written_out(weights: Any, device: torch.device) -> None:
    """By loops over the batch; with the whole data set the stratified ones are exact."""
    vae, x = make(device), pairs.data(N, device)
    size = N if weights == "stratified" else 50
    objective = o.TCVAE(beta=3.0, alpha=0.5, gamma=2.0, weights=weights, num_data=size)
    loss, terms, _ = measured(objective, vae, x)
    distortion, _, z = parts(terms, x, vae)
    q = vae.guide.posterior(x).base_dist
    each = dist.Normal(q.loc, q.scale).log_prob(z[0][:, None])
    total = torch.zeros((), device=device)
    for i in range(N):
        count = 1.0 / N if weights == "stratified" else 1.0 / (N * size)
        qz = (each[i].sum(-1).exp() * count).sum().log()
        by_dim = (each[i].exp() * count).sum(0).log()
        own, prior = each[i, i].sum(), dist.Normal(0.0, 1.0).log_prob(z[0, i]).sum()
        total = total + 0.5 * (own - qz) + 3.0 * (qz - by_dim.sum()) + 2.0 * (by_dim.sum() - prior)
    torch.testing.assert_close(loss, distortion + total / N)


def test_tcvae_wants_the_size_of_the_data_set(device: torch.device) -> None:
    vae, x = make(device), pairs.data(N, device)
    with pytest.raises(ArgumentError, match="num_data=len"):
        o.TCVAE().loss(vae.model, vae.guide, x)
    with pytest.raises(ArgumentError, match="at least the batch's 12"):
        o.TCVAE(num_data=5).loss(vae.model, vae.guide, x)
    run = pvae.fit(vae, x, o.TCVAE(), epochs=1, progress=False, device=device)
    assert run.training.stepper.state is not None
    assert run.training.stepper.state.num_data == N


def test_infovae_written_out(device: torch.device) -> None:
    vae, x = make(device), pairs.data(N, device)
    objective = o.InfoVAE(alpha=0.25, scale=4.0)
    structure = vae.inspect((x,))
    torch.manual_seed(5)
    terms = objective.compute_terms(structure, (x,))
    loss = objective.surrogate(terms, objective.make_state(structure)) / N
    torch.manual_seed(5)
    again = t.compute(structure, (x,))
    distortion, rate, z = parts(again, x, vae)
    draws = torch.randn(N, Q, device=device)
    expected = distortion + 0.75 * rate.sum(-1).mean() + 3.25 * mmd.mmd(z[0], draws)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ArgumentError, match=r"alpha \+ scale at least 1"):
        o.InfoVAE(alpha=-1.0, scale=1.0)


@pytest.mark.parametrize("kind", [1, 2])
def test_dipvae_written_out(kind: Any, device: torch.device) -> None:
    vae, x = make(device), pairs.data(N, device)
    loss, terms, _ = measured(o.DIPVAE(kind=kind, off_diagonal=3.0, diagonal=5.0), vae, x)
    q = vae.guide.posterior(x).base_dist
    covariance = torch.cov(q.loc.T, correction=0)
    if kind == 2:
        covariance = covariance + torch.diag(q.scale.square().mean(0))
    off = sum(covariance[i, j] ** 2 for i in range(Q) for j in range(Q) if i != j)
    on = sum((covariance[i, i] - 1) ** 2 for i in range(Q))
    expected = -terms.elbo_per_datum()[0] + 3.0 * off + 5.0 * on
    torch.testing.assert_close(loss, expected)
    assert o.DIPVAE(kind=1, off_diagonal=3.0).diagonal == 30.0
    assert o.DIPVAE(kind=2, off_diagonal=3.0).diagonal == 3.0


def test_factorvaes_classifier_learns_the_total_correlation(device: torch.device) -> None:
    """Correlated normals: TC = -log(1 - rho^2) / 2 = 0.83 nats."""
    vae, x = make(device), pairs.data(N, device)
    objective = o.FactorVAE(hidden=(64,), lr=5e-3)
    state = objective.make_state(vae.inspect((x,)))
    assert isinstance(state, aggregate._Discriminator)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tensor:
        a, b = torch.randn(2, count, generator=generator)
        return torch.stack([a, 0.9 * a + math.sqrt(1 - 0.81) * b], 1).to(device)

    torch.manual_seed(0)
    for _ in range(1500):
        state.measured = draw(500)
        state.advance()
    found = float(state.network(draw(20_000)).mean())
    assert found == pytest.approx(-0.5 * math.log(1 - 0.81), abs=0.12)


def test_factorvaes_loss_and_whose_parameters_it_moves(device: torch.device) -> None:
    vae, x = make(device), pairs.data(N, device)
    loss, terms, state = measured(o.FactorVAE(gamma=4.0, hidden=(8,)), vae, x)
    z = terms.sites["z"].value
    assert z is not None
    expected = -terms.elbo_per_datum()[0] + 4.0 * state.network(z[0]).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in state.network.parameters())
    before = [p.clone() for p in state.network.parameters()]
    state.advance()
    assert not all(
        torch.equal(a, b) for a, b in zip(before, state.network.parameters(), strict=True)
    )


def test_a_latent_among_several_is_named(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    with pytest.raises(PairError, match=r"(?s)one latent site.*site='z2'"):
        o.TCVAE(num_data=20).loss(model, guide, *batch)
    losses = [o.TCVAE(beta=1.0, num_data=20, site=s).loss for s in ("z1", "z2")]
    for loss in losses:
        torch.manual_seed(0)
        value = loss(model, guide, *batch)
        torch.manual_seed(0)
        assert value == pytest.approx(o.ELBO().loss(model, guide, *batch))


def test_a_density_by_dimension_is_needed(device: torch.device) -> None:
    vae = make(device)
    full = VAE(
        vae.model.prior,
        vae.model.likelihood,
        lambda x: dist.MultivariateNormal(x[..., :Q], torch.eye(Q).to(x)),
    ).to(device)
    x = pairs.data(N, device)
    for objective in (o.TCVAE(num_data=N), o.DIPVAE()):
        with pytest.raises(UndefinedError, match="independent dimensions"):
            objective.loss(full.model, full.guide, x)


# State


@pytest.mark.parametrize(
    "objective",
    [
        o.GECO(tolerance=6.0, speed=0.05),
        o.FactorVAE(hidden=(8,), lr=1e-2),
        o.TCVAE(),
        o.DReG(3),
        o.FreeBits(floor=Warmup(5, end=0.3)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_resumed_training_is_bit_for_bit_the_same(
    objective: Any, device: torch.device, tmp_path: Path
) -> None:
    x = pairs.data(60, device)
    options: dict[str, Any] = {"batch_size": 20, "lr": 1e-2, "progress": False, "device": device}
    whole, parted = make(device), make(device)
    pvae.fit(whole, x, objective, epochs=6, **options)
    pvae.fit(parted, x, objective, epochs=3, folder=tmp_path, **options)
    again = make(device)
    run = pvae.fit(again, x, objective, epochs=6, folder=tmp_path, resume=True, **options)
    assert len(run.history["loss"]) == 6
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


# What objectives refuse, and when


def test_refusals_come_before_anything_is_lost(device: torch.device, tmp_path: Path) -> None:
    """Also those that only a batch shows: the old checkpoint is still there."""
    vae, x = make(device), pairs.data(9, device)
    options: dict[str, Any] = {"progress": False, "device": device, "folder": tmp_path}
    pvae.fit(vae, x, epochs=1, **options)
    kept = sorted(p.name for p in tmp_path.iterdir())
    before = [p.detach().clone() for p in vae.parameters()]
    with pytest.raises(PairError, match="one row"):  # the last batch
        pvae.fit(vae, x, o.TCVAE(), epochs=1, batch_size=4, overwrite=True, **options)
    full = VAE(
        vae.model.prior,
        vae.model.likelihood,
        lambda x: dist.MultivariateNormal(x[..., :Q], torch.eye(Q).to(x)),
    ).to(device)
    with pytest.raises(UndefinedError, match="independent dimensions"):
        pvae.fit(full, x, o.FreeBits(), epochs=1, overwrite=True, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    assert all(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))


def test_free_bits_of_an_autoguide_are_refused(device: torch.device) -> None:
    """Its density isn't at the latent, but where that was drawn."""
    model, _, batch = pairs.functions(device)
    guide = AutoNormal(model)
    guide(*batch)
    with pytest.raises(PairError, match="a density of q at that site"):
        o.FreeBits(floor=0.1, per="site").loss(model, guide, *batch)


def test_a_joint_autoguide_has_no_draws_of_single_data(device: torch.device) -> None:
    model, _, batch = pairs.functions(device)
    guide = AutoDiagonalNormal(model)
    guide(*batch)
    with pytest.raises(PairError, match="drawn together with all others"):
        o.IWAE(5).loss(model, guide, *batch)
    own = AutoNormal(model)
    own(*batch)
    torch.manual_seed(0)
    assert o.IWAE(50).loss(model, own, *batch) < o.ELBO(50).loss(model, own, *batch)


def test_whose_loss_moves_shared_parameters_is_checked() -> None:
    with pytest.raises(ArgumentError, match="'model', 'guide' or None"):
        o.DReG(shared="both")  # type: ignore[arg-type]


# Penalties, batch norm, scales, and one objective for several calls


@pytest.mark.parametrize(
    "objective", [o.VIMCO(4), o.RWS(4), o.TVO(4), o.CUBO(4)], ids=lambda v: type(v).__name__
)
def test_penalties_reach_the_guide_without_a_pathwise_gradient(
    objective: Any, device: torch.device
) -> None:
    """What they have of the draws comes by the score function: the mean is the pathwise one.

    Two means of 150 draws, 14 numbers, at 6 standard errors: below 1e-7.
    """
    x = pairs.data(2, device)
    torch.manual_seed(0)
    guide = guides.MeanField(MLP(D, 2, ()), 1)
    likelihood = likelihoods.Gaussian(MLP(1, D, ()), D, sigma=0.8)
    means, errors = [], []
    for kind in (objective, o.IWAE(4)):
        draws = []
        for weight in (0.0, 1.0):
            own = penalties.Custom(lambda x, z: (z - 0.5).square().sum(-1), weight)
            vae = VAE(priors.StandardNormal(1), likelihood, guide, penalties=own).to(device)
            rounds = []
            for seed in range(150):
                torch.manual_seed(seed)
                loss = type(kind)(4).differentiable_loss(vae.model, vae.guide, x)
                found = torch.autograd.grad(loss, list(vae.guide.parameters()))
                rounds.append(torch.cat([g.flatten() for g in found]))
            draws.append(torch.stack(rounds))
        difference = draws[1] - draws[0]  # the same draws, so that only the penalty is left
        means.append(difference.mean(0))
        errors.append(difference.var(0) / 150)
    assert bool(((means[0] - means[1]).abs() <= 6 * (errors[0] + errors[1]).sqrt() + 1e-9).all())
    assert float(means[1].abs().max()) > 0.1


@pytest.mark.parametrize("objective", [o.STL(), o.DReG(2)], ids=lambda v: type(v).__name__)
def test_a_stopped_guide_with_batch_norm(objective: Any, device: torch.device) -> None:
    network = torch.nn.Sequential(
        torch.nn.Linear(D, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2 * Q)
    )
    likelihood = likelihoods.Gaussian(MLP(Q, D, (8,)), D, sigma=0.8)
    vae = VAE(priors.StandardNormal(Q), likelihood, guides.MeanField(network, Q)).to(device)
    run = pvae.fit(
        vae,
        pairs.data(N, device),
        objective,
        epochs=3,
        batch_size=6,
        progress=False,
        device=device,
    )
    assert int(network[1].get_buffer("num_batches_tracked")) == 6 * objective.num_particles
    assert all(math.isfinite(v) for v in run.history["loss"])


def test_the_scale_is_that_of_each_batch(device: torch.device) -> None:
    """A first call with all data doesn't decide for later ones."""

    def plate(x: Tensor) -> Any:
        return pyro.plate("data", N, subsample=torch.arange(len(x), device=x.device))

    class Model(pairs.Generator):
        def forward(self, x: Tensor) -> None:
            with plate(x):
                self.generate(x)

    class Guide(pairs.Inference):
        def forward(self, x: Tensor) -> None:
            with plate(x):
                self.infer(x)

    model, guide, x = Model().to(device), Guide().to(device), pairs.data(N, device)
    for objective in (o.IWAE(1), o.STL(), o.FreeBits(floor=0.0, per="site")):
        objective.loss(model, guide, x)
        torch.manual_seed(0)
        after = objective.loss(model, guide, x[:3])
        torch.manual_seed(0)
        Pair(model, guide).inspect((x[:3],))
        expected = o.ELBO().loss(model, guide, x[:3])
        if not isinstance(objective, o.FreeBits):
            assert after == pytest.approx(expected)
        assert abs(after - expected) < 0.5 * abs(expected)


def test_an_objective_follows_parameters_that_are_freed_or_new(device: torch.device) -> None:
    vae, x = make(device), pairs.data(N, device)
    objective = o.DReG(2)
    vae.guide.requires_grad_(requires_grad=False)
    objective.loss_and_grads(vae.model, vae.guide, x)
    vae.guide.requires_grad_()
    objective.loss_and_grads(vae.model, vae.guide, x)
    assert all(p.grad is not None for p in vae.guide.parameters())


def test_settings_are_in_the_repr() -> None:
    """A resumed training compares them."""
    different = [
        o.IWAE(5),
        o.IWAE(5, penalty_weight=0.1),
        o.IWAE(5, plate="data"),
        o.FreeBits(floor=1.0),
        o.FreeBits(),
        o.Capacity(capacity=1.0),
        o.Capacity(capacity=2.0),
        o.InfoVAE(kernel=pairs.data),  # type: ignore[arg-type]
        o.ELBO(beta=Warmup(3)),
        o.MultiplyWeightedIWAE(3, num_means=4),
    ]
    shown = [repr(objective) for objective in different]
    assert len(set(shown)) == len(shown)
    assert shown[1] == "IWAE(penalty_weight=0.1)"
    assert shown[3] == "FreeBits(floor=1.0)"
    assert shown[7] == "InfoVAE(kernel=tests.pairs.data)"


def test_a_used_objective_can_be_copied(device: torch.device) -> None:
    vae, x = make(device), pairs.data(N, device)
    objective = o.DReG(2)
    objective.loss_and_grads(vae.model, vae.guide, x)
    assert objective.state_of(vae.model, vae.guide, x).step == 1
    for again in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):  # noqa: S301
        assert repr(again) == repr(objective)
        assert again == objective
        assert again.state_of(vae.model, vae.guide, x).step == 0  # a training of its own


def test_a_failed_step_leaves_the_state_as_it_was(device: torch.device) -> None:
    vae, x = make(device), pairs.data(60, device).clone()
    x[37] = math.nan
    seen: list[float] = []

    class Checked(o.GECO):
        def surrogate(self, terms: t.Terms, state: o.ObjectiveState) -> Tensor:
            seen.append(float(state.get_buffer("log_multiplier")))
            return super().surrogate(terms, state)

    objective = Checked(tolerance=5.0, speed=0.1, decay=0.5)
    structure = vae.inspect((x[:5],))
    state = objective.make_state(structure)
    stepper = Stepper(
        structure,
        objective,
        make_optimizer(torch.optim.Adam, list(structure.parameters.values()), 1e-3),
        state,
        clip_norm=None,
    )
    with pyro.validation_enabled(is_validate=False):
        for step in range(12):
            stepper((x[5 * step : 5 * step + 5],), step)
    assert stepper.look() is not None
    assert float(state.get_buffer("log_multiplier")) == seen[7]  # the batch of row 37


def test_latents_that_are_numbers(device: torch.device) -> None:
    model, guide = gaussian.pair(device)
    x = torch.randn(N, device=device)
    for objective in (
        o.TCVAE(num_data=N),
        o.InfoVAE(),
        o.FactorVAE(hidden=(4,)),
        o.FreeBits(floor=0.1, per="site"),
    ):
        assert math.isfinite(objective.loss(model, guide, x))
