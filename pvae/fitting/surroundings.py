"""What is around a training: the device that it is on, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pvae import terms as t
from pvae.errors import ArgumentError

__all__ = ["on_interrupt", "place"]


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

    def handle(signum: int, frame: Any) -> None:
        if stop.is_set() and callable(before):
            before(signum, frame)
        stop.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def place(
    model: Any, guide: Any, device: str | torch.device, data: Any = None
) -> tuple[torch.device, torch.dtype]:
    """Moves modules to the device; returns it, and the type of their first floating tensor.

    Functions can't be moved: ``"auto"`` is then where the data are.
    """
    modules = [m for m in (model, guide) if isinstance(m, nn.Module)]
    tensors = [p for m in modules for p in (*m.parameters(), *m.buffers()) if p.is_floating_point()]
    if device == "auto":
        where = t.home_of((), data).device
        if tensors:
            where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            where = torch.device(device)
        except RuntimeError as error:
            raise ArgumentError("device", "'auto', 'cpu', 'cuda', ...", repr(device)) from error
        if where.type == "cuda" and not torch.cuda.is_available():
            raise ArgumentError(
                "device",
                "a device of this machine",
                "cuda, and there is none",
                ["device='auto'", "pvae doctor"],
            )
    for module in modules:
        module.to(where)
    return where, tensors[0].dtype if tensors else torch.get_default_dtype()
