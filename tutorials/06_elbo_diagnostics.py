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
# # ELBO diagnostics
#
# An ELBO is one number, and it doesn't say what it is worth: how far it is below log p(x), whether the posterior
# that comes with it can be trusted, whether the latent is used at all. Here a fit is broken in five ways, each is
# found by the diagnostic made for it, and repaired. The model is linear and Gaussian, so that evidence and posterior
# are known, and each verdict stands beside the exact number.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, without ipywidgets

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch.distributions import kl_divergence

import pvae
from pvae import bounds, diagnostics, export, plots, recipes
from pvae import objectives as o
from pvae.data import LinearGaussian

torch.set_num_threads(1)
torch.manual_seed(0)

toy = LinearGaussian(torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.1, -0.6]]), torch.zeros(3), 0.4)
x = toy.sample(300, seed=1)
mean, covariance = toy.posterior(x)
evidence = float(toy.log_evidence(x).mean())
correlation = float(covariance[0, 1] / covariance.diagonal().prod().sqrt())
print(f"log p(x) = {evidence:.3f} nats a datum; the posterior's correlation is {correlation:.2f}")


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ toy.weight.T + toy.bias, toy.sigma).to_event(1), obs=x)


def guide_of(make):
    """A guide that does something to the exact posterior."""

    def guide(x):
        mean, covariance = toy.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", make(mean, covariance))

    return guide


def exact_gap(make):
    """KL(q || p(z | x)), which is log p(x) - ELBO, in closed form."""
    q = make(mean, covariance)
    if isinstance(q, dist.Independent):
        q = dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
    return float(kl_divergence(q, dist.MultivariateNormal(mean, covariance)).mean())


def show(result, *names):
    """The lines of a result that have these names."""
    for line in result.findings():
        if line.name in names:
            print(line)


def verdict(result, name):
    return next(line.verdict for line in result.findings() if line.name == name)


# %% [markdown]
# ## A good fit, on one screen
#
# `fit.diagnose(x)`, or `pvae.diagnose` for any pair, runs what takes less than a few epochs. Lines begin with `+`
# where all is well, `?` where it is worth a look, `!` where something is wrong. Here q is the posterior itself.


# %%
def exact(mean, covariance):
    return dist.MultivariateNormal(mean, covariance)


whole = pvae.diagnose(model, guide_of(exact), x)
print(whole)
assert {line.verdict for line in whole.findings()} <= {"good", "none"}
assert abs(whole.results["elbo"].result.mean - evidence) < 1e-3

# %% [markdown]
# ## 1. Too narrow
#
# The guide's standard deviations are half of what they should be. Importance weights find out: their tail is too
# heavy for averages to settle, and the shape k of a Pareto distribution fitted to it says how heavy. Up to 0.7 is
# fine. Here log w is (1 - 0.5²)|u|²/2, up to a constant, with u normal in two dimensions, so weights are exactly
# Pareto, with k = 0.75.


# %%
def narrow(mean, covariance):
    return dist.MultivariateNormal(mean, covariance / 4)


found = diagnostics.importance(model, guide_of(narrow), x)
show(found, "k-hat above 0.7", "gap, at least")
print(
    f"the exact gap: {exact_gap(narrow):.3f} nats; k-hat is {float(found.khat.mean()):.2f} on average, exact 0.75"
)
assert abs(float(found.khat.mean()) - 0.75) < 0.1
assert verdict(found, "k-hat above 0.7") == "bad"
assert found.gap.mean < exact_gap(narrow) + 0.1

# %% [markdown]
# Simulation-based calibration says the same without weights: a latent drawn from the model, among draws of q for the
# data that it makes, is too often on the outside. It also says in which direction q is off.

# %%
ranks = diagnostics.sbc(model, guide_of(narrow), x)
show(ranks, "SBC p-value", "coverage")
assert "too narrow" in ranks.shape_of(0)
plots.calibration(ranks)

