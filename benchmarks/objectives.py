"""Objectives on MNIST, at an equal number of decoder evaluations.

    python benchmarks/objectives.py [--data-dir DIR] [--evaluations 2000000] [--work DIR]

784-200-200-50 tanh, dynamic binarisation, batches of 50, Adam at 1e-3 falling along a cosine; an
objective with K draws makes K times fewer steps, but for one row, which makes as many as ELBO.
Writes ``benchmarks/results/objectives.json`` and ``benchmarks/results/objectives.md``, and the
picture of the signal-to-noise ratio. MNIST is looked for in ``--data-dir`` or the environment's
PVAE_DATA. What is trained is kept in ``--work`` and not trained again.

evidence     IWAE-1000 of the first 1,000 test images, nats
over ELBO    mean difference to ELBO's evidence, image by image, and its standard error
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
import pyro
import pyro.distributions as dist
import torch
from provenance import made_with
from torch import Tensor, nn

import pvae
from pvae import VAE, bounds, data, diagnostics, guides, likelihoods, plots, priors, schedules
from pvae import objectives as o
from pvae import terms as t
from pvae.diagnostics import gradient_noise
from pvae.networks import MLP

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "signal_to_noise.png"
BATCH = 50
GAUSSIAN, MNIST = "a Gaussian model", "the trained MNIST pair"
MORE_STEPS = "IWAE-5, as many steps as ELBO"
OBJECTIVES: dict[str, tuple[o.Objective, int]] = {  # and the draws that a step counts as
    "ELBO": (o.ELBO(), 1),
    "ELBO, rate in closed form": (o.ELBO(analytic_kl=True), 1),
    "STL": (o.STL(), 1),
    "IWAE-5": (o.IWAE(5), 5),
    "IWAE-50": (o.IWAE(50), 50),
    "DReG-5": (o.DReG(5), 5),
    "DReG-50": (o.DReG(50), 50),
    "Renyi-5, alpha 0.5": (o.Renyi(5, alpha=0.5), 5),
    "TVO-5": (o.TVO(5), 5),
    "beta = 4": (o.ELBO(beta=4.0), 1),
    "free bits, 0.1 a dimension": (o.FreeBits(floor=0.1), 1),
    MORE_STEPS: (o.IWAE(5), 1),
}
DRAWS = (1, 2, 4, 8, 16, 32, 64)
MORE_DRAWS = (1, 4, 16, 64, 256, 1024)  # of the Gaussian model
SIZE = 20


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
        pair,
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


def evaluate(pair: VAE, x: Tensor) -> tuple[dict[str, float], Tensor]:
    evidence = bounds.evidence(pair, x, 1000)
    elbo = bounds.elbo(pair, x, 20)
    assert elbo.rate is not None
    row = {
        "evidence": evidence.mean,
        "ELBO": elbo.mean,
        "rate": elbo.rate.mean,
        "active": float(diagnostics.active_units(pair, x).sum()),
    }
    return row, evidence.per_datum


def difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Of two evidences, the mean over images and its standard error."""
    each = first - second
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def orders(
    rows: dict[str, dict[str, float]],
    evidence: dict[str, Tensor],
    ratios: dict[str, dict[str, list[float]]],
) -> list[dict[str, Any]]:
    """What the papers say, with what was measured here."""
    found: list[dict[str, Any]] = []

    def add(source: str, claim: str, measured: str, *, confirmed: bool) -> None:
        found.append(
            {"source": source, "claim": claim, "measured": measured, "confirmed": confirmed}
        )

    def tighter(source: str, first: str, second: str) -> None:
        mean, error = difference(evidence[first], evidence[second])
        add(
            source,
            f"evidence: {first} above {second}",
            f"{mean:+.2f} ± {error:.2f} nats",
            confirmed=mean > 2 * error,
        )

    def greater(source: str, key: str, first: str, second: str, word: str = "above") -> None:
        a, b = rows[first][key], rows[second][key]
        confirmed = a > b if word == "above" else a < b
        claim = f"{key}: {first} {word} {second}"
        add(source, claim, f"{a:.3g} against {b:.3g}", confirmed=confirmed)

    tighter("Burda et al. 2016", MORE_STEPS, "ELBO")
    tighter("Burda et al. 2016", "IWAE-5", "ELBO")
    tighter("Burda et al. 2016", "IWAE-50", "IWAE-5")
    greater("Burda et al. 2016", "active", MORE_STEPS, "ELBO")
    tighter("Roeder et al. 2017", "STL", "ELBO")
    tighter("Tucker et al. 2019", "DReG-5", "IWAE-5")
    tighter("Tucker et al. 2019", "DReG-50", "IWAE-50")
    greater("Tucker et al. 2019", "SNR", "DReG-50", "IWAE-50")
    tighter("Li & Turner 2016", "Renyi-5, alpha 0.5", "ELBO")
    tighter("Masrani et al. 2019", "TVO-5", "ELBO")
    greater("Higgins et al. 2017", "active", "beta = 4", "ELBO", "below")
    greater("Kingma et al. 2016", "active", "free bits, 0.1 a dimension", "ELBO")
    for where, by_name in ratios.items():
        for name, falls in (("IWAE", True), ("DReG", False)):
            first, last = by_name[name][0], by_name[name][-1]
            many = (MORE_DRAWS if where == GAUSSIAN else DRAWS)[-1]
            add(
                "Rainforth et al. 2018" if falls else "Tucker et al. 2019",
                f"SNR of the guide's gradient {'falls' if falls else 'does not fall'} with K: "
                f"{name}, {where}",
                f"{first:.3g} at K = 1, {last:.3g} at K = {many}",
                confirmed=(last < first / 2) is falls,
            )
    return found


