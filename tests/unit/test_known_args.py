"""Every argument that says what a model computes is understood or refused by name; what is added later is refused."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_prune.checkpoint import known_args
from megatron_prune.checkpoint.description import Told, describe, settle
from megatron_prune.checkpoint.known_args import FIXED, UNDERSTOOD, refused_arguments
from megatron_prune.errors import CheckpointError
from megatron_prune.files.pickled import Inert

DENSE = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 16,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "norm_epsilon": 1e-5,
    "rotary_base": 10000,
}


def refused(**changes) -> str:
    with pytest.raises(CheckpointError) as found:
        describe({**DENSE, **changes}, "here")
    return str(found.value)


def model(**changes):
    return settle(describe({**DENSE, **changes}, "here"), Told(), 128, "here").config


OTHERWISE = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "gated_linear_unit": False,
    "activation_func": Inert("torch.nn.functional.gelu"),
    "activation_func_clamp_value": 7.0,
    "glu_linear_offset": 1.0,
    "add_bias_linear": True,
    "position_embedding_type": "yarn",
    "rope_type": "yarn",
    "rotary_percent": 0.5,
    "no_rope_freq": 4,
    "mrope_section": [16, 24, 24],
    "window_attn_skip_freq": 6,
    "attention_chunk_size": 8192,
    "nope_layer_interval": 4,
    "softmax_scale": 0.1,
    "softmax_type": "learnable",
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 4,
    "num_experts": 8,
    "num_moe_experts": 8,
    "mtp_num_layers": 1,
    "hybrid_attention_ratio": 0.1,
    "hybrid_mlp_ratio": 0.5,
    "hybrid_override_pattern": "M-M*",
    "hybrid_layer_pattern": "M-M*",
    "heterogeneous_layers_config_path": "layers.json",
    "heterogeneous_layers_config_encoded_json": "{}",
    "spec": ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"],
    "transformer_layer_spec": Inert("megatron.bridge.models.llama.llama4_utils.get_llama4_layer_spec"),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_feature_that_is_not_carried_is_refused_by_its_arguments_name(name):
    value = OTHERWISE.get(name, True)
    assert f"{name} = " in refused(**{name: value, "window_size": (7, 0)})
    assert f"{name} = a value of type a.b" in refused(**{name: Inert("a.b", (1,)), "window_size": (7, 0)})
    for harmless in FIXED[name]:
        describe({**DENSE, name: harmless}, "here")
    assert model(**{name: FIXED[name][0]}) == model()


def test_every_field_of_megatron_cores_configurations_is_classified_and_its_default_is_read():
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    other = {"normalization", "add_bias_linear", "gated_linear_unit", "activation_func", "multi_latent_attention", "rope_type"}
    for kind in (ModelParallelConfig, TransformerConfig, MLATransformerConfig):
        for item in dataclasses.fields(kind):
            if item.name in UNDERSTOOD:
                continue
            default = None if item.default is dataclasses.MISSING else item.default
            problems = refused_arguments({item.name: default}, frozenset())
            assert not problems or item.name in other, problems
            if item.name not in FIXED:  # of no effect whatever it says: then nothing is said of a strange value
                assert not refused_arguments({item.name: Inert("a.b", ())}, frozenset()), item.name


def test_no_name_is_in_two_lists():
    assert not UNDERSTOOD & FIXED.keys()
    assert not (UNDERSTOOD | FIXED.keys()) & known_args._NO_EFFECT
    assert not [name for name in UNDERSTOOD if name.startswith(known_args._NO_EFFECT_GROUPS)]


@pytest.mark.parametrize("value", [True, 1, 0.5, "x", [0], {"a": 1}, Inert("a.b"), Inert("megatron.core.X", (3,))])
def test_an_argument_that_is_not_known_is_refused_unless_it_says_nothing_or_is_known_to_be_harmless(value):
    message = refused(attention_of_tomorrow=value)
    assert "attention_of_tomorrow" in message and "--ignore-args" in message
    describe({**DENSE, "attention_of_tomorrow": value}, "here", frozenset({"attention_of_tomorrow"}))
    for nothing in (None, False, 0, 0.0, "", [], {}):
        describe({**DENSE, "attention_of_tomorrow": nothing}, "here")


@pytest.mark.parametrize(
    "window, tokens",
    [
        (None, None),
        ((-1, 0), None),
        ((-1, -1), None),
        ([-1, 0], None),
        (-1, None),
        ((7, 0), 8),
        ([7, 0], 8),
        ((7, 7), 8),
        ((7, -1), 8),
        (7, 8),
        ((0, 0), 1),
    ],
)
def test_a_window_counts_the_tokens_before_and_below_zero_is_no_limit(window, tokens):
    assert model(window_size=window).sliding_window == tokens


@pytest.mark.parametrize("window", ["7,0", (7,), (7, 0, 0), (7.5, 0), (True, 0), [None, 0], (-2, 0), {}, (1 << 70, 0)])
def test_a_window_that_is_none_is_refused(window):
    assert "window_size" in refused(window_size=window)


@pytest.mark.parametrize("name", [*DENSE, "num_query_groups", "kv_channels", "padded_vocab_size", "tensor_model_parallel_size"])
@pytest.mark.parametrize("value", ["8", -1, 0, 1 << 70, float("nan"), float("inf"), True, [8], Inert("numpy.int64", (8,))])
def test_a_number_that_is_none_is_refused_by_name(name, value):
    assert name in refused(**{name: value})


@pytest.mark.parametrize(
    "changes, field, value",
    [
        ({"group_query_attention": False, "num_query_groups": 1}, "num_query_groups", 4),
        ({"group_query_attention": True, "num_query_groups": 2}, "num_query_groups", 2),
        ({"num_query_groups": 2}, "num_query_groups", 2),
        ({}, "num_query_groups", 4),
        ({"kv_channels": None}, "kv_channels", 2),
        ({"untie_embeddings_and_output_weights": True}, "tie_embeddings", False),
        ({"share_embeddings_and_output_weights": False}, "tie_embeddings", False),
        ({}, "tie_embeddings", True),
        ({"norm_epsilon": None, "layernorm_epsilon": 1e-6}, "norm_epsilon", 1e-6),
        ({"max_position_embeddings": 99}, "max_position_embeddings", 99),
    ],
)
def test_both_vocabularies_of_arguments_are_understood(changes, field, value):
    assert getattr(model(**changes), field) == value


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({"use_rope_scaling": True}, ("llama3", 8.0)),
        ({"rope_scaling": True, "rope_scaling_factor": 32.0}, ("llama3", 32.0)),
        ({"rotary_seq_len_interpolation_factor": 4}, ("linear", 4.0)),
        ({"seq_len_interpolation_factor": 2.0}, ("linear", 2.0)),
        ({"rope_scaling": False, "rope_scaling_factor": 1.0, "seq_len_interpolation_factor": None}, None),
        ({"rotary_seq_len_interpolation_factor": 1.0}, None),
    ],
)
def test_rotary_scaling_is_read_from_either_vocabulary(changes, kind):
    found = model(**changes).rope_scaling
    assert kind == (found and (found.kind, found.factor))


def test_two_scalings_at_once_are_refused():
    assert "at once" in refused(use_rope_scaling=True, rotary_seq_len_interpolation_factor=2.0)
