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
# # Autoencoders as degenerate guides
#
# An autoencoder is a model and a guide, too: the guide is a **point mass** at the code,
# $q(z\mid x) = \delta(z - e(x))$. What is added to its loss is then a prior, a corruption of what the
# guide sees, or a penalty. This notebook goes through the family, the maths next to the code: plain, under-
# and overcomplete, sparse, contractive, denoising, RAE, WAE, VQ-VAE. Then it asks why an autoencoder is no
# generator, and goes from the AE to the VAE one change at a time. Every claim is an `assert`.

# %%
import functools
import math
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, without ipywidgets

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pvae
from pvae import (
    bounds,
    corruptions,
    data,
    diagnostics,
    guides,
    latent,
    likelihoods,
    networks,
    objectives,
    plots,
    priors,
    recipes,
    terms,
)
from pvae.errors import UndefinedError
from pvae.mmd import mmd

torch.manual_seed(0)
torch.set_num_threads(1)

digits = data.load("digits")
x_train, x_valid, x_test = (
    torch.as_tensor(part.arrays[0]) / 16 for part in (digits.train, digits.valid, digits.test)
)
y_test = digits.test.arrays[1]
print(f"{len(x_train)} training images of {x_train.shape[1]} pixels in [0, 1]")


# %%
def train(recipe, *args, objective=None, epochs=18, **options):
    """A pair of a recipe, trained; every one starts from the same seed."""
    torch.manual_seed(0)
    pair = recipe(64, *args, hidden=(128,), **options)
    pvae.fit(
        pair,
        x_train,
        objective,
        epochs=epochs,
        batch_size=64,
        lr=4e-3,
        seed=0,
        device="cpu",  # where the images are, with which it is compared below
        progress=False,
    )
    return pair


def squared_error(pair, seen=x_test, clean=x_test):
    """Mean over images of the squared error, summed over pixels, in evaluation mode."""
    return (pair.reconstruct(seen) - clean).square().sum(1).mean().item()


def show(rows, num=12):
    """Rows of images, each with its name."""
    return plots.grid({name: x[:num].clamp(0, 1) for name, x in rows.items()})


mean_image_error = (x_test - x_train.mean(0)).square().sum(1).mean().item()
print(f"squared error of the mean image, for every image alike: {mean_image_error:.2f}")

# %% [markdown]
# ## The plain autoencoder
#
# $$\hat x = d(e(x)), \qquad \arg\min \frac1N \sum_i \|x_i - d(e(x_i))\|^2$$
#
# As a pair: guide $\delta(z - e(x))$, flat prior $p(z) = 1$, and a Gaussian likelihood with
# $\sigma^2 = \tfrac12$, whose log density is minus the squared error, up to a constant:
#
# $$-\log p(x\mid z) = \|x - d(z)\|^2 + \tfrac D2 \log \pi$$
#
# The evidence lower bound $E_q[\log p(x\mid z)] + E_q[\log p(z) - \log q(z\mid x)]$ has then lost its
# second half: the prior's log density is 0, and a point mass has none to subtract. So Pyro's own
# `Trace_ELBO` *is* the reconstruction loss, in value and in gradient.

# %%
torch.manual_seed(0)
ae = pvae.VAE(
    prior=priors.Flat(8),
    likelihood=likelihoods.Gaussian(networks.MLP(8, 64, (128,)), 64, sigma=0.5**0.5),
    guide=guides.Point(networks.MLP(64, 8, (128,)), 8),
)  # the same as recipes.ae(64, 8, hidden=(128,))
encoder, decoder = ae.guide.posterior.network, ae.model.likelihood.network

batch = x_train[:64]
loss = (batch - decoder(encoder(batch))).square().sum()
by_pyro = Trace_ELBO().differentiable_loss(ae.model, ae.guide, batch)
constant = len(batch) * 64 / 2 * math.log(math.pi)
print(f"squared error {loss:.3f}, Trace_ELBO less the constant {by_pyro - constant:.3f}")
assert math.isclose(loss.item(), by_pyro.item() - constant, rel_tol=1e-5)

