"""What a step must not do to be captured: wait for the device, or change what is on the host.

A step is run once under torch's own check for waits before it is captured, so that no capture
fails half way. The same run says which tensors it uses that were there before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pvae.internals import COPIES, FRESH, Dispatch, Operation, tensors_in, version, written
from pvae.origin import first_line, site_and_line
from pvae.pair.held import Place

__all__ = ["Filling", "Used", "reason", "refusing_waits"]

_MAKERS = {torch.tensor, torch.as_tensor}
_MOST_FILLED = 64  # entries of a tensor that are written one by one
_MOST_COMPARED = 16  # entries of a tensor on the host that are compared by value


class Used(Dispatch):
    """Notes which tensors a step uses that were there before, and refuses what a graph can't do.

    A graph has the addresses of tensors on the device, and the values of those on the host, which
    a step mustn't change, or draw, or send to the device.

    Arguments:
        device: Where the step runs.
        batch: What it is called with, which is other tensors each time.
    """

    def __init__(self, device: torch.device, batch: Sequence[Tensor]) -> None:
        super().__init__()
        self._has_host = device.type != "cpu"
        self._batch_there = {_memory_of(x) for x in batch if _is_on_host(x) and self._has_host}
        self._made = {*map(_memory_of, batch)}
        self._found: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self,
        func: Operation,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        for tensor in given if func is not FRESH else ():
            if (place := _memory_of(tensor)) not in self._made:
                self._found.setdefault(place, tensor)
        if self._batch_there.intersection(map(_memory_of, given)):
            raise RuntimeError("it reads a tensor of the batch on the CPU")
        if self._has_host:
            for tensor in written(func, args, kwargs):
                if _is_on_host(tensor) and _memory_of(tensor) not in self._made:
                    shape = tuple(tensor.shape)
                    raise RuntimeError(f"it changes a tensor of shape {shape} on the CPU")
        result = func(*args, **kwargs)
        results = tensors_in(result)
        if self._has_host:
            if func in COPIES and len({*map(_is_on_host, (*given, *results))}) > 1:
                raise RuntimeError("it moves a tensor between CPU and device")
            if torch.Tag.nondeterministic_seeded in func.tags and all(map(_is_on_host, results)):
                raise RuntimeError("it draws on the CPU")
        self._made |= {*map(_memory_of, results)} - self._found.keys()
        return result

    def places(self) -> list[Place]:
        """What is to be the same at each replay: addresses on the device, values on the host."""
        there = [x for x in self._found.values() if not _is_on_host(x)]
        hosts = [x for x in self._found.values() if self._has_host and _is_on_host(x)]
        names = [f"a tensor of shape {tuple(x.shape)}" for x in (*hosts, *there)]
        on_cpu, memory = [f"{n} on the CPU" for n in names[: len(hosts)]], names[len(hosts) :]
        return [
            Place("", on_cpu, lambda: [_value_of(x) for x in hosts]),
            Place("memory", memory, lambda: [x.data_ptr() for x in there]),
        ]


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _value_of(tensor: Tensor) -> float | tuple[float, ...]:
    """A number for a tensor of no dimension; of a large tensor, how often it was written to."""
    if tensor.numel() > _MOST_COMPARED:
        return version(tensor)
    values: list[float] = tensor.detach().flatten().tolist()
    return tuple(values) if tensor.dim() else values[0]


class Filling(TorchFunctionMode):
    """Has numbers written to the device by kernels, where ``torch.tensor`` would copy them there.

    Torch's distributions make a tensor of each number among their parameters; the copy waits, and
    what waits has no graph.
    """

    def __torch_function__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in _MAKERS and args and _is_of_numbers(args[0]):
            device = torch.device(kwargs.get("device") or torch.get_default_device())
            if device.type != "cpu":
                host = func(*args, **{**kwargs, "device": "cpu"})
                if host.numel() <= _MOST_FILLED:
                    return _filled(host, device)
        return func(*args, **kwargs)


def _is_of_numbers(data: object) -> bool:
    if isinstance(data, (list, tuple)):
        return all(map(_is_of_numbers, data))
    return isinstance(data, (bool, int, float))


def _filled(host: Tensor, device: torch.device) -> Tensor:
    """The same tensor on the device, to which nothing is copied."""
    numbers: list[float] = host.detach().flatten().tolist()
    each = [torch.full((), number, dtype=host.dtype, device=device) for number in numbers]
    flat = torch.stack(each) if each else host.new_empty(0, device=device)
    return flat.reshape(host.shape).requires_grad_(host.requires_grad)


@contextmanager
def refusing_waits(device: torch.device) -> Iterator[None]:
    """Has each operation raise that would wait for the device, in any thread."""
    if device.type != "cuda":
        yield
        return
    try:
        before = torch.cuda.get_sync_debug_mode()
    except AttributeError:  # a build of torch without CUDA has none, nor any CUDA of its own
        before = 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def reason(error: BaseException) -> str:
    """What went wrong in the first place, and at which of the user's lines."""
    if "previous error during capture" in str(error):  # which its end raises
        error = error.__context__ or error
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    return f"{first_line(first)}{site_and_line(error)}"
