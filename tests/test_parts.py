"""Priors, likelihoods and guides: one table of constructors, densities against independent ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor, nn

import pvae
from pvae import guides, likelihoods, priors, terms
from pvae.conditional import Conditional, as_conditional, positive_scale
from pvae.errors import PvaeError, UndefinedError
from pvae.networks import MLP, ConvDecoder
from pvae.pair import Pair
from pvae.testing import check_conditional

D, Q, N = 6, 3, 4


def decoder(num_params: int = 1) -> nn.Module:
    return MLP(Q, num_params * D, (8,))


def encoder(num_params: int) -> nn.Module:
    return MLP(D, num_params * Q, (8,))


def latents() -> tuple[Tensor]:
    return (torch.randn(N, Q),)


def data() -> tuple[Tensor]:
    return (torch.randn(N, D),)


def classes() -> tuple[Tensor]:
    return (torch.arange(N),)


class ByHand(Conditional):
    """A user's own part."""

    def __init__(self) -> None:
        super().__init__(Q)
        self.loc = nn.Parameter(torch.zeros(Q))
        self.register_buffer("one", torch.ones(Q))

    def forward(self, *context: Tensor) -> Any:
        one = self.get_buffer("one")
        return dist.StudentT(3 * one, self.loc, one).to_event(1)


def flow() -> Conditional:
    zuko = pytest.importorskip("zuko", reason="zuko is an extra")
    return as_conditional(zuko.flows.NSF(Q, transforms=1, hidden_features=(8,)))


def conditional_flow() -> Conditional:
    zuko = pytest.importorskip("zuko", reason="zuko is an extra")
    return as_conditional(zuko.flows.MAF(Q, context=D, transforms=1, hidden_features=(8,)))


Table = dict[str, tuple[Callable[[], Conditional], Callable[[], tuple[Tensor, ...]]]]

PARTS: Table = {
    "standard normal": (lambda: priors.StandardNormal(Q), tuple),
    "image latent": (lambda: priors.StandardNormal((2, 3, 3)), tuple),
    "learned normal": (lambda: priors.Normal(Q), tuple),
    "laplace": (lambda: priors.Laplace(Q, rate=2.0), tuple),
    "flat": (lambda: priors.Flat(Q), tuple),
    "instance": (lambda: as_conditional(dist.Normal(torch.zeros(Q), 1.0).to_event(1)), tuple),
    "function": (
        lambda: as_conditional(lambda: dist.Laplace(torch.zeros(Q), 1.0).to_event(1)),
        tuple,
    ),
    "mixture": (
        lambda: as_conditional(
            dist.MixtureSameFamily(
                dist.Categorical(torch.ones(5)),
                dist.Normal(torch.randn(5, Q), 1.0).to_event(1),
            )
        ),
        tuple,
    ),
    "by hand": (ByHand, tuple),
    "flow": (flow, tuple),
    "prior given labels": (lambda: guides.MeanField(nn.Embedding(N, 2 * Q), Q), classes),
    "bernoulli": (lambda: likelihoods.Bernoulli(decoder, D), latents),
    "bernoulli, grey": (lambda: likelihoods.Bernoulli(decoder, D, grey_values=True), latents),
    "bernoulli, images": (
        lambda: likelihoods.Bernoulli(ConvDecoder(Q, (1, 5, 7), (4,)), (1, 5, 7)),
        latents,
    ),
    "binomial": (lambda: likelihoods.Binomial(decoder, D, total_count=16), latents),
    "categorical": (lambda: likelihoods.Categorical(decoder, D, levels=5), latents),
    "gaussian, fixed": (lambda: likelihoods.Gaussian(decoder, D, sigma=0.5), latents),
    "gaussian, shared": (lambda: likelihoods.Gaussian(decoder, D, sigma="shared"), latents),
    "gaussian, feature": (lambda: likelihoods.Gaussian(decoder, D, sigma="feature"), latents),
    "gaussian, predicted": (lambda: likelihoods.Gaussian(decoder, D, sigma="predicted"), latents),
    "gaussian, optimal": (lambda: likelihoods.Gaussian(decoder, D, sigma="optimal"), latents),
    "mean field": (lambda: guides.MeanField(encoder, Q), data),
    "mean field, log variance": (
        lambda: guides.MeanField(encoder, Q, to_scale=lambda r: (0.5 * r).exp()),
        data,
    ),
    "point": (lambda: guides.Point(encoder, Q), data),
    "conditional flow": (conditional_flow, data),
}


