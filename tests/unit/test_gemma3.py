"""Gemma 3: what its ``config.json`` says of positions, by transformers' own class; what Megatron's arguments say of it, both ways."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from test_families import SIZES, TRAITS, meant, models, read

from megatron_prune.arch.model import RopeScaling
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint.description import Told, describe, settle
from megatron_prune.checkpoint.megatron_args import megatron_args
from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.families.family import FAMILIES, family_for
from megatron_prune.files.pickled import Inert

GEMMA3 = FAMILIES.get("gemma3_text")
BASE = {"model_type": "gemma3_text", **SIZES, "num_key_value_heads": 4, "sliding_window": 9, "num_hidden_layers": 7}
LINEAR = {"rope_type": "linear", "factor": 8.0}
BY_KIND = {
    "full_attention": {**LINEAR, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window_pattern": 3},
        {"sliding_window_pattern": 1},
        {"_sliding_window_pattern": 3},
        {"layer_types": ["full_attention", *["sliding_attention"] * 6]},
        {"rope_theta": 5e5, "rope_local_base_freq": 77.0},
        {"rope_theta": 5e5, "rope_scaling": LINEAR},
        {"rope_theta": 5e5, "rope_scaling": {**LINEAR, "type": "linear"}},
        {"rope_parameters": BY_KIND},
        {"rope_parameters": BY_KIND, "rope_theta": 3.0, "rope_local_base_freq": 4.0},
        {"rope_parameters": BY_KIND, "rope_scaling": {**LINEAR, "factor": 2.0}},
        {
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": None},
            "rope_theta": 3.0,
            "rope_local_base_freq": 4.0,
        },
        {"query_pre_attn_scalar": 24},
        {"query_pre_attn_scalar": 168, "head_dim": 128},
        {"hidden_act": "gelu", "attn_logit_softcapping": None, "use_bidirectional_attention": False},
    ],
)
def test_positions_and_scale_are_read_as_transformers_reads_them_and_written_back(changes):
    hf = {**BASE, **changes}
    config = GEMMA3.model_config(hf)
    assert config == meant("gemma3_text", copy.deepcopy(hf))
    assert GEMMA3.hf_config(config, hf) == hf


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling.*without a rope_type"),
        ({"rope_scaling": {"full_attention": LINEAR}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters.*each kind"),
        ({"rope_parameters": {**BY_KIND, "sliding_attention": {**LINEAR, "rope_theta": 7.0}}}, "sliding_attention.*default"),
        ({"rope_local_base_freq": 0}, "rope_local_base_freq"),
        ({"sliding_window": None}, "sliding_window"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"layer_types": ["full_attention"] * 6}, "layer_types"),
        ({"layer_types": ["attention"] * 7}, "layer_types"),
        ({"query_pre_attn_scalar": 24.5}, "query_pre_attn_scalar"),
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_is_not_carried_is_refused_by_name(changes, word):
    with pytest.raises(CheckpointError, match=f"(?s){word}"):
        GEMMA3.model_config({**BASE, **changes})


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"sliding_window": (5, 6, 5, 5)}, "sliding_window"),
        ({"sliding_window": (5, None, 5, 5), "rotary_base": (1e4, 1e6, 3e4, 1e4)}, "rotary_base"),
        ({"sliding_window": 5, "rope_scaling": RopeScaling(kind="linear", factor=2.0)}, "rope_scaling"),
        ({"softmax_scale": 0.123}, "softmax_scale"),
        ({"zero_centered_norms": False}, "zero_centered_norms"),
    ],
)
def test_what_its_class_cannot_say_is_refused_by_name(changes, word):
    config = dataclasses.replace(read("gemma3_text", num_key_value_heads=4), **changes)
    with pytest.raises((InputError, CheckpointError), match=word):
        GEMMA3.check_expressible(config)


def test_another_family_cannot_say_it_and_names_why():
    with pytest.raises(InputError, match="differs by layer"):
        FAMILIES.get("qwen3").check_expressible(read("gemma3_text", num_key_value_heads=4, sliding_window_pattern=2))


# ---------------------------------------------------------------------------------------------------- Megatron's arguments


@given(models("gemma3_text"))
def test_stored_arguments_say_the_model_again(config):
    llama3 = any(scaling and scaling.kind == "llama3" for scaling in config.each("rope_scaling"))
    args = vars(megatron_args(config, ParallelLayout(), torch.float32, None))
    if llama3:
        with pytest.raises(CheckpointError, match="use_rope_scaling"):
            describe(args, "here")
        return
    settled = settle(describe(args, "here"), Told(), args["padded_vocab_size"], "here")
    assert settled.config == config
    assert family_for(settled.config) is GEMMA3


BRIDGE = {
    "num_layers": 7,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 16,
    "vocab_size": 307,
    "seq_length": 128,
    "transformer_layer_spec": Inert("megatron.bridge.models.gemma.gemma3_provider.gemma3_layer_spec"),
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": True,
    "layernorm_epsilon": 1e-6,
    "qk_layernorm": True,
    "gated_linear_unit": True,
    "activation_func": Inert("megatron.core.activations.fast_gelu"),
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "softmax_scale": 24**-0.5,
    "window_size": 9,
    "interleaved_attn_pattern": [5, 1],
    "rotary_base": [10000.0, 1000000.0],
    "rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "position_embedding_type": "rope",
    "is_vision_language": False,
    "share_embeddings_and_output_weights": True,
}
"""The section ``model`` of a ``run_config.yaml``, as Megatron-Bridge's provider of August 2026 dumps it."""


