"""Plain torch, by hand; options: ``"default"`` Adam, ``"fused"``, ``"compiled"``, ``"captured"``.

The scale is exp(log variance / 2). The rate of ``mlp`` and ``conv`` is in closed form, that of
``flow`` is drawn. ``"compiled"`` is fused Adam, and torch.compile of the loss; ``"captured"`` is
fused Adam, and the whole step as one CUDA graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peers.common import FLOW, HEAD, HIDDEN, LATENT, LR, PIXELS, Case, Side, images


def layers(widths: tuple[int, ...], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    found: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        found += [nn.Linear(before, after), activation()]
    return nn.Sequential(*found[:-1])


def networks(model: str) -> nn.ModuleList:
    """Encoder and decoder."""
    latent, hidden = LATENT[model], HIDDEN[model]
    if model == "conv":
        first, second = hidden
        encoder = nn.Sequential(
            nn.Conv2d(1, first, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(second * 49, HEAD),
            nn.ReLU(),
            nn.Linear(HEAD, 2 * latent),
        )
        decoder = nn.Sequential(
            nn.Linear(latent, HEAD),
            nn.ReLU(),
            nn.Linear(HEAD, second * 49),
            nn.Unflatten(1, (second, 7, 7)),
            nn.Upsample(14),
            nn.ReLU(),
            nn.Conv2d(second, first, 3, padding=1),
            nn.Upsample(28),
            nn.ReLU(),
            nn.Conv2d(first, 1, 3, padding=1),
        )
        return nn.ModuleList([encoder, decoder])
    decoder = layers((latent, *hidden[::-1], PIXELS), nn.Tanh if model == "iwae" else nn.ReLU)
    if model == "flow":
        import zuko

        return nn.ModuleList([zuko.flows.NICE(latent, PIXELS, **FLOW), decoder])
    activation = nn.Tanh if model == "iwae" else nn.ReLU
    return nn.ModuleList([layers((PIXELS, *hidden, 2 * latent), activation), decoder])


def elbo(pair: nn.ModuleList, x: Tensor) -> Tensor:
    encoder, decoder = pair
    loc, log_var = encoder(x).chunk(2, -1)
    z = loc + (0.5 * log_var).exp() * torch.randn_like(loc)
    distortion = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
    rate = 0.5 * (log_var.exp() + loc.square() - 1 - log_var).sum()
    return (distortion + rate) / len(x)


def iwae(pair: nn.ModuleList, x: Tensor, draws: int) -> Tensor:
    encoder, decoder = pair
    loc, log_var = encoder(x).chunk(2, -1)
    noise = torch.randn(draws, *loc.shape, device=x.device)
    z = loc + (0.5 * log_var).exp() * noise
    logits = decoder(z)
    target = x.expand_as(logits)
    distortion = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
    rate = 0.5 * (z.square() - noise.square() - log_var).sum(-1)
    log_weight = -distortion - rate
    return -(log_weight.logsumexp(0) - math.log(draws)).mean()


def flow(pair: nn.ModuleList, x: Tensor) -> Tensor:
    guide, decoder = pair
    z, log_q = guide(x).rsample_and_log_prob()
    log_prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
    distortion = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
    return (distortion + (log_q - log_prior).sum()) / len(x)


def stream(x: Tensor, batch: int) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(len(x), device=x.device)
        for start in range(0, len(x), batch):
            yield x[order[start : start + batch]]


def captured(step: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """The step as a graph, for batches of the example's shape."""
    batch, stream = example.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(batch)

    def replay(x: Tensor) -> Tensor:
        batch.copy_(x)
        graph.replay()
        return loss.clone()

    return replay


def make(case: Case, option: str) -> Side:
    torch.set_num_threads(1)
    torch.manual_seed(case.seed)
    pair = networks(case.model).to(case.device)
    fused, capturable = None if option == "default" else True, option == "captured"
    optimizer = torch.optim.Adam(pair.parameters(), lr=LR, fused=fused, capturable=capturable)
    x = torch.from_numpy(images(case)).to(case.device)
    if case.model == "conv":
        x = x.reshape(-1, 1, 28, 28)

    def loss_of(batch: Tensor) -> Tensor:
        if case.model == "iwae":
            return iwae(pair, batch, case.draws)
        return flow(pair, batch) if case.model == "flow" else elbo(pair, batch)

    compute: Any = torch.compile(loss_of) if option == "compiled" else loss_of
    source = stream(x, case.batch)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = compute(batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    once = captured(step, x[: case.batch]) if option == "captured" else step

    def run(steps: int) -> float:
        return float(torch.stack([once(batch) for batch in itertools.islice(source, steps)]).mean())

    return Side(run, sum(p.numel() for p in pair.parameters()), ("torch",))
