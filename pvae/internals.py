"""Every private attribute of torch and Pyro that pvae uses, each with its reason.

Both may change these without notice, so ``pyproject.toml`` bounds both at the versions that were
tested, and `tests/test_internals.py` fails where one has moved. What is used of torch's compiler
stands in `pvae.engine.compiler`.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "COPIES",
    "DETERMINISTIC",
    "ENUMERATE_DIM",
    "FRESH",
    "BatchNorm",
    "Convolution",
    "Dispatch",
    "Norm",
    "Operation",
    "Pool",
    "abandon_capture",
    "allow_uncaptured",
    "can_skip_on_device",
    "copied_guide",
    "count_as_stepped",
    "fused_adam",
    "guess_plates",
    "handlers",
    "has_step_hooks",
    "hooks_of",
    "import_compiler",
    "mask_of",
    "multiply",
    "network_parts",
    "network_state",
    "norms",
    "pyro_attributes",
    "tensors_in",
    "unvalidated",
    "version",
    "waiting_states",
    "written",
]

# Modules. Libraries derive layers of their own from these, so that naming torch's public layers
# would leave theirs out.

BatchNorm = nn.modules.batchnorm._BatchNorm
"""All batch norms."""

Norm = nn.modules.batchnorm._NormBase
"""All batch norms and instance norms, which keep running statistics."""

Convolution = nn.modules.conv._ConvNd
"""All convolutions, transposed ones among them."""


def copied_guide(guide: nn.Module) -> nn.Module:
    """A deep copy of a guide. Pyro's autoguides lose their model as they are copied, which is kept.

    The copy has the same model, not a copy of it.
    """
    held = [(part, part._model) for part in guide.modules() if isinstance(part, AutoGuide)]
    try:
        copied = copy.deepcopy(guide)
    finally:
        for part, model in held:
            part._model = model
    parts = [part for part in copied.modules() if isinstance(part, AutoGuide)]
    for part, (_, model) in zip(parts, held, strict=True):
        part._model = model
    return copied


def network_parts(module: nn.Module) -> list[object]:
    """A module's own parameters, buffers, modules and hooks, which no public method has as such."""
    hooks = module._forward_pre_hooks, module._forward_hooks
    return [module._parameters, module._buffers, module._modules, *hooks]


def pyro_attributes(module: nn.Module) -> dict[str, object]:
    """The priors and constraints of a PyroModule's attributes, which it keeps for itself."""
    kept = vars(module)
    return {**kept.get("_pyro_samples", {}), **kept.get("_pyro_params", {})}


def network_state(modules: Iterable[nn.Module]) -> list[object]:
    """What modules consist of, and which of their parameters are trained, to be compared fast."""
    state: list[object] = []
    for module in modules:
        own = module._parameters.values()
        state += [*module._modules.values(), *own, *(p.requires_grad for p in own if p is not None)]
    return state


# Pyro's sites and distributions

DETERMINISTIC = "_deterministic"
"""Key in a site's ``infer`` by which `pyro.deterministic` marks it, and nothing else does."""

ENUMERATE_DIM = "_enumerate_dim"
"""Key in a site's ``infer`` of the dimension that Pyro has enumerated it along."""

ENUMERATE_SYMBOL = "_enumerate_symbol"
"""Key in a site's ``infer`` of that dimension's symbol, once its trace's have symbols."""

DIM_TO_SYMBOL = "_dim_to_symbol"
"""Key in a site's ``infer`` of all symbols by dimension, likewise."""


def guess_plates(loss: Any, *programs_and_arguments: Any) -> None:
    """Runs a pair once to count its plates, as Pyro's vectorised ELBOs do before their first loss.

    That run moves the generators, so that a training has Pyro's draws only after it.
    """
    loss._guess_max_plate_nesting(*programs_and_arguments)


def mask_of(fn: MaskedDistribution) -> Tensor | bool:
    """The mask that ``fn.mask(...)`` was given, which no public attribute has."""
    mask: Tensor | bool = fn._mask
    return mask


def handlers() -> tuple[Messenger, ...]:
    """Pyro's handlers around the present line, the outermost first; all threads have one stack."""
    return tuple(runtime._PYRO_STACK)


@contextmanager
def unvalidated() -> Iterator[None]:
    """Has no distribution look at values, not even one that was made while they were to."""
    kind, check = torch.distributions.Distribution, "_validate_sample"
    before = getattr(kind, check)
    setattr(kind, check, lambda *_: None)
    try:
        yield
    finally:
        setattr(kind, check, before)


