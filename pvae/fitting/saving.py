"""A training to and from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pvae import checkpoint, randomness
from pvae.distributed import job
from pvae.engine.sums import set_sums, sums_of
from pvae.errors import CheckpointError, check_path, oxford, warn
from pvae.fitting.folder import Folder, checkpoint_in, training_in
from pvae.fitting.generators import States
from pvae.fitting.history import History
from pvae.fitting.identity import (
    Difference,
    Values,
    account_of,
    differences,
    listed,
    without,
)
from pvae.fitting.training import Progress, Training, named_tensors
from pvae.options import tool
from pvae.pair import Account, Pair, PairLike, as_pair

__all__ = [
    "append_history",
    "begin_folder",
    "copy_into",
    "load_parameters",
    "restore",
    "save_checkpoint",
]


_UNKNOWN: dict[str, Any] = {"entries": {}, "changing": []}
_UNSEEN: dict[str, Any] = {"has_penalties": False, "moved": []}


def save_checkpoint(
    training: Training, path: Path | None = None, generators: States | None = None
) -> None:
    """Writes everything that exact resume needs; all processes call this, the first one writes.

    Without a path it is the checkpoint of the training's folder, if there is one; without states of
    the generators it has the present ones.
    """
    if path is None and training.settings.folder is None:
        return
    states = training.world.gather(generators or training.drawing.get())

    def write() -> None:
        folder = _own_folder(training) if path is None else None
        file = path if folder is None else folder.checkpoint
        assert file is not None  # noqa: S101
        checkpoint.save(file, _snapshot(training, states))

    training.world.from_first(write)


def _own_folder(training: Training) -> Folder | None:
    """The folder, in the process that writes there and owns it still."""
    if training.lock is None:
        return None
    training.lock.check()
    return training.settings.folder


def begin_folder(training: Training) -> None:
    """Puts a training in the place of what was in its folder, in an order that no kill can harm.

    A training that is replaced is there until the new one's first state is.
    """
    if training.settings.overwrite and training.generators is None:
        save_checkpoint(training)

    def write() -> None:
        if folder := _own_folder(training):
            folder.write_copies(training.progress.history)

    training.world.from_first(write)


def append_history(training: Training) -> None:
    """Adds the last epoch's record to the file of the history."""

    def write() -> None:
        if folder := _own_folder(training):
            training.progress.history.write_last(folder.history)

    training.world.from_first(write)


def _snapshot(training: Training, states: list[States]) -> checkpoint.Checkpoint:
    """A training as a checkpoint; ``states`` are those of each process's generators."""
    stepper, progress = training.stepper, training.progress
    saved = checkpoint.Checkpoint()
    saved.add("param", training.structure.parameters)
    saved.add("buffer", training.buffers)
    saved.add("best", progress.best_tensors)
    for rank, state in enumerate(states):
        saved.add(f"rng{rank or ''}", state.process)
    if progress.step and training.reading.start is not None:
        saved.add("epoch", training.reading.start.process)
    tensors, rest = checkpoint.optimizer_state(stepper.optimizer)
    saved.add("optimizer", tensors)
    saved.tensors["sums"] = sums_of(stepper.sums)
    if stepper.state is not None:
        saved.add("objective", stepper.state.tensors())
    numbers = {k: v for k, v in vars(progress).items() if k not in ("history", "best_tensors")}
    saved.meta = {
        "progress": {**numbers, "history": list(progress.history)},
        "optimizer": rest,
        "objective_step": None if stepper.state is None else stepper.state.step,
        "steps": stepper.seen(),
        "own": [state.own for state in states],
        "reading": training.reading.as_json() if saved.part("epoch") else None,
        "pair": training.record.as_json(is_trained=progress.global_step > 0),
        "settings": training.identity,
        "environment": checkpoint.environment(training.structure.device),
        "job": job(),
        "made": training.made,
    }
    return saved


