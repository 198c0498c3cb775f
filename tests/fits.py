"""A small pair, its data, and short fits of it, for the tests of fitting."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

import pvae
from pvae import VAE, recipes

D, Q, N = 6, 2, 40

__all__ = ["D", "N", "Q", "binary", "fit", "same", "state", "vae"]

fit = functools.partial(pvae.fit, progress=False, batch_size=16)


def vae(seed: int = 0, **options: Any) -> VAE:
    torch.manual_seed(seed)
    return recipes.vae(D, Q, hidden=(8,), **options)


def binary(n: int = N) -> Tensor:
    return torch.rand(n, D, generator=torch.Generator().manual_seed(n)).round()


def state(pair: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(pair.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
