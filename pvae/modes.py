"""Training and evaluation mode for a while; each module gets its own mode back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating", "in_mode"]


@contextmanager
def in_mode(modules: Iterable[nn.Module], *, training: bool) -> Iterator[None]:
    """Training or evaluation mode, module by module: what a root holds keeps its own."""
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
