"""Layers of their own sizes in ``config.json``: what is written is read back, by us and by transformers' own configuration."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from per_layer import HEADS_ALIKE, like_tiny, mixed, sizes_by_layer, written_as
from tiny import FAMILIES as NAMES
from transformers import CONFIG_MAPPING

from megatron_prune.arch.model import ModelConfig
from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.families.family import FAMILIES, family_for, family_of, form_of
from megatron_prune.families.form import code_of, commonest
from megatron_prune.families.nemotron_nas import NEMOTRON_NAS, factor_of, width_of
from megatron_prune.families.per_layer import PER_LAYER
from megatron_prune.families.shipped.configuration_nemotron_nas import DeciLMConfig
from megatron_prune.serving.runtime import RUNTIMES, Written

SIZES = {
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
}


@st.composite
def models(draw, name: str) -> ModelConfig:
    config = like_tiny(name)
    heads = draw(st.sampled_from([12, 6])) if name in HEADS_ALIKE else None
    return dataclasses.replace(config, **draw(sizes_by_layer(config.num_layers, heads)))


# ------------------------------------------------------------------------------------------------------- per_layer_config


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_per_layer_config_is_read_back_the_same_by_us_and_by_transformers(name, data):
    config, family = data.draw(models(name)), FAMILIES.get(name)
    hf = family.hf_config(config, None)
    assert (family_of(hf).name, family_of(hf).model_config(hf)) == (name, config)
    real = CONFIG_MAPPING[name].from_dict(copy.deepcopy(hf))
    assert len(real.per_layer_config) == config.num_layers
    for layer, own in enumerate(real.per_layer_config):
        skip, sizes = getattr(own, "skip", []), config.of_layer(layer)
        assert ("attention" in skip, "mlp" in skip) == (not sizes.num_attention_heads, not sizes.ffn_hidden_size)
        for theirs, ours in SIZES.items():
            if size := getattr(sizes, ours):
                assert getattr(own, theirs) == size


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_what_transformers_saves_again_is_read_the_same(name, data):
    """It leaves out what is as in most layers, and fills numbers up with zeros."""
    config = data.draw(models(name))
    hf = CONFIG_MAPPING[name].from_dict(FAMILIES.get(name).hf_config(config, None)).to_dict()
    assert FAMILIES.get(name).model_config(hf) == config


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_an_unchanged_model_gets_back_its_own_file_key_for_key(name, data):
    config, family = data.draw(models(name)), FAMILIES.get(name)
    hf = {"x_unknown": [1], **family.hf_config(config, None)}
    assert list(family.hf_config(config, hf).items()) == list(hf.items())


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_a_model_that_descends_from_either_kind_says_what_it_is_and_no_more(name, data):
    """Layers that were alike and differ now, or the other way round, or otherwise."""
    family, before, after = FAMILIES.get(name), data.draw(models(name)), data.draw(models(name))
    for old, new in ((before, after), (commonest(before), after), (before, commonest(after))):
        template = {**family.hf_config(old, None), "x_unknown": [1]}
        written = family.hf_config(new, template)
        assert (family_of(written).model_config(written), written["x_unknown"]) == (new, [1])
        assert ("per_layer_config" in written) == ("auto_map" in written) == (form_of(written) is PER_LAYER)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_lacks_blocks_alone_is_one_that_no_stock_class_loads(name):
    """Transformers 4 passes the field over, and would make the missing blocks up."""
    config = like_tiny(name)
    heads = (0, *[config.num_attention_heads] * (config.num_layers - 1))
    groups = (0, *[config.num_query_groups] * (config.num_layers - 1))
    config = dataclasses.replace(config, num_attention_heads=heads, num_query_groups=groups)
    hf = FAMILIES.get(name).hf_config(config, None)
    assert hf["intermediate_size"] == 0
    assert [own["intermediate_size"] for own in hf["per_layer_config"].values()] == [96] * config.num_layers
    assert FAMILIES.get(name).model_config(hf) == config


def test_a_model_without_any_attention_is_said_too():
    config = dataclasses.replace(like_tiny("llama"), num_attention_heads=(0,) * 4, num_query_groups=(0,) * 4)
    hf = FAMILIES.get("llama").hf_config(config, None)
    assert FAMILIES.get("llama").model_config(hf) == config and config.blocks == ("gated",)


def test_query_heads_that_differ_make_a_llama_a_mistral_since_llamas_configuration_cannot_hold_them():
    config = mixed("llama", heads=True)
    hf = FAMILIES.get("llama").hf_config(config, None)
    assert (hf["model_type"], hf["architectures"]) == ("mistral", ["PerLayerMistralForCausalLM"])
    assert family_of(hf).model_config(hf) == config
    with pytest.raises(InputError, match="(?s)6, 12 attention heads.*--target-family mistral-per-layer$"):
        written_as("llama", "llama-per-layer").hf_config(config, None)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"9": {"intermediate_size": 8}}, "'9'.*layers below 4"),
        ({"1": {"intermediate_size": 8}, "01": {"intermediate_size": 8}}, "'01'"),
        ({"-1": {}}, "'-1'"),
        ({"x": {}}, "'x'"),
        ({"1": []}, "layer 1"),
        ([1], "JSON object"),
        ({"1": {"intermediate_size": 0}}, "layer 1: intermediate_size"),
        ({"1": {"intermediate_size": "8"}}, "layer 1: intermediate_size"),
        ({"1": {"num_key_value_heads": 5}}, "layer 1.*12 heads, 5 groups"),
        ({"1": {"skip": "attention"}}, "layer 1: skip"),
        ({"1": {"skip": ["moe"]}}, "layer 1: skip.*attention or mlp"),
        ({"1": {"skip": [["mlp"]]}}, "layer 1: skip"),
        ({"1": {"skip": ["mlp", "attention"]}}, "layer 1: skip.*both blocks"),
        ({"2": {"head_dim": 4}}, "layer 2.*head_dim"),
        ({"2": {"sliding_window": 4, "use_cache": True}}, "layer 2.*sliding_window.*use_cache"),
    ],
)
def test_what_the_field_does_not_mean_is_refused_by_layer_and_name(change, words):
    hf = FAMILIES.get("llama").hf_config(like_tiny("llama"), None)
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        family_of({**hf, "per_layer_config": change}).model_config({**hf, "per_layer_config": change})


def test_code_of_others_is_refused_beside_the_field():
    hf = FAMILIES.get("llama").hf_config(mixed("llama"), None)
    for value in ("modeling_evil.PerLayerLlamaForCausalLM", "x/y--modeling-per-layer.PerLayerLlamaForCausalLM"):
        with pytest.raises(CheckpointError, match="code of its own"):
            FAMILIES.get("llama").model_config({**hf, "auto_map": {"AutoModelForCausalLM": value}})


# ----------------------------------------------------------------------------------------------------------- nemotron-nas


@st.composite
def nas_models(draw, name: str) -> ModelConfig:
    config = like_tiny(name, **({"sliding_window": None} if name == "mistral" else {}))
    sizes = draw(sizes_by_layer(config.num_layers, draw(st.sampled_from([12, 5]))))
    heads = draw(st.just(max(sizes["num_attention_heads"]) or 12))
    first = {"num_attention_heads": heads, "num_query_groups": heads}
    sizes |= {field: (value, *sizes[field][1:]) for field, value in first.items()}
    width = draw(st.sampled_from([None, 256, 3072]))
    if width:
        sizes["ffn_hidden_size"] = tuple(width if size == 40 else size for size in sizes["ffn_hidden_size"])
    return dataclasses.replace(config, **sizes, hidden_size=draw(st.sampled_from([48, 50, 576])))


def test_what_llama_cpp_loses_is_said_with_the_layers():
    config = dataclasses.replace(like_tiny("llama"), ffn_hidden_size=(96, 0, 96, 96))
    said = lambda config: RUNTIMES.get("llamacpp").problems(Written(config, "llama", NEMOTRON_NAS.name))
    assert [word for word in said(config) if "attention without a feed-forward block, which is left out (layer 1)" in word]
    alone = dataclasses.replace(
        config, ffn_hidden_size=(96, 96, 96, 96), num_attention_heads=(12, 0, 12, 12), num_query_groups=(6, 0, 6, 6)
    )
    assert not [word for word in said(alone) if "without a feed-forward block" in word]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
@given(st.data())
def test_block_configs_are_read_back_the_same_by_us_and_by_the_class_that_goes_along(name, data):
    config, family = data.draw(nas_models(name)), written_as(name, "nemotron-nas")
    hf = json.loads(json.dumps(family.hf_config(config, None)))
    assert (hf["model_type"], hf["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert family_of(hf).model_config(hf) == config
    assert family_of(hf).name == ("qwen2" if name == "qwen2" else "llama") and set(code_of(hf)) == {
        "configuration_nemotron_nas.py"
    }
    assert family_of(hf).hf_config(config, {**hf, "x_unknown": 1}) == {**hf, "x_unknown": 1}
    real = DeciLMConfig.from_dict(copy.deepcopy(hf))
    for layer, block in enumerate(real.block_configs):  # as vLLM reads it
        sizes = config.of_layer(layer)
        assert (block.attention.no_op, block.ffn.no_op) == (not sizes.num_query_groups, not sizes.ffn_hidden_size)
        if not block.attention.no_op:
            assert real.num_attention_heads // block.attention.n_heads_in_group == sizes.num_query_groups
        assert ("ffn_mult" in hf["block_configs"][layer]["ffn"]) or not block.ffn.no_op  # llama.cpp's converter reads it of these
        if not block.ffn.no_op:
            width = (
                width_of(block.ffn.ffn_mult, real.hidden_size) if hasattr(block.ffn, "ffn_mult") else block.ffn.intermediate_size
            )
            assert width == sizes.ffn_hidden_size
    assert DeciLMConfig.from_dict(real.to_dict()).to_dict()["block_configs"] == hf["block_configs"]
    assert family_of(real.to_dict()).model_config(real.to_dict()) == config


@given(st.integers(1, 300), st.integers(1, 20000))
def test_a_factor_means_the_width_that_it_is_written_for_where_one_can(steps, hidden):
    assert width_of(factor_of(256 * steps, hidden), hidden) == 256 * steps
    assert factor_of(256 * steps + 1, hidden) is None
    assert round(factor_of(256 * steps, hidden), 6) == factor_of(256 * steps, hidden)


def nvidias(**changes) -> dict:
    """A ``config.json`` as NVIDIA writes it for Llama-3_3-Nemotron-Super-49B-v1 (its first, seventh and twelfth layer)."""
    attention = {"num_sink_tokens": None, "replace_with_linear": False, "sparsify": None, "unshifted_sink": False}
    attention |= {"use_prefill_window_in_sink_attention": False, "window_length": None}

    def block(each, factor):
        ffn = {"ffn_mult": factor, "no_op": False, "replace_with_linear": False, "sparsify": None}
        return {"attention": {**attention, "n_heads_in_group": each, "no_op": each is None}, "ffn": ffn}

    return {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "nvidia/Llama-3_3-Nemotron-Super-49B-v1--configuration-decilm.DeciLMConfig",
            "AutoModelForCausalLM": "nvidia/Llama-3_3-Nemotron-Super-49B-v1--modeling-decilm.DeciLMForCausalLM",
        },
        "block_configs": [block(8, 2.625), block(None, 2.625), block(8, 5.25), block(None, 3.28125), block(16, 1.3125)],
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 8192,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": 64,
        "num_hidden_layers": 5,
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
        **changes,
    }


def test_nvidias_own_file_is_read_and_written_back_as_it_is():
    hf = nvidias()
    family, config = family_of(hf), family_of(hf).model_config(hf)
    assert family.name == "llama" and code_of(hf) == {}
    assert config.ffn_hidden_size == (14336, 14336, 28672, 17920, 7168)
    assert config.num_attention_heads == (64, 0, 64, 0, 64) and config.num_query_groups == (8, 0, 8, 0, 4)
    assert (config.kv_channels, config.rope_scaling.factor, config.norm_epsilon) == (128, 8.0, 1e-5)
    assert list(family.hf_config(config, hf).items()) == list(hf.items())
    cut = dataclasses.replace(config, vocab_size=1000)
    written = family.hf_config(cut, hf)
    assert form_of(written) is NEMOTRON_NAS and family.model_config(written) == cut
    assert [block["ffn"]["ffn_mult"] for block in written["block_configs"]] == [2.625, 2.625, 5.25, 3.28125, 1.3125]
    assert form_of(written_as("llama", "llama-per-layer").hf_config(config, hf)) is PER_LAYER


def damaged(part: str, **changes) -> dict:
    hf = copy.deepcopy(nvidias())
    hf["block_configs"][1][part].update(changes)
    return hf


@pytest.mark.parametrize(
    "hf, words",
    [
        (damaged("attention", replace_with_linear=True), "layer 1: attention: .*replace_with_linear"),
        (damaged("ffn", replace_with_linear=True), "layer 1: ffn: .*replace_with_linear"),
        (damaged("ffn", sparsify=["x"]), "layer 1: ffn: .*sparsify"),
        (damaged("attention", window_length=8), "layer 1: attention: .*window_length"),
        (damaged("attention", no_op=0), "layer 1: attention: no_op"),
        (damaged("attention", no_op=False), "layer 1: attention: n_heads_in_group"),
        (damaged("attention", no_op=False, n_heads_in_group=7), "layer 1: attention: n_heads_in_group.*divisor of 64"),
        (damaged("ffn", ffn_mult="2"), "layer 1: ffn: ffn_mult"),
        (damaged("ffn", ffn_mult=1e-9), "layer 1: ffn"),
        (damaged("ffn", intermediate_size=100), "layer 1: ffn: intermediate_size.*14336"),
        (damaged("ffn", ffn_mult=None), "layer 1: ffn: intermediate_size"),
        (damaged("ffn", hidden_act="relu"), "layer 1: ffn: .*hidden_act"),
        (damaged("ffn", moe={"experts": 2}), "layer 1: ffn: .*moe"),
        (damaged("ffn", no_op=True), "layer 1.*both blocks"),
        (nvidias(block_configs=[]), "0 entries.*5"),
        (nvidias(block_configs=[None] * 5), "layer 0"),
        (nvidias(num_attention_heads=None), "num_attention_heads"),
        (nvidias(attention_bias=True), "attention_bias"),
        (nvidias(position_embedding_type="mistral_yarn"), "position_embedding_type"),
        (nvidias(architectures=["Other"]), "DeciLMForCausalLM"),
        (nvidias(auto_map={"AutoConfig": "evil.Config"}), "code of its own"),
    ],
)
def test_what_is_not_carried_is_refused_by_layer_and_name(hf, words):
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        family_of(hf).model_config(hf)


# ----------------------------------------------------------------------------------------------- what cannot say a shape


@pytest.mark.parametrize("name", NAMES)
def test_a_stock_class_is_refused_with_the_layers_and_with_what_can_say_them(name):
    config = mixed(name, heads=False)
    with pytest.raises(InputError) as refused:
        written_as(name, name).check_expressible(config)
    said = str(refused.value)
    assert "no attention in layer 0" in said and "no feed-forward block in layer 2" in said
    assert "40 in layer 1, 64 in layer 3" in said and f"--target-family {name}-per-layer" in said
    assert "nemotron-nas" not in said  # the first layer has no attention


@pytest.mark.parametrize(
    "name, changes, word",
    [
        ("llama", {"num_attention_heads": (0, 12, 12, 12), "num_query_groups": (0, 12, 12, 12)}, "first layer without attention"),
        ("mistral", {"num_attention_heads": (12, 6, 12, 12)}, "query heads that differ by layer: 6, 12"),
        ("mistral", {"sliding_window": 8, "ffn_hidden_size": (8, 9, 9, 9)}, "sliding windows"),
        ("qwen3", {"ffn_hidden_size": (8, 9, 9, 9)}, "norms of queries and keys"),
        ("gemma3_text", {}, "norms of queries and keys"),
    ],
)
def test_nemotron_nas_is_refused_for_what_it_cannot_say(name, changes, word):
    config = dataclasses.replace(like_tiny(name), **changes)
    with pytest.raises(InputError, match=f"(?s)nemotron-nas cannot say.*{word}.*--target-family"):
        written_as(name, "nemotron-nas").check_expressible(config)


def test_what_is_asked_for_is_of_the_same_architecture():
    assert written_as("llama", "mistral-per-layer").name == "mistral"
    for asked in ("qwen2", "qwen2-per-layer", "foo-per-layer", "per-layer"):
        with pytest.raises(InputError, match="one of llama, mistral, llama-per-layer, mistral-per-layer, nemotron-nas"):
            written_as("llama", asked)


def test_a_file_in_two_forms_is_refused():
    hf = {"model_type": "nemotron-nas", "block_configs": [], "per_layer_config": {"1": {"intermediate_size": 8}}}
    with pytest.raises(CheckpointError, match="(?s)says twice.*per-layer and nemotron-nas.*one of the two"):
        family_of(hf)


def test_heads_that_no_form_can_say_are_told_so():
    config = dataclasses.replace(like_tiny("gemma3_text"), num_attention_heads=(12, 6, 12, 12))
    assert config.hidden_size % 12 == 0
    config = dataclasses.replace(config, num_attention_heads=(12, 10, 12, 12), num_query_groups=(2, 2, 2, 2))
    with pytest.raises(InputError, match="(?s)cannot say this model.*10, 12 attention heads.*no other family or form"):
        FAMILIES.get("gemma3_text").check_expressible(config)


def test_layers_that_are_alike_are_written_for_the_stock_class_whatever_form_is_asked_for():
    config = like_tiny("qwen2")
    assert written_as("qwen2", "qwen2-per-layer").hf_config(config, None) == FAMILIES.get("qwen2").hf_config(config, None)
    assert form_of(written_as("qwen2", "nemotron-nas").hf_config(config, None)) is NEMOTRON_NAS


def test_a_nameless_model_whose_layers_differ_gets_a_family_too():
    assert {name: family_for(mixed(name)).name for name in NAMES} == {name: name for name in NAMES} | {"mistral": "llama"}
