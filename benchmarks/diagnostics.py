"""What diagnostics say of a VAE and an IWAE on MNIST, and what they cost.

    python benchmarks/diagnostics.py [--data-dir DIR] [--epochs 30] [--work DIR]

784-200-200-50 tanh, dynamic binarisation, batches of 50, Adam at 1e-3 falling along a cosine. MNIST
is looked for in ``--data-dir`` or the environment's PVAE_DATA. Trainings are kept in ``--work``,
and go on from there. Writes ``benchmarks/results/diagnostics.md`` and its JSON file.

ELBO, IWAE-5000, active units, k-hat    first 1,000 test images (k-hat of 1,000 draws each)
AIS, gaps, and IWAE-5000 beside them    the first 100 of these
Burda et al.                            L = 1 of their Table 1, 3,280 epochs of batches of 20
cost                                    processor time of a check as `pvae.diagnose` runs it, over
                                        that of one epoch of the VAE's training, as Python and
                                        compiled; 500 images, and the first run of each doesn't
                                        count, but for those that are named with their number
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from objectives import BATCH, build
from provenance import made_with
from torch import Tensor

import pvae
from pvae import VAE, bounds, data, diagnostics, schedules
from pvae import objectives as o
from pvae.diagnostics import DEFAULT

FEW = 100
RESULTS = Path(__file__).parent / "results"
PAIRS: dict[str, tuple[o.Objective, str]] = {  # and -log p(x) and active units of Burda et al.
    "VAE": (o.ELBO(), "-86.76 (19)"),
    "IWAE-5": (o.IWAE(5), "-85.54 (22)"),
}


def train(name: str, part: data.Data, epochs: int, work: Path | None) -> VAE:
    pair = build()
    pvae.fit(
        pair,
        part,
        PAIRS[name][0],
        epochs=epochs,
        batch_size=BATCH,
        lr=1e-3,
        lr_schedule=schedules.Cosine(),
        seed=0,
        device="cpu",
        folder=None if work is None else work / f"{name}-{epochs}",
        resume=work is not None,
    )
    return pair


def report(pair: VAE, x: Tensor) -> dict[str, Any]:
    """Numbers and their standard errors over images."""
    model, guide, few = pair.model, pair.guide, x[:FEW]
    elbo = bounds.elbo((model, guide), x, 50)
    evidence = bounds.evidence((model, guide), x, 5000)
    ais = bounds.evidence(
        (model, guide), few, 16, method="ais", ais=bounds.AIS(num_temperatures=500), progress=True
    )
    gap = diagnostics.gap((model, guide), few, evidence=ais)
    weights = diagnostics.importance((model, guide), x, num_particles=1000)
    rows = {
        "ELBO": (elbo.mean, elbo.se_data),
        "IWAE-5000": (evidence.mean, evidence.se_data),
        "IWAE-5000, 100 images": (float(evidence.per_datum[:FEW].mean()), None),
        "AIS, 100 images": (ais.mean, ais.se_data),
        "AIS above IWAE-5000": paired(ais.per_datum, evidence.per_datum[:FEW]),
        "amortisation gap": (gap.amortisation.mean, gap.amortisation.se_data),
        "approximation gap": (gap.approximation.mean, gap.approximation.se_data),
        "share of k-hat above 0.7": (weights.unreliable, weights.se_unreliable),
        "active units": (float(diagnostics.active_units((model, guide), x).sum()), None),
    }
    return {"rows": rows, "gap": str(gap), "screen": str(screen(pair, x))}


def paired(first: Tensor, second: Tensor) -> tuple[float, float]:
    each = first - second
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def screen(pair: VAE, x: Tensor) -> diagnostics.Diagnosis:
    return diagnostics.diagnose(pair, x)


def check_seconds(pair: VAE, x: Tensor, name: str) -> float:
    """Processor time of a check: the second one, or of those that take minutes the only one."""
    is_quick = name in DEFAULT
    for _ in range(1 + is_quick):
        started = time.process_time()
        diagnostics.diagnose(pair, x, checks=[name], num_data=500 if is_quick else FEW)
    return time.process_time() - started


def epoch_seconds(part: data.Data, engine: Any) -> float:
    """Processor time of the second epoch."""
    pair = build()
    fit = pvae.fit(pair, part, epochs=1, batch_size=BATCH, engine=engine, progress=False)
    started = time.process_time()
    fit.refine(1)
    return time.process_time() - started


def write(result: dict[str, Any]) -> None:
    (RESULTS / "diagnostics.json").write_text(json.dumps(result, indent=1) + "\n")
    made, pairs = result["made with"], result["pairs"]
    lines = [
        "# What diagnostics say of a VAE and an IWAE",
        "",
        f"Made by `python benchmarks/diagnostics.py` at commit {made['commit']}, "
        f"torch {made['torch']}, one thread, {result['epochs']} epochs.",
        "",
        (__doc__ or "").split("\n\n")[-1].strip().replace("\n", "  \n"),
        "",
        "| | " + " | ".join(pairs) + " |",
        "|---" * (len(pairs) + 1) + "|",
    ]
    for name in next(iter(pairs.values()))["rows"]:
        cells = [shown(*pair["rows"][name]) for pair in pairs.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    published = [PAIRS[name][1] for name in pairs]
    lines += ["| Burda et al., IWAE-5000 (active units) | " + " | ".join(published) + " |", ""]
    lines += ["## Cost", "", "| check | epochs as Python | epochs compiled |", "|---|---|---|"]
    for name, seconds in result["seconds"].items():
        cells = [f"{seconds / result['epoch'][engine]:.2f}" for engine in ("eager", "compiled")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, pair in pairs.items():
        lines += ["", f"## {name}", "", "```", pair["screen"], "", pair["gap"], "```"]
    (RESULTS / "diagnostics.md").write_text("\n".join(lines) + "\n")


def shown(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.2f} ± {error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    splits = data.load("mnist", arguments.data_dir, valid=0)
    part = data.Data(splits.train.arrays[:1], 1 / 255, binarize="dynamic").reshape((784,))
    test = data.Data(splits.test.arrays[:1], 1 / 255, binarize="static", seed=1).reshape((784,))
    x = torch.as_tensor(test.take(slice(1000)).fixed().arrays[0]).float()
    pairs = {name: train(name, part, arguments.epochs, arguments.work) for name in PAIRS}
    epoch = {engine: epoch_seconds(part, engine) for engine in ("eager", "compiled")}
    seconds = {name: check_seconds(pairs["VAE"], x, name) for name in diagnostics.CHECKS}
    asked = {f"{name}, {FEW} images": s for name, s in seconds.items() if name not in DEFAULT}
    quick = {name: seconds[name] for name in DEFAULT}
    whole = {"the screen": sum(quick.values()), **quick, **asked}
    write(
        {
            "epochs": arguments.epochs,
            "pairs": {name: report(pair, x) for name, pair in pairs.items()},
            "epoch": epoch,
            "seconds": whole,
            "made with": made_with(time.perf_counter() - started),
        }
    )
    print((RESULTS / "diagnostics.md").read_text())


if __name__ == "__main__":
    main()
