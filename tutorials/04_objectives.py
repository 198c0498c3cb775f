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
# # Objectives: which bound when
#
# The pair says what is modelled; the objective says what is maximised, and how its gradient is estimated. It is
# one argument of `pvae.fit`. Here is one pair on the digits, trained with many of them. Every claim is an
# `assert`; one seed and small networks, so the claims are about what is large.

# %%
import functools
import time
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, without ipywidgets

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pvae
from pvae import bounds, data, diagnostics, likelihoods, plots, recipes
from pvae import objectives as o
from pvae.errors import PvaeError
from pvae.schedules import Warmup

torch.manual_seed(0)
torch.set_num_threads(1)
digits = data.load("digits")
x_train, x_test = (torch.as_tensor(part.arrays[0]) for part in (digits.train, digits.test))
print(f"pvae {pvae.__version__}, torch {torch.__version__}: {len(x_train)} digits")


# %%
def train(objective, epochs=15, latent_dim=8):
    """The same pair from the same seed, 64 counts from 0 to 16."""
    torch.manual_seed(0)
    pair = recipes.vae(
        64,
        latent_dim,
        likelihood=functools.partial(likelihoods.Binomial, total_count=16),
        hidden=(64,),
        in_scale=1 / 16,
    )
    run = pvae.fit(
        pair,
        x_train,
        objective,
        epochs=epochs,
        batch_size=64,
        lr=5e-3,
        progress=False,
    )
    return pair, run


def measure(pair):
    elbo = bounds.elbo(pair, x_test, 20)
    return {
        "ELBO": elbo.mean,
        "evidence": bounds.evidence(pair, x_test, 500).mean,
        "rate": elbo.rate.mean,
        "distortion": elbo.distortion.mean,
        "active": int(diagnostics.active_units(pair, x_test).sum()),
    }


def row(name, numbers):
    shown = "  ".join(f"{k} {v:8.2f}" if k != "active" else f"{k} {v}" for k, v in numbers.items())
    print(f"{name:>22}:  {shown}")


# %% [markdown]
# ## Bounds, and how they are estimated
#
# Every one of these is a lower bound of log p(x). The *value* to report is always `bounds.evidence`, whatever was
# trained with; `ELBO` is what the guide, and not only the model, is worth.

# %%
found, pairs = {}, {}
for name, objective in {
    "ELBO()": o.ELBO(),
    "ELBO(analytic_kl)": o.ELBO(analytic_kl=True),
    "STL()": o.STL(),
    "IWAE(8)": o.IWAE(8),
    "DReG(8)": o.DReG(8),
    "Renyi(0.5, 8)": o.Renyi(8, alpha=0.5),
    "ELBO(beta=4)": o.ELBO(beta=4.0),
}.items():
    pairs[name], _ = train(objective)
    found[name] = measure(pairs[name])
    row(name, found[name])
for name, numbers in found.items():
    assert numbers["evidence"] > numbers["ELBO"], name
assert found["IWAE(8)"]["evidence"] > found["ELBO()"]["evidence"] - 1
assert found["ELBO(beta=4)"]["rate"] < 0.7 * found["ELBO()"]["rate"]
assert found["ELBO(beta=4)"]["evidence"] < found["ELBO()"]["evidence"]

# %% [markdown]
# The importance-weighted ones trade the guide for the model: log p(x) may be higher where the ELBO is lower. With
# `beta=4` the rate is paid for four times, and less is said about x.
#
# ## More draws can be worse
#
# The more draws in the importance-weighted bound, the less the guide's gradient says beside its noise. `DReG`
# estimates the same gradient of the same bound, and gets better with more draws. A pair in one dimension shows
# it, where a few hundred draws are many:


# %%
class Wide(nn.Module):
    """q(z | x) = N(a x + c, t^2), a little off the posterior, and wider."""

    def __init__(self):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([0.3, 0.2, -0.5]))

    def forward(self, x):
        a, c, log_t = self.numbers
        return dist.Normal(a * x + c, log_t.exp()).to_event(1)


decoder = nn.Linear(1, 1)
nn.init.constant_(decoder.weight, 1.3)
nn.init.constant_(decoder.bias, 0.0)
small = pvae.VAE(pvae.priors.StandardNormal(1), likelihoods.Gaussian(decoder, 1, sigma=0.7), Wide())
parameters, datum = list(small.guide.parameters()), torch.full((1, 1), 0.9)


