"""Makes this process one with a pretend device; called before torch is imported."""

from __future__ import annotations

import ctypes
import sys

from tests.pretend.build import operations


def load(kind: str, path: str) -> None:
    """Loads the library at ``path`` as a device of the kind ``"cuda"`` or ``"mps"``."""
    if "torch" in sys.modules:
        raise RuntimeError("the pretend device has to be there before torch is imported")
    library = ctypes.CDLL(path)
    library.pretend_allocated.restype = library.pretend_peak.restype = ctypes.c_int64
    texts = ["\n".join(sorted(names)).encode() for names in operations()]
    library.pretend_install(kind.encode(), *texts)
    if kind == "cuda":
        from tests.pretend.cuda import patch
    else:
        from tests.pretend.mps import patch
    patch(library)
