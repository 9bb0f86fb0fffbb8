"""What verbs say of where a model can be served: warnings, refusals of ``--serve``, and a line for every runtime."""

from __future__ import annotations

import json
import logging

import pytest

from megatron_prune.checkpoint import huggingface
from megatron_prune.errors import InputError
from megatron_prune.runtime.world import World
from megatron_prune.serving.demand import served_by
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.inspect import InspectOptions, inspect
from megatron_prune.steps.prune import PruneOptions, prune
from megatron_prune.steps.prune_hf import PruneHfOptions, prune_hf

SIZES = {"head_dim": 4}
"""Qwen2 with 12 heads × 4 = hidden 48: what vLLM and llama.cpp load."""


def test_a_cut_that_vllm_and_llama_cpp_do_not_load_is_said_before_and_when_it_is_exported(tiny, tmp_path, caplog, capsys):
    caplog.set_level(logging.WARNING, "megatron_prune")
    convert(ConvertOptions(load=str(tiny("qwen2", **SIZES)), save=str(tmp_path / "m")), World())
    cut = {"num_attention_heads_remain": 6, "metric": "magnitude"}
    prune(PruneOptions(load=str(tmp_path / "m"), save=str(tmp_path / "cut"), **cut), World())
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "vLLM refuses it" in line and "--target-family llama" in line and "hidden_size 24" in line]
    assert [line for line in said if "llama.cpp refuses it" in line]

    caplog.clear()
    export(ExportOptions(load=str(tmp_path / "cut"), save=str(tmp_path / "hf")), World())
    assert [record for record in caplog.records if "vLLM refuses it" in record.getMessage()]
    caplog.clear()
    export(ExportOptions(load=str(tmp_path / "cut"), save=str(tmp_path / "llama"), target_family="llama"), World())
    assert not [record for record in caplog.records if "refuses it" in record.getMessage()]
    for name, loads in (("hf", False), ("llama", True)):
        capsys.readouterr()
        inspect(InspectOptions(load=str(tmp_path / name), json=True), World())
        assert (json.loads(capsys.readouterr().out)["serving"]["vllm"] == "loads it") == loads


def test_sizes_that_serve_does_not_take_are_refused_with_nothing_written_and_others_are_cut(tiny, tmp_path):
    options = {"load": str(tiny("qwen2", **SIZES)), "save": str(tmp_path / "out"), "metric": "magnitude"}
    with pytest.raises(InputError, match="(?s)--serve.*head_dim 4, not 48 // 6.*--target-family llama"):
        prune_hf(PruneHfOptions(**options, num_attention_heads_remain=6, serve="vllm"), World())
    with pytest.raises(InputError, match="(?s)--serve.*ffn_hidden_size 61.*ffn_hidden_size 62 or ffn_hidden_size 60"):
        prune_hf(PruneHfOptions(**options, ffn_hidden_size_remain=61, serve="tp=2"), World())
    assert not (tmp_path / "out").exists()
    prune_hf(PruneHfOptions(**options, num_attention_heads_remain=6, serve="vllm,tp=2", target_family="llama"), World())
    assert huggingface.open_model(tmp_path / "out").family.name == "llama"


def test_a_budget_becomes_a_shape_that_is_served(tiny, tmp_path):
    options = {"load": str(tiny("qwen2", **SIZES)), "save": str(tmp_path / "out"), "metric": "magnitude"}
    prune_hf(PruneHfOptions(**options, ratio=0.3, serve="vllm,llamacpp,tp=2"), World())
    model = huggingface.open_model(tmp_path / "out")
    assert not served_by(model.config, model.family, model.hf_config)["vllm"]
    assert model.config.units("ffn") % 2 == 0 and model.config.units("head") % 2 == 0
