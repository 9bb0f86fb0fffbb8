"""``config.json`` and tensor names, compared with the classes of transformers themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES as NAMES
from tiny import tiny_config
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from megatron_prune.arch.model import ModelConfig, RopeScaling
from megatron_prune.arch.tensors import TensorId, full_shape, tensor_ids
from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.families.family import FAMILIES, family_for, kin, family_of

CLASSES = {
    "gemma3_text": Gemma3TextConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
ONE_ROTARY = [name for name in NAMES if name != "gemma3_text"]
"""Families whose layers all rotate alike; tests/unit/test_gemma3.py has what is said of the others."""

SIZES = {"vocab_size": 307, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 32}
OPTIONAL = {
    "num_key_value_heads": 4,
    "head_dim": 6,
    "rms_norm_eps": 1e-4,
    "max_position_embeddings": 77,
    "tie_word_embeddings": True,
    "sliding_window": 33,
    "rope_theta": 12345.0,
    "use_sliding_window": False,
    "hidden_act": "silu",
}


def meant(name: str, hf: dict) -> ModelConfig:
    """What transformers' own class reads in a ``config.json``."""
    real = CLASSES[name].from_dict(dict(hf))
    real.standardize_rope_params()  # as its rotary module does once more
    one = {"full_attention": real.rope_parameters}
    of_kind = real.rope_parameters if name == "gemma3_text" else one
    types = real.layer_types if name == "gemma3_text" else ["full_attention"]
    windows = {"full_attention": real.sliding_window if name == "mistral" else None}
    windows["sliding_attention"] = getattr(real, "sliding_window", None)
    by_layer = lambda values: tuple(values) if name == "gemma3_text" else next(iter(values))
    return ModelConfig(
        num_layers=real.num_hidden_layers,
        hidden_size=real.hidden_size,
        ffn_hidden_size=real.intermediate_size,
        num_attention_heads=real.num_attention_heads,
        num_query_groups=real.num_key_value_heads,
        kv_channels=getattr(real, "head_dim", None) or real.hidden_size // real.num_attention_heads,
        vocab_size=real.vocab_size,
        tie_embeddings=real.tie_word_embeddings,
        norm_epsilon=real.rms_norm_eps,
        rotary_base=by_layer(of_kind[kind]["rope_theta"] for kind in types),
        rope_scaling=by_layer(_scaling(of_kind[kind]) for kind in types),
        max_position_embeddings=real.max_position_embeddings,
        sliding_window=by_layer(windows[kind] for kind in types),
        softmax_scale=real.query_pre_attn_scalar**-0.5 if name == "gemma3_text" else None,
        **TRAITS[name],
    )


