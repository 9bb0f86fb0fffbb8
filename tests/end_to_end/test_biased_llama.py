"""Qwen2 written as ``LlamaForCausalLM``: the same model, which vLLM and llama.cpp load at any head size; and the way back."""

from __future__ import annotations

import json

import pytest
import tiny as tiny_module
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint import huggingface
from megatron_prune.errors import CheckpointError, InputError
from megatron_prune.families.family import FAMILIES
from megatron_prune.runtime.huggingface_stage import HuggingFaceStage
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.prune import PruneOptions, prune
from megatron_prune.steps.prune_hf import PruneHfOptions, prune_hf

TOKENS = torch.randint(0, 307, (1, 20), generator=torch.Generator().manual_seed(2))
ZERO = "model.layers.{}.self_attn.o_proj.bias"


def exported(source, home, name, **options):
    convert(ConvertOptions(load=str(source), save=str(home / f"{name}-m")), World())
    export(ExportOptions(load=str(home / f"{name}-m"), save=str(home / name), **options), World())
    return home / name


@pytest.mark.parametrize("tied", [True, False])
def test_the_same_weights_and_logits_as_llama_and_back_again_bit_for_bit(tiny, tmp_path, tied):
    source = tiny("qwen2", tie_word_embeddings=tied)
    llama = exported(source, tmp_path, "llama", target_family="llama")
    described = json.loads((llama / "config.json").read_text())
    assert (described["architectures"], described["attention_bias"]) == (["LlamaForCausalLM"], True)
    assert "use_sliding_window" not in described

    before, after = tiny_module.state_dict(source), tiny_module.state_dict(llama)
    assert after.keys() - before.keys() == {ZERO.format(layer) for layer in range(4)}
    assert all(not after[ZERO.format(layer)].any() and after[ZERO.format(layer)].shape == (48,) for layer in range(4))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(tiny_module.logits(llama, TOKENS), tiny_module.logits(source, TOKENS))
    _, loading = AutoModelForCausalLM.from_pretrained(llama, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    assert huggingface.open_model(llama).config == huggingface.open_model(source).config
    again = exported(llama, tmp_path, "again")
    assert (again / "config.json").read_bytes() == (llama / "config.json").read_bytes()
    assert all(torch.equal(tensor, after[name]) for name, tensor in tiny_module.state_dict(again).items())
    back = exported(llama, tmp_path, "back", target_family="qwen2")
    assert {name: tensor.tolist() for name, tensor in tiny_module.state_dict(back).items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }


def test_a_bias_that_is_not_zero_or_not_there_is_refused_by_name(tiny, tmp_path):
    llama = exported(tiny("qwen2"), tmp_path, "llama", target_family="llama")
    weights = load_file(llama / "model.safetensors")
    weights[ZERO.format(2)][7] = 1e-3
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="layers.2.self_attn.o_proj.bias: holds other values than zero"):
        huggingface.open_model(llama)
    del weights[ZERO.format(2)]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="layers.2.self_attn.o_proj.bias: missing"):
        huggingface.open_model(llama)


def test_a_biased_llama_is_pruned_on_both_routes_to_the_same_weights(tiny, tmp_path):
    llama = exported(tiny("qwen2"), tmp_path, "llama", target_family="llama")
    cut = {"num_attention_heads_remain": 6, "num_query_groups_remain": 3, "ffn_hidden_size_remain": 60, "metric": "magnitude"}
    prune(PruneOptions(load=str(tmp_path / "llama-m"), save=str(tmp_path / "cut-m"), target_family="llama", **cut), World())
    export(ExportOptions(load=str(tmp_path / "cut-m"), save=str(tmp_path / "one")), World())
    prune_hf(PruneHfOptions(load=str(llama), save=str(tmp_path / "two"), **cut), World())
    one, two = (tiny_module.state_dict(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert ZERO.format(3) in one
    described = json.loads((tmp_path / "one/config.json").read_text())
    assert (described["model_type"], described["num_attention_heads"], described["head_dim"]) == ("llama", 6, 8)
    assert tiny_module.logits(tmp_path / "one", TOKENS).isfinite().all()


def test_a_layer_that_is_re_fitted_in_llamas_class_computes_what_it_does_in_qwen2s(tiny):
    model = huggingface.open_model(tiny("qwen2"))
    stream, written = torch.randn(1, 20, 48, generator=torch.Generator().manual_seed(1)), []
    for family in ("qwen2", "llama"):
        stage = HuggingFaceStage(FAMILIES.get(family), dtype=torch.float32, seq_length=20)
        layer = stage.layer(model.config)
        layer.load(lambda role, rows, cols: model.tensors.read_block(TensorId(role, 1), rows).float())
        attention = layer.blocks[0]
        written.append(attention.write(attention.inside(attention.norm(stream))))
    assert torch.allclose(*written, atol=1e-6)


def test_heads_that_do_not_divide_hidden_are_refused_as_llama_and_qwen2_is_named(tiny, tmp_path):
    convert(ConvertOptions(load=str(tiny("qwen2")), save=str(tmp_path / "m")), World())
    options = {"load": str(tmp_path / "m"), "save": str(tmp_path / "cut"), "metric": "magnitude", "hidden_size_remain": 40}
    with pytest.raises(InputError, match=r"(?s)LlamaForCausalLM.*hidden_size 40 with 12.*--target-family qwen2"):
        prune(PruneOptions(**options, target_family="llama"), World())
