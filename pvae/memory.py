"""How much memory there is: this process's share of the machine's, or a device's."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["memory_of"]

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of(device: torch.device | None = None) -> int:
    """Bytes of memory that a device has in all; without one, those of this machine.

    A container's limit counts. What other work has taken isn't subtracted, as it may end.

    Example:
        >>> memory_of() > 2**20
        True
    """
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return _of_host()


@functools.cache
def _of_host() -> int:
    most = 2**63
    with contextlib.suppress(OSError, ValueError, AttributeError):
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in map(Path, _LIMITS):
        with contextlib.suppress(OSError, ValueError):  # no number says that there is no limit
            most = min(most, int(path.read_text()))
    return most
