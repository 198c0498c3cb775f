"""The recipes of CONTRIBUTING.md: each is pasted into a copy of the project, linted and run.

A block that begins with ``python pvae/priors.py`` is put at the end of that file, with its names in
``__all__``; with ``after NAME``, behind that field of a class; a file that isn't there is made.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pvae

pytestmark = pytest.mark.slow
ROOT = Path(pvae.__file__).parent.parent
BLOCK = re.compile(r"```python (\S+\.py)(?: after (\w+))?\n(.*?)```", re.DOTALL)


def recipes() -> list[tuple[str, str, str]]:
    return BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())


def paste(path: Path, after: str, code: str) -> list[str]:
    """Puts a recipe into a file; returns the names that it defines."""
    names = [
        node.name
        for node in ast.parse(code if not after else "").body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    ]
    if not path.exists():
        path.write_text(code)
        return names
    lines = path.read_text().split("\n")
    if after:
        fields = [n for n in ast.walk(ast.parse("\n".join(lines))) if isinstance(n, ast.AnnAssign)]
        (field,) = (n for n in fields if isinstance(n.target, ast.Name) and n.target.id == after)
        assert field.end_lineno is not None
        lines[field.end_lineno : field.end_lineno] = code.rstrip().split("\n")
        path.write_text("\n".join(lines))
        return names
    text = "\n".join(lines).rstrip() + "\n\n\n" + code
    for name in names:
        text = re.sub(r"(__all__ = \[)", rf'\1"{name}", ', text, count=1)
    path.write_text(text)
    return names


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """A copy of the project with every recipe pasted in, and the names that each file got."""
    copy = tmp_path_factory.mktemp("scratch")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "pvae", copy / "pvae", ignore=ignored)
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, copy / name)
    pasted: dict[str, list[str]] = {}
    for file, after, code in recipes():
        pasted.setdefault(file, []).extend(paste(copy / file, after, code))
    # what any editor does on saving: the order of `__all__`, and nothing else
    subprocess.run(
        [sys.executable, "-m", "ruff", "check", "-q", "--select", "RUF022", "--fix", *pasted],
        cwd=copy,
        check=False,
    )
    changed = [file for file, names in pasted.items() if names]
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", *changed], cwd=copy, check=True)
    return copy, pasted


def run(copy: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_is_a_recipe_of_each_kind() -> None:
    places = {file for file, *_ in recipes()}
    assert places >= {
        "pvae/priors.py",
        "pvae/likelihoods.py",
        "pvae/guides.py",
        "pvae/objectives/gradients.py",
        "pvae/diagnostics/spread.py",
        "pvae/recipes.py",
        "pvae/config/config.py",
    }


def test_they_pass_the_linters(scratch: tuple[Path, dict[str, list[str]]]) -> None:
    copy, pasted = scratch
    run(copy, "ruff", "check", *pasted)
    for file, _, code in recipes():
        (copy / "block.py").write_text(code if not file.endswith("config.py") else "")
        run(copy, "ruff", "format", "--check", "block.py")
    (copy / "block.py").unlink()
    run(copy, "mypy", *pasted)


def test_their_examples_run(scratch: tuple[Path, dict[str, list[str]]]) -> None:
    copy, pasted = scratch
    with_example = [code for _, _, code in recipes() if ">>>" in code]
    names = " or ".join(name for found in pasted.values() for name in found)
    done = run(copy, "pytest", "-q", "-p", "no:cacheprovider", *pasted, "-k", names)
    assert f"{len(with_example)} passed" in done, done


def test_the_command_line_knows_them(scratch: tuple[Path, dict[str, list[str]]]) -> None:
    """A part, a recipe and an option are choices of ``pvae train`` by what was pasted alone."""
    copy, _ = scratch
    text = re.sub(r"\s+", " ", run(copy, "pvae", "train", "--help"))
    for word in ("cauchy", "poisson", "laplace_field", "tempered", "ridge_ae", "--clip-norm"):
        assert word in text, word
    out = run(
        copy,
        "pvae", "train", "--epochs", "1", "--prior", "cauchy", "--guide", "laplace_field",
        "--objective", "tempered", "--clip-norm", "10", "--hidden", "8", "--out", "run",
    )  # fmt: skip
    assert "run" in out
    assert '"clip_norm": 10.0' in (copy / "run" / "config.json").read_text()
