"""What two trainings must have in common for one to go on where the other stopped."""

from __future__ import annotations

import hashlib
import re

import torch
from pyro.infer import ELBO as PyroELBO
from torch import nn

from pvae.data import Batches, LoaderSource, Source
from pvae.fitting.settings import Settings
from pvae.pair import Pair
from pvae.types import Program

__all__ = ["first_difference", "identity_of"]


def identity_of(
    pair: Pair,
    settings: Settings,
    objective: PyroELBO,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
) -> dict[str, object]:
    """What a resumed training, or another process's part of one, must have in common, by name."""
    return {
        "seed": settings.seed,
        "lr": settings.lr,
        "lr_schedule": repr(settings.schedule),
        "clip_norm": settings.clip_norm,
        "precision": settings.precision,
        "patience": settings.patience,
        "batch_size": batches.batch_size,
        "num_rows": batches.source.num_rows,
        "objective": _without_addresses(repr(objective)),
        "optimizer": f"{type(optimizer).__name__}({_plain(optimizer.defaults)})",
        "data": _digest(batches.source),
        "model": _made_of(pair.model),
        "guide": _made_of(pair.guide),
        "engine": settings.engine,
    }


def first_difference(setting: object, other: object) -> object:
    """Of texts of several lines, the first line that isn't in the other one."""
    if not (isinstance(setting, str) and isinstance(other, str) and "\n" in setting + other):
        return setting
    lines = (line.strip() for line in setting.splitlines() if line not in other.splitlines())
    return next(lines, "")


def _digest(source: Source) -> str | None:
    """Of the first and last rows: other data under the same call should be noticed."""
    if isinstance(source, LoaderSource):
        return None
    ends = min(32, source.num_rows)
    index = torch.arange(ends, device=source.device)
    digest = hashlib.sha256()
    for rows in (index, source.num_rows - ends + index):
        for part in source.rows(rows):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _made_of(program: Program) -> str:
    """What a module says it is made of: layers, dropout, corruptions, penalties."""
    if not isinstance(program, nn.Module):
        return type(program).__name__
    return _without_addresses(repr(program))


def _without_addresses(text: str) -> str:
    """A ``repr`` that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _plain(defaults: dict[str, object]) -> str:
    """An optimiser's settings but for the learning rate, which is checked apart."""
    hidden = ("lr", "fused", "foreach", "capturable", "differentiable")
    return ", ".join(f"{k}={v}" for k, v in sorted(defaults.items()) if k not in hidden)
