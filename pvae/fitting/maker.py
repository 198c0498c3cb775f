"""How a pair was made, so that it can be made again: by a recipe, or by a user's function."""

from __future__ import annotations

from types import FunctionType

from pvae.origin import builder, module_named
from pvae.pair import Pair

__all__ = ["made_of"]


def made_of(pair: Pair) -> dict[str, object]:
    """What checkpoints say of how a pair was made, when a user's code calls `pvae.fit`.

    Returns:
        ``"recipe"`` and its ``"arguments"``; or the ``"builder"``, as ``module:function``, or as
        ``module:model,guide`` for two programs of a module; or ``"fit"``, the function that has
        called `pvae.fit`, where the pair is made in that one, too.
    """
    if recipe := getattr(pair, "recipe", None):
        return dict(recipe)
    fit, made = builder(), _of_functions(pair) or pair.builder
    return {"builder": made} if made and made != fit else {"fit": fit}


def _of_functions(pair: Pair) -> str:
    """The names of two functions of one module, or of the function that they were defined in."""
    programs = pair.model, pair.guide
    if not all(isinstance(program, FunctionType) for program in programs):
        return ""
    modules = {program.__module__ for program in programs}
    names = [program.__qualname__.partition(".<locals>") for program in programs]
    if len(modules) > 1 or any(name.startswith("<") for name, *_ in names):
        return ""
    outer = {name for name, inner, _ in names if inner}
    module, both = module_named(*modules), ",".join(name for name, *_ in names)
    if not outer:
        return f"{module}:{both}"
    return f"{module}:{outer.pop()}" if len(outer) == 1 and all(i for _, i, _ in names) else ""