def signal_to_noise(objective, rounds=300):
    draws = []
    for _ in range(rounds):
        loss = objective.differentiable_loss(small.model, small.guide, datum)
        draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    draws = torch.stack(draws)
    return (draws.mean(0).abs() / draws.std(0)).mean().item()


counts = (2, 8, 32, 128, 512)
ratios = {kind.__name__: [signal_to_noise(kind(k)) for k in counts] for kind in (o.IWAE, o.DReG)}
for name, values in ratios.items():
    print(f"{name}: " + ", ".join(f"K = {k}: {v:.3f}" for k, v in zip(counts, values, strict=True)))
assert ratios["DReG"][-1] > 1.5 * ratios["DReG"][0]
assert max(ratios["IWAE"]) < 0.2  # of 300 draws of pure noise it would be 0.05

figure = plots.Picture(figsize=(4.5, 3), dpi=80, layout="constrained")
axis = figure.subplots()
for name, values in ratios.items():
    axis.loglog(counts, values, "o-", label=name)
axis.set(xlabel="draws a datum, K", ylabel="signal to noise, guide")
axis.legend()
figure

# %% [markdown]
# ## Control of the rate
#
# A posterior that has collapsed onto the prior costs no rate and says nothing. `FreeBits` gives each dimension
# some rate for nothing; a warm-up lets the decoder learn to use z before it is charged; `Capacity` asks for a
# rate, `GECO` for a distortion.

# %%
target = 105.0
controlled = {
    "FreeBits(1.0)": o.FreeBits(floor=1.0),
    "warm-up": o.ELBO(beta=Warmup(8, "epochs")),
    "Capacity(5)": o.Capacity(capacity=5.0, gamma=10.0),
    f"GECO({target:.0f})": o.GECO(tolerance=target, decay=0.9),
}
for name, objective in controlled.items():
    controlled[name], run = train(objective, epochs=25)
    found[name] = measure(controlled[name])
    row(name, found[name])
assert found["FreeBits(1.0)"]["active"] == 8
assert abs(found["Capacity(5)"]["rate"] - 5) < 0.5
assert abs(found[f"GECO({target:.0f})"]["distortion"] - target) < 5

# %% [markdown]
# ## Latents without a gradient
#
# A draw of a Bernoulli has no derivative. Score functions do without it, and are noisy; a baseline of the other
# draws (`ELBO(K, baseline="leave_one_out")`) or `VIMCO` takes most of the noise off. An objective that can't do
# it says so before anything is trained.


# %%
class BinaryModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        pvae.sites.announce_parameters(self, "model")
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((24,), 0.5)).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Binomial(16, logits=logits).to_event(1), obs=x)


class BinaryGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 24))

    def forward(self, x):
        pvae.sites.announce_parameters(self, "guide")
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x / 16)).to_event(1))


try:
    o.IWAE(5).loss(BinaryModel(), BinaryGuide(), x_test[:5])
except PvaeError as error:
    print(error, "\n")
else:
    raise AssertionError("a Bernoulli can't be reparametrised")

binary = {}
for name, objective in {
    "ELBO(5)": o.ELBO(5),
    "leave-one-out": o.ELBO(5, baseline="leave_one_out"),
    "VIMCO(5)": o.VIMCO(5),
    "RWS(5)": o.RWS(5),
}.items():
    torch.manual_seed(0)
    model, guide = BinaryModel(), BinaryGuide()
    started = time.perf_counter()
    pvae.fit((model, guide), x_train, objective, epochs=15, batch_size=64, lr=3e-3, progress=False)
    binary[name] = bounds.evidence((model, guide), x_test, 500).mean
    print(f"{name:>14}: evidence {binary[name]:.2f}")
assert binary["leave-one-out"] > binary["ELBO(5)"] + 3
assert binary["VIMCO(5)"] > binary["ELBO(5)"] + 3

# %% [markdown]
# ## All of them
#
# `docs/objectives.md` says which when; the table is made by

# %%
table = o.table()
assert len(table) == 19
for entry in table:
    print(f"{entry.name:>20}  {entry.bound[:40]:<40}  {entry.source[:40]}")
