"""The command line: train, evaluate, sample, reconstruct, encode, doctor.

Nothing heavy is imported before a command runs, so ``pvae --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvae.errors import ArgumentError, CheckpointError, PvaeError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from pvae.data import Splits
    from pvae.fitting import Fit, History
    from pvae.pair import VAE
    from pvae.runs import Config

__all__ = ["app", "main"]

app = typer.Typer(
    help="Variational autoencoders as probabilistic programs, on Pyro.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
RunFolder = Annotated[Path, typer.Argument(help="A folder that 'pvae train' wrote.")]


@app.command()
def train(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="digits, mnist, fashion_mnist, kmnist, static_mnist, freyfaces, "
            "or a file: .npy, .npz, IDX; images as (N, H, W) or (N, C, H, W)."
        ),
    ] = "digits",
    data_dir: Annotated[
        str | None,
        typer.Option(help="Folder for data sets; otherwise the environment's PVAE_DATA."),
    ] = None,
    download: Annotated[bool, typer.Option(help="Fetch the data set if it isn't there.")] = False,  # noqa: FBT002
    binarize: Annotated[
        str, typer.Option(help="none, threshold, static, or dynamic (redrawn for every batch).")
    ] = "none",
    recipe: Annotated[
        str,
        typer.Option(
            help="vae; or deterministic: ae, sparse_ae, sparse_activations_ae, contractive_ae, "
            "denoising_ae, rae, wae, vq_vae."
        ),
    ] = "vae",
    prior: Annotated[
        str | None, typer.Option(help="standard_normal, normal, laplace, student_t, flat.")
    ] = None,
    likelihood: Annotated[
        str | None,
        typer.Option(
            help="bernoulli, binomial, categorical, gaussian; otherwise the data's natural one."
        ),
    ] = None,
    sigma: Annotated[
        str | None,
        typer.Option(help="Of a gaussian: a number, shared, feature, predicted, optimal."),
    ] = None,
    guide: Annotated[str | None, typer.Option(help="mean_field, point.")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Corruption: standard deviation of added noise.")
    ] = None,
    mask: Annotated[
        float | None, typer.Option(help="Corruption: share of entries put to 0.")
    ] = None,
    salt_and_pepper: Annotated[
        float | None, typer.Option(help="Corruption: share of entries put to 0 or 1.")
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Corruption: side of a square put to 0.")
    ] = None,
    downsample: Annotated[
        int | None, typer.Option(help="Corruption: factor of a lower resolution.")
    ] = None,
    l1: Annotated[
        float | None, typer.Option(help="Rate of a Laplace prior: an L1 penalty on the code.")
    ] = None,
    l1_activations: Annotated[
        float | None, typer.Option(help="Weight of the L1 norm of all activations.")
    ] = None,
    contractive: Annotated[
        float | None, typer.Option(help="Weight of the norm of the code's Jacobian.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight of the squared norm of weights.")
    ] = None,
    mmd: Annotated[
        float | None, typer.Option(help="Weight of the discrepancy of all codes from N(0, I).")
    ] = None,
    num_codes: Annotated[int | None, typer.Option(help="Of vq_vae: size of the codebook.")] = None,
    num_latents: Annotated[int | None, typer.Option(help="Of vq_vae: vectors of a code.")] = None,
    commitment: Annotated[
        float | None, typer.Option(help="Of vq_vae: weight of the distance to the codes.")
    ] = None,
    network: Annotated[str, typer.Option(help="mlp, conv, resnet.")] = "mlp",
    hidden: Annotated[
        str | None, typer.Option(help="Widths (or channels) of hidden layers, as in 256,256.")
    ] = None,
    activation: Annotated[str, typer.Option(help="A class of torch.nn.")] = "ReLU",
    latent_dim: Annotated[int, typer.Option(help="Size of the latent.")] = 8,
    warmup: Annotated[int, typer.Option(help="Epochs in which the weight of the rate rises.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after as many epochs without a better validation value."),
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of networks, data and draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<data>-<recipe>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on; only --epochs may be new.")] = False,  # noqa: FBT002
    overwrite: Annotated[bool, typer.Option(help="Replace the run in the folder.")] = False,  # noqa: FBT002
) -> None:
    """Train a pair and write a run folder: config, checkpoint, history, figures, summary."""
    from pvae.runs import Config

    folder = out or Path("runs") / f"{Path(data).stem}-{recipe}"
    asked = Config(
        data=str(Path(data).resolve()) if Path(data).is_file() else data,
        data_dir=data_dir,
        binarize=binarize,
        recipe=recipe,
        prior=prior,
        likelihood=likelihood,
        sigma=sigma,
        guide=guide,
        noise=noise,
        mask=mask,
        salt_and_pepper=salt_and_pepper,
        block=block,
        downsample=downsample,
        l1=l1,
        l1_activations=l1_activations,
        contractive=contractive,
        weight_decay=weight_decay,
        mmd=mmd,
        num_codes=num_codes,
        num_latents=num_latents,
        commitment=commitment,
        network=network,
        hidden=_widths(hidden),
        activation=activation,
        latent_dim=latent_dim,
        warmup=warmup,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        patience=patience,
        seed=seed,
    )
    sources = {name: context.get_parameter_source(name) for name in vars(asked)}
    given = {n for n, source in sources.items() if source and source.name != "DEFAULT"}
    config = _prepare_folder(folder, asked, given, resume=resume, overwrite=overwrite)
    _train(folder, config, device, resume=resume, overwrite=overwrite, fetch=download)


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise ArgumentError("--hidden", "widths such as 256,256", repr(text)) from None


def _prepare_folder(
    folder: Path, asked: Config, given: set[str], *, resume: bool, overwrite: bool
) -> Config:
    """The configuration to run: when resuming the folder's own, with more epochs if asked."""
    from dataclasses import replace

    from pvae.runs import Config

    exists = (folder / "config.json").exists()
    if resume and overwrite:
        raise ArgumentError("--overwrite", "either --resume or --overwrite", "both")
    if resume and not exists:
        raise CheckpointError(str(folder), "a run to resume", "no config.json in it")
    if resume:
        there = Config.read(folder)
        others = sorted(given - {"epochs", "data_dir"})
        differ = [name for name in others if getattr(there, name) != getattr(asked, name)]
        if differ:
            raise ArgumentError(
                "--resume",
                "the options of the run: "
                + ", ".join(f"--{n.replace('_', '-')} {getattr(there, n)}" for n in differ),
                ", ".join(f"{getattr(asked, n)}" for n in differ),
                ["--resume with --epochs alone", "--out with another name, to train anew"],
            )
        there = replace(there, data_dir=asked.data_dir) if "data_dir" in given else there
        return replace(there, epochs=asked.epochs) if "epochs" in given else there
    in_use = folder.exists() and any(folder.iterdir())
    if in_use and not (exists and overwrite):
        raise ArgumentError(
            f"--out {folder}",
            "a new or empty folder",
            "a run" if exists else "a folder with other files",
            ["--resume, to go on with it", "--overwrite, to replace it"]
            if exists
            else ["--out with another name"],
        )
    return asked


