"""``pvae train``, whose options are those of `pvae.config`.

Typer makes the command line from them: the other commands are written with it, it prints each group
as a panel, and it takes a command whose arguments are made from a table. Values arrive as text and
are checked by `pvae.config.Config`, as those of a file are, so a mistake reads the same in both.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import pvae
from pvae.cli.common import Device, app, echo, option, path_option, save_figure, summary
from pvae.errors import ArgumentError, CheckpointError, PairError, PvaeWarning, UndefinedError
from pvae.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pvae.config import Config
    from pvae.data import Splits
    from pvae.distributed import World
    from pvae.fitting import Fit
    from pvae.vae import VAE

__all__ = ["train"]

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(add_help_option=False, context_settings=_ANYTHING)
def train(context: typer.Context) -> None:
    """Train a pair and write a run folder: config, checkpoint, history, figures, summary."""
    # The options are looked up when they are asked for: 'pvae --help' imports no torch, and a part
    # that has just been given a name is a choice.
    from pvae.config import flag, options

    def run(**values: str) -> None:
        _run(**values)  # type: ignore[arg-type]

    fixed = inspect.signature(_run, eval_str=True)
    parameters = [p for p in fixed.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, each in options().items():
        text, panel = each.text(name), each.group
        how = typer.Option(flag(name), metavar=each.kind, help=text, rich_help_panel=panel)
        kind = Annotated[str | None, how]
        parameters.append(inspect.Parameter(name, _KEYWORD, default=None, annotation=kind))
    run.__signature__ = fixed.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command(help=_HELP)(run)
    code = command(context.args, standalone_mode=False, prog_name=context.command_path)
    raise typer.Exit(code or 0)


_HELP = """Train a pair and write a run folder: config, checkpoint, history, figures, summary.

On several GPUs or machines: torchrun --nproc-per-node=N -m pvae train ..."""


def _run(
    *,
    out: Annotated[
        Path | None,
        path_option("Folder for the run. Default: runs/DATA-RECIPE. Example: --out runs/a"),
    ] = None,
    config: Annotated[
        Path | None,
        path_option(
            "File with options to start from, which those of the command line change: the "
            "config.json of a run, or a JSON or TOML file with the same names. "
            "Example: --config runs/a/config.json"
        ),
    ] = None,
    resume: Annotated[
        bool, option("Go on with the run in the folder; only --epochs may be new.", "--resume")
    ] = False,
    overwrite: Annotated[bool, option("Replace the run in the folder.", "--overwrite")] = False,
    download: Annotated[
        bool, option("Download the data set if it isn't in its folder.", "--download")
    ] = False,
    device: Device = "auto",
    **given: str | None,
) -> None:
    from pvae.config import Config
    from pvae.lock import held_by_first

    values: dict[str, object] = {n: v for n, v in given.items() if v is not None}
    if config is not None:
        Config.read(config)  # so that a mistake in it is said to be there
        values = Config.values_in(config) | values
    if "data" in values and Path(str(values["data"])).is_file():
        values["data"] = str(Path(str(values["data"])).resolve())
    asked = Config(**values)
    folder = out or Path("runs") / f"{_named(asked.data)}-{asked.recipe}"
    with pvae.distributed.joined(device) as world:
        if not world.is_first:  # which does the talking
            warnings.simplefilter("ignore", PvaeWarning)
        with held_by_first(folder, world):
            resume, overwrite = world.from_first(
                lambda: restarted(folder, resume=resume, overwrite=overwrite)
            )
            chosen = world.from_first(
                lambda: _prepare_folder(
                    folder, asked, set(values), resume=resume, overwrite=overwrite
                )
            )
            _train(
                folder, chosen, device, world, resume=resume, overwrite=overwrite, fetch=download
            )


def _named(data: str) -> str:
    """A folder's name for data: that of their file, without what is awkward in a name."""
    return re.sub(r"[^\w.-]+", "_", Path(data).stem)


def restarted(folder: Path, *, resume: bool, overwrite: bool) -> tuple[bool, bool]:
    """Whether to resume and whether to overwrite, where torchrun has started its workers anew.

    A run that the same job began is then gone on with, whatever was asked for at first; another
    job's is no more touched than at the first start.
    """
    from pvae.fitting import CHECKPOINT
    from pvae.runs import job_of

    mine = pvae.distributed.job()
    if not pvae.distributed.restarts() or mine is None or job_of(folder) != mine:
        return resume, overwrite
    saved = folder / CHECKPOINT
    is_ours = saved.exists() and pvae.checkpoint.load(saved).meta.get("job") == mine
    return (True, False) if is_ours or resume else (False, True)


def _prepare_folder(
    folder: Path, asked: Config, given: set[str], *, resume: bool, overwrite: bool
) -> Config:
    """The configuration to run: when resuming the folder's own, with more epochs if asked."""
    if resume and overwrite:
        raise ArgumentError("--overwrite", "either --resume or --overwrite", "both")
    if resume:
        return _resumed(folder, asked, given)
    exists = (folder / "config.json").exists()
    expected, fixes = "a new or empty folder", ["--out with another name"]
    if exists and not overwrite:
        fixes = ["--resume, to go on with it", "--overwrite, to replace it"]
        raise ArgumentError(f"--out {folder}", expected, "a run", fixes)
    if not exists and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ArgumentError(f"--out {folder}", expected, "a folder with other files", fixes)
    return asked


