"""What transformers 4.57 loads is what ``serving/runtimes/transformers4.py`` says it loads, and it computes what transformers 5 does."""

from __future__ import annotations

import json

import pytest
from other_pythons import logits, other_python, results
from serving_cases import CASES, TOKENS

from megatron_prune.serving.runtime import RUNTIMES

pytestmark = [pytest.mark.serving, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def found(built) -> dict[str, dict]:
    """Case → what transformers 4 makes of it."""
    words = (json.dumps(TOKENS), *map(str, built.values()))
    lines = results(other_python("TRANSFORMERS_4_PYTHON"), "transformers_4_scores.py", *words)
    names = {str(folder): name for name, folder in built.items()}
    return {names[line.pop("folder")]: line for line in lines}


@pytest.mark.parametrize("name", CASES)
def test_it_loads_what_no_rule_names_and_refuses_the_rest(name, built, found):
    if problems := RUNTIMES.get("transformers4").problems(CASES[name].written):
        assert "error" in found[name], problems
        return
    assert "error" not in found[name], found[name]["error"][-1000:]
    expected = logits(built[name], list(TOKENS))
    pairs = zip(found[name]["scores"], enumerate(TOKENS[1:]))
    assert max(abs(score - expected[place, token].item()) for score, (place, token) in pairs) < 1e-4
