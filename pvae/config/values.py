"""Configurations in files: read within bounds, and every value of the kind that it should be."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from pvae.config.option import Option, flag
from pvae.errors import ArgumentError, CheckpointError, check_file, quoted

__all__ = ["check_kinds", "values_in"]

_MOST_BYTES = 2**20


def values_in(path: Path) -> dict[str, object]:
    """The names and values in a JSON or TOML file.

    Raises:
        CheckpointError: If it is no such file, longer than a configuration can be, or nested
            deeper.
    """
    fixes = ["--config runs/a/config.json, of a run that pvae train wrote"]
    try:
        check_file(path, CheckpointError, _MOST_BYTES)
        text = path.read_bytes().decode()
        values = tomllib.loads(text) if path.suffix == ".toml" else _json(text)
        if not isinstance(values, dict):
            raise ValueError("no table of names and values")
    except CheckpointError as error:
        raise CheckpointError(str(path), _EXPECTED, error.actual, fixes) from error
    except (OSError, ValueError, RecursionError) as error:  # deep nesting ends in the last
        actual = f"{type(error).__name__}: {error}"
        raise CheckpointError(str(path), _EXPECTED, actual, fixes) from error
    return values


_EXPECTED = "the config.json of a run, or a JSON or TOML file with the same names"


def _json(text: str) -> object:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no JSON")


def check_kinds(values: Mapping[str, object], options: Mapping[str, Option]) -> None:
    """Refuses text where a number belongs: on the command line alone all values are text.

    Raises:
        ArgumentError: Naming the value.
    """
    for name, value in values.items():
        option = options.get(name)
        if option is None or value is None or option.kind == "<str>":
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number:
            expected = "an integer" if option.kind == "<int>" else "a number"
            raise ArgumentError(
                flag(name), expected, quoted(value), [f"{flag(name)} {option.example}"]
            )