weights = list(ae.parameters())
for ours, theirs in zip(
    torch.autograd.grad(loss, weights), torch.autograd.grad(by_pyro, weights), strict=True
):
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)

# %% [markdown]
# So plain Pyro trains it, and there is nothing to it but the loop.

# %%
svi = SVI(ae.model, ae.guide, pyro.optim.Adam({"lr": 4e-3}), Trace_ELBO())
before = squared_error(ae)
for _ in range(18):
    for rows in torch.randperm(len(x_train)).split(64):
        svi.step(x_train[rows])
print(f"squared error of test images: {before:.2f} before, {squared_error(ae):.2f} after")
assert squared_error(ae) < 0.4 * mean_image_error

# %% [markdown]
# What is maximised is no bound on $\log p(x)$, and has another name. What needs a density of $q$ is refused.

# %%
structure = ae.inspect(x_test)
print(structure.quantity, "| point masses:", *structure.points, "| improper:", *structure.improper)
assert structure.quantity == "log_joint"
try:
    bounds.evidence(ae, x_test)
except UndefinedError as error:
    print(error)
else:
    raise AssertionError("an autoencoder has no evidence")

# %% [markdown]
# ## Under- and overcomplete
#
# With $N_z \ll N_x$ the code is a bottleneck, and something is lost. With $N_z \ge N_x$ nothing has to be:
# the network may learn the identity, which is no use. `fit` says so.

# %%
by_size = {8: ae}
for size in (2, 64, 100):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        by_size[size] = train(recipes.ae, size)
    if size == 100:
        print(f"latent {size}: {caught[0].message}")
    assert any("identity" in str(w.message) for w in caught) == (size >= 64)


# %% [markdown]
# How near is it to the identity? For that one, the Jacobian $\partial \hat x / \partial x$ is $I$. Its
# diagonal says how much of a change in a pixel comes back in the same pixel. (Some border pixels hardly
# ever vary, so nothing can be learned about them; they are left out.)


# %%
def identity_share(pair):
    e, d = pair.guide.posterior.network, pair.model.likelihood.network
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: d(e(x))))(x_test[:60])
    varies = x_train.std(0) > 0.05
    return jacobian.diagonal(dim1=1, dim2=2)[:, varies].mean().item()


share = {}
for size in (2, 8, 64, 100):
    share[size] = identity_share(by_size[size])
    error = squared_error(by_size[size])
    print(f"latent {size:>3}: squared error {error:.3f}, identity {share[size]:4.0%}")
assert squared_error(by_size[2]) > squared_error(by_size[8]) > 3 * squared_error(by_size[100])
assert share[8] < 0.25
assert share[100] > 0.45

show({"x": x_test} | {f"latent {n}": by_size[n].reconstruct(x_test[:12]) for n in (2, 8, 64, 100)})

# %% [markdown]
# ## Sparse in the code
#
# Regularise, then: $L_r = \|x - \hat x\|^2 + \lambda R$. The classic one is $R = \|e(x)\|_1$. It is no
# special case: it is a **Laplace prior**,
#
# $$-\log p(z) = \lambda \|z\|_1 + N_z \log\frac{2}{\lambda}, \qquad
# p(z) = \prod_k \frac{\lambda}{2} e^{-\lambda |z_k|}.$$

# %%
rate, size = 0.3, 100
torch.manual_seed(0)
pair = recipes.sparse_ae(64, size, l1=rate, hidden=(128,))
code = pair.encode(batch)
error = (batch - pair.decode(code)).square().sum()
by_hand = error + rate * code.abs().sum()
by_pyro = Trace_ELBO().loss(pair.model, pair.guide, batch)
constant = len(batch) * (size * math.log(2 / rate) + 64 / 2 * math.log(math.pi))
print(f"by hand {by_hand:.3f}, Trace_ELBO less the constants {by_pyro - constant:.3f}")
assert math.isclose(by_hand.item(), by_pyro - constant, rel_tol=1e-4)

