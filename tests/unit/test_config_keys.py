"""Every key of ``config.json`` that changes what a model computes is read or refused; the judge is transformers' own class."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_families import CLASSES, ONE_ROTARY, SIZES, meant, read
from tiny import FAMILIES as NAMES
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from megatron_prune.errors import CheckpointError
from megatron_prune.families.config_keys import _mentioned, class_fields
from megatron_prune.families.family import FAMILIES


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_the_installed_transformers_class_is_read_fixed_or_known_to_change_nothing(name):
    keys = FAMILIES.get(name).keys
    assert set(class_fields(name)) <= keys.read | set(keys.fixed) | set(keys.idle)


@pytest.mark.parametrize("name", NAMES)
def test_no_key_is_in_two_of_the_tables(name):
    keys = FAMILIES.get(name).keys
    read, fixed, idle = keys.read, set(keys.fixed), set(keys.idle)
    assert not read & fixed and not read & idle and not idle & fixed


@pytest.mark.parametrize("name", NAMES)
def test_a_key_that_a_later_transformers_adds_is_refused_where_it_is_not_the_default(name, monkeypatch):
    later = {**class_fields(name), "logit_softcap": None}
    monkeypatch.setattr("megatron_prune.families.config_keys.class_fields", lambda model_type: later)
    monkeypatch.setattr("megatron_prune.families.config_keys._mentioned", lambda key, model_type: True)  # its files say it too
    assert read(name, num_key_value_heads=4, logit_softcap=None)
    with pytest.raises(CheckpointError, match="(?s)logit_softcap.*30.0"):
        read(name, num_key_value_heads=4, logit_softcap=30.0)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_class_is_found_in_its_files(name):
    """So that a key that they do not mention is none of the class."""
    assert all(_mentioned(key, name) for key in class_fields(name))


IDLE_VALUES = {
    "initializer_range": 0.5,
    "use_cache": False,
    "pretraining_tp": 2,
    "attention_dropout": 0.5,
    "chunk_size_feed_forward": 7,
    "bos_token_id": 9,
    "eos_token_id": [3, 4],
    "output_hidden_states": True,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "problem_type": "regression",
}


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_are_known_to_change_nothing_change_no_logits_of_transformers(name):
    tokens = torch.arange(20)[None]
    found = []
    for changes in ({}, IDLE_VALUES):
        hf = tiny_config(name).to_dict()
        config = CLASSES[name].from_dict({**copy.deepcopy(hf), **changes})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1, generator=generator)
            found.append(model(tokens).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "key, value",
    [
        ("bos_token_id", "1"),
        ("bos_token_id", [1]),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", True),
        ("use_cache", "yes"),
        ("attention_dropout", math.nan),
        ("initializer_range", None),
        ("id2label", ["a"]),
        ("torch_dtype", "fp8"),
        ("dtype", {"a": 1}),
    ],
)
def test_a_value_that_transformers_own_class_refuses_is_refused(key, value):
    with pytest.raises(CheckpointError, match=key):
        read("llama", **{key: value})


# ------------------------------------------------------------------------------------------------------------- rotary

DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("name", ONE_ROTARY)
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": DEFAULT, "rope_scaling": LINEAR},
        {"rope_parameters": DEFAULT, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": DEFAULT, "rope_scaling": LINEAR, "rope_theta": 77.0},
        {"rope_parameters": DEFAULT, "rope_scaling": {**LINEAR, "rope_theta": 99.0}, "rope_theta": 77.0},
        {"rope_parameters": DEFAULT, "rope_scaling": None, "rope_theta": 77.0},
        {"rope_parameters": DEFAULT, "rope_scaling": {}},
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5}, "rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 512}, "rope_theta": 77.0},
        {"rope_scaling": LLAMA3, "max_position_embeddings": 640},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 512}, "original_max_position_embeddings": 128},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "original_max_position_embeddings": 128},
    ],
)
def test_where_two_rotary_entries_speak_the_one_that_transformers_takes_is_taken(name, rope):
    hf = {"model_type": name, **SIZES, "num_key_value_heads": 4, **rope}
    assert FAMILIES.get(name).model_config(hf) == meant(name, copy.deepcopy(hf))


def test_a_whole_number_may_be_written_as_a_fraction():
    config = read("llama", rope_scaling={**LLAMA3, "original_max_position_embeddings": 512.0})
    assert config.rope_scaling.original_max_position_embeddings == 512


@pytest.mark.parametrize(
    "rope, word",
    [
        ({"rope_parameters": DEFAULT, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.*yarn"),
        ({"rope_parameters": DEFAULT, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.*dynamic"),
        ({"rope_parameters": DEFAULT, "rope_scaling": {"type": "longrope"}}, "rope_scaling.*longrope"),
        ({"rope_parameters": {"full_attention": DEFAULT}}, "rope_parameters.*layers"),
        ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope_scaling.*None"),
        ({"rope_scaling": {**LINEAR, "factor": 0}}, "factor"),
        ({"rope_scaling": {**LINEAR, "factor": "4"}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": -1}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": None}, "rope_theta"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rotary_entries_that_are_not_carried_are_refused_by_name(name, rope, word):
    with pytest.raises(CheckpointError, match=f"(?s){word}"):
        read(name, num_key_value_heads=4, **rope)


# ------------------------------------------------------------------------------------------------------------ numbers

NONSENSE = [math.nan, math.inf, -math.inf, -1, 0, "x", "", True, None, [], {}, 10**400]
SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@pytest.mark.parametrize("name", NAMES)
@given(st.sampled_from(["rms_norm_eps", "rope_theta", *SIZE_KEYS]), st.sampled_from(NONSENSE))
def test_a_number_that_no_model_has_is_refused_where_it_enters(name, key, value):
    with pytest.raises(CheckpointError, match=key):
        read(name, **{"num_key_value_heads": 4, "head_dim": 8, key: value})


@pytest.mark.parametrize("key", SIZE_KEYS + ("num_key_value_heads", "head_dim"))
@pytest.mark.parametrize("value", [10**20, 2**31, 1.5, 32.0, "32"])
def test_a_size_beyond_any_model_is_refused_and_nothing_is_counted_up_to_it(key, value):
    with pytest.raises(CheckpointError, match=key):
        read("qwen3", **{"num_key_value_heads": 4, "head_dim": 8, key: value})


@pytest.mark.parametrize("value", [10**6, 2**31 - 1])
def test_more_layers_than_any_model_has_are_refused_before_their_tensors_are_listed(value):
    with pytest.raises(CheckpointError, match="num_layers"):
        read("llama", num_hidden_layers=value)


@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_tied_embeddings_are_true_or_false(value):
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        read("llama", tie_word_embeddings=value)


@pytest.mark.parametrize("value", [307, 10**9, -308, "2", 1.5, [3], True])
def test_a_padding_token_without_a_row_is_refused_with_what_to_do(value):
    with pytest.raises(CheckpointError, match='(?s)pad_token_id.*below the vocab_size 307.*"pad_token_id": null'):
        read("llama", pad_token_id=value)


@pytest.mark.parametrize("value", [None, 0, 306, -1])
def test_a_padding_token_that_transformers_takes_is_taken(value):
    assert read("llama", pad_token_id=value).vocab_size == 307
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(tiny_config("llama", pad_token_id=value))


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_head_dimension_cannot_rotate(name):
    with pytest.raises(CheckpointError, match="head_dim"):
        read(name, num_key_value_heads=4, head_dim=7)


# ------------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {"max_window_layers": 4, "sliding_window": 8},
        {"max_window_layers": 28, "sliding_window": 8},
        {"sliding_window": None, "max_window_layers": 0},
        {"sliding_window": 77, "max_window_layers": 0, "max_position_embeddings": 77},
        {"sliding_window": 8, "max_window_layers": 0, "layer_types": ["full_attention"] * 4},
    ],
)
def test_a_sliding_window_that_amounts_to_full_attention_is_read(name, changes):
    hf = {"model_type": name, **SIZES, "num_key_value_heads": 4, "use_sliding_window": True, **changes}
    config = FAMILIES.get(name).model_config(hf)
    assert config.sliding_window is None
    assert config == meant(name, hf)
    assert FAMILIES.get(name).hf_config(config, hf) == hf


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes, word",
    [
        ({"max_window_layers": 3, "sliding_window": 8}, "window of 8 in 1 of 4 layers"),
        ({"max_window_layers": 0}, "window of 4096 in 4 of 4 layers"),
        ({"layer_types": ["sliding_attention", *["full_attention"] * 3], "sliding_window": 8}, "window of 8 in 1 of 4"),
        ({"layer_types": ["sliding_attention"] * 4, "use_sliding_window": False}, "window of None in 4 of 4"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": "8"}, "sliding_window"),
        ({"use_sliding_window": 1}, "use_sliding_window"),
        ({"max_window_layers": None}, "max_window_layers"),
    ],
)
def test_a_window_of_some_layers_is_refused_by_name(name, changes, word):
    with pytest.raises(CheckpointError, match=f"(?s){word}"):
        read(name, **{"num_key_value_heads": 4, "use_sliding_window": True, **changes})


@pytest.mark.parametrize(
    "name, changes",
    [
        ("mistral", {"sliding_window": 8, "layer_types": ["sliding_attention", *["full_attention"] * 3]}),
        ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 4}),
        ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 4}),
        ("mistral", {"sliding_window": 0}),
        ("llama", {"layer_types": ["sliding_attention"] * 4}),
    ],
)
def test_windows_that_contradict_each_other_are_refused(name, changes):
    with pytest.raises(CheckpointError, match="layer_types|sliding_window"):
        read(name, num_key_value_heads=4, **changes)


# ------------------------------------------------------------------------------------------------- what else it may be


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "code of its own.*evil.Model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*LlamaForCausalLM"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": [7]}, "architectures"),
        ({"is_causal": False}, "is_causal"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"return_dict": False}, "return_dict"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config: layer 0.*head_dim"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation.*someone/kernel"),
        ({"attention_bias": 0}, "attention_bias"),
        ({"attention_bias": None}, "attention_bias"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"compression_config": {"format": "pack-quantized"}}, "compression_config"),
    ],
)
def test_a_model_that_computes_something_else_is_refused_by_name(changes, word):
    with pytest.raises(CheckpointError, match=f"(?s){word}"):
        read("llama", **changes)


@pytest.mark.parametrize("stated", [None, [], ["LlamaForCausalLM"], ["LLaMAForCausalLM"]])
def test_the_class_may_be_left_out_or_written_as_the_first_llama_wrote_it(stated):
    assert read("llama", architectures=stated).num_layers == 4
