# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # KL divergence and variational inference
#
# What the divergence measures, why it has two directions, which of them variational inference makes small,
# and what it leaves: a gap that is a number. Each line of the derivation of the evidence lower bound is
# checked on a model whose evidence is known. Every claim is an `assert`.

# %%
import functools
import math
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, without ipywidgets

import pyro.distributions as dist
import torch

import pvae
from pvae import VAE, bounds, data, likelihoods, plots, priors, terms

torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
print(f"pvae {pvae.__version__}, torch {torch.__version__}")

# %% [markdown]
# ## One number, two directions
#
# $$KL(q \,\|\, p) = E_q\!\left[\log \frac{q(z)}{p(z)}\right] = E_q[\log q(z)] - E_q[\log p(z)]$$
#
# It is 0 for equal distributions and above 0 for all others. It isn't symmetric, so it is no distance, and it
# has no upper end: a divergence of 1 isn't "utterly different". Unit normals $\sqrt2$ apart have exactly 1.

# %%
standard = dist.Normal(0.0, 1.0)
wide, far = dist.Normal(0.0, 3.0), dist.Normal(math.sqrt(2), 1.0)
for name, q, p in (
    ("equal", standard, standard),
    ("sqrt(2) apart", far, standard),
    ("narrow from wide", standard, wide),
    ("wide from narrow", wide, standard),
    ("10 apart", dist.Normal(10.0, 1.0), standard),
):
    print(f"{name:>17}: {pvae.kl(q, p)}")
assert pvae.kl(standard, standard).mean == 0
assert math.isclose(pvae.kl(far, standard).mean, 1)
assert pvae.kl(standard, wide).mean < 0.4 * pvae.kl(wide, standard).mean
assert pvae.kl(dist.Normal(100.0, 1.0), standard).mean > 4999

# %% [markdown]
# Where torch knows no closed form, `pvae.kl` draws from q and says how sure it is. And where q has mass that p
# excludes, the divergence is infinite.

# %%
mixture = dist.MixtureSameFamily(
    dist.Categorical(torch.tensor([0.4, 0.6])),
    dist.Normal(torch.tensor([-2.5, 1.5]), torch.tensor([0.6, 0.8])),
)
print(pvae.kl(standard, mixture), "|", pvae.kl(standard, dist.LogNormal(0.0, 1.0)))
assert pvae.kl(standard, mixture).num_particles == 10_000
assert pvae.kl(standard, dist.LogNormal(0.0, 1.0)).mean == math.inf

# %% [markdown]
# ## A normal distribution fitted to a mixture, both ways
#
# Fit $q = N(\mu, \sigma^2)$ to the mixture above by making one divergence small, or the other:
#
# - **forward**, $KL(p \,\|\, q)$: wherever p has mass, q must have some. q *covers* p: its mean and variance
#   are those of p.
# - **reverse**, $KL(q \,\|\, p)$: wherever q has mass, p must have some. q *seeks a mode* of p, and which one
#   depends on where it starts.

# %%
grid = torch.linspace(-15, 15, 6001)
log_p = mixture.log_prob(grid)


def divergence(mean, log_scale, forward):
    log_q = dist.Normal(mean, log_scale.exp()).log_prob(grid)
    if forward:
        return torch.trapezoid(log_p.exp() * (log_p - log_q), grid)
    return torch.trapezoid(log_q.exp() * (log_q - log_p), grid)


