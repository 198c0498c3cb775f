"""A function of tensors as one compiled graph, whatever Python and Pyro run in it.

The function runs while torch notes its operations. Tensors that it finds elsewhere (parameters,
buffers, an objective's state) become inputs of the graph, so that the graph reads and writes them
as the function did; everything else, numbers and branches, is what it was in that run.

What is used of torch's compiler beyond its documented interface stands in this module alone:
``make_fx``, which records; ``standalone_compile``, which compiles what was recorded, by way of
torch's caches on disk and without the guards that ``torch.compile`` checks at each call; and three
of the compiler's settings. `tests/test_internals.py` fails where one of them moves.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

from pvae.internals import unvalidated
from pvae.modes import capturing_graph
from pvae.origin import site_and_line

__all__ = ["UncompilableError", "compile_function", "compile_graph", "has_compiler"]

T = TypeVar("T")

OPTIONS = {
    "fallback_random": True,  # draws are torch's own, as they are without a compiler
    "size_asserts": False,  # of what the compiler itself has made
    "alignment_asserts": False,
}
"""Settings of torch's compiler."""


class UncompilableError(Exception):
    """Why a function has no graph."""


def has_compiler(device: torch.device) -> bool:
    """Whether it pays to try a graph: on a CPU if there is a C++ compiler; on MPS it doesn't."""
    has_one = any(map(shutil.which, ("c++", "g++", "clang++", "cl")))
    return device.type == "cuda" or (device.type == "cpu" and has_one)


def compile_function(function: Callable[..., T], example: tuple[Tensor, ...]) -> Callable[..., T]:
    """The same function as one graph, for arguments of the example's shapes.

    The function is run twice, with all its effects. Gradients have to be taken inside.

    Arguments:
        function: A function of tensors, to a tensor, or to a named tuple of tensors, dictionaries
            of tensors, and None; may change tensors in place.
        example: What to run it on.

    Raises:
        UncompilableError: If it looks at values on its way, differs from run to run, or uses
            what the compiler doesn't know.
    """
    rebuild: Callable[[Iterator[Tensor]], T]

    def flat(*arguments: Tensor) -> list[Tensor]:
        nonlocal rebuild
        tensors: list[Tensor] = []
        rebuild = _take_apart(function(*arguments), tensors)
        return tensors

    graph, live = _lifted(*_record_twice(flat, example))
    inputs = [x.detach() for x in (*example, *live)]
    try:
        compiled = compile_graph(graph, inputs)
    except Exception as error:  # the compiler's own kinds are many
        raise UncompilableError(f"the compiler fails with {_first_line(error)}") from error

    @torch.no_grad()
    def run(*arguments: Tensor) -> T:
        return rebuild(iter(compiled(*arguments, *live)))

    return run


def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """What torch's compiler makes of a graph by ``make_fx``, for inputs like these.

    The graph's results are a list of tensors.
    """
    for node in graph.graph.nodes:  # one draw is rewritten by the compiler, and this twin isn't
        if node.target is torch.ops.aten.bernoulli.default and not node.kwargs:
            node.target, node.args = torch.ops.aten.bernoulli.Tensor, (node.args[0], node.args[0])
    graph.recompile()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, of itself
        from torch._inductor import standalone_compile  # slow to import

        # Shapes are those of the inputs; where none are given, caches are passed by.
        options = {"config_patches": OPTIONS}
        return standalone_compile(
            graph, [*inputs], dynamic_shapes="from_example_inputs", options=options
        )


def _take_apart(result: object, tensors: list[Tensor]) -> Callable[[Iterator[Tensor]], Any]:
    """Appends the tensors of a result, and returns what makes such a result of other tensors."""
    if isinstance(result, Tensor):
        tensors.append(result)
        return next
    if result is None:
        return lambda _: None
    if isinstance(result, dict):
        named = {name: _take_apart(part, tensors) for name, part in result.items()}
        return lambda others: {name: make(others) for name, make in named.items()}
    assert isinstance(result, tuple)  # noqa: S101
    kind, makers = type(result), [_take_apart(part, tensors) for part in result]
    return lambda others: kind(*(make(others) for make in makers))


def _record_twice(
    function: Callable[..., list[Tensor]], example: tuple[Tensor, ...]
) -> tuple[GraphModule, GraphModule]:
    """Graphs of two runs, which have to be the same."""
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

    try:
        with pyro.validation_enabled(is_validate=False), unvalidated(), capturing_graph(), _Blind():
            first, second = (make_fx(function, tracing_mode="real")(*example) for _ in range(2))
    except Exception as error:
        reason = _first_line(error)
        if "_local_scalar_dense" in str(error):
            reason = "a tensor's value is read on the way, by a branch or a conversion to a number"
        raise UncompilableError(f"{reason}{site_and_line(error)}") from error
    if first.code != second.code:
        lines = zip(first.code.splitlines(), second.code.splitlines(), strict=False)
        odd = next((a.strip() for a, b in lines if a != b), "one is longer")
        raise UncompilableError(f"two steps aren't the same program, from '{odd}' on")
    return first, second


class _Blind(TorchFunctionMode):
    """Has one-hot vectors made without a look at the largest index, as torch's own are."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        return torch.nn.functional.one_hot(tensor)  # as many as there are: that is for the value
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).long()


def _lifted(graph: GraphModule, again: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """The graph with tensors that live outside it as further inputs, and those tensors."""
    _number_masks(graph, again)
    live: list[Tensor] = []
    inputs: dict[int, Node] = {}
    last = next((n for n in reversed(graph.graph.nodes) if n.op == "placeholder"), None)
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor, other = getattr(graph, node.target), getattr(again, node.target)
        if isinstance(tensor, torch.Generator):
            raise UncompilableError("a program draws by a generator of its own")
        if tensor is not other:  # made in the run: a constant, if it is one
            if not torch.equal(tensor, other):
                raise UncompilableError("a tensor made on the way differs from step to step")
            continue
        if id(tensor) not in inputs:
            first = graph.graph.inserting_before  # where a batch has no tensors, at the start
            with graph.graph.inserting_after(last) if last else first(None):
                last = inputs[id(tensor)] = graph.graph.placeholder(f"live_{len(live)}")
            live.append(tensor)
        node.replace_all_uses_with(inputs[id(tensor)])
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, live


def _number_masks(graph: GraphModule, again: GraphModule) -> None:
    """Puts the numbers of what a fixed mask picks in place of looking for them.

    How many a mask picks is unknown to a compiler; couplings of flows have such masks.
    """

    def fixed(node: Node) -> Tensor | None:
        """The value of what is made of tensors outside the graph alone."""
        if node.op == "get_attr":
            return getattr(graph, str(node.target))
        draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        parts = [None] if draws else [fixed(a) if isinstance(a, Node) else a for a in node.args]
        if isinstance(node.target, str) or any(p is None for p in parts):
            return None
        return node.target(*parts, **node.kwargs)

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


def _first_line(error: Exception) -> str:
    first, *_ = (str(error).strip() or type(error).__name__).splitlines()
    return f"{type(error).__name__}: {first}"
