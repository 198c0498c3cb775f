"""The Python half of the pretend CUDA: what ``torch.cuda`` asks of a build with CUDA."""

from __future__ import annotations

import ctypes
import threading
import time
from types import SimpleNamespace
from typing import Any

import torch

from tests.pretend.tensors import patch_tensors, put

MEMORY = 16 * 2**30
MODES = {"default": 0, "warn": 1, "error": 2}


class Stream:
    """All work is done at once, so a stream is a name: which one is current, which one captures."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = torch.device("cuda", 0)
        self.priority = priority
        self.cuda_stream = id(self)

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        not_in_capture("cudaStreamSynchronize")

    def query(self) -> bool:
        not_in_capture("cudaStreamQuery")
        return True

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def __enter__(self) -> Stream:
        streams.__dict__.setdefault("left", []).append(current_stream())
        set_stream(self)
        return self

    def __exit__(self, *_: object) -> None:
        set_stream(streams.left.pop())


class Event:
    """A point in a stream, which knows the time at which it was passed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        not_in_capture("cudaEventSynchronize")

    def query(self) -> bool:
        not_in_capture("cudaEventQuery")
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


DEFAULT = Stream()
streams = threading.local()


def current_stream(device: Any = None) -> Stream:
    return getattr(streams, "current", DEFAULT)


def set_stream(stream: Stream | None) -> None:
    if stream is not None:
        streams.current = stream


class OnStream:
    """As torch's own: what it entered it leaves, after an error too, if it is asked to."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before = current_stream()
        set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        set_stream(self.before)


def not_in_capture(call: str) -> None:
    """Raises where a capture forbids the call, and spoils that capture, as CUDA does."""
    from tests.pretend import graphs

    graphs.forbid(call)


def patch(library: ctypes.CDLL) -> None:
    """Lets ``torch.cuda`` be that of a machine with one GPU."""
    from tests.pretend import graphs

    everywhere(state_of(library))
    put(torch.cuda, graphs.names(library))
    for name in ("CUDAGraph", "is_current_stream_capturing", "graph_pool_handle"):
        setattr(torch.cuda.graphs, name, getattr(torch.cuda, name))
    put(torch.cuda.streams, {"Stream": Stream, "Event": Event})
    put(torch.backends.cuda, {"is_built": lambda: True})
    # torch._dynamo imports one, torch.cuda.graph calls the other.
    put(torch._C, {"_cuda_getCurrentRawStream": lambda index: 0})
    put(torch._C, {"_host_emptyCache": lambda: None})
    device = torch.device("cuda")
    put(torch.accelerator, {"current_accelerator": lambda check_available=False: device})
    put(torch.accelerator, {"is_available": lambda: True, "device_count": lambda: 1})
    put(torch.accelerator, {"current_stream": current_stream, "current_device_index": lambda: 0})
    put(torch.accelerator, {"synchronize": torch.cuda.synchronize})
    put(torch.Tensor, {"record_stream": lambda self, stream: None})
    patch_tensors("cuda")


def everywhere(names: dict[str, Any]) -> None:
    """In ``torch.cuda`` and in those of its modules that have taken the name from there."""
    put(torch.cuda, names)
    for module in (torch.cuda.random, torch.cuda.memory):
        put(module, {name: value for name, value in names.items() if hasattr(module, name)})


def state_of(library: ctypes.CDLL) -> dict[str, Any]:
    properties = SimpleNamespace(
        name="pretend", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132
    )

    def synchronize(device: Any = None) -> None:
        not_in_capture("cudaDeviceSynchronize")

    def set_device(device: Any) -> None:
        if (torch.device("cuda", device) if isinstance(device, int) else device).index:
            raise RuntimeError("CUDA error: invalid device ordinal")

    def free(device: Any = None) -> tuple[int, int]:
        return MEMORY - library.pretend_allocated(), MEMORY

    def set_sync_debug_mode(mode: int | str) -> None:
        library.pretend_set_sync_debug(MODES[mode] if isinstance(mode, str) else mode)

    return {
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "_initialized": True,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "default_generators": (torch.ops.pretend.generator(),),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": set_device,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "synchronize": synchronize,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": lambda: library.pretend_get_sync_debug(),
        "mem_get_info": free,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: library.pretend_allocated(),
        "max_memory_allocated": lambda device=None: library.pretend_peak(),
        "memory_reserved": lambda device=None: library.pretend_allocated(),
        "max_memory_reserved": lambda device=None: library.pretend_peak(),
        "reset_peak_memory_stats": lambda device=None: library.pretend_reset_peak(),
        "Stream": Stream,
        "Event": Event,
        "stream": OnStream,
        "set_stream": set_stream,
        "current_stream": current_stream,
        "default_stream": lambda device=None: DEFAULT,
    }
