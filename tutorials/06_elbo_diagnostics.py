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
# that comes with it can be trusted, whether the latent is used at all. Here a fit is broken in five ways that
# happen, each is found by the diagnostic made for it, and repaired by the line that was wrong. The model is linear and
# Gaussian, so that evidence and posterior are known, and each verdict stands beside the exact number.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, without ipywidgets

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import kl_divergence
from torch.nn.functional import softplus

import pvae
from pvae import bounds, diagnostics, export, plots, recipes, schedules
from pvae import objectives as o
from pvae.data import LinearGaussian

torch.set_num_threads(1)
torch.manual_seed(0)

toy = LinearGaussian(
    torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.1, -0.6]]), torch.tensor([3.0, -2.0, 1.0]), 0.4
)
train, x = toy.sample(2000, seed=1), toy.sample(500, seed=3)
mean, covariance = toy.posterior(x)
evidence = float(toy.log_evidence(x).mean())
correlation = float(covariance[0, 1] / covariance.diagonal().prod().sqrt())
print(f"log p(x) = {evidence:.3f} nats a datum; the posterior's correlation is {correlation:.2f}")

# %% [markdown]
# The decoder is known, and q(z | x) is learned: a network for the mean, and a covariance that is the same for all x,
# as the exact one is.


# %%
def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ toy.weight.T + toy.bias, toy.sigma).to_event(1), obs=x)


class Gaussian(nn.Module):
    """q(z | x) = N(mean(x), L L'), with L triangular, or diagonal if q is mean-field."""

    def __init__(self, mean, *, is_full=True):
        super().__init__()
        self.mean, self.is_full = mean, is_full
        self.raw, self.below = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))

    def q(self, x):
        tril = torch.diag(softplus(self.raw))
        if self.is_full:
            tril = tril + torch.zeros(2, 2).index_put(
                (torch.tensor([1]), torch.tensor([0])), self.below
            )
        return dist.MultivariateNormal(self.mean(x), scale_tril=tril)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))


def fitted(guide, objective=None):
    return pvae.fit(
        (model, guide), train, objective, valid=x, epochs=40, batch_size=100, lr=3e-2,
        lr_schedule=schedules.Cosine(), progress=False,
    )  # fmt: skip


def exact_gap(guide, x=x):
    """KL(q || p(z | x)) = log p(x) - ELBO, in closed form."""
    mean, covariance = toy.posterior(x)
    with torch.no_grad():
        return float(
            kl_divergence(guide.eval().q(x), dist.MultivariateNormal(mean, covariance)).mean()
        )


def exact_coverage(guide, level, column):
    """How often a latent is in q's central interval, averaged over many x."""
    many = toy.sample(20000, seed=4)
    mean, covariance = toy.posterior(many)
    normal, spread = torch.distributions.Normal(0.0, 1.0), covariance[column, column].sqrt()
    with torch.no_grad():
        q = guide.eval().q(many)
        reach = q.stddev[:, column] * normal.icdf(torch.tensor((1 + level) / 2))
        low, high = (
            (q.mean[:, column] + side * reach - mean[:, column]) / spread for side in (-1, 1)
        )
    return float((normal.cdf(high) - normal.cdf(low)).mean())


def beside(ranks, guide):
    """Measured coverage of the central 80 %, its standard error, and the exact one, by dimension."""
    at = ranks.levels.tolist().index(0.8)
    rows = zip(
        ranks.names, ranks.coverage[at].tolist(), ranks.coverage_se[at].tolist(), strict=True
    )
    found = [(name, c, se, exact_coverage(guide, 0.8, i)) for i, (name, c, se) in enumerate(rows)]
    for name, coverage, se, exact in found:
        print(f"  80 % of q({name} | x) cover {coverage:.3f} +- {se:.3f}; exact {exact:.3f}")
    return all(abs(coverage - exact) < 4 * max(se, 0.01) for _, coverage, se, exact in found)


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
# `fit.diagnose()`, or `pvae.diagnose` for any pair, runs what takes less than a few epochs on the validation data.
# Lines begin with `+` where all is well, `?` where it is worth a look, `!` where something is wrong.

# %%
good = Gaussian(nn.Linear(3, 2))
fit = fitted(good)
whole = fit.diagnose(progress=False)
print(whole)
print(f"the exact gap: {exact_gap(good):.4f} nats")
assert not [line for line in whole.findings() if line.verdict == "bad"]
assert exact_gap(good) < 0.05
plots.learning_curve(diagnostics.learning_curve(fit.history))

# %% [markdown]
# ## 1. Too narrow
#
# The rate was given a weight of 0.25, for sharper reconstructions, and q is read as a posterior all the same. It is
# that of a likelihood to the power of 4: its standard deviations are about half of what they should be.

