"""Sparse codes: against lambda, with and without unit_norm, and beside wavelets."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pywt  # type: ignore[import-untyped]
import torch
from sklearn.linear_model import orthogonal_mp_gram
from torch import Tensor, nn

from lecture.common import Bench, Numbers, Rows, cell, column, maker, mean, mse, psnr
from pvae import VAE, diagnostics, latent

RATES = (0.1, 0.3, 1.0)
LEARNED = "learned dictionary (least lambda), matching pursuit"


def dictionary(bench: Bench, rate: float, *, unit_norm: bool = True) -> Callable[[], VAE]:
    """The recipe; without a penalty, the plain autoencoder with the same networks."""
    images = bench.images
    linear = {"decoder_hidden": (), "code_activation": nn.ReLU, "unit_norm": unit_norm}
    kind, options = ("sparse_ae", {"l1": rate}) if rate else ("ae", {})
    return maker(images, kind, 4 * images.size, **linear, **options)


def rates(bench: Bench) -> tuple[float, ...]:
    return tuple(round(rate * math.sqrt(bench.images.weight), 2) for rate in RATES)


def sparsity(bench: Bench) -> None:
    images = bench.images
    wide = 4 * images.size
    least, middle, most = rates(bench)

    def measured(name: str, make: Callable[[], VAE]) -> list[Numbers]:
        return bench.measure(name, lambda seed: _measure(bench, bench.fit(name, make, seed)))

    on, off = (
        {
            f"lambda {rate}": measured(
                f"linear {rate} {unit_norm}", dictionary(bench, rate, unit_norm=unit_norm)
            )
            for rate in ((0.0, least, middle, most) if unit_norm else (0.0, least, most))
        }
        for unit_norm in (True, False)
    )
    deep: Rows = {}
    for unit_norm in (True, False):
        make = maker(images, "sparse_ae", wide, decoder_hidden=None, unit_norm=unit_norm, l1=middle)
        norm = "columns of norm 1" if unit_norm else "decoder free"
        deep[f"lambda {middle}, {norm}"] = measured(f"deep {unit_norm}", make)
    everywhere: Rows = {"lambda 0.0": measured("deep 0.0", maker(images, "ae", wide))}
    for rate in (least / 10, least):
        make = maker(images, "sparse_activations_ae", wide, l1=rate, code_activation=nn.ReLU)
        everywhere[f"lambda {rate:.2g}"] = measured(f"activations {rate}", make)
    bench.table("L1 on the code; linear decoder, columns of norm 1", on)
    bench.table("L1 on the code; linear decoder, free", off)
    bench.table("L1 on the code; a decoder with a hidden layer", deep)
    bench.table("L1 on all activations (code with a ReLU), and without", everywhere)
    bench.notes.append(
        f"Codes of {wide} numbers for {images.size} pixels that end in a ReLU. Near zero: at most "
        "0.01 of the root mean square of all entries. Size of code: mean L1 norm; of decoder: mean "
        "norm of the columns of its first layer. With a hidden layer, columns of norm 1 bound the "
        "decoder's gain (by the root of the layer's width) but don't fix it. Activations: Hoyer's "
        "measure and share near zero of what the encoder's hidden layer gives."
    )
    shown = f"lambda {least}"
    for key in ("Hoyer", "near zero"):
        bench.more(f"sparse codes are sparser ({key})", key, (shown, on), ("lambda 0.0", on))
        rising = [mean(several, key) for several in on.values()]
        bench.claim(
            f"the larger lambda, the sparser the code ({key})",
            " < ".join(f"{v:.3g}" for v in rising),
            confirmed=rising == sorted(rising),
        )
    strongest = list(everywhere)[-1]
    for key in ("Hoyer", "near zero", "activations, Hoyer", "activations, near zero"):
        bench.more(
            f"an L1 penalty on all activations makes them sparser ({key})",
            key,
            (strongest, everywhere),
            ("lambda 0.0", everywhere),
        )
    plain = on["lambda 0.0"]
    bench.claim(
        f"at comparable error: at lambda {least} less than a tenth of the images' variance is lost",
        f"test MSE {cell(column(on[shown], 'test MSE'))}, at 0 {cell(column(plain, 'test MSE'))}; "
        f"variance {_variance(images.x_test):.3g}",
        confirmed=max(column(on[shown], "test MSE")) < 0.1 * _variance(images.x_test),
    )
    shrunk = {
        name: mean(table[shown], "size of code") / mean(table["lambda 0.0"], "size of code")
        for name, table in (("with", on), ("without", off))
    }
    grown = mean(off[shown], "size of decoder") / mean(off["lambda 0.0"], "size of decoder")
    bench.claim(
        "without unit_norm the penalty is cheated: the code shrinks more, and the decoder grows",
        f"size of code at lambda {least} over that at 0: {shrunk['without']:.3g} without, "
        f"{shrunk['with']:.3g} with; decoder without: {grown:.3g}",
        confirmed=shrunk["without"] < shrunk["with"] and grown > 1,
    )
    bench.more(
        f"and so the code is sparser with unit_norm than without (lambda {least})",
        "Hoyer",
        (f"{shown}, with", {f"{shown}, with": on[shown]}),
        (f"{shown}, without", {f"{shown}, without": off[shown]}),
    )
    _wavelets(bench, wide)


def _variance(x: Tensor) -> float:
    return mse(x.mean(0), x)


def _measure(bench: Bench, pair: VAE) -> Numbers:
    x = bench.images.x_test
    codes = latent.codes(pair, x)
    first = next(m for m in pair.model.likelihood.modules() if isinstance(m, nn.Linear))
    layers = [m for m in pair.guide.modules() if isinstance(m, nn.ReLU)]
    outputs: list[Tensor] = []
    handle = layers[0].register_forward_hook(lambda _m, _x, out: outputs.append(out.detach()))
    pair.encode(x)
    handle.remove()
    return {
        "Hoyer": float(diagnostics.hoyer(codes).mean()),
        "near zero": float(diagnostics.near_zero(codes).mean()),
        "activations, Hoyer": float(diagnostics.hoyer(outputs[0]).mean()),
        "activations, near zero": float(diagnostics.near_zero(outputs[0]).mean()),
        "size of code": float(codes.abs().sum(1).mean()),
        "size of decoder": float(first.weight.detach().norm(dim=0).mean()),
        "test MSE": mse(pair.decode(codes), x),
    }


# Wavelets


def largest(codes: Tensor, k: int) -> Tensor:
    """Codes with all but the k largest entries put to 0."""
    index = codes.abs().topk(k, dim=1).indices
    return torch.zeros_like(codes).scatter(1, index, codes.gather(1, index))


def _frame(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The undecimated Haar frame, one level: analysis and synthesis as matrices of unit atoms."""
    height, width = shape[-2:]
    pixels = np.eye(height * width).reshape(-1, height, width)
    approx, details = pywt.swt2(pixels, "haar", 1, axes=(-2, -1), norm=True)[0]
    analysis = np.concatenate([a.reshape(len(a), -1) for a in (approx, *details)], 1)
    norms = np.linalg.norm(analysis, axis=0)
    return analysis / norms, (analysis / norms).T  # columns: atoms; rows: the same atoms


