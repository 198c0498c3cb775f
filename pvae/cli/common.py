"""What the commands share: the app, their common options, the one screen of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

from pvae.errors import ArgumentError, check_path, shown

if TYPE_CHECKING:
    from pvae.config import Config
    from pvae.data import Splits
    from pvae.fitting import History
    from pvae.vae import VAE

__all__ = [
    "DataFile",
    "Device",
    "Particles",
    "RunFolder",
    "Seed",
    "app",
    "echo",
    "option",
    "prepare_file",
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


RunFolder = Annotated[Path, typer.Argument(help="Folder that 'pvae train' wrote.", parser=_as_path)]
Device = Annotated[
    str, option("Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.")
]
Particles = Annotated[
    int, option("Number K of draws from the guide for each datum.", "--num-particles", "-K")
]
Seed = Annotated[int, option("Seed of what is drawn at random.")]
DataFile = Annotated[
    Path | None, path_option("File with data of the same kind; if none, the test data.")
]


def echo(text: object, *, err: bool = False) -> None:
    """Prints text, what a terminal would act on written out: names come from files."""
    typer.echo(shown(str(text)), err=err)


def summary(
    folder: Path,
    config: Config,
    vae: VAE,
    splits: Splits,
    history: History,
    num_particles: int = 500,
    seed: int | None = None,
) -> str:
    """The one screen of a run."""
    from pvae import diagnostics

    is_gaussian = config.likelihood_for(splits) == "gaussian"
    levels = splits.levels
    width = None if levels is None else 1.0 / (levels - 1) if is_gaussian else 1.0
    result = diagnostics.diagnose(
        vae,
        splits.test.unlabelled(),
        checks=diagnostics.SUMMARY,
        num_data=None,
        num_particles=num_particles,
        bin_width=width,
        history=history,
        progress=False,
        seed=config.seed if seed is None else seed,
    )
    commands = ", ".join(f"pvae {name} {folder}" for name in ("sample", "reconstruct", "encode"))
    screen = str(result).replace(diagnostics.NOTHING, commands)
    screen = screen.replace(diagnostics.RUN_ALL, f"pvae diagnose {folder}")
    return f"pvae {config.recipe} on {splits.name}: {folder}\n{screen}"


def prepare_file(path: Path) -> None:
    """Refuses, before any work, a path that can't be written; makes the folder it is in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError("--to", "a file in a folder that can be made", str(error)) from error
    if path.is_dir():
        raise ArgumentError("--to", "a file", f"the folder {path}")