# %%
narrow = Gaussian(nn.Linear(3, 2))
fit = fitted(narrow, o.ELBO(beta=0.25))
print(fit.diagnose(checks=["elbo", "importance", "sbc", "tarp"], progress=False))
print(f"the exact gap: {exact_gap(narrow):.3f} nats")

# %% [markdown]
# Importance weights find out: their tail is too heavy for averages to settle, and the shape k of a Pareto
# distribution fitted to it says how heavy. Up to 0.7 is fine. Simulation-based calibration says the same without
# weights: a latent drawn from the model, among draws of q for the data that it makes, is too often on the outside.

# %%
found = diagnostics.importance((model, narrow), x)
show(found, "k-hat above 0.7", "gap, at least")
ranks = diagnostics.sbc((model, narrow), x, progress=False)
show(ranks, "SBC p-value")
assert verdict(found, "k-hat above 0.7") != "good"
assert verdict(ranks, "SBC p-value") == "bad"
assert "too narrow" in ranks.shape_of(0)
assert beside(ranks, narrow)
plots.calibration(ranks)

# %% [markdown]
# The repair is the weight: 1, or a warm-up that ends at 1.

# %%
repaired = Gaussian(nn.Linear(3, 2))
fitted(repaired)
ranks = diagnostics.sbc((model, repaired), x, progress=False)
show(diagnostics.importance((model, repaired), x), "k-hat above 0.7", "gap, at least")
show(ranks, "SBC p-value")
assert verdict(ranks, "SBC p-value") != "bad"
assert beside(ranks, repaired)

# %% [markdown]
# ## 2. Shifted
#
# The encoder begins with batch normalisation, whose running mean moves by a thousandth a step: in training batches
# are centred, and in evaluation, after 800 steps, they are not quite. All that the training shows is fine.

# %%
shifted = Gaussian(nn.Sequential(nn.BatchNorm1d(3, momentum=0.001), nn.Linear(3, 2)))
fit = fitted(shifted)
print(fit.diagnose(checks=["elbo", "importance", "sbc"], progress=False))
print(f"the exact gap: {exact_gap(shifted):.3f} nats")
ranks = diagnostics.sbc((model, shifted), x, progress=False)
print([ranks.shape_of(column) for column in range(2)])
assert beside(ranks, shifted)
assert verdict(ranks, "SBC p-value") == "bad"
assert any("too high" in ranks.shape_of(d) or "too low" in ranks.shape_of(d) for d in range(2))

# %% [markdown]
# Ranks say in which direction q is off, and training data far above validation data say that it is not the same
# encoder in both. The repair is a running mean that keeps up.

# %%
repaired = Gaussian(nn.Sequential(nn.BatchNorm1d(3, momentum=0.1), nn.Linear(3, 2)))
fitted(repaired)
ranks = diagnostics.sbc((model, repaired), x, progress=False)
show(ranks, "SBC p-value")
print(f"the exact gap: {exact_gap(repaired):.3f} nats")
assert verdict(ranks, "SBC p-value") != "bad"
assert exact_gap(repaired) < 0.1 * exact_gap(shifted)

# %% [markdown]
# ## 3. Mean-field, where the posterior is correlated
#
# `gap` fits q to each datum anew, from the guide's own family and from richer ones: what the same family gains was
# lost by the encoder (amortisation gap), what richer ones gain was lost by the family (approximation gap).

# %%
mean_field = Gaussian(nn.Linear(3, 2), is_full=False)
fitted(mean_field)


def independent(x):
    """The same q, as a distribution that `gap` can read the family from."""
    pyro.module("independent", mean_field)
    q = mean_field.q(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(q.mean, q.stddev).to_event(1))


parts = diagnostics.gap((model, independent), x[:50], flow=False, progress=False)
print(parts)
best = float(0.5 * (covariance.inverse().diagonal().log().sum() + covariance.logdet()))
print(f"the exact gap: {exact_gap(mean_field):.3f} nats; of the best mean-field q: {best:.3f}")
assert parts.verdict == "family"
assert abs(parts.approximation.mean - best) < 0.03
assert abs(parts.total.mean - exact_gap(mean_field, x[:50])) < 0.05

# %% [markdown]
# Marginals that are each right don't make the joint right. With the posterior's own marginals, taken as independent,
# ranks of single dimensions find nothing; TARP, which looks at all together, does. The repair is a full covariance
# (or a flow), which is the good fit above.


# %%
def marginals(x):
    mean, covariance = toy.posterior(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(mean, covariance.diagonal().sqrt()).to_event(1))


