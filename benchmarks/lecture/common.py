"""What the parts share: images, trainings, measurements over seeds, scores, tables and verdicts."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import made_with
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

import pvae
from pvae import VAE, data, likelihoods, recipes, schedules

BENCHMARKS = Path(__file__).parent.parent
RESULTS = BENCHMARKS / "results"
PICTURES = BENCHMARKS.parent / "docs" / "images"

Numbers = dict[str, float]
Rows = dict[str, list[Numbers]]

PICTURES_OF = {
    "generative": ("samples", "latent_maps"),
    "denoising": ("denoising",),
    "capacity": ("capacity",),
    "detail": ("detail",),
    "arithmetic": ("arithmetic",),
}

SIGMA = 0.15
"""The likelihood's standard deviation in stochastic pairs, for grey values from 0 to 1."""


@dataclass(frozen=True)
class Images:
    """Grey values from 0 to 1, shape ``(N, 1, H, W)``, and classes."""

    name: str
    x: Tensor
    y: np.ndarray
    x_test: Tensor
    y_test: np.ndarray
    latent_dim: int
    hidden: tuple[int, ...]
    epochs: int
    batch_size: int
    weight: float = 1.0
    """On penalties beside the squared error of an image, which has more pixels in some sets."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def size(self) -> int:
        return self.x[0].numel()

    @property
    def settings(self) -> str:
        return (
            f"{self.name}: {len(self.x):,} training and {len(self.x_test):,} test images, "
            f"MLPs with hidden layers {self.hidden}, {self.epochs} epochs, batches of "
            f"{self.batch_size}, Adam at 2e-3 falling along a cosine; other numbers where said"
        )


def load_images(name: str, data_dir: str | None) -> Images:
    if name == "digits":
        splits = data.load("digits", valid=0, test=0.25)
        x, x_test = (
            torch.as_tensor(part.arrays[0] / 16).reshape(-1, 1, 8, 8)
            for part in (splits.train, splits.test)
        )
        y, y_test = splits.train.arrays[1], splits.test.arrays[1]
        return Images(name, x, y, x_test, y_test, 16, (128,), 60, 64)
    splits = data.load(name, data_dir, valid=0)
    # rows at random: the first half of MNIST's test images are of other writers than the second
    order = np.random.default_rng(0)
    few, some = (
        part.take(np.sort(order.permutation(len(part))[:count]))
        for part, count in ((splits.train, 10_000), (splits.test, 2_000))
    )
    few, some = (part.take(order.permutation(len(part))) for part in (few, some))
    x, x_test = (torch.as_tensor(part.arrays[0] / np.float32(255)) for part in (few, some))
    y, y_test = few.arrays[1], some.arrays[1]
    return Images(name, x, y, x_test, y_test, 16, (256,), 16, 32, weight=10.0)


class Bench:
    """One part on one data set: trains, measures, and keeps tables and verdicts."""

    def __init__(self, arguments: argparse.Namespace, part: str, images: Images) -> None:
        seeds = 3
        if images.name != "digits":  # codes of thousands of numbers take their time
            is_wide = part in ("sparsity", "capacity")
            seeds, images = (1, replace(images, epochs=8)) if is_wide else (2, images)
        self.arguments, self.part, self.images = arguments, part, images
        self.seeds = range(arguments.seeds or seeds)
        self.work = Path(arguments.work) if arguments.work else None
        self.tables: list[dict[str, Any]] = []
        self.claims: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._trained: dict[str, VAE] = {}

    def fit(
        self, name: str, make: Callable[[], VAE], seed: int, x: Tensor | None = None, **options: Any
    ) -> VAE:
        """A trained pair; the same name and seed give the same one."""
        key = f"{self.images.name} {name} {seed}"
        if key not in self._trained:
            torch.manual_seed(seed)
            pair = make()
            epochs = options.pop("epochs", self.images.epochs)
            folder = None
            if self.work is not None:
                folder = self.work / "trained" / "".join(c if c.isalnum() else "_" for c in key)
            pvae.fit(
                pair,
                self.images.x if x is None else x,
                epochs=epochs,
                batch_size=options.pop("batch_size", self.images.batch_size),
                lr=options.pop("lr", 2e-3),
                lr_schedule=schedules.Cosine(),
                seed=seed,
                device="cpu",
                progress=False,
                folder=folder,
                resume=folder is not None,
                save_every=epochs,
                **options,
            )
            self._trained[key] = pair
        return self._trained[key]

    def measure(self, name: str, what: Callable[[int], Numbers]) -> list[Numbers]:
        """Numbers for each seed, or what they were before where ``--work`` has them."""
        found = []
        for seed in self.seeds:
            path = None
            if self.work is not None:
                stem = "".join(c if c.isalnum() else "_" for c in f"{name} {seed}")
                path = self.work / "measured" / self.part / self.images.name / f"{stem}.json"
            if path is not None and path.exists():
                found.append(dict(json.loads(path.read_text())))
                continue
            started = time.perf_counter()
            numbers = {k: float(v) for k, v in what(seed).items()}
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(numbers))
            shown = " ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            seconds = time.perf_counter() - started
            print(f"{self.part} {self.images.name} {name} {seed} [{seconds:.0f} s]: {shown}")
            found.append(numbers)
        return found

    def table(self, title: str, rows: Rows) -> None:
        self.tables.append({"title": title, "rows": rows})

    def claim(self, claim: str, measured: str, *, confirmed: bool) -> None:
        self.claims.append({"claim": claim, "measured": measured, "confirmed": bool(confirmed)})

    def less(
        self, claim: str, key: str, first: tuple[str, Rows], *others: tuple[str, Rows]
    ) -> None:
        """The claim that a number is less in the first than in each other, on every seed."""
        self._compare(claim, key, 1, first, others)

    def more(
        self, claim: str, key: str, first: tuple[str, Rows], *others: tuple[str, Rows]
    ) -> None:
        """The claim that a number is greater in the first than in each other, on every seed."""
        self._compare(claim, key, -1, first, others)

    def _compare(
        self,
        claim: str,
        key: str,
        sign: int,
        first: tuple[str, Rows],
        others: Sequence[tuple[str, Rows]],
    ) -> None:
        mine = column(first[1][first[0]], key)
        theirs = {name: column(rows[name], key) for name, rows in others}
        confirmed = all(
            sign * a < sign * b
            for values in theirs.values()
            for a, b in zip(mine, values, strict=True)
        )
        shown = "; ".join(f"{n}: {cell(v)}" for n, v in {first[0]: mine, **theirs}.items())
        self.claim(claim, f"{key}: {shown}", confirmed=confirmed)

    def _resumed(self) -> dict[str, str]:
        return {"resumed": " with --work, some of it perhaps at earlier ones"} if self.work else {}

    def write(self, seconds: float) -> None:
        RESULTS.mkdir(exist_ok=True)
        result = {
            "part": self.part,
            "data": self.images.name,
            "settings": self.images.settings,
            "seeds": list(self.seeds),
            "notes": self.notes,
            "claims": self.claims,
            "tables": self.tables,
            "made with": made_with(seconds) | self._resumed(),
        }
        path = RESULTS / f"autoencoders_{self.part}_{self.images.name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


def column(rows: Sequence[Mapping[str, float]], key: str) -> list[float]:
    return [row[key] for row in rows]


def mean(rows: Sequence[Mapping[str, float]], key: str) -> float:
    return statistics.mean(column(rows, key))


def cell(values: Sequence[float]) -> str:
    """Mean over seeds and range."""
    middle = f"{statistics.mean(values):.4g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.4g} to {max(values):.4g})"


# Pairs


def gaussian(sigma: float = SIGMA) -> Any:
    return functools.partial(likelihoods.Gaussian, sigma=sigma)


def maker(images: Images, recipe: str, latent_dim: int = 0, **options: Any) -> Callable[[], VAE]:
    """What builds a recipe's pair for the images."""
    build = recipes.named(recipe)
    if recipe == "vae":
        options = {"likelihood": gaussian(), **options}
    if recipe == "wae":
        options = {"mmd": 10.0 * images.weight, **options}
    options = {"hidden": images.hidden, **options}
    return lambda: build(images.shape, latent_dim or images.latent_dim, **options)


