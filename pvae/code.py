"""The code of functions in words that are the same in every process, and the names it reads."""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import linecache
import sys
import types
from collections.abc import Iterator

__all__ = ["digest_of", "globals_in", "names_in", "source_of"]

_READING = ("LOAD_GLOBAL", "LOAD_NAME")
_KINDS = (
    0x2F | 0x80 | 0x200
)  # flags of code: what arguments it takes, and whether it is a generator


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """The names that code may read things under: globals, attributes, words."""
    inner = (names_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
    words = (c for c in code.co_consts if isinstance(c, str))
    return frozenset({*code.co_names, *words}.union(*inner))


@functools.lru_cache(maxsize=4096)
def globals_in(code: types.CodeType) -> frozenset[str]:
    """The globals that code reads, functions within it too.

    Example:
        >>> sorted(globals_in((lambda x: math.exp(x.scale) * factor).__code__))
        ['factor', 'math']
    """
    read = (i.argval for i in dis.get_instructions(code) if i.opname in _READING)
    inner = (globals_in(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return frozenset(read).union(*inner)


@functools.lru_cache(maxsize=4096)
def digest_of(code: types.CodeType) -> str:
    """A digest of what code does, whatever file it stands in and at which line.

    It is that of one minor version of Python, whose instructions the next one changes.

    Example:
        >>> one, same, other = lambda x: x + 1, lambda x:  x + 1, lambda x: x + 2
        >>> digest_of(one.__code__) == digest_of(same.__code__) != digest_of(other.__code__)
        True
    """
    return hashlib.sha256(_written(code).encode()).hexdigest()[:12]


def _written(value: object) -> str:
    if isinstance(value, types.CodeType):
        counts = value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount
        names = value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars
        constants = [_written(constant) for constant in value.co_consts]
        if _has_docstring(value):
            constants[0] = repr(None)
        does = value.co_code.hex(), value.co_exceptiontable.hex(), value.co_flags & _KINDS
        return repr((counts, names, constants, does))
    if isinstance(value, frozenset):  # whose order is another one in each process
        return f"{{{', '.join(sorted(map(_written, value)))}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))})"
    return repr(value)


def _has_docstring(code: types.CodeType) -> bool:
    """Whether the first constant is a docstring, which from Python 3.13 on a flag says."""
    if sys.version_info >= (3, 13):
        return bool(code.co_flags & inspect.CO_HAS_DOCSTRING)
    is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")
    return bool(is_function and code.co_consts and isinstance(code.co_consts[0], str))


def source_of(code: types.CodeType) -> str | None:
    """The source text without comments and docstrings, laid out in one way; None if there is none.

    Nor is there one where the file has changed since the code was read from it.
    """
    text = "".join(linecache.getlines(code.co_filename))
    return _sources(text).get(code) if text else None


@functools.lru_cache(maxsize=64)
def _sources(text: str) -> dict[types.CodeType, str]:
    """The source of each function in a file, by its code."""
    try:
        tree = ast.parse(text)
        whole = compile(text, "", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return {}
    nodes: dict[tuple[str, int], list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            name = "<lambda>" if isinstance(node, ast.Lambda) else node.name
            nodes.setdefault((name, _first_line(node)), []).append(node)
    found = {}
    for code in _codes(whole):
        places = {*code.co_positions()}
        named = nodes.get((code.co_name, code.co_firstlineno), [])
        for node in named:
            if not isinstance(node, ast.Lambda) or _place(node.body) in places:
                found[code] = ast.unparse(_bare(node))
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> int:
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return min([node.lineno, *(each.lineno for each in decorators)])


def _place(node: ast.expr) -> tuple[int | None, ...]:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _bare(node: ast.AST) -> ast.AST:
    """A function without docstrings."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(inner):
            inner.body = inner.body[1:] or [ast.Pass()]
    return node
