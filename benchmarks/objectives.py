"""Objectives on MNIST, at an equal number of decoder evaluations.

    python benchmarks/objectives.py [--data-dir DIR] [--evaluations 2000000]

784-200-200-50 tanh, dynamic binarisation, batches of 50, Adam at 1e-3 falling along a cosine; an
objective with K draws makes K times fewer steps. Writes ``benchmarks/results/objectives.json`` and
``benchmarks/results/objectives.md``, and the picture of the signal-to-noise ratio. MNIST is looked
for in ``--data-dir`` or the environment's PVAE_DATA.

evidence     IWAE-1000 of the first 1,000 test images, nats
active       units whose variance over data exceeds 0.01
SNR          |mean| / std of the guide's gradient over 100 draws of one batch, mean over
             parameters, all objectives at the pair that ELBO has trained
time         of a step, in parts of ELBO's with one draw: medians of alternating rounds, one thread
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import made_with
from torch import Tensor, nn

import pvae
from pvae import VAE, bounds, data, diagnostics, guides, likelihoods, plots, priors, schedules
from pvae import objectives as o
from pvae import terms as t
from pvae.networks import MLP

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "signal_to_noise.png"
BATCH = 50
OBJECTIVES: dict[str, tuple[o.Objective, int]] = {  # and draws a datum
    "ELBO": (o.ELBO(), 1),
    "ELBO, rate in closed form": (o.ELBO(analytic_kl=True), 1),
    "STL": (o.STL(), 1),
    "IWAE-5": (o.IWAE(5), 5),
    "IWAE-50": (o.IWAE(50), 50),
    "DReG-5": (o.DReG(5), 5),
    "DReG-50": (o.DReG(50), 50),
    "Renyi-5, alpha 0.5": (o.Renyi(0.5, 5), 5),
    "TVO-5": (o.TVO(5), 5),
    "beta = 4": (o.ELBO(beta=4.0), 1),
    "free bits, 0.1 a dimension": (o.FreeBits(0.1), 1),
}
DRAWS = (1, 2, 4, 8, 16, 32, 64)


def build(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return VAE(
        priors.StandardNormal(50),
        likelihoods.Bernoulli(lambda p: MLP(50, p * 784, (200, 200), nn.Tanh), 784),
        guides.MeanField(MLP(784, 100, (200, 200), nn.Tanh), 50),
    )


def train(objective: o.Objective, draws: int, splits: data.Splits, evaluations: int) -> VAE:
    pair = build()
    part = data.Data(splits.train.arrays[:1], 1 / 255, binarize="dynamic").reshape((784,))
    steps = evaluations // (BATCH * draws)
    rows = min(len(part), steps * BATCH)
    epochs = max(1, round(steps * BATCH / rows))
    if rows < len(part):  # less than an epoch
        part = part.take(np.random.default_rng(0).permutation(len(part))[:rows])
    pvae.fit(
        pair.model,
        pair.guide,
        part,
        objective,
        epochs=epochs,
        batch_size=BATCH,
        lr=1e-3,
        lr_schedule=schedules.Cosine(),
        seed=0,
        device="cpu",
        progress=False,
    )
    return pair


def evaluate(pair: VAE, x: Tensor) -> dict[str, float]:
    evidence = bounds.evidence(pair.model, pair.guide, x, 1000)
    elbo = bounds.elbo(pair.model, pair.guide, x, 20)
    assert elbo.rate is not None
    return {
        "evidence": evidence.mean,
        "ELBO": elbo.mean,
        "rate": elbo.rate.mean,
        "active": float(diagnostics.active_units(pair.model, pair.guide, x).sum()),
    }


def gradient(objective: o.Objective, pair: VAE, x: Tensor) -> Tensor:
    parameters = list(pair.guide.parameters())
    loss = objective.differentiable_loss(pair.model, pair.guide, x)
    found = torch.autograd.grad(loss, parameters)
    return torch.cat([g.flatten() for g in found])


def signal_to_noise(objective: o.Objective, pair: VAE, x: Tensor, rounds: int = 100) -> float:
    torch.manual_seed(0)
    mean = square = torch.zeros(())
    for _ in range(rounds):
        g = gradient(objective, pair, x).double()
        mean, square = mean + g / rounds, square + g.square() / rounds
    variance = (square - mean.square()).clamp(min=0) * rounds / (rounds - 1)
    moves = variance > 0  # pixels that are never lit have no gradient at all
    return float((mean.abs()[moves] / variance[moves].sqrt()).mean())


def step_times(pair: VAE, x: Tensor, rounds: int = 9) -> dict[str, float]:
    """Medians of alternating rounds of forward and backward passes, in parts of ELBO's."""
    parameters = [*pair.model.parameters(), *pair.guide.parameters()]
    times: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    structure = t.inspect_pair(pair.model, pair.guide, (x,))
    states = {
        name: objective.make_state(structure, 60_000) for name, (objective, _) in OBJECTIVES.items()
    }
    for _ in range(rounds + 1):
        for name, (objective, draws) in OBJECTIVES.items():
            repeats = max(1, 20 // draws)
            started = time.perf_counter()
            for _ in range(repeats):
                terms = objective.compute_terms(pair.model, pair.guide, (x,), structure)
                objective.surrogate(terms, states[name]).backward()
                for p in parameters:
                    p.grad = None
            times[name].append((time.perf_counter() - started) / repeats)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {name: value / medians["ELBO"] for name, value in medians.items()}


def picture(ratios: dict[str, list[float]]) -> None:
    figure = plots.Picture(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, values in ratios.items():
        axis.loglog(DRAWS, values, "o-", ms=3, label=name)
    axis.set(xlabel="draws a datum, K", ylabel="signal to noise of the guide's gradient")
    axis.legend(fontsize=8)
    figure.savefig(PICTURE, dpi=80)


def write(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "objectives.json").write_text(json.dumps(result, indent=1) + "\n")
    made = result["made with"]
    keys = ["evidence", "ELBO", "rate", "active", "SNR", "time"]
    lines = [
        "# Objectives at an equal number of decoder evaluations",
        "",
        f"Made by `python benchmarks/objectives.py` at commit {made['commit']}, torch "
        f"{made['torch']}, in {made['minutes']} minutes on one thread: MNIST, dynamic "
        f"binarisation, 784-200-200-50 tanh, {result['evaluations']:,} evaluations of the decoder "
        "each, one seed.",
        "",
        "| objective | steps | " + " | ".join(keys) + " |",
        "|---" * (len(keys) + 2) + "|",
    ]
    for name, row in result["rows"].items():
        cells = [f"{row['steps']:,.0f}"]
        cells += [f"{row[k]:.3g}" if k in ("SNR", "time") else f"{row[k]:.2f}" for k in keys[:3]]
        cells += [f"{row['active']:.0f}", f"{row['SNR']:.3g}", f"{row['time']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", __doc__.split("\n\n")[-1].strip().replace("\n", "  \n"), ""]
    heads = " | ".join(f"K = {k}" for k in DRAWS)
    lines += ["**Signal to noise of the guide's gradient against the draws**", ""]
    lines += [f"| | {heads} |", "|---" * (len(DRAWS) + 1) + "|"]
    for name, values in result["signal to noise"].items():
        lines.append(f"| {name} | " + " | ".join(f"{v:.3g}" for v in values) + " |")
    lines += ["", "![signal to noise](../../docs/images/signal_to_noise.png)"]
    (RESULTS / "objectives.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir")
    parser.add_argument("--evaluations", type=int, default=2_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    splits = data.load("mnist", arguments.data_dir, valid=0)
    test = data.Data(splits.test.arrays[:1], 1 / 255, binarize="static", seed=1).reshape((784,))
    x = torch.as_tensor(test.take(range(1000)).fixed().arrays[0]).float()
    rows: dict[str, dict[str, float]] = {}
    pairs: dict[str, VAE] = {}
    for name, (objective, draws) in OBJECTIVES.items():
        began = time.perf_counter()
        pairs[name] = train(objective, draws, splits, arguments.evaluations)
        steps = arguments.evaluations // (BATCH * draws)
        rows[name] = {"steps": steps, **evaluate(pairs[name], x)}
        print(name, f"[{time.perf_counter() - began:.0f} s]", rows[name], flush=True)
    at = pairs["ELBO"]
    batch = x[:100]
    ratios = {
        "IWAE": [signal_to_noise(o.IWAE(k), at, batch) for k in DRAWS],
        "DReG": [signal_to_noise(o.DReG(k), at, batch) for k in DRAWS],
    }
    times = step_times(at, x[:BATCH])
    for name, (objective, _) in OBJECTIVES.items():
        rows[name] |= {"SNR": signal_to_noise(objective, at, batch), "time": times[name]}
    picture(ratios)
    write(
        {
            "evaluations": arguments.evaluations,
            "rows": rows,
            "signal to noise": ratios,
            "made with": made_with(time.perf_counter() - started),
        }
    )


if __name__ == "__main__":
    main()
