"""One run of a pair on a batch, as Pyro's traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pvae.errors import PairError, PvaeError
from pvae.types import Program

__all__ = ["Batch", "as_batch", "num_rows_of", "run_pair"]

Batch = tuple[Any, ...]
R = TypeVar("R")


def as_batch(batch: object) -> Batch:
    """What a pair is called with, as a tuple; one tensor is a batch of one."""
    if isinstance(batch, Iterable) and not isinstance(batch, Tensor):
        return tuple(batch)
    return (batch,)


def num_rows_of(batch: Batch) -> int | None:
    """Length of the first tensor; None if there is none."""
    return next((len(b) for b in batch if isinstance(b, Tensor) and b.dim()), None)


def run_pair(
    model: Program, guide: Program, batch: Batch, *, model_too: bool = True
) -> tuple[Trace, Trace]:
    """Traces of the guide and of the model replayed against it; errors say which one failed."""
    unwrapped = poutine.unwrap(guide)
    if isinstance(unwrapped, poutine.messenger.Messenger):  # an AutoMessenger runs both itself
        _named("guide", lambda: guide(*batch), batch)
        model_trace, guide_trace = unwrapped.get_traces()
        return guide_trace, model_trace
    guide_trace = _named("guide", lambda: poutine.trace(guide).get_trace(*batch), batch)
    if not model_too:
        return guide_trace, None
    replayed = poutine.replay(model, trace=guide_trace)
    return guide_trace, _named("model", lambda: poutine.trace(replayed).get_trace(*batch), batch)


def _named(what: str, run: Callable[[], R], batch: Batch) -> R:
    try:
        return run()
    except Exception as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        for cause in reversed(chain):  # the first error; the others are Pyro's additions to it
            if isinstance(cause, PvaeError):
                raise cause from None
        first_line = (str(error).strip() or "no message").splitlines()[0]
        fixes = [f"{what}(*batch) on one batch by hand, to see the whole traceback"]
        if "plate" in first_line:
            fixes.insert(0, ".to_event(k) at the site, so that batch_shape is the plates' sizes")
        expected = f"to run when called with ({', '.join(map(_words, batch))})"
        raise PairError(what, expected, f"{type(error).__name__}: {first_line}", fixes) from error


def _words(part: object) -> str:
    if isinstance(part, Tensor):
        return f"{str(part.dtype).removeprefix('torch.')} of shape {tuple(part.shape)}"
    return type(part).__name__
