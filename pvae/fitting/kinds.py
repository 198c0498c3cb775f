"""Several kinds of data in one training: what they share, and what can't be trained so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pyro.infer import ELBO as PyroELBO
from torch import Tensor, nn

from pvae.data import Batches, Mixed
from pvae.distributed import World
from pvae.errors import ArgumentError, DataError, PairError, oxford
from pvae.fitting.settings import Settings
from pvae.objectives import ObjectiveState
from pvae.pair import Structure
from pvae.randomness import derive_seed

__all__ = ["check_state", "mixed", "one_training"]


def one_training(structures: Mapping[str, Structure]) -> dict[str, Structure]:
    """What a pair is made of on each kind of data, each with the parameters and networks of all.

    Raises:
        DataError: If there is no kind of data.
        PairError: If the pair has latents that all data share, or picks its rows itself.
    """
    if not structures:
        raise DataError("data", "at least one kind of data", "an empty dictionary", ["x"])
    if len(structures) == 1:
        return dict(structures)
    parameters: dict[str, Tensor] = {}
    sides: dict[str, frozenset[str]] = {}
    modules: dict[nn.Module, None] = {}
    for kind, structure in structures.items():
        _check_kind(kind, structure)
        for name, tensor in structure.parameters.items():
            if parameters.setdefault(name, tensor) is not tensor:
                expected = f"one parameter of the name '{name}'"
                raise PairError(f"data['{kind}']", expected, "another one than on other data")
            sides[name] = sides.get(name, frozenset()) | structure.sides[name]
        modules |= dict.fromkeys(structure.modules)
    used = tuple(modules)
    return {
        kind: replace(structure, parameters=parameters, sides=sides, modules=used)
        for kind, structure in structures.items()
    }


def _check_kind(kind: str, structure: Structure) -> None:
    where = f"data['{kind}']"
    if structure.global_latents:
        expected = "latents of single data alone, where there are several kinds of data"
        actual = f"{oxford(structure.global_latents)}, whose prior would count once for each kind"
        fixes = ["parameters (pyro.param) for what all data share", "one kind, with a mask"]
        raise PairError(where, expected, actual, fixes)
    if structure.subsample_size is not None:
        fixes = ["pyro.plate(name, N, subsample_size=len(x))"]
        raise PairError(where, "a pair that takes its batch as it is", "one that subsamples", fixes)


def check_state(objective: PyroELBO, state: ObjectiveState | None) -> None:
    """Refuses an objective that learns from its batches, as these are of different kinds."""
    if state is not None and state.tensors():
        expected = "one that learns nothing by itself, for several kinds of data"
        raise ArgumentError("objective", expected, repr(objective), ["objectives.ELBO()"])


def mixed(parts: Mapping[str, Batches], settings: Settings, world: World) -> Mixed:
    """The batches of all kinds in one order; each kind's rows have an order of their own."""
    if world.size > 1:
        expected = "one kind of data, for several processes"
        raise ArgumentError("data", expected, f"{len(parts)} kinds", ["one process"])
    for number, part in enumerate(parts.values()):
        part.seed = derive_seed(settings.seed, number) if number else settings.seed
    return Mixed(parts, settings.mix)
