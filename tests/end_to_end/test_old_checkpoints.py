"""What older Hugging Face checkpoints hold: ``.bin`` files, rotary tables, a stored copy of the tied output layer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import state_dict

from megatron_prune.errors import CheckpointError
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.transfer import TransferOptions, transfer


def round_trip(source, work):
    convert(ConvertOptions(load=str(source), save=str(work / "m"), target_tensor_parallel_size=3), World())
    transfer(TransferOptions(load=str(work / "m"), save=str(work / "t"), ckpt_format="torch"), World())
    export(ExportOptions(load=str(work / "t"), save=str(work / "back")), World())
    return state_dict(work / "back")


def changed_copy(source, target, change):
    """A copy of a model whose tensors ``change`` edits in place."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_rotary_tables_return(tiny, tmp_path):
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(4) for layer in range(4)}
    source = changed_copy(tiny("llama"), tmp_path / "hf", lambda tensors: tensors.update(tables))
    back = round_trip(source, tmp_path)
    assert back.keys() == state_dict(source).keys()
    assert all(torch.equal(back[name], tables[name]) for name in tables)


def test_a_stored_copy_of_the_tied_output_returns(tiny, tmp_path):
    def store(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = changed_copy(tiny("llama", tie_word_embeddings=True), tmp_path / "hf", store)
    back = round_trip(source, tmp_path)
    assert torch.equal(back["lm_head.weight"], load_file(source / "model.safetensors")["lm_head.weight"])
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_tied_output_that_differs_is_refused(tiny, tmp_path):
    def store(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    source = changed_copy(tiny("llama", tie_word_embeddings=True), tmp_path / "hf", store)
    with pytest.raises(CheckpointError, match="differs"):
        round_trip(source, tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("indexed", [False, True])
def test_bin_files_are_read_as_safetensors_are(tiny, tmp_path, indexed):
    source = tiny("qwen2")
    tensors = state_dict(source)
    old = tmp_path / "hf"
    shutil.copytree(source, old, ignore=shutil.ignore_patterns("*.safetensors"))
    if indexed:
        names = sorted(tensors)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, held in parts.items():
            torch.save({name: tensors[name] for name in held}, old / file)
        index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
        (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, old / "pytorch_model.bin")
    back = round_trip(old, tmp_path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_mixed_dtypes_return_each_in_its_own(tiny, tmp_path):
    def widen(tensors):
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name].float()

    source = changed_copy(tiny("llama"), tmp_path / "hf", widen)
    back = round_trip(source, tmp_path)
    assert {tensor.dtype for tensor in back.values()} == {torch.float32, torch.bfloat16}
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