# %% [markdown]
# The repair is a wider q. (A fit gets one by a better encoder, or by maximising a bound that doesn't prefer narrow
# ones, such as IWAE.) Of the exact posterior the weights are constant; they have no tail, and no k-hat.

# %%
repaired = diagnostics.importance(model, guide_of(exact), x)
show(repaired, "k-hat above 0.7", "exact", "gap, at least")
assert repaired.unreliable == 0
assert abs(repaired.gap.mean) < 1e-4

# %% [markdown]
# ## 2. Shifted
#
# q is one and a half standard deviations off. Nothing in the ELBO tells a shift from a narrow q; ranks do.


# %%
def shifted(mean, covariance):
    return dist.MultivariateNormal(mean + 1.5 * covariance.diagonal().sqrt(), covariance)


ranks = diagnostics.sbc(model, guide_of(shifted), x)
show(ranks, "SBC p-value", "coverage")
print(f"the exact gap: {exact_gap(shifted):.3f} nats")
assert ranks.shape_of(0) == ranks.shape_of(1) == "q is too high"
print("repaired:")
repaired = diagnostics.sbc(model, guide_of(exact), x)
show(repaired, "SBC p-value", "coverage")
assert verdict(repaired, "SBC p-value") == "good"

# %% [markdown]
# ## 3. Mean-field, where the posterior is correlated
#
# The best independent Gaussian has the precision's diagonal. `gap` fits q to each datum anew, from the guide's own
# family and from richer ones: what the same family gains was lost by the encoder (amortisation gap), what richer ones
# gain was lost by the family (approximation gap).


# %%
def mean_field(mean, covariance):
    return dist.Normal(mean, covariance.inverse().diagonal().rsqrt()).to_event(1)


parts = diagnostics.gap(model, guide_of(mean_field), x[:50], flow=False, progress=False)
print(parts)
print(f"the exact gap: {exact_gap(mean_field):.3f} nats, all of it the family's")
assert parts.verdict == "family"
assert abs(parts.approximation.mean - exact_gap(mean_field)) < 0.05
assert abs(parts.amortisation.mean) < 0.05

# %% [markdown]
# Marginals that are each right don't make the joint right. With the posterior's own marginals, taken as independent,
# ranks of single dimensions find nothing; TARP, which looks at all together, does.


# %%
def marginals(mean, covariance):
    return dist.Normal(mean, covariance.diagonal().sqrt()).to_event(1)


one_by_one = diagnostics.sbc(model, guide_of(marginals), x)
together = diagnostics.tarp(model, guide_of(marginals), x)
show(one_by_one, "SBC p-value")
show(together, "TARP p-value")
print("repaired, with a full-rank q:")
repaired = diagnostics.tarp(model, guide_of(exact), x)
show(repaired, "TARP p-value")
assert verdict(one_by_one, "SBC p-value") == "good"
assert verdict(together, "TARP p-value") == "bad"
assert verdict(repaired, "TARP p-value") == "good"

# %% [markdown]
# ## 4. Posterior collapse
#
# Digits, and a rate that costs thirty times what it should: q becomes the prior, and the latent says nothing about
# x. Surgery takes the rate apart. The information is what z says about which datum it came from; no more than log N.

# %%
digits = torch.as_tensor(load_digits().data / 16).float().round()
held_out = digits[1500:]


def trained(objective):
    torch.manual_seed(0)
    vae = recipes.vae(64, 8, hidden=(64,))
    pvae.fit(vae.model, vae.guide, digits[:1500], objective, epochs=15, lr=3e-3, progress=False)
    return vae


collapsed, repaired = trained(o.ELBO(beta=30.0)), trained(o.FreeBits(0.2))
before = diagnostics.surgery(collapsed.model, collapsed.guide, held_out)
after = diagnostics.surgery(repaired.model, repaired.guide, held_out)
for result in (before, after):
    show(result, "rate", "information", "collapsed units")
    print()
