"""Codes far below, equal to and above the data's dimension."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from lecture.common import Bench, Images, Numbers, Rows, cell, column, maker, mean, mse, save
from pvae import VAE, plots

FEW = 200


def capacity(bench: Bench) -> None:
    images = bench.images
    small = images.size < 200
    parts = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 1, 4) if small else (1 / 128, 1 / 32, 1 / 8, 1, 2)
    sizes = [max(1, round(images.size * part)) for part in parts]
    over = sizes[-1]
    wide = {"hidden": (4 * images.size,) if small else (images.size,)}
    lr = 2e-3 if small else 3e-4  # of wide networks
    foreign = _foreign(images.x_test)
    few = images.x[:FEW]

    def measured(name: str, make: Callable[[], VAE]) -> list[Numbers]:
        def measure(seed: int) -> Numbers:
            pair = bench.fit(name, make, seed, lr=lr)
            less = bench.fit(f"{name} few", make, seed, x=few, epochs=200, batch_size=FEW, lr=lr)
            errors = {k: _relative(pair, x) for k, x in foreign.items()}
            return {
                "training error": _relative(pair, images.x),
                "test error": _relative(pair, images.x_test),
                **errors,
                f"training error, {FEW} images": _relative(less, few),
                f"test error, {FEW} images": _relative(less, images.x_test),
            }

        return bench.measure(name, measure)

    plain: Rows = {
        f"{size}": measured(f"plain {size}", maker(images, "ae", size, **wide)) for size in sizes
    }
    linear: Rows = {
        f"{size}": measured(f"linear {size}", maker(images, "ae", size, hidden=()))
        for size in (sizes[1], over)
    }
    held: dict[str, Callable[[], VAE]] = {
        "sparse": maker(images, "sparse_ae", over, l1=0.3 * math.sqrt(images.weight), **wide),
        "contractive": maker(
            images, "contractive_ae", over, contractive=0.3 * images.weight, num_probes=4, **wide
        ),
        "denoising (0.3)": maker(images, "denoising_ae", over, **wide),
        "VAE": maker(images, "vae", over, **wide),
    }
    regularised: Rows = {name: measured(f"over {name}", make) for name, make in held.items()}
    projections: Rows = {
        f"{size}": bench.measure(f"pca {size}", functools.partial(_pca, bench, size, foreign))
        for size in sizes
        if size <= images.size
    }
    bench.table(f"Plain autoencoders, size of code ({images.size} pixels)", plain)
    bench.table("Linear autoencoders (no hidden layer)", linear)
    bench.table(f"Regularised ones, codes of {over}", regularised)
    bench.table("PCA", projections)
    bench.notes.append(
        "Error: squared error over the squared error of the constant image that suits best (the "
        "mean), so that 1 is nothing learned and 0 the identity. Noise: uniform in each pixel; "
        "permuted: test images, their pixels in another order, the same for all; turned: test "
        f"images by 90 degrees; {wide['hidden'][0]} hidden units, learning rate {lr}; l1 "
        f"{0.3 * math.sqrt(images.weight):.2g}, contractive {0.3 * images.weight:.2g} (4 probes)."
    )
    _picture(images, plain)
    low, same, top = f"{sizes[0]}", f"{images.size}", f"{over}"
    bench.more(
        f"undercomplete: high compression loss ({low} numbers against {same})",
        "test error",
        (low, plain),
        (same, plain),
    )
    for kind, table in (("with a hidden layer", plain), ("linear", linear)):
        bench.claim(
            f"overcomplete plain ones give data back, unseen ones, too ({over} numbers, {kind}, "
            "error below 0.01)",
            f"test: {cell(column(table[top], 'test error'))}",
            confirmed=max(column(table[top], "test error")) < 0.01,
        )
    bench.claim(
        f"overcomplete plain ones learn the identity: with {over} numbers even noise comes back "
        "(error below 0.1)",
        f"noise: {cell(column(plain[top], 'noise'))}, permuted: "
        f"{cell(column(plain[top], 'permuted'))}, test: {cell(column(plain[top], 'test error'))}",
        confirmed=max(column(plain[top], "noise")) < 0.1,
    )
    bench.less(
        f"on the way to it: foreign images (permuted) come back better with {top} than with "
        f"{sizes[1]}",
        "permuted",
        (top, plain),
        (f"{sizes[1]}", plain),
    )
    for name in regularised:
        bench.more(
            f"regularised overcomplete codes know data from foreign images better ({name})",
            "permuted",
            (name, regularised),
            (top, plain),
        )
    gaps = {
        k: mean(v, f"test error, {FEW} images") / mean(v, f"training error, {FEW} images")
        for k, v in plain.items()
    }
    bench.claim(
        f"larger codes overfit: on {FEW} images the test error over the training error is greater "
        f"at {top} than at {low}",
        ", ".join(f"{k}: {v:.3g}" for k, v in gaps.items()),
        confirmed=gaps[top] > gaps[low],
    )


def _picture(images: Images, plain: Rows) -> None:
    figure = plots.Picture(figsize=(7, 3.4), layout="constrained")
    on_data, on_others = figure.subplots(1, 2, sharey=True)
    few = [f"training error, {FEW} images", f"test error, {FEW} images"]
    for axis, title, keys in (
        (on_data, "data", ["training error", "test error", *few]),
        (on_others, "foreign images", ["test error", "noise", "permuted", "turned"]),
    ):
        for key in keys:
            style = "--" if "images" in key else "-"
            errors = [mean(several, key) for several in plain.values()]
            axis.loglog([int(size) for size in plain], errors, f"o{style}", ms=3, label=key)
        axis.axvline(images.size, color="grey", linewidth=0.8)
        axis.set(title=title, xlabel=f"size of the code ({images.size} pixels)")
        axis.legend(fontsize=7)
    on_data.set_ylabel("error, in parts of the variance")
    save(figure, f"capacity_{images.name}")


def _foreign(x: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(x[0].numel(), generator=generator)
    return {
        "noise": torch.rand(x.shape, generator=generator),
        "permuted": x.flatten(1)[:, order].reshape(x.shape),
        "turned": x.rot90(1, (-2, -1)).contiguous(),
    }


def _relative(pair: VAE, x: Tensor) -> float:
    return mse(pair.reconstruct(x), x) / mse(x.mean(0), x)


def _pca(bench: Bench, size: int, foreign: dict[str, Tensor], _: int) -> Numbers:
    pca = PCA(size, random_state=0).fit(bench.images.x.flatten(1).numpy())

    def error(x: Tensor) -> float:
        flat = x.flatten(1)
        back = torch.as_tensor(pca.inverse_transform(pca.transform(flat.numpy())))
        return mse(back, flat) / mse(flat.mean(0), flat)

    return {
        "training error": error(bench.images.x),
        "test error": error(bench.images.x_test),
        **{name: error(x) for name, x in foreign.items()},
    }
