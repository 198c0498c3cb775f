"""Bounds and gradients against closed forms, quadrature and enumeration.

Statistical tests compare means of 40 independent batches with an exact number, at 7 standard
errors of Student's t with 39 degrees of freedom: a false alarm in fewer than 1e-7 of the runs for
each number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro.infer import RenyiELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pvae
from pvae import VAE, likelihoods, priors
from pvae import objectives as o
from pvae.errors import PairError
from pvae.networks import MLP
from pvae.pair import Pair
from tests import gaussian, pairs

pytestmark = pytest.mark.usefixtures("store")
ROUNDS, ROWS, LIMIT = 40, 1000, 7.0
X = 0.9


def parameters_of(*sides: Any) -> list[Tensor]:
    return [p for side in sides for p in side.parameters()]


def gradients(objective: Any, model: Any, guide: Any, *batch: Any) -> tuple[float, Tensor]:
    """The loss and its gradient, all parameters in one vector, both for a mean over rows."""
    parameters = parameters_of(model, guide)
    loss = objective.differentiable_loss(model, guide, *batch)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    rows = len(batch[0])
    return float(loss.detach()) / rows, torch.cat([g.flatten() for g in flat]) / rows


def repeated(objective: Any, model: Any, guide: Any, *batch: Any) -> tuple[Tensor, Tensor]:
    """Losses and gradients of independent rounds, ``(ROUNDS,)`` and ``(ROUNDS, P)``."""
    rounds = [gradients(objective, model, guide, *batch) for _ in range(ROUNDS)]
    return torch.tensor([r[0] for r in rounds]), torch.stack([r[1] for r in rounds]).cpu()


def assert_mean(draws: Tensor, exact: Tensor | float) -> None:
    exact = torch.as_tensor(exact).detach().cpu()
    error = draws.std(0) / math.sqrt(len(draws))
    off = (draws.mean(0) - exact).abs()
    assert bool((off <= LIMIT * error + 1e-9).all()), f"{draws.mean(0)} against {exact}, se {error}"


def log_mean(log_weight: Tensor) -> Tensor:
    return log_weight.logsumexp(0) - math.log(len(log_weight))


# Values and gradients by quadrature: what the loss of one datum is, and how many draws it has


EXACT: dict[str, tuple[Any, Callable[[Tensor], Tensor], int]] = {
    "ELBO": (o.ELBO(), lambda w: w.mean(0), 1),
    "ELBO, analytic": (o.ELBO(analytic_kl=True), lambda w: w.mean(0), 1),
    "STL": (o.STL(), lambda w: w.mean(0), 1),
    "IWAE": (o.IWAE(2), log_mean, 2),
    "DReG": (o.DReG(2), log_mean, 2),
    "VIMCO": (o.VIMCO(2), log_mean, 2),
    "CIWAE": (o.CIWAE(2, mix=0.3), lambda w: 0.3 * w.mean(0) + 0.7 * log_mean(w), 2),
    "multiply weighted": (o.MultiplyWeightedIWAE(2, num_means=3), log_mean, 2),
    "Renyi 0.5": (o.Renyi(2, alpha=0.5), lambda w: log_mean(0.5 * w) / 0.5, 2),
    "Renyi 3": (o.Renyi(2, alpha=3.0), lambda w: log_mean(-2.0 * w) / -2.0, 2),
    "Renyi 1": (o.Renyi(2, alpha=1.0), lambda w: w.mean(0), 2),
    "Renyi 0": (o.Renyi(2, alpha=0.0), log_mean, 2),
}


@pytest.mark.parametrize("name", EXACT)
def test_values_and_gradients_by_quadrature(name: str, device: torch.device) -> None:
    """Every estimator that is unbiased for a bound, and for its gradient, is that."""
    objective, what, k = EXACT[name]
    model, guide = gaussian.pair(device)
    exact = -gaussian.expectation(model, guide, torch.tensor(X, device=device), what, k)
    gradient = torch.autograd.grad(exact, parameters_of(model, guide))
    losses, found = repeated(objective, model, guide, torch.full((ROWS,), X, device=device))
    assert_mean(losses, exact)
    assert_mean(found, torch.stack(gradient))


def test_piwae_has_the_models_gradient_of_one_bound_and_the_guides_of_another(
    device: torch.device,
) -> None:
    model, guide = gaussian.pair(device)
    x = torch.tensor(X, device=device)
    many = -gaussian.expectation(model, guide, x, log_mean, 4, nodes=16)
    few = -gaussian.expectation(model, guide, x, log_mean, 2)
    exact = torch.stack(
        [
            *torch.autograd.grad(many, parameters_of(model), retain_graph=True),
            *torch.autograd.grad(few, parameters_of(guide)),
        ]
    )
    x = torch.full((ROWS,), X, device=device)
    losses, found = repeated(o.PIWAE(2, num_means=2), model, guide, x)
    assert_mean(losses, many)
    assert_mean(found, exact)


def test_rws_fits_the_guide_to_the_posterior_the_other_way_round(device: torch.device) -> None:
    """With many draws: minus E of log q under the posterior, whose moments are known."""
    model, guide = gaussian.pair(device)
    x = torch.full((20,), X, device=device)
    posterior = gaussian.exact_guide(model)
    mean, scale = (posterior.a * X).detach(), posterior.log_t.exp().detach()
    t2 = (2 * guide.log_t).exp()
    expected = guide.log_t + ((mean - guide.a * X - guide.c) ** 2 + scale**2) / (2 * t2)
    exact = torch.stack(torch.autograd.grad(expected, parameters_of(guide)))
    _, found = repeated(o.RWS(4000, vectorize_particles=True), model, guide, x)
    assert_mean(found[:, 1:], exact)
    evidence = -gaussian.log_evidence(model, torch.tensor(X, device=device))
    assert_mean(found[:, :1], torch.autograd.grad(evidence, model.w)[0].reshape(1))


def path_means(model: Any, guide: Any, x: Tensor, beta: float) -> Tensor:
    """E of log w on the path between guide and posterior, by quadrature."""
    top = gaussian.expectation(model, guide, x, lambda w: ((beta * w).exp() * w)[0], 1, nodes=80)
    below = gaussian.expectation(model, guide, x, lambda w: (beta * w).exp()[0], 1, nodes=80)
    return top / below


def test_tvo_is_a_riemann_sum_below_the_evidence(device: torch.device) -> None:
    model, guide = gaussian.pair(device)
    x = torch.tensor(X, device=device)
    objective = o.TVO(4000, num_partitions=4, vectorize_particles=True)
    points = objective.partition
    assert points[0] == 0.0
    assert points[-1] == 1.0
    assert points == sorted(points)
    assert len(points) == 5
    exact = -sum((b - a) * path_means(model, guide, x, a) for a, b in pairwise(points))
    assert isinstance(exact, Tensor)
    gradient = torch.stack(torch.autograd.grad(exact, parameters_of(model, guide)))
    losses, found = repeated(objective, model, guide, x.expand(20))
    # biased by order 1 / K, which is 1/4000 of terms of order 1
    assert abs(float(losses.mean() - exact.detach())) < 2e-3
    assert bool(((found.mean(0) - gradient.cpu()).abs() < 0.01).all())
    assert float(-exact.detach()) < float(gaussian.log_evidence(model, x).detach())


def test_tvo_of_one_part_is_the_elbo(device: torch.device) -> None:
    """With two draws, too: value and gradient."""
    model, guide = gaussian.pair(device)
    x = torch.tensor(X, device=device)
    exact = -gaussian.expectation(model, guide, x, lambda w: w.mean(0), 1)
    gradient = torch.stack(torch.autograd.grad(exact, parameters_of(model, guide)))
    losses, found = repeated(o.TVO(2, num_partitions=1), model, guide, x.expand(ROWS))
    assert_mean(losses, exact)
    assert_mean(found, gradient)


def test_cubo_is_above_the_evidence_and_its_logarithm_is_biased_down(
    device: torch.device,
) -> None:
    model, guide = gaussian.GaussianModel().to(device), gaussian.GaussianGuide(0.5, 0.1, 0.7)
    guide = guide.to(device)
    x = torch.tensor(X, device=device)
    second = gaussian.expectation(model, guide, x, lambda w: (2 * w).exp()[0], 1, nodes=80)
    exact = torch.stack(torch.autograd.grad(second, parameters_of(guide), retain_graph=True))
    rows = x.expand(ROWS)
    losses, found = repeated(o.CUBO(2, form="exp"), model, guide, rows)
    assert_mean(losses, second)
    assert_mean(found[:, 1:], exact)
    upper = float(second.detach().log() / 2)
    evidence = float(gaussian.log_evidence(model, x).detach())
    assert upper > evidence
    logs, _ = repeated(o.CUBO(2), model, guide, rows)
    assert float(logs.mean()) < upper - 5 * float(logs.std()) / math.sqrt(ROUNDS)
    shifted, _ = repeated(o.CUBO(2, form="exp", reference=evidence), model, guide, rows)
    assert_mean(shifted, float(second.detach()) * math.exp(-2 * evidence))


# Variances


def test_at_the_posterior_stl_and_dreg_have_no_variance(device: torch.device) -> None:
    """Each draw's gradient of the guide is 0; the ordinary one's is not."""
    model = gaussian.GaussianModel().to(device)
    guide = gaussian.exact_guide(model).to(device)
    x = torch.randn(5, device=device)
    for objective in (o.STL(), o.DReG(4)):
        _, found = gradients(objective, model, guide, x)
        torch.testing.assert_close(found[1:], torch.zeros_like(found[1:]))
    _, ordinary = gradients(o.ELBO(), model, guide, x)
    assert float(ordinary[1:].abs().max()) > 1e-3


def test_dregs_signal_to_noise_doesnt_fall_with_more_draws(device: torch.device) -> None:
    """From 8 to 512 draws it rises as the root of K, and IWAE's falls so (Rainforth et al., 2018).

    The mean of both is the same: IWAE's own is lost in its noise, so that DReG's is taken. Ratios
    are known to 11 % of 400 gradients: five of those errors around 8 and 1/8.
    """
    model, guide = gaussian.pair(device)
    rows = torch.full((1,), X, device=device)

    def moments(objective: Any) -> tuple[float, float]:
        draws = torch.stack([gradients(objective, model, guide, rows)[1][1] for _ in range(400)])
        return float(draws.mean().abs()), float(draws.std())

    ours, theirs = [], []
    for k in (8, 512):
        signal, noise = moments(o.DReG(k, vectorize_particles=True))
        ours.append(signal / noise)
        theirs.append(signal / moments(o.IWAE(k, vectorize_particles=True))[1])
    assert 0.45 < ours[1] / ours[0] / 8 < 1.55
    assert 0.45 < theirs[1] / theirs[0] * 8 < 1.55


# Guides of two levels, flows


def flow_pair(device: torch.device) -> tuple[Any, Any, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    flow = zuko.flows.MAF(2, context=pairs.D, transforms=1, hidden_features=(8,))
    vae = VAE(
        priors.StandardNormal(2),
        likelihoods.Gaussian(MLP(2, pairs.D, (8,)), pairs.D, sigma=0.8),
        flow,
    ).to(device)
    return vae.model, vae.guide, (pairs.data(1, device),)


@pytest.mark.parametrize("make", [pairs.two_sites, flow_pair])
@pytest.mark.parametrize(
    ("low", "plain"), [(o.STL(1), o.ELBO(1)), (o.DReG(3), o.IWAE(3))], ids=["STL", "DReG"]
)
def test_stopping_the_guides_parameters_is_right_for_chains_and_flows(
    make: Any, low: Any, plain: Any, device: torch.device
) -> None:
    """Both estimators of one gradient agree in the mean, where stopping distributions doesn't.

    Two means of 60 rounds each, at 7 standard errors, over at most 200 numbers: below 1e-6.
    """
    model, guide, (x,) = make(device)
    rows = x[:1].expand(400, pairs.D)
    means, errors = [], []
    for objective in (low, plain):
        _, found = repeated(objective, model, guide, rows)
        means.append(found.mean(0))
        errors.append(found.var(0) / ROUNDS)
    off = (means[0] - means[1]).abs()
    assert bool((off <= LIMIT * (errors[0] + errors[1]).sqrt() + 1e-9).all())


# Discrete latents, by enumeration


def states(device: torch.device) -> Tensor:
    return torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], device=device)


def exact_discrete(model: Any, guide: Any, x: Tensor, k: int) -> Tensor:
    """E of the log mean weight over all states of K draws."""
    z = states(x.device)
    prior = 2 * math.log(0.5)
    log_p = prior + dist.Normal(model.decoder(z), 1.0).log_prob(x).sum(-1)
    log_q = dist.Bernoulli(logits=guide.encoder(x)).log_prob(z).sum(-1)
    grids = torch.cartesian_prod(*[torch.arange(4)] * k).reshape(-1, k)
    weights, mass = (log_p - log_q)[grids], log_q[grids].sum(1).exp()
    return (mass * (weights.logsumexp(1) - math.log(k))).sum()


@pytest.mark.parametrize(
    ("objective", "k"),
    [
        (o.VIMCO(3), 3),
        (o.ELBO(), 1),
        (o.ELBO(3, baseline="leave_one_out"), 1),
        (o.ELBO(baseline="moving_average"), 1),
    ],
    ids=repr,
)
def test_discrete_latents_by_enumeration(objective: Any, k: int, device: torch.device) -> None:
    model, guide, (x,) = pairs.discrete(device, n=1)
    exact = -exact_discrete(model, guide, x[0], k)
    expected = torch.cat(
        [g.flatten() for g in torch.autograd.grad(exact, parameters_of(model, guide))]
    )
    losses, found = repeated(objective, model, guide, x.expand(ROWS, pairs.D))
    assert_mean(losses, exact)
    assert_mean(found, expected)


def test_baselines_make_score_functions_less_noisy(device: torch.device) -> None:
    model, guide, (x,) = pairs.discrete(device, n=1)
    rows = x.expand(ROWS, pairs.D)
    plain, less = (
        repeated(objective, model, guide, rows)[1].var(0)[-4:].sum()
        for objective in (o.ELBO(4), o.ELBO(4, baseline="leave_one_out"))
    )
    assert less < 0.7 * plain
    moving = o.ELBO(baseline="moving_average")
    for _ in range(3):
        moving.loss(model, guide, rows)
    state = moving.state_of(model, guide, rows)
    assert state.get_buffer("average").item() == 0.0  # evaluation moves nothing
    moving.loss_and_grads(model, guide, rows)
    assert state.get_buffer("average").item() != 0.0


# The rate in closed form


def test_the_analytic_rate_is_mean_field_elbos(device: torch.device) -> None:
    """The same numbers and gradients as Pyro's, by the same seed."""
    vae = pvae.recipes.vae(pairs.D, 2, hidden=(8,), likelihood=likelihoods.Gaussian).to(device)
    x = pairs.data(12, device)
    results = []
    for objective in (
        TraceMeanField_ELBO(3, vectorize_particles=True, max_plate_nesting=1),
        o.ELBO(3, analytic_kl=True, vectorize_particles=True),
    ):
        vae.inspect((x,))
        torch.manual_seed(2)
        results.append(gradients(objective, vae.model, vae.guide, x))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_the_analytic_rate_has_beta_and_looped_particles(device: torch.device) -> None:
    vae = pvae.recipes.vae(pairs.D, 2, hidden=(8,), likelihood=likelihoods.Gaussian).to(device)
    x = pairs.data(12, device)
    q = vae.guide.posterior(x)
    exact = torch.distributions.kl_divergence(q, vae.model.prior().expand(q.batch_shape)).sum()
    for vectorize in (True, False):
        values = []
        for beta in (1.0, 3.0):
            torch.manual_seed(1)
            objective = o.ELBO(2, beta=beta, analytic_kl=True, vectorize_particles=vectorize)
            values.append(objective.loss(vae.model, vae.guide, x))
        assert values[1] - values[0] == pytest.approx(2 * float(exact.detach()))


