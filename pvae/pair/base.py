"""Pair: a model and its guide, and what is found out about them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pvae.annotations import check_arguments
from pvae.data import LoaderSource, Source, first_batch
from pvae.devices import as_device, automatic, check_use
from pvae.distributed import current
from pvae.errors import ArgumentError, OutOfMemoryError, PairError, warn
from pvae.origin import builder
from pvae.pair.held import Held
from pvae.pair.home import devices_of, movable, where_it_runs
from pvae.pair.plates import PlateName
from pvae.pair.probe import inspect_pair
from pvae.pair.running import (
    Batch,
    as_batch,
    first_floating,
    modules_reached,
    root_of,
    tensors_of,
)
from pvae.pair.structure import Structure
from pvae.types import Program

__all__ = ["Pair", "PairLike", "as_pair"]


class Pair:
    """A model p(x, z) and its guide q(z | x): two Pyro programs, called alike on a batch.

    Every tool takes a pair first: ``pvae.fit(pair, x)``, ``pvae.bounds.evidence(pair, x)``. A
    plain tuple ``(model, guide)`` is taken as one, and so is any object with methods ``model`` and
    ``guide``. What tools find out about the programs by running them on a batch (the data plate,
    latents, networks, parameters and where they are) is found out once and remembered here. It is
    looked up by the batch at hand, and forgotten when networks or parameters are replaced, frozen
    or moved to the store.

    Arguments:
        model: A Pyro program: a module, a function or a method, called as ``model(*batch)``.
        guide: Its guide, called as ``guide(*batch)``.
        plate: Name of the plate that counts the data, where its length, which is that of the
            batch's first axis, doesn't tell. The data may be counted along another axis, as in
            time-major batches, and entries without an axis of its length are shared by all. False
            where no plate counts them: all data are one datum then, as they are for a pair without
            plates.
        densities: Names of factors in the guide that are densities, such as a Jacobian's, and so
            part of log q. All others, such as the classification term of a semi-supervised guide,
            are terms of the training: in the loss, as Pyro has it, and in no evidence.

    Raises:
        ArgumentError: If one of them can't be called.

    Attributes:
        builder: The user's function that has made it, as ``module:function``; empty if none has.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> pair = Pair(model, guide)
        >>> pair.inspect(torch.zeros(3)).latents
        ('z',)
    """

    model: Any
    guide: Any
    plate: PlateName = None
    densities: tuple[str, ...] = ()
    builder: str = ""

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        plate: PlateName = None,
        densities: str | Sequence[str] = (),
    ) -> None:
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program) or isinstance(program, type):
                expected = "a Pyro program: a function, a method or a module"
                is_class = isinstance(program, type)
                actual = f"the class {program.__name__}" if is_class else type(program).__name__
                fixes = ["pvae.Pair(model, guide), with two functions of a batch"]
                raise ArgumentError(f"Pair, {name}", expected, actual, fixes)
        check_arguments(Pair.__init__, {"plate": plate, "densities": densities}, "Pair")
        self.model, self.guide, self.plate = model, guide, plate
        self.densities = (densities,) if isinstance(densities, str) else tuple(densities)
        self.builder = builder()

    def __repr__(self) -> str:
        plate = "" if self.plate is None else f", plate={self.plate!r}"
        densities = f", densities={self.densities!r}" if self.densities else ""
        return f"Pair({_named(self.model)}, {_named(self.guide)}{plate}{densities})"

    def __getstate__(self) -> dict[str, object]:
        """What a copy has: not what was remembered, which is of this pair's own tensors."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_structures", "_checked")}

    def inspect(self, batch: object) -> Structure:
        """What the pair is made of, by one traced batch, in evaluation mode; remembered.

        Arguments:
            batch: What model and guide are called with: a tuple, or one tensor; on any device.

        Raises:
            PairError: If model and guide don't match, there is more than one candidate for the data
                plate, a latent of the model has no guide, or data stand outside the plate.

        Warns:
            PvaeWarning: Once, of what is odd about the pair's parameters.
        """
        batch = as_batch(batch)
        key = tuple(_signature(part) for part in batch)
        known: dict[object, _Known] = self.__dict__.setdefault("_structures", {})
        if key in known and self._holds(*known[key]):
            return known[key][0]
        structure = self._look(batch)
        said = {text for old, *_ in known.values() for text in old.oddities}
        if len(known) > _KEPT or not all(self._holds(*each) for each in known.values()):
            known.clear()
            self.checked_sources.clear()
        known[key] = structure, self._state(structure), Held((self.model, self.guide))
        for text in structure.oddities:
            if text not in said:
                warn(text)
        return structure

    def _look(self, batch: Batch) -> Structure:
        """One traced batch, brought where the pair is."""
        programs = self.model, self.guide
        structure, on_host = where_it_runs(
            programs,
            batch,
            lambda there: inspect_pair(*programs, there, self.plate, self.densities),
        )
        return replace(structure, on_host=on_host) if on_host else structure

    def inspect_source(self, source: Source, num_rows: int = 128) -> Structure:
        """What the pair is made of, by ``num_rows`` rows of a source, or by all of them.

        All rows go to a pair that subsamples itself, to an autoguide that isn't set up yet (its
        first batch decides how many parameters it has), and to one that doesn't run on a batch.
        """
        if isinstance(source, LoaderSource):
            return self.inspect(first_batch(source, num_rows))
        autoguide = poutine.unwrap(self.guide)
        if isinstance(autoguide, AutoGuide) and getattr(autoguide, "prototype_trace", None) is None:
            self.inspect(first_batch(source, source.num_rows))
        structure = self._inspect_first(source, num_rows)
        if structure.axes != (source.axes or (0,) * len(structure.axes)):  # rows along other axes
            source = source.along(structure.axes)
            structure = self._inspect_first(source, num_rows)
        if structure.subsample_size is not None and num_rows < source.num_rows:
            return self.inspect(first_batch(source, source.num_rows))
        return structure

    def _inspect_first(self, source: Source, num_rows: int) -> Structure:
        """By the first rows; by all, where those don't run and all do, as they have to be there."""
        try:
            return self.inspect(first_batch(source, num_rows))
        except PairError:
            if num_rows < source.num_rows:
                with contextlib.suppress(PairError, OutOfMemoryError):
                    whole = self.inspect(first_batch(source, source.num_rows))
                    takes_all = whole.subsample_size is not None or whole.tied_to is not None
                    if takes_all or whole.axes != source.axes:
                        return whole
            raise

    def home(self, data: object = None) -> Tensor:
        """An empty tensor of the pair's floating type, on its device: ``x.to(vae.home())``.

        The device is that of the pair's tensors, trained or not: parameters and buffers of its
        networks, parameters in Pyro's store, constants that its programs hold. A pair that has none
        is where the data are, and then the type is theirs.
        """
        parts = data if isinstance(data, (tuple, list)) else (data,)
        dtype = first_floating((*tensors_of(self._modules_of()), *parts)).dtype
        device = next(devices_of((self.model, self.guide), data), torch.device("cpu"))
        return torch.empty(0, dtype=dtype, device=device)

    def place(
        self, device: str | torch.device, data: object = None
    ) -> tuple[torch.device, torch.dtype]:
        """Moves the pair's modules to a device; returns it, and the pair's floating type.

        ``"auto"`` is CUDA where there is one, or else Apple's MPS where there is one and the pair
        is in float32. Functions can't be moved, but for the networks that they reach: with
        ``"auto"`` a pair of them stays where it is (`home`).

        Raises:
            ArgumentError: If there is no such device, or it hasn't the pair's floating type.
        """
        own = [movable(program) for program in (self.model, self.guide)]
        modules = [module for module in own if module is not None]
        if device != "auto":
            modules = self._modules_of()
        tensors = list(tensors_of(modules))
        dtypes = [t.dtype for t in tensors if t.is_floating_point()]
        dtype = dtypes[0] if dtypes else torch.get_default_dtype()
        if device != "auto":
            where = as_device(device)
        elif dtypes and None not in own:
            where = automatic(tensors, current().size)
        else:
            where = self.home(data).device
        check_use(where, tensors or [torch.zeros(())], current().size)
        for module in modules:
            module.to(where)
        return where, dtype

    @property
    def checked_sources(self) -> WeakSet[Source]:
        """Sources whose values are in the support of the site that observes them."""
        sources: WeakSet[Source] = self.__dict__.setdefault("_checked", WeakSet())
        return sources

    def _modules_of(self) -> list[nn.Module]:
        """The programs that are modules, and the modules that the others reach."""
        programs = (root_of(self.model), root_of(self.guide))
        own = [[p] if isinstance(p, nn.Module) else modules_reached(p) for p in programs]
        return [module for modules in own for module in modules]

    def _holds(self, structure: Structure, state: object, held: Held) -> bool:
        """Whether a structure is still right."""
        return state == self._state(structure) and not held.has_other_parts()

    def _state(self, structure: Structure) -> object:
        """What a structure is right for: parameters, and whether these are trainable."""
        programs = (self.model, self.guide)
        roots = [m for p in map(root_of, programs) if isinstance(p, nn.Module) for m in p.modules()]
        modules = dict.fromkeys((*roots, *structure.modules))
        store = dict(pyro.get_param_store().named_parameters())
        stored = [
            (name, id(store[name]), store[name].device)
            for name in structure.parameters
            if name in store
        ]
        return self.plate, self.densities, stored, [_module_state(m) for m in modules]


