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
# # A first VAE
#
# A variational autoencoder is two probabilistic programs: a **model** $p(z)\,p(x\mid z)$ that says how
# data come about, and a **guide** $q(z\mid x)$ that says which $z$ may have made an $x$. This notebook
# builds the pair, runs the learning algorithm by hand and then with `pvae.fit`, samples without the
# encoder, and looks at the trick that makes it learnable at all: reparametrisation, with its variance
# beside that of the alternative. Every claim is an `assert`.

# %%
import functools
import math
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, without ipywidgets

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO

import pvae
from pvae import bounds, data, guides, likelihoods, plots, priors, terms
from pvae.networks import MLP

torch.manual_seed(0)
torch.set_num_threads(1)
print(f"pvae {pvae.__version__}, torch {torch.__version__}, pyro {pyro.__version__}")

# %% [markdown]
# ## The data, and the likelihood they ask for
#
# scikit-learn's digits are 8x8 images in which each pixel *counts* the lit cells of a 4x4 block. A count
# of lit cells out of 16 is a binomial count, so that is the likelihood: a normalised probability of the
# very numbers in the file.

# %%
digits = data.load("digits")
x_train, x_valid, x_test = (
    torch.as_tensor(part.arrays[0]) for part in (digits.train, digits.valid, digits.test)
)
y_test = digits.test.arrays[1]
plots.samples(x_train[:20], title="digits: counts from 0 to 16")

# %% [markdown]
# ## The pair
#
# $$p(z) = N(0, I), \qquad p(x\mid z) = \prod_d \mathrm{Bin}\big(x_d;\, 16,\, \sigma(f_d(z))\big),
# \qquad q(z\mid x) = N\big(\mu(x),\ \mathrm{diag}\,\sigma^2(x)\big)$$
#
# | symbol | code |
# |---|---|
# | $p(z)$ | `priors.StandardNormal` |
# | decoder $f$ | `MLP(2, 64)` inside `likelihoods.Binomial` |
# | encoder $(\mu, \sigma)$ | `MLP(64, 2 * 2)` inside `guides.MeanField`; its output is split in two |


# %%
def build(prior=priors.StandardNormal, likelihood=None, latent_dim=2, seed=0):
    torch.manual_seed(seed)
    likelihood = likelihood or functools.partial(likelihoods.Binomial, total_count=16)
    return pvae.VAE(
        prior=prior(latent_dim),
        likelihood=likelihood(lambda p: MLP(latent_dim, 64 * p), 64),
        guide=guides.MeanField(MLP(64, 2 * latent_dim, in_scale=1 / 16), latent_dim),
    )


vae = build()


# %% [markdown]
# `vae.model` and `vae.guide` are Pyro programs. As a picture, with the plate that says "for each of the N
# data" (`pyro.render_model(vae.model, (x,))` draws the model, too, where graphviz is installed):


# %%
def draw_pair():
    _, axes = plt.subplots(1, 2, figsize=(6, 2.4), dpi=70)
    for axis, title, arrow in ((axes[0], "model", "z→x"), (axes[1], "guide", "x→z")):
        axis.set_title(title)
        axis.add_patch(plt.Rectangle((0.05, 0.05), 0.9, 0.9, fill=False))
        axis.text(0.9, 0.08, "N", ha="right")
        for name, at, shade in (("z", 0.28, "white"), ("x", 0.72, "lightgrey")):
            axis.add_patch(plt.Circle((at, 0.55), 0.13, facecolor=shade, edgecolor="black"))
            axis.text(at, 0.55, name, ha="center", va="center")
        start, end = (0.41, 0.59) if arrow == "z→x" else (0.59, 0.41)
        style = {"arrowstyle": "->", "linestyle": "-" if arrow == "z→x" else "--"}
        axis.annotate("", xy=(end, 0.55), xytext=(start, 0.55), arrowprops=style)
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.axis("off")


draw_pair()
# %%
trace = pyro.poutine.trace(vae.model).get_trace(x_train[:5])
print(trace.format_shapes())

# %% [markdown]
# ## The learning algorithm, step by step
#
# 1. A batch goes to the encoder.
# 2. Its output is split into a mean and a scale.
# 3. One latent is drawn for each datum: $z = \mu + \sigma w$ with $w \sim N(0, I)$.
# 4. Each is decoded.
# 5. The loss is the reconstruction term plus the KL divergence; backpropagate.