# %% [markdown]
# An L1 norm can be cheated: halve the code, double the decoder's weights, and $\hat x$ is the same at half
# the price. So the decoder's columns get **norm 1** (`networks.unit_norm`, on by default in the recipe).
# The recipe's decoder is linear, so that its columns are images: $\hat x = \sum_k z_k w_k + b$.

# %%
sparse = train(recipes.sparse_ae, size, l1=rate)
cheating = train(recipes.sparse_ae, size, l1=rate, unit_norm=False)

# %% [markdown]
# (Its encoder ends in a `ReLU`, so that codes can be exactly 0.) `diagnostics.hoyer` measures sparsity whatever
# the scale: 0 if all entries are alike, 1 if all but one are 0.

# %%
measured = {}
for name, pair in (("plain", by_size[100]), ("sparse", sparse), ("not unit-norm", cheating)):
    code = latent.codes(pair, x_test)
    measured[name] = {
        "error": squared_error(pair),
        "hoyer": diagnostics.hoyer(code).mean().item(),
        "near zero": diagnostics.near_zero(code).mean().item(),
        "L1": code.abs().sum(1).mean().item(),
    }
    print(f"{name:>14}:", ", ".join(f"{k} {v:.2f}" for k, v in measured[name].items()))
assert measured["sparse"]["hoyer"] > measured["plain"]["hoyer"] + 0.3
assert measured["sparse"]["near zero"] > 0.7

norms, used = {}, {}
for name, pair in (("sparse", sparse), ("not unit-norm", cheating)):
    columns = pair.model.likelihood.network.layers[0].weight.detach()
    used[name] = latent.codes(pair, x_train).mean(0).topk(20).indices
    norms[name] = columns[:, used[name]].norm(dim=0)
    print(f"{name:>14}: norms of the 20 most used columns {norms[name].mean():.2f}")
assert torch.allclose(norms["sparse"], torch.ones(20), atol=1e-5)
assert norms["not unit-norm"].mean() > 1.1

# %% [markdown]
# Without the constraint the L1 norm is lower, and the codes are no sparser: it is the columns that are longer.

# %%
assert measured["not unit-norm"]["L1"] < 0.85 * measured["sparse"]["L1"]
assert measured["not unit-norm"]["hoyer"] < measured["sparse"]["hoyer"] + 0.05
columns = sparse.model.likelihood.network.layers[0].weight.detach()
plots.samples(columns[:, used["sparse"]].T, title="the 20 most used columns of the sparse decoder")

# %% [markdown]
# ## Sparse in all activations
#
# $$R = \sum_j \|a_e^{[j]}\|_1 + \sum_j \|a_d^{[j]}\|_1$$
#
# The hidden layers aren't in $z$, so no prior can have them: this one is a **penalty**, a marked factor
# in the pair. It acts in training alone; no bound or validation value has it.

# %%
calm = train(recipes.sparse_activations_ae, 64, l1_activations=0.03)


def hidden_layers(pair, x):
    """What comes out of each ReLU."""
    found = []
    relus = [m for m in pair.modules() if isinstance(m, nn.ReLU)]
    handles = [m.register_forward_hook(lambda _m, _i, out: found.append(out)) for m in relus]
    pair.reconstruct(x)
    for handle in handles:
        handle.remove()
    return torch.cat(found, 1)


factors = terms.compute(calm.inspect((batch,)), (batch,)).penalties  # what each adds: -lambda R
for name, value in factors.items():
    print(f"{name}: {value.mean():.3f} a datum")
activations = torch.cat([hidden_layers(calm, batch), calm.encode(batch)], 1)  # the code counts
by_hand = -0.03 * activations.abs().sum(1)
assert torch.allclose(sum(factors.values())[0], by_hand, rtol=1e-4)

