"""The house itself: who imports whom, how long files are, how fast the door opens."""

from __future__ import annotations

import ast
import functools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import pvae
from tests import pretend

ROOT = Path(pvae.__file__).parent

# Each room of the house, which is a module or a package, stands in one of these four tables. One
# that isn't built yet may stand there already.

GROUND = {  # imports the ground
    "annotations",
    "code",
    "conditional",
    "data",
    "described",
    "devices",
    "distributed",
    "distributions",
    "divergence",
    "errors",
    "estimate",
    "files",
    "limits",
    "lock",
    "measure",
    "memory",
    "internals",
    "jacobian",
    "mmd",
    "modes",
    "options",
    "origin",
    "pair",
    "randomness",
    "schedules",
    "shelf",
    "sites",
    "threads",
    "types",
}
PARTS: dict[str, set[str]] = {  # import the ground and what stands here
    "networks": set(),
    "priors": {"networks"},
    "likelihoods": {"networks"},
    "guides": {"networks"},
    "corruptions": set(),
    "penalties": set(),
}
PARTS["vae"] = set(PARTS)
TOOLS = [  # import the ground and the tools above them
    "terms",
    "simulate",
    "objectives",
    "engine",
    "svi",
    "checkpoint",
    "bounds",
    "latent",
    "diagnostics",
    "export",
    "fitting",
    "testing",
]
FACES = {"config", "recipes", "runs", "plots", "cli", "__main__"}  # import anything

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MAX_LINES = 600  # of a file, which aims at 350; past this it becomes a package
MAX_BODY = 60  # of a function's body, without its docstring


@functools.cache
def trees() -> dict[Path, ast.Module]:
    """The syntax tree of each file of the package."""
    return {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def room(path: Path) -> str:
    """The module that a file belongs to: a package counts as one."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.Module) -> set[str]:
    """The rooms that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("pvae.")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            first, *rest = node.module.split(".")
            if first == "pvae":
                names |= {rest[0]} if rest else {a.name for a in node.names}
    return names & {room(path) for path in trees()}


def allowed(here: str) -> set[str]:
    """The rooms that a room may import."""
    if here in GROUND:
        return GROUND
    if here in PARTS:
        return GROUND | PARTS[here]
    if here in TOOLS:
        return GROUND | set(TOOLS[: TOOLS.index(here)])
    return GROUND | set(PARTS) | set(TOOLS) | FACES


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[ast.get_docstring(function) is not None :]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def assert_none(offenders: list[str]) -> None:
    assert len(trees()) > 50, "the package wasn't found"
    assert not offenders, "\n".join(["", *offenders])


def test_every_room_has_its_place() -> None:
    places = [*GROUND, *PARTS, *TOOLS, *FACES]
    assert len(places) == len(set(places)), "a room stands in two tables"
    assert_none(sorted({room(path) for path in trees()} - {"__init__", *places}))


def test_imports() -> None:
    offenders = []
    for path, tree in trees().items():
        here = room(path)
        if wrong := imports(tree) - allowed(here) - {here}:
            offenders.append(f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}")
    assert_none(offenders)


def test_files_and_functions_are_short() -> None:
    offenders = []
    for path, tree in trees().items():
        name = path.relative_to(ROOT)
        if (lines := len(path.read_text().splitlines())) > MAX_LINES:
            offenders.append(f"{name} has {lines} lines")
        functions = (n for n in ast.walk(tree) if isinstance(n, FUNCTIONS))
        lengths = [(node.name, body_length(node)) for node in functions]
        offenders += [f"{name}: {n} has {k} lines" for n, k in lengths if k > MAX_BODY]
    assert_none(offenders)


def test_every_file_says_what_it_is_and_what_is_public() -> None:
    offenders = []
    for path, tree in trees().items():
        assigned = [target for n in tree.body if isinstance(n, ast.Assign) for target in n.targets]
        names = {n.id for target in assigned for n in ast.walk(target) if isinstance(n, ast.Name)}
        if not ast.get_docstring(tree):
            offenders.append(f"{path.relative_to(ROOT)} has no docstring")
        if "__all__" not in names and path.name != "__main__.py":
            offenders.append(f"{path.relative_to(ROOT)} has no __all__")
    assert_none(offenders)


def test_public_names_exist() -> None:
    """Those of the stub, which mypy reads, are those that there are: here it refuses another."""
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    imported = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    stated = [alias.name for node in imported for alias in node.names]
    assert "fit" in stated
    assert sorted(stated) == dir(pvae)
    for name in stated:
        assert getattr(pvae, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = pvae.nothing  # type: ignore[attr-defined]


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    return done.stdout


def test_importing_pvae_imports_nothing_heavy() -> None:
    modules = json.loads(python("import pvae, sys, json; print(json.dumps(list(sys.modules)))"))
    heavy = {"torch", "pyro", "numpy", "arviz", "matplotlib", "sklearn", "typer"}
    assert not heavy & set(modules)


@pytest.mark.skipif(pretend.kind() is not None, reason="a process on it starts with torch")
def test_help_answers_at_once() -> None:
    """Under half a second of processor time, of the whole process."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "pvae", "--help"], check=True, capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "train" in done.stdout
    assert min(times) < 0.5


def test_importing_everything_changes_no_global_state() -> None:
    code = """
import torch, pyro, numpy as np
def state():
    return (dict(pyro.settings.get()), torch.get_default_dtype(), torch.get_num_threads(),
            torch.is_grad_enabled(), np.geterr(), torch.get_rng_state().sum().item(),
            len(pyro.get_param_store()))
before = state()
import pvae
for name in pvae.__all__:
    getattr(pvae, name)
import pvae.cli
assert state() == before, (state(), before)
"""
    python(code)


def test_no_machine_paths_and_no_registries() -> None:
    repository = ROOT.parent
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    forbidden = ("/ho" + "me/", "/wo" + "rk/", "pypi" + ".org", "python" + "hosted", "/ro" + "ot/")
    offenders = []
    for name in listed.stdout.splitlines():
        path = repository / name
        if path.is_file() and path.suffix != ".png":
            text = path.read_text(errors="ignore")
            offenders += [f"{name} contains {word}" for word in forbidden if word in text]
    assert_none(offenders)