# %%
batch = x_train[:64]
torch.manual_seed(1)

mu, raw = vae.guide.posterior.network(batch).chunk(2, dim=-1)  # 1 and 2
sigma = vae.guide.posterior.to_scale(raw)
w = torch.randn(64, 2)
z = mu + sigma * w  # 3
logits = vae.model.likelihood.network(z)  # 4
log_likelihood = dist.Binomial(16, logits=logits).log_prob(batch).sum(1)
log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(1)
log_q = dist.Normal(mu, sigma).log_prob(z).sum(1)
loss = -(log_likelihood + log_prior - log_q).sum()  # 5

torch.manual_seed(1)
by_pyro = Trace_ELBO().loss(vae.model, vae.guide, batch)
print(f"by hand {loss.item():.3f}, Pyro's Trace_ELBO {by_pyro:.3f}")
assert math.isclose(loss.item(), by_pyro, rel_tol=1e-5)

# %% [markdown]
# The same numbers, for any pair, are `terms`: one traced pass, kept apart by site. The ELBO splits into
# **distortion** (what the reconstruction costs) and **rate** (what the code costs).

# %%
torch.manual_seed(1)
found = terms.compute(vae.inspect((batch,)), (batch,))
assert torch.allclose(found.log_likelihood[0], log_likelihood, rtol=1e-4)
assert torch.allclose(found.log_weight.sum(), -loss, rtol=1e-5)
for name, site in found.sites.items():
    print(f"{name}: {site.kind}, value {tuple(site.value.shape)}")

# %% [markdown]
# `fit` is that loop: one fused optimiser, no waiting for the device, a validation ELBO each epoch.

# %%
run = pvae.fit(
    vae,
    x_train,
    valid=x_valid,
    epochs=60,
    batch_size=64,
    lr=2e-3,
    progress=False,
)
assert run.history[-1]["valid_elbo"] > run.history[0]["valid_elbo"] + 100
plots.training_curve(run.history)

# %% [markdown]
# ## What is it worth?
#
# The ELBO is a lower bound on $\log p(x)$; importance weighting with K draws gives a tighter one. Two
# standard errors belong to each: over data (other digits) and over draws (the same digits, other noise).

# %%
lower = bounds.elbo(vae, x_test, num_particles=10)
better = bounds.evidence(vae, x_test, num_particles=500)
print(lower)
print(better)
assert lower.mean < better.mean
assert math.isclose(lower.mean, -lower.distortion.mean - lower.rate.mean, rel_tol=1e-6)

# %% [markdown]
# ## The sampling algorithm
#
# 1. Draw $z \sim p(z)$.  2. Decode it, and draw $x \sim p(x\mid z)$. The encoder isn't used. A grid of
# *draws* shows what the model says data look like; a grid of *means* looks smoother, and is no sample.

# %%
torch.manual_seed(2)
by_hand = vae.model.likelihood(vae.model.prior().expand([30]).sample()).sample()
torch.manual_seed(2)
assert torch.equal(vae.sample(30), by_hand)
plots.samples(vae.sample(30))

# %%
plots.samples(vae.sample(30, mean=True), title="means of x given z: no samples")

# %% [markdown]
# ## The latent space
#
# With two dimensions it can be seen whole: where the test digits are, and what each place decodes to.

# %%
plots.latent_map(vae.encode(x_test), y_test)

# %%
plots.manifold(vae.decode, num=12)

# %% [markdown]
# ## The reparametrisation trick
#
# The ELBO is an expectation under $q$, whose parameters we differentiate:
# $\nabla_\theta E_{q_\theta}[f(z)]$. There are two ways to get that from draws.
#
# * **Pathwise**: write $z = \mu + \sigma w$ and differentiate through the draw,
#   $\nabla_\theta f(\mu + \sigma w)$, with $\partial z/\partial\mu = 1$ and
#   $\partial z/\partial\sigma = w$.
# * **Score function**: $f(z)\,\nabla_\theta \log q_\theta(z)$, which needs no gradient of $f$.
#
# Both are unbiased. Their variances are not alike.

# %%
mu, sigma = (
    torch.tensor([0.3, -0.8], requires_grad=True),
    torch.tensor([0.5, 1.2], requires_grad=True),
)
w = torch.randn(2)
z = mu + sigma * w
(dz_dmu,) = torch.autograd.grad(z.sum(), mu, retain_graph=True)
(dz_dsigma,) = torch.autograd.grad(z.sum(), sigma)
assert torch.equal(dz_dmu, torch.ones(2))
assert torch.equal(dz_dsigma, w)

