"""The parameters of a pair, where they are, and what about them is odd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from weakref import WeakValueDictionary

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pvae.errors import PvaeError, is_out_of_memory, oxford
from pvae.pair.messages import log_prob_of, sample_sites
from pvae.pair.running import Networks, root_of
from pvae.types import Program

__all__ = ["Parameters", "unconstrained"]


Run = Callable[[], tuple[Trace, Trace]]


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
        run: Run,
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
        known = _inner([*networks.roots, *networks.reached, *networks.ran.values()])
        leaves = _leaves(run)
        self._active = active = {*leaves}
        used = active | {*map(id, self.by_name.values())} | {*networks.ran} | {*networks.asked}
        reached = [root for root in networks.reached if _has_any(used, root)]
        called = (*networks.ran.values(), *_inner(networks.asked.values()))
        modules = (*_inner(networks.roots), *called, *_inner(reached))
        self.modules = tuple(dict.fromkeys(modules))
        of_nobody = self._of_nobody(leaves, known, run)
        shared = _from_store(networks, stored) or _of_others(self.modules)
        idle = _idle_modules(networks, active)
        if idle:  # are they of training alone?
            with networks.in_training(), suppress(PvaeError):
                run()
            idle = _idle_modules(networks, active)
        odd = (
            self._unannounced(stored),
            _shared(shared),
            _unowned(of_nobody),
            _made_anew(networks.made_anew),
            _idle(idle),
        )
        self.oddities = tuple(text for texts in odd for text in texts)

    def _add(self, name: str, tensor: Tensor, side: str) -> None:
        if tensor.requires_grad:
            if self.by_name.get(name, tensor) is not tensor:  # two modules with local names
                name = f"{side}.{name}"
            known = self._names.setdefault(id(tensor), name)
            self.by_name.setdefault(known, tensor)
            self.sides[known] = self.sides.get(known, frozenset()) | {side}

    def _of_nobody(
        self, leaves: Mapping[int, Tensor], modules: Iterable[nn.Module], run: Run
    ) -> list[Tensor]:
        """Trainable tensors that the pair uses, which no program announces and no module holds."""
        held = {id(p) for m in (*modules, *self.modules) for p in m.parameters(recurse=False)}
        odd = {key: p for key, p in leaves.items() if key not in held and key not in self._names}
        again = _leaves(run) if odd else {}  # what a program makes anew each time is no parameter
        return [p for key, p in odd.items() if key in again]

    def _unannounced(self, stored: Mapping[str, Tensor]) -> list[str]:
        missing = [
            (f"{type(m).__name__}.{name}", parameter.shape)
            for m in self.modules
            for name, parameter in m.named_parameters(recurse=False)
            if id(parameter) in self._active and id(parameter) not in self._names
        ]
        shapes = {shape for _, shape in missing}
        taken = [n for n, p in self.by_name.items() if n in stored and p.shape in shapes]
        if taken:
            return [
                f"Pyro's parameter store had {oxford(taken[:4])} before this pair ran, of other "
                "networks: a training moves those, and not this pair's, with which it computes. "
                "Call pyro.clear_param_store() before the second pair, or give its networks other "
                "names; pyro.module(name, network, update_module_params=True) takes over what the "
                "store has."
            ]
        if missing:
            return [
                f"The pair uses {oxford([*dict(missing)][:4])}, but no program announces them, so "
                "they won't be trained. Call pyro.module(name, network) in the function, or make "
                "the model or guide a module that holds the network."
            ]
        return []


def unconstrained(value: Tensor) -> Tensor:
    """The tensor that is trained, of a ``param`` site's value, or the value where it is that."""
    reference: Callable[[], Tensor] | None = getattr(value, "unconstrained", None)
    return value if reference is None else reference()  # with module_local_params some have none


def _leaves(run: Run) -> dict[int, Tensor]:
    """The trainable tensors on which a draw or density depends, by identity."""
    with torch.enable_grad():
        total = sum(part.sum() for trace in run() for part in _draws_and_densities(trace))
    found, seen = dict[int, Tensor](), set[object]()
    nodes = [total.grad_fn] if isinstance(total, Tensor) else []
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor):
                found[id(variable)] = variable
            nodes += [following for following, _ in node.next_functions]
    return found


_owners: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
"""Whose parameter a tensor of Pyro's store was when a pair was looked at, by its identity."""


def _from_store(networks: Networks, stored: Mapping[str, Tensor]) -> list[str]:
    """Parameters that Pyro's store had, and that took the place of the modules' own in the look."""
    before = {*map(id, networks.parameters)}
    roots = [*networks.roots, *networks.reached]
    now = {id(p) for root in roots for p in root.parameters()} - before
    return [name for name, tensor in stored.items() if id(tensor) in now]


def _of_others(modules: Iterable[nn.Module]) -> list[str]:
    """Parameters in Pyro's store that are also those of another pair's module of the same name."""
    stored = {id(p): name for name, p in pyro.get_param_store().named_parameters()}
    own, shared = {*modules}, []
    for module in own:
        for parameter in module.parameters(recurse=False):
            owner = _owners.get(id(parameter))
            if owner is None or all(p is not parameter for p in owner.parameters(recurse=False)):
                _owners[id(parameter)] = module
            elif owner not in own and id(parameter) in stored:
                shared.append(stored[id(parameter)])
    return sorted(shared)


def _shared(names: list[str]) -> list[str]:
    if not names:
        return []
    return [
        f"Pyro's parameter store had {oxford(names[:4])} before this pair ran, and has one tensor "
        "for a name: this pair uses and trains the one that was there. Another pair of the same "
        "names, if that is where it comes from, moves with it. To keep them apart, call "
        "pyro.settings.set(module_local_params=True) before either is made."
    ]


def _unowned(tensors: list[Tensor]) -> list[str]:
    if not tensors:
        return []
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors[:4])
    return [
        f"The pair uses {len(tensors)} trainable tensor(s), of shape {shapes}, that no program "
        "announces and no network within its reach holds: they won't be trained. Call "
        "pyro.module(name, network) or pyro.param(name, tensor) in the function."
    ]


def _made_anew(modules: list[nn.Module]) -> list[str]:
    if not modules:
        return []
    kinds = oxford(dict.fromkeys(type(module).__name__ for module in modules))
    return [
        f"A program makes {kinds} anew in each run, and what is new is in training mode: an "
        "evaluation can't put it in evaluation mode. Make it once, outside of the program."
    ]


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
