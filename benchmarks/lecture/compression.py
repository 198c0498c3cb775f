"""Lossy compression: rate and distortion of quantised codes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor

from lecture.common import Bench, Images, Numbers, Rows, gaussian, maker, psnr
from pvae import VAE, latent

RATES = (0.25, 0.5, 1.0, 1.5)
STEPS = tuple(2.0 ** (-i / 2) for i in range(-3, 8))
Curve = list[tuple[float, float]]


def compression(bench: Bench) -> None:
    images = bench.images
    sizes = (4, 8, 16, 32)

    def coded(recipe: str, **options: float) -> Callable[[int], Curve]:
        def curve(seed: int) -> Curve:
            points = []
            for size in sizes:
                make = maker(images, recipe, size, **options)
                pair = bench.fit(f"coding {recipe} {size}", make, seed)
                points += _quantised(images, _codes(images, pair), pair.decode)
            return points

        return curve

    curves: dict[str, Callable[[int], Curve]] = {
        "AE": coded("ae"),
        "VAE (sigma 0.05)": coded("vae", likelihood=gaussian(0.05)),
        "PCA": lambda _: _pca(images, sizes),
        "JPEG": lambda _: _jpeg(images.x_test),
    }
    rows: Rows = {}
    for name, curve in curves.items():

        def measure(seed: int, curve: Callable[[int], Curve] = curve) -> Numbers:
            points = curve(seed)
            return {f"{r} bits per pixel": _best(points, r) for r in RATES if _has(points, r)}

        rows[name] = bench.measure(name, measure)
    bench.table("Best PSNR in dB at a rate of at most", rows)
    bench.notes.append(
        "Rate: the empirical entropy of each entry of the quantised codes over the test images, "
        "summed and divided by the pixels (no coder was run, and what the decoder weighs is not "
        f"counted). Codes of {', '.join(map(str, sizes))} numbers; one uniform step for all "
        "entries, from 2.8 down to 0.09 of the codes' standard deviation (root mean over entries); "
        "the best of them is shown. JPEG (Pillow, optimised, without chroma): all test images as "
        "one mosaic of whole 8x8 blocks, so that its header is shared; empty where it needs more "
        "at its lowest quality."
    )
    for rate in RATES:
        key = f"{rate} bits per pixel"
        for rival in ("PCA", "JPEG"):
            if key in rows[rival][0]:  # JPEG can't go to the lowest rates: nothing to compare
                bench.more(
                    f"quantised AE codes beat {rival} at {rate} bits per pixel",
                    key,
                    ("AE", rows),
                    (rival, rows),
                )


def _codes(images: Images, pair: VAE) -> Tensor:
    return latent.codes(pair, images.x_test)


def _quantised(images: Images, codes: Tensor, decode: Callable[[Tensor], Tensor]) -> Curve:
    unit = float(codes.var(0).mean().sqrt())
    centre = codes.mean(0)
    points = []
    for step in STEPS:
        whole = ((codes - centre) / (step * unit)).round()
        bits = sum(_entropy(entry) for entry in whole.T)
        restored = decode(whole * (step * unit) + centre).reshape(images.x_test.shape)
        points.append((bits / images.size, psnr(restored, images.x_test)))
    return points


def _entropy(values: Tensor) -> float:
    counts = values.unique(return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(-(share * share.log2()).sum())


def _pca(images: Images, sizes: tuple[int, ...]) -> Curve:
    points = []
    for size in sizes:
        pca = PCA(size, random_state=0).fit(images.x.flatten(1).numpy())
        codes = torch.as_tensor(pca.transform(images.x_test.flatten(1).numpy()))

        def decode(z: Tensor, pca: PCA = pca) -> Tensor:
            return torch.as_tensor(pca.inverse_transform(z.numpy())).float()

        points += _quantised(images, codes, decode)
    return points


def _jpeg(x: Tensor) -> Curve:
    """The images side by side, each padded to whole blocks by repeating its edge."""
    height, width = x.shape[-2:]
    grey = (x[:, 0].numpy() * 255).round().astype(np.uint8)
    grey = np.pad(grey, ((0, 0), (0, -height % 8), (0, -width % 8)), mode="edge")
    columns = math.isqrt(len(grey))
    rows = len(grey) // columns
    tall, wide = grey.shape[1:]
    tiles = grey[: rows * columns].reshape(rows, columns, tall, wide)
    mosaic = tiles.transpose(0, 2, 1, 3).reshape(rows * tall, columns * wide)
    points = []
    for quality in (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90):
        content = io.BytesIO()
        Image.fromarray(mosaic).save(content, "JPEG", quality=quality, optimize=True)
        back = np.asarray(Image.open(content)).reshape(rows, tall, columns, wide)
        back = back.transpose(0, 2, 1, 3).reshape(-1, 1, tall, wide)[..., :height, :width]
        restored = torch.as_tensor(back / np.float32(255))
        bits = 8 * content.tell() / (rows * columns * height * width)
        points.append((bits, psnr(restored, x[: rows * columns])))
    return points


def _has(points: Curve, rate: float) -> bool:
    return any(bits <= rate for bits, _ in points)


def _best(points: Curve, rate: float) -> float:
    return max(quality for bits, quality in points if bits <= rate)