one_by_one = diagnostics.sbc((model, marginals), x, progress=False)
together = diagnostics.tarp((model, marginals), x, progress=False)
repaired = diagnostics.tarp((model, good), x, progress=False)
show(one_by_one, "SBC p-value")
show(together, "TARP p-value")
print("repaired, with a full covariance:")
show(repaired, "TARP p-value")
assert verdict(one_by_one, "SBC p-value") == "good"
assert verdict(together, "TARP p-value") == "bad"
assert verdict(repaired, "TARP p-value") != "bad"

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
    pvae.fit(vae, digits[:1500], objective, epochs=15, lr=3e-3, progress=False)
    return vae


collapsed, revived = trained(o.ELBO(beta=30.0)), trained(o.FreeBits(floor=0.2))
before = diagnostics.surgery(collapsed, held_out, progress=False)
after = diagnostics.surgery(revived, held_out, progress=False)
for result in (before, after):
    show(result, "rate", "information", "collapsed units")
    print()
assert verdict(before, "information") == verdict(before, "collapsed units") == "bad"
assert verdict(after, "information") != "bad"
assert verdict(after, "collapsed units") == "good"

# %% [markdown]
# ## 5. Badly amortised
#
# The family is right, the encoder isn't: a hidden layer of one unit, through which a mean of two dimensions doesn't
# fit. The ELBO alone would as well suggest a richer family, which would gain nothing.

# %%
small_net = Gaussian(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2)))
fitted(small_net)
parts = diagnostics.gap((model, small_net), x[:50], flow=False, progress=False)
show(parts, *(line.name for line in parts.findings()))
lost = exact_gap(small_net, x[:50])
print(f"the exact gap of these 50 data: {lost:.3f} nats, all of it the encoder's")
assert parts.verdict == "encoder"
assert abs(parts.amortisation.mean - lost) < 0.05
assert abs(parts.approximation.mean) < 0.02

# %%
repaired = diagnostics.gap((model, good), x[:50], flow=False, progress=False)
print("repaired, without the layer:")
show(repaired, *(line.name for line in repaired.findings()))
assert repaired.verdict == "fine"

# %% [markdown]
# ## What log p(x) is
#
# A bad guide makes for a low estimate of the evidence, too, however many draws it gets. The curve over K says whether
# it still rises; annealing, or a q fitted to each datum, hardly depends on the guide; and on data that the model has
# made itself, chains run in both directions bound the truth from both sides, on average over their draws.

# %%
curve = bounds.iwae_curve((model, shifted), x[:50], 256)
print(curve)
exact_value = float(toy.log_evidence(x[:50]).mean())
annealed = bounds.evidence((model, shifted), x[:50], method="ais", progress=False)
local = bounds.evidence((model, shifted), x[:50], method="local", progress=False)
print(annealed, local, f"exact: {exact_value:.3f}", sep="\n")
assert curve[1].mean < curve[256].mean < exact_value + 0.05
assert abs(annealed.mean - exact_value) < 0.1
assert abs(local.mean - exact_value) < 0.02

# %%
slow = bounds.AIS(num_temperatures=300)
sandwich = bounds.bdmc((model, shifted), x[:100], 8, ais=slow, progress=False)
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
pvae.fit(small, digits[:1500], epochs=15, lr=3e-3, progress=False)
table = bounds.compare(
    {
        name: bounds.evidence(pair, held_out, 200, progress=False)
        for name, pair in {"8 latents": revived, "1 latent": small, "collapsed": collapsed}.items()
    }
)
print(table)
assert "8 latents" in str(table).splitlines()[1]

# %% [markdown]
# ## Does the model make data like these?
#
# That is a question of the model and not of q: statistics of the data against those of replicated data sets, with
# latents drawn from the prior. Pixels of a collapsed model are independent, and the ink of its digits varies too much.

# %%
ink = {"mean ink": lambda x: x.sum(1).mean(), "sd of ink": lambda x: x.sum(1).std()}
for name, pair in {"8 latents": revived, "collapsed": collapsed}.items():
    replicated = diagnostics.predictive(pair, held_out, ink, num_particles=100, progress=False)
    print(name, *replicated.findings(), sep="\n")
assert [line.verdict for line in replicated.findings()][1] == "look"

# %% [markdown]
# ## In ArviZ's language
#
# `export.to_arviz` gives the draws of prior, posterior and predictives, the pointwise log likelihood, and k-hat, with
# named dimensions, for every plot and table that ArviZ has.

# %%
tree = export.to_arviz((model, good), x[:20], num_particles=500, progress=False)
print(list(tree.children))
means = torch.as_tensor(tree["posterior"]["z"].mean(("chain", "draw")).to_numpy())
with torch.no_grad():
    assert torch.allclose(means, good.q(x[:20]).mean.to(means), atol=0.15)

# %%
try:
    import arviz.preview as az  # ArviZ 0.23
except ImportError:
    import arviz as az

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries that ArviZ draws with
    az.plot_prior_posterior(tree, var_names=["z"], coords={"data": [0]}, backend="matplotlib")
