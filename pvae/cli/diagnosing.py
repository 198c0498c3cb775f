"""``pvae diagnose``: what a run is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import pvae
from pvae.cli import common
from pvae.cli.common import app, echo, option
from pvae.cli.opening import open_folder
from pvae.files import write_atomically

__all__ = ["diagnose"]


@app.command()
def diagnose(
    run: common.RunFolder,
    *,
    data: common.DataFile = None,
    rows: Annotated[int, option("Number of test data to look at.")] = 500,
    num_particles: common.Particles = 200,
    deep: Annotated[bool, option("Make all checks, which takes minutes.", "--deep")] = False,
    to: Annotated[
        Path | None, common.path_option("File to write findings to. Example: --to found.json")
    ] = None,
    seed: common.Seed = 0,
    pair: common.PairCode = None,
    device: common.Device = "auto",
) -> None:
    """Judge a run: bound, posterior, latent space, model, training, and what to do next.

    Lines begin with + where all is well, ? where it is worth a look, ! where something is wrong.
    """
    opened = open_folder(run, device, pair, data)
    if to is not None:
        common.prepare_file(to)
    result = pvae.diagnose(
        opened.pair,
        opened.data,
        checks=pvae.diagnostics.CHECKS if deep else pvae.diagnostics.DEFAULT,
        num_data=rows,
        num_particles=num_particles,
        history=opened.run.history,
        progress=True,
        seed=seed,
    )
    echo(result)
    if to is not None:
        write_atomically(to, json.dumps(result.to_dict(), indent=1).encode())
