"""What vLLM loads is what ``serving/runtimes/vllm.py`` says it loads, and it computes what transformers computes."""

from __future__ import annotations

import json

import pytest
from other_pythons import logits, other_python, results
from serving_cases import CASES, TOKENS

from megatron_prune.serving import tensor_parallel
from megatron_prune.serving.runtime import RUNTIMES

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1800)]
FAR = 2e-3


@pytest.fixture(scope="module")
def found(built) -> dict[str, dict]:
    """Case → what vLLM makes of it."""
    lines = results(other_python("VLLM_PYTHON"), "vllm_scores.py", json.dumps(TOKENS), "1", *map(str, built.values()))
    names = {str(folder): name for name, folder in built.items()}
    return {names[line.pop("folder")]: line for line in lines}


def farthest(folder, scores: list[float]) -> float:
    expected = logits(folder, list(TOKENS))
    tokens = enumerate(TOKENS[1:])
    return max(abs(score - expected[place, token].item()) for score, (place, token) in zip(scores, tokens))


@pytest.mark.parametrize("name", CASES)
def test_it_loads_what_no_rule_names_and_refuses_the_rest(name, built, found):
    if problems := RUNTIMES.get("vllm").problems(CASES[name].written):
        assert "error" in found[name], problems
    else:
        assert "error" not in found[name], found[name]["error"][-1000:]
        assert farthest(built[name], found[name]["scores"]) < FAR


@pytest.mark.parametrize(
    "name", ["llama-whole", "llama-groups", "qwen2-as-llama", "nas-groups", "llama-per-layer-groups", "llama-ffn"]
)
def test_two_ranks_share_what_divides(name, built):
    (line,) = results(other_python("VLLM_PYTHON"), "vllm_scores.py", json.dumps(TOKENS), "2", str(built[name]))
    if problems := tensor_parallel.problems(CASES[name].config, 2):
        assert "error" in line, problems
    else:
        assert "error" not in line, line["error"][-1000:]
        assert farthest(built[name], line["scores"]) < FAR
