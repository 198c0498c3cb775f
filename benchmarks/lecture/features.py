"""Codes for what comes after: neighbours, classifiers, small perturbations."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lecture.common import SIGMA, Bench, Numbers, Rows, cell, column, maker, mean, mse
from pvae import VAE, diagnostics, latent
from pvae.modes import evaluating

WEIGHTS = (0.03, 0.1, 0.3, 1.0)
POSTERIORS = "VAE, Jeffreys' divergence of posteriors"
SHARED = {"AE": "ae", "RAE": "rae", "WAE": "wae", "VAE": "vae"}


def zoo(bench: Bench) -> dict[str, Callable[[], VAE]]:
    """All variants, with codes of one size; the sparse ones' are overcomplete."""
    images = bench.images
    wide, weight = 2 * images.size if images.size < 200 else images.size, images.weight
    everywhere = 0.003 * math.sqrt(weight)
    return {
        "AE": maker(images, "ae"),
        "sparse AE (code)": maker(images, "sparse_ae", wide, l1=0.1 * math.sqrt(weight)),
        "sparse AE (activations)": maker(images, "sparse_activations_ae", wide, l1=everywhere),
        "contractive AE": maker(images, "contractive_ae", contractive=0.1 * weight),
        "denoising AE": maker(images, "denoising_ae"),
        "RAE": maker(images, "rae"),
        "WAE": maker(images, "wae"),
        "VQ-VAE": maker(images, "vq_vae", 4, num_latents=images.latent_dim // 2),
        "VAE": maker(images, "vae"),
    }


def _key(bench: Bench, name: str) -> str:
    if name == "contractive AE":  # one of the weights that are compared
        return f"contractive {0.1 * bench.images.weight}"
    return SHARED.get(name, f"zoo {name}")


def _note(bench: Bench) -> str:
    dim, wide = bench.images.latent_dim, 2 * bench.images.size
    wide = wide if bench.images.size < 200 else bench.images.size
    root = math.sqrt(bench.images.weight)
    return (
        f"Codes and PCA of {dim} numbers; sparse codes of {wide} (l1 {0.1 * root:.2g} on the code, "
        f"{0.003 * root:.2g} on all activations); contractive {0.1 * bench.images.weight:.2g}; "
        f"denoising Noise(0.3); WAE {10 * bench.images.weight:.3g}; VQ-VAE {dim // 2} vectors of 4 "
        f"from 64 codes; VAE with sigma {SIGMA}."
    )


def _baselines(bench: Bench) -> dict[str, tuple[Tensor, Tensor]]:
    x, x_test = bench.images.x.flatten(1), bench.images.x_test.flatten(1)
    pca = PCA(bench.images.latent_dim, random_state=0).fit(x.numpy())
    projected = tuple(torch.as_tensor(pca.transform(part.numpy())) for part in (x, x_test))
    return {"pixels": (x, x_test), "PCA": (projected[0], projected[1])}


def _codes(bench: Bench, pair: VAE) -> tuple[Tensor, Tensor]:
    first, second = (
        latent.codes(pair, x).flatten(1) for x in (bench.images.x, bench.images.x_test)
    )
    return first, second


def _given(what: Callable[[Any], Numbers], codes: Any, _: int) -> Numbers:
    return what(codes)


def comparing(bench: Bench) -> None:
    images, k = bench.images, 10
    baselines = _baselines(bench)

    def precision(codes: tuple[Tensor, Tensor], metric: Any = "euclidean") -> float:
        found, _ = latent.nearest(codes[1], codes[0], k, metric=metric)
        return float(latent.precision_at_k(images.y_test, images.y, found).mean())

    def both(codes: tuple[Tensor, Tensor]) -> Numbers:
        return {
            "precision@10": precision(codes),
            "precision@10, cosine": precision(codes, "cosine"),
        }

    rows: Rows = {
        n: bench.measure(n, functools.partial(_given, both, c)) for n, c in baselines.items()
    }
    for name, make in zoo(bench).items():

        def measure(seed: int, name: str = name, make: Callable[[], VAE] = make) -> Numbers:
            return both(_codes(bench, bench.fit(_key(bench, name), make, seed)))

        rows[name] = bench.measure(name, measure)
    rows[POSTERIORS] = bench.measure(POSTERIORS, lambda seed: _by_posterior(bench, seed, k))
    bench.table(
        "Test images among training images: share of the 10 nearest of the same class", rows
    )
    bench.notes.append(_note(bench))
    for name in list(rows)[2:]:
        bench.more(
            f"codes are easier to compare than pixels and PCA ({name})",
            "precision@10",
            (name, rows),
            ("pixels", rows),
            ("PCA", rows),
        )


def _by_posterior(bench: Bench, seed: int, k: int) -> Numbers:
    """The same with the symmetric divergence of posteriors as the distance."""
    images = bench.images
    pair = bench.fit("vae", maker(images, "vae"), seed)
    found = []
    with torch.no_grad(), evaluating(pair.modules()):
        gallery = pair.guide.posterior(images.x)
        for some in images.x_test.split(50):
            distances = latent.jeffreys(pair.guide.posterior(some.unsqueeze(1)), gallery)
            found.append(distances.topk(k, largest=False).indices)
    precision = latent.precision_at_k(images.y_test, images.y, torch.cat(found))
    return {"precision@10": float(precision.mean())}


def features(bench: Bench) -> None:
    images = bench.images
    budgets = [n for n in (100, 1000, 10_000) if n <= len(images.x)]

    def accuracies(codes: tuple[Tensor, Tensor], seed: int) -> Numbers:
        order = np.random.default_rng(seed).permutation(len(images.x))
        found = {}
        for budget in budgets:
            few = order[:budget]
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit(codes[0].numpy()[few], images.y[few])
            found[f"{budget:,} labels"] = model.score(codes[1].numpy(), images.y_test)
        return found

    rows: Rows = {
        name: bench.measure(name, functools.partial(accuracies, c))
        for name, c in _baselines(bench).items()
    }
    for name, make in zoo(bench).items():

        def measure(seed: int, name: str = name, make: Callable[[], VAE] = make) -> Numbers:
            pair = bench.fit(_key(bench, name), make, seed)
            codes = _codes(bench, pair)
            found = accuracies(codes, seed)
            found["test MSE"] = mse(pair.reconstruct(images.x_test), images.x_test)
            if name != "VQ-VAE":
                found["sensitivity"] = _sensitivity(bench, pair)
            return found

        rows[name] = bench.measure(name, measure)
    bench.table("Accuracy of logistic regression on standardised codes", rows)
    by_weight: Rows = {"AE": rows["AE"]}
    weights = [w * images.weight for w in WEIGHTS]
    for weight in weights:
        make = maker(images, "contractive_ae", contractive=weight)

        def contract(seed: int, weight: float = weight, make: Callable[[], VAE] = make) -> Numbers:
            pair = bench.fit(f"contractive {weight}", make, seed)
            return {
                **accuracies(_codes(bench, pair), seed),
                "test MSE": mse(pair.reconstruct(images.x_test), images.x_test),
                "sensitivity": _sensitivity(bench, pair),
            }

        by_weight[f"contractive {weight}"] = bench.measure(f"contractive {weight}", contract)
    bench.table("The contractive penalty's weight", by_weight)
    bench.notes.append(
        _note(bench) + " Sensitivity: diagnostics.sensitivity, mean over 300 test images, divided "
        "by the codes' spread (their root total variance)."
        + ("" if 10_000 in budgets else " 10,000 labels: there are not that many digits.")
    )
    close = [
        w
        for w in weights
        if mean(by_weight[f"contractive {w}"], "test MSE") <= 1.25 * mean(rows["AE"], "test MSE")
    ]
    if close:
        bench.less(
            f"contractive codes are less sensitive, at comparable error (weight {close[-1]}, test "
            "MSE at most a quarter above the AE's)",
            "sensitivity",
            (f"contractive {close[-1]}", by_weight),
            ("AE", rows),
        )
    else:
        bench.claim(
            "contractive codes are less sensitive, at comparable error",
            "no such weight",
            confirmed=False,
        )
    falling = [mean(several, "sensitivity") for several in by_weight.values()]
    bench.claim(
        "the larger the contractive weight, the less sensitive the codes",
        " > ".join(f"{v:.3g}" for v in falling),
        confirmed=falling == sorted(falling, reverse=True),
    )
    least = f"{budgets[0]:,} labels"
    for name in list(rows)[2:]:
        bench.more(
            f"codes are better features than pixels and PCA with few labels ({name})",
            least,
            (name, rows),
            ("pixels", rows),
            ("PCA", rows),
        )
    most = f"{budgets[-1]:,} labels"
    best = max(list(rows)[2:], key=lambda n: mean(rows[n], most))
    bench.claim(
        f"with {most}, the best code is still better than pixels",
        f"{best}: {cell(column(rows[best], most))}; pixels: {cell(column(rows['pixels'], most))}",
        confirmed=all(
            a > b
            for a, b in zip(column(rows[best], most), column(rows["pixels"], most), strict=True)
        ),
    )


def _sensitivity(bench: Bench, pair: VAE) -> float:
    x = bench.images.x_test[:300]
    spread = latent.codes(pair, x).var(0).sum().sqrt()
    wide = len(pair.encode(x[:1])[0]) > 64
    found = diagnostics.sensitivity(pair, x, num_probes=64 if wide else None)
    return float(torch.mean(found) / spread)