def _train(
    folder: Path, config: Config, device: str, *, resume: bool, overwrite: bool, fetch: bool
) -> None:
    import pvae
    from pvae import fitting, randomness, terms
    from pvae.data import as_source

    splits = config.load_data(fetch=fetch)
    with randomness.forked(config.seed):
        vae = config.build(splits)
    where, dtype = fitting.place(vae.model, vae.guide, device)
    terms.check_data(vae.model, vae.guide, as_source(splits.test, where, dtype), "test data")
    with config.written(folder, splits, vae):
        run = pvae.fit(
            vae.model,
            vae.guide,
            splits.train.unlabelled(),
            config.objective(),
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            valid=splits.valid.unlabelled(),
            patience=config.patience,
            device=device,
            seed=config.seed,
            folder=folder,
            resume=resume,
            overwrite=overwrite,
            progress=sys.stderr.isatty(),
        )
    if run.interrupted:
        typer.echo(f"interrupted; to go on: pvae train --resume --out {folder}", err=True)
        raise typer.Exit(130)
    _draw_figures(folder, vae, splits, run)
    text = _summary(folder, config, vae, splits, history=run.history, seconds=run.progress.seconds)
    pvae.checkpoint.write_atomically(folder / "summary.txt", f"{text}\n".encode())
    typer.echo(text)


def _summary(
    folder: Path,
    config: Config,
    vae: VAE,
    splits: Splits,
    history: History,
    seconds: float | None = None,
    num_particles: int = 500,
    seed: int | None = None,
) -> str:
    """The one screen of a run."""
    from pvae import report

    is_gaussian = config.likelihood_for(splits) == "gaussian"
    levels = splits.levels
    summary = report.summarize(
        vae.model,
        vae.guide,
        splits.test.unlabelled(),
        title=f"pvae {config.recipe} on {splits.name}: {folder}",
        levels=None if is_gaussian else levels,
        bin_width=1.0 / (levels - 1) if is_gaussian and levels is not None else None,
        num_particles=num_particles,
        history=history,
        seconds=seconds,
        seed=config.seed if seed is None else seed,
    )
    commands = ", ".join(f"pvae {name} {folder}" for name in ("sample", "reconstruct", "encode"))
    return str(summary).replace(report.NOTHING, commands)


