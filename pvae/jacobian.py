"""The Jacobian of a code with respect to the data, in the Frobenius norm, datum by datum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pvae.annotations import strict
from pvae.errors import PairError, check_int

__all__ = ["differentiable_twice", "squared_jacobian_norm", "squared_norm_of"]


def differentiable_twice() -> AbstractContextManager[None]:
    """Makes what runs inside twice differentiable, by turning torch's fused attention off."""
    return sdpa_kernel(SDPBackend.MATH)


@strict
def squared_jacobian_norm(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    num_probes: int | None = None,
    max_entries: int = 2**24,
    create_graph: bool = False,
) -> Tensor:
    r"""The squared Frobenius norm :math:`\|\partial z / \partial x\|_F^2` for each datum.

    Exact, it takes one backward pass for each entry of z, several of them at once. With probes it
    is Hutchinson's estimate :math:`\frac1P \sum_p \|v_p^T J\|^2`, v standard normal, which is
    unbiased and whose variance is :math:`2 \|J J^T\|_F^2 / P` (its root, the norm, is then
    estimated too low, by about :math:`\|J J^T\|_F^2 / (4 P \|J\|_F^3)`).

    Arguments:
        function: From data to codes, each from its own datum alone; shape ``(N, ...)`` both.
        x: Data.
        num_probes: P; None for the exact norm.
        max_entries: The most entries of the Jacobian that are in memory at once.
        create_graph: Whether the result is to be differentiated.

    References:
        A stochastic estimator of the trace of the influence matrix (Hutchinson, 1990),
        https://doi.org/10.1080/03610919008812866

    Returns:
        Shape ``(N,)``.

    Example:
        >>> squared_jacobian_norm(lambda x: 3 * x, torch.zeros(2, 5))
        tensor([45., 45.])
    """
    if num_probes is not None:
        check_int("num_probes", num_probes)
    with torch.enable_grad(), differentiable_twice():
        leaf = x.detach().requires_grad_()
        z = function(leaf)
    return squared_norm_of(
        z, leaf, num_probes=num_probes, max_entries=max_entries, create_graph=create_graph
    )


@strict
def squared_norm_of(
    z: Tensor,
    x: Tensor,
    *,
    num_probes: int | None = None,
    max_entries: int = 2**24,
    create_graph: bool = False,
) -> Tensor:
    """The same norm for codes z that have been computed from ``x``, a tensor with a gradient."""
    if z.dim() < 1 or len(z) != len(x):
        fixes = ["codes with a row for each datum"]
        raise PairError("Jacobian", f"codes of {len(x)} data", f"shape {tuple(z.shape)}", fixes)
    if not z.requires_grad:
        return x.new_zeros(len(x))  # they don't depend on the data
    with torch.enable_grad():
        flat = z.reshape(len(x), -1)
        if num_probes is None:
            size = flat.shape[1]
            probes = torch.eye(size, dtype=flat.dtype, device=flat.device)
            probes = probes[:, None].expand(size, *flat.shape)
        else:
            probes = torch.randn(num_probes, *flat.shape, dtype=flat.dtype, device=flat.device)
        keep = {"create_graph": create_graph, "retain_graph": True, "allow_unused": True}

        def part(vectors: Tensor) -> Tensor:
            (rows,) = torch.autograd.grad(flat, x, vectors, is_grads_batched=True, **keep)
            return (
                flat.new_zeros(len(flat)) if rows is None else rows.flatten(2).square().sum((0, 2))
            )

        chunks = probes.split(max(1, max_entries // max(1, x.numel())))
        run: Callable[[Tensor], Tensor] = part
        if create_graph and len(chunks) > 1:
            run = functools.partial(checkpoint, part, use_reentrant=False)
        total = functools.reduce(torch.add, map(run, chunks))
    total = total if num_probes is None else total / num_probes
    return total if create_graph else total.detach()
