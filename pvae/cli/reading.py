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
    Particles,
    RunFolder,
    Seed,
    app,
    echo,
    option,
    path_option,
    prepare_file,
    summary,
)
from pvae.errors import ArgumentError, DataError, UndefinedError, check_int

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

    from pvae.bounds.evidence import Method
    from pvae.data import Splits
    from pvae.vae import VAE

__all__ = ["encode", "evaluate", "export", "reconstruct", "sample"]


@app.command()
def evaluate(
    run: RunFolder,
    *,
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
    device: Device = "auto",
) -> None:
    """Estimate ELBO, evidence and their parts on the test data."""
    from pvae.data import as_source, first_batch
    from pvae.fitting import History
    from pvae.runs import open_run

    if rows is not None and method == "importance":
        raise ArgumentError("--rows", "--method ais or --method cubo with it", f"--method {method}")
    count = None if rows is None else check_int("--rows", rows)
    config, vae, splits = open_run(run, device)
    if method == "importance":
        k = 500 if num_particles is None else num_particles
        history = History.read(run / "history.jsonl")
        echo(summary(run, config, vae, splits, history, num_particles=k, seed=seed))
        return
    source = as_source(splits.test.unlabelled())
    batch = first_batch(source, count or source.num_rows)
    how = cast("Method", method)  # which is checked there
    echo(pvae.bounds.evidence(vae, batch, num_particles, method=how, seed=seed))


@app.command()
def sample(
    run: RunFolder,
    *,
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
    device: Device = "auto",
) -> None:
    """Draw from the model: z from the prior, x from the decoder. No encoder is used.

    An autoencoder has no prior to draw from; --density gives it one.
    """
    import torch

    from pvae.runs import open_run

    _, vae, splits = open_run(run, device)
    if density is not None:
        if density not in ("gaussian", "gmm"):
            raise ArgumentError("--density", "gaussian or gmm", repr(density))
        codes = pvae.latent.codes(vae, splits.train.unlabelled())
        if codes.dim() != 2:
            actual = f"codes of shape {codes.shape[1:]}"
            raise ArgumentError("--density", "a run whose codes are vectors", actual)
        fitted = pvae.latent.fit_density(codes, density, seed=seed)
        vae = pvae.VAE(fitted, vae.model.likelihood, vae.guide.posterior)
    with torch.no_grad():
        x = vae.sample(num_samples, mean=mean, seed=seed)
    path = _save(to or run / "samples.npy", x)
    what = "means" if mean else "draws"
    echo(f"{num_samples} {what} of shape {tuple(x.shape[1:])}: {path}")
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
    device: Device = "auto",
) -> None:
    """Encode data and decode them again: means of x at the mean of q(z | x)."""
    import torch

    vae, x = _open_with_data(run, data, device)
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
    device: Device = "auto",
) -> None:
    """Write the codes of data: the means of q(z | x)."""
    import torch

    vae, x = _open_with_data(run, data, device)
    with torch.no_grad():
        z = vae.encode(x)
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
    device: Device = "auto",
) -> None:
    """Write draws and log densities for ArviZ, as netCDF."""
    vae, x = _open_with_data(run, data, device)
    path = (to or run / "draws.nc").with_suffix(".nc")
    prepare_file(path)
    tree = pvae.export.to_arviz(vae, x[:rows], num_particles=num_particles, seed=seed)
    part = path.with_suffix(".part")
    tree.to_netcdf(part, engine="h5netcdf")
    part.replace(path)
    echo(f"{', '.join(tree.children)}: {path}")
    if tree.attrs["left_out"]:
        echo(f"left out: {tree.attrs['left_out']}")


def _open_with_data(run: Path, data: Path | None, device: str) -> tuple[VAE, Tensor]:
    """The pair of a run, and data for it: a file's, or the run's test data."""
    from dataclasses import replace

    import numpy as np
    import torch

    from pvae.data import as_source, check_rows, load
    from pvae.runs import open_run

    config, vae, splits = open_run(run, device)
    chosen = splits.test
    if data is not None:
        if not data.is_file():
            raise DataError("--data", "a file", f"{data}, which is none")
        own = load(data, valid=0, test=0, shuffle=False, limits=config.limits)
        if own.event_shape != splits.event_shape:
            expected = f"data of shape {splits.event_shape}"
            raise DataError(str(data), expected, f"shape {own.event_shape}")
        _check_kind(data, np.asarray(own.train.arrays[0]), splits)
        chosen = replace(chosen, arrays=own.train.arrays[:1], origin=None)
    source = as_source(chosen.unlabelled())
    check_rows(source, where=str(data or "data"))
    return vae, torch.cat([batch[0] for _, batch in source.all()])


def _check_kind(path: Path, x: np.ndarray, splits: Splits) -> None:
    """Refuses numbers of another kind than those of the training: bytes for real numbers, say."""
    levels = splits.raw_levels
    if levels is None and x.dtype == "uint8":
        expected = "real numbers, as the run was trained on"
        raise DataError(str(path), expected, "bytes", ["x / 255, say"])
    if levels is not None:
        off = (x < 0) | (x > levels - 1) | (x != x.round())
        if off.any() or (levels > 2 and x.size and x.max() <= 1 and x.dtype.kind == "f"):
            expected = f"whole numbers from 0 to {levels - 1}, as the run was trained on"
            fixes = [f"x * {levels - 1}, rounded, if they are parts of 1"]
            raise DataError(str(path), expected, f"values from {x.min():g} to {x.max():g}", fixes)


def _draw(path: Path, make: Callable[[], Figure]) -> None:
    """Saves a picture beside a file, if the data are images."""
    with contextlib.suppress(UndefinedError):
        picture = path.with_suffix(".png")
        make().savefig(picture)
        echo(f"picture: {picture}")


def _save(path: Path, tensor: Tensor) -> Path:
    import io

    import numpy as np

    content = io.BytesIO()
    np.save(content, tensor.cpu().numpy())
    path = path if path.suffix == ".npy" else path.with_suffix(".npy")
    pvae.checkpoint.write_atomically(path, content.getvalue())
    return path
