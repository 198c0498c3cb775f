"""Several processes that train one pair, on torch's own engine: who they are, and what they share.

Each process runs the same program on its rows of each batch. ``torchrun`` starts them.

Where several machines are to restart workers, ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` in the
environment of ``torchrun`` gives each start a store of its own, without addresses of the dead.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pvae.devices import as_device, automatic
from pvae.errors import ArgumentError, PvaeError
from pvae.internals import import_compiler
from pvae.randomness import derive_seed

__all__ = [
    "World",
    "current",
    "is_started_by_torchrun",
    "job",
    "joined",
    "restarts",
    "stop_with_launcher",
]

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others, the first of which may be evaluating."""

LOOK_EVERY = 1.0
"""Seconds between looks at whether the launcher is there."""

_DRAWS = 2
"""Key of the draws of a process, apart from those of the order of data."""


@dataclass(frozen=True)
class World:
    """The processes that train together; one alone is a world, too, in which nothing is sent.

    Attributes:
        rank: Number of this process.
        size: How many there are.

    Example:
        >>> World().is_first, World(1, 3).share(8)
        (True, slice(3, 6, None))
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def share(self, num_rows: int) -> slice:
        """This process's part of so many rows; they differ by at most one, the last is least."""
        each, more = divmod(num_rows, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def shares(self, num_rows: int) -> set[int]:
        """The sizes that parts of so many rows have; 0 isn't among them."""
        each, more = divmod(num_rows, self.size)
        return {n for n in (each, each + bool(more)) if n}

    def seed(self, seed: int, *keys: int) -> int:
        """A seed of this process's own; the first process has the seed itself."""
        return seed if self.is_first and not keys else derive_seed(seed, self.rank, _DRAWS, *keys)

    # Every process has to call these, in the same order

    def mean(self, weight: int, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The sum of all processes' weights, and the means of tensors by them, in one all-reduce.

        All processes get the same numbers, bit for bit. A weight may be 0; tensors have the same
        shapes in all processes.
        """
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
        flat = torch.cat([x.reshape(-1).to(dtype) for x in tensors])
        flat = torch.cat([flat, flat.new_ones(1)]) * weight
        if self.size > 1:
            dist.all_reduce(flat)
        parts = (flat[:-1] / flat[-1]).split([x.numel() for x in tensors])
        means = [p.view(x.shape).to(x.dtype) for p, x in zip(parts, tensors, strict=True)]
        return flat[-1], means

    def from_first(self, function: Callable[[], T]) -> T:
        """What a function returns in the first process, which alone runs it.

        Raises:
            PvaeError: In all processes, where the function raises one.
        """
        if self.size == 1:
            return function()
        shared: list[Any] = [None, None]
        if self.is_first:
            try:
                shared[0] = function()
            except PvaeError as error:
                shared[1] = error
        dist.broadcast_object_list(shared, src=0)
        if shared[1] is not None:
            raise shared[1]
        return shared[0]

    def highest(self, value: int) -> int:
        """The highest of all processes' values."""
        if self.size == 1:
            return value
        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        shared = torch.tensor(value, device=where)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Gives tensors the values that the first process's have, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            flat = tensor.detach().reshape(-1).contiguous().clone()
            if flat.numel():
                dist.broadcast(flat.view(torch.uint8), src=0)  # bytes, which every backend knows
            with torch.no_grad():
                tensor.copy_(flat.view(tensor.shape))


def current() -> World:
    """The world that this process is in: torch's default process group, or itself alone."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def is_started_by_torchrun() -> bool:
    """Whether ``torchrun``'s environment says that there are several processes."""
    named = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return named and int(os.environ["WORLD_SIZE"]) > 1


def restarts() -> int:
    """How often ``torchrun`` has started its workers anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job() -> str | None:
    """A name of this call of ``torchrun``, the same after each restart; None without it.

    It is the ``--rdzv-id``, or else the folder of the workers' logs.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name != "none":
        return name
    errors = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # FOLDER/attempt_0/0/error.json
    return errors.parents[2].name if len(errors.parents) > 3 else None


def stop_with_launcher() -> None:
    """Lets this process end when the one that started it dies: ``torchrun``, or Python's own.

    A worker whose launcher was killed would train on, with nobody to stop it, beside those that are
    started in its place. It ends as if it had been killed, too: what it has saved is whole. A
    process with another parent, such as a shell, isn't ended.
    """
    is_there = _launcher()
    name = f"pvae launcher of {os.getpid()}"
    if is_there is None or name in (thread.name for thread in threading.enumerate()):
        return
    pause = threading.Event()

    def look() -> None:
        while is_there():
            pause.wait(LOOK_EVERY)
        print("pvae: stopped, as the process that started this one is gone", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=look, name=name, daemon=True).start()


def _launcher() -> Callable[[], bool] | None:
    """Tells whether the process that launched this one as a worker is there; None without one."""
    if (parent := multiprocessing.parent_process()) is not None:
        return parent.is_alive
    if not is_started_by_torchrun() or "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    number = os.getppid()
    return lambda: os.getppid() == number


@contextmanager
def joined(device: str | torch.device = "auto") -> Iterator[World]:
    """Joins the processes that ``torchrun`` has started; without it, nothing happens.

    NCCL on CUDA, where each process has the GPU of its local number; otherwise gloo. A process
    group that is there already is taken as it is. At the end the group is left again.

    Arguments:
        device: Where the pair will be: ``"auto"``, ``"cpu"`` or ``"cuda"``; not ``"mps"``.

    Raises:
        ArgumentError: If there are more processes than GPUs, or all are to have the same.

    Example:
        >>> with joined() as world:
        ...     world.size
        1
    """
    if not is_started_by_torchrun() or dist.is_initialized():
        yield current()
        return
    where = automatic(processes=2) if device == "auto" else as_device(device)
    stop_with_launcher()
    import_compiler()
    options: dict[str, Any] = {"backend": "gloo"}
    if where.type == "cuda":
        options = {"backend": "nccl", "device_id": _own_gpu(device)}
    dist.init_process_group(timeout=PATIENCE, **options, **_meeting_point())
    try:
        yield current()
    finally:
        dist.destroy_process_group()


def _meeting_point() -> dict[str, Any]:
    """Where processes find each other's addresses; on one machine, apart for each restart.

    ``torchrun`` keeps one store for all restarts, in which the addresses of the dead remain. Each
    of several machines counts its own restarts, so there it is left to ``torchrun``.
    """
    size = os.environ["WORLD_SIZE"]
    if os.environ.get("LOCAL_WORLD_SIZE") != size:
        return {}
    store, rank, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(f"pvae/start{restarts()}", store)
    return {"store": store, "rank": rank, "world_size": int(size)}


def _own_gpu(device: str | torch.device) -> torch.device:
    """Makes the GPU of this process's local number the current one."""
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device != "auto" and torch.device(device).index is not None:
        raise ArgumentError("device", "'cuda', of which each process has its own", f"'{device}'")
    if number >= count:
        expected = f"at most the {count} GPU(s) of this machine, one a process"
        actual = f"local process number {number}"
        raise ArgumentError("--nproc-per-node", expected, actual, ["device='cpu'"])
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
