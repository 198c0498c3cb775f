"""How large the house is, how much of it repeats, and how much of it one step of training touches.

    python benchmarks/house.py                  measures the working tree
    python benchmarks/house.py COMMIT [COMMIT]  measures commits, a column for each

Prints a page of Markdown: a table, and what each of its measures is. The page of results is made by
``python benchmarks/house.py COMMIT [COMMIT] > benchmarks/results/house.md``. Nothing of pvae is
called by its Python interface, so that trees of different interfaces can be compared: the source is
parsed, and ``python -m pvae train`` runs under a profile.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from radon.complexity import cc_visit
from radon.visitors import Function

ROOT = Path(__file__).parents[1]
RUN = 6
"""Lines that have to agree, one after another, to count as repeated."""
COMPLEX = 11
"""McCabe's number from which radon gives a function the grade C."""
STEADY = 10
"""The update after which a step counts as steady: past every warm-up, and within one epoch."""
SHARED = ("max_rows", "seed", "structure", "plate")
"""Arguments that many tools have."""
THINGS = ("prior", "likelihood", "objective", "diagnostic", "recipe", "option")
BY_HAND = {
    "diagnostic": (
        "pvae/diagnostics/joint.py",
        "pvae/diagnostics/__init__.py",
        "pvae/diagnostics/screen.py",
        "tests/test_calibration.py",
        "docs/diagnostics.md",
    ),
    "recipe": (
        "pvae/recipes/deterministic.py",
        "pvae/recipes/__init__.py",
        "pvae/cli/training.py",
        "tests/test_autoencoders.py",
        "tests/test_cli_recipes.py",
    ),
    "option": (
        "pvae/recipes/deterministic.py",
        "pvae/runs.py",
        "pvae/cli/training.py",
        "tests/test_autoencoders.py",
        "tests/test_cli_recipes.py",
    ),
}
"""Where `tarp`, `wae` and `commitment` are at 0e5bb99, whose CONTRIBUTING.md tells of none."""

TRAINING = ("train", "--epochs", "2", "--latent-dim", "2")
PROFILED = """
import json, os, runpy, sys, threading

package, result, updates = sys.argv[1], sys.argv[2], int(sys.argv[3])
between = [set()]  # the functions that were called before, between and after the updates

def look(frame, event, argument):
    if event == "c_call" and argument.__name__.startswith("_fused_adam"):
        between.append(set())
        if len(between) == updates + 2:
            sys.setprofile(None)
            with open(result, "w") as file:
                json.dump([sorted(called) for called in between[:-1]], file)
            os._exit(0)
    elif event == "call":
        code = frame.f_code
        is_function = code.co_flags & 1 and code.co_name not in COMPREHENSIONS
        if is_function and code.co_filename.startswith(package):
            between[-1].add((code.co_filename, code.co_firstlineno, code.co_qualname))

COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}
sys.argv = ["pvae", *sys.argv[4:]]
threading.setprofile(look)
sys.setprofile(look)
runpy.run_module("pvae", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Module:
    """A file of the package: its path within it, its text, and its syntax tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def length(self) -> int:
        return len(self.text.splitlines())

    @property
    def room(self) -> str:
        """The module or subpackage of pvae that the file belongs to."""
        return self.path.parts[0].split(".")[0]


class Tree:
    """A checkout of the repository."""

    def __init__(self, root: Path) -> None:
        self.root, self.package = root.resolve(), root.resolve() / "pvae"

    @cached_property
    def modules(self) -> list[Module]:
        paths = sorted([*self.package.rglob("*.py"), *self.package.rglob("*.pyi")])
        texts = [path.read_text() for path in paths]
        return [
            Module(path.relative_to(self.package), text, ast.parse(text))
            for path, text in zip(paths, texts, strict=True)
        ]

    @cached_property
    def called(self) -> list[set[tuple[str, int, str]]]:
        """File, line and name of the functions of pvae called before each update of a training."""
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "called.json"
            profile = [sys.executable, "-c", PROFILED, f"{self.package}{os.sep}", str(result)]
            done = subprocess.run(
                [*profile, str(STEADY), *TRAINING, "--out", f"{folder}/run"],
                cwd=self.root,
                env={**os.environ, "PYTHONPATH": str(self.root), "CUDA_VISIBLE_DEVICES": ""},
                capture_output=True,
                text=True,
                check=False,
            )
            if not result.exists():
                raise RuntimeError(
                    f"fewer than {STEADY + 1} updates of Adam: {done.stderr[-2000:]}"
                )
            return [{tuple(f) for f in called} for called in json.loads(result.read_text())]