assert verdict(before, "information") == verdict(before, "collapsed units") == "bad"
assert verdict(after, "information") != "bad"
assert verdict(after, "collapsed units") == "good"

# %% [markdown]
# ## 5. Badly amortised
#
# The family is right, the encoder isn't: all means are pulled to 0. The ELBO alone would suggest a richer family,
# which would gain nothing.


# %%
def lazy(mean, covariance):
    return dist.MultivariateNormal(0.6 * mean, covariance)


parts = diagnostics.gap(model, guide_of(lazy), x[:50], flow=False, progress=False)
show(parts, *(line.name for line in parts.findings()))
few = slice(0, 50)
exact_loss = kl_divergence(
    dist.MultivariateNormal(0.6 * mean[few], covariance),
    dist.MultivariateNormal(mean[few], covariance),
).mean()
print(f"the exact gap of these 50 data: {float(exact_loss):.3f} nats, all of it the encoder's")
assert parts.verdict == "encoder"
assert abs(parts.amortisation.mean - float(exact_loss)) < 0.05
assert diagnostics.gap(model, guide_of(exact), x[:50], flow=False, progress=False).verdict == "fine"

# %% [markdown]
# ## What log p(x) is
#
# A bad guide makes for a low estimate of the evidence, too, however many draws it gets. The curve over K says whether
# it still rises; annealing, or a q fitted to each datum, hardly depends on the guide; and on data that the model has
# made itself, chains run in both directions bound the truth from both sides, on average over their draws.

# %%
curve = bounds.iwae_curve(model, guide_of(shifted), x[:50], 256)
print(curve)
exact_value = float(toy.log_evidence(x[:50]).mean())
annealed = bounds.evidence(model, guide_of(shifted), x[:50], method="ais", progress=False)
local = bounds.evidence(model, guide_of(shifted), x[:50], method="local", progress=False)
print(annealed, local, f"exact: {exact_value:.3f}", sep="\n")
assert float(curve.means[0]) < float(curve.means[-1]) < exact_value + 0.05
assert abs(annealed.mean - exact_value) < 0.1
assert abs(local.mean - exact_value) < 0.02

# %%
slow = bounds.AIS(num_temperatures=300)
sandwich = bounds.bdmc(model, guide_of(shifted), x[:100], 8, ais=slow, progress=False)
print(sandwich)
truth = float(toy.log_evidence(sandwich.batch[0]).mean())
print(f"exact, on these data: {truth:.3f}")
noise = sandwich.upper.per_datum - toy.log_evidence(sandwich.batch[0])
print(f"upper - exact: {float(noise.mean()):.3f} +- {float(noise.std()) / 10:.3f}")
assert abs(sandwich.lower.mean - truth) < 0.1
assert abs(sandwich.upper.mean - truth) < 0.1

# %% [markdown]
# ## Which model
#
# Two models, the same held-out data: what counts is the difference, datum by datum, and its standard error.

# %%
small = recipes.vae(64, 1, hidden=(64,))
pvae.fit(small.model, small.guide, digits[:1500], epochs=15, lr=3e-3, progress=False)
table = bounds.compare(
    {
        name: bounds.evidence(pair.model, pair.guide, held_out, 200)
        for name, pair in {"8 latents": repaired, "1 latent": small, "collapsed": collapsed}.items()
    }
)
print(table)
assert "8 latents" in str(table).splitlines()[1]

# %% [markdown]
# ## In ArviZ's language
#
# `export.to_arviz` gives the draws of prior, posterior and predictives, the pointwise log likelihood, and k-hat, with
# named dimensions, for every plot and table that ArviZ has.

# %%
tree = export.to_arviz(model, guide_of(exact), x[:20], num_samples=500)
print(list(tree.children))
means = torch.as_tensor(tree["posterior"]["z"].mean(("chain", "draw")).to_numpy())
assert torch.allclose(means, mean[:20].to(means), atol=0.2)