def signal_to_noise(objective: o.Objective, pair: VAE, x: Tensor) -> float:
    return gradient_noise(pair, x, objective).sides["guide"].snr


class GaussianModel(nn.Module):
    """z ~ N(0, I), x ~ N(z, I)."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros(SIZE), torch.ones(SIZE)).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, torch.ones(SIZE)).to_event(1), obs=x)


class GaussianGuide(nn.Module):
    """q(z | x) = N(Ax + b, 2/3 I), a little beside the best A and b."""

    def __init__(self, off: float = 0.02) -> None:
        super().__init__()
        self.map = nn.Linear(SIZE, SIZE)
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(SIZE) / 2 + off * torch.randn(SIZE, SIZE))
            self.map.bias.copy_(off * torch.randn(SIZE))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scale = torch.full((SIZE,), (2 / 3) ** 0.5)
            pyro.sample("z", dist.Normal(self.map(x), scale).to_event(1))


def gaussian_ratios(rounds: int = 2000) -> dict[str, list[float]]:
    """The experiment of Rainforth et al. 2018, figure 1: the gradient of b, one datum."""
    torch.manual_seed(0)
    model, guide, x = GaussianModel(), GaussianGuide(), 2**0.5 * torch.randn(1, SIZE)

    def ratio(objective: o.Objective) -> float:
        found = gradient_noise((model, guide), x, objective, num_repeats=rounds)
        return next(m for name, m in found.parameters.items() if name.endswith("bias")).snr

    kinds: tuple[Any, ...] = (o.IWAE, o.DReG)
    return {
        kind.__name__: [ratio(kind(k, vectorize_particles=True)) for k in MORE_DRAWS]
        for kind in kinds
    }


@torch.no_grad()
def largest_weight(pair: VAE, x: Tensor) -> float:
    """The greatest normalised weight of as many draws as are tried, mean over data."""
    terms = t.compute(pair.inspect((x,)), (x,), num_particles=DRAWS[-1])
    return float(terms.log_weight.softmax(0).amax(0).mean())


def step_times(pair: VAE, x: Tensor, rounds: int = 9) -> dict[str, float]:
    """Medians of alternating rounds of forward and backward passes, in parts of ELBO's."""
    parameters = [*pair.model.parameters(), *pair.guide.parameters()]
    times: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    structure = pair.inspect((x,))
    states = {
        name: objective.make_state(structure, 60_000) for name, (objective, _) in OBJECTIVES.items()
    }
    for _ in range(rounds + 1):
        for name, (objective, draws) in OBJECTIVES.items():
            repeats = max(1, 20 // draws)
            started = time.perf_counter()
            for _ in range(repeats):
                terms = objective.compute_terms(structure, (x,))
                objective.surrogate(terms, states[name]).backward()
                for p in parameters:
                    p.grad = None
            times[name].append((time.perf_counter() - started) / repeats)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {name: value / medians["ELBO"] for name, value in medians.items()}


def picture(ratios: dict[str, dict[str, list[float]]]) -> None:
    figure = plots.Picture(figsize=(7.5, 3.2), layout="constrained")
    for axis, (where, by_name) in zip(figure.subplots(1, 2), ratios.items(), strict=True):
        for name, values in by_name.items():
            axis.loglog(MORE_DRAWS if where == GAUSSIAN else DRAWS, values, "o-", ms=3, label=name)
        axis.set(xlabel="draws a datum, K", title=where)
        axis.legend(fontsize=8)
    figure.supylabel("signal to noise, guide", fontsize=9)
    figure.savefig(PICTURE, dpi=80)


def write(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "objectives.json").write_text(json.dumps(result, indent=1) + "\n")
    made = result["made with"]
    keys = ["evidence", "over ELBO", "ELBO", "rate", "active", "SNR", "time"]
    lines = [
        "# Objectives at an equal number of decoder evaluations",
        "",
        f"Made by `python benchmarks/objectives.py` at commit {made['commit']}, torch "
        f"{made['torch']}, in {made['minutes']} minutes on one thread: MNIST, dynamic "
        f"binarisation, 784-200-200-50 tanh, {result['evaluations']:,} evaluations of the decoder "
        "each, one seed.",
        "",
        "An objective with K draws makes 1/K of ELBO's steps, and none has converged (Burda et "
        "al. train for 3,280 epochs): orders against them by evidence are orders by the number of "
        "steps. The last row has as many steps as ELBO.",
        "",
        "| objective | steps | " + " | ".join(keys) + " |",
        "|---" * (len(keys) + 2) + "|",
    ]
    for name, row in result["rows"].items():
        cells = [f"{row['steps']:,.0f}"]
        cells += [f"{row['evidence']:.2f}", f"{row['over ELBO']:+.2f} ± {row['its error']:.2f}"]
        cells += [f"{row['ELBO']:.2f}", f"{row['rate']:.2f}", f"{row['active']:.0f}"]
        cells += [f"{row['SNR']:.3g}", f"{row['time']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", __doc__.split("\n\n")[-1].strip().replace("\n", "  \n"), ""]
    lines += [
        "**The papers' orders**",
        "",
        "| source | claim | measured | verdict |",
        "|---" * 4 + "|",
    ]
    for order in result["orders"]:
        verdict = "confirmed" if order["confirmed"] else "**not confirmed**"
        lines.append(f"| {order['source']} | {order['claim']} | {order['measured']} | {verdict} |")
    lines.append("")
    lines += [
        "**Signal to noise of the guide's gradient against the draws**",
        "",
        "The law is asymptotic: for so many draws that their mean weight is nearly exact. In the "
        "Gaussian model of Rainforth et al. (20 dimensions, 2,000 gradients, so that pure noise "
        f"has 0.018) it holds. On the trained pair one of {DRAWS[-1]} draws still has "
        f"{result['largest weight']:.0%} of the weight, the mean over images.",
    ]
    for where, by_name in result["signal to noise"].items():
        draws = MORE_DRAWS if where == GAUSSIAN else DRAWS
        lines += ["", f"| {where} | {' | '.join(f'K = {k}' for k in draws)} |"]
        lines.append("|---" * (len(draws) + 1) + "|")
        for name, values in by_name.items():
            lines.append(f"| {name} | " + " | ".join(f"{v:.3g}" for v in values) + " |")
    lines += ["", "![signal to noise](../../docs/images/signal_to_noise.png)"]
    (RESULTS / "objectives.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir")
    parser.add_argument("--evaluations", type=int, default=2_000_000)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    splits = data.load("mnist", arguments.data_dir, valid=0)
    test = data.Data(splits.test.arrays[:1], 1 / 255, binarize="static", seed=1).reshape((784,))
    x = torch.as_tensor(test.take(slice(1000)).fixed().arrays[0]).float()
    rows: dict[str, dict[str, float]] = {}
    evidence: dict[str, Tensor] = {}
    pairs: dict[str, VAE] = {}
    for name, (objective, draws) in OBJECTIVES.items():
        began = time.perf_counter()
        kept = arguments.work / f"{name} {arguments.evaluations}.pt" if arguments.work else None
        if kept and kept.exists():
            pairs[name] = build()
            pairs[name].load_state_dict(torch.load(kept))
        else:
            pairs[name] = train(objective, draws, splits, arguments.evaluations)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                torch.save(pairs[name].state_dict(), kept)
        row, evidence[name] = evaluate(pairs[name], x)
        over, error = difference(evidence[name], evidence["ELBO"])
        rows[name] = {
            "steps": arguments.evaluations // (BATCH * draws),
            **row,
            "over ELBO": over,
            "its error": error,
        }
        print(name, f"[{time.perf_counter() - began:.0f} s]", rows[name], flush=True)
    at = pairs["ELBO"]
    batch = x[:100]
    ratios = {
        GAUSSIAN: gaussian_ratios(),
        MNIST: {
            "IWAE": [signal_to_noise(o.IWAE(k), at, batch) for k in DRAWS],
            "DReG": [signal_to_noise(o.DReG(k), at, batch) for k in DRAWS],
        },
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
            "largest weight": largest_weight(at, batch),
            "orders": orders(rows, evidence, ratios),
            "made with": made_with(time.perf_counter() - started),
        }
    )


if __name__ == "__main__":
    main()
