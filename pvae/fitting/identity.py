"""What two trainings must have in common for one to go on where the other stopped."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import torch
from pyro.infer import ELBO as PyroELBO
from torch import nn

from pvae.data import Batches, LoaderSource, Mixed, Source
from pvae.fitting.settings import Settings
from pvae.pair import Pair

__all__ = ["differences", "identity_of"]


def identity_of(
    pair: Pair,
    settings: Settings,
    objective: PyroELBO,
    optimizer: torch.optim.Optimizer,
    batches: Batches | Mixed,
) -> dict[str, object]:
    """What a resumed training, or another process's part of one, must have in common, by name."""
    hidden = ("lr", "fused", "foreach", "capturable", "differentiable")  # lr has its own entry
    defaults = sorted((k, v) for k, v in optimizer.defaults.items() if k not in hidden)
    plain = ", ".join(f"{name}={value}" for name, value in defaults)
    identity: dict[str, object] = {
        "seed": settings.seed,
        "lr": settings.lr,
        "lr_schedule": repr(settings.schedule),
        "clip_norm": settings.clip_norm,
        "precision": settings.precision,
        "patience": settings.patience,
        "objective": repr(objective),
        "optimizer": f"{type(optimizer).__name__}({plain})",
        "engine": settings.engine,
        **_of_data(batches),
    }
    for name, program in (("model", pair.model), ("guide", pair.guide)):
        is_module = isinstance(program, nn.Module)
        identity[name] = repr(program) if is_module else type(program).__name__
    addresses = " at 0x[0-9a-f]+"  # a repr that is the same in every process has none
    return {k: re.sub(addresses, "", v) if isinstance(v, str) else v for k, v in identity.items()}


def _of_data(batches: Batches | Mixed) -> dict[str, object]:
    if isinstance(batches, Mixed):
        mix = None if batches.mix is None else dict(batches.mix)
        parts = {name: _of_data(part) for name, part in batches.parts.items()}
        named = {f"{k} of {name}": v for name, part in parts.items() for k, v in part.items()}
        return {"mix": mix, **named}
    source = batches.source
    return {
        "batch_size": batches.batch_size,
        "num_rows": source.num_rows,
        "data": _digest(source),
    }


def differences(
    expected: Mapping[str, object], actual: Mapping[str, object]
) -> list[tuple[str, str]]:
    """What differs, as ``name=value`` in either; of texts of several lines the line that does."""
    names = [k for k in {**actual, **expected} if expected.get(k) != actual.get(k)]
    values = [(name, expected.get(name), actual.get(name)) for name in names]
    return [(f"{k}={_differing(a, b)!r}", f"{k}={_differing(b, a)!r}") for k, a, b in values]


def _differing(setting: object, other: object) -> object:
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
