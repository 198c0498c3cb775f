"""Run folders: what the command line writes, and how a pair is built again from it.

A run folder holds ``config.json``, ``checkpoint.safetensors``, ``history.jsonl``, ``figures/`` and
``summary.txt``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from pvae import fitting
from pvae.checkpoint import write_atomically
from pvae.config import Config, options
from pvae.data import Splits
from pvae.distributed import job
from pvae.errors import PvaeError, TrainingError, check_path
from pvae.vae import VAE

__all__ = ["job_of", "open_run", "resolved", "written"]


def resolved(config: Config, splits: Splits, vae: VAE) -> dict[str, object]:
    """What recipe and data have decided where the configuration says ``None``."""
    penalties = [*vae.model.penalties, *vae.guide.penalties]
    return {
        "prior": type(vae.model.prior).__name__,
        "likelihood": config.likelihood_for(splits),
        "guide": type(vae.guide.posterior).__name__,
        "corruption": None if vae.guide.corruption is None else str(vae.guide.corruption),
        "penalties": {type(p).__name__: float(p.weight) for p in penalties},
        "hidden": list(config.widths),
        "event_shape": list(splits.event_shape),
        "levels": splits.levels,
        "rows": [len(splits.train), len(splits.valid), len(splits.test)],
    }


@contextlib.contextmanager
def written(config: Config, folder: Path, splits: Splits, vae: VAE) -> Iterator[None]:
    """Writes ``config.json``, and puts things back if the training is refused."""
    existed, path = folder.exists(), folder / "config.json"
    before = path.read_bytes() if path.exists() else None
    content = dict.fromkeys(options()) | config.model_dump()
    content["resolved"] = resolved(config, splits, vae)
    if (name := job()) is not None:
        content["job"] = name
    write_atomically(path, f"{json.dumps(content, indent=2)}\n".encode())
    try:
        yield
    except TrainingError:
        raise
    except PvaeError:
        if before is not None:
            write_atomically(path, before)
        else:
            path.unlink()
        if not existed:
            folder.rmdir()
        raise


def job_of(folder: Path) -> str | None:
    """The job of ``torchrun`` that a run was last trained by; None if there is no run, or no job.

    See `pvae.distributed.job`.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        name: str | None = json.loads((folder / "config.json").read_text()).get("job")
        return name
    return None


def open_run(folder: str | Path, device: str = "auto") -> tuple[Config, VAE, Splits]:
    """The configuration, the trained pair (on the device) and the data of a run.

    Raises:
        CheckpointError: If the folder isn't a run, or its files are damaged.
    """
    folder = check_path("folder", folder)
    config = Config.read(folder)
    splits = config.load_data()
    vae = config.build(splits)
    fitting.load_parameters(vae, folder)
    vae.place(device)
    return config, vae, splits