def fit_normal(start, forward, steps=600):
    mean, log_scale = torch.tensor(start).requires_grad_(), torch.zeros(()).requires_grad_()
    optimizer = torch.optim.Adam([mean, log_scale], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = divergence(mean, log_scale, forward)
        loss.backward()
        optimizer.step()
    return dist.Normal(mean.detach(), log_scale.exp().detach()), loss.item()


fits = {
    "forward": fit_normal(0.5, forward=True),
    "reverse, from the right": fit_normal(0.5, forward=False),
    "reverse, from the left": fit_normal(-2.0, forward=False),
}
for name, (q, value) in fits.items():
    print(f"{name:>24}: N({q.loc:5.2f}, {q.scale:.2f}^2), its divergence {value:.2f} nats")
covering = fits["forward"][0]
assert math.isclose(covering.loc, mixture.mean, abs_tol=0.01)
assert math.isclose(covering.scale, mixture.stddev, abs_tol=0.01)
assert abs(fits["reverse, from the right"][0].loc - 1.5) < 0.1
assert abs(fits["reverse, from the left"][0].loc + 2.5) < 0.1
assert all(fits[n][0].scale < 0.5 * covering.scale for n in fits if n != "forward")

# %%
figure = plots.Picture(figsize=(6, 3), dpi=80, layout="constrained")
axis = figure.subplots()
axis.fill_between(grid, log_p.exp(), color="lightgrey", label="p, the mixture")
for name, (q, _) in fits.items():
    axis.plot(grid, q.log_prob(grid).exp(), label=name)
axis.set(xlim=(-6, 6), xlabel="z", ylabel="density")
axis.legend(fontsize=8)
figure

# %% [markdown]
# **Variational inference makes the reverse one small**, $KL(q(z) \,\|\, p(z\mid x))$: its expectation is over q,
# from which we can draw; the forward one's is over the posterior, from which we can't. That is why its
# posteriors come out too narrow rather than too wide. (Objectives for the other direction are `RWS` and
# `CUBO`; see tutorial 04.)
#
# ## The derivation, line by line
#
# For one datum x:
#
# $$\begin{aligned}
# KL(q(z) \,\|\, p(z\mid x)) &= E_q[\log q(z)] - E_q[\log p(z\mid x)] &(1)\\
#  &= E_q[\log q(z)] - E_q[\log p(x\mid z)] - E_q[\log p(z)] + \log p(x) &(2)\\
#  &= KL(q(z) \,\|\, p(z)) - E_q[\log p(x\mid z)] + \log p(x) &(3)\\
# \log p(x) &= \underbrace{E_q[\log p(x\mid z)] - KL(q(z) \,\|\, p(z))}_{\text{ELBO}} + KL(q(z) \,\|\, p(z\mid x)) &(4)
# \end{aligned}$$
#
# A model whose posterior and evidence are known in closed form: probabilistic PCA. The guide is mean-field and
# not the posterior.

# %%
weight = torch.tensor([[1.0, 0.8], [0.7, 1.0], [1.1, 0.9], [0.8, 1.1], [0.9, 0.7]])
toy = data.LinearGaussian(weight, torch.zeros(5), sigma=0.8)
x = toy.sample(1)
decoder = torch.nn.Linear(2, 5)
with torch.no_grad():
    decoder.weight.copy_(toy.weight)
    decoder.bias.copy_(toy.bias)
decoder.requires_grad_(requires_grad=False)
likelihood = likelihoods.Gaussian(decoder, 5, sigma=toy.sigma)
model_and_guide = functools.partial(VAE, priors.StandardNormal(2), likelihood)
q = dist.Normal(torch.tensor([[0.3, -0.8]]), torch.tensor([[0.25, 0.4]])).to_event(1)
mean, covariance = toy.posterior(x)
posterior = dist.MultivariateNormal(mean, covariance)
prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
evidence = toy.log_evidence(x)

z = q(torch.Size([200_000]))
log_q, log_prior = q.log_prob(z), prior.log_prob(z)
log_likelihood = dist.Normal(decoder(z), toy.sigma).to_event(1).log_prob(x).detach()
log_posterior = posterior.log_prob(z)
with torch.no_grad():
    exact = pvae.kl(q, dist.MultivariateNormal(mean, covariance), 200_000).values
    line_1 = (log_q - log_posterior).mean()
    line_2 = (log_q - log_likelihood - log_prior).mean() + evidence
    line_3 = pvae.kl(q, prior).values - log_likelihood.mean() + evidence
print(f"KL(q || posterior): {exact.item():.3f}")
print(f"lines (1) to (3):   {line_1:.3f}, {line_2.item():.3f}, {line_3.item():.3f}")
assert torch.allclose(line_1, line_2.squeeze(), atol=1e-9)  # the same draws: Bayes' rule, exactly
assert torch.allclose(line_1, line_3.squeeze(), atol=0.05)  # the divergence in closed form

# %% [markdown]
# Line (2) is Bayes' rule, so with the same draws it holds to the last digit. Line (4) to the digit: with the
# divergence of normals in closed form, and pvae's ELBO beside it.


# %%
class Fixed(torch.nn.Module):
    """q(z | x) = the same q for every x; its parameters are the lecture's theta."""

    def __init__(self, loc, scale):
        super().__init__()
        self.loc, self.log_scale = torch.nn.Parameter(loc), torch.nn.Parameter(scale.log())

    def forward(self, x):
        return dist.Normal(self.loc, self.log_scale.exp()).expand([len(x), 2]).to_event(1)


def exact_elbo(loc, scale):
    """In closed form: the likelihood's expectation under a mean-field normal, and the divergence."""
    q = dist.Normal(loc, scale).to_event(1)
    expected = dist.Normal(decoder(loc), toy.sigma).log_prob(x).sum()
    expected = expected - (toy.weight.square() @ scale.square()).sum() / (2 * toy.sigma**2)
    return expected - torch.distributions.kl_divergence(q, prior).squeeze()


def exact_gap(loc, scale):
    q = dist.MultivariateNormal(loc, scale_tril=scale.diag())
    return torch.distributions.kl_divergence(q, dist.MultivariateNormal(mean[0], covariance))


loc, scale = q.mean[0], q.stddev[0]
total = exact_elbo(loc, scale) + exact_gap(loc, scale)
print(f"ELBO {exact_elbo(loc, scale):.10f} + gap {exact_gap(loc, scale):.10f} = {total:.10f}")
print(f"log p(x)                                    {evidence.item():.10f}")
assert math.isclose(total, evidence, abs_tol=1e-10)

pair = model_and_guide(Fixed(loc, scale))
estimate = bounds.elbo(pair, x, 20_000)
print(estimate)
assert abs(estimate.total - exact_elbo(loc, scale)) < 5 * estimate.se_total

# %% [markdown]
# ## The evidence doesn't move with theta
#
# Whatever q is, the two parts add up to the same number. Making the ELBO larger in theta is therefore the same
# as making $KL(q \,\|\, p(z\mid x))$ smaller, though nobody can compute the latter.

# %%
for _ in range(5):
    loc, scale = torch.randn(2), torch.rand(2) + 0.1
    parts = exact_elbo(loc, scale), exact_gap(loc, scale)
    print(f"ELBO {parts[0]:9.3f}   gap {parts[1]:8.3f}   sum {sum(parts):.6f}")
    assert math.isclose(sum(parts), evidence, abs_tol=1e-9)

# %% [markdown]
# ## The gap that is left
#
# Optimise q: the gap falls to the least that the family can do. A mean-field guide keeps one, because the
# posterior is correlated; a full covariance has none.

# %%
theta = Fixed(torch.zeros(2), torch.ones(2))
mean_field = model_and_guide(theta)
run = pvae.fit(
    mean_field,
    x,
    pvae.objectives.ELBO(16, analytic_kl=True),
    epochs=1500,
    lr=0.02,
    lr_schedule=pvae.schedules.Cosine(),
    device="cpu",  # where the closed forms are computed
    progress=False,
)
left = exact_gap(theta.loc.detach(), theta.log_scale.exp().detach()).item()
precision = torch.linalg.inv(covariance)
least = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()
print(f"gap of the best mean-field guide: {left:.4f} nats; by formula {least:.4f}")
print(f"its standard deviations {theta.log_scale.exp().tolist()}")
print(f"those of the posterior  {covariance.diagonal().sqrt().tolist()}: the reverse divergence")
assert abs(left - least) < 2e-3
assert (theta.log_scale.exp() < covariance.diagonal().sqrt()).all()
weighted = bounds.evidence(mean_field, x, 100_000)
print(weighted)
assert exact_elbo(loc, scale) < weighted.total < evidence.item() + 5 * weighted.se_total

# %% [markdown]
# (Importance weights make most of the gap good: `bounds.evidence` goes to log p(x) with more draws. From a guide
# this narrow it comes slowly, and from below.)
#
# ## At a fixed q, the decoder is fitted by weighted maximum likelihood
#
# The divergence to the prior has no decoder in it. What moves the decoder is $E_q[\nabla_\phi \log p_\phi(x\mid z)]$:
# the gradient of a maximum-likelihood estimator with inputs z drawn from q and targets x.

# %%
learned = torch.nn.Linear(2, 5)
pair = VAE(
    priors.StandardNormal(2), likelihoods.Gaussian(learned, 5, sigma=toy.sigma), Fixed(loc, scale)
)
many = toy.sample(50)
torch.manual_seed(7)
loss = pvae.objectives.ELBO().differentiable_loss(pair.model, pair.guide, many)
by_elbo = torch.autograd.grad(loss, list(learned.parameters()))
torch.manual_seed(7)
inputs = terms.compute(pair.inspect((many,)), (many,)).sites["z"].value[0].detach()
errors = (many - learned(inputs)).square().sum() / (2 * toy.sigma**2)  # regression of x on z
by_regression = torch.autograd.grad(errors, list(learned.parameters()))
apart = max((a - b).abs().max() for a, b in zip(by_elbo, by_regression, strict=True))
print(f"largest difference of the two gradients: {apart:.1e}")
assert apart < 1e-9

# %% [markdown]
# | the lecture | here |
# |---|---|
# | $KL(q \,\|\, p)$ | `pvae.kl(q, p)` |
# | $E_q[\log p(x\mid z)] - KL(q \,\|\, p(z))$ | `bounds.elbo(model, guide, x)`: less distortion, less rate |
# | $\log p(x)$ | `bounds.evidence(model, guide, x)`, or a toy's `log_evidence` |
# | what is left, $KL(q \,\|\, p(z\mid x))$ | the difference of the two |
#
# Which bound to train with when is the subject of the next tutorial.
