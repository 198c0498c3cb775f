"""Our ELBO against Pyro's: numbers, gradients, SVI, schedules."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pvae
from pvae import VAE, guides, likelihoods, priors, recipes
from pvae import objectives as o
from pvae import terms as t
from pvae.errors import ArgumentError, PairError, UndefinedError
from pvae.networks import MLP
from pvae.objectives import ELBO, Objective
from pvae.objectives.table import ALL
from pvae.pair import Pair
from pvae.schedules import Constant, Schedule, Warmup
from tests import pairs

pytestmark = pytest.mark.usefixtures("store")
EVERY_PAIR = pytest.mark.parametrize("name", pairs.PAIRS)


def gradients(objective: Any, pair: pairs.Pair, seed: int = 1) -> tuple[float, dict[str, Any]]:
    model, guide, batch = pair
    parameters = Pair(model, guide).inspect(batch).parameters
    torch.manual_seed(seed)
    loss = objective.differentiable_loss(model, guide, *batch)
    found = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), dict(zip(parameters, found, strict=True))


@EVERY_PAIR
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
            elbo.state_of(vae.model, vae.guide, x)
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
        betas.append(objective.state_of(model, guide, *batch).get_buffer("beta").item())
        objective.loss_and_grads(model, guide, *batch)
    assert betas == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_schedule_in_epochs_needs_fit(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    with pytest.raises(ArgumentError, match=r"resolve\(steps_per_epoch"):
        ELBO(beta=Warmup(4, "epochs")).loss(model, guide, *batch)


# Settings, and objectives of the user's own


@dataclass(frozen=True)
class Scaled(Objective):
    """gamma times the evidence lower bound."""

    gamma: float | Schedule = 1.0

    def surrogate(self, terms: t.Terms, state: o.ObjectiveState) -> Tensor:
        bound = self.total(terms, state, terms.log_weight.mean(0))
        return -self.value_at("gamma", state) * bound


class Plain(Scaled):
    """Nothing of its own but the bound."""

    bound = "none"


class InitFirst(ELBO):
    def __init__(self, gamma: float) -> None:
        super().__init__(3, beta=2.0)
        self.gamma = gamma

    def surrogate(self, terms: t.Terms, state: o.ObjectiveState) -> Tensor:
        return self.gamma * super().surrogate(terms, state)


class InitLast(InitFirst):
    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        ELBO.__init__(self, 3, beta=2.0)


class NoInit(InitFirst):
    """Doesn't call the base's constructor at all: its defaults are settings, too."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma


