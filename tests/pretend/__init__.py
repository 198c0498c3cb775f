"""A pretend CUDA or MPS device, for machines that have none: see README.md beside this file."""

from __future__ import annotations

import os

LOADED = "PVAE_PRETEND"
"""In a process on the pretend device, this variable names the kind and the library."""


def kind() -> str | None:
    """``"cuda"`` or ``"mps"`` in a process on the pretend device, else None."""
    return os.environ.get(LOADED, "").partition(":")[0] or None
