"""Where a pair is: the device of its tensors, to which batches are brought."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

import pyro
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset

from pvae import randomness
from pvae.data import Data, Source, first_batch
from pvae.devices import automatic, is_of_devices, same_device, sent
from pvae.errors import PairError, warn
from pvae.pair.held import Held
from pvae.pair.running import Batch, flatten, rebuild, root_of, tensors_of

__all__ = ["devices_of", "movable", "moved", "where_it_runs"]

R = TypeVar("R")


def movable(program: object) -> nn.Module | None:
    """The module that a program is, or is a method of; None for what can't be moved as a whole."""
    root = root_of(program)
    owner = getattr(root, "__self__", root)
    return owner if isinstance(owner, nn.Module) else None


def devices_of(programs: Sequence[object], data: object = None) -> Iterator[torch.device]:
    """The devices that a pair may be on, the likeliest first; they may repeat.

    Parameters and buffers tell, trained or not, of the programs' modules and of those that they
    reach; then those in Pyro's store; then other tensors that programs hold on an accelerator; then
    the data. Constants on the host come last, as programs may send them where the data are.
    """
    modules = [module for module in map(movable, programs) if module is not None]
    yield from (tensor.device for tensor in tensors_of(modules))
    held = Held(programs)
    yield from (tensor.device for tensor in tensors_of(held.modules))
    for name, parameter in pyro.get_param_store().named_parameters():
        if name.split("$$$")[0] in held.words:
            yield parameter.device
    others = [tensor.device for tensor in held.tensors]
    yield from (device for device in others if device.type != "cpu")
    yield from (tensor.device for tensor in _tensors_in(data))
    yield from (device for device in others if device.type == "cpu")


def _tensors_in(data: object) -> Iterator[Tensor]:
    """The tensors of data, of whatever kind; of a loader or data set, those of its first item."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Source):
        yield from first_batch(data, 1)
    elif isinstance(data, Data):
        yield from _tensors_in(data.arrays)
    elif isinstance(data, dict):
        yield from _tensors_in([*data.values()])
    elif isinstance(data, (tuple, list)) and len(data) <= _MOST:
        for part in data:
            yield from _tensors_in(part)
    elif isinstance(data, (Dataset, DataLoader)):
        with randomness.forked(), suppress(Exception):  # what fails, fails where data are read
            first = next(iter(data)) if isinstance(data, DataLoader) else data[0]
            yield from [*_tensors_in(first)]


_MOST = 100  # arrays of one batch; what is longer is a list of numbers


def moved(batch: Batch, device: torch.device, on_host: Collection[int] = ()) -> Batch:
    """A batch on a device, but for the leaves of these numbers; itself, if it is there."""
    leaves: list[object] = []
    spec = flatten(batch, leaves)
    there = [_moved(leaf, device) for leaf in leaves]
    if all(new is old for new, old in zip(there, leaves, strict=True)):
        return batch
    for number in on_host:
        there[number] = leaves[number]
    return tuple(rebuild(spec, iter(there)))


def _moved(part: object, device: torch.device) -> object:
    if isinstance(part, PackedSequence):
        return part if part.data.device == device else part.to(device)  # type: ignore[arg-type]
    return sent(part, device) if isinstance(part, Tensor) and part.device != device else part


def where_it_runs(
    programs: Sequence[object], batch: Batch, look: Callable[[Batch], R]
) -> tuple[R, tuple[int, ...]]:
    """What a look at a pair finds, on the first device that it runs on.

    The batch is brought there as a whole; or but for what is on the host while the rest isn't, as
    lengths for ``pack_padded_sequence`` have to be.

    Returns:
        What was found, and the numbers of the leaves that stay on the host.

    Raises:
        PairError: The first one, if it runs on none; at once, if it isn't about devices.

    Warns:
        PvaeWarning: If it is the CPU, and the pair or its data are elsewhere.
    """
    devices = list[torch.device]()
    for device in (*devices_of(programs, batch), automatic(), torch.device("cpu")):
        if not any(same_device(device, known) for known in devices):
            devices.append(device)
    leaves: list[object] = []
    flatten(batch, leaves)
    tensors = {i: part for i, part in enumerate(leaves) if isinstance(part, Tensor)}
    on_host = tuple(i for i, part in tensors.items() if part.device.type == "cpu")
    options: list[tuple[torch.device, tuple[int, ...]]] = [(device, ()) for device in devices]
    if 0 < len(on_host) < len(tensors):
        options.insert(1, (devices[0], on_host))
    store, first = pyro.get_param_store(), None
    known = {*store.keys()}
    for device, kept in options:
        try:
            found = look(moved(batch, device, kept))
            if first is not None and device.type == "cpu":
                warn(f"Data go to the CPU, as the pair doesn't run on '{devices[0]}': {first}")
            return found, kept
        except PairError as error:
            first = first or error
            for name in {*store.keys()} - known:  # they were made where the pair doesn't run
                del store[name]
            if not is_of_devices(error):
                raise
    assert first is not None  # noqa: S101
    raise first
