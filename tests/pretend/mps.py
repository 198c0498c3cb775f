"""The Python half of the pretend MPS: what ``torch.mps`` asks of a build with MPS."""

from __future__ import annotations

import ctypes

import torch

from tests.pretend.tensors import patch_tensors, put


def patch(library: ctypes.CDLL) -> None:
    """Lets ``torch.mps`` be that of a Mac."""
    generator = torch.ops.pretend.generator()
    put(torch.backends.mps, {"is_available": lambda: True, "is_built": lambda: True})
    put(torch._C, {"_has_mps": True, "_mps_is_available": lambda: True})
    put(torch._C, {"_mps_get_default_generator": lambda: generator})
    put(torch.mps, {"synchronize": lambda: None, "empty_cache": lambda: None})
    put(torch.mps, {"current_allocated_memory": lambda: library.pretend_allocated()})
    put(torch.mps, {"driver_allocated_memory": lambda: library.pretend_allocated()})
    device = torch.device("mps")
    put(torch.accelerator, {"current_accelerator": lambda check_available=False: device})
    put(torch.accelerator, {"is_available": lambda: True, "device_count": lambda: 1})
    put(torch.accelerator, {"synchronize": lambda device=None: None})
    patch_tensors("mps")