# %% [markdown]
# Now for real: the gradient of one test digit's ELBO by the mean $\mu$ of its own posterior, 2,000
# single-draw estimates of each kind.

# %%
vae.cpu()  # single draws of one datum, by hand: fit may have moved the pair to a GPU
x = x_test[:1]
with torch.no_grad():
    q = vae.guide.posterior(x)
    center, scale = q.base_dist.loc[0], q.base_dist.scale[0]


def elbo_at(z, loc):
    """log p(x, z) - log q(z) of single draws, as a function of the draw and of q's location."""
    log_p = vae.model.likelihood(z).log_prob(x.expand(len(z), -1))
    log_p = log_p + dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    return log_p - dist.Normal(loc, scale).log_prob(z).sum(1)


draws = 2000
torch.manual_seed(3)
noise = torch.randn(draws, 2)

loc = center.expand(draws, 2).clone().requires_grad_()
(pathwise,) = torch.autograd.grad(elbo_at(loc + scale * noise, loc).sum(), loc)

z = (center + scale * noise).detach()
with torch.no_grad():
    value = elbo_at(z, center)
loc = center.expand(draws, 2).clone().requires_grad_()
(score,) = torch.autograd.grad(dist.Normal(loc, scale).log_prob(z).sum(), loc)
score_function = value[:, None] * score

for name, gradient in (("pathwise", pathwise), ("score function", score_function)):
    mean, sd = gradient.mean(0), gradient.std(0)
    print(f"{name:>15}: mean {mean.numpy().round(2)}, standard deviation {sd.numpy().round(1)}")
ratio = (score_function.var(0) / pathwise.var(0)).mean().item()
print(f"the score function's variance is {ratio:.0f} times the pathwise one's")

# Unbiased both: their means differ by less than five standard errors. And one is far noisier.
error = (score_function.var(0) / draws + pathwise.var(0) / draws).sqrt()
assert ((score_function.mean(0) - pathwise.mean(0)).abs() < 5 * error).all()
assert ratio > 10

# %%
_, axis = plt.subplots(figsize=(6, 2.2), dpi=70, layout="constrained")
powers = torch.logspace(1, 4.5, 40)
bins = torch.cat([-powers.flip(0), torch.linspace(-9, 9, 8), powers]).tolist()
axis.hist(score_function[:, 0].tolist(), bins, alpha=0.6, label="score function")
axis.hist(pathwise[:, 0].tolist(), bins, alpha=0.8, label="pathwise")
axis.set_xscale("symlog", linthresh=10)
axis.set(xlabel="estimates of the ELBO's gradient by $\\mu_0$ (logarithmic outside 10)", yticks=[])
axis.legend()
# %% [markdown]
# ## Swap a part
#
# Prior and likelihood are arguments. Evidence tells which is better, *on the same data and in the same
# units*: categorical and binomial are both probabilities of the same counts, so their nats compare.

# %%
variants = {
    "standard normal, binomial": build(),
    "Laplace, binomial": build(prior=priors.Laplace),
    "standard normal, categorical": build(
        likelihood=functools.partial(likelihoods.Categorical, levels=17)
    ),
    "eight dimensions, binomial": build(latent_dim=8),
}
evidence = {}
for name, pair in variants.items():
    pvae.fit(pair, x_train, epochs=40, batch_size=64, lr=2e-3, progress=False)
    evidence[name] = bounds.evidence(pair, x_test, 200)
    print(f"{name:<30} {evidence[name].mean:8.2f} +- {evidence[name].se_data:.2f}")
assert evidence["eight dimensions, binomial"].mean > evidence["standard normal, binomial"].mean + 5

# %% [markdown]
# ## Exercises
#
# 1. Replace the guide's scale map by `to_scale=lambda raw: (0.5 * raw).exp()`. Does the evidence move?
# 2. Give `fit` the objective `pvae.objectives.ELBO(beta=4.0)`. What happens to rate and distortion, and
#    why is the logged `elbo` still comparable?
# 3. Replace `guides.MeanField` by `guides.Point` and the prior by `priors.Flat`. Which of the numbers
#    above still exist? Ask `bounds.evidence`.
