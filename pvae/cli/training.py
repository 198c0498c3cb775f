"""``pvae train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvae.cli.common import Device, app, summary
from pvae.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from pvae.data import Splits
    from pvae.distributed import World
    from pvae.fitting import Fit
    from pvae.runs import Config
    from pvae.vae import VAE

__all__ = ["train"]


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
        float | None,
        typer.Option(help="Corruption: standard deviation of added noise, for data from 0 to 1."),
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
    decoder_hidden: Annotated[
        str | None,
        typer.Option(help="Of the decoder: widths, or linear; otherwise as the recipe has it."),
    ] = None,
    activation: Annotated[str, typer.Option(help="A class of torch.nn.")] = "ReLU",
    code_activation: Annotated[
        str | None,
        typer.Option(help="Class of torch.nn at the encoder's end: ReLU, or Identity for none."),
    ] = None,
    latent_dim: Annotated[int, typer.Option(help="Size of the latent.")] = 8,
    objective: Annotated[
        str,
        typer.Option(help="elbo, stl, iwae, dreg, freebits, tcvae, ...: docs/objectives.md."),
    ] = "elbo",
    num_particles: Annotated[
        int | None, typer.Option(help="Draws a datum; otherwise as the objective has it.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the rate; 1 is the ELBO.")] = None,
    warmup: Annotated[int, typer.Option(help="Epochs in which the weight of the rate rises.")] = 0,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after as many epochs without a better validation value."),
    ] = None,
    device: Device = "auto",
    engine: Annotated[
        str, typer.Option(help="eager, compiled, cudagraph, or auto: compiled where that pays.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of networks, data and draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<data>-<recipe>.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on; only --epochs may be new.")] = False,  # noqa: FBT002
    overwrite: Annotated[bool, typer.Option(help="Replace the run in the folder.")] = False,  # noqa: FBT002
) -> None:
    """Train a pair and write a run folder: config, checkpoint, history, figures, summary.

    On several GPUs or machines: torchrun --nproc-per-node=N -m pvae train ...
    """
    from pvae import distributed
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
        hidden=_widths("--hidden", hidden),
        decoder_hidden=()
        if decoder_hidden == "linear"
        else _widths("--decoder-hidden", decoder_hidden),
        activation=activation,
        code_activation=code_activation,
        latent_dim=latent_dim,
        objective=objective.lower(),
        num_particles=num_particles,
        beta=beta,
        warmup=warmup,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        patience=patience,
        engine=engine,
        seed=seed,
    )
    sources = {name: context.get_parameter_source(name) for name in vars(asked)}
    given = {n for n, source in sources.items() if source and source.name != "DEFAULT"}
    with distributed.joined(device) as world:
        _leave_talking_to_the_first(world)
        resume, overwrite = world.from_first(
            lambda: restarted(folder, resume=resume, overwrite=overwrite)
        )
        config = world.from_first(
            lambda: _prepare_folder(folder, asked, given, resume=resume, overwrite=overwrite)
        )
        _train(folder, config, device, world, resume=resume, overwrite=overwrite, fetch=download)


def _leave_talking_to_the_first(world: World) -> None:
    import warnings

    from pvae.errors import PvaeWarning

    if not world.is_first:
        warnings.simplefilter("ignore", PvaeWarning)


def restarted(folder: Path, *, resume: bool, overwrite: bool) -> tuple[bool, bool]:
    """Whether to resume and whether to overwrite, where torchrun has started its workers anew.

    A run that the same job began is then gone on with, whatever was asked for at first; another
    job's is no more touched than at the first start.
    """
    from pvae import checkpoint, distributed
    from pvae.fitting.settings import CHECKPOINT
    from pvae.runs import job_of

    mine = distributed.job()
    if not distributed.restarts() or mine is None or job_of(folder) != mine:
        return resume, overwrite
    saved = folder / CHECKPOINT
    is_ours = saved.exists() and checkpoint.load(saved).meta.get("job") == mine
    return (True, False) if is_ours or resume else (False, True)


def _widths(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise ArgumentError(option, "widths such as 256,256", repr(text)) from None


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
    folder: Path,
    config: Config,
    device: str,
    world: World,
    *,
    resume: bool,
    overwrite: bool,
    fetch: bool,
) -> None:
    from contextlib import nullcontext

    import pvae
    from pvae import randomness, terms
    from pvae.data import as_source

    if fetch:
        world.from_first(lambda: config.load_data(fetch=True) and None)
    splits = config.load_data(fetch=fetch)
    with randomness.forked(config.seed):
        vae = config.build(splits)
    where, dtype = vae.place(device)
    test = as_source(splits.test, where, dtype)
    terms.check_data(vae.inspect_source(test), test, "test data")
    with config.written(folder, splits, vae) if world.is_first else nullcontext():
        run = pvae.fit(
            vae,
            splits.train.unlabelled(),
            config.make_objective(),
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            valid=splits.valid.unlabelled(),
            patience=config.patience,
            device=device,
            engine=config.engine,  # type: ignore[arg-type]
            seed=config.seed,
            folder=folder,
            resume=resume,
            overwrite=overwrite,
            progress=sys.stderr.isatty(),
        )
    if run.interrupted:
        typer.echo(f"interrupted; to go on: pvae train --resume --out {folder}", err=True)
        raise typer.Exit(130)
    if not world.is_first:
        return
    _draw_figures(folder, vae, splits, run)
    text = summary(folder, config, vae, splits, history=run.history, seconds=run.progress.seconds)
    pvae.checkpoint.write_atomically(folder / "summary.txt", f"{text}\n".encode())
    typer.echo(text)


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
