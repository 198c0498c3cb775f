"""Vector arithmetic on shapes whose factors are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lecture.common import PICTURES, Bench, Numbers, Rows, cell, column, gaussian, psnr
from pvae import VAE, latent, plots, recipes

SIDE, LATENT, HIDDEN, EPOCHS, COUNT = 16, 8, (256,), 30, 6000
FACTORS = {"size": (0.7, 1.3), "x": (-2.5, 2.5), "y": (-2.5, 2.5), "angle": (-0.9, 0.9)}
Factors = dict[str, Tensor]


def draw(factors: Factors) -> Tensor:
    """Soft-edged ellipses, axes 4.4 and 1.8 pixels times the size, turned by the angle."""
    place = torch.arange(SIDE) - (SIDE - 1) / 2
    across = place[None, None, :] - factors["x"][:, None, None]
    down = place[None, :, None] - factors["y"][:, None, None]
    cos, sin = factors["angle"].cos()[:, None, None], factors["angle"].sin()[:, None, None]
    size = factors["size"][:, None, None]
    u, v = (cos * across + sin * down) / (4.4 * size), (cos * down - sin * across) / (1.8 * size)
    radius = (u.square() + v.square()).sqrt()
    return torch.sigmoid(5 * (1 - radius))[:, None]


def measure(images: Tensor) -> Factors:
    """The factors of an image, from its moments; size is in units of that of the mean shape."""
    x = images[:, 0].clamp(0, 1)
    place = torch.arange(SIDE) - (SIDE - 1) / 2
    mass = x.sum((1, 2))
    share = x / mass[:, None, None]
    across, down = (share * place).sum((1, 2)), (share * place[:, None]).sum((1, 2))
    dx, dy = place - across[:, None], place - down[:, None]
    xx, yy = (share.sum(1) * dx.square()).sum(1), (share.sum(2) * dy.square()).sum(1)
    xy = (share * dx[:, None, :] * dy[:, :, None]).sum((1, 2))
    return {
        "size": (mass / UNIT).sqrt(),
        "x": across,
        "y": down,
        "angle": 0.5 * torch.atan2(2 * xy, xx - yy),
    }


UNIT = float(draw({k: torch.tensor([1.0 if k == "size" else 0.0]) for k in FACTORS}).sum((1, 2, 3)))


def _factors(count: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: low + (high - low) * torch.rand(count, generator=generator)
        for name, (low, high) in FACTORS.items()
    }


def arithmetic(bench: Bench) -> None:
    makers: dict[str, Callable[[], VAE]] = {
        "AE": lambda: recipes.ae((1, SIDE, SIDE), LATENT, hidden=HIDDEN),
        "VAE": lambda: recipes.vae(
            (1, SIDE, SIDE), LATENT, hidden=HIDDEN, likelihood=gaussian(0.05)
        ),
    }
    shapes = draw(_factors(COUNT, 0))
    check = _factors(500, 1)
    found = measure(draw(check))
    calibration = {
        n: float((found[n] - check[n]).abs().mean() / (high - low))
        for n, (low, high) in FACTORS.items()
    }
    bench.notes.append(
        f"{COUNT:,} drawn ellipses of {SIDE}x{SIDE} pixels, factors uniform and independent: "
        + ", ".join(f"{k} {low} to {high}" for k, (low, high) in FACTORS.items())
        + f"; codes of {LATENT}, hidden {HIDDEN}, {EPOCHS} epochs, VAE with sigma 0.05. Factors "
        "are read off images by their moments, with an error (mean, in parts of the range) of "
        + ", ".join(f"{k} {v:.3f}" for k, v in calibration.items())
        + ". A change is in parts of what was asked for (the named factor; 1 is right), or of what "
        "would be asked for (the others; mean absolute value, 0 is right). The data set named "
        "above is not used."
    )
    rows: dict[str, Rows] = {"attribute": {}, "analogy": {}}
    for who in ("AE", "VAE", "pixels"):

        def coder(seed: int, who: str = who) -> tuple[Any, Any]:
            if who == "pixels":
                return (lambda x: x.flatten(1)), (lambda z: z.reshape(-1, 1, SIDE, SIDE))
            pair = bench.fit(
                f"shapes {who}", makers[who], seed, x=shapes, epochs=EPOCHS, batch_size=128
            )
            return (lambda x: latent.codes(pair, x)), pair.decode

        for name in FACTORS:
            for kind, task in (("attribute", _attribute), ("analogy", _analogy)):

                def moved(
                    seed: int, name: str = name, task: Any = task, coder: Any = coder
                ) -> Numbers:
                    return task(name, *coder(seed), shapes, seed)

                rows[kind][f"{who}: {name}"] = bench.measure(f"{kind} {who} {name}", moved)
    bench.table(
        "Attribute vectors: the mean code of the upper third less that of the lower, added to "
        "shapes of the lower third",
        rows["attribute"],
    )
    bench.table("Analogies: d is to c as b is to a, which differ in one factor", rows["analogy"])
    for kind, table in rows.items():
        for who in ("AE", "VAE"):
            for name in FACTORS:
                several = table[f"{who}: {name}"]
                bench.claim(
                    f"{kind}, {who}: {name} moves (by over half of what was asked), the others "
                    "don't (by less than half of that)",
                    f"{name} {cell(column(several, name))}; most of the others "
                    f"{max(r[o] for r in several for o in FACTORS if o != name):.3g}",
                    confirmed=all(
                        r[name] > 0.5 and max(r[o] for o in FACTORS if o != name) < 0.5 * r[name]
                        for r in several
                    ),
                )
    for who in ("AE", "VAE"):
        key = "PSNR to the true d"
        bench.claim(
            f"analogies of codes are nearer to the true image than those of pixels ({who})",
            "; ".join(
                f"{n}: {cell(column(rows['analogy'][f'{who}: {n}'], key))} beside "
                f"{cell(column(rows['analogy'][f'pixels: {n}'], key))}"
                for n in FACTORS
            ),
            confirmed=all(
                a[key] > b[key]
                for n in FACTORS
                for a, b in zip(
                    rows["analogy"][f"{who}: {n}"], rows["analogy"][f"pixels: {n}"], strict=True
                )
            ),
        )
    _picture(bench, makers["VAE"], shapes)


def _changes(name: str, before: Tensor, after: Tensor, asked: float | Tensor) -> Numbers:
    first, second = measure(before), measure(after)
    found: Numbers = {}
    for other, (low, high) in FACTORS.items():
        change = second[other] - first[other]
        if other == "angle":
            change = (change + np.pi / 2) % np.pi - np.pi / 2
        if other == name:
            found[other] = float((change / asked).mean())
        else:  # what a change of two thirds of its range, as in the named factor, would be
            found[other] = float(change.abs().mean() / ((high - low) * 2 / 3))
    return found


def _attribute(name: str, encode: Any, decode: Any, shapes: Tensor, seed: int) -> Numbers:
    train, test = _factors(COUNT, 0), _factors(1000, 100 + seed)
    low, high = FACTORS[name]
    third = (high - low) / 3
    outer = (train[name] < low + third) | (train[name] > high - third)
    vector = latent.attribute_vector(encode(shapes[outer]), train[name][outer] > high - third)
    start = test[name] < low + third
    codes = encode(draw({k: v[start] for k, v in test.items()}))
    return _changes(name, decode(codes), decode(codes + vector), 2 * third)


def _analogy(name: str, encode: Any, decode: Any, _shapes: Tensor, seed: int) -> Numbers:
    a, c = _factors(1000, 200 + seed), _factors(1000, 300 + seed)
    low, high = FACTORS[name]
    step = (high - low) * 2 / 3
    start = low + (high - low) / 3 * torch.rand(1000, generator=torch.Generator().manual_seed(seed))
    a[name] = c[name] = start
    b, d = ({**f, name: f[name] + step} for f in (a, c))
    codes = [encode(draw(f)) for f in (a, b, c)]
    reached = decode(latent.analogy(*codes))
    found = _changes(name, decode(codes[2]), reached, step)
    return found | {"PSNR to the true d": psnr(reached, draw(d))}


def _picture(bench: Bench, make: Callable[[], VAE], shapes: Tensor) -> None:
    """One shape, moved along each factor's vector."""
    pair = bench.fit("shapes VAE", make, 0, x=shapes, epochs=EPOCHS, batch_size=128)
    codes, train = latent.codes(pair, shapes), _factors(COUNT, 0)
    centre = draw({k: torch.tensor([sum(v) / 2]) for k, v in FACTORS.items()})
    start = latent.codes(pair, centre)[0]
    rows = []
    for name, (low, high) in FACTORS.items():
        third = (high - low) / 3
        outer = (train[name] < low + third) | (train[name] > high - third)
        vector = latent.attribute_vector(codes[outer], train[name][outer] > high - third)
        rows.append(pair.decode(latent.interpolate(start - vector / 2, start + vector / 2, 9)))
    title = "along the vectors of " + ", ".join(FACTORS) + " (a row each)"
    plots.samples(torch.cat(rows), 9, title=title).savefig(PICTURES / "arithmetic.png", dpi=70)
