"""The parameters of a pair, where they are, and what about them is odd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pvae.errors import PvaeError, is_out_of_memory, oxford
from pvae.pair.messages import log_prob_of, sample_sites
from pvae.pair.running import Networks, root_of
from pvae.types import Program

__all__ = ["Parameters", "unconstrained"]


class Parameters:
    """The trainable parameters of a pair and its networks, from one traced batch.

    Those of modules are named by attribute, those of Pyro's store as there; each tensor once.

    Attributes:
        by_name: Unconstrained parameters.
        sides: By the same names: ``"model"``, ``"guide"``, or both.
        modules: The networks that the pair uses.
        oddities: What a modeller should know of the parameters, a sentence or two each.
    """

    def __init__(
        self,
        programs: Mapping[str, Program],
        networks: Networks,
        traces: Mapping[str, Trace],
        stored: Mapping[str, Tensor],
        run: Callable[[], tuple[Trace, Trace]],
    ) -> None:
        self.by_name: dict[str, Tensor] = {}
        self.sides: dict[str, frozenset[str]] = {}
        self._names: dict[int, str] = {}
        for side, program in programs.items():
            root = root_of(program)
            if isinstance(root, nn.Module):
                for name, parameter in root.named_parameters():
                    self._add(f"{side}.{name}", parameter, side)
        for side in ("guide", "model"):
            for site in traces[side].nodes.values():
                if site["type"] == "param":
                    self._add(site["name"], unconstrained(site["value"]), side)
        self._active = active = self._with_gradient(networks, run)
        used = active | {*map(id, self.by_name.values())} | {*networks.ran}
        reached = [root for root in networks.reached if _has_any(used, root)]
        modules = (*_inner(networks.roots), *networks.ran.values(), *_inner(reached))
        self.modules = tuple(dict.fromkeys(modules))
        idle = _idle_modules(networks, active)
        if idle:  # are they of training alone?
            with networks.in_training(), suppress(PvaeError):
                run()
            idle = _idle_modules(networks, active)
        self.oddities = (*self._unannounced(stored), *_idle(idle))

    def _add(self, name: str, tensor: Tensor, side: str) -> None:
        if tensor.requires_grad:
            if self.by_name.get(name, tensor) is not tensor:  # two modules with local names
                name = f"{side}.{name}"
            known = self._names.setdefault(id(tensor), name)
            self.by_name.setdefault(known, tensor)
            self.sides[known] = self.sides.get(known, frozenset()) | {side}

    def _with_gradient(
        self, networks: Networks, run: Callable[[], tuple[Trace, Trace]]
    ) -> set[int]:
        """Parameters on which a density or draw depends, of those that no call or program tells."""
        modules = _inner([*networks.roots, *networks.reached, *networks.ran.values()])
        asked = [
            p
            for m in dict.fromkeys(modules)
            for p in _trainable(m)
            if id(m) not in networks.ran or id(p) not in self._names
        ]
        if not asked:
            return set()
        with torch.enable_grad():
            total = sum(part.sum() for trace in run() for part in _draws_and_densities(trace))
        if not isinstance(total, Tensor) or not total.requires_grad:
            return set()
        asked = [*dict.fromkeys(asked)]
        gradients = torch.autograd.grad(total, asked, allow_unused=True)
        return {id(p) for p, g in zip(asked, gradients, strict=True) if g is not None}

    def _unannounced(self, stored: Mapping[str, Tensor]) -> list[str]:
        missing = {
            f"{type(m).__name__}.{name}": parameter.shape
            for m in self.modules
            for name, parameter in m.named_parameters(recurse=False)
            if id(parameter) in self._active and id(parameter) not in self._names
        }
        shapes = {*missing.values()}
        taken = [n for n, p in self.by_name.items() if n in stored and p.shape in shapes]
        if taken:
            return [
                f"Pyro's parameter store had {oxford(taken[:4])} before this pair ran, so the pair "
                "uses and trains those tensors and not its networks' own. Call "
                "pyro.clear_param_store() before the second pair, or give its networks other names."
            ]
        if missing:
            return [
                f"The pair uses {oxford([*missing][:4])}, but no program announces them, so they "
                "won't be trained. Call pyro.module(name, network) in the function, or make the "
                "model or guide a module that holds the network."
            ]
        return []


def unconstrained(value: Tensor) -> Tensor:
    """The tensor that is trained, of a ``param`` site's value, or the value where it is that."""
    reference: Callable[[], Tensor] | None = getattr(value, "unconstrained", None)
    return value if reference is None else reference()  # with module_local_params some have none


def _inner(roots: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for root in roots for module in root.modules()]


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters(recurse=False) if p.requires_grad]


def _has_any(used: set[int], root: nn.Module) -> bool:
    return any(id(thing) in used for thing in (*root.modules(), *root.parameters()))


def _idle_modules(networks: Networks, active: set[int]) -> list[str]:
    """Names of the programs' own modules that nothing uses."""
    modules = [named for root in networks.roots for named in root.named_modules()]
    not_run = [(name, _trainable(m)) for name, m in modules if id(m) not in networks.ran]
    return [name for name, own in not_run if own and active.isdisjoint(map(id, own))]


def _idle(idle: list[str]) -> list[str]:
    if not idle:
        return []
    return [
        f"Nothing in the pair uses the parameters of {oxford(idle[:4])}, which "
        "belong to it, on this batch, so training leaves them as they are."
    ]


def _draws_and_densities(trace: Trace) -> Iterable[Tensor]:
    for site in sample_sites(trace):
        if isinstance(site["value"], Tensor) and site["value"].is_floating_point():
            yield site["value"]
        try:
            yield log_prob_of(site)
        except (ValueError, RuntimeError, NotImplementedError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            continue  # outside the support: the look at the sites says so
