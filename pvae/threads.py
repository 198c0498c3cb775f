"""One thread at a time, where what belongs to the whole process is used.

Pyro's handlers and its parameter store, torch's generators, and the modes of modules are shared by
all threads. Every tool holds one lock while it runs, so tools called from several threads run one
after another and give the numbers that they give in one thread. Plain Pyro in a thread beside a
tool, and draws from torch's global generators, which new networks make too, don't take the lock:
whoever starts such a thread keeps them apart.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from pvae.errors import PairError, warn
from pvae.internals import handlers

__all__ = ["PATIENCE", "alone", "check_outside"]

PATIENCE = 30.0
"""Seconds after which a thread that waits for another one says so."""

Undo = Callable[[], object]


class _Turn:
    """The lock, and what the thread that has it is going to put back, outermost block first."""

    def __init__(self) -> None:
        self.lock, self.blocks = threading.RLock(), list[tuple[int, Undo]]()

    def leave(self, block: tuple[int, Undo]) -> None:
        """Ends a block; with the outermost one also those whose generators were abandoned."""
        is_first = self.blocks[:1] == [block]
        for each in reversed(self.blocks) if is_first else [block]:
            self.blocks.remove(each)
            try:
                each[1]()
            finally:
                self.lock.release()


_turn = _Turn()


def _renew() -> None:
    global _turn
    _turn = _Turn()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def alone(undo: Undo = lambda: None) -> Iterator[None]:
    """Keeps other threads out of pvae's tools until the block ends; one thread may nest it.

    Arguments:
        undo: Puts back what the block changes. It is called as the block ends, or as the outermost
            block ends, where a generator that holds this one was left in the middle: an error's
            traceback may keep that alive for long. Whether there are gradients is as it was before
            the outermost block.
    """
    turn = _turn
    if not turn.lock.acquire(timeout=PATIENCE):
        warn(
            f"This thread has waited {PATIENCE:g} s for a tool of pvae in another thread, and goes "
            "on waiting: Pyro's handlers and torch's generators are the whole process's. If that "
            "tool waits for this thread, say for data, neither will end."
        )
        turn.lock.acquire()
    back = partial(torch.set_grad_enabled, torch.is_grad_enabled())
    block = threading.get_ident(), lambda: (undo(), turn.blocks or back())
    turn.blocks.append(block)
    try:
        yield
    finally:
        if block in turn.blocks and block[0] == threading.get_ident():
            turn.leave(block)


def check_outside(tool: str) -> None:
    """Refuses a tool called inside a program, a plate or another handler of Pyro's.

    The handler would take hold of each of the tool's own runs of the pair.

    Raises:
        PairError: If there is a handler around the call.
    """
    if names := [type(handler).__name__ for handler in handlers()]:
        raise PairError(
            tool,
            "a call outside of Pyro's programs and handlers",
            f"a call under {', '.join(dict.fromkeys(names))}",
            [
                "pvae.Pair(poutine.condition(model, data=...), guide): handlers around programs",
                "vae.encode(x), vae.decode(z) or vae.sample(n), inside a program",
                "plain Pyro in another thread only while no tool runs",
            ],
        )
