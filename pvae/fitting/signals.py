"""Signals that are sent to a process before it is ended, as by a cluster's scheduler.

The training finishes its step and writes a checkpoint; then the signal takes its course. A handler
that was there before is called, and where it returns, the training goes on; without one, the
program ends by ``SystemExit`` with code 128 + the signal's number.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pvae.distributed import World
from pvae.errors import warn

__all__ = ["Signals", "waiting_for_signals"]

Handler = Callable[[int, FrameType | None], object] | int | None

NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2")
"""What schedulers send: at the end of the time, or where another job takes the place."""


class Signals:
    """What has been sent to any of the processes that train together.

    Arguments:
        world: The processes.
        folder: Where the training is saved, if it is.
        every: Steps between two questions to the other processes.
    """

    def __init__(self, world: World, folder: Path | None, every: int) -> None:
        self.world = world
        self.folder = folder
        self.every = every
        self.before: dict[int, Handler] = {}
        self.got = 0

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """The handler: nothing is done until the step's end."""
        self.got = number

    def agreed(self, step: int) -> int:
        """Number of a signal that all processes know of after this step, 0 if there is none."""
        if self.world.size > 1 and step % self.every:
            return 0
        number = self.world.highest(self.got)
        self.got = 0 if number else self.got
        return number

    def deliver(self, number: int) -> None:
        """Lets a signal take its course, when the training has been saved."""
        before = self.before.get(number)
        if callable(before):
            before(number, None)
            return
        if self.world.is_first:
            saved = "Nothing is saved, as fit() has no folder."
            if self.folder is not None:
                saved = f"It is saved in {self.folder}; resume=True goes on."
            warn(f"{signal.Signals(number).name}: the training ends here. {saved}")
        raise SystemExit(128 + number)


@contextmanager
def waiting_for_signals(signals: Signals) -> Iterator[Signals]:
    """Handles signals while a training runs; handlers that were there before come back.

    One that comes after the last step is delivered at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    signals.before = {n: signal.getsignal(n) for n in numbers}
    ignored = {n for n, handler in signals.before.items() if handler in (signal.SIG_IGN, None)}
    taken = [n for n in numbers if n not in ignored]
    for number in taken:
        signal.signal(number, signals.note)
    try:
        yield signals
    finally:
        for number in taken:
            signal.signal(number, signals.before[number])
    if signals.got:
        signals.deliver(signals.got)