def test_the_analytic_rate_of_a_chain_the_other_way_round_is_refused(
    device: torch.device,
) -> None:
    """KL(q(z1) || p(z1 | z2)) isn't a term of the bound where z2 is drawn from z1."""
    model, guide, batch = pairs.two_sites(device)
    with pytest.raises(PairError, match="the same order in model and guide"):
        o.ELBO(analytic_kl=True).loss(model, guide, *batch)


# Subsampling, global latents


def plate_of(x: Tensor) -> Any:
    """1,000 data, of which the batch is some."""
    return pyro.plate("data", 1000, subsample=torch.arange(len(x), device=x.device))


class _PlateModel(gaussian.GaussianModel):
    def forward(self, x: Tensor) -> None:
        with plate_of(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), x.new_ones(())))
            pyro.sample("x", dist.Normal(self.w * z, x.new_tensor(gaussian.SIGMA)), obs=x)


class _PlateGuide(gaussian.GaussianGuide):
    def forward(self, x: Tensor) -> None:
        with plate_of(x):
            pyro.sample("z", dist.Normal(self.a * x + self.c, self.log_t.exp()))


def test_a_subsampled_bound_is_right_where_pyros_isnt(device: torch.device) -> None:
    """Plate 1,000, batch 10, K = 64: ours is 100 times the sum over the batch, by 20,000 copies."""
    model, guide = _PlateModel().to(device), _PlateGuide(0.0, 0.0, 1.0).to(device)
    whole_model, whole_guide = gaussian.GaussianModel().to(device), gaussian.GaussianGuide()
    whole_guide = whole_guide.to(device)
    whole_guide.load_state_dict(guide.state_dict())
    x = torch.linspace(-2, 2, 10, device=device)

    def mean_of(objective: Any) -> tuple[float, float]:
        values = torch.tensor([-float(objective.loss(model, guide, x)) for _ in range(300)])
        return float(values.mean()), float(values.std() / math.sqrt(300))

    ours, error = mean_of(o.IWAE(64, vectorize_particles=True))
    copies = [
        -o.IWAE(64, vectorize_particles=True).loss(whole_model, whole_guide, x.repeat(200)) / 2
        for _ in range(10)
    ]
    exact, spread = torch.tensor(copies).mean().item(), torch.tensor(copies).std().item()
    assert abs(ours - exact) < 5 * math.hypot(error, spread / math.sqrt(10))
    evidence = 100 * float(gaussian.log_evidence(whole_model, x).sum().detach())
    assert ours < evidence
    theirs, error = mean_of(RenyiELBO(alpha=0, num_particles=64, vectorize_particles=True))
    assert theirs > evidence + 5 * error