@pytest.mark.parametrize("name", PARTS)
def test_contract(name: str, device: torch.device) -> None:
    if "flow" in name:
        torch.set_default_dtype(torch.float32)  # zuko's buffers are of the default type
    make, context = PARTS[name]
    part = make().to(device)
    check_conditional(part, *(c.to(device) for c in context()))


@pytest.mark.parametrize("name", PARTS)
def test_parts_survive_a_round_trip_of_their_state(name: str) -> None:
    make, context = PARTS[name]
    part, other = make(), make()
    other.load_state_dict(part.state_dict())
    contexts = context()
    part.eval()
    other.eval()
    fn = part(*contexts)
    value = torch.zeros(fn.batch_shape + fn.event_shape)
    if name != "point":
        torch.testing.assert_close(fn.log_prob(value), other(*contexts).log_prob(value))


# Densities


@torch.no_grad()
def test_normalised_over_all_values() -> None:
    """Probabilities of every possible value sum to one; grey Bernoulli has no such thing."""
    z = torch.randn(1, Q)
    binary = likelihoods.Bernoulli(MLP(Q, 1, (4,)), 1)(z)
    assert float(binary.log_prob(torch.tensor([[0.0], [1.0]])).exp().sum()) == pytest.approx(1)
    counts = likelihoods.Binomial(MLP(Q, 1, (4,)), 1, total_count=16)(z)
    values = torch.arange(17.0).unsqueeze(-1)
    assert float(counts.log_prob(values).exp().sum()) == pytest.approx(1)
    levels = likelihoods.Categorical(MLP(Q, 17, (4,)), 1, levels=17)(z)
    assert float(levels.log_prob(values).exp().sum()) == pytest.approx(1)
    grey = likelihoods.Bernoulli(MLP(Q, 1, (4,)), 1, grey_values=True)(z)
    grid = torch.linspace(0, 1, 1001).unsqueeze(-1)
    assert float(grey.log_prob(grid).exp().mean()) < 0.9  # no density on [0, 1]


def test_binomial_against_scipy() -> None:
    z = torch.randn(N, Q)
    part = likelihoods.Binomial(decoder, D, total_count=16)
    x = torch.randint(0, 17, (N, D)).double()
    p = part.network(z).sigmoid().detach().numpy()
    expected = scipy.stats.binom.logpmf(x.numpy(), 16, p).sum(1)
    torch.testing.assert_close(part(z).log_prob(x).detach(), torch.from_numpy(expected))


