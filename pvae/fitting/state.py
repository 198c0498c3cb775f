"""The state of a training, to and from a checkpoint."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pvae import checkpoint, randomness
from pvae.data import Source
from pvae.data.sources import LoaderSource
from pvae.distributed import World, job
from pvae.engine import Stepper
from pvae.errors import CheckpointError, PvaeWarning
from pvae.fitting.history import History
from pvae.pair import Pair, PairLike, as_pair

__all__ = [
    "Progress",
    "buffers_of",
    "copy_into",
    "fingerprint",
    "first_difference",
    "load",
    "restore",
    "snapshot",
    "without_addresses",
]


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        epochs: Number of epochs that the training is to have.
        epoch: Number of whole epochs.
        step: Steps done in the epoch after those.
        global_step: Steps done in all.
        best: Best validation value so far; None before the first.
        best_epoch: Its epoch.
        seconds: Time spent in training.
        stopped_early: Whether validation ended it.
    """

    epochs: int = 0
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    best: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    stopped_early: bool = False
    history: History = field(default_factory=History)
    best_tensors: dict[str, Tensor] = field(default_factory=dict)


def buffers_of(pair: Pair, modules: Iterable[nn.Module] = ()) -> dict[str, Tensor]:
    """Buffers and frozen parameters by attribute name; those in closures by their order."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    roots = [
        (p, m)
        for p, m in (("model", pair.model), ("guide", pair.guide))
        if isinstance(m, nn.Module)
    ]
    roots += [(f"module{i}", m) for i, m in enumerate(modules)]
    for prefix, root in roots:
        frozen = [(n, p) for n, p in root.named_parameters() if not p.requires_grad]
        for name, tensor in (*root.named_buffers(), *frozen):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                named[f"{prefix}.{name}"] = tensor
    return named


def fingerprint(source: Source) -> str | None:
    """A digest of the first and last rows: other data under the same call should be noticed."""
    if isinstance(source, LoaderSource):
        return None
    ends = min(32, source.num_rows)
    index = torch.arange(ends, device=source.device)
    digest = hashlib.sha256()
    for rows in (index, source.num_rows - ends + index):
        for part in source.rows(rows):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load(
    path: str | Path,
    pair: PairLike,
    batch: tuple[Tensor, ...] | None = None,
) -> dict[str, Any]:
    """Copies a checkpoint's parameters and buffers into a pair built as it was when saved.

    Where the training kept the best epoch, that is what is copied.

    Arguments:
        path: A checkpoint, or a folder that `fit` wrote.
        pair: A model and its guide.
        batch: A batch of data; only needed for functions, whose parameters a trace has to find.

    Returns:
        What the checkpoint says of the training: progress, settings, environment.

    Raises:
        CheckpointError: If the file can't be read, or is of another pair.
    """
    path, pair = Path(path), as_pair(pair, "load")
    path = path / "checkpoint.safetensors" if path.is_dir() else path
    saved = checkpoint.load(path)
    if batch is not None:
        structure = pair.inspect(batch)
        parameters, modules = structure.parameters, structure.modules
    else:
        named: dict[str, Tensor] = {}
        seen: set[int] = set()
        for prefix, root in (("model", pair.model), ("guide", pair.guide)):
            if not isinstance(root, nn.Module):
                raise CheckpointError(
                    prefix,
                    "a module, or a batch to trace the function with",
                    "a function",
                    ["batch=(x[:10],)"],
                )
            for name, parameter in root.named_parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    named[f"{prefix}.{name}"] = parameter
        parameters, modules = named, ()
    buffers = buffers_of(pair, modules)
    best = saved.part("best")
    if best:
        copy_into(best, {**parameters, **buffers}, str(path), "tensors")
    else:
        copy_into(saved.part("param"), parameters, str(path), "parameters")
        copy_into(saved.part("buffer"), buffers, str(path), "buffers")
    return saved.meta


def snapshot(
    progress: Progress,
    stepper: Stepper,
    buffers: dict[str, Tensor],
    settings: dict[str, Any],
    generators: list[dict[str, Tensor]],
) -> checkpoint.Checkpoint:
    """Everything that exact resume needs; ``generators`` are the states of each process's."""
    saved = checkpoint.Checkpoint()
    saved.add("param", stepper.structure.parameters)
    saved.add("buffer", buffers)
    saved.add("best", progress.best_tensors)
    for rank, state in enumerate(generators):
        saved.add(_generators_of(rank), state)
    tensors, rest = checkpoint.optimizer_state(stepper.optimizer)
    saved.add("optimizer", tensors)
    saved.tensors["sums"] = stepper.sums
    if stepper.state is not None:
        saved.add("objective", stepper.state.tensors())
    numbers = asdict(progress)
    del numbers["best_tensors"]
    saved.meta = {
        "progress": {**numbers, "history": progress.history.records},
        "optimizer": rest,
        "objective_step": None if stepper.state is None else stepper.state.step,
        "settings": settings,
        "environment": checkpoint.environment(stepper.structure.device),
        "job": job(),
    }
    return saved