def test_with_a_global_latent_one_draw_is_shared(device: torch.device) -> None:
    """The bound of the design, written out: log p(g) - log q(g) + sum of log mean weights."""
    model, guide, (x,) = pairs.global_latent(device)
    k = 4
    torch.manual_seed(3)
    structure = Pair(model, guide).inspect((x,))
    objective = o.IWAE(k, vectorize_particles=True)
    terms = objective.compute_terms(structure, (x,))
    shift = terms.sites["shift"].draws
    assert shift is not None
    assert bool((shift == shift[:1]).all())
    g = shift[0]
    z = terms.sites["z"].value
    assert z is not None
    loc, log_scale = guide.encoder(x).chunk(2, -1)
    log_q = dist.Normal(loc, log_scale.exp()).log_prob(z).sum(-1)
    log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_x = dist.Normal(model.decoder(z) + g, 1.0).log_prob(x).sum(-1)
    local = ((log_p + log_x - log_q).logsumexp(0) - math.log(k)).sum()
    outside = (
        dist.Normal(0.0, 1.0).log_prob(g)
        - dist.Normal(guide.loc, guide.log_scale.exp()).log_prob(g)
    ).sum()
    loss = objective.surrogate(terms, objective.make_state(structure))
    torch.testing.assert_close(-loss, local + outside)
    loss.backward()
    assert guide.loc.grad is not None
    assert bool(guide.loc.grad.abs().max() > 0)


