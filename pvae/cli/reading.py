"""``pvae evaluate``, ``sample``, ``reconstruct``, ``encode``, ``export``: what reads a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

import pvae
from pvae.cli.common import (
    DataFile,
    Device,
    PairCode,
    Particles,
    RunFolder,
    Seed,
    app,
    echo,
    option,
    path_option,
    prepare_file,
    save_figure,
    summary,
)
from pvae.cli.opening import open_folder
from pvae.errors import ArgumentError, UndefinedError, check_int
from pvae.files import partial_of, telling, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from pvae.bounds.evidence import Method

__all__ = ["encode", "evaluate", "export", "reconstruct", "sample"]


@app.command()
def evaluate(
    run: RunFolder,
    *,
    data: DataFile = None,
    num_particles: Annotated[
        int | None,
        option(
            "Number K of draws for each datum, or of chains of ais. Default: 500; 16 chains.",
            "--num-particles",
            "-K",
        ),
    ] = None,
    method: Annotated[
        str,
        option(
            "How the evidence is estimated; ais and cubo give nothing else. "
            "Choices: importance, ais, cubo."
        ),
    ] = "importance",
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", "-n", help="Number of (first) test data, for ais and cubo; all if none."
        ),
    ] = None,
    seed: Seed = 0,
    pair: PairCode = None,
    device: Device = "auto",
) -> None:
    """Estimate ELBO, evidence and their parts on the test data."""
    from pvae.data import as_source, first_batch

    if rows is not None and method == "importance":
        raise ArgumentError("--rows", "--method ais or --method cubo with it", f"--method {method}")
    count = None if rows is None else check_int("--rows", rows)
    opened = open_folder(run, device, pair, data)
    if method == "importance":
        k = 500 if num_particles is None else num_particles
        found = opened.run, opened.pair, opened.splits, opened.data
        echo(summary(*found, num_particles=k, seed=seed))
        return
    source = as_source(opened.data, dtype=opened.pair.home().dtype)
    batch = first_batch(source, count or source.num_rows)
    how = cast("Method", method)  # which is checked there
    echo(pvae.bounds.evidence(opened.pair, batch, num_particles, method=how, seed=seed))


@app.command()
def sample(
    run: RunFolder,
    *,
    data: DataFile = None,
    num_samples: Annotated[int, option("Number of draws.", "--num-samples", "-n")] = 100,
    mean: Annotated[
        bool, option("Write the mean of x given z in place of a draw.", "--mean")
    ] = False,
    density: Annotated[
        str | None,
        option(
            "Density that is fitted to the training codes and takes the prior's place. "
            "Choices: gaussian, gmm."
        ),
    ] = None,
    to: Annotated[Path | None, path_option("File to write. Default: RUN/samples.npy.")] = None,
    seed: Seed = 0,
    pair: PairCode = None,
    device: Device = "auto",
) -> None:
    """Draw from the model: z from the prior, x from the decoder. No encoder is used.

    An autoencoder has no prior to draw from; --density gives it one.
    """
    import torch

    opened = open_folder(run, device, pair, data)
    if not isinstance(opened.pair, pvae.VAE) and density is None:
        x = pvae.latent.sample(opened.pair, opened.data, num_samples, mean=mean, seed=seed)
        _write_samples(to or run / "samples.npy", x, mean=mean)
        return
    vae = opened.vae("sample --density" if density else "sample")
    if density is not None:
        if density not in ("gaussian", "gmm"):
            raise ArgumentError("--density", "gaussian or gmm", repr(density))
        codes = pvae.latent.codes(vae, opened.training_data)
        if codes.dim() != 2:
            actual = f"codes of shape {codes.shape[1:]}"
            raise ArgumentError("--density", "a run whose codes are vectors", actual)
        fitted = pvae.latent.fit_density(codes, density, seed=seed)
        vae = pvae.VAE(fitted, vae.model.likelihood, vae.guide.posterior)
    with torch.no_grad():
        x = vae.sample(num_samples, mean=mean, seed=seed)
    _write_samples(to or run / "samples.npy", x, mean=mean)


def _write_samples(path: Path, x: Tensor, *, mean: bool) -> None:
    path = _save(path, x)
    what = "means" if mean else "draws"
    echo(f"{len(x)} {what} of shape {tuple(x.shape[1:])}: {path}")
    kind = "means of x given z" if mean else "draws of x"
    _draw(path, lambda: pvae.plots.samples(x[:100], title=f"samples from the model ({kind})"))


@app.command()
def reconstruct(
    run: RunFolder,
    *,
    data: DataFile = None,
    to: Annotated[
        Path | None, path_option("File to write. Default: RUN/reconstructions.npy.")
    ] = None,
    corrupt: Annotated[
        bool, option("Corrupt the data first, as training did.", "--corrupt")
    ] = False,
    seed: Seed = 0,
    pair: PairCode = None,
    device: Device = "auto",
) -> None:
    """Encode data and decode them again: means of x at the mean of q(z | x)."""
    import torch

    opened = open_folder(run, device, pair, data)
    vae, x = opened.vae("reconstruct"), opened.x
    if corrupt:
        if vae.guide.corruption is None:
            raise ArgumentError("--corrupt", "a run that was trained with a corruption", f"{run}")
        with pvae.randomness.forked(seed):
            x = vae.guide.corruption(x)
    with torch.no_grad():
        y = vae.reconstruct(x)
    path = _save(to or run / "reconstructions.npy", y)
    echo(f"{len(y)} reconstructions of shape {tuple(y.shape[1:])}: {path}")
    _draw(path, lambda: pvae.plots.reconstructions(x[:10], y[:10]))


@app.command()
def encode(
    run: RunFolder,
    *,
    data: DataFile = None,
    to: Annotated[Path | None, path_option("File to write. Default: RUN/codes.npy.")] = None,
    pair: PairCode = None,
    device: Device = "auto",
) -> None:
    """Write the codes of data: the means of q(z | x)."""
    import torch

    opened = open_folder(run, device, pair, data)
    with torch.no_grad():
        if isinstance(opened.pair, pvae.VAE):
            z = opened.pair.encode(opened.x)
        else:
            z = pvae.latent.codes(opened.pair, opened.data)
    path = _save(to or run / "codes.npy", z)
    echo(f"{len(z)} codes of shape {tuple(z.shape[1:])}: {path}")


@app.command()
def export(
    run: RunFolder,
    *,
    data: DataFile = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", "-n", min=1, help="Number of data, the first ones; all if none."),
    ] = None,
    num_particles: Particles = 200,
    to: Annotated[Path | None, path_option("File to write. Default: RUN/draws.nc.")] = None,
    seed: Seed = 0,
    pair: PairCode = None,
    device: Device = "auto",
) -> None:
    """Write draws and log densities for ArviZ, as netCDF."""
    from pvae.data import as_source, first_batch

    opened = open_folder(run, device, pair, data)
    source = as_source(opened.data, dtype=opened.pair.home().dtype)
    x = first_batch(source, rows or source.num_rows)
    path = (to or run / "draws.nc").with_suffix(".nc")
    prepare_file(path)
    tree = pvae.export.to_arviz(opened.pair, x, num_particles=num_particles, seed=seed)
    part = partial_of(path)
    with telling(path, "a file that can be written"):
        tree.to_netcdf(part, engine="h5netcdf")
        part.replace(path)
    echo(f"{', '.join(tree.children)}: {path}")
    if tree.attrs["left_out"]:
        echo(f"left out: {tree.attrs['left_out']}")


def _draw(path: Path, make: Callable[[], Figure]) -> None:
    """Saves a picture beside a file, if the data are images."""
    with contextlib.suppress(UndefinedError):
        picture = path.with_suffix(".png")
        save_figure(picture, make())
        echo(f"picture: {picture}")


def _save(path: Path, tensor: Tensor) -> Path:
    import io

    import numpy as np

    content = io.BytesIO()
    np.save(content, tensor.cpu().numpy())
    path = path if path.suffix == ".npy" else path.with_suffix(".npy")
    write_atomically(path, content.getvalue())
    return path