def _draw_figures(folder: Path, vae: VAE, splits: Splits, run: Fit) -> None:
    """The pictures of a run; data that are no images get the curve and the latent map."""
    from pvae import plots
    from pvae.data import as_source
    from pvae.errors import UndefinedError

    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    plots.training_curve(run).savefig(figures / "training.png")
    source = as_source(splits.test, run.structure.device, run.structure.dtype)
    _, (x, *labels) = next(source.all(2000))
    codes = vae.encode(x).flatten(1)
    if codes.shape[1] >= 2:
        plots.latent_map(codes, labels[0] if labels else None).savefig(figures / "latent.png")
    try:
        plots.as_images(x[:1])
    except UndefinedError:
        return
    plots.reconstructions(x, vae.reconstruct(x[:10])).savefig(figures / "reconstructions.png")
    try:
        plots.samples(vae.sample(50)).savefig(figures / "samples.png")
        plots.samples(
            vae.sample(50, mean=True), title="samples from the model (means of x given z)"
        ).savefig(figures / "sample_means.png")
        if codes.shape[1] == 2:
            plots.manifold(vae.decode).savefig(figures / "manifold.png")
    except UndefinedError:  # a flat prior has nothing to sample
        return


@app.command()
def evaluate(
    run: RunFolder,
    num_particles: Annotated[
        int, typer.Option("-K", help="Draws a datum, for the evidence.")
    ] = 500,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = "auto",
) -> None:
    """Estimate ELBO, evidence and their parts on the test data."""
    from pvae.fitting import History
    from pvae.runs import open_run

    config, vae, splits = open_run(run, device)
    history = History.read(run / "history.jsonl")
    text = _summary(run, config, vae, splits, history, num_particles=num_particles, seed=seed)
    typer.echo(text)


