"""The table of calls, and the data and pairs that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pvae
from pvae import VAE, recipes

D, Q, N = 6, 2, 24


@dataclass(frozen=True)
class Call:
    """What is called, how, and whether its numbers depend on a generator of the device."""

    names: tuple[str, ...]
    run: Callable[[torch.device], Any]
    draws: bool

    @property
    def name(self) -> str:
        return self.run.__name__


CALLS: dict[str, Call] = {}


def call(*names: str, draws: bool = False) -> Callable[[Callable[[torch.device], Any]], Any]:
    """Puts a call into the table: the public names that it calls, or that it returns one of."""

    def put(run: Callable[[torch.device], Any]) -> Callable[[torch.device], Any]:
        assert run.__name__ not in CALLS, f"two calls are named {run.__name__}"
        CALLS[run.__name__] = Call(names, run, draws)
        return run

    return put


ELSEWHERE: dict[str, str] = {
    **dict.fromkeys((f"errors.{name}" for name in pvae.errors.__all__), "no tensors"),
    **dict.fromkeys(
        (
            *("bounds.Family", "engine.Asked", "engine.Engine", "engine.OptimizerLike"),
            *("engine.Precision", "estimate.BoundKind", "mmd.Kernel", "pair.Batch"),
            *("pvae.Options", "options.Options", "recipes.PairOptions"),
            *("data.Axes", "diagnostics.Verdict", "terms.GuideStates"),
        ),
        "a type",
    ),
    **dict.fromkeys(("pvae.PvaeError", "pvae.PvaeWarning", "engine.UncompilableError"), "an error"),
    **dict.fromkeys(
        (
            *("distributed.World", "distributed.current", "distributed.is_started_by_torchrun"),
            *("distributed.job", "distributed.joined", "distributed.restarts"),
            "distributed.stop_with_launcher",
        ),
        "several processes: tests/test_distributed.py",
    ),
    **dict.fromkeys(
        (
            *(
                "data.download",
                "data.read_idx",
                "data.Limits",
                "options.progress_bar",
                "options.checked_options",
            ),
            *("options.tool", "diagnostics.table", "diagnostics.bits_per_dimension"),
            *("estimate.with_error", "objectives.table", "pair.as_pair", "pair.as_batch"),
            *("pair.only_site", "terms.only_site", "networks.activation_named"),
            *("diagnostics.Threshold", "cli.main", "checkpoint.other_versions"),
            "networks.check_weights",
        ),
        "numbers and words of the host",
    ),
}
"""Public names without a call, and why."""


def rows(device: torch.device, n: int = N, d: int = D) -> Tensor:
    """Data of 0 and 1."""
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, d, generator=generator).round().to(device)


def normal(device: torch.device, *shape: int) -> Tensor:
    """Standard normal draws, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(device)


def factors(device: torch.device, n: int = 240) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 3, (n, 2), generator=generator).to(device)


def codes(device: torch.device, n: int = 240) -> Tensor:
    """Codes that know the factors."""
    return factors(device, n) + 0.3 * normal(device, n, 2)


def vae(device: torch.device, **options: Any) -> VAE:
    """A small pair, with the same weights on every device."""
    torch.manual_seed(0)
    return recipes.vae(D, Q, hidden=(4,), **options).to(device)
