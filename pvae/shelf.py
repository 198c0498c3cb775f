"""Shelves: the parts of one kind that have a name, so that a string stands for a part."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TypeVar

from pvae.errors import ArgumentError

__all__ = ["Shelf"]

T = TypeVar("T")
S = TypeVar("S")
C = TypeVar("C", bound=Callable[..., object])


class Shelf(dict[str, T]):
    """Parts of one kind by name; a call returns the part of a name.

    Each kind has one shelf, called ``named``: `pvae.priors.named`, `pvae.objectives.named` and so
    on. Recipes, `pvae.fit`, configurations and the command line all look names up there, so a part
    of your own is known to all of them once it has a name.

    Arguments:
        what: What the parts are, for messages: the name of the argument that takes them.

    Example:
        >>> from pvae import priors
        >>> priors.named("laplace").__name__
        'Laplace'
        >>> sorted(priors.named)
        ['flat', 'laplace', 'normal', 'standard_normal', 'student_t']
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def put(self, name: str) -> Callable[[C], C]:
        """A decorator that puts a class or a function on the shelf under this name."""

        def keep(part: C) -> C:
            self[name] = part  # type: ignore[assignment]
            return part

        return keep

    def __call__(self, part: str | S) -> T | S:
        """The part of that name; what is no string is a part already and is returned as it is.

        Raises:
            ArgumentError: If nothing has that name; the message lists the names.
        """
        if not isinstance(part, str):
            return part
        if part.lower() not in self:
            near = difflib.get_close_matches(part.lower(), self, 1)
            fixes = [f'{self.what}="{name}"' for name in near or [*self][:2]]
            raise ArgumentError(self.what, f"one of {', '.join(self)}", repr(part), fixes)
        return self[part.lower()]
