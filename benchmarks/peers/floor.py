"""What a step of ``mlp`` can't do without, each alone; no training.

The option ``"products"``: the matrix products of both passes, into memory that is there;
``"adam"``: the fused update. Caches are as warm as they can be, so these are lower bounds.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from peers.common import HIDDEN, LATENT, LR, PIXELS, Case, Side


def make(case: Case, option: str) -> Side:
    torch.set_num_threads(1)
    (hidden,), latent = HIDDEN["mlp"], LATENT["mlp"]
    inner = [(PIXELS, hidden), (hidden, 2 * latent), (latent, hidden), (hidden, PIXELS)]
    weights = [torch.randn(after, before, device=case.device) for before, after in inner]
    biases = [torch.randn(after, device=case.device) for _, after in inner]
    parameters = [*weights, *biases]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    products: list[tuple[Tensor, Tensor]] = []
    for number, weight in enumerate(weights):
        x = torch.randn(case.batch, weight.shape[1], device=case.device)
        dy = torch.randn(case.batch, weight.shape[0], device=case.device)
        products += [(x, weight.t()), (dy.t(), x)]
        products += [(dy, weight)] if number else []  # the data need no gradient
    outs = [torch.mm(a, b) for a, b in products]

    def run(steps: int) -> float:
        for _ in itertools.repeat(None, steps):
            if option == "adam":
                optimizer.step()
                continue
            for (a, b), out in zip(products, outs, strict=True):
                torch.mm(a, b, out=out)
        return float(outs[0][0, 0])

    return Side(run, sum(p.numel() for p in parameters), ("torch",))
