"""What bfloat16 networks cost in nats, on the digits.

    python benchmarks/precision.py

VAE of 64-128-8 with a Gaussian likelihood of predicted sigma, 100 epochs in batches of 64, Adam at
2e-3 along a cosine, three seeds; precision "full" and "bf16" from the same weights with the same
draws. Evaluation is in float32. Writes ``benchmarks/results/precision.md``.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from provenance import made_with

import pvae
from pvae import bounds, data, randomness, recipes, schedules
from pvae.engine import PRECISIONS

RESULTS = Path(__file__).parent / "results" / "precision.md"
SEEDS = (0, 1, 2)


def main() -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    splits = data.load("digits")
    x, x_test = (
        torch.as_tensor(part.arrays[0]).reshape(-1, 64).float() / 16
        for part in (splits.train, splits.test)
    )
    rows: list[tuple[object, ...]] = []
    evidence = {}
    for seed in SEEDS:
        for precision in PRECISIONS:
            with randomness.forked(seed):
                pair = recipes.vae(64, 8, hidden=(128,), likelihood=pvae.likelihoods.Gaussian)
            run = pvae.fit(
                pair,
                x,
                epochs=100,
                batch_size=64,
                lr=2e-3,
                lr_schedule=schedules.Cosine(),
                seed=seed,
                precision=precision,
                device="cpu",
                progress=False,
            )
            found = bounds.evidence(pair, x_test, 500)
            assert found.values is not None
            evidence[precision] = found.values
            elbo = bounds.elbo(pair, x_test, 20).mean
            rows.append((seed, precision, run.history[-1]["elbo"], elbo, found.mean))
        change = evidence["bf16"] - evidence["full"]
        error = float(change.std() / len(change) ** 0.5)
        rows.append((seed, "difference", "", "", f"{float(change.mean()):+.3f} ± {error:.3f}"))
        print(*rows[-3:], sep="\n", flush=True)
    made = made_with(time.perf_counter() - started)
    lines = [
        "# What bfloat16 networks cost",
        "",
        f"Made by `python benchmarks/precision.py` at commit {made['commit']}, torch "
        f"{made['torch']}: a VAE of the digits, {len(x_test)} test images, nats. Differences are "
        "image by image, with their standard errors over images.",
        "",
        "| seed | precision | training ELBO | test ELBO | test evidence |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row]
        lines.append(f"| {' | '.join(cells)} |")
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
