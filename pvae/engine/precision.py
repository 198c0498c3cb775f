"""Networks in bfloat16, densities in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from pvae import terms as t
from pvae.errors import ArgumentError, PairError

__all__ = ["PRECISIONS", "Precision", "check_densities", "mixed"]

Precision = Literal["full", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@contextlib.contextmanager
def mixed(structure: t.Structure) -> Iterator[None]:
    """Layers with parameters compute in bfloat16 and return what the pair's own type is.

    What is between layers, and every distribution, stays in the pair's type.
    """
    if structure.dtype != torch.float32:
        raise ArgumentError("precision", "a pair in float32", str(structure.dtype))

    def widen(_: object, __: object, output: object) -> object:
        if isinstance(output, Tensor) and output.dtype == torch.bfloat16:
            return output.float()
        return output

    with contextlib.ExitStack() as hooks:
        for module in structure.modules:
            if any(True for _ in module.parameters(recurse=False)) and not any(module.children()):
                hooks.callback(module.register_forward_hook(widen).remove)
        hooks.enter_context(torch.autocast(structure.device.type, torch.bfloat16))
        yield


def check_densities(terms: t.Terms) -> None:
    """Refuses a density that bfloat16 has got into."""
    for site in terms.sites.values():
        for log_density in (site.log_p, site.log_q):
            if log_density is not None and log_density.dtype != torch.float32:
                fixes = ["matrix products in modules like nn.Linear", ".float() on what they give"]
                expected = "a log density in float32 with precision='bf16'"
                raise PairError(f"site '{site.name}'", expected, str(log_density.dtype), fixes)
