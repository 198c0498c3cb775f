"""Noise and lost pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.ndimage import median_filter
from sklearn.decomposition import PCA
from torch import Tensor, nn

from lecture.common import Bench, Images, Numbers, Rows, maker, mean, psnr, save, ssim
from pvae import plots
from pvae.corruptions import BlockMasking, Masking, Noise, SaltAndPepper

LEVELS = (0.1, 0.2, 0.3, 0.5)
OWN = "denoising AE, trained on this"
Restore = Callable[[Tensor, nn.Module, int], Tensor]


def denoising(bench: Bench) -> None:
    images = bench.images
    code = 2 * images.latent_dim
    side = images.shape[-1] * 3 // 8
    damages: dict[str, nn.Module] = {f"noise {s}": Noise(s) for s in LEVELS}
    damages |= {
        "half the pixels lost": Masking(0.5),
        "salt and pepper on a fifth": SaltAndPepper(0.2),
        f"a {side}x{side} block": BlockMasking(side),
    }
    trained = {
        "denoising AE, trained at 0.3": Noise(0.3),
        "denoising AE, trained on half the pixels": Masking(0.5),
    }

    def by_pair(name: str, recipe: str, **options: nn.Module) -> Restore:
        make = maker(images, recipe, code, **options)
        return lambda x, _, seed: bench.fit(f"restoring {name}", make, seed).reconstruct(x)

    ways: dict[str, Restore] = {
        "as it is": lambda x, _, __: x,
        "median filter 3x3": lambda x, _, __: torch.as_tensor(
            median_filter(x.numpy(), size=(1, 1, 3, 3))
        ),
        "PCA, best size": lambda x, damage, seed: _pca(images, x, damage, seed),
        "plain AE": by_pair("plain AE", "ae"),
        **{n: by_pair(n, "denoising_ae", corruption=c) for n, c in trained.items()},
        OWN: lambda x, damage, seed: _own(bench, code, x, damage, seed),
    }
    tables: dict[str, Rows] = {}
    for where, damage in damages.items():

        def measured(name: str, damage: nn.Module = damage) -> Callable[[int], Numbers]:
            def measure(seed: int) -> Numbers:
                torch.manual_seed(1000 + seed)
                seen = damage(images.x_test)
                restored = ways[name](seen, damage, seed)
                return {
                    "PSNR": psnr(restored, images.x_test),
                    "SSIM": ssim(restored, images.x_test),
                }

            return measure

        tables[where] = {
            name: bench.measure(f"{where} {name}", measured(name))
            for name in ways
            if not where.startswith("noise") or not name.endswith(("pixels", "blocks"))
        }
        bench.table(where, tables[where])
    bench.notes.append(
        f"Codes of {code}. PSNR in dB and SSIM by torchmetrics, of grey values clipped to 0 to 1, "
        "the former of the mean squared error over all images (SSIM of 8x8 images with a uniform "
        "3x3 window). PCA, best size: the number of components that restores corrupted training "
        "images best, for each corruption anew. Denoising AE, trained on this: on this corruption; "
        "the others on one, shown on all."
    )
    others = ("as it is", "median filter 3x3", "PCA, best size", "plain AE")
    for where in tables:
        table = tables[where]
        for key in ("PSNR", "SSIM"):
            bench.more(
                f"denoising autoencoders restore better ({where}, {key})",
                key,
                (OWN, table),
                *((name, table) for name in others),
            )
    gains = [
        mean(tables[f"noise {s}"][OWN], "PSNR") - mean(tables[f"noise {s}"]["plain AE"], "PSNR")
        for s in LEVELS
    ]
    bench.claim(
        "against the plain autoencoder, the gain grows with the noise",
        "dB at " + ", ".join(f"{s}: {g:+.2f}" for s, g in zip(LEVELS, gains, strict=True)),
        confirmed=gains == sorted(gains),
    )
    _picture(images, damages["noise 0.3"], ways)


def _own(bench: Bench, code: int, x: Tensor, damage: nn.Module, seed: int) -> Tensor:
    """A denoising autoencoder trained on the corruption that it is to undo."""
    make = maker(bench.images, "denoising_ae", code, corruption=damage)
    level = getattr(damage, "sigma", "")
    name = {
        "Noise": f"denoising AE, trained at {level}",
        "Masking": "denoising AE, trained on half the pixels",
        "SaltAndPepper": "denoising AE, trained on salt and pepper",
    }.get(type(damage).__name__, "denoising AE, trained on blocks")
    return bench.fit(f"restoring {name}", make, seed).reconstruct(x)


def _pca(images: Images, x: Tensor, damage: nn.Module, seed: int) -> Tensor:
    flat = images.x.flatten(1).numpy()
    pca = PCA(random_state=0).fit(flat)
    axes, centre = torch.as_tensor(pca.components_), torch.as_tensor(pca.mean_)
    few = images.x[:1000]
    torch.manual_seed(2000 + seed)
    seen = damage(few)

    def project(x: Tensor, size: int) -> Tensor:
        centred = x.flatten(1) - centre
        return (centred @ axes[:size].T @ axes[:size] + centre).reshape(x.shape)

    sizes = [s for s in (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if s <= images.size]
    return project(x, max(sizes, key=lambda size: psnr(project(seen, size), few)))


def _picture(images: Images, damage: nn.Module, ways: dict[str, Restore]) -> None:
    torch.manual_seed(1000)
    x = images.x_test[:10]
    seen = damage(x)
    names = ("median filter 3x3", "PCA, best size", "plain AE", "denoising AE, trained at 0.3")
    rows = {"clean": x, "noise 0.3": seen.clamp(0, 1)}
    rows |= {name: ways[name](seen, damage, 0).clamp(0, 1) for name in names}
    save(plots.grid(rows, "restored images"), f"denoising_{images.name}")
