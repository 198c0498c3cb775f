"""``pvae doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pvae
from pvae.cli.common import app, echo

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["doctor"]


@app.command()
def doctor() -> None:
    """Print versions and devices, and known troubles with what is installed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    echo(f"pvae {pvae.__version__}, Python {platform.python_version()}, {platform.machine()}")
    echo(f"  torch {torch.__version__}")  # which says what it was built for
    for package in ("pyro-ppl", "numpy", "scikit-learn", "arviz", "matplotlib", "zuko"):
        try:
            echo(f"  {package} {version(package)}")
        except PackageNotFoundError:
            echo(f"  {package}: not installed")
    echo(f"  threads: {torch.get_num_threads()}")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        echo(f"  cuda:{i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        echo("  mps: Apple's GPU, for float32 alone; pvae hasn't been tried on one")
    elif not torch.cuda.is_available():
        echo("  no GPU that pvae uses (CUDA or Apple's MPS): pvae runs on the CPU")
    troubles = list(_troubles())
    for trouble in troubles:
        echo(f"trouble: {trouble}")
    echo(f"{len(troubles)} known trouble(s)" if troubles else "no known trouble")


def _troubles() -> Iterator[str]:
    """Troubles with installed packages that pvae knows of."""
    try:
        import arviz  # noqa: F401
    except Exception as error:
        yield f"arviz doesn't import ({error}); on Python 3.11 it needs matplotlib below 3.11"