def test_bridges_arguments_are_read():
    config = settle(describe(BRIDGE, "here"), Told(), 384, "here").config
    hf = {**BASE, "num_attention_heads": 8, "head_dim": 16, "rms_norm_eps": 1e-6, "max_position_embeddings": 128}
    hf |= {"query_pre_attn_scalar": 24, "rope_scaling": LINEAR}
    assert config == meant("gemma3_text", copy.deepcopy(hf))


@pytest.mark.parametrize(
    "changes, local",
    [
        ({"interleaved_attn_pattern": [1, 2]}, [1, 0, 0, 1, 0, 0, 1]),
        ({"interleaved_attn_pattern": ["full_attention"] * 2 + ["sliding_attention"] * 5}, [0, 0, 1, 1, 1, 1, 1]),
        ({"interleaved_attn_pattern": None, "window_attn_skip_freq": 3, "window_size": (8, 0)}, [1, 1, 0, 1, 1, 0, 1]),
        ({"interleaved_attn_pattern": None, "window_attn_skip_freq": [0, 1, 0, 1, 0, 1, 0]}, [0, 1, 0, 1, 0, 1, 0]),
    ],
)
def test_which_layers_see_a_window(changes, local):
    config = settle(describe({**BRIDGE, **changes}, "here"), Told(), 384, "here").config
    assert config.sliding_window == tuple(9 if here else None for here in local)
    assert config.rotary_base == tuple(1e4 if here else 1e6 for here in local)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"is_vision_language": True}, "is_vision_language"),
        ({"activation_func": Inert("torch.nn.functional.silu")}, "activation_func"),
        ({"layernorm_zero_centered_gamma": False}, "layernorm_zero_centered_gamma"),
        ({"interleaved_attn_pattern": [5]}, "interleaved_attn_pattern"),
        ({"interleaved_attn_pattern": ["full_attention"] * 3}, "interleaved_attn_pattern"),
        ({"rotary_base": [1e4, 1e5, 1e6]}, "rotary_base"),
        ({"rotary_base": [1e4, "x"]}, "rotary_base"),
        ({"window_size": (8, 8)}, "window_size"),
        ({"softmax_scale": -1.0}, "softmax_scale"),
        ({"rope_scaling": True}, "rope_scaling"),
        ({"seq_len_interpolation_factor": 2.0}, "seq_len_interpolation_factor"),
        (
            {"transformer_layer_spec": Inert("megatron.bridge.models.gemma.gemma2_provider.gemma2_layer_spec")},
            "gemma2_layer_spec",
        ),
        ({"transformer_layer_spec": None}, "activation_func"),
    ],
)
def test_arguments_of_another_model_are_refused_by_name(changes, word):
    with pytest.raises(CheckpointError, match=word):
        describe({**BRIDGE, **changes}, "here")


def test_the_traits_are_those_of_the_family():
    config = settle(describe(BRIDGE, "here"), Told(), 384, "here").config
    assert all(getattr(config, name) == value for name, value in TRAITS["gemma3_text"].items())
