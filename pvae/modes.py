"""Modes for a while: training, evaluation, being recorded as a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import nn

__all__ = ["evaluating", "in_mode", "is_recorded", "raised", "recorded"]

_recorded: ContextVar[bool] = ContextVar("pvae_recorded", default=False)


@contextmanager
def in_mode(modules: Iterable[nn.Module], *, training: bool) -> Iterator[None]:
    """Training or evaluation mode; each module gets its own mode back, not that of its root."""
    before = [(m, m.training) for m in modules]
    for module, _ in before:
        module.training = training
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients."""
    with in_mode(modules, training=False), torch.no_grad():
        yield


@contextmanager
def raised(flag: ContextVar[bool]) -> Iterator[None]:
    """A flag that is up for a while."""
    token = flag.set(True)
    try:
        yield
    finally:
        flag.reset(token)


def recorded() -> AbstractContextManager[None]:
    """Says that operations are being recorded as a graph, which has no generators of its own."""
    return raised(_recorded)


def is_recorded() -> bool:
    """Whether operations are being recorded."""
    return _recorded.get()
