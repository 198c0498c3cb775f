"""An option of a training: how the help shows it, and where those that are no field come from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from pvae import corruptions, penalties, recipes
from pvae.errors import ArgumentError, check_int, check_number, quoted
from pvae.vae import VAE

__all__ = ["Option", "field", "flag", "numbers_of", "part_options", "recipe_options"]


@dataclass(frozen=True)
class Option:
    """An option of a training, as the help shows it.

    Attributes:
        group: Heading that it stands under.
        help: What it is, a sentence.
        example: A value to try.
        kind: What its values are: a name, a number, widths.
        default: The value where none is given, in words where recipe or data decide.
        choices: Names that it can have; None for any value.
        least: The least number that it can be; None for the least that its kind allows.
        is_positive: Whether a number has to be above 0.
    """

    group: str
    help: str
    example: str
    kind: str
    default: str
    choices: Collection[str] | None = None
    least: int | None = None
    is_positive: bool = False

    def check(self, name: str, value: object) -> None:
        """Refuses a value that is none of the choices, and a number outside of its limits."""
        if value is not None and self.kind == "<int>":
            check_int(flag(name), value, 1 if self.least is None else self.least)
        if value is not None and self.kind == "<float>":
            limit = {"above": 0.0} if self.is_positive else {"minimum": 0.0}
            check_number(flag(name), value, **limit)
        if self.choices is not None and value is not None and value not in self.choices:
            raise ArgumentError(flag(name), f"one of {', '.join(self.choices)}", quoted(value))

    def text(self, name: str) -> str:
        """The help in full: what it is, its choices, its default, an example."""
        choices = "" if self.choices is None else f" Choices: {', '.join(self.choices)}."
        return f"{self.help}{choices} Default: {self.default}. Example: {flag(name)} {self.example}"


def flag(name: str) -> str:
    """The option of the command line for a name of the configuration.

    Example:
        >>> flag("batch_size")
        '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def field(
    group: str,
    default: object,
    text: str,
    example: object,
    *,
    choices: Collection[str] | None = None,
    unset: str = "decided by the objective",
    least: int | None = None,
    is_positive: bool = False,
) -> Any:
    """A field of `Config` that knows its `Option`."""
    kind = "<str>" if isinstance(example, str) else _kind(type(example).__name__)
    words = unset if default is None else str(default)
    option = Option(group, text, str(example), kind, words, choices, least, is_positive)
    return Field(default, description=text, json_schema_extra={"option": option})  # type: ignore[dict-item]


def _kind(annotation: str) -> str:
    return "<int>" if annotation.startswith("int") else "<float>"


def recipe_options() -> dict[str, Option]:
    """The numbers that recipes take, as their docstrings have them."""
    found = {}
    for name in dict.fromkeys(n for build in recipes.named.values() for n in numbers_of(build)):
        owners = _owners(name)
        recipe, parameter = next(iter(owners.items()))
        text, _, unset = _text(recipes.named[recipe], name)[:-1].partition("; None for ")
        default = unset or str(parameter.default)
        if name == "l1":  # which gives any recipe a Laplace prior
            text, default = f"{text}.", f"{default} for {recipe}"
        else:
            text = f"{text} ({', '.join(owners)} only)."
        found[name] = _number("Numbers of some recipes", text, parameter, default)
    return found


def part_options() -> dict[str, Option]:
    """The strengths of corruptions and the weights of penalties, as their docstrings have them."""
    found = {}
    for name, corruption in corruptions.named.items():
        first = next(iter(inspect.signature(corruption).parameters.values()))
        text = _text(corruption, first.name)
        found[name] = _number("Corruption of what the encoder sees", text, first, "none")
    for name, penalty in penalties.named.items():
        first = next(iter(inspect.signature(penalty).parameters.values()))
        text = _plain((inspect.getdoc(penalty) or name).split("\n\n")[0])
        text = f"Weight of a penalty: {text[0].lower()}{text[1:]}"
        own = {recipe: parameter.default for recipe, parameter in _owners(name).items()}
        default = "; ".join(["none", *(f"{value} for {recipe}" for recipe, value in own.items())])
        found[name] = _number("Penalties", text, first, default, *own.values())
    return found


def _owners(name: str) -> dict[str, inspect.Parameter]:
    """The recipes that take this number, with its default there."""
    every = ((recipe, numbers_of(build)) for recipe, build in recipes.named.items())
    return {recipe: numbers[name] for recipe, numbers in every if name in numbers}


def _number(
    group: str, text: str, parameter: inspect.Parameter, default: str, *examples: object
) -> Option:
    kind = _kind(_annotation(parameter))
    values = [e for e in (*examples, parameter.default) if isinstance(e, int | float)]
    example = values[0] if values else 4 if kind == "<int>" else 0.3
    return Option(group, text, str(example), kind, default)


_NUMBERS = ("int", "float")


def _annotation(parameter: inspect.Parameter) -> str:
    return inspect.formatannotation(parameter.annotation).strip("'")


def numbers_of(recipe: Callable[..., VAE]) -> dict[str, inspect.Parameter]:
    """The numbers that are a recipe's own keywords."""
    parameters = inspect.signature(recipe).parameters.values()
    own = [p for p in parameters if p.name not in recipes.PairOptions.__annotations__]
    kinds = {p.name: _annotation(p).removesuffix(" | None") for p in own}
    return {p.name: p for p in own if p.kind is p.KEYWORD_ONLY and kinds[p.name] in _NUMBERS}


def _text(thing: Callable[..., object], argument: str) -> str:
    """What a docstring says of an argument, without its mathematics."""
    _, _, block = (inspect.getdoc(thing) or "").partition("Arguments:\n")
    found = re.search(rf"^ {{4}}{argument}: ((?:.+\n?)(?: {{8}}.+\n?)*)", block, re.MULTILINE)
    return f"The number {argument}." if found is None else _plain(found[1])


def _plain(text: str) -> str:
    """A docstring's text without mathematics and marks of code."""
    return " ".join(re.sub(r",? :math:`[^`]*`|`", "", text).split())
