"""There is one way to open a model, and what makes a plan is an argument."""

from __future__ import annotations

import ast

from trees import PACKAGE, modules, room

OPENERS = {"open_checkpoint", "open_model", "open_adapted"}
ELSEWHERE = {
    f"{PACKAGE}.recovery.check": "the teacher, about which other things are said",
    f"{PACKAGE}.recovery.launch": "the newest checkpoint of the run itself",
    f"{PACKAGE}.runtime.stock_model": "what transformers is to run",
    f"{PACKAGE}.writing.check": "what was just written",
    f"{PACKAGE}.writing.huggingface": "what is just written",
}


def test_a_model_is_opened_in_one_place():
    calls = {
        module
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in OPENERS
    }
    found = {module for module in calls if room(module) not in ("checkpoint", "opening")}
    assert found == set(ELSEWHERE)


def test_nothing_is_read_back_from_the_record_of_a_plan():
    """Only ``planning/plan.py``, where version 1 of the file keeps the tokenizer's digest."""
    named = lambda node: getattr(node, "attr", getattr(node, "id", "")) == "made_by"
    read = [
        f"{module}:{node.lineno}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and named(node.value))
        or (isinstance(node, ast.Attribute) and node.attr in ("get", "pop", "items") and named(node.value))
    ]
    assert {place.rpartition(":")[0] for place in read} == {f"{PACKAGE}.planning.plan"}, read