def test_categorical_reads_the_first_axis_of_parameters_as_levels() -> None:
    """The decoder's output is (..., L * D), level by level, as convolutions write channels."""
    logits = torch.randn(N, 5, D)

    class Fixed(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return logits.reshape(N, 5 * D)

    fn = likelihoods.Categorical(Fixed(), D, levels=5)(torch.zeros(N, Q))
    x = torch.randint(0, 5, (N, D))
    expected = logits.log_softmax(1).gather(1, x.unsqueeze(1)).sum((1, 2))
    torch.testing.assert_close(fn.log_prob(x.double()), expected)
    mean = (logits.softmax(1) * torch.arange(5.0)[:, None]).sum(1)
    torch.testing.assert_close(fn.mean, mean)


def test_gaussian_at_one_half_is_the_squared_error() -> None:
    z, x = torch.randn(N, Q), torch.randn(N, D)
    part = likelihoods.Gaussian(decoder, D, sigma=math.sqrt(0.5))
    squared = (x - part.network(z)).square().sum(1)
    expected = -squared - D / 2 * math.log(math.pi)
    torch.testing.assert_close(part(z).log_prob(x), expected)


def test_laplace_is_the_l1_penalty_up_to_its_constant() -> None:
    z = torch.randn(N, Q)
    prior = priors.Laplace(Q, rate=2.5)()
    expected = -2.5 * z.abs().sum(1) - Q * math.log(2 / 2.5)
    torch.testing.assert_close(prior.log_prob(z), expected, rtol=0, atol=1e-12)


def test_flat_scores_zero_and_says_why_it_cant_be_sampled() -> None:
    fn = priors.Flat(Q)()
    assert fn.expand([7]).log_prob(torch.randn(7, Q)).tolist() == [0.0] * 7
    with pytest.raises(UndefinedError, match="ex-post density"):
        fn.sample()


@pytest.mark.parametrize(
    ("sigma", "shape"), [("shared", ()), ("feature", (D,)), ("predicted", None), (0.5, None)]
)
def test_gaussian_sigma(sigma: Any, shape: tuple[int, ...] | None) -> None:
    part = likelihoods.Gaussian(decoder, D, sigma=sigma)
    z, x = torch.randn(N, Q), torch.randn(N, D)
    if shape is not None:
        part.raw_sigma.data.normal_()
        assert part.raw_sigma.shape == shape
        scale = positive_scale(part.raw_sigma) + 1e-3
        loc = part.network(z)
    elif sigma == "predicted":
        loc, raw = part.network(z).chunk(2, -1)
        scale = positive_scale(raw) + 1e-3
    else:
        loc, scale = part.network(z), torch.tensor(0.5)
    expected = torch.distributions.Normal(loc, scale).log_prob(x).sum(1)
    torch.testing.assert_close(part(z).log_prob(x), expected)
    assert part.learns_scale is (sigma != 0.5)


def test_optimal_sigma_is_the_batchs_in_training() -> None:
    """The best sigma there is: no other gives the batch a higher likelihood."""
    part = likelihoods.Gaussian(decoder, D)
    z, x = torch.randn(N, Q), torch.randn(N, D)
    fn = part(z)
    value = fn.log_prob(x).sum()
    best = (x - part.network(z)).square().mean().sqrt()
    torch.testing.assert_close(
        value, torch.distributions.Normal(part.network(z), best).log_prob(x).sum()
    )
    for other in (0.9 * best, 1.1 * best):
        assert torch.distributions.Normal(part.network(z), other).log_prob(x).sum() < value


def test_optimal_sigmas_gradient_is_that_of_the_fixed_best_one() -> None:
    """At its optimum sigma's own gradient vanishes (the envelope theorem)."""
    part = likelihoods.Gaussian(decoder, D)
    z, x = torch.randn(N, Q), torch.randn(N, D)
    parameters = list(part.parameters())
    ours = torch.autograd.grad(part(z).log_prob(x).sum(), parameters)
    loc = part.network(z)
    best = (x - loc).square().mean().sqrt().detach()
    fixed = torch.autograd.grad(torch.distributions.Normal(loc, best).log_prob(x).sum(), parameters)
    for mine, theirs in zip(ours, fixed, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_optimal_sigma_in_evaluation_is_a_buffer() -> None:
    """log p(x_n | z_n) doesn't depend on its batch-mates, and evaluation changes nothing."""
    part = likelihoods.Gaussian(decoder, D)
    z, x = torch.randn(N, Q), torch.randn(N, D)
    errors = []
    for _ in range(5):
        x_train = torch.randn(N, D)
        part(z).log_prob(x_train)
        errors.append((x_train - part.network(z)).square().mean())
    expected = torch.stack(errors).mean()  # of all training batches alike
    torch.testing.assert_close(part.mean_square, expected.detach())
    part.eval()
    whole = part(z).log_prob(x)
    alone = torch.cat([part(z[i : i + 1]).log_prob(x[i : i + 1]) for i in range(N)])
    torch.testing.assert_close(whole, alone)
    scale = part.mean_square.sqrt()
    torch.testing.assert_close(
        whole, torch.distributions.Normal(part.network(z), scale).log_prob(x).sum(1)
    )
    torch.testing.assert_close(part.mean_square, expected.detach())


def test_optimal_sigma_is_each_particles_own() -> None:
    """Vectorised particles are scored as looped ones are, and noted once."""
    part = likelihoods.Gaussian(decoder, D)
    z, x = torch.randn(3, N, Q), torch.randn(N, D)
    together = part(z).log_prob(x)
    assert float(part.batches_seen) == 1
    torch.testing.assert_close(together, torch.stack([part(each).log_prob(x) for each in z]))


def test_optimal_sigma_is_noted_once_a_step(device: torch.device) -> None:
    """Also where the objective scores twice, as score-function gradients do."""
    model, guide, (x,) = discrete_pair_with_optimal_sigma(device)
    run = pvae.fit((model, guide), x, epochs=3, batch_size=10, progress=False, device=device)
    assert float(model.likelihood.batches_seen) == run.progress.global_step == 6


def test_optimal_sigma_refuses_masks(device: torch.device) -> None:
    pair = pvae.recipes.vae(D, Q, hidden=(4,), likelihood=likelihoods.Gaussian).to(device)
    keep = torch.arange(20, device=device) % 2 == 0

    def model(x: Tensor) -> None:
        with poutine.mask(mask=keep):
            pair.model(x)

    def guide(x: Tensor) -> None:
        with poutine.mask(mask=keep):
            pair.guide(x)

    with pytest.raises(PvaeError, match="mask"):
        terms.compute(
            Pair(model, guide).inspect(torch.randn(20, D, device=device)),
            torch.randn(20, D, device=device),
        )


def discrete_pair_with_optimal_sigma(device: torch.device) -> tuple[Any, Any, tuple[Tensor]]:
    torch.manual_seed(0)
    pair = pvae.VAE(
        dist.Bernoulli(torch.full((Q,), 0.5)).to_event(1),
        likelihoods.Gaussian(nn.Linear(Q, D), D),
        Bits(nn.Linear(D, Q)),
    ).to(device)
    return pair.model, pair.guide, (torch.randn(20, D, device=device),)


class Bits(nn.Module):
    """A guide that can't be reparametrised."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return dist.Bernoulli(logits=self.network(x)).to_event(1)


def test_mean_field_is_reparametrised() -> None:
    """dz/dmu = 1 and dz/dsigma = w for the draw z = mu + sigma w."""
    loc = torch.randn(N, Q, requires_grad=True)
    scale = torch.rand(N, Q).add(0.1).requires_grad_()

    class Output(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return loc, scale

    part = guides.MeanField(Output(), Q, to_scale=lambda raw: raw)
    z = part(torch.zeros(N, D)).rsample()
    w = (z - loc) / scale
    for i in range(Q):
        by_loc, by_scale = torch.autograd.grad(z[:, i].sum(), [loc, scale], retain_graph=True)
        unit = torch.zeros(N, Q)
        unit[:, i] = 1.0
        torch.testing.assert_close(by_loc, unit)
        torch.testing.assert_close(by_scale, unit * w.detach())


def test_the_scale_map_is_safe_everywhere() -> None:
    raw = torch.tensor([-1e30, -800.0, -1.0, 0.0, 1.0, 800.0, 1e30], requires_grad=True)
    scale = positive_scale(raw)
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    scale.log().sum().backward()
    assert raw.grad is not None
    assert bool(raw.grad.isfinite().all())
    assert float(positive_scale(torch.tensor(0.0))) == pytest.approx(1.0, abs=1e-5)
    single = torch.tensor([-1e30, -200.0, 200.0, 1e30], dtype=torch.float32)
    assert bool((positive_scale(single).log().isfinite()).all())


def test_point_scores_its_own_density_and_has_no_randomness() -> None:
    part = guides.Point(encoder, Q)
    x = torch.randn(N, D)
    fn = part(x)
    torch.testing.assert_close(fn.sample(), part.network(x))
    assert part.is_point
    assert not guides.MeanField(encoder, Q).is_point