silent = {
    name: (hidden_layers(pair, x_test) == 0).float().mean().item()
    for name, pair in (("plain", by_size[64]), ("sparse activations", calm))
}
print("hidden units at 0:", ", ".join(f"{name} {value:.0%}" for name, value in silent.items()))
assert silent["sparse activations"] > silent["plain"] + 0.15

# %% [markdown]
# ## Contractive
#
# $$R = \Big\|\frac{\partial e(x)}{\partial x}\Big\|_F$$
#
# A code that moves little when the datum does. The penalty is exact, and differentiated through; here it is
# beside `torch.func`'s Jacobian. (Rifai et al. square the norm: `squared=True`. The recipe also decays the
# decoder's weights, or shrinking the code would be another cheat.)

# %%
contractive = train(recipes.contractive_ae, 8, contractive=0.1)

contractive.train()
factors = terms.compute(contractive.inspect((batch,)), (batch,)).penalties
jacobian = torch.func.vmap(torch.func.jacrev(contractive.guide.posterior.network))(batch)
by_hand = -0.1 * jacobian.square().sum((1, 2)).sqrt()
assert torch.allclose(factors["contractive_guide"][0], by_hand, rtol=1e-4)

# %% [markdown]
# The norm alone says little: codes ten times smaller have a norm ten times smaller. Over the spread of the
# codes it compares.


# %%
def relative_sensitivity(pair):
    spread = latent.codes(pair, x_test).var(0).sum().sqrt()
    return (diagnostics.sensitivity(pair, x_test).mean() / spread).item()


sensitivity = {"plain": relative_sensitivity(ae), "contractive": relative_sensitivity(contractive)}
for name, pair in (("plain", ae), ("contractive", contractive)):
    print(f"{name:>12}: over spread {sensitivity[name]:.2f}, error {squared_error(pair):.2f}")
assert sensitivity["contractive"] < 0.9 * sensitivity["plain"]

# %% [markdown]
# ## Denoising
#
# $$L = \|x - d(e(\tilde x))\|^2, \qquad \tilde x = x + n \quad\text{or}\quad \tilde x = x \cdot m$$
#
# The guide sees $\tilde x$, drawn afresh each time; the model scores the clean $x$. It needs no bottleneck:
# 64 numbers for 64 pixels, and `fit` has no objection, because the identity would restore nothing.

# %%
damage = {"noise": corruptions.Noise(0.3), "masking": corruptions.Masking(0.3)}
rows, ratio = {"x": x_test}, {}
for name, corruption in damage.items():
    denoising = train(recipes.denoising_ae, 64, corruption=corruption)
    torch.manual_seed(1)
    seen = corruption(x_test)
    left = {
        "as seen": (seen - x_test).square().sum(1).mean().item(),
        "plain": squared_error(by_size[64], seen),
        "denoising": squared_error(denoising, seen),
        "denoising, of clean images": squared_error(denoising),
    }
    print(f"{name:>8}:", ", ".join(f"{k} {v:.2f}" for k, v in left.items()))
    ratio[name] = left["denoising"] / left["plain"]
    rows |= {
        f"x with {name}": seen,
        f"plain, {name}": by_size[64].reconstruct(seen[:12]),
        f"denoising, {name}": denoising.reconstruct(seen[:12]),
    }
assert ratio["noise"] < 0.7
assert ratio["masking"] < 0.7
show(rows)

# %% [markdown]
# There is a price: clean images come back worse than from the plain autoencoder.
#
# ## RAE, WAE, VQ-VAE
#
# * **RAE**: $\|x - \hat x\|^2 + \tfrac12\|z\|^2 + \gamma\|W_d\|^2$, which is a standard normal *prior* under the
#   point mass, and weight decay on the decoder.
# * **WAE**: $\|x - \hat x\|^2 + \lambda\,\mathrm{MMD}^2(q(z), N(0, I))$. Not each code, but all codes together
#   are to look like the target.
# * **VQ-VAE**: each of M vectors of the code is the nearest of K learned ones, so a code is M whole numbers.

