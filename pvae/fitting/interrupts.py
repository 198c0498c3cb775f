"""Ctrl-C during a training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["on_interrupt"]


@contextmanager
def on_interrupt(*, alone: bool) -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event; the second one interrupts as usual.

    Several processes, which couldn't all stop at the same step, are interrupted as usual.
    """
    stop = threading.Event()
    if not alone or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.is_set() and callable(before):
            before(signum, frame)
        stop.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
