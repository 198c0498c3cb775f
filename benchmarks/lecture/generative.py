"""Samples of autoencoders and variational ones, and what lies between the two."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
import zuko
from sklearn.neural_network import MLPClassifier
from torch import Tensor

import pvae
from lecture.common import (
    SIGMA,
    Bench,
    Images,
    Numbers,
    Rows,
    cell,
    column,
    gaussian,
    maker,
    mean,
    mse,
    save,
)
from pvae import VAE, guides, latent, plots, priors
from pvae.mmd import median_kernel, two_sample_test

PERMUTATIONS = 500


def generative(bench: Bench) -> None:
    images = bench.images
    size = min(500, len(images.x_test))
    real = images.x_test[:size]
    judge = functools.cache(lambda: _classifier(images))
    rows = _families(bench, real, judge)
    ways = _one_change(bench, real, judge)
    limit = _limit(bench, real, judge)
    bench.notes += [
        f"Latent of {images.latent_dim}; stochastic pairs have a likelihood of sigma {SIGMA}. "
        f"Samples are means of p(x | z), {size} against {size} test images. MMD^2: unbiased, times "
        f"1,000, Gaussian kernel at the median distance of test images; p: of {PERMUTATIONS} "
        "permutations, so that 0.002 is the least. Class score: exp of the mean divergence of a "
        "classifier's p(class | sample) from its mean over samples, at most 10. "
        "Nearest: root mean square distance of a sample to the nearest training image."
    ]
    bench.table("Samples", rows)
    bench.table(f"From AE to VAE one change at a time, all with sigma {SIGMA}", ways)
    bench.table("The VAE's limit, as the likelihood's sigma falls", limit)
    ae, vae = ("AE, z ~ N(0, I)", rows), ("VAE, z ~ N(0, I)", rows)
    bench.less("VAE samples are better than AE samples (MMD)", "MMD^2 x 1000", vae, ae)
    bench.more("VAE samples are better than AE samples (class score)", "class score", vae, ae)
    bench.less("VAE samples are nearer to data than AE samples", "nearest", vae, ae)
    for kind in ("Gaussian", "GMM", "flow"):
        bench.less(
            f"an ex-post density ({kind}) makes a plain autoencoder generative",
            "MMD^2 x 1000",
            (f"AE, {kind}", rows),
            ae,
        )
    bench.less(
        "the holes: draws with the codes' own mean and covariance fall between them, those of a "
        "mixture don't",
        "MMD^2 x 1000",
        ("AE, GMM", rows),
        ("AE, Gaussian", rows),
    )
    bench.less(
        "the VAE under its prior samples better than the AE with an ex-post Gaussian",
        "MMD^2 x 1000",
        vae,
        ("AE, Gaussian", rows),
    )
    for who in ("RAE", "WAE"):
        bench.less(
            f"the {who} samples better than the AE, both under N(0, I)",
            "MMD^2 x 1000",
            (f"{who}, z ~ N(0, I)", rows),
            ae,
        )
    bench.less(
        "both changes together (noise and prior) sample best under N(0, I)",
        "MMD^2 x 1000, N(0, I)",
        ("MeanField, Normal (VAE)", ways),
        *((name, ways) for name in ways if name != "MeanField, Normal (VAE)"),
    )
    names = [name for name in limit if name.startswith("VAE")]
    widths = [mean(limit[name], "std of q / spread of codes") for name in names]
    error, ae_error = (mean(limit[n], "test MSE") for n in (names[-1], "AE"))
    bench.claim(
        "with sigma going to 0 the VAE's limit is the AE: q shrinks to a point, the error becomes "
        "the AE's (within 10 %)",
        f"std of q / spread of codes {' > '.join(f'{w:.3g}' for w in widths)}; test MSE "
        f"{cell(column(limit[names[-1]], 'test MSE'))} "
        f"beside {cell(column(limit['AE'], 'test MSE'))}",
        confirmed=widths == sorted(widths, reverse=True)
        and widths[-1] < 0.05
        and abs(error / ae_error - 1) < 0.1,
    )
    _maps(bench)


def _families(bench: Bench, real: Tensor, judge: Callable[[], MLPClassifier]) -> Rows:
    images = bench.images
    dim = images.latent_dim

    def scored(draw: Callable[[int], Tensor]) -> Callable[[int], Numbers]:
        return lambda seed: _score(images, real, draw(seed), judge(), seed)

    def prior(recipe: str) -> Callable[[int], Tensor]:
        def draw(seed: int) -> Tensor:
            pair = bench.fit(recipe, maker(images, recipe), seed)
            other = latent.with_prior(pair, priors.StandardNormal(dim))
            return latent.sample(other, real, mean=True, seed=seed)

        return draw

    def expost(recipe: str, kind: str) -> Callable[[int], Tensor]:
        def draw(seed: int) -> Tensor:
            pair = bench.fit(recipe, maker(images, recipe), seed)
            return _expost(images, pair, kind, len(real), seed)

        return draw

    draws: dict[str, Callable[[int], Tensor]] = {
        "training images": lambda seed: images.x[
            torch.randperm(len(images.x), generator=torch.Generator().manual_seed(seed))
        ][: len(real)],
        "AE, z ~ N(0, I)": prior("ae"),
        "AE, Gaussian": expost("ae", "gaussian"),
        "AE, GMM": expost("ae", "gmm"),
        "AE, flow": expost("ae", "flow"),
        "RAE, z ~ N(0, I)": prior("rae"),
        "RAE, Gaussian": expost("rae", "gaussian"),
        "RAE, GMM": expost("rae", "gmm"),
        "WAE, z ~ N(0, I)": prior("wae"),
        "WAE, GMM": expost("wae", "gmm"),
        "VAE, z ~ N(0, I)": prior("vae"),
        "VAE, GMM": expost("vae", "gmm"),
    }
    shown = ("AE, z ~ N(0, I)", "AE, Gaussian", "AE, GMM", "WAE, z ~ N(0, I)", "VAE, z ~ N(0, I)")
    first = {name: draws[name](0)[:10].clamp(0, 1) for name in shown}
    save(plots.grid(first, "samples: means of p(x | z)"), f"samples_{images.name}")
    return {name: bench.measure(name, scored(draw)) for name, draw in draws.items()}


def _expost(images: Images, pair: VAE, kind: str, count: int, seed: int) -> Tensor:
    z = latent.codes(pair, images.x)
    if kind == "flow":
        torch.manual_seed(seed)
        flow = zuko.flows.NSF(z.shape[1], transforms=2, hidden_features=(64, 64))
        density = latent.fit_density(z, flow, num_steps=600, seed=seed, progress=False)
    else:
        density = latent.fit_density(z, kind, num_components=20, ridge=1e-3, seed=seed)
    whole = VAE(density, pair.model.likelihood, pair.guide.posterior)
    return whole.sample(count, mean=True, seed=seed)


def _one_change(bench: Bench, real: Tensor, judge: Callable[[], MLPClassifier]) -> Rows:
    images = bench.images
    rows: Rows = {}
    for guide in (guides.Point, guides.MeanField):
        for prior in (priors.Flat, priors.StandardNormal):
            name = f"{guide.__name__}, {'Flat' if prior is priors.Flat else 'Normal'}"
            name += {"Point, Flat": " (AE)", "MeanField, Normal": " (VAE)"}.get(name, "")
            make = maker(images, "vae", guide=guide, prior=prior)

            def measure(seed: int, name: str = name, make: Callable[[], VAE] = make) -> Numbers:
                pair = bench.fit("vae" if "VAE" in name else f"change {name}", make, seed)
                whole = pvae.VAE(
                    priors.StandardNormal(images.latent_dim),
                    pair.model.likelihood,
                    pair.guide.posterior,
                )
                drawn = whole.sample(len(real), mean=True, seed=seed)
                by_prior = _score(images, real, drawn, judge(), seed)
                drawn = _expost(images, pair, "gaussian", len(real), seed)
                by_gaussian = _score(images, real, drawn, judge(), seed)
                return {
                    "test MSE": mse(pair.reconstruct(images.x_test), images.x_test),
                    "spread of codes": float(pair.encode(images.x).var(0).mean().sqrt()),
                    "MMD^2 x 1000, N(0, I)": by_prior["MMD^2 x 1000"],
                    "class score, N(0, I)": by_prior["class score"],
                    "MMD^2 x 1000, ex-post Gaussian": by_gaussian["MMD^2 x 1000"],
                    "class score, ex-post Gaussian": by_gaussian["class score"],
                }

            rows[name] = bench.measure(f"change {name}", measure)
    return rows


def _limit(bench: Bench, real: Tensor, judge: Callable[[], MLPClassifier]) -> Rows:
    images = bench.images

    def measured(name: str, make: Callable[[], VAE]) -> list[Numbers]:
        def measure(seed: int) -> Numbers:
            pair = bench.fit(name, make, seed)
            draws = latent.codes(pair, images.x_test, num_particles=32)
            spread = pair.encode(images.x_test).var(0).sum().sqrt()
            other = latent.with_prior(pair, priors.StandardNormal(images.latent_dim))
            drawn = latent.sample(other, real, mean=True, seed=seed)
            found = _score(images, real, drawn, judge(), seed)
            return {
                "test MSE": mse(pair.reconstruct(images.x_test), images.x_test),
                "std of q / spread of codes": float(draws.var(0).mean(0).sum().sqrt() / spread),
                "MMD^2 x 1000, N(0, I)": found["MMD^2 x 1000"],
            }

        return bench.measure(f"limit {name}", measure)

    rows: Rows = {}
    for sigma in (0.5, 0.15, 0.05, 0.015, 0.005):
        make = maker(images, "vae", likelihood=gaussian(sigma))
        rows[f"VAE, sigma {sigma}"] = measured(
            "vae" if sigma == SIGMA else f"vae sigma {sigma}", make
        )
    rows["AE"] = measured("ae", maker(images, "ae"))
    return rows


# Scores of samples


def _classifier(images: Images) -> MLPClassifier:
    judge = MLPClassifier((100,), random_state=0, max_iter=200 if images.size < 200 else 25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the number of iterations is meant
        return judge.fit(images.x.flatten(1).numpy(), images.y)


def _score(images: Images, real: Tensor, drawn: Tensor, judge: MLPClassifier, seed: int) -> Numbers:
    drawn = drawn.clamp(0, 1)
    test = two_sample_test(
        drawn.flatten(1),
        real.flatten(1),
        median_kernel(real.flatten(1)),
        num_permutations=PERMUTATIONS - 1,
        seed=seed,
    )
    probabilities = judge.predict_proba(drawn.flatten(1).numpy()).clip(1e-12)
    marginal = probabilities.mean(0)
    divergence = (probabilities * np.log(probabilities / marginal)).sum(1).mean()
    near = latent.nearest(drawn.flatten(1), images.x.flatten(1), 1)[1]
    return {
        "MMD^2 x 1000": 1000 * test.mmd,
        "p": test.p_value,
        "class score": math.exp(divergence),
        "nearest": float((near.square() / images.size).mean().sqrt()),
    }


# Maps


def _maps(bench: Bench) -> None:
    """The latent plane of an AE and of a VAE, side by side."""
    images = bench.images
    figure = plots.Picture(figsize=(10, 4.5), layout="constrained")
    for recipe, axis in zip(("ae", "vae"), figure.subplots(1, 2), strict=True):
        pair = bench.fit(f"{recipe} plane", maker(images, recipe, 2), 0)
        codes = latent.codes(pair, images.x[:1500])
        title = f"{recipe.upper()}: codes of {images.name} by class"
        plots.latent_map(codes, images.y[:1500], axis=axis, title=title)
    save(figure, f"latent_maps_{images.name}")