PairLike = Pair | tuple[Callable[..., object], Callable[..., object]]
"""What tools take as a pair: a `Pair` (a `VAE` is one), or a tuple of a model and its guide."""

_KEPT = 8
_Known = tuple[Structure, object, Held]


def as_pair(thing: object, tool: str = "pair") -> Pair:
    """A pair of what is given for one: a `Pair`, a tuple, an object with ``model`` and ``guide``.

    Raises:
        ArgumentError: If it is none of these.

    Example:
        >>> as_pair((print, repr))
        Pair(print, repr)
    """
    if isinstance(thing, Pair):
        return thing
    if isinstance(thing, tuple) and len(thing) == 2 and all(map(callable, thing)):
        return Pair(*thing)
    model, guide = getattr(thing, "model", None), getattr(thing, "guide", None)
    if callable(model) and callable(guide):
        return Pair(model, guide)
    expected = "a pair: pvae.Pair(model, guide), a VAE, or a tuple of model and guide"
    actual = "one program" if callable(thing) else type(thing).__name__
    if tool == "pair":
        raise ArgumentError(tool, expected, actual, ["pvae.Pair(model, guide)"])
    raise ArgumentError(
        f"{tool}, its first argument", expected, actual, [f"{tool}((model, guide), ...)"]
    )


def _named(program: object) -> str:
    if isinstance(program, nn.Module):
        return type(program).__name__
    return getattr(program, "__name__", type(program).__name__)


def _signature(part: object) -> object:
    """What of an argument a program's course may depend on: shape and type, or the value."""
    if isinstance(part, Tensor):
        return tuple(part.shape), part.dtype, part.device
    if isinstance(part, (bool, int, float, str, type(None))):
        return type(part), part
    if isinstance(part, (tuple, list)):
        return type(part), *map(_signature, part)
    if isinstance(part, dict):
        return dict, *((_signature(k), _signature(v)) for k, v in part.items())
    return object()  # what may change unseen is looked at each time


def _module_state(module: nn.Module) -> object:
    named = module.named_parameters(recurse=False)
    parameters = [(name, id(p), p.requires_grad, p.device) for name, p in named]
    return id(module), parameters, [*map(id, module.buffers(recurse=False))]
