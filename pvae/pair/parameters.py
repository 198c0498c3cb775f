"""The parameters of a pair, where they are, and what about them is odd."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pvae.errors import oxford
from pvae.pair.messages import sample_sites
from pvae.pair.modules import Found
from pvae.types import Program

__all__ = ["Parameters"]


class Parameters:
    """The trainable parameters of a pair and its networks, from one traced batch.

    Those of modules are named by attribute, those of Pyro's store as there; each tensor once.

    Arguments:
        programs: Model and guide.
        found: The modules that ran, and that the programs hold.
        traces: Of model and guide.
        stored: What Pyro's parameter store had before.
        run: Runs the pair again and returns the traces of its guide and model.

    Attributes:
        parameters: Unconstrained, by name.
        sides: By the same names: ``"model"``, ``"guide"``, or both.
        modules: The networks that the pair uses.
    """

    def __init__(
        self,
        programs: Mapping[str, Program],
        found: Found,
        traces: Mapping[str, Trace],
        stored: Mapping[str, Tensor],
        run: Callable[[], tuple[Trace, Trace]],
    ) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.sides: dict[str, frozenset[str]] = {}
        self._names: dict[int, str] = {}
        self._stored = stored
        for side, program in programs.items():
            if isinstance(program, nn.Module):
                for name, parameter in program.named_parameters():
                    self._add(f"{side}.{name}", parameter, side)
        for side in ("guide", "model"):
            for site in traces[side].nodes.values():
                if site["type"] == "param":
                    self._add(site["name"], site["value"].unconstrained(), side)
        self._differentiated = self._with_gradient(found, run)
        used = [m for root in found.held if self._is_used(root, found) for m in root.modules()]
        rooted = [m for root in found.roots for m in root.modules()]
        unique = {id(m): m for m in (*rooted, *found.ran.values(), *used)}
        self.modules = tuple(unique.values())
        self._idle = [
            name
            for root in found.roots
            for name, module in root.named_modules()
            if self._is_idle(module, found)
        ]

    def oddities(self) -> tuple[str, ...]:
        """What a modeller should know of the parameters, a sentence or two each."""
        missing = {
            f"{type(m).__name__}.{name}": parameter
            for m in self.modules
            for name, parameter in m.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in self._names
        }
        shapes = {p.shape for p in missing.values()}
        taken = [n for n, p in self.parameters.items() if n in self._stored and p.shape in shapes]
        said = []
        if missing and taken:
            said.append(
                f"Pyro's parameter store had {oxford(taken[:4])} before this pair ran, so the pair "
                "uses and trains those tensors and not its networks' own. Call "
                "pyro.clear_param_store() before the second pair, or give its networks other names."
            )
        elif missing:
            said.append(
                f"The pair uses {oxford([*missing][:4])}, but no program announces them, so they "
                "won't be trained. Call pyro.module(name, network) in the function, or make the "
                "model or guide a module that holds the network."
            )
        if self._idle:
            said.append(
                f"Nothing in the pair uses the parameters of {oxford(self._idle[:4])}, which "
                "belong to it, on this batch, so training leaves them as they are."
            )
        return tuple(said)

    def anchor(self, batch: tuple[object, ...]) -> Tensor:
        """A floating tensor that is where the pair is; of the batch, where it has none itself."""
        of_modules = (t for m in self.modules for t in (*m.parameters(), *m.buffers()))
        for tensor in (*self.parameters.values(), *of_modules, *batch):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                return tensor
        return torch.zeros(())

    def _add(self, name: str, tensor: Tensor, side: str) -> None:
        if tensor.requires_grad:
            known = self._names.setdefault(id(tensor), name)
            self.parameters.setdefault(known, tensor)
            self.sides[known] = self.sides.get(known, frozenset()) | {side}

    def _with_gradient(self, found: Found, run: Callable[[], tuple[Trace, Trace]]) -> set[int]:
        """Parameters of modules that were not called, but that some density or draw depends on."""
        asked = {
            id(parameter): parameter
            for root in (*found.roots, *found.held)
            for module in root.modules()
            if id(module) not in found.ran
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad
        }
        if not asked:
            return set()
        with torch.enable_grad():
            total = sum(_everything(trace) for trace in run())
        if not isinstance(total, Tensor) or not total.requires_grad:
            return set()
        found_gradients = torch.autograd.grad(total, [*asked.values()], allow_unused=True)
        return {i for i, g in zip(asked, found_gradients, strict=True) if g is not None}

    def _is_used(self, root: nn.Module, found: Found) -> bool:
        if any(id(m) in found.ran for m in root.modules()):
            return True
        announced = {id(p) for p in self.parameters.values()}
        return any(id(p) in self._differentiated | announced for p in root.parameters())

    def _is_idle(self, module: nn.Module, found: Found) -> bool:
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        return (
            bool(own)
            and id(module) not in found.ran
            and not any(id(p) in self._differentiated for p in own)
        )


def _everything(trace: Trace) -> Tensor | float:
    """The sum of a trace's draws and log densities, to be differentiated."""
    total: Tensor | float = 0.0
    for site in sample_sites(trace):
        value = site["value"]
        if isinstance(value, Tensor) and value.is_floating_point():
            total = total + value.sum()
        try:
            log_prob = site["fn"].log_prob(value, *site["args"], **site["kwargs"])
        except (ValueError, RuntimeError, NotImplementedError, KeyError):
            continue  # outside the support: the look at the sites says so
        total = total + log_prob.sum()
    return total
