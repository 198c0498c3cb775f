"""The README's examples run, and what it points at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pvae

ROOT = Path(pvae.__file__).parent.parent
README = ROOT / "README.md"


def run_blocks(page: Path) -> int:
    """Runs a page's Python in order, as one program; returns the number of blocks."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)  # noqa: S102
    return len(blocks)


@pytest.mark.float32
@pytest.mark.usefixtures("store")
def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_blocks(README) == 5
    printed = capsys.readouterr().out
    assert printed.startswith("evidence, IWAE-1000: -")
    assert "ELBO: -" in printed


@pytest.mark.float32
@pytest.mark.usefixtures("store")
def test_the_how_tos_run() -> None:
    assert run_blocks(ROOT / "docs" / "pairs.md") >= 6
    assert run_blocks(ROOT / "docs" / "objectives.md") == 1
    assert run_blocks(ROOT / "docs" / "diagnostics.md") == 1


def test_what_it_points_at_exists() -> None:
    pages = (ROOT / "docs").glob("*.md")
    for page in (README, *pages, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_of_diagnostics_names_all_of_them() -> None:
    page = (ROOT / "docs" / "diagnostics.md").read_text()
    functions = [name for name in pvae.diagnostics.__all__ if name[0].islower()]
    for name in (*functions, *pvae.diagnostics.CHECKS):
        assert re.search(rf"[`.]{name}\b", page), f"docs/diagnostics.md doesn't name {name}"


def test_the_test_command_is_the_one_ci_runs() -> None:
    assert "make test" in README.read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_map_names_every_module() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    for path in sorted((ROOT / "pvae").iterdir()):
        if path.name.startswith("__pycache__") or path.name in ("py.typed", "__main__.py"):
            continue
        assert path.name in page, f"docs/design.md doesn't name {path.name}"


def test_the_tests_that_the_map_names_exist() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    tests = (ROOT / "tests" / "test_terms.py").read_text()
    for name in re.findall(r"`(test_\w+)(?:\.\.\.)?`", page):
        assert f"def {name}" in tests, name
