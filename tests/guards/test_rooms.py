"""Rooms are named by what is in them, and what is registered has the generic cases of the tests."""

from __future__ import annotations

import ast
import functools

import pytest
from tiny import FAMILIES as TINY
from trees import PACKAGE, ROOT, modules

from megatron_prune.axes.axis import AXES
from megatron_prune.verbs.table import VERBS
from megatron_prune.families.family import FAMILIES
from megatron_prune.importance.metric import METRICS
from megatron_prune.text.reader import READERS
from megatron_prune.vocabulary.tokenizer_file import KINDS

TESTS = ROOT / "tests"
DUMPS = {"utils", "util", "helpers", "helper", "common", "misc", "shared", "base_utils"}
STEPS = {verb.replace("-", "_").replace(" ", "_") for verb in VERBS}


def test_no_module_is_named_for_holding_anything():
    assert not [name for name in modules() if DUMPS & set(name.split("."))]


def test_a_room_says_what_it_is_and_holds_nothing_else():
    for folder in (path for path in (ROOT / PACKAGE).rglob("*") if path.is_dir() and any(path.glob("*.py"))):
        name = ".".join(folder.relative_to(ROOT).parts)
        assert name in modules(), f"{name} has no __init__.py"
        body = modules()[name].body
        assert ast.get_docstring(modules()[name]), f"{name} does not say what it is"
        assert len(body) == 1 or name == PACKAGE, f"{name}/__init__.py holds more than its docstring"


def test_every_module_says_what_it_is():
    assert not [name for name, tree in modules().items() if not ast.get_docstring(tree)]


def test_steps_holds_verbs_and_nothing_else():
    files = {path.stem for path in (ROOT / PACKAGE / "steps").glob("*.py")} - {"__init__"}
    assert files == STEPS
    for name in files:
        tree = modules()[f"{PACKAGE}.steps.{name}"]
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# ------------------------------------------------------------------------------------------------------- generic cases


@functools.cache
def suite() -> dict[str, ast.Module]:
    """Path below ``tests/`` → tree of every other test file."""
    files = (path for path in TESTS.rglob("*.py") if path.parent.name != "guards")
    return {str(path.relative_to(TESTS)): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def parametrized(by: str) -> set[str]:
    """Files with a test that has one case for each of ``by``, an expression such as ``METRICS.names()``."""
    calls = ((file, node) for file, tree in suite().items() for node in ast.walk(tree) if isinstance(node, ast.Call))
    named = ((file, call) for file, call in calls if getattr(call.func, "attr", "") == "parametrize" and len(call.args) > 1)
    return {file for file, call in named if ast.unparse(call.args[1]) == by}


def strings(folder: str) -> set[str]:
    nodes = (node for file, tree in suite().items() if file.startswith(folder) for node in ast.walk(tree))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize(
    "by, files",
    [
        ("METRICS.names()", {"unit/test_metrics.py", "unit/test_importance.py", "distributed/test_score.py"}),
        ("ALLOCATORS.names()", {"unit/planning/test_allocators.py"}),
        ("AXES.names()", {"unit/test_arch.py"}),
        ("BLOCKS.names()", {"unit/test_blocks.py"}),
        ("VERBS", {"unit/test_overwrite.py"}),
    ],
    ids=["metrics", "allocators", "axes", "blocks", "verbs"],
)
def test_what_is_registered_is_tested_by_its_registry(by, files):
    assert files <= parametrized(by)
    assert METRICS.names() and AXES.names()


def test_every_family_has_a_tiny_model_that_the_tests_of_all_families_take():
    assert set(TINY) == set(FAMILIES.names()), "tests/tiny.py builds one of each"


def test_every_source_of_text_is_read_by_a_test():
    said = strings("unit/text/")
    unread = [name for name in READERS.names() if not any(word == name or word.endswith(name) for word in said)]
    assert not unread


def test_every_kind_of_tokenizer_file_is_trimmed_by_a_test(tmp_path):
    from tokenizer_kinds import byte_level, gpt2_files, rank_file, sentencepiece

    folders = [make(tmp_path / make.__name__) for make in (byte_level, gpt2_files, rank_file, sentencepiece)]
    missing = [name for name in KINDS.names() if not any(KINDS.get(name).find(folder) for folder in folders)]
    assert not missing, "tests/tokenizer_kinds.py makes one of each"
