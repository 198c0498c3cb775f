"""Context managers for modes: training, evaluation, the capture of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import nn

from pvae.threads import alone

__all__ = [
    "capturing_graph",
    "evaluating",
    "flag_set",
    "in_mode",
    "is_capturing_graph",
    "with_gradients",
]

_capturing: ContextVar[bool] = ContextVar("pvae_capturing", default=False)


@contextmanager
def in_mode(modules: Iterable[nn.Module], *, training: bool) -> Iterator[None]:
    """Puts modules in training or evaluation mode, and each back in the mode that it had."""
    before: list[tuple[nn.Module, bool]] = []

    def restore() -> None:
        for module, was_training in before:
            module.training = was_training

    with alone(undo=restore):
        before += [(module, module.training) for module in modules]
        for module, _ in before:
            module.training = training
        yield


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts modules in evaluation mode, without gradients, and each back in the mode it had."""
    back = partial(torch.set_grad_enabled, torch.is_grad_enabled())
    with in_mode(modules, training=False), alone(undo=back):
        torch.set_grad_enabled(False)
        yield


@contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients as tools want them, whatever the caller has switched off around them."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


@contextmanager
def flag_set(flag: ContextVar[bool]) -> Iterator[None]:
    """Sets a context flag temporarily."""
    token = flag.set(True)
    try:
        yield
    finally:
        flag.reset(token)


def capturing_graph() -> AbstractContextManager[None]:
    """Says that operations are being captured as a graph, which has no generators of its own."""
    return flag_set(_capturing)


def is_capturing_graph() -> bool:
    """Whether operations are being captured as a graph."""
    return _capturing.get()
