"""The package as syntax trees: modules, rooms, and who imports whom."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Iterator

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_prune"


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Dotted name → tree of every file of the package; a room's ``__init__.py`` goes by the room's name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def room(module: str) -> str:
    """``"files"`` of ``"megatron_prune.files.staging"``; a module of no room is its own."""
    return module.split(".")[1] if "." in module else module


def imports(module: str) -> Iterator[tuple[str, int]]:
    """(module of the package, line) of every import in a module, whether at its top or in a function."""
    known = modules()
    for node in ast.walk(known[module]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if (name := inner if inner in known else node.module) in known:
                    yield name, node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
