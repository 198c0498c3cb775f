"""Devices: which ones pairs run on, which this machine has, and what has to be done on the host.

Pairs run on the CPU, on CUDA and on Apple's MPS. MPS has no float64: what is summed or compared in
double precision is so on the host there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

from pvae.errors import ArgumentError, is_out_of_memory

__all__ = [
    "as_device",
    "automatic",
    "beside",
    "check_use",
    "counts",
    "double",
    "floats",
    "is_of_devices",
    "same_device",
    "sent",
    "synchronize",
]

T = TypeVar("T")

_WIDE = {torch.float64, torch.complex128}
"""What MPS has no type for."""
_DEVICES = re.compile(r"\b(devices?|cpu|cuda|mps)\b", re.IGNORECASE)


def counts() -> dict[str, int]:
    """How many devices of each kind that pairs run on this machine has; the CPU counts as one."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cpu": 1, "cuda": cuda, "mps": int(torch.backends.mps.is_available())}


def as_device(device: str | int | torch.device, where: str = "device") -> torch.device:
    """The device of that name.

    Arguments:
        device: As torch takes it: a name, the number of a GPU, or the device itself.
        where: What gave it, for the message.

    Raises:
        ArgumentError: If it is none, none that pairs run on, or none of this machine.

    Example:
        >>> as_device("cpu")
        device(type='cpu')
        >>> as_device("gpu")
        Traceback (most recent call last):
        ...
        pvae.errors.ArgumentError: device: expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'...
          Try: device='auto'
           or: pvae doctor, which lists this machine's devices
    """
    here, fixes = counts(), [f"{where}='auto'", "pvae doctor, which lists this machine's devices"]
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        expected = "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        raise ArgumentError(where, expected, repr(device), fixes) from error
    if found.type not in here:
        expected = "the CPU, CUDA or Apple's MPS, which pairs run on"
        raise ArgumentError(where, expected, f"'{found}'", fixes)
    if (found.index or 0) >= here[found.type]:
        there = [f"'{kind}'" if n == 1 else f"{n} of '{kind}'" for kind, n in here.items() if n]
        expected = f"a device of this machine, which has {', '.join(there)}"
        raise ArgumentError(where, expected, f"'{found}'", fixes)
    return found


def automatic(tensors: Iterable[Tensor] = (), processes: int = 1) -> torch.device:
    """CUDA where there is one, or else MPS where there is one and can be taken, or else the CPU.

    Arguments:
        tensors: What is to be there.
        processes: How many train together, which they can't on MPS.
    """
    here = counts()
    if here["cuda"]:
        return torch.device("cuda")
    fits = here["mps"] and processes == 1 and _WIDE.isdisjoint(t.dtype for t in tensors)
    return torch.device("mps" if fits else "cpu")


def check_use(device: torch.device, tensors: Iterable[Tensor], processes: int = 1) -> None:
    """Refuses a pair that can't be on a device.

    Arguments:
        device: Where the pair is to be.
        tensors: The pair's.
        processes: How many train it together.

    Raises:
        ArgumentError: If a tensor has no values; if the device is MPS, and a tensor is in float64
            or the processes are many.
    """
    tensors = list(tensors)
    if any(t.is_meta for t in tensors):
        fixes = ["module.to_empty(device='cpu'), and load_state_dict"]
        raise ArgumentError("pair", "tensors with values", "some on the device 'meta'", fixes)
    if device.type != "mps":
        return
    if wide := sorted({str(t.dtype) for t in tensors if t.dtype in _WIDE}):
        expected = "a pair in float32 on 'mps', which has no wider type"
        fixes = ["model.float() and guide.float()", "device='cpu'"]
        raise ArgumentError("device", expected, ", ".join(wide), fixes)
    if processes > 1:
        fixes = ["one process", "device='cpu'"]
        raise ArgumentError("device", "one process on 'mps'", f"{processes}", fixes)


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one, where that of no number is the current one.

    Example:
        >>> same_device(torch.device("cpu"), torch.device("cpu", 0))
        True
    """
    if one.type != other.type or one.index == other.index:
        return one.type == other.type
    current = torch.cuda.current_device() if one.type == "cuda" else 0
    numbers = [current if device.index is None else device.index for device in (one, other)]
    return numbers[0] == numbers[1]


def is_of_devices(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, is of tensors on different devices.

    Example:
        >>> is_of_devices(RuntimeError("Expected all tensors to be on the same device"))
        True
    """
    if is_out_of_memory(error):
        return False
    if isinstance(error, (RuntimeError, TypeError)) and _DEVICES.search(str(error)):
        return True
    return error.__cause__ is not None and is_of_devices(error.__cause__)


def floats(device: torch.device) -> torch.dtype:
    """The widest floating type that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64: where it is, or on the host if its device has no such type.

    Example:
        >>> double(torch.ones(2)).dtype
        torch.float64
    """
    tensor = tensor if floats(tensor.device) == torch.float64 else tensor.cpu()
    return tensor.double()


def beside(thing: T | Tensor, tensor: Tensor) -> T | Tensor:
    """The thing itself, or, of a tensor, its copy on the other one's device.

    Example:
        >>> beside(2.0, torch.ones(2))
        2.0
    """
    return thing.to(tensor.device) if isinstance(thing, Tensor) else thing


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to CUDA it goes by way of pinned memory, and nobody waits for it.

    Example:
        >>> sent(torch.ones(2), torch.device("cpu"))
        tensor([1., 1.])
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