# %%
rae = train(recipes.rae, 8)
wae = train(recipes.wae, 8)
vq = train(recipes.vq_vae, 2, num_latents=8, num_codes=32)
for name, pair in (("plain", ae), ("RAE", rae), ("WAE", wae), ("VQ-VAE", vq)):
    code = latent.codes(pair, x_test)
    print(
        f"{name:>7}: squared error {squared_error(pair):.2f}, code {tuple(code.shape[1:])}, "
        f"standard deviation of its entries {code.std(0).mean():.2f}"
    )
    assert squared_error(pair) < 0.45 * mean_image_error
numbers = vq.guide.posterior.nearest(latent.codes(vq, x_test))
print("the first digit as a VQ-VAE's code:", numbers[0].tolist())
gap = {
    name: mmd(latent.codes(pair, x_train), torch.randn(1437, 8)).item()
    for name, pair in (("plain", ae), ("WAE", wae))
}
print("MMD of all codes from N(0, I):", ", ".join(f"{k} {v:.4f}" for k, v in gap.items()))
assert gap["WAE"] < 0.3 * gap["plain"]

# %% [markdown]
# ## Why an autoencoder is no generator
#
# The sampling algorithm of a VAE draws $z \sim p(z)$ and decodes. An autoencoder has no $p(z)$: its prior is
# flat, and refuses to be sampled. What about $N(0, I)$ all the same? Nothing has told the codes to be there,
# nor to fill the space between them. Beside it, a density fitted to the codes afterwards, *ex post*: a normal
# distribution, and a mixture of ten. The VAE has $N(0, I)$ by construction.

# %%
vae = train(
    recipes.vae, 8, likelihood=functools.partial(likelihoods.Gaussian, sigma="optimal"), epochs=25
)
codes = latent.codes(ae, x_train)
standard_normal = priors.StandardNormal(8)


def generator(prior, pair):
    """The same decoder and encoder with another prior: a pair like any other."""
    return pvae.VAE(prior, pair.model.likelihood, pair.guide.posterior)


generators = {
    "AE, N(0, I)": generator(standard_normal, ae),
    "AE, normal": generator(latent.fit_density(codes, "gaussian"), ae),
    "AE, mixture": generator(latent.fit_density(codes, "gmm"), ae),
    "WAE, N(0, I)": generator(standard_normal, wae),
    "VAE, N(0, I)": vae,
}
try:
    ae.sample(1)
except UndefinedError as error:
    print(error)
else:
    raise AssertionError("a flat prior can't be sampled")

# %% [markdown]
# How far are they from digits? The maximum mean discrepancy between two sets of images is 0 if they come from
# one distribution,
#
# $$\mathrm{MMD}^2 = E\,k(x, x') + E\,k(y, y') - 2\, E\,k(x, y), \qquad k = e^{-\|x - x'\|^2 / w},$$
#
# with $w$ the mean squared distance between two digits. One set is 360 digits that no training has seen; the
# other 500 decoded draws (means of $x$ given $z$, in all rows alike). Training images and reconstructions
# show about what could be hoped for.

# %%
held_out = torch.cat([x_valid, x_test])
width = 2 * held_out.var(0).sum().item()


def distance(images):
    return mmd(images, held_out, lambda d2: (-d2 / width).exp()).item()


images, found = {}, {}
for name, pair in generators.items():
    torch.manual_seed(1)
    images[name] = pair.sample(500, mean=True)
    found[name] = distance(images[name])
found |= {"AE, reconstructions": distance(ae.reconstruct(x_train[:500]))}
found |= {"training images": distance(x_train[:500])}
for name, value in found.items():
    print(f"{name:>20}: MMD {value:7.4f}")
