"""A warning list: files and functions that are long, by name. What is new on it says why; what is no longer long leaves it."""

from __future__ import annotations

import ast
from typing import Iterator

from trees import ROOT, modules

LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 80

FILES: set[str] = set()
FUNCTIONS: set[str] = set()


def functions(tree: ast.AST, within: str) -> Iterator[tuple[str, int]]:
    """(dotted name, lines) of every function, nested ones and methods too."""
    for node in ast.iter_child_nodes(tree):
        name = f"{within}.{node.name}" if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else within
        if isinstance(node, ast.FunctionDef):
            yield name, node.end_lineno - node.lineno + 1
        yield from functions(node, name)


def lines_of(module: str) -> int:
    path = ROOT / f"{module.replace('.', '/')}.py"
    return len(path.read_bytes().splitlines()) if path.exists() else 0  # a room's __init__.py is a docstring


def compare(sizes: dict[str, int], limit: int, listed: set[str]) -> None:
    long = {name: lines for name, lines in sizes.items() if lines > limit}
    new = ", ".join(f"{name} ({lines})" for name, lines in long.items() if name not in listed)
    assert not new, (
        f"longer than {limit} lines: {new}. Why? Split off what has a name of its own, or list it here with the reason"
    )
    assert listed <= set(long), f"no longer long, to be taken off the list: {', '.join(listed - set(long))}"


def test_files_are_short():
    compare({module: lines_of(module) for module in modules()}, LINES_OF_A_FILE, FILES)


def test_functions_are_short():
    sizes = dict(found for module, tree in modules().items() for found in functions(tree, module))
    compare(sizes, LINES_OF_A_FUNCTION, FUNCTIONS)