def test_the_shared_draws_gradient_is_exact(device: torch.device) -> None:
    """By one particle: the bound is then the ELBO, whose gradient Pyro's own loss gives."""
    model, guide, (x,) = pairs.global_latent(device)
    many, one = o.IWAE(1), o.ELBO()
    torch.manual_seed(0)
    first = gradients(many, model, guide, x)
    torch.manual_seed(0)
    second = gradients(one, model, guide, x)
    assert first[0] == pytest.approx(second[0])
    torch.testing.assert_close(first[1], second[1])


# Sides that share parameters


class _TiedGuide(nn.Module):
    def __init__(self, w: nn.Parameter) -> None:
        super().__init__()
        self.w, self.c = w, nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.w * x + self.c, x.new_tensor(0.5)))


@pytest.mark.parametrize("kind", [o.DReG, o.PIWAE, o.RWS, o.CUBO])
def test_two_losses_refuse_shared_parameters(kind: Any, device: torch.device) -> None:
    model = gaussian.GaussianModel().to(device)
    guide = _TiedGuide(model.w).to(device)
    x = torch.randn(6, device=device)
    with pytest.raises(PairError, match=r"(?s)'model\.w' in both.*shared='model'"):
        kind().loss(model, guide, x)
    found = {}
    for side in ("model", "guide"):
        torch.manual_seed(0)
        loss = kind(shared=side).differentiable_loss(model, guide, x)
        (found[side],) = torch.autograd.grad(loss, [model.w])
    assert not torch.allclose(found["model"], found["guide"])
    o.STL().loss(model, guide, x)  # leaves out a mean of 0, whoever has the parameters


def test_draws_without_a_gradient_are_refused_with_what_to_do(device: torch.device) -> None:
    model, guide, batch = pairs.discrete(device)
    with pytest.raises(PairError, match=r"(?s)reparametrised.*VIMCO"):
        o.IWAE(3).loss(model, guide, *batch)