def _orthogonal(shape: tuple[int, ...]) -> np.ndarray:
    """The orthogonal Haar transform, as far as it goes: columns are atoms."""
    height, width = shape[-2:]
    pixels = np.eye(height * width).reshape(-1, height, width)
    rows = [
        pywt.coeffs_to_array(pywt.wavedec2(p, "haar", mode="periodization", level=2))[0].ravel()
        for p in pixels
    ]
    return np.stack(rows)


def _wavelets(bench: Bench, wide: int) -> None:
    images = bench.images
    x = images.x_test[:300]
    flat = x.flatten(1).double()
    analysis, synthesis = _frame(images.shape)
    orthogonal = torch.as_tensor(_orthogonal(images.shape))
    square = images.size == orthogonal.shape[1]
    counts = (4, 8, 16, 32)
    mean_image = images.x.mean(0).flatten().double()

    def code(name: str, make: Callable[[], VAE]) -> Callable[[int], Numbers]:
        def measure(seed: int) -> Numbers:
            pair = bench.fit(name, make, seed)
            codes = latent.codes(pair, x)
            return {f"{k} kept": psnr(pair.decode(largest(codes, k)), x) for k in counts}

        return measure

    def thresholded(atoms: Tensor, back: Tensor) -> Numbers:
        coefficients = (flat - mean_image) @ atoms
        found = {}
        for k in counts:
            restored = largest(coefficients, k) @ back + mean_image
            found[f"{k} kept"] = psnr(restored.float().reshape(x.shape), x)
        return found

    def pursued(atoms: np.ndarray, centre: Tensor) -> Numbers:
        gram, inner = atoms @ atoms.T, atoms @ (flat - centre).numpy().T
        found = {}
        for k in counts:
            kept = orthogonal_mp_gram(gram, inner, n_nonzero_coefs=k, copy_Xy=True)
            restored = torch.as_tensor(kept.T @ atoms) + centre
            found[f"{k} kept"] = psnr(restored.float().reshape(x.shape), x)
        return found

    def learned(seed: int) -> Numbers:
        least = rates(bench)[0]
        pair = bench.fit(f"linear {least} True", dictionary(bench, least), seed)
        layer = next(m for m in pair.model.likelihood.modules() if isinstance(m, nn.Linear))
        return pursued(layer.weight.detach().T.double().numpy(), layer.bias.detach().double())

    frame = torch.as_tensor(analysis), torch.as_tensor(np.linalg.pinv(analysis))
    rows: Rows = {
        f"sparse AE, lambda {rate}": bench.measure(
            f"kept {rate}",
            code(f"linear {rate} True", dictionary(bench, rate)),
        )
        for rate in rates(bench)
    }
    rows["plain AE"] = bench.measure("kept 0", code("linear 0.0 True", dictionary(bench, 0.0)))
    rows["wavelet thresholding"] = bench.measure(
        "orthogonal", lambda _: thresholded(orthogonal, orthogonal.T)
    )
    rows["wavelet frame, thresholded"] = bench.measure("frame", lambda _: thresholded(*frame))
    rows["wavelet frame, matching pursuit"] = bench.measure(
        "pursuit", lambda _: pursued(synthesis, mean_image)
    )
    rows[LEARNED] = bench.measure("pursuit learned", learned)
    bench.table("PSNR in dB with the k largest entries of a code kept", rows)
    bench.notes.append(
        f"Wavelets are Haar, on images less the mean training image: orthogonal, two levels "
        f"({'' if square else 'padded to '}{orthogonal.shape[1]} entries); the frame is the "
        f"undecimated transform, one level, of {analysis.shape[1]} atoms (the sparse code: "
        f"{wide}), thresholded, or fitted by orthogonal matching pursuit, the strongest. "
        "First 300 test images."
    )
    for k in counts:
        best = max(list(rows)[: len(RATES)], key=lambda name: mean(rows[name], f"{k} kept"))
        bench.more(
            f"a learned sparse code beats wavelets at equal sparsity ({k} entries)",
            f"{k} kept",
            (best, rows),
            *((name, rows) for name in list(rows)[len(RATES) + 1 : -1]),
        )
    for k in counts:
        bench.more(
            f"the learned dictionary beats the wavelet frame, both by pursuit ({k} entries)",
            f"{k} kept",
            (LEARNED, rows),
            ("wavelet frame, matching pursuit", rows),
        )
