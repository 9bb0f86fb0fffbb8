"""lm-eval's own class finds of every cut of a stock class what transformers does in this process: text in, log-likelihoods out."""

from __future__ import annotations

import json

import pytest
from other_pythons import logits, other_python, results
from serving_cases import CASES

pytestmark = [pytest.mark.serving, pytest.mark.timeout(600)]

PAIRS = (("A kilobyte is", " a thousand bytes"), ("a word", " and another one"), ("The", " end."))
STOCK = [name for name, case in CASES.items() if not case.written.form]


@pytest.fixture(scope="module")
def found(built) -> dict[str, dict]:
    """Case → what lm-eval makes of it."""
    folders = {str(built[name]): name for name in STOCK}
    lines = results(other_python("LM_EVAL_PYTHON"), "lm_eval_scores.py", json.dumps(PAIRS), *folders)
    return {folders[line.pop("folder")]: line for line in lines}


@pytest.mark.parametrize("name", STOCK)
def test_log_likelihoods_are_those_of_transformers(name, built, found):
    assert "error" not in found[name], found[name]["error"][-1000:]
    for score, (context, continuation) in zip(found[name]["scores"], found[name]["tokens"], strict=True):
        tokens = [*context, *continuation]
        assert context and continuation
        expected = logits(built[name], tokens)
        places = range(len(context) - 1, len(tokens) - 1)
        assert abs(score - sum(expected[place, tokens[place + 1]].item() for place in places)) < 1e-4