@pytest.mark.parametrize(
    ("mine", "plain", "shown"),
    [
        (Scaled(gamma=2.0), ELBO(), "Scaled(gamma=2.0)"),
        (Scaled(3, 2.0), ELBO(3), "Scaled(num_particles=3, gamma=2.0)"),
        (Plain(gamma=2.0), ELBO(), "Plain(gamma=2.0)"),
        (InitFirst(2.0), ELBO(3, beta=2.0), "InitFirst(num_particles=3, beta=2.0, gamma=2.0)"),
        (InitLast(2.0), ELBO(3, beta=2.0), "InitLast(gamma=2.0, num_particles=3, beta=2.0)"),
        (NoInit(2.0), ELBO(), "NoInit(gamma=2.0)"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_objectives_of_the_users_own(
    mine: Objective, plain: Objective, shown: str, device: torch.device
) -> None:
    """Twice the loss and gradient of the objective that they are made from, by the same seed."""
    pair = pairs.two_sites(device)
    expected, gradient = gradients(plain, pair)
    loss, found = gradients(mine, pair)
    assert loss == pytest.approx(2 * expected)
    for name, g in gradient.items():
        torch.testing.assert_close(found[name], 2 * g)
    assert repr(mine) == shown
    model, guide, batch = pair
    run = pvae.fit((model, guide), batch, mine, epochs=2, progress=False, device=device)
    assert all(map(math.isfinite, run.history["loss"]))


def test_a_schedule_of_the_users_own(device: torch.device) -> None:
    model, guide, batch = pairs.two_sites(device)
    objective = Scaled(gamma=Warmup(4))
    losses = []
    for _ in range(6):
        torch.manual_seed(0)
        losses.append(objective.loss_and_grads(model, guide, *batch))
    assert losses == pytest.approx([f * losses[-1] for f in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0)])


def test_settings_cant_be_changed() -> None:
    for objective in (ELBO(beta=2.0), Scaled(), Plain()):
        with pytest.raises(FrozenInstanceError, match="penalty_weight"):
            objective.penalty_weight = 3.0  # type: ignore[misc]
    changed = replace(ELBO(4, beta=2.0), beta=3.0)
    assert changed == ELBO(4, beta=3.0)
    assert changed != ELBO(4, beta=2.0)
    assert hash(changed) == hash(ELBO(4, beta=3.0))


def test_annotations_that_a_function_alone_knows() -> None:
    """Such a class can't be checked, but the settings of its base are."""

    class Local:
        pass

    @dataclass(frozen=True)
    class Mine(ELBO):
        thing: Local | None = None

    assert Mine(2, beta=1).beta == 1.0
    with pytest.raises(ArgumentError, match="beta"):
        Mine(beta=-1.0)


SETTINGS: list[tuple[type[Objective], dict[str, Any], str]] = [
    (ELBO, {"num_particles": 0}, "num_particles: expected an integer of at least 1; got 0"),
    (ELBO, {"beta": "high"}, "beta: expected a finite number of at least 0; got 'high'"),
    (ELBO, {"beta": float("nan")}, "beta: expected a finite number"),
    (ELBO, {"penalty_weight": -1}, "penalty_weight: expected a finite number of at least 0"),
    (ELBO, {"baseline": "mean"}, "'leave_one_out', 'moving_average' or None; got 'mean'"),
    (ELBO, {"baseline": "leave_one_out"}, "leave_one_out': expected an integer of at least 2"),
    (ELBO, {"vectorize_particles": 2}, "vectorize_particles: expected True, False or None"),
    (o.IWAE, {"num_particles": 2.5}, "num_particles: expected an integer"),
    (o.CIWAE, {"mix": 1.1}, "mix: expected a finite number of at least 0 and of at most 1"),
    (o.PIWAE, {"num_means": 0}, "num_means: expected an integer of at least 1"),
    (o.DReG, {"shared": "both"}, "shared: expected 'model', 'guide' or None; got 'both'"),
    (o.VIMCO, {"num_particles": 1}, "num_particles: expected an integer of at least 2"),
    (o.TVO, {"first": 1.0}, "first: expected a finite number above 0 and below 1; got 1.0"),
    (o.CUBO, {"order": 1.0}, "order: expected a finite number above 1; got 1.0"),
    (o.CUBO, {"form": "root"}, "form: expected 'log' or 'exp'; got 'root'"),
    (o.FreeBits, {"per": "datum"}, "per: expected 'dimension' or 'site'"),
    (o.GECO, {"tolerance": None}, "tolerance: expected a finite number; got None"),
    (o.GECO, {"tolerance": 1.0, "decay": 1.0}, "decay: expected a finite number of at least 0 and"),
    (o.TCVAE, {"num_data": 0}, "num_data: expected an integer of at least 1"),
    (o.DIPVAE, {"kind": 3}, "kind: expected 1 or 2; got 3"),
    (o.DIPVAE, {"diagonal": -1.0}, "diagonal: expected a finite number of at least 0"),
    (o.FactorVAE, {"hidden": (8, 0)}, "hidden: expected an integer of at least 1; got 0"),
]


@pytest.mark.parametrize(("kind", "settings", "words"), SETTINGS, ids=lambda v: str(v)[:40])
def test_settings_are_checked_by_their_annotations(
    kind: type[Objective], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ArgumentError, match=re.escape(words)):
        kind(**settings)


def test_the_number_of_draws_comes_first_and_the_rest_by_keyword() -> None:
    for kind in ALL:
        first, *rest = inspect.signature(kind).parameters.values()
        if not issubclass(kind, (o.TCVAE, o.InfoVAE, o.FactorVAE, o.DIPVAE)):  # K is 1
            assert first.name == "num_particles"
            assert first.kind is first.POSITIONAL_OR_KEYWORD
        assert all(p.kind is p.KEYWORD_ONLY for p in rest)


@pytest.mark.parametrize("kind", ALL, ids=lambda k: k.__name__)
def test_copies_are_equal(kind: type[Objective]) -> None:
    required: dict[str, Any] = {"Capacity": {"capacity": Warmup(3)}, "GECO": {"tolerance": 1.0}}
    objective = kind(penalty_weight=Warmup(2), **required.get(kind.__name__, {}))
    other = replace(objective, penalty_weight=0.5)
    for again in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):  # noqa: S301
        assert again == objective != other
        assert repr(again) == repr(objective) != repr(other)


def test_a_constant_schedule_is_its_number() -> None:
    assert ELBO(beta=Constant(1.0)) == ELBO()
    assert repr(ELBO(beta=Constant(4))) == repr(ELBO(beta=4)) == "ELBO(beta=4.0)"


# By name


def test_objectives_by_name() -> None:
    assert o.named("elbo")() == ELBO()
    assert o.named("DReG")(3) == o.DReG(3)
    assert o.named("tcvae")(beta=2.0) == o.TCVAE(beta=2.0)
    with pytest.raises(ArgumentError, match=r"(?s)one of .*dreg, .*vimco.* got 'dregg'.*=.dreg."):
        o.named("dregg")
    with pytest.raises(ArgumentError, match="one of"):  # it has no default of its argument
        o.named("geco")


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
        seen.append(objective.state_of(vae.model, vae.guide, x).step)
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
    assert other.state_of(holder.model, holder.guide, x).step == 3


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

    with pytest.raises(PairError, match="at least one observed site"):
        ELBO().loss(program, program)
    with pytest.raises(ArgumentError, match=r"analytic_kl.*True or False"):
        ELBO(analytic_kl="yes")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="at least 0"):
        ELBO(beta=-1.0)