def restore(
    saved: checkpoint.Checkpoint,
    stepper: Stepper,
    buffers: dict[str, Tensor],
    settings: dict[str, Any],
    where: str,
    world: World,
    seed: int,
) -> Progress:
    """Puts a pair, an optimiser and the generators into a saved state.

    Raises:
        CheckpointError: If the checkpoint is of another pair or another training.
    """
    theirs = saved.meta["settings"]
    differ = [k for k in settings if settings[k] != theirs.get(k)]
    if differ:
        raise CheckpointError(
            where,
            "the settings that it was made with: "
            + ", ".join(f"{k}={first_difference(theirs.get(k), settings[k])!r}" for k in differ),
            ", ".join(f"{k}={first_difference(settings[k], theirs.get(k))!r}" for k in differ),
            ["the same call as before", "another folder, to train anew"],
        )
    copy_into(saved.part("param"), stepper.structure.parameters, where, "parameters")
    copy_into(saved.part("buffer"), buffers, where, "buffers")
    checkpoint.restore_optimizer(
        stepper.optimizer, saved.part("optimizer"), saved.meta["optimizer"]
    )
    stepper.sums.copy_(saved.tensors["sums"])
    if stepper.state is not None:
        stepper.state.restore(saved.part("objective"), saved.meta["objective_step"])
    numbers = dict(saved.meta["progress"])
    now, then = checkpoint.environment(stepper.structure.device), saved.meta["environment"]
    then = {"processes": 1, **then}  # which older ones don't say
    if now["processes"] == then["processes"]:
        randomness.set_state(saved.part(_generators_of(world.rank)))
    else:
        randomness.set_seed(world.seed(seed, numbers["global_step"]))
    changed = [f"{k} was {then.get(k)}, is {now[k]}" for k in now if now[k] != then.get(k)]
    if changed:
        warnings.warn(
            f"The training goes on, but not bit for bit as before: {'; '.join(changed)}.",
            PvaeWarning,
            stacklevel=5,
        )
    history = History(numbers.pop("history"))
    device = stepper.structure.device
    best = {k: v.to(device) for k, v in saved.part("best").items()}
    return Progress(**numbers, history=history, best_tensors=best)


def _generators_of(rank: int) -> str:
    """What a process's generators are called in a checkpoint."""
    return f"rng{rank}" if rank else "rng"


def without_addresses(text: str) -> str:
    """A ``repr`` that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def first_difference(setting: Any, other: Any) -> Any:
    """Of texts of several lines, the first line that isn't in the other one."""
    if not (isinstance(setting, str) and isinstance(other, str) and "\n" in setting + other):
        return setting
    lines = (line.strip() for line in setting.splitlines() if line not in other.splitlines())
    return next(lines, "")


def copy_into(saved: dict[str, Tensor], present: dict[str, Tensor], where: str, what: str) -> None:
    """Copies saved tensors into those of a pair, by name."""
    shapes = {k: (tuple(v.shape), str(v.dtype)) for k, v in saved.items()}
    here = {k: (tuple(v.shape), str(v.dtype)) for k, v in present.items()}
    if shapes != here:
        odd = sorted(k for k in {*shapes, *here} if shapes.get(k) != here.get(k))
        raise CheckpointError(
            where,
            f"{what} like the pair's: "
            + ", ".join(f"{k} {here.get(k, 'absent')}" for k in odd[:3]),
            ", ".join(f"{k} {shapes.get(k, 'absent')}" for k in odd[:3])
            + (f" and {len(odd) - 3} more" if len(odd) > 3 else ""),
            ["the pair that the checkpoint was made with"],
        )
    with torch.no_grad():
        for name, tensor in present.items():
            tensor.copy_(saved[name])