assert found["AE, N(0, I)"] > 3 * found["AE, normal"]
assert found["AE, N(0, I)"] > 3 * found["AE, mixture"]
assert found["AE, N(0, I)"] > 3 * found["VAE, N(0, I)"]
assert found["AE, mixture"] < 1.5 * found["VAE, N(0, I)"]
show({"digits": x_test} | images)

# %% [markdown]
# So $N(0, I)$ is the wrong place to look for an autoencoder's codes, and a density fitted to them mends most
# of that: on this easy set an AE with one comes as near as the VAE. It takes a second fit, though, and with
# a point mass for a guide its $\log p(x)$ can't be estimated. In two dimensions one sees the gap. The circles
# hold 39 % and 86 % of $N(0, I)$; about a third of it is far from any code of the AE, and little of it from
# those of the VAE.

# %%
vae_2d = train(
    recipes.vae, 2, likelihood=functools.partial(likelihoods.Gaussian, sigma="optimal"), epochs=25
)
maps = {"AE": by_size[2], "VAE": vae_2d}
figure = plots.Picture(figsize=(9, 3.8), dpi=70, layout="constrained")
for axis, (name, pair) in zip(figure.subplots(1, 2), maps.items(), strict=True):
    code = latent.codes(pair, x_test)
    plots.latent_map(code, y_test, axis=axis, title=f"{name}: codes of test digits")
    for radius in (1, 2):
        axis.add_patch(plt.Circle((0, 0), radius, fill=False, color="grey", linestyle="--"))
    axis.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
figure

# %%
torch.manual_seed(1)
z = torch.randn(2000, 2)
empty = {}
for name, pair in maps.items():
    nearest = torch.cdist(z, latent.codes(pair, x_train)).min(1).values
    empty[name] = (nearest > 0.3).float().mean().item()
    print(f"{name:>3}: {empty[name]:.0%} of draws from N(0, I) are further than 0.3 from any code")
assert empty["AE"] > 2.5 * empty["VAE"]
show({name: pair.decode(z[:12]) for name, pair in maps.items()})

# %% [markdown]
# ## From AE to VAE, one change at a time
#
# Two things change: the **encoding** (a draw in place of a point) and the **loss** (the KL divergence to a
# prior). Each alone is not enough.
#
# 1. **AE**: point, flat prior.
# 2. **The prior alone**, still a point: the RAE above. The codes shrink towards 0, and fill nothing.
# 3. **The draw alone**, no KL ($\beta = 0$). Noise only hurts the reconstruction, so the guide learns to make
#    it small beside the codes: back towards a point.
# 4. **Both**: a VAE, with the squared error's $\sigma^2 = \tfrac12$, "MSE + KL". On pixels in $[0, 1]$ that
#    $\sigma$ is so large that no code is worth its KL: the posterior collapses onto the prior, and every image
#    is the mean image.
# 5. **And the right $\sigma$**, estimated: `sigma="optimal"`. (With a point mass pvae refuses that one: there
#    is nothing to stop $\sigma$ from going to 0.) `docs/losses.md` says which weight is which $\sigma$.

# %%
gaussian = functools.partial(likelihoods.Gaussian, sigma=0.5**0.5)
ladder = {
    "1 AE": ae,
    "2 prior alone (RAE)": rae,
    "3 draw alone, no KL": train(
        recipes.vae, 8, likelihood=gaussian, objective=objectives.ELBO(beta=0.0)
    ),
    "4 VAE, MSE + KL": train(recipes.vae, 8, likelihood=gaussian, epochs=10),
    "5 VAE, sigma learned": vae,
}

