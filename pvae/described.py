"""Modules that say what they were made with, so that two that differ are seen to differ."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import re
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

from pvae.annotations import check_arguments
from pvae.distributions import arguments_of
from pvae.origin import is_users

__all__ = ["Described", "description"]

_LONGEST = 200  # characters of one value
_MOST = 10  # numbers of one tensor
_MADE = (Distribution, Transform, Constraint)
_PLAIN = (bool, int, float, str, Tensor, np.ndarray, type(None))


class Described(nn.Module):
    """A module whose ``repr`` has the arguments of its constructor, and its public attributes.

    Subclasses need do nothing for it. An argument that the module keeps in an attribute, a buffer
    or a property of the same name is shown as it is now, others as they were given. Of parameters,
    which training changes, the shape is shown; further buffers, which may change, too, are not.

    The text is the same in every process: functions are shown by their names, and large tensors by
    a digest. So a training that goes on can compare its pair with the one that was saved.

    Example:
        >>> class Noise(Described):
        ...     def __init__(self, sigma: float, centred: bool = True) -> None:
        ...         super().__init__()
        ...         self.sigma = sigma
        >>> Noise(0.5)
        Noise(sigma=0.5, centred=True)
    """

    _arguments: dict[str, str]

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Notes the arguments; a copy, which is made without any, gets the original's."""
        self = super().__new__(cls)
        signature = _signature_of(cls.__init__)
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:  # the constructor says it better
            return self
        if cls.__init__.__module__.startswith("pvae."):  # others' annotations are their own
            check_arguments(cls.__init__, bound.arguments, cls.__name__)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        named: dict[str, object] = {}
        for name, value in given:
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                named |= value
            elif kind is not inspect.Parameter.VAR_POSITIONAL or value:
                named[name] = value
        self.__dict__["_arguments"] = {name: description(value) for name, value in named.items()}
        return self

    def extra_repr(self) -> str:
        """The arguments of the constructor, and further public attributes."""
        shown = self.said()
        for name, value in vars(self).items():
            if not name.startswith("_") and name != "training" and not isinstance(value, Tensor):
                shown.setdefault(name, description(value))
        return ", ".join(f"{name}={text}" for name, text in shown.items())

    def said(self) -> dict[str, str]:
        """The arguments of the constructor in words, but for those that are modules of it now."""
        shown = {name: self._shown(name, text) for name, text in self._arguments.items()}
        return {name: text for name, text in shown.items() if text}

    def _shown(self, name: str, given: str) -> str:
        """An argument as it is now, if the module has it; nothing for a part, which has a line."""
        if name in dict(self.named_children()):
            return ""
        if isinstance(inspect.getattr_static(type(self), name, None), property):
            return description(getattr(self, name))
        buffers = self.named_buffers(recurse=False, remove_duplicate=False)
        parameters = self.named_parameters(recurse=False, remove_duplicate=False)
        for store in (vars(self), dict(buffers), dict(parameters)):
            if name in store:
                return description(store[name])
        return given


_signature_of = functools.lru_cache(inspect.signature)


def description(value: object) -> str:
    """A value in words that are the same in every process, and others for another value.

    Example:
        >>> description((3, torch.ones(2), torch.nn.ReLU, torch.zeros(100)))
        '(3, full((2,), 1.0), torch.nn.modules.activation.ReLU, full((100,), 0.0))'
    """
    text = _text(value)
    parts = value if isinstance(value, (list, tuple)) else (value,)
    if len(text) <= _LONGEST or any(isinstance(part, _MADE) for part in parts):
        return text
    return f"{type(value).__name__} with digest {_digest(text.encode())}"


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        is_trained = isinstance(value, nn.Parameter) or value.requires_grad
        if is_trained or value.is_meta:  # which has no values
            return f"{'parameter' if is_trained else 'tensor'} of shape {tuple(value.shape)}"
        return _of_numbers(_as_array(value))
    if isinstance(value, np.ndarray):
        return _of_numbers(value)
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, functools.partial):
        return _call("partial", value.keywords, _text(value.func), *map(description, value.args))
    if inspect.isclass(value) or inspect.isroutine(value):
        module = getattr(value, "__module__", None)
        if module and is_users(module):  # whose file may have another name next time
            return value.__name__
        return f"{module}.{value.__qualname__}" if module else value.__qualname__
    if isinstance(value, _MADE):
        with contextlib.suppress(AttributeError):
            return _call(type(value).__name__, arguments_of(value))
    return _of_others(value)


def _of_others(value: object) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{description(k)}: {description(v)}' for k, v in value.items())}}}"
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple, torch.Size):
        return f"({', '.join(map(description, value))}{',' if len(value) == 1 else ''})"
    if type(value).__repr__ is object.__repr__:  # others of its attributes may lead back to it
        kept = getattr(value, "__dict__", {})
        plain: dict[str, object] = {k: v for k, v in kept.items() if isinstance(v, _PLAIN)}
        return _call(_text(type(value)), plain)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _call(name: str, keywords: dict[str, object], *positional: str) -> str:
    given = [*positional, *(f"{key}={description(value)}" for key, value in keywords.items())]
    return f"{name}({', '.join(given)})"


def _as_array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        tensor = tensor.float()  # numpy has no bfloat16
    return tensor.numpy()


def _of_numbers(array: np.ndarray) -> str:
    """All numbers of a small array; the shape and a digest of a large one."""
    shape = array.shape
    if array.dtype.kind == "O":
        return description(array.tolist())
    if array.size and (array == array.flat[0]).all():
        number = str(array.flat[0])
        return f"full({shape}, {number})" if shape else number
    if array.size <= _MOST:
        return str(array.astype(str).tolist()).replace("'", "")
    exact = array.astype(np.float64) if array.dtype.kind == "f" else array
    return f"tensor of shape {shape} with digest {_digest(exact.tobytes())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
