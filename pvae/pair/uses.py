"""What a pair's programs do with the entries of a batch: whether they use them, and what for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pvae.pair.running import Batch

__all__ = ["Uses"]

_QUESTIONS = {"__get__", "__len__", "dim", "size", "numel", "is_floating_point", "is_inference"}
_SAME = {"to", "long", "int", "type", "type_as", "contiguous", "detach", "clone", "cpu", "cuda"}
_SAME |= {"unsqueeze", "squeeze", "reshape", "view", "flatten"}
_LOOKED_UP = {"one_hot": 0, "embedding": 0, "__getitem__": 1, "gather": 2, "index_select": 2}
"""Functions that look a row up by a number, and the place of that number in their arguments."""


class Uses(TorchFunctionMode):
    """Notes what torch does with the entries of a batch, while programs run on it.

    Attributes:
        used: Places of the entries that something was computed of.
        categories: Places of the integers that something was looked up by.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self._places = {id(b): place for place, b in enumerate(batch) if isinstance(b, Tensor)}
        self._kept: list[object] = [*batch]  # so that no identity is taken twice
        self.used: set[int] = set()
        self.categories: set[int] = set()

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Calls the function, and notes which entries it was given."""
        result, name = function(*args, **(kwargs or {})), getattr(function, "__name__", "")
        given = {p for a in (args, (kwargs or {}).values()) for p in self._places_in(a)}
        is_view = name == "__get__" and isinstance(result, Tensor)  # x.T, x.data
        if not given or (name in _QUESTIONS and not is_view):
            return result
        is_part = name == "__getitem__" and isinstance(args[1], slice)
        if is_view or ((is_part or name in _SAME) and isinstance(result, Tensor)):
            self._places.setdefault(id(result), min(given))
            self._kept.append(result)
            return result
        self.used |= given
        if name in _LOOKED_UP:
            self._note_category(args[_LOOKED_UP[name] :], kwargs or {})
        return result

    def _note_category(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        by = (*args[:1], *(kwargs[k] for k in ("input", "index") if k in kwargs))
        for tensor in _tensors_in(by):
            if tensor.dtype is not torch.bool and not tensor.is_floating_point():
                self.categories |= {*self._places_in(tensor)}

    def _places_in(self, thing: object) -> Iterator[int]:
        for tensor in _tensors_in(thing):
            if id(tensor) in self._places:
                yield self._places[id(tensor)]

    def take_in(self, *traces: Trace) -> None:
        """Notes the entries that sites of the traces have for values or masks."""
        for trace in traces:
            for site in trace.nodes.values():
                self.used |= {*self._places_in([site.get("value"), site.get("mask")])}

    def unused(self, batch: Batch) -> list[str]:
        """Sentences on the entries that nothing uses."""
        idle = [p for p, b in enumerate(batch) if isinstance(b, Tensor) and p not in self.used]
        return [
            f"Nothing in the pair uses argument {place} of the batch, of type "
            f"{str(batch[place].dtype).removeprefix('torch.')}: results are the same for all its "
            "values. Leave it out, or give the pair a part that takes it."
            for place in idle
        ]


def _tensors_in(thing: object) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (tuple, list)) or type(thing).__name__ == "dict_values":
        for part in thing:  # type: ignore[attr-defined]
            yield from _tensors_in(part)