def _resumed(folder: Path, asked: Config, given: set[str]) -> Config:
    """The run's own configuration, with the number of epochs that is asked for."""
    from pvae.config import Config, flag

    def typed(value: object) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    if not (folder / "config.json").exists():
        raise CheckpointError(str(folder), "a run to resume", "no config.json in it")
    there = Config.read(folder)
    _check_unchanged(folder)
    new = {n: getattr(asked, n) for n in given & {"epochs", "data_dir"}}
    ran, wanted = there.model_dump(), asked.model_dump()
    if differ := [n for n in sorted(given - set(new)) if ran.get(n) != wanted.get(n)]:
        expected = ", ".join(f"{flag(n)} {typed(ran.get(n))}" for n in differ)
        actual = ", ".join(typed(wanted.get(n)) for n in differ)
        fixes = ["--resume with --epochs alone", "--out with another name, to train anew"]
        raise ArgumentError("--resume", f"the options of the run: {expected}", actual, fixes)
    return there.model_copy(update=new)


def _check_unchanged(folder: Path) -> None:
    """Refuses to go on by a configuration that was changed since the last checkpoint."""
    from pvae.config import Config
    from pvae.fitting import CHECKPOINT, training_in
    from pvae.runs import edits

    if not (folder / CHECKPOINT).exists():
        return
    made = training_in(folder / CHECKPOINT).meta.get("made", {})
    if "config" not in made:
        fixes = ["pvae.fit(pair, x, folder=..., resume=True), with the pair and data as they were"]
        expected = "a checkpoint of pvae train, which says what the run was trained with"
        actual = "one of an earlier pvae, or of pvae.fit, which doesn't"
        raise CheckpointError(str(folder / CHECKPOINT), expected, actual, fixes)
    if changes := edits(made["config"], Config.values_in(folder)):
        fixes = ["put that back, to go on", "--out with another name, to train anew"]
        expected = "the options that the run was trained with"
        raise CheckpointError(
            str(folder / "config.json"), expected, f"others: {'; '.join(changes)}", fixes
        )


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
    from pvae.data import as_source
    from pvae.runs import Run, folder_of

    if fetch:
        world.from_first(lambda: config.load_data(fetch=True) and None)
    splits = config.load_data(fetch=fetch)
    with pvae.randomness.forked(config.seed):
        vae = config.build(splits)
    where, dtype = vae.place(device)
    train, test = (as_source(d.unlabelled(), where, dtype) for d in (splits.train, splits.test))
    with contextlib.suppress(PairError):  # which the training says of its own data
        pvae.terms.check_data(vae.inspect_source(train), test, "test data")
    run = pvae.fit(
        vae,
        splits.train.unlabelled(),
        config.make_objective(),
        **config.fit_options,
        valid=splits.valid.unlabelled(),
        device=device,
        folder=folder_of(folder, config, splits, vae),
        resume=resume,
        overwrite=overwrite,
        progress=sys.stderr.isatty(),
    )
    if run.interrupted:
        echo(f"interrupted; to go on: pvae train --resume --out {folder}", err=True)
        raise typer.Exit(130)
    if not world.is_first:
        return
    import torch

    with torch.no_grad():
        drawn = _draw_figures(folder, vae, splits, run)
    saved = Run(folder)
    text = summary(saved, vae, splits, splits.test.unlabelled())
    write_atomically(folder / "summary.txt", f"{text}\n".encode(errors="backslashreplace"))
    saved.seal([*drawn, "summary.txt"])
    echo(text)


def _draw_figures(folder: Path, vae: VAE, splits: Splits, run: Fit) -> list[str]:
    """The pictures of a run; data that are no images get the curve and the latent map.

    Returns:
        The names of the files.
    """
    from pvae.data import as_source

    plots, drawn = pvae.plots, list[str]()

    def save(name: str, figure: Figure) -> None:
        drawn.append(f"figures/{name}.png")
        save_figure(folder / drawn[-1], figure)

    save("training", plots.training_curve(run))
    source = as_source(splits.test, run.structure.device, run.structure.dtype)
    _, (x, *labels) = next(source.all(2000))
    codes = vae.encode(x).flatten(1)
    if codes.shape[1] >= 2:
        save("latent", plots.latent_map(codes, labels[0] if labels else None))
    with contextlib.suppress(UndefinedError):  # of data that are no images, of a flat prior
        plots.as_images(x[:1])
        save("reconstructions", plots.reconstructions(x, vae.reconstruct(x[:10])))
        save("samples", plots.samples(vae.sample(50)))
        means, title = vae.sample(50, mean=True), "samples from the model (means of x given z)"
        save("sample_means", plots.samples(means, title=title))
        if codes.shape[1] == 2:
            save("manifold", plots.manifold(vae.decode))
    return drawn
