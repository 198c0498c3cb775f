"""What `benchmarks/house.py` measures, on a house whose numbers are known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from house import Tree

FIRST = '''"""A module of known numbers."""

from typing import Any

__all__ = ["long", "short"]


def long(x: Any, seed: int) -> int:
    """Eleven lines of a body, and as many ways through it.

    Arguments:
        x: A number.
        seed, plate: Two at once.
    """
    if x == 1: return 1
    if x == 2: return 2
    if x == 3: return 3
    if x == 4: return 4
    if x == 5: return 5
    if x == 6: return 6
    if x == 7: return 7
    if x == 8: return 8
    if x == 9 or seed: return 9

    return 0
'''
SECOND = '''"""Another, where six lines stand again, further in and with a comment between."""

__all__ = ["short"]


def short(x):
    if x:
        if x == 2: return 2
        if x == 3: return 3
        # a comment
        if x == 4: return 4
        if x == 5: return 5
        if x == 6: return 6
        if x == 7: return 7
'''
TELLING = """# Contributing

## Adding a prior

1. A class in `pvae/priors.py`, of `Conditional`.
2. A row in `tests/test_parts.py` (which `tests/test_matrix.py` runs), and a line in `CHANGELOG.md`.

```python
open("`pvae/no.py`")
```

## Adding a likelihood

The same in `pvae/likelihoods.py`.

## Adding an objective

A file in `pvae/objectives/`, a row in `docs/objectives.md`, and again `docs/objectives.md`.
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from house import Tree

    (tmp_path / "pvae" / "room").mkdir(parents=True)
    (tmp_path / "pvae" / "first.py").write_text(FIRST)
    (tmp_path / "pvae" / "room" / "second.py").write_text(SECOND)
    (tmp_path / "CONTRIBUTING.md").write_text(TELLING)
    return Tree(tmp_path)


def test_measures(tree: Tree) -> None:
    import house

    assert house.files(tree) == "2"
    assert house.lines(tree) == "39"  # 25 and 14
    assert house.module_lengths(tree) == "19.5, 25"
    assert house.body_lengths(tree) == "9.5, 11"  # with the blank line: 11 and 8
    assert house.largest_rooms(tree) == "first 25, room 14"
    assert house.public_names(tree) == "3"
    assert house.uses_of_any(tree) == "1"
    assert house.complex_functions(tree) == "1"  # 1 + 9 + 1 for `or`; the other has 8
    assert house.repeated_lines(tree) == "12"  # x == 2 to x == 7, twice
    assert house.shared_arguments(tree) == "max_rows 0, seed 1, structure 0, plate 1"


def test_files_to_edit(tree: Tree) -> None:
    import house

    def named(thing: str) -> tuple[str, ...]:
        return house.named_files(TELLING, thing)

    assert named("prior") == ("pvae/priors.py", "tests/test_parts.py")
    assert named("likelihood") == ("pvae/likelihoods.py", "tests/test_parts.py")
    assert named("objective") == ("pvae/objectives/", "docs/objectives.md")
    assert named("recipe") == ()
    assert house.to_edit("prior")(tree) == "2 (1 in pvae/)"
    assert house.to_edit("recipe")(tree).startswith("5*")