# Scores


def mse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean())


def psnr(restored: Tensor, x: Tensor) -> float:
    """Of the mean squared error over all images, in dB; values are clipped to 0 to 1 first."""
    return float(peak_signal_noise_ratio(restored.clamp(0, 1), x, data_range=1.0))


def ssim(restored: Tensor, x: Tensor) -> float:
    """With the usual Gaussian window; on images below 16 pixels a uniform one of 3x3."""
    small = min(x.shape[-2:]) < 16
    options: dict[str, Any] = {"gaussian_kernel": False, "kernel_size": 3} if small else {}
    found = structural_similarity_index_measure(restored.clamp(0, 1), x, data_range=1.0, **options)
    assert isinstance(found, Tensor)
    return float(found)


def save(figure: Any, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"{name}.png", dpi=80)


# Results


def write_page(order: Sequence[str]) -> None:
    """Makes ``results/autoencoders.md`` anew from all JSON files."""
    found = [
        json.loads(path.read_text())
        for part in order
        for path in sorted(RESULTS.glob(f"autoencoders_{part}_*.json"))
    ]
    lines = [
        "# What autoencoders do",
        "",
        "Made by `python benchmarks/autoencoders.py PART...`; numbers of each seed are in the JSON "
        "files. A cell has the mean over seeds and, in brackets, the range. A comparison is "
        "confirmed only if it holds on every seed.",
        "",
        "| part | data | claim | measured | verdict |",
        "|---|---|---|---|---|",
    ]
    for result in found:
        for claim in result["claims"]:
            verdict = "confirmed" if claim["confirmed"] else "**not confirmed**"
            lines.append(
                f"| {result['part']} | {result['data']} | {claim['claim']} | {claim['measured']} "
                f"| {verdict} |"
            )
    for result in found:
        made = result["made with"]
        lines += [
            "",
            f"## {result['part']}, {result['data']}",
            "",
            f"{result['settings']}. Seeds {', '.join(map(str, result['seeds']))}; written at "
            f"commit {made['commit']}{made.get('resumed', '')}, torch {made['torch']}.",
            *(line for note in result["notes"] for line in ("", note)),
        ]
        for picture in PICTURES_OF.get(result["part"], ()):
            for name in (f"{picture}_{result['data']}", picture):
                if (PICTURES / f"{name}.png").exists():
                    lines += ["", f"![{name}](../../docs/images/{name}.png)"]
        for table in result["tables"]:
            lines += ["", f"**{table['title']}**", "", *_markdown(table["rows"])]
    (RESULTS / "autoencoders.md").write_text("\n".join(lines) + "\n")


def _markdown(rows: Rows) -> list[str]:
    keys = list(dict.fromkeys(k for several in rows.values() for row in several for k in row))
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, several in rows.items():
        cells = [cell(column(several, k)) if k in several[0] else "" for k in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines
