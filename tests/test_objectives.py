"""Our ELBO against Pyro's: numbers, gradients, SVI, schedules."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn

from pvae import VAE, guides, likelihoods, priors, recipes
from pvae import terms as t
from pvae.errors import ArgumentError, PairError, UndefinedError
from pvae.networks import MLP
from pvae.objectives import ELBO
from pvae.pair import Pair
from pvae.schedules import Warmup
from tests import pairs

pytestmark = pytest.mark.usefixtures("store")
ALL = pytest.mark.parametrize("name", pairs.PAIRS)


def gradients(objective: Any, pair: pairs.Pair, seed: int = 1) -> tuple[float, dict[str, Any]]:
    model, guide, batch = pair
    parameters = Pair(model, guide).inspect(batch).parameters
    torch.manual_seed(seed)
    loss = objective.differentiable_loss(model, guide, *batch)
    found = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), dict(zip(parameters, found, strict=True))


@ALL
@pytest.mark.parametrize("num_particles", [1, 3])
def test_numbers_and_gradients_are_trace_elbos(
    name: str, num_particles: int, device: torch.device
) -> None:
    """For every kind of pair, by the same seed; score-function sites included."""
    pair = pairs.PAIRS[name](device)
    if name == "enumerated":
        theirs: Any = TraceEnum_ELBO(
            num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1
        )
    else:  # with the nesting known, Pyro makes no draws to guess it
        theirs = Trace_ELBO(
            num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1
        )
    loss, expected = gradients(theirs, pair)
    ours = ELBO(num_particles, vectorize_particles=True)
    value, found = gradients(ours, pair)
    assert value == pytest.approx(loss, rel=1e-9)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-8)


def test_looped_particles_average_score_functions(device: torch.device) -> None:
    pair = pairs.discrete(device)
    loss, expected = gradients(Trace_ELBO(3), pair)
    value, found = gradients(ELBO(3, vectorize_particles=False), pair)
    assert value == pytest.approx(loss)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)


def test_it_runs_in_pyros_svi(device: torch.device) -> None:
    """The plate-scaled sum, as Pyro's ELBOs return it; same steps by the same seed."""
    results = []
    for elbo in (Trace_ELBO(), ELBO()):
        torch.manual_seed(0)
        vae = recipes.vae(pairs.D, 2, hidden=(8,)).to(device)
        x = torch.rand(12, pairs.D, device=device).round()
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
        if isinstance(elbo, ELBO):  # its one look at the pair is on forked generators
            elbo._run_for(vae.model, vae.guide, (x,), {})
        torch.manual_seed(1)
        results.append([svi.step(x) for _ in range(5)] + [svi.evaluate_loss(x)])
    assert results[0] == pytest.approx(results[1], rel=1e-9)


def test_analytic_kl_equals_the_sampled_one(device: torch.device) -> None:
    """TraceMeanField's ELBO against ours: 4.5 standard errors, false alarm below 1e-5."""
    vae = recipes.vae(pairs.D, 2, hidden=(8,)).to(device)
    x = torch.rand(12, pairs.D, device=device).round()
    analytic = -TraceMeanField_ELBO(5000, vectorize_particles=True, max_plate_nesting=1).loss(
        vae.model, vae.guide, x
    )
    terms = t.compute(vae.inspect((x,)), (x,), num_particles=5000)
    each = terms.log_weight.sum(1).detach()
    assert abs(analytic - float(each.mean())) < 2 * 4.5 * float(each.std()) / math.sqrt(5000)
    q = vae.guide.posterior(x)
    exact = torch.distributions.kl_divergence(q, vae.model.prior().expand(q.batch_shape))
    rate = terms.log_q - terms.log_prior
    error = rate.std(0) / math.sqrt(5000)
    # Bonferroni over twelve data: 5.2 standard errors, 12 * 2e-7 < 1e-5.
    assert bool(((rate.mean(0) - exact).abs() < 5.2 * error).all())


def test_the_lectures_loss(device: torch.device) -> None:
    """Gaussian with sigma^2 = 1/2: squared error + closed-form KL + (D / 2) log pi, exactly."""
    vae = VAE(
        priors.StandardNormal(2),
        likelihoods.Gaussian(MLP(2, pairs.D, (8,)), pairs.D, sigma=math.sqrt(0.5)),
        guides.MeanField(MLP(pairs.D, 4, (8,)), 2),
    ).to(device)
    x = pairs.data(12, device)
    torch.manual_seed(4)
    loss = TraceMeanField_ELBO().loss(vae.model, vae.guide, x)
    torch.manual_seed(4)
    with torch.no_grad():
        q = vae.guide.posterior(x)
        mu, sigma = q.base_dist.loc, q.base_dist.scale
        z = mu + sigma * torch.randn(12, 2, device=device)
        squared = (x - vae.decode(z)).square().sum()
        kl = 0.5 * (mu.square() + sigma.square() - 1 - 2 * sigma.log()).sum()
    expected = float(squared + kl) + 12 * pairs.D / 2 * math.log(math.pi)
    assert loss == pytest.approx(expected, rel=1e-12)


# Beta


@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_beta_weighs_the_rate(beta: float, device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    torch.manual_seed(2)
    loss = ELBO(beta=beta).loss(model, guide, *batch)
    torch.manual_seed(2)
    terms = t.compute(Pair(model, guide).inspect(batch), batch)
    expected = -(terms.log_likelihood - beta * (terms.log_q - terms.log_prior)).sum()
    assert loss == pytest.approx(float(expected.detach()))


def test_beta_reaches_score_functions(device: torch.device) -> None:
    """Against the exact gradient by enumerating the discrete latent, 5 standard errors.

    Two-sided over 15 numbers: 15 * 5.7e-7 < 1e-5 false alarms.
    """
    model, guide, (x,) = pairs.discrete(device, n=3)
    beta, weight = 0.4, guide.encoder.weight
    objective = ELBO(2000, beta=beta, vectorize_particles=True)
    draws = []
    for _ in range(30):
        weight.grad = None
        objective.loss_and_grads(model, guide, x)
        draws.append(weight.grad.clone())
    found = torch.stack(draws)
    states = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], device=device)
    q = dist.Bernoulli(logits=guide.encoder(x)[:, None]).log_prob(states).sum(-1)  # (N, 4)
    prior = torch.full((4,), 2 * math.log(0.5), device=device)
    likelihood = dist.Normal(model.decoder(states), 1.0).log_prob(x[:, None]).sum(-1)
    exact = -(q.exp() * (likelihood - beta * (q - prior))).sum()
    (expected,) = torch.autograd.grad(exact, weight)
    error = found.std(0) / math.sqrt(len(draws))
    assert bool(((found.mean(0) - expected).abs() < 5 * error).all())