def restore(saved: checkpoint.Checkpoint, training: Training) -> Progress:
    """Puts pair, optimiser and generators into a saved state; returns how far that had come.

    Raises:
        CheckpointError: If the checkpoint is of another pair or another training.
    """
    assert training.settings.folder is not None  # noqa: S101
    where, stepper = str(training.settings.folder.checkpoint), training.stepper
    found = _other_parts(saved, training.record.first, where)
    if found := [*found, *_other_settings(saved, training.identity)]:
        fixes = ["the same call as before", "another folder, to train anew"]
        expected = "the pair, data and settings that it was made with"
        raise CheckpointError(where, expected, listed(found), fixes)
    training.record.changing |= {*saved.meta.get("pair", _UNKNOWN)["changing"]}
    copy_into(saved.part("param"), training.structure.parameters, where, "parameters")
    copy_into(saved.part("buffer"), training.buffers, where, "buffers")
    optimizer = saved.part("optimizer"), saved.meta["optimizer"]
    checkpoint.restore_optimizer(stepper.optimizer, *optimizer)
    set_sums(stepper.sums, saved.tensors["sums"])
    stepper.restore_seen(saved.meta.get("steps", _UNSEEN))
    if stepper.state is not None:
        stepper.state.restore(saved.part("objective"), saved.meta["objective_step"])
    training.made = {**saved.meta.get("made", {}), **training.made}
    numbers = dict(saved.meta["progress"])
    _restore_generators(saved, training, numbers["global_step"])
    history = History(numbers.pop("history"))
    device = training.structure.device
    best = {k: v.to(device) for k, v in saved.part("best").items()}
    return Progress(**numbers, history=history, best_tensors=best)


def _other_parts(saved: checkpoint.Checkpoint, account: Account, where: str) -> list[Difference]:
    """What differs of a pair, but for large buffers, which come from the checkpoint: told of."""
    if "pair" not in saved.meta:
        warn(f"{where} doesn't say of which pair and data it is, so these aren't compared.")
    parts, is_old = saved.meta.get("pair", _UNKNOWN), bool(checkpoint.other_versions(saved))
    now = without(account.entries, parts["changing"])
    found = differences(parts["entries"], now, in_both=is_old or parts is _UNKNOWN)
    large = [d for d in found if d.what in account.restored and "digest" in d.saved]
    if large:
        names = oxford([difference.what for difference in large])
        warn(f"{where}: the buffer(s) {names} had other numbers here, and get those saved.")
    return [difference for difference in found if difference not in large]


def _other_settings(saved: checkpoint.Checkpoint, now: Values) -> list[Difference]:
    """What differs of settings and data; of earlier pvae's, which had other words, the numbers."""
    then, is_old = saved.meta["settings"], bool(checkpoint.other_versions(saved))
    if "pair" not in saved.meta:
        then = {name: value for name, value in then.items() if not isinstance(value, str)}
        is_old = True
    return differences(then, now, in_both=is_old)


def _restore_generators(saved: checkpoint.Checkpoint, training: Training, step: int) -> None:
    """Puts the generators back, or seeds others where there are more or fewer processes."""
    now = checkpoint.environment(training.structure.device)
    then = saved.meta["environment"]
    changed = [f"{k} was {then[k]}, is {now[k]}" for k in now if k in then and now[k] != then[k]]
    if now["processes"] == then["processes"]:
        rank = training.world.rank
        own = saved.meta.get("own", [[]] * (rank + 1))[rank]
        if not training.drawing.set(States(saved.part(f"rng{rank or ''}"), own)):
            changed.append("pair and data keep other generators")
    else:
        randomness.set_seed(training.world.seed(training.settings.seed, step))
    if process := saved.part("epoch"):
        training.reading.restore(process, saved.meta["reading"])
    if changed:
        warn(f"The training goes on, but not bit for bit as before: {'; '.join(changed)}.")