rungs = {}
print(f"{'':<22}{'quantity':>10} {'error':>6} {'noise/spread':>13} {'active':>7} {'MMD':>6}")
for name, pair in ladder.items():
    structure = pair.inspect(x_test)
    with torch.no_grad():
        q = pair.guide.posterior(x_test)
    torch.manual_seed(1)
    rungs[name[0]] = rung = {
        "error": squared_error(pair),
        "noise": (q.variance.mean() / q.mean.var(0).mean()).sqrt().item(),
        "active": int(diagnostics.active_units(pair, x_test).sum()),
        "mmd": distance(generator(standard_normal, pair).sample(500, mean=True)),
    }
    print(
        f"{name:<22}{structure.quantity:>10} {rung['error']:6.2f} {rung['noise']:13.3f} "
        f"{rung['active']:7} {rung['mmd']:6.3f}"
    )
assert rungs["1"]["noise"] == rungs["2"]["noise"] == 0
assert rungs["3"]["noise"] < 0.3 * rungs["5"]["noise"]
assert min(rungs[i]["mmd"] for i in "123") > 3 * rungs["5"]["mmd"]
assert rungs["4"]["error"] > 0.9 * mean_image_error
assert rungs["4"]["active"] == 0
assert rungs["5"]["error"] < 0.4 * mean_image_error

# %% [markdown]
# From the third on there is an evidence, and it says which of them to believe. (The third one's $q$ is so
# narrow that importance sampling from it finds next to nothing: a lower bound can be very low. Nats of
# values in $[0, 1]$; a density may well be above 1.)

# %%
for name in list(ladder)[2:]:
    rungs[name[0]]["evidence"] = bounds.evidence(ladder[name], x_test, num_particles=50)
    print(f"{name:<22}", rungs[name[0]]["evidence"])
assert rungs["5"]["evidence"].mean > rungs["4"]["evidence"].mean + 20
assert rungs["4"]["evidence"].mean > rungs["3"]["evidence"].mean

# %% [markdown]
# ## The family in one table
#
# | name | what is added to $\lVert x - \hat x \rVert^2$ | one line |
# |---|---|---|
# | plain | nothing: point mass, flat prior | `recipes.ae(64, 8)` |
# | sparse in the code | prior: $\lambda \lVert z \rVert_1$ | `recipes.sparse_ae(64, 100, l1=0.3)` |
# | sparse in all activations | penalty: $\lambda \sum_j \lVert a^{[j]} \rVert_1$ | `recipes.sparse_activations_ae(64, 64, l1_activations=0.03)` |
# | contractive | penalty: $\lambda \lVert \partial z / \partial x \rVert_F$ | `recipes.contractive_ae(64, 8, contractive=0.1)` |
# | denoising | corruption: $\tilde x = x + n$ or $x \cdot m$ | `recipes.denoising_ae(64, 64, corruption=corruptions.Masking(0.3))` |
# | RAE | prior: $\tfrac12 \lVert z \rVert^2$; penalty: $\gamma \lVert W_d \rVert^2$ | `recipes.rae(64, 8)` |
# | WAE | penalty: $\lambda\,\mathrm{MMD}^2(q(z), N(0, I))$ | `recipes.wae(64, 8)` |
# | VQ-VAE | guide: nearest code; penalty: $\lambda \lVert e(x) - \mathrm{sg}(z) \rVert^2$ | `recipes.vq_vae(64, 2, num_latents=8)` |
# | VAE | guide: $N(\mu, \mathrm{diag}\,\sigma^2)$; prior: $N(0, I)$ | `recipes.vae(64, 8, likelihood=likelihoods.Gaussian)` |
#
# Priors, corruptions and penalties combine: `recipes.vae(64, 8, penalties=penalties.Contractive(0.1))` is a
# contractive VAE.
#
# ## Exercises
#
# 1. Give `recipes.ae(64, 100)` a `corruption=corruptions.Noise(0.3)`. What becomes of the identity's share?
# 2. Replace the Laplace prior of the sparse autoencoder by `priors.StudentT`. Which has more entries at 0?
# 3. Fit a mixture to the codes of `vae`, and decode draws from it. Does the MMD fall, and why could it?