TRAITS = {
    "gemma3_text": {
        "qk_norm": True,
        "after_norms": True,
        "zero_centered_norms": True,
        "activation": "gelu_tanh",
        "scaled_embedding": True,
    },
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


def _scaling(rope: dict) -> RopeScaling | None:
    if rope["rope_type"] == "linear":
        return RopeScaling(kind="linear", factor=rope["factor"])
    if rope["rope_type"] == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return RopeScaling(kind="llama3", **{key: rope[key] for key in keys})
    return None


def read(name: str, **changes) -> ModelConfig:
    return FAMILIES.get(name).model_config({"model_type": name, **SIZES, **changes})


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", NAMES)
@given(st.sets(st.sampled_from(sorted(OPTIONAL))))
def test_any_keys_may_be_left_out_and_mean_what_transformers_takes_them_for(name, present):
    hf = {"model_type": name, **SIZES, **{key: OPTIONAL[key] for key in present}}
    assert FAMILIES.get(name).model_config(hf) == meant(name, hf)


@pytest.mark.parametrize("name", NAMES)
def test_null_groups_are_as_many_as_heads_and_a_null_head_dimension_is_hidden_size_over_heads(name):
    """transformers 5 refuses some of these nulls; configurations written by older versions hold them."""
    assert read(name, num_key_value_heads=None).num_query_groups == 32
    assert read(name, num_key_value_heads=4, head_dim=None).kv_channels == 2


def test_a_null_sliding_window_is_full_attention():
    assert read("mistral", sliding_window=None).sliding_window is None
    assert read("mistral").sliding_window == MistralConfig().sliding_window == 4096


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_writes_today_is_read(name, tied):
    rope = {"rope_type": "default", "rope_theta": 777.0}
    if name == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {**rope, "rope_theta": 55.0}}
    hf = tiny_config(name, tie_word_embeddings=tied, rope_parameters=rope).to_dict()
    assert FAMILIES.get(name).model_config(hf) == meant(name, hf)
    assert 777.0 in FAMILIES.get(name).model_config(hf).each("rotary_base")


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("name", ONE_ROTARY)
@pytest.mark.parametrize(
    "rope, base, scaling",
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e5, RopeScaling(kind="linear", factor=2.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, 1e4, RopeScaling(kind="linear", factor=4.0)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 5e5, RopeScaling(kind="llama3", **LLAMA3)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
            5e5,
            RopeScaling(kind="linear", factor=2.0),
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, 5e5, RopeScaling(kind="llama3", **LLAMA3)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e6}, "rope_theta": 3.0}, 2e6, None),
    ],
)
def test_both_spellings_of_rope_are_read_as_transformers_reads_them(name, rope, base, scaling):
    config = read(name, num_key_value_heads=4, **rope)
    assert (config.rotary_base, config.rope_scaling) == (base, scaling)
    assert config == meant(name, {"model_type": name, **SIZES, "num_key_value_heads": 4, **rope})


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "5 groups"),
        ({"hidden_size": "64", "head_dim": 2}, "hidden_size"),
        ({"intermediate_size": 96.5}, "intermediate_size"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_carried_is_refused_by_name(name, changes, word):
    if name == "llama" and changes == {"attention_bias": True}:
        changes = {"attention_bias": 1}
    if name == "gemma3_text" and "rope_parameters" in changes:
        changes = {"rope_parameters": {"full_attention": changes["rope_parameters"]}}
    with pytest.raises(CheckpointError, match=word):
        read(name, **{"num_key_value_heads": 4, **changes})


@pytest.mark.parametrize("name", ONE_ROTARY)
def test_an_activation_that_is_not_carried_is_refused(name):
    with pytest.raises(CheckpointError, match="hidden_act"):
        read(name, num_key_value_heads=4, hidden_act="gelu")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": "much"}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": "linear"},
        {"rope_parameters": ["linear"]},
        {"rope_theta": "high"},
    ],
)
def test_a_damaged_rope_entry_is_refused_and_does_not_crash(rope):
    with pytest.raises(CheckpointError):
        read("llama", **rope)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_qwen_with_a_sliding_window_on_some_layers_is_refused(name):
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        read(name, num_key_value_heads=4, use_sliding_window=True, sliding_window=16, max_window_layers=3)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", None, 7, ["llama"]])
def test_an_unknown_model_type_is_refused_with_the_known_ones(model_type):
    with pytest.raises(CheckpointError, match="gemma3_text, llama, mistral, qwen2, qwen3"):
        family_of({"model_type": model_type, **SIZES})


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_of_all_tensors_are_those_of_transformers_own_model(family, tied):
    hf = tiny_config(family, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    room = FAMILIES.get(family)
    config = room.model_config(hf.to_dict())
    ours = {room.tensor_name(t): full_shape(t, config) for t in tensor_ids(config)}
    assert ours == {name: tuple(data.shape) for name, data in model.named_parameters()}
    assert room.architecture == type(model).__name__


def test_a_model_without_positions_is_one_that_no_class_says_yet(family):
    config = FAMILIES.get(family).model_config(tiny_config(family).to_dict())
    with pytest.raises(InputError, match="cannot express.*rope_"):
        FAMILIES.get(family).check_expressible(dataclasses.replace(config, rotary_base=None))
    with pytest.raises(InputError, match="cannot express"):
        FAMILIES.get(family).check_expressible(dataclasses.replace(config, rotary_base=(None, *[1e4] * (config.num_layers - 1))))


# ---------------------------------------------------------------------------------------------------------- writing


@st.composite
def models(draw, name: str) -> ModelConfig:
    groups = draw(st.integers(1, 4))
    heads = groups * draw(st.integers(1, 3))
    d = 2 * draw(st.integers(1, 4))
    hidden = heads * draw(st.integers(1, 5)) if name in ("gemma3_text", "llama") else draw(st.integers(1, 40))
    layers = draw(st.integers(1, 5))
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=draw(st.integers(1, 40)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=d,
        vocab_size=draw(st.integers(1, 500)),
        tie_embeddings=draw(st.booleans()),
        norm_epsilon=draw(st.sampled_from([1e-5, 1e-6, 3e-4])),
        max_position_embeddings=draw(st.sampled_from([64, 2048, 131072])),
        **TRAITS[name],
        **(draw(positions_by_kind(layers)) if name == "gemma3_text" else draw(positions(name))),
    )


BASES = st.sampled_from([1e4, 5e5])
SCALINGS = st.sampled_from([None, RopeScaling(kind="linear", factor=2.0), RopeScaling(kind="llama3", factor=4.0)])


@st.composite
def positions(draw, name: str) -> dict:
    window = draw(st.sampled_from([None, 32])) if name == "mistral" else None
    return {"rotary_base": draw(BASES), "rope_scaling": draw(SCALINGS), "sliding_window": window}


@st.composite
def positions_by_kind(draw, layers: int) -> dict:
    """Local layers with a window and a base of their own, in any order; scores scaled by any whole number."""
    local = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    window, bases, scaling = draw(st.integers(1, 99)), (draw(BASES), draw(BASES)), draw(SCALINGS)
    return {
        "sliding_window": tuple(window if here else None for here in local),
        "rotary_base": tuple(bases[here] for here in local),
        "rope_scaling": tuple(None if here else scaling for here in local),
        "softmax_scale": draw(st.integers(1, 99999)) ** -0.5,
    }


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_a_fresh_config_json_is_read_back_the_same_by_us_and_by_transformers(name, data):
    config = data.draw(models(name))
    hf = FAMILIES.get(name).hf_config(config, None)
    assert FAMILIES.get(name).model_config(hf) == config
    assert meant(name, hf) == config


@pytest.mark.parametrize("name", NAMES)
@given(st.sets(st.sampled_from(sorted(OPTIONAL))))
def test_an_unchanged_model_gets_back_its_own_config_json_key_for_key(name, present):
    hf = {"model_type": name, **SIZES, **{key: OPTIONAL[key] for key in present}, "x_unknown": {"kept": [1]}}
    written = FAMILIES.get(name).hf_config(FAMILIES.get(name).model_config(hf), hf)
    assert list(written.items()) == list(hf.items())


@pytest.mark.parametrize("name", NAMES)
@given(
    st.sets(st.sampled_from(sorted(OPTIONAL))),
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(1, 4),
    st.integers(1, 96),
    st.integers(1, 4),
    st.data(),
)
def test_a_pruned_shape_is_read_back_whatever_keys_the_original_left_out(name, present, groups, each, hidden, ffn, layers, data):
    hf = {"model_type": name, **SIZES, **{key: OPTIONAL[key] for key in present}}
    before = FAMILIES.get(name).model_config(hf)
    heads = groups * min(each, before.heads_per_group)
    kept = sorted(data.draw(st.sets(st.integers(0, 3), min_size=layers, max_size=layers)))
    after = dataclasses.replace(
        before.of_layers(kept),
        hidden_size=heads * hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
    )
    written = FAMILIES.get(name).hf_config(after, hf, kept)
    assert FAMILIES.get(name).model_config(written) == after
    assert meant(name, written) == after


@pytest.mark.parametrize("name, other", [("llama", "mistral"), ("mistral", "llama")])
@given(st.sets(st.sampled_from(sorted(set(OPTIONAL) - {"sliding_window"}))))
def test_a_model_moved_to_its_kin_family_means_the_same_there(name, other, present):
    hf = {"model_type": name, **SIZES, **{key: OPTIONAL[key] for key in present}, "sliding_window": None}
    config = FAMILIES.get(name).model_config(hf)
    written = FAMILIES.get(other).hf_config(config, hf)
    assert (written["model_type"], written["architectures"]) == (other, [FAMILIES.get(other).architecture])
    assert FAMILIES.get(other).model_config(written) == config
    assert meant(other, written) == config


def test_a_sliding_window_is_not_lost_silently_by_a_move_to_a_family_without_one():
    hf = {"model_type": "mistral", **SIZES, "num_key_value_heads": 4, "sliding_window": 16}
    with pytest.raises(InputError, match="sliding"):
        FAMILIES.get("llama").hf_config(FAMILIES.get("mistral").model_config(hf), hf)


TYPES = ["full_attention", "attention", "attention", "full_attention"]
"""transformers has two names for the same kind of layer."""


def test_per_layer_lists_are_cut_to_the_layers_that_stay():
    hf = {"model_type": "qwen3", **SIZES, "num_key_value_heads": 4, "layer_types": TYPES}
    config = dataclasses.replace(FAMILIES.get("qwen3").model_config(hf), num_layers=2)
    written = FAMILIES.get("qwen3").hf_config(config, hf, [1, 3])
    assert (written["num_hidden_layers"], written["layer_types"]) == (2, ["attention", "full_attention"])
    assert hf["layer_types"] == ["full_attention", "attention", "attention", "full_attention"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden", [63, 64, 65, 31])
def test_a_shape_is_refused_exactly_where_transformers_class_refuses_it(name, hidden):
    config = read(name, num_key_value_heads=4, head_dim=8, hidden_size=hidden)
    try:
        CLASSES[name](**{**SIZES, "num_key_value_heads": 4, "head_dim": 8, "hidden_size": hidden})
    except Exception:
        able = "no other family or form" if name == "gemma3_text" else "--target-family mistral"
        with pytest.raises(InputError, match=able):
            FAMILIES.get(name).hf_config(config, None)
    else:
        assert FAMILIES.get(name).hf_config(config, None)["hidden_size"] == hidden


def test_only_families_of_the_same_architecture_are_kin():
    assert [kin(read(name, num_key_value_heads=4)) for name in NAMES] == [
        ["gemma3_text"],
        ["llama", "mistral"],
        ["llama", "mistral"],
        ["llama", "qwen2"],
        ["qwen3"],
    ]


def test_llamas_attention_bias_means_the_biases_of_qwen2_and_one_that_is_zero():
    config = read("llama", num_key_value_heads=4, attention_bias=True)
    assert config == dataclasses.replace(read("llama", num_key_value_heads=4), qkv_bias=True)
    assert FAMILIES.get("llama").zero_tensors(config) == {
        f"model.layers.{layer}.self_attn.o_proj.bias": TensorId("o", layer) for layer in range(config.num_layers)
    }
    assert not FAMILIES.get("llama").zero_tensors(read("llama", num_key_value_heads=4))
    assert not FAMILIES.get("qwen2").zero_tensors(read("qwen2", num_key_value_heads=4))
    assert FAMILIES.get("llama").hf_config(config, None)["attention_bias"] is True


def test_a_qwen2_written_as_llama_leaves_qwen2s_own_keys_behind():
    template = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 4, "use_sliding_window": False, "max_window_layers": 28}
    written = FAMILIES.get("llama").hf_config(read("qwen2", num_key_value_heads=4), template)
    assert (written["model_type"], written["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert written["attention_bias"] is True and not {"use_sliding_window", "max_window_layers"} & written.keys()
    back = FAMILIES.get("qwen2").hf_config(read("qwen2", num_key_value_heads=4), written)
    assert back["model_type"] == "qwen2" and "attention_bias" not in back


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "llama"),
        ({"hidden_size": 50}, "mistral"),
        ({"sliding_window": 8}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True, "hidden_size": 50}, "qwen3"),
    ],
)
def test_a_nameless_model_gets_the_plainest_family_that_can_hold_it(changes, expected):
    config = dataclasses.replace(read("llama", head_dim=4), **changes)
    assert family_for(config).name == expected


def test_an_architecture_that_no_family_has_is_refused():
    with pytest.raises(CheckpointError):
        family_for(dataclasses.replace(read("llama"), qkv_bias=True, qk_norm=True))