# Parameters alone


@tool
def load_parameters(
    pair: PairLike, path: str | Path, batch: object = None, *, strict: bool = True
) -> dict[str, Any]:
    """Copies a checkpoint's parameters and buffers into a pair built as it was when saved.

    Where the training kept the best epoch, that is what is copied. The pair has to be the one that
    was trained in every number that isn't: settings of its parts, code of its functions, and what
    these read.

    Arguments:
        pair: A model and its guide.
        path: A checkpoint, or a folder that `pvae.fit` wrote.
        batch: A batch of data; only needed for functions, whose parameters a trace has to find.
        strict: Whether a pair that differs is refused; if not, the differences are warned of.

    Returns:
        What the checkpoint says of the training: progress, settings, environment.

    Raises:
        CheckpointError: If the file can't be read, or is of another pair; names what differs.

    Example:
        >>> import tempfile
        >>> import pvae
        >>> x = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)).round()
        >>> first, second = (pvae.recipes.vae(4, 1, hidden=(3,)) for _ in range(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pvae.fit(first, x, epochs=1, folder=folder, progress=False)
        ...     saved = load_parameters(second, folder)
        >>> saved["progress"]["epoch"]
        1
        >>> all(map(torch.equal, first.parameters(), second.parameters()))
        True
    """
    pair, path = as_pair(pair, "load_parameters"), check_path("path", path)
    path = checkpoint_in(path)
    saved = training_in(path)
    if batch is not None:
        structure = pair.inspect(batch)
        parameters = structure.parameters
        buffers = named_tensors(pair, structure.modules, trainable=False)
    else:
        for name, program in (("model", pair.model), ("guide", pair.guide)):
            if not isinstance(program, nn.Module):
                expected = "a module, or a batch to trace the function with"
                raise CheckpointError(name, expected, "a function", ["batch=(x[:10],)"])
        parameters, buffers = (named_tensors(pair, trainable=is_so) for is_so in (True, False))
    _check_parts(saved, pair, str(path), strict=strict)
    if best := saved.part("best"):
        copy_into(best, {**parameters, **buffers}, str(path), "tensors")
    else:
        copy_into(saved.part("param"), parameters, str(path), "parameters")
        copy_into(saved.part("buffer"), buffers, str(path), "buffers")
    return saved.meta


def _check_parts(saved: checkpoint.Checkpoint, pair: Pair, where: str, *, strict: bool) -> None:
    """Refuses a pair that isn't the one that was trained, or warns; warns of other versions."""
    if versions := checkpoint.other_versions(saved):
        warn(f"{where} was written by other versions: {'; '.join(versions)}.")
    if not (found := _other_parts(saved, account_of(pair), where)):
        return
    expected = "the pair that it was made with"
    if strict:
        fixes = ["the pair as it was built then", "strict=False, to load it all the same"]
        raise CheckpointError(where, expected, listed(found), fixes)
    warn(f"{where} is of another pair: {listed(found)}.")


def copy_into(saved: dict[str, Tensor], present: dict[str, Tensor], where: str, what: str) -> None:
    """Copies saved tensors into those of a pair, by name."""
    shapes = {k: (tuple(v.shape), str(v.dtype)) for k, v in saved.items()}
    here = {k: (tuple(v.shape), str(v.dtype)) for k, v in present.items()}
    if shapes != here:
        odd = sorted(k for k in {*shapes, *here} if shapes.get(k) != here.get(k))
        expected = ", ".join(f"{k} {here.get(k, 'absent')}" for k in odd[:3])
        actual = ", ".join(f"{k} {shapes.get(k, 'absent')}" for k in odd[:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        fixes = ["the pair that the checkpoint was made with"]
        raise CheckpointError(where, f"{what} like the pair's: {expected}", actual + more, fixes)
    with torch.no_grad():
        for name, tensor in present.items():
            tensor.copy_(saved[name])
