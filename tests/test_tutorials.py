"""The tutorials run, are in step with their scripts, small, and show what was run."""

from __future__ import annotations

from pathlib import Path

import pytest

import pvae

nbformat = pytest.importorskip("nbformat", reason="jupytext and nbclient are extras")
jupytext = pytest.importorskip("jupytext", reason="jupytext and nbclient are extras")
nbclient = pytest.importorskip("nbclient", reason="jupytext and nbclient are extras")

FOLDER = Path(pvae.__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def test_notebook_and_script_are_in_step(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    script = jupytext.read(path.with_suffix(".py"))
    ours = [(c.cell_type, c.source) for c in notebook.cells]
    assert ours == [(c.cell_type, c.source) for c in script.cells]


def test_outputs_are_committed_and_small(path: Path) -> None:
    assert path.stat().st_size < 300_000
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert all(c.execution_count for c in cells)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    kinds = {o.output_type for c in cells for o in c.outputs}
    assert "error" not in kinds
    assert "stderr" not in {o.get("name") for c in cells for o in c.outputs}


@pytest.mark.slow
def test_it_runs_and_its_assertions_hold(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executes every cell anew; a notebook asserts on its own numbers."""
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = nbformat.read(path, as_version=4)
    assert sum(c.source.count("assert ") for c in notebook.cells) >= 5
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": FOLDER}}
    ).execute()