# Operations, one by one

Dispatch = TorchDispatchMode
"""What sees each operation as the device gets it, those of derivatives among them."""

Operation = torch._ops.OpOverload
"""One of torch's operations, for arguments of certain types."""

COPIES = frozenset({torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default})
"""The operations that bring numbers from one device to another."""

FRESH = torch.ops.aten.lift_fresh.default
"""What ``torch.tensor`` ends with: its argument is new, and no operation has made it."""


def tensors_in(thing: object) -> list[Tensor]:
    """The tensors among an operation's arguments, or in its result."""
    return [leaf for leaf in tree_leaves(thing) if isinstance(leaf, Tensor)]


def written(
    operation: Operation, args: Sequence[object], kwargs: Mapping[str, object]
) -> list[Tensor]:
    """The tensors that an operation writes to."""
    named = operation._schema.arguments
    into = {a.name for a in named if a.alias_info is not None and a.alias_info.is_write}
    given = dict(zip((a.name for a in named), args, strict=False)) | dict(kwargs)
    return tensors_in([given[name] for name in into & given.keys()])


# Optimisers and tensors


def version(tensor: Tensor) -> int:
    """How often a tensor has been written to, which its values alone don't tell."""
    return tensor._version


def hooks_of(tensor: Tensor) -> int:
    """How many hooks see the tensor's gradient."""
    return len(tensor._backward_hooks or ())


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is left out where ``optimizer.found_inf`` says so on the device.

    Torch's fused kernels for MPS are given it, too, and don't look at it.
    """
    devices = {p.device.type for group in optimizer.param_groups for p in group["params"]}
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and "mps" not in devices


def allow_uncaptured(optimizer: torch.optim.Optimizer) -> None:
    """Has an optimiser that can be captured run outside of a capture without a warning."""
    setattr(optimizer, "_warned_capturable_if_run_uncaptured", True)  # noqa: B010


Pool = torch.cuda._POOL_HANDLE
"""The memory that graphs share, as torch names it."""

_abandoned: list[torch.cuda.CUDAGraph] = []


def abandon_capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Pool | None) -> None:
    """Has torch take no more memory from a graph's pool, after a capture that couldn't be ended.

    Where CUDA itself ends a capture with an error, ``capture_end`` raises before it has done so,
    and torch would ask the graph, at each allocation, whether that is part of the capture: so the
    graph is kept. A capture that was ended properly is left alone.
    """
    if pool is None:
        return
    try:
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)
    except RuntimeError:  # it isn't taken from it any more
        return
    torch._C._cuda_releasePool(device.index or 0, pool)
    _abandoned.append(graph)


def count_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tells a scheduler of rates that its optimiser has made a step, which another one makes."""
    setattr(optimizer, "_opt_called", True)  # noqa: B010


def waiting_states(optim: Any) -> dict[str, Any]:
    """States that a ``PyroOptim`` was given for parameters that it hasn't met yet, by name."""
    states: dict[str, Any] = optim._state_waiting_to_be_consumed
    return states


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether anything is to be called before or after a step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def fused_adam(
    parameters: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    settings: Mapping[str, Any],
    *,
    is_decoupled: bool,
) -> None:
    """A step of Adam by torch's kernel alone; what is around it takes as long in small networks.

    Arguments:
        parameters: With gradients, which are in ``.grad``.
        states: The optimiser's, of each parameter; they are advanced.
        settings: The optimiser's: ``lr``, ``betas``, ``eps``, ``weight_decay``.
        is_decoupled: Whether weights decay by themselves, as in AdamW, or by the gradient.
    """
    kernel = torch._fused_adamw_ if is_decoupled else torch._fused_adam_
    averages, squares, steps = (
        [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
    )
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_add_(steps, 1)
    kernel(
        list(parameters), gradients, averages, squares, [], steps,
        amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
        lr=settings["lr"], beta1=settings["betas"][0], beta2=settings["betas"][1],
        weight_decay=settings["weight_decay"], eps=settings["eps"],
    )  # fmt: skip


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor, by one kernel; torch's public function has the whole norm alone."""
    return torch.stack(torch._foreach_norm(tuple(tensors)))


def multiply(tensors: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
    """Each tensor times a factor on the device, by one kernel."""
    return torch._foreach_mul(tuple(tensors), factor)


def import_compiler() -> None:
    """Imports what optimisers of torch import at the first one made.

    Where there is a process group by then, it is kept for good, and its threads, still there as
    Python ends, now and then abort the process.
    """
    importlib.import_module("torch._dynamo")
