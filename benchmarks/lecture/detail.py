"""A quarter of the pixels of photographs, restored."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

from lecture.common import PICTURES, Bench, Numbers, Rows, psnr, ssim
from pvae import VAE, recipes
from pvae.corruptions import Downsampling

PATCH, STRIDE, CODE, HIDDEN, EPOCHS = 8, 2, 128, (512,), 12


def detail(bench: Bench) -> None:
    train, test = _photographs()
    patches = torch.cat([_patches(photo, 2) for photo in train])
    patches = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))]
    patches = patches[:24_000]
    down = Downsampling(2)

    def restored(seed: int, seen: Tensor) -> Tensor:
        """Patches of an image as a small one shows it, restored; the mean where they overlap."""
        pair = bench.fit("detail middle", _make, seed, x=patches, epochs=EPOCHS, batch_size=128)
        height, width = seen.shape[-2:]
        parts = pair.reconstruct(_patches(seen, STRIDE)).flatten(1).T[None]
        options: dict[str, Any] = {"kernel_size": PATCH, "stride": STRIDE}
        return F.fold(parts, (height, width), **options) / F.fold(
            torch.ones_like(parts), (height, width), **options
        )

    ways = ("bicubic", "AE", "bicubic, sent as JPEG", "AE, sent as JPEG", "JPEG of all pixels")

    def measured(way: str) -> list[Numbers]:
        def measure(seed: int) -> Numbers:
            found = []
            for photo in test:
                x = photo[None]
                small = down.small(x)
                raw = _png(small)
                sent, size = _jpeg(small, 90)
                if "sent as" in way:
                    small, raw = sent, size
                if way.startswith("bicubic"):
                    back = _resized(small, x.shape[-1], x.shape[-2])
                elif way.startswith("AE"):
                    back = restored(seed, _enlarged(small))
                else:
                    back, raw = min(
                        (_jpeg(x, quality) for quality in range(5, 96, 2)),
                        key=lambda found: abs(found[1] - size),
                    )
                found.append((psnr(back, x), ssim(back, x), raw))
            scores = np.mean(found, axis=0)
            return {"PSNR": scores[0], "SSIM": scores[1], "bytes": scores[2]}

        return bench.measure(way, measure)

    rows: Rows = {way: measured(way) for way in ways}
    bench.table("Mean over the two photographs' test parts", rows)
    bench.notes.append(
        "scikit-learn's two sample photographs, china and flower; the middle quarter is for "
        f"testing, the rest for training ({len(patches):,} patches of {PATCH}x{PATCH} pixels in "
        f"colour). A denoising autoencoder with corruptions.Downsampling(2), codes of {CODE}, "
        f"hidden {HIDDEN}, {EPOCHS} epochs; its patches overlap, steps of {STRIDE}. Bytes: the "
        "small image as PNG, or as JPEG at quality 90; 'JPEG of all pixels' has the quality that "
        "comes nearest to the bytes of the small JPEG. The data set named above is not used."
    )
    for key in ("PSNR", "SSIM"):
        bench.more(
            f"a quarter of the pixels, restored better than by bicubic ({key})",
            key,
            ("AE", rows),
            ("bicubic", rows),
        )
        bench.more(
            f"at equal bytes, a small JPEG restored is better than a JPEG of all pixels ({key})",
            key,
            ("AE, sent as JPEG", rows),
            ("JPEG of all pixels", rows),
        )
    x = test[0][None, :, 230:358, 4:132]
    small = down.small(x)
    _picture([_enlarged(small), _resized(small, 128, 128), restored(0, _enlarged(small)), x])


def _make() -> VAE:
    return recipes.denoising_ae((3, PATCH, PATCH), CODE, corruption=Downsampling(2), hidden=HIDDEN)


def _photographs() -> tuple[list[Tensor], list[Tensor]]:
    train, test = [], []
    for photo in load_sample_images().images:
        x = torch.as_tensor(np.array(photo)).permute(2, 0, 1).float() / 255
        x = x[:, :416]
        train += [x[:, :, :232], x[:, :, 408:]]
        test.append(x[:, :, 240:400].contiguous())
    return train, test


def _patches(x: Tensor, stride: int) -> Tensor:
    x = x if x.dim() == 4 else x[None]
    columns = F.unfold(x, PATCH, stride=stride)[0].T
    return columns.reshape(-1, 3, PATCH, PATCH).contiguous()


def _enlarged(small: Tensor) -> Tensor:
    return small.repeat_interleave(2, -2).repeat_interleave(2, -1)


def _picture_of(x: Tensor) -> Image.Image:
    array = (x[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def _tensor_of(image: Image.Image) -> Tensor:
    return torch.as_tensor(np.array(image)).permute(2, 0, 1)[None].float() / 255


def _resized(small: Tensor, width: int, height: int) -> Tensor:
    return _tensor_of(_picture_of(small).resize((width, height), Image.Resampling.BICUBIC))


def _png(x: Tensor) -> int:
    content = io.BytesIO()
    _picture_of(x).save(content, "PNG", optimize=True)
    return content.tell()


def _jpeg(x: Tensor, quality: int) -> tuple[Tensor, int]:
    content = io.BytesIO()
    _picture_of(x).save(content, "JPEG", quality=quality, optimize=True)
    return _tensor_of(Image.open(content).convert("RGB")), content.tell()


def _picture(parts: list[Tensor]) -> None:
    """Small image, bicubic, autoencoder, original."""
    whole = torch.cat(parts, -1)
    image = _picture_of(whole.repeat_interleave(2, -2).repeat_interleave(2, -1))
    image.quantize(128).save(PICTURES / "detail.png", optimize=True)