def test_a_schedule_advances_by_training_steps_alone(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    objective = ELBO(beta=Warmup(4, "steps"))
    betas = []
    for _ in range(6):
        objective.loss(model, guide, *batch)  # evaluation: no advance
        betas.append(objective._run_for(model, guide, batch, {}).state.get_buffer("beta").item())
        objective.loss_and_grads(model, guide, *batch)
    assert betas == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_schedule_in_epochs_needs_fit(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    with pytest.raises(ArgumentError, match=r"resolve\(steps_per_epoch"):
        ELBO(beta=Warmup(4, "epochs")).loss(model, guide, *batch)


def test_the_configuration_cant_be_changed() -> None:
    objective = ELBO(beta=2.0)
    with pytest.raises(AttributeError, match="make a new one with beta="):
        objective.beta = 3.0  # type: ignore[assignment]


def test_enumeration_beside_score_functions_is_refused(device: torch.device) -> None:
    model, _, (x,) = pairs.enumerated(device)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(pairs.D, pairs.Q)

        def forward(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Binomial(3, logits=self.encoder(x)).to_event(1))

    with pytest.raises(PairError, match="TraceEnum_ELBO"):
        ELBO().loss(model, Guide().to(device), x)


# Found by trying to break it


def test_a_draw_of_the_users_own_gets_an_unbiased_score_function(device: torch.device) -> None:
    """A guide that draws by torch and says so by a factor with ``has_rsample=False``.

    Against the exact gradient by enumeration, 5 standard errors; two-sided over 15 numbers,
    15 * 5.7e-7 < 1e-5 false alarms. (Pyro leaves such a factor out of its own weight.)
    """
    model, inner, (x,) = pairs.discrete(device, n=3)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = inner.encoder

        def forward(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                fn = dist.Bernoulli(logits=self.encoder(x)).to_event(1)
                state = fn.sample()
                pyro.factor("q_of_state", fn.log_prob(state), has_rsample=False)
                pyro.sample("z", dist.Delta(state, event_dim=1))

    guide, weight = Guide().to(device), inner.encoder.weight
    draws = []
    objective = ELBO()
    for _ in range(3000):
        weight.grad = None
        objective.loss_and_grads(model, guide, x)
        draws.append(weight.grad.clone())
    found = torch.stack(draws)
    states = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], device=device)
    q = dist.Bernoulli(logits=guide.encoder(x)[:, None]).log_prob(states).sum(-1)
    likelihood = dist.Normal(model.decoder(states), 1.0).log_prob(x[:, None]).sum(-1)
    exact = -(q.exp() * (likelihood + 2 * math.log(0.5) - q)).sum()
    (expected,) = torch.autograd.grad(exact, weight)
    error = found.std(0) / math.sqrt(len(draws))
    assert bool(((found.mean(0) - expected).abs() < 5 * error).all())


def test_keyword_arguments_go_to_both_programs(device: torch.device) -> None:
    class Model(pairs.Generator):
        def forward(self, x: torch.Tensor, shift: float = 0.0) -> None:
            with pyro.plate("data", len(x)):
                self.generate(x + shift)

    class Guide(pairs.Inference):
        def forward(self, x: torch.Tensor, shift: float = 0.0) -> None:
            with pyro.plate("data", len(x)):
                self.infer(x + shift)

    model, guide, x = Model().to(device), Guide().to(device), pairs.data(5, device)
    objective = ELBO()
    objective.loss(model, guide, x)
    torch.manual_seed(0)
    ours = objective.loss(model, guide, x, shift=2.0)
    torch.manual_seed(0)
    assert ours == pytest.approx(Trace_ELBO().loss(model, guide, x, shift=2.0))


def test_a_schedule_advances_when_the_loss_is_differentiated(device: torch.device) -> None:
    """Also as a module, and with bound methods, which are new objects at every access."""
    vae = recipes.vae(pairs.D, 2, hidden=(8,)).to(device)
    x = torch.rand(12, pairs.D, device=device).round()
    objective = ELBO(beta=Warmup(4))
    module = objective(vae.model, vae.guide)
    seen = []
    for _ in range(5):
        loss = module(x)
        seen.append(objective._run_for(vae.model, vae.guide, (x,), {}).state.step)
        loss.backward()
    assert seen == [0, 1, 2, 3, 4]

    class Holder:
        def model(self, x: torch.Tensor) -> None:
            vae.model(x)

        def guide(self, x: torch.Tensor) -> None:
            vae.guide(x)

    holder, other = Holder(), ELBO(beta=Warmup(4))
    for _ in range(3):
        other.loss_and_grads(holder.model, holder.guide, x)
    assert len(other._runs) == 1


def test_beta_is_refused_where_the_rate_isnt_apart(device: torch.device) -> None:
    from tests.test_terms import MixturePrior

    model = MixturePrior(in_data=True).to(device)
    _, guide, (x,) = pairs.enumerated(device)
    ELBO().loss(model, guide, x)
    with pytest.raises(UndefinedError, match="summed out together"):
        ELBO(beta=0.5).loss(model, guide, x)


def test_no_data_and_negative_beta_are_refused() -> None:
    def program() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(PairError, match="a tensor with a row for each datum"):
        ELBO().loss(program, program)
    with pytest.raises(ArgumentError, match=r"analytic_kl.*True or False"):
        ELBO(analytic_kl="yes")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="at least 0"):
        ELBO(beta=-1.0)
