"""Networks in bfloat16, densities in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from pvae import terms as t
from pvae.distributions import base_of
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
    """Refuses a density that bfloat16 has got into.

    So it has where an argument of the distribution is in it: on CUDA autocast takes powers and
    logarithms in float32, of numbers that have been rounded by then.
    """
    for site in terms.sites.values():
        scores = [score.dtype for score in (site.log_p, site.log_q) if score is not None]
        wrong = [dtype for dtype in scores if dtype != torch.float32]
        for fn in (site.model, site.guide):
            parts = () if fn is None else vars(base_of(fn)).values()
            dtypes = {x.dtype for x in parts if isinstance(x, Tensor)}
            wrong += dtypes & {torch.bfloat16}
        if wrong:
            fixes = ["matrix products in modules like nn.Linear", ".float() on what they give"]
            expected = "a log density in float32 with precision='bf16'"
            raise PairError(f"site '{site.name}'", expected, str(wrong[0]), fixes)
