"""What llama.cpp loads is what ``serving/runtimes/llama_cpp.py`` says it loads, and it computes what transformers computes."""

from __future__ import annotations

import json
import os

import pytest
from other_pythons import logits, other_python, results, to_gguf
from serving_cases import CASES, TOKENS
from transformers import AutoTokenizer

from megatron_prune.runtime.world import World
from megatron_prune.serving.pre_tokenizer import pre_tokenizer_of
from megatron_prune.serving.runtime import REFUSED, RUNTIMES, SILENT
from megatron_prune.steps.vocab_trim import VocabTrimOptions, vocab_trim

pytestmark = [pytest.mark.serving, pytest.mark.timeout(600)]
FAR = 2e-3
"""Gemma's activation is looked up in a table of float16 values; of 62 such layers the sum is."""
FAR_62 = 1e-2


@pytest.fixture(scope="module")
def python() -> str:
    found = other_python("LLAMA_CPP_PYTHON")
    if not os.environ.get("LLAMA_CPP"):
        pytest.skip("LLAMA_CPP names no directory with convert_hf_to_gguf.py")
    return found


def farthest(python, folder, file, prompts: list[list[int]], texts: list[str] | None = None) -> float:
    """The most that likely tokens after each prompt score otherwise than in transformers."""
    letter = AutoTokenizer.from_pretrained(folder).encode("a", add_special_tokens=False)[0]
    lines = results(python, "llama_cpp_scores.py", str(file), json.dumps(texts or prompts), str(letter))
    differences = []
    for prompt, line in zip(prompts, lines, strict=True):
        assert line["tokens"] == len(prompt)
        expected = logits(folder, prompt)[-1]
        differences += [abs(score - expected[int(token)].item()) for token, score in line["scores"].items()]
    return max(differences)


@pytest.fixture(scope="module")
def converted(python, built, tmp_path_factory) -> dict[str, dict]:
    """Case → what the converter makes of it."""
    return to_gguf(python, list(built.values()), tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize("name", CASES)
def test_it_loads_what_no_rule_names_and_does_not_do_the_rest(name, python, built, converted):
    case, prompts = CASES[name], [list(TOKENS[:6]), list(TOKENS)]
    rules = [rule for rule in RUNTIMES.get("llamacpp").rules if case.written.kind in rule.of and rule.problem(case.config)]
    outcomes = {rule.then for rule in rules}
    if REFUSED in outcomes:
        if "error" not in converted[name]:
            with pytest.raises(AssertionError):  # nothing is printed
                farthest(python, built[name], converted[name]["file"], prompts)
        return
    assert "error" not in converted[name], converted[name]["error"][-2000:]
    far = FAR_62 if case.config.num_layers == 62 else FAR
    assert (farthest(python, built[name], converted[name]["file"], prompts) < far) == (SILENT not in outcomes)


def test_a_trimmed_vocabulary_becomes_gguf_with_its_pre_tokenizer_named_and_has_the_same_tokens_and_logits(
    python, built, tmp_path
):
    texts = ["A small text.", "Zwölf Boxkämpfer jagen Viktor — the end.\n\n 42", "🚀 for 123 tokens"]
    kept = sorted({*range(290), *AutoTokenizer.from_pretrained(built["llama-whole"]).all_special_ids})
    (tmp_path / "ids").write_text("\n".join(map(str, kept)))
    trimmed = tmp_path / "trimmed"
    vocab_trim(VocabTrimOptions(load=str(built["llama-whole"]), save=str(trimmed), keep_ids=str(tmp_path / "ids")), World())
    tokenizer = AutoTokenizer.from_pretrained(trimmed)
    assert len(tokenizer) < 307
    assert pre_tokenizer_of(trimmed) == "gpt-2"
    found = to_gguf(python, [trimmed], tmp_path, pre="")["trimmed"]
    assert "error" not in found, found["error"][-2000:]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    assert farthest(python, trimmed, found["file"], prompts, texts) < FAR
