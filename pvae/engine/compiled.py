"""A function of tensors as one compiled graph, whatever Python and Pyro run in it.

The function runs while torch notes its operations. Tensors that it finds elsewhere (parameters,
buffers, an objective's state) become inputs of the graph, so that the graph reads and writes them
as the function did; everything else, numbers and branches, is what it was in that run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pvae.modes import capturing_graph

__all__ = ["UncompilableError", "compile_function"]

Function = Callable[..., Sequence[Tensor]]


class UncompilableError(Exception):
    """Why a function has no graph."""


def compile_function(function: Function, example: tuple[Tensor, ...]) -> Function:
    """The same function as one graph, for arguments of the example's shapes.

    The function is run twice, with all its effects. Gradients have to be taken inside.

    Arguments:
        function: Of tensors, to a sequence of tensors; may change tensors in place.
        example: What to run it on.

    Raises:
        UncompilableError: If it looks at values on its way, differs from run to run, or uses
            what the compiler doesn't know.
    """
    graph, live = _lifted(*_trace_twice(function, example))
    inputs = [*example, *live]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's, of itself
            compiled = _compile(graph, [x.detach() for x in inputs])
    except Exception as error:  # the compiler's own kinds are many
        raise UncompilableError(f"the compiler fails with {_first_line(error)}") from error

    @torch.no_grad()
    def run(*arguments: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = compiled(*arguments, *live)
        return found

    return run


def _trace_twice(function: Function, example: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """Graphs of two runs, which have to be the same."""
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

    try:
        with pyro.validation_enabled(is_validate=False), capturing_graph():  # it reads values
            first, second = (make_fx(function, tracing_mode="real")(*example) for _ in range(2))
    except Exception as error:
        reason = _first_line(error)
        if "_local_scalar_dense" in str(error):
            reason = "a tensor's value is read on the way, by a branch or a conversion to a number"
        raise UncompilableError(reason) from error
    if first.code != second.code:
        ours, theirs = first.code.splitlines(), second.code.splitlines()
        odd = next(
            (a.strip() for a, b in zip(ours, theirs, strict=False) if a != b),
            "one is longer",
        )
        raise UncompilableError(f"two steps aren't the same program, from '{odd}' on")
    return first, second


def _lifted(graph: Any, again: Any) -> tuple[Any, list[Tensor]]:
    """The graph with tensors that live outside it as further inputs, and those tensors."""
    _number_masks(graph, again)
    live: list[Tensor] = []
    nodes: dict[int, Any] = {}
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor, other = getattr(graph, node.target), getattr(again, node.target)
        if tensor is not other:  # made in the run: a constant, if it is one
            if not torch.equal(tensor, other):
                raise UncompilableError("a tensor made on the way differs from step to step")
            continue
        if id(tensor) not in nodes:
            with graph.graph.inserting_after(last):
                last = nodes[id(tensor)] = graph.graph.placeholder(f"live_{len(live)}")
            live.append(tensor)
        node.replace_all_uses_with(nodes[id(tensor)])
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, live


def _number_masks(graph: Any, again: Any) -> None:
    """Puts the numbers of what a fixed mask picks in place of looking for them.

    How many a mask picks is unknown to a compiler; couplings of flows have such masks.
    """

    def fixed(node: Any) -> Any:
        """The value of what is made of tensors outside the graph alone."""
        if node.op == "get_attr":
            return getattr(graph, node.target)
        draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        parts = [None] if draws else [fixed(a) if hasattr(a, "op") else a for a in node.args]
        is_fixed = node.op == "call_function" and not any(p is None for p in parts)
        return node.target(*parts, **node.kwargs) if is_fixed else None

    for i, node in enumerate(graph.graph.nodes):
        if node.target is torch.ops.aten.nonzero.default:
            numbers = fixed(node)
            if numbers is None:
                raise UncompilableError("how many entries a mask picks depends on the data")
            for one in (graph, again):
                one.register_buffer(f"numbers_{i}", numbers.clone())
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(f"numbers_{i}"))
            graph.graph.erase_node(node)


def _compile(graph: Any, inputs: list[Tensor]) -> Any:
    """The graph compiled so that it draws the numbers that torch does."""
    import torch._inductor.compile_fx as inductor  # slow to import
    from torch._inductor import lowering
    from torch._inductor.decomposition import select_decomp_table

    bernoulli = torch.ops.aten.bernoulli.default
    if bernoulli not in lowering.lowerings:  # else where CI is set it's refused
        lowering.make_fallback(bernoulli, warn=False, override_decomp=True)
    draws = {"fallback_random": True}
    quick = {"size_asserts": False, "alignment_asserts": False}  # of what the compiler itself made
    with torch._inductor.config.patch(draws):
        table = dict(select_decomp_table())
    table.pop(bernoulli, None)
    return inductor.compile_fx(graph, inputs, config_patches=draws | quick, decompositions=table)


def _first_line(error: Exception) -> str:
    first, *_ = (str(error).strip() or type(error).__name__).splitlines()
    return f"{type(error).__name__}: {first}"
