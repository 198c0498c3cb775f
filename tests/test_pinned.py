"""constraints-dev.txt pins all that the development install brings."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pvae

LOCK = Path(pvae.__file__).parent.parent / "constraints-dev.txt"
LEFT_OUT = {"pvae", "setuptools"}
"""This project; and what the installer brings by itself."""


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def needed(name: str, extras: frozenset[str], found: set[tuple[str, frozenset[str]]]) -> None:
    """Adds a distribution and all that it requires here, with extras."""
    if (name, extras) in found:
        return
    found.add((name, extras))
    for text in distribution(name).requires or []:
        one = Requirement(text)
        chosen = [{"extra": extra} for extra in (*extras, "")]
        if one.marker is None or any(one.marker.evaluate(extra) for extra in chosen):
            needed(name_of(one.name), frozenset(one.extras), found)


def test_everything_that_is_installed_is_pinned() -> None:
    found: set[tuple[str, frozenset[str]]] = set()
    try:
        needed("pvae", frozenset({"dev"}), found)
    except PackageNotFoundError as error:
        pytest.skip(f"not a development install: {error}")
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    pinned = {name_of(line.split("==")[0]) for line in lines}
    missing = {name for name, _ in found} - pinned - LEFT_OUT
    assert not {name for name in missing if not name.startswith(("nvidia-", "cuda-", "triton"))}
