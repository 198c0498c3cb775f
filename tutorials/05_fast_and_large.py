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
# # Fast and large
#
# A Pyro pair is Python: every step runs two programs under Pyro's handlers. For a small network that is where most
# of the time goes. Here the same pair runs as Python, as one compiled graph, and from a file that needn't fit into
# memory, with the same numbers, and in bfloat16, with nearly the same. Times depend on the machine, so what is
# asserted is numbers; `benchmarks/throughput.py` measures against other libraries.

# %%
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, without ipywidgets

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pvae
from pvae import VAE, bounds, guides, likelihoods, priors, recipes
from pvae.errors import PvaeWarning

torch.set_num_threads(1)
torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
x = (torch.rand(2_000, 784) < 0.2).float()


def build():
    torch.manual_seed(0)
    return recipes.vae(784, 20, hidden=(400,))


# %% [markdown]
# ## A loop of one's own
#
# `pvae.SVI` takes what Pyro's takes. Its steps are the same, up to rounding: the optimiser is one fused torch
# optimiser instead of one for each tensor, and validation is off after the first step. With `engine="compiled"`
# the step is recorded while torch runs it, and compiled: loss, gradients, and what is measured.


# %%
def losses(kind, steps=20, **options):
    pair = build()
    svi = kind(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(), **options)
    torch.manual_seed(1)
    return [svi.step(x[64 * i : 64 * i + 64]) for i in range(steps)], svi


of_pyro, svi_of_pyro = losses(pyro.infer.SVI)
of_eager, eager = losses(pvae.SVI)
started = time.perf_counter()
of_compiled, compiled = losses(pvae.SVI, engine="compiled")
print(f"the first compiled step and 19 more: {time.perf_counter() - started:.0f} s")
for ours in (of_eager, of_compiled):
    worst = max(abs(a - b) / b for a, b in zip(ours, of_pyro, strict=True))
    print(
        f"last loss {ours[-1]:.1f}, Pyro's {of_pyro[-1]:.1f}, largest relative difference {worst:.1e}"
    )
    assert worst < 1e-3

# %% [markdown]
# What a step takes, in parts of Pyro's, on this machine while the notebook was run:

# %%
rounds = {"pyro.infer.SVI": svi_of_pyro, "eager": eager, "compiled": compiled}
seconds = {name: [] for name in rounds}
for _ in range(7):
    for name, svi in rounds.items():
        started = time.perf_counter()
        for _ in range(5):
            svi.step(x[:64])
        seconds[name].append(time.perf_counter() - started)
medians = {name: statistics.median(values) for name, values in seconds.items()}
for name, value in medians.items():
    print(f"{name:>15}: {value / medians['pyro.infer.SVI']:.2f}")

# %% [markdown]
# ## What can't be compiled
#
# A graph has no branches, and no Python: what the program does besides calling torch is frozen. A branch on a
# value, or a counter, would silently become a constant. So the program is recorded twice and compared, and the
# graph has to give the eager numbers before it is used. Otherwise a warning says why, and steps run as Python.


# %%
class Branching(nn.Module):
    def forward(self, h):
        return h if h.mean() > 0 else -h


class Counting(nn.Module):
    calls = 0

    def forward(self, h):
        self.calls += 1
        return h / self.calls


for layer in (Branching(), Counting()):
    torch.manual_seed(0)
    odd = VAE(
        priors.StandardNormal(4),
        likelihoods.Bernoulli(nn.Linear(4, 784), 784),
        guides.MeanField(nn.Sequential(nn.Linear(784, 8), layer), 4),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PvaeWarning)
        svi = pvae.SVI(
            odd.model, odd.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(), engine="compiled"
        )
        svi.step(x[:64])
    (said,) = [str(w.message) for w in caught if issubclass(w.category, PvaeWarning)]
    print(said, end="\n\n")
    assert "Steps run as Python" in said

# %% [markdown]
# ## In `fit`
#
# `engine="auto"`, the default, times a step first. It compiles where the training would take more than three
# minutes as Python: compiling takes up to half a minute for each shape of batch, and the last batch of an epoch
# often has a shape of its own. Draws are torch's own either way, so the history is the same up to rounding.

# %%
histories = {}
for engine in ("eager", "compiled"):
    pair = build()
    run = pvae.fit(pair, x, epochs=3, batch_size=500, engine=engine, progress=False)
    histories[engine] = run.history["elbo"]
    print(f"{engine:>8}:", [round(v, 3) for v in histories[engine]])
assert np.allclose(histories["compiled"], histories["eager"], rtol=1e-4)

# %% [markdown]
# Evaluation is a pass over many draws, and compiles in the same way; its numbers are those of the same draws.

# %%
found = {
    engine: bounds.evidence(pair, x[:20], 1000, engine=engine) for engine in ("eager", "compiled")
}
for engine, bound in found.items():
    print(f"{engine:>8}: {bound.mean:.4f} nats")
assert abs(found["eager"].mean - found["compiled"].mean) < 1e-3

# %% [markdown]
# ## Data that don't fit
#
# A memory map is data like any other: rows are read as batches ask for them. Bytes stay bytes until they are in
# a batch, which is also where images are binarised.

# %%
path = folder / "images.npy"
np.save(path, (x.numpy() * 255).astype(np.uint8))
mapped = pvae.data.Data(np.load(path, mmap_mode="r"), scale=1 / 255)
pair = build()
run = pvae.fit(pair, mapped, epochs=3, batch_size=500, engine="eager", progress=False)
print([round(v, 3) for v in run.history["elbo"]])
assert np.allclose(run.history["elbo"], histories["eager"], rtol=1e-6)

# %% [markdown]
# ## Several processes
#
# On several GPUs or machines, `torchrun` starts a process for each, and the command line and `fit` find out by
# themselves. Each process has its share of every batch; gradients are summed and divided by the rows of all, so two
# processes with half a batch each make the steps of one with the whole batch, but for their draws. Here they share
# a CPU, where that gains nothing: it pays where each has a device of its own, and batches are large enough that the
# sum of the gradients is small beside the pass.

# %%
square = folder / "square.npy"
np.save(square, np.load(path).reshape(-1, 28, 28))
train = ("-m", "pvae", "train", "--data", str(square), "--epochs", "3", "--batch-size", "500")
train += (
    "--binarize",
    "threshold",
    "--latent-dim",
    "20",
    "--hidden",
    "400",
    "--device",
    "cpu",
    "--engine",
    "eager",
)
torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
of_processes = {}
for number, start in ((1, ()), (2, torchrun)):
    out = folder / f"{number}_processes"
    done = subprocess.run(
        [sys.executable, *start, *train, "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    of_processes[number] = [row["elbo"] for row in rows]
    print(f"{number} process(es):", [round(v, 2) for v in of_processes[number]])
assert np.allclose(of_processes[1], of_processes[2], rtol=0.01)

# %% [markdown]
# ## bfloat16
#
# With `precision="bf16"` layers compute in bfloat16, and everything between and after them in float32. It pays
# where the machine multiplies bfloat16 faster, as GPUs do; what it costs in nats is small.

# %%
pair = build()
run = pvae.fit(pair, x, epochs=3, batch_size=500, precision="bf16", progress=False)
change = run.history["elbo"][-1] - histories["eager"][-1]
print(f"ELBO after 3 epochs: {change:+.3f} nats against float32")
assert abs(change) < 0.5
