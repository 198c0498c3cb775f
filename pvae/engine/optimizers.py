"""One optimiser over all parameters, and its update where a step has succeeded."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pvae.errors import ArgumentError, check_number
from pvae.internals import allow_uncaptured, can_skip_on_device, fused_adam, has_step_hooks, version

__all__ = ["Backup", "OptimizerLike", "count_on_device", "make_optimizer", "update"]

OptimizerLike = Callable[..., torch.optim.Optimizer]


def make_optimizer(
    factory: OptimizerLike, parameters: Sequence[Tensor | dict[str, Any]], lr: float | None = None
) -> torch.optim.Optimizer:
    """One optimiser over all parameters, fused where optimiser and device have that.

    Arguments:
        factory: A torch optimiser class, or a function like one.
        parameters: Tensors, or groups of them.
        lr: Learning rate; None where the factory has it.
    """
    settings = {} if lr is None else {"lr": lr}
    made: torch.optim.Optimizer | None = None
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        made = factory(parameters, **settings, fused=True)
    try:
        made = made or factory(parameters, **settings)
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError("its step needs a closure that evaluates the loss again")
    except (TypeError, ValueError, AttributeError) as error:
        fixes = ["torch.optim.Adam", "functools.partial(torch.optim.SGD, momentum=0.9)"]
        expected = "a torch optimiser class, called with (parameters, lr=...)"
        raise ArgumentError("optimizer", expected, f"{factory!r}: {error}", fixes) from error
    for group in made.param_groups:
        for name in ("lr", "weight_decay"):
            check_number(f"optimizer, {name} of a group", group.get(name, 0.0), minimum=0)
    count_on_device(made)
    return made


def count_on_device(optimizer: torch.optim.Optimizer) -> None:
    """Has an optimiser that can be captured keep on CUDA what it counts.

    There a step that failed takes it back, and a graph moves it on.
    """
    for group in optimizer.param_groups:
        if "capturable" in group and all(p.device.type == "cuda" for p in group["params"]):
            group["capturable"] = True
            allow_uncaptured(optimizer)


def update(optimizer: torch.optim.Optimizer, ok: Tensor, parameters: Sequence[Tensor]) -> None:
    """The optimiser's step where ``ok``, and nothing where not."""
    if ok.device.type == "cpu":  # nothing to wait for
        if bool(ok) and not _adam(optimizer):
            optimizer.step()
        return
    had = {p for p in parameters if optimizer.state.get(p)}
    if can_skip_on_device(optimizer):
        setattr(optimizer, "found_inf", (~ok).to(torch.float32))  # noqa: B010
        groups = optimizer.param_groups
        optimizer.param_groups = _merged(groups)
        optimizer.step()
        optimizer.param_groups = groups
    else:
        states = optimizer.state.values()
        tensors = [v for s in states for v in s.values() if isinstance(v, Tensor)]
        backup = Backup([*parameters, *(v for v in tensors if v.device == ok.device)])
        optimizer.step()
        backup.restore_unless(ok)
    made = [p for p in parameters if p not in had and optimizer.state.get(p)]
    if made and not bool(ok):  # which is read at the first step alone
        for parameter in made:
            del optimizer.state[parameter]


@torch.no_grad()
def _adam(optimizer: torch.optim.Optimizer) -> bool:
    """A step of plain fused Adam by the kernel alone, and whether it was taken.

    It isn't for subclasses, hooks and anything special, nor for the first step.
    """
    if not _is_plain(optimizer):
        return False
    groups = _merged(optimizer.param_groups)
    moved = [[p for p in g["params"] if p.grad is not None] for g in groups]
    states = [[optimizer.state[p] for p in parameters] for parameters in moved]
    if not all(map(all, states)):
        return False
    for group, parameters, own in zip(groups, moved, states, strict=True):
        is_decoupled = group.get("decoupled_weight_decay", type(optimizer) is torch.optim.AdamW)
        if parameters:
            fused_adam(parameters, own, group, is_decoupled=is_decoupled)
    return True


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, those of equal settings as one, for fewer and larger kernels."""
    if len(groups) == 1:
        return groups
    merged: dict[tuple[object, ...], dict[str, Any]] = {}
    for group in groups:
        settings = tuple(value for name, value in group.items() if name != "params")
        merged.setdefault(settings, {**group, "params": []})["params"].extend(group["params"])
    return list(merged.values())


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    is_watched = has_step_hooks(optimizer) or "step" in vars(optimizer)  # as by schedulers of rates
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or is_watched:
        return False
    for group in optimizer.param_groups:
        kinds = {(p.dtype, p.device) for p in group["params"]}
        special = group["amsgrad"], group["maximize"], not group["fused"], len(kinds) > 1
        if any(special) or isinstance(group["lr"], Tensor):
            return False
    return True


class Backup:
    """Copies of tensors, to be put back where a step turns out to have failed."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.copies = [tensor.detach().clone() for tensor in tensors]
        self.versions = [version(tensor) for tensor in tensors]

    def changed(self) -> list[Tensor]:
        """The tensors that aren't as they were, as far as versions and values tell."""
        rows = zip(self.tensors, self.copies, self.versions, strict=True)
        return [x for x, y, v in rows if version(x) != v or not torch.equal(x, y)]

    def restore(self) -> None:
        """Puts the copies back."""
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            tensor.data.copy_(copy)

    def restore_unless(self, ok: Tensor, *, may_wait: bool = True) -> None:
        """Puts the copies back where not ``ok``, which is read, on a CPU, if it may be."""
        if may_wait and ok.device.type == "cpu" and bool(ok):
            return
        with torch.no_grad():
            for tensor, copy in zip(self.tensors, self.copies, strict=True):
                tensor.copy_(torch.where(ok, tensor, copy))