# What is measured


def files(tree: Tree) -> str:
    """Python files and stubs in `pvae/`."""
    return f"{len(tree.modules)}"


def lines(tree: Tree) -> str:
    """All lines of those files, blank ones and docstrings too."""
    return f"{sum(m.length for m in tree.modules):,}"


def module_lengths(tree: Tree) -> str:
    """Lines of a file: median, longest."""
    return _median_and_longest([m.length for m in tree.modules])


def body_lengths(tree: Tree) -> str:
    """Lines from the first statement after the docstring to a function's last: median, longest."""
    return _median_and_longest([length for m in tree.modules for length in _bodies(m.tree)])


def largest_rooms(tree: Tree) -> str:
    """The five modules or subpackages of pvae with most lines."""
    rooms: Counter[str] = Counter()
    for module in tree.modules:
        rooms[module.room] += module.length
    return ", ".join(f"{room} {length:,}" for room, length in rooms.most_common(5))


def top_names(tree: Tree) -> str:
    """Names in `pvae.__all__`, as Python has it after `import pvae`."""
    done = subprocess.run(
        [sys.executable, "-c", "import pvae; print(len(pvae.__all__))"],
        cwd=tree.root,
        env={**os.environ, "PYTHONPATH": str(tree.root)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def public_names(tree: Tree) -> str:
    """Names that are written down in an `__all__`, summed over the files but for pvae's own."""
    return f"{sum(len(_public(m.tree)) for m in tree.modules if m.room != '__init__'):,}"


def uses_of_any(tree: Tree) -> str:
    """Places where the type `Any` is used, its imports apart."""
    nodes = [node for m in tree.modules for node in ast.walk(m.tree)]
    names = [n.id for n in nodes if isinstance(n, ast.Name)]
    names += [n.attr for n in nodes if isinstance(n, ast.Attribute)]
    return f"{names.count('Any')}"


def complex_functions(tree: Tree) -> str:
    """Functions and methods that radon grades C or worse: McCabe's number is 11 or more."""
    blocks = [block for m in tree.modules for block in cc_visit(m.text)]
    numbers = [b.complexity for b in blocks if isinstance(b, Function)]
    return f"{sum(number >= COMPLEX for number in numbers)}"


def repeated_lines(tree: Tree) -> str:
    """Lines in runs of six or more that occur again, when indents, blanks and comments are off."""
    texts = [[line.strip() for line in m.text.splitlines()] for m in tree.modules]
    codes = [[line for line in text if line and not line.startswith("#")] for text in texts]
    runs = Counter(run for code in codes for run in _runs(code))
    repeated = 0
    for code in codes:
        again = {i for i, run in enumerate(_runs(code)) if runs[run] > 1}
        repeated += len({i + k for i in again for k in range(RUN)})
    return f"{repeated:,}"


def shared_arguments(tree: Tree) -> str:
    """Docstrings that document an argument of this name."""
    documented = [_documented(node) for m in tree.modules for node in ast.walk(m.tree)]
    return ", ".join(f"{name} {sum(name in d for d in documented)}" for name in SHARED)


def before_first_update(tree: Tree) -> str:
    """Files and functions (and lambdas) of pvae called before Adam's kernel is first called."""
    return _files_and_functions(tree.called[0])


def steady_step(tree: Tree) -> str:
    """The same between the tenth call of Adam's kernel and the next, which is within one epoch."""
    return _files_and_functions(tree.called[STEADY])


def tests(tree: Tree) -> str:
    """Lines of the Python files in `tests/`, and functions there that are named `test_...`."""
    texts = [path.read_text() for path in sorted((tree.root / "tests").rglob("*.py"))]
    functions = sum(len(re.findall(r"^ *def test_", text, re.MULTILINE)) for text in texts)
    return f"{sum(len(text.splitlines()) for text in texts):,} lines, {functions} functions"


def to_edit(thing: str) -> Callable[[Tree], str]:
    """The measure: how many files CONTRIBUTING.md names for a new one of these."""

    def edited(tree: Tree) -> str:
        named = named_files((tree.root / "CONTRIBUTING.md").read_text(), thing)
        mark = "" if named else "*"
        named = named or BY_HAND.get(thing, ())
        inside = sum(name.startswith("pvae/") for name in named)
        return f"{len(named)}{mark} ({inside} in pvae/)"

    return edited


def named_files(text: str, thing: str) -> tuple[str, ...]:
    """The files that the section on a thing names, but for the changelog, in order.

    What stands in parentheses or in a block of code isn't to be edited. A section that begins with
    "The same in" takes over what the section on priors names outside `pvae/priors.py`.
    """
    sections = re.split(
        r"^##+ ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE
    )
    for section in sections[1:]:
        title, _, rest = section.partition("\n")
        if not re.search(rf"\b{thing}\b", title, re.IGNORECASE):
            continue
        prose = re.sub(r"\([^()]*\)", "", rest)
        found = re.findall(r"`((?:[\w.-]+/)+|(?:[\w.-]+/)*[\w.-]+\.(?:py|pyi|md|toml|txt))`", prose)
        if rest.strip().startswith("The same in") and thing != "prior":
            found += [name for name in named_files(text, "prior") if name != "pvae/priors.py"]
        return tuple(dict.fromkeys(name for name in found if name != "CHANGELOG.md"))
    return ()


def _median_and_longest(lengths: Sequence[int]) -> str:
    return f"{statistics.median(lengths):g}, {max(lengths)}"


def _bodies(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def _public(tree: ast.Module) -> list[str]:
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    values = [
        node.value
        for node in assigned
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    ]
    found = [part for value in values for part in ast.walk(value)]
    return [n.value for n in found if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def _runs(code: list[str]) -> list[tuple[str, ...]]:
    return [tuple(code[i : i + RUN]) for i in range(len(code) - RUN + 1)]


def _documented(node: ast.AST) -> set[str]:
    """Arguments that a docstring documents."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return set()
    heads = re.findall(r"^\s+(\w+(?:, \w+)*):", ast.get_docstring(node) or "", re.MULTILINE)
    return {name for head in heads for name in head.split(", ")}


def _files_and_functions(called: set[tuple[str, int, str]]) -> str:
    return f"{len({file for file, _, _ in called})}, {len(called)}"


MEASURES: dict[str, Callable[[Tree], str]] = {
    "files": files,
    "lines": lines,
    "lines of a file": module_lengths,
    "lines of a function's body": body_lengths,
    "largest rooms": largest_rooms,
    "public names of `pvae`": top_names,
    "public names of its files": public_names,
    "uses of `Any`": uses_of_any,
    "complex functions": complex_functions,
    "repeated lines": repeated_lines,
    "arguments documented": shared_arguments,
    "files, functions before the first update": before_first_update,
    "files, functions in a steady step": steady_step,
    "tests": tests,
}


# The page


def checkout(commit: str, folder: Path) -> Tree:
    """A commit's files, in a folder of their own."""
    archive = folder / f"{commit}.zip"
    subprocess.run(
        ["git", "archive", "--format=zip", "--output", str(archive), commit], cwd=ROOT, check=True
    )
    shutil.unpack_archive(archive, folder / commit)
    return Tree(folder / commit)


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def page(columns: dict[str, Tree]) -> str:
    """The table, and what its measures are."""
    measures = MEASURES | {f"files to edit for a new {thing}": to_edit(thing) for thing in THINGS}
    rows = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for label, measure in measures.items():
        rows.append(f"| {label} | {' | '.join(measure(tree) for tree in columns.values())} |")
    meanings = [f"- **{label}**: {measure.__doc__}" for label, measure in MEASURES.items()]
    meanings.append(
        "- **files to edit for a new ...**: Files that the section of CONTRIBUTING.md on it names, "
        "the changelog apart. A star: there is no such section, and the files are those that were "
        "edited for `tarp`, `wae` and `commitment`, as a table in the script lists them."
    )
    return "\n".join([*rows, "", "What each measures:", "", *meanings])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("commits", nargs="*", help="without any, the working tree is measured")
    commits = [git("rev-parse", "--short", commit) for commit in parser.parse_args().commits]
    from provenance import made_with  # which imports torch: not needed to measure

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if commits:
            columns = {commit: checkout(commit, Path(folder)) for commit in commits}
        else:
            changed = " and changes" if git("status", "--porcelain") else ""
            columns = {f"{git('rev-parse', '--short', 'HEAD')}{changed}": Tree(ROOT)}
        table = page(columns)
    made = made_with(time.perf_counter() - started)
    command = " ".join(["python benchmarks/house.py", *commits])
    print("# The house, measured\n")
    print(
        f"Made by `{command}`, the script as of commit {made['commit']}, on Python "
        f"{made['python']}, torch {made['torch']}, pyro-ppl {version('pyro-ppl')}, radon "
        f"{version('radon')}. The profiled training is `pvae {' '.join(TRAINING)}`, on a CPU.\n"
    )
    print(table)


if __name__ == "__main__":
    main()
