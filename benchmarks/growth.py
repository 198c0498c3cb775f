"""How time and memory grow with the data, the draws, the latent and the hierarchy's depth.

    python benchmarks/growth.py

Each number is of a process of its own, one thread: the median processor time of what is repeated,
and the peak of the process's memory less that before it. Training steps are eager, of a 784-200-D
VAE in batches of 64; evidence is IWAE-K of 20 data. Memory that is freed is given back at once
(``MALLOC_MMAP_THRESHOLD_``), so that it is what is held and not what glibc keeps. Writes
``benchmarks/results/growth.md``.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from provenance import made_with
from torch import Tensor, nn

from pvae import bounds, data, recipes
from pvae import objectives as o
from pvae.engine import Stepper, make_optimizer
from pvae.pair import Pair

GIVING_BACK = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
RESULTS = Path(__file__).parent / "results" / "growth.md"
BATCH = 64
GRID: dict[str, tuple[str, tuple[int, ...], str]] = {
    "data": ("a step against the number of data", (2_000, 8_000, 32_000), "time flat"),
    "draws": ("a step against K, IWAE", (1, 4, 16, 64), "both linear"),
    "latent": ("a step against latent_dim", (4, 16, 64, 256), "nearly flat: 784 pixels beside it"),
    "depth": ("a step against the layers of latents", (1, 2, 4, 8), "linear, and a constant"),
    "evidence draws": (
        "evidence against K",
        (500, 2_000, 8_000, 32_000),
        "time linear, memory flat",
    ),
    "evidence data": (
        "evidence against the number of data",
        (5, 20, 80),
        "time linear, memory flat",
    ),
}


class Deep(nn.Module):
    """z_L -> ... -> z_1 -> x, sixteen latents a layer."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth - 1))
        self.decoder = nn.Sequential(nn.Linear(16, 200), nn.ReLU(), nn.Linear(200, 784))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = torch.zeros(16)
            for i, layer in enumerate((*self.layers, None)):
                z = pyro.sample(f"z{i}", dist.Normal(loc, torch.ones(16)).to_event(1))
                loc = z if layer is None else layer(z)
            logits = self.decoder(loc)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class DeepGuide(nn.Module):
    """The same number of layers, all read from one encoding."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 200), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(200, 32) for _ in range(depth))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            h = self.encoder(x)
            for i, head in enumerate(self.heads):
                loc, log_scale = head(h).chunk(2, -1)
                pyro.sample(f"z{i}", dist.Normal(loc, log_scale.exp()).to_event(1))


def repeated(what: str, size: int) -> tuple[Callable[[], Any], int]:
    """What is measured, and how often it is done."""
    torch.manual_seed(0)
    x = (torch.rand(size if what == "data" else 256, 784) < 0.3).float()
    latent = size if what == "latent" else 16
    vae = recipes.vae(784, latent, hidden=(200,))
    model, guide = (Deep(size), DeepGuide(size)) if what == "depth" else (vae.model, vae.guide)
    if what.startswith("evidence"):
        rows, draws = (20, size) if what == "evidence draws" else (size, 2_000)
        return lambda: bounds.evidence((model, guide), x[:rows], draws, engine="eager"), 3
    objective = o.IWAE(size, vectorize_particles=True) if what == "draws" else o.ELBO()
    structure = Pair(model, guide).inspect((x[:BATCH],))
    optimizer = make_optimizer(torch.optim.Adam, list(structure.parameters.values()), 1e-3)
    state = objective.make_state(structure)
    stepper = Stepper(structure, objective, optimizer, state)
    batches = data.Batches(data.as_source(x), BATCH)

    def endless() -> Any:
        epoch = 0
        while True:
            yield from batches.epoch(epoch)
            epoch += 1

    stream = endless()
    return lambda: stepper(next(stream), 0), 40


def worker(what: str, size: int) -> None:
    torch.set_num_threads(1)
    run, times = repeated(what, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = []
    with pyro.validation_enabled(is_validate=False):
        run()
        for _ in range(times):
            started = time.process_time()  # other processes don't count
            run()
            found.append(time.process_time() - started)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"ms": 1e3 * statistics.median(found), "MiB": (after - before) / 1024}))


def main() -> None:
    started = time.perf_counter()
    tables = []
    for what, (title, sizes, expected) in GRID.items():
        rows = []
        for size in sizes:
            done = subprocess.run(
                [sys.executable, __file__, what, str(size)],
                check=True, capture_output=True, text=True, env=GIVING_BACK,
            )  # fmt: skip
            rows.append((size, json.loads(done.stdout)))
        first = rows[0][1]["ms"]
        tables += [f"**{title[0].upper()}{title[1:]}**; expected: {expected}", ""]
        tables += ["| | " + " | ".join(f"{size:,}" for size, _ in rows) + " |"]
        tables += ["|---" * (len(rows) + 1) + "|"]
        tables += [
            "| time / first | " + " | ".join(f"{r['ms'] / first:.2f}" for _, r in rows) + " |"
        ]
        tables += ["| memory, MiB | " + " | ".join(f"{r['MiB']:.0f}" for _, r in rows) + " |", ""]
        print("\n".join(tables[-6:]), flush=True)
    made = made_with(time.perf_counter() - started)
    head = [
        "# Growth",
        "",
        f"Made by `python benchmarks/growth.py` at commit {made['commit']}, torch {made['torch']}, "
        "one thread. Memory is the peak of the process beyond what it had before, where what is "
        "freed is given back at once.",
        "",
    ]
    RESULTS.write_text("\n".join(head + tables).rstrip("\n") + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        worker(sys.argv[1], int(sys.argv[2]))
    else:
        main()
