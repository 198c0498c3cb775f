"""``pvae doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

import pvae
from pvae.cli.common import app

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["doctor"]


@app.command()
def doctor() -> None:
    """Print versions and devices, and known troubles with what is installed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

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
    if torch.backends.mps.is_available():
        typer.echo("  mps: Apple's GPU, for float32 alone; pvae hasn't been tried on one")
    elif not torch.cuda.is_available():
        typer.echo("  no GPU that pvae uses (CUDA or Apple's MPS): pvae runs on the CPU")
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
