"""Hugging Face → Megatron → Hugging Face gives back every byte, at every layout and format."""

from __future__ import annotations

import filecmp

import pytest
from tiny import state_dict

from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.transfer import TransferOptions, transfer


def assert_same_directory(left, right):
    """Same files, byte for byte."""
    names = sorted(p.name for p in left.iterdir())
    assert names == sorted(p.name for p in right.iterdir())
    assert filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (3, 2), (2, 4), (6, 1), (12, 2)])
def test_every_byte_returns(tiny, family, tmp_path, tp, pp, ckpt_format):
    source = tiny(family, tie_word_embeddings=family in ("llama", "qwen2"))
    convert(
        ConvertOptions(
            load=str(source),
            save=str(tmp_path / "megatron"),
            target_tensor_parallel_size=tp,
            target_pipeline_parallel_size=pp,
            ckpt_format=ckpt_format,
        ),
        World(),
    )
    export(ExportOptions(load=str(tmp_path / "megatron"), save=str(tmp_path / "back")), World())
    assert_same_directory(source, tmp_path / "back")


@pytest.mark.parametrize("there, back", [("fp32", None), (None, None)])
def test_a_wider_dtype_and_transfers_in_between_lose_nothing(tiny, tmp_path, there, back):
    source = tiny("qwen3", tie_word_embeddings=False)
    steps = [(6, 2, "torch"), (3, 1, "torch_dist"), (12, 4, "torch_dist"), (2, 2, "torch")]
    convert(ConvertOptions(load=str(source), save=str(tmp_path / "0"), target_params_dtype=there), World())
    for number, (tp, pp, ckpt_format) in enumerate(steps):
        transfer(
            TransferOptions(
                load=str(tmp_path / str(number)),
                save=str(tmp_path / str(number + 1)),
                target_tensor_parallel_size=tp,
                target_pipeline_parallel_size=pp,
                ckpt_format=ckpt_format,
            ),
            World(),
        )
    export(ExportOptions(load=str(tmp_path / "4"), save=str(tmp_path / "back"), target_params_dtype=back), World())
    assert_same_directory(source, tmp_path / "back")


def test_a_sharded_source_and_a_sharded_target(tiny, tmp_path):
    source = tiny("mistral", shard="30KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    convert(ConvertOptions(load=str(source), save=str(tmp_path / "m"), target_tensor_parallel_size=2), World())
    export(ExportOptions(load=str(tmp_path / "m"), save=str(tmp_path / "back"), max_shard_size="30KB"), World())
    ours, theirs = state_dict(tmp_path / "back"), state_dict(source)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in theirs)
