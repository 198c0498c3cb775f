"""What the commands share: the app, their common options, the one screen of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

from pvae.errors import ArgumentError, check_path, shown
from pvae.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pvae.config import Config
    from pvae.data import Splits
    from pvae.pair import Pair
    from pvae.runs import Run

__all__ = [
    "DataFile",
    "Device",
    "PairCode",
    "Particles",
    "RunFolder",
    "Seed",
    "app",
    "echo",
    "option",
    "prepare_file",
    "save_figure",
    "summary",
]

app = typer.Typer(
    help="Variational autoencoders as probabilistic programs, on Pyro.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def option(text: str, *flags: str) -> OptionInfo:
    """An option with this help, called like its argument or by these flags."""
    return typer.Option(*flags, help=text)


def path_option(text: str) -> OptionInfo:
    """An option that is a path, and not an empty one."""
    return typer.Option(help=text, parser=_as_path, metavar="PATH")


def _as_path(text: str) -> Path:
    try:
        return check_path("path", text)
    except ArgumentError as error:
        raise typer.BadParameter(error.one_line()) from error


RunFolder = Annotated[
    Path,
    typer.Argument(help="Folder that pvae train or pvae.fit wrote.", parser=_as_path),
]
PairCode = Annotated[
    str | None,
    option(
        "Function that returns the pair, for a folder of pvae.fit: module:function, or two "
        "programs as module:model,guide. Its module is imported. Example: --pair mymodel:build",
        "--pair",
    ),
]
Device = Annotated[
    str, option("Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.")
]
Particles = Annotated[
    int, option("Number K of draws from the guide for each datum.", "--num-particles", "-K")
]
Seed = Annotated[int, option("Seed of what is drawn at random.")]
DataFile = Annotated[
    Path | None,
    path_option(
        "File with data of the same kind, or module:function that returns them; if none, the test "
        "data."
    ),
]


def echo(text: object, *, err: bool = False) -> None:
    """Prints text, what a terminal would act on written out: names come from files."""
    typer.echo(shown(str(text)), err=err)


def summary(
    run: Run,
    pair: Pair,
    splits: Splits | None,
    data: object,
    *,
    num_particles: int = 500,
    seed: int | None = None,
) -> str:
    """The one screen of a run; without a seed the draws are by that of the training."""
    from pvae import diagnostics

    result = diagnostics.diagnose(
        pair,
        data,
        checks=diagnostics.SUMMARY,
        num_data=None,
        num_particles=num_particles,
        bin_width=_bin_width(run.config, splits),
        history=run.history,
        progress=False,
        seed=run.seed if seed is None else seed,
    )
    commands = ", ".join(
        f"pvae {name} {run.folder}" for name in ("sample", "reconstruct", "encode")
    )
    screen = str(result).replace(diagnostics.NOTHING, commands)
    screen = screen.replace(diagnostics.RUN_ALL, f"pvae diagnose {run.folder}")
    what = "" if run.config is None or splits is None else f" {run.config.recipe} on {splits.name}"
    return f"pvae{what}: {run.folder}\n{screen}"


def _bin_width(config: Config | None, splits: Splits | None) -> float | None:
    """The distance of the values that data of a run can take; None where they are real numbers."""
    if config is None or splits is None or splits.levels is None:
        return None
    return 1.0 / (splits.levels - 1) if config.likelihood_for(splits) == "gaussian" else 1.0


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a picture, whole or not at all."""
    import io

    content = io.BytesIO()
    figure.savefig(content)
    write_atomically(path, content.getvalue())


def prepare_file(path: Path) -> None:
    """Refuses, before any work, a path that can't be written; makes the folder it is in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError("--to", "a file in a folder that can be made", str(error)) from error
    if path.is_dir():
        raise ArgumentError("--to", "a file", f"the folder {path}")
