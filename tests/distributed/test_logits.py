"""A checkpoint running under megatron-core at any TP × PP gives the logits and the perplexity of stock transformers.

Both sides compute in float32 from the same stored weights and differ in the order of sums only: about 1e-6 of the
logits' deviation (of order 1 here). A wrong head, channel, frequency or mask changes logits by 0.01 to 1, so 1e-4 tells
the two apart with two decades to either side.
"""

from __future__ import annotations

import math

import pytest
import rank_jobs
import tiny as tiny_module
import torch

from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert

TOLERANCE = 1e-4
TOKENS = torch.randint(0, 307, (2, 40), generator=torch.Generator().manual_seed(7))
UP_TO_4 = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]
UP_TO_3 = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}
MODELS = {
    "gemma3": ("gemma3_text", {}, [(1, 1), (3, 1), (2, 2)]),
    "gemma3, 2 KV groups, untied, scaled": (
        "gemma3_text",
        {"num_key_value_heads": 2, "tie_word_embeddings": False, "rope_parameters": LOCAL_AND_GLOBAL},
        [(4, 1)],
    ),
    "llama, as many KV groups as heads, tied": ("llama", {"tie_word_embeddings": True}, UP_TO_4),
    "llama, 4 KV groups": ("llama", {"num_key_value_heads": 4}, [(1, 1), (2, 1), (4, 1), (2, 2)]),
    "llama, 2 KV groups": ("llama", {"num_key_value_heads": 2}, [(4, 1), (2, 2)]),
    "llama, llama3 rope scaling": ("llama", {"rope_parameters": LLAMA3}, [(1, 1), (2, 2)]),
    "llama, linear rope scaling": ("llama", {"rope_parameters": LINEAR}, [(1, 1), (3, 1)]),
    "mistral, window of 11 tokens": ("mistral", {"sliding_window": 11}, UP_TO_3),
    "mistral, no window": ("mistral", {}, [(3, 1)]),
    "qwen2, QKV bias": ("qwen2", {"tie_word_embeddings": True}, UP_TO_3),
    "qwen2, 1 KV group": ("qwen2", {"num_key_value_heads": 1}, [(4, 1), (2, 2)]),
    "qwen3, q and k norms, heads wider than hidden": ("qwen3", {"head_dim": 16}, UP_TO_3),
    "qwen3, 2 KV groups": ("qwen3", {"num_key_value_heads": 2}, [(4, 1)]),
}
CASES = [
    pytest.param(family, changes, tp, pp, id=f"{name}, TP {tp} PP {pp}")
    for name, (family, changes, layouts) in MODELS.items()
    for tp, pp in layouts
]


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """``model(family, changes)`` → (Megatron checkpoint of TP 1, Hugging Face directory, its logits by transformers)."""
    made = {}

    def get(family, changes):
        key = (family, repr(changes))
        if key not in made:
            # a nested dictionary is no part of a cache key, so such a model is built here
            nested = any(isinstance(value, dict) for value in changes.values())
            home = tmp_path_factory.mktemp("model")
            source = tiny_module.build_tiny(home / "hf", family, **changes) if nested else tiny(family, **changes)
            convert(ConvertOptions(load=str(source), save=str(home / "megatron")), World())
            made[key] = str(home / "megatron"), source, tiny_module.logits(source, TOKENS)
        return made[key]

    return get


@pytest.mark.parametrize("family, changes, tp, pp", CASES)
def test_logits_under_tp_and_pp_equal_those_of_transformers(model, ranks, family, changes, tp, pp):
    checkpoint, _, expected = model(family, changes)
    found = ranks(tp * pp).run(rank_jobs.logits, checkpoint, TOKENS.tolist(), tp, pp)
    assert [value is not None for value in found] == [False] * tp * (pp - 1) + [True] * tp
    for value in found[-tp:]:
        assert (torch.from_numpy(value) - expected).abs().max() < TOLERANCE * expected.std()


@pytest.mark.parametrize(
    "name, without",
    [
        ("llama, llama3 rope scaling", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("llama, linear rope scaling", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("mistral, window of 11 tokens", {"sliding_window": None}),
    ],
)
def test_the_features_above_change_these_logits_by_far_more_than_the_tolerance(model, tmp_path, name, without):
    family, changes, _ = MODELS[name]
    plain = tiny_module.logits(tiny_module.build_tiny(tmp_path / "plain", family, **{**changes, **without}), TOKENS)
    expected = model(family, changes)[2]
    assert (plain - expected).abs().max() > 100 * TOLERANCE * expected.std()


@pytest.mark.parametrize(
    "size, tp, pp, micro_batch", [(1, 1, 1, 2), (3, 3, 1, 1), (4, 2, 2, 3), (4, 2, 1, 2), (3, 1, 1, 1), (2, 1, 2, 5)]
)
def test_perplexity_equals_that_of_transformers_with_copies_stages_and_windows_that_do_not_fill_a_batch(
    model, ranks, size, tp, pp, micro_batch
):
    checkpoint, source, _ = model("qwen2", {"tie_word_embeddings": True})
    windows = torch.randint(0, 307, (5, 24), generator=torch.Generator().manual_seed(3))
    logits = tiny_module.logits(source, windows)[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    found = ranks(size).run(rank_jobs.perplexity, checkpoint, windows.tolist(), tp, pp, micro_batch)
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(math.exp(losses), rel=1e-5)