@app.command()
def sample(
    run: RunFolder,
    num_samples: Annotated[int, typer.Option("-n", help="How many.")] = 100,
    mean: Annotated[bool, typer.Option(help="Means of x given z instead of draws.")] = False,  # noqa: FBT002
    density: Annotated[
        str | None,
        typer.Option(help="gaussian, gmm: fitted to the training codes, in the prior's place."),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The .npy file; RUN/samples.npy.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = "auto",
) -> None:
    """Draw from the model: z from the prior, x from the decoder. No encoder is used.

    An autoencoder has no prior to draw from; --density gives it one.
    """
    from pvae import VAE, latent, plots, randomness
    from pvae.errors import UndefinedError
    from pvae.runs import open_run

    _, vae, splits = open_run(run, device)
    if density is not None:
        if density not in ("gaussian", "gmm"):
            raise ArgumentError("--density", "gaussian or gmm", repr(density))
        codes = latent.codes(vae.model, vae.guide, splits.train.unlabelled())
        fitted = latent.fit_density(codes, density, seed=seed)
        vae = VAE(fitted, vae.model.likelihood, vae.guide.posterior)
    with randomness.forked(seed):
        x = vae.sample(num_samples, mean=mean)
    path = _save(to or run / "samples.npy", x)
    typer.echo(
        f"{num_samples} {'means' if mean else 'draws'} of shape {tuple(x.shape[1:])}: {path}"
    )
    kind = "means of x given z" if mean else "draws of x"
    try:
        figure = plots.samples(x[:100], title=f"samples from the model ({kind})")
    except UndefinedError:
        return
    figure.savefig(path.with_suffix(".png"))
    typer.echo(f"picture: {path.with_suffix('.png')}")


@app.command()
def reconstruct(
    run: RunFolder,
    data: Annotated[
        Path | None, typer.Option(help="A file of data; otherwise the test data.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The .npy file; RUN/reconstructions.npy.")] = None,
    corrupt: Annotated[bool, typer.Option(help="Corrupt the data first, as training did.")] = False,  # noqa: FBT002
    seed: Annotated[int, typer.Option(help="Of the corruption.")] = 0,
    device: Device = "auto",
) -> None:
    """Encode data and decode them again: means of x at the mean of q(z | x)."""
    from pvae import plots, randomness
    from pvae.errors import UndefinedError

    vae, x = _open_with_data(run, data, device)
    if corrupt:
        if vae.guide.corruption is None:
            raise ArgumentError("--corrupt", "a run that was trained with a corruption", f"{run}")
        with randomness.forked(seed):
            x = vae.guide.corruption(x)
    y = vae.reconstruct(x)
    path = _save(to or run / "reconstructions.npy", y)
    typer.echo(f"{len(y)} reconstructions of shape {tuple(y.shape[1:])}: {path}")
    try:
        figure = plots.reconstructions(x[:10], y[:10])
    except UndefinedError:
        return
    figure.savefig(path.with_suffix(".png"))
    typer.echo(f"picture: {path.with_suffix('.png')}")


@app.command()
def encode(
    run: RunFolder,
    data: Annotated[
        Path | None, typer.Option(help="A file of data; otherwise the test data.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The .npy file; RUN/codes.npy.")] = None,
    device: Device = "auto",
) -> None:
    """Write the codes of data: the means of q(z | x)."""
    vae, x = _open_with_data(run, data, device)
    z = vae.encode(x)
    path = _save(to or run / "codes.npy", z)
    typer.echo(f"{len(z)} codes of shape {tuple(z.shape[1:])}: {path}")


def _open_with_data(run: Path, data: Path | None, device: str) -> tuple[VAE, Tensor]:
    """The pair of a run, and data for it: a file's, or the run's test data."""
    from dataclasses import replace

    import torch

    from pvae.data import as_source, check_rows, load
    from pvae.errors import DataError
    from pvae.runs import open_run

    _, vae, splits = open_run(run, device)
    chosen = splits.test
    if data is not None:
        if not data.is_file():
            raise DataError("--data", "a file", f"{data}, which is none")
        found = load(data, valid=0, test=0, shuffle=False)
        if found.event_shape != splits.event_shape:
            raise DataError(
                str(data), f"data of shape {splits.event_shape}", f"shape {found.event_shape}"
            )
        _check_kind(data, found.train.arrays[0], splits)
        chosen = replace(chosen, arrays=found.train.arrays[:1], origin=None)
    source = as_source(chosen.unlabelled())
    check_rows(source, where=str(data or "data"))
    return vae, torch.cat([batch[0] for _, batch in source.all()])


def _check_kind(path: Path, x: Any, splits: Splits) -> None:
    """Refuses numbers of another kind than those of the training: bytes for real numbers, say."""
    import numpy as np

    from pvae.errors import DataError

    x, levels = np.asarray(x), splits.raw_levels
    if levels is None and x.dtype == np.uint8:
        raise DataError(
            str(path), "real numbers, as the run was trained on", "bytes", ["x / 255, say"]
        )
    if levels is not None:
        off = (x < 0) | (x > levels - 1) | (x != np.round(x))
        if off.any() or (levels > 2 and x.size and x.max() <= 1 and x.dtype.kind == "f"):
            raise DataError(
                str(path),
                f"whole numbers from 0 to {levels - 1}, as the run was trained on",
                f"values from {x.min():g} to {x.max():g}",
                [f"x * {levels - 1}, rounded, if they are parts of 1"],
            )


def _save(path: Path, tensor: Tensor) -> Path:
    import io

    import numpy as np

    from pvae.checkpoint import write_atomically

    content = io.BytesIO()
    np.save(content, tensor.cpu().numpy())
    path = path if path.suffix == ".npy" else path.with_suffix(".npy")
    write_atomically(path, content.getvalue())
    return path


@app.command()
def doctor() -> None:
    """Print versions and devices, and known troubles with what is installed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import pvae

    typer.echo(f"pvae {pvae.__version__}, Python {platform.python_version()}, {platform.machine()}")
    typer.echo(f"  torch {torch.__version__}")  # which says what it was built for
    for package in ("pyro-ppl", "numpy", "scikit-learn", "arviz", "matplotlib", "zuko"):
        try:
            typer.echo(f"  {package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"  {package}: not installed")
    typer.echo(f"  threads: {torch.get_num_threads()}")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        typer.echo(f"  cuda:{i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        typer.echo("  no CUDA device: pvae runs on the CPU")
    troubles = list(_troubles())
    for trouble in troubles:
        typer.echo(f"trouble: {trouble}")
    typer.echo(f"{len(troubles)} known trouble(s)" if troubles else "no known trouble")


def _troubles() -> Iterator[str]:
    """Troubles with installed packages that pvae knows of."""
    try:
        import arviz  # noqa: F401
    except Exception as error:
        yield f"arviz doesn't import ({error}); on Python 3.11 it needs matplotlib below 3.11"
    try:
        import torchvision  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        pass
    except Exception as error:
        yield (
            f"torchvision doesn't import ({error}), which also breaks packages that try to; pvae "
            "doesn't need it: pip uninstall torchvision"
        )


def main() -> None:
    """Runs the command line; a user's mistake is one line and exit code 2, no traceback."""
    # Torch's threads spin while they wait; where other work holds a core, that costs all the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except TrainingError as error:
        typer.echo(f"pvae: {error.one_line()}", err=True)
        sys.exit(3)
    except PvaeError as error:
        typer.echo(f"pvae: {error.one_line()}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
