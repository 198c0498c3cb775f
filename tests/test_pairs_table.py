"""The table of pairs in docs/pairs.md, and the script that makes it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FEW = ["probabilistic PCA by hand", "LDA: words", "capture-recapture", "AutoDelta (MAP)"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("pairs")


def test_the_table_has_every_kind_of_pair_and_no_empty_cell(script: Any) -> None:
    text = (ROOT / "docs" / "pairs.md").read_text()
    table = text.split(script.START)[1].split(script.END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines}
    assert list(cells) == [*script.ROWS]
    for kind, row in cells.items():
        assert len(row) == len(script.COLUMNS), kind
        for cell in row:
            assert cell.strip(" |"), kind
            assert script.FAULT not in cell, kind


@pytest.mark.slow
@pytest.mark.usefixtures("store")
@pytest.mark.filterwarnings("ignore::pvae.PvaeWarning")
@pytest.mark.parametrize("name", FEW)
def test_a_row_is_made_without_a_fault(script: Any, name: str) -> None:
    (kind,) = [kind for kind in script.ROWS if name in kind]
    cells = script.measured(kind, ["fit", "equals SVI", "evidence", "export"])
    for column, cell in cells.items():
        assert script.FAULT not in cell, (column, cell)
    assert cells["equals SVI"] == "0" or float(cells["equals SVI"]) < 1e-7
