"""What a recorded step has read of Python, and whether it is still so.

While a step runs once, Python says which functions are called. What programs reach (closures,
globals, attributes, entries of containers) is then remembered under the names that occur in the
code that ran, and compared before each step of the graph: by identity, and numbers by value.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pvae.code import names_in
from pvae.engine.compiler import UncompilableError
from pvae.internals import hooks_of
from pvae.origin import is_users
from pvae.pair import Structure
from pvae.pair.held import Change, Held, Place, is_plain

__all__ = ["Ran", "Watch", "noting"]

_SETTINGS = ("binomial_approx_log_prob_tol", "cholesky_relative_jitter", "module_local_params")


class Ran:
    """The code that ran, and what users' functions had in their variables.

    Attributes:
        names: Every name in that code: what has another name wasn't read.
        things: What was in the variables, by identity.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.things: dict[int, object] = {}
        self._is_users: dict[types.CodeType, bool] = {}

    def note(self, frame: types.FrameType, event: str, _: object) -> None:
        """Called by Python at each call of a function and each return from one."""
        code = frame.f_code
        users = self._is_users.get(code)
        if users is None:
            module = frame.f_globals.get("__name__", "")
            users = self._is_users[code] = is_users(module)
            if module.partition(".")[0] != "pvae":
                self.names |= names_in(code)
        if users and event == "return":
            for value in frame.f_locals.values():
                if not isinstance(value, (Tensor, types.ModuleType)) and not is_plain(value):
                    self.things.setdefault(id(value), value)

    def line_of(self, name: object) -> str:
        """Where users' code puts something under a name: `` at model.py:12``, or nothing."""
        for code in (code for code, users in self._is_users.items() if users):
            for step in dis.get_instructions(code):
                if step.opname.startswith("STORE") and step.argval == name and step.positions:
                    return f" at {Path(code.co_filename).name}:{step.positions.lineno}"
        return ""


@contextmanager
def noting() -> Iterator[Ran]:
    """Notes which code runs."""
    ran, before = Ran(), sys.getprofile()
    sys.setprofile(ran.note)
    try:
        yield ran
    finally:
        sys.setprofile(before)


class Watch:
    """What a step has read of Python.

    Arguments:
        structure: The pair.
        ran: What ran in the step.
        batch: What it was called with; tensors in it may be others each time.

    Attributes:
        floats: Those among the arguments, by place.
    """

    def __init__(self, structure: Structure, ran: Ran, batch: Sequence[object]) -> None:
        self._ran = ran
        self.floats = {i: part for i, part in enumerate(batch) if type(part) is float}
        programs = structure.model, structure.guide
        self._held = Held((*programs, *structure.modules, *ran.things.values()), ran.names)
        self._held.places += _of_pyro_and_torch(structure)
        self._fixed = [*batch]
        indices = [i for i, part in enumerate(batch) if not isinstance(part, Tensor)]
        given = Place("argument", indices, lambda: [self._fixed[i] for i in indices])
        self._held.places.insert(0, given)

    def holds(self, batch: Sequence[object]) -> bool:
        """Whether all is as it was."""
        self._fixed = [*batch]
        return self._held.holds()

    def add(self, places: Sequence[Place]) -> None:
        """Also looks at these from now on."""
        self._held.places += places

    def settle(self) -> None:
        """Looks at what the step itself has changed since, which is no reason to record it anew.

        Raises:
            UncompilableError: If these are numbers or data, which the next step would read.
        """
        for change in self._held.changes():
            if change.is_of_values and not change.place.is_library:
                line = self._ran.line_of(change.name)
                raise UncompilableError(f"each step changes {change.what}{line}")
            change.place.ignored.add(change.name)

    @property
    def is_of_other_floats(self) -> bool:
        """Whether the first thing that isn't as it was is a float among the arguments."""
        change = self.change()
        return change is not None and change.place.label == "argument" and type(change.now) is float

    def change(self) -> Change | None:
        """The first thing that isn't as it was."""
        return next((c for c in self._held.changes() if c.name not in c.place.ignored), None)


def _of_pyro_and_torch(structure: Structure) -> list[Place]:
    """Parameters in the store, what is trained, hooks on gradients, and settings."""
    named = {name: p for m in structure.modules for name, p in m.named_parameters(recurse=False)}
    parameters = {**named, **structure.parameters}
    names, tensors, of_pair = [*parameters], [*parameters.values()], [*structure.parameters]

    def stored() -> list[Any]:
        store = dict(pyro.get_param_store().named_parameters())
        return [store.get(name) for name in of_pair]

    return [
        Place("parameter", names, lambda: [p.requires_grad for p in tensors]),
        Place("hooks", names, lambda: [hooks_of(p) for p in tensors]),
        Place("pyro.param", of_pair, stored),
        Place("pyro.settings", _SETTINGS, lambda: [*map(pyro.settings.get, _SETTINGS)]),
        Place("torch", ["default dtype"], lambda: [torch.get_default_dtype()]),
    ]
