"""The matrix products of both passes of ``mlp``, alone, into memory that is there; no training.

Caches are as warm as they can be, so that no step takes less.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from peers.common import HIDDEN, LATENT, PIXELS, Case, Side


def make(case: Case, option: str) -> Side:
    torch.set_num_threads(1)
    (hidden,), latent = HIDDEN["mlp"], LATENT["mlp"]
    inner = [(PIXELS, hidden), (hidden, 2 * latent), (latent, hidden), (hidden, PIXELS)]
    products: list[tuple[Tensor, Tensor]] = []
    for number, (before, after) in enumerate(inner):
        weight = torch.randn(after, before, device=case.device)
        x = torch.randn(case.batch, before, device=case.device)
        dy = torch.randn(case.batch, after, device=case.device)
        products += [(x, weight.t()), (dy.t(), x)]
        products += [(dy, weight)] if number else []  # the data need no gradient
    outs = [torch.mm(a, b) for a, b in products]

    def run(steps: int) -> float:
        for _ in itertools.repeat(None, steps):
            for (a, b), out in zip(products, outs, strict=True):
                torch.mm(a, b, out=out)
        return float(outs[0][0, 0])

    return Side(run, 0, ("torch",))
