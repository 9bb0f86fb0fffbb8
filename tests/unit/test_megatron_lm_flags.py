"""The arguments that Megatron-LM is told beside ``--use-checkpoint-args``.

They were pasted as they stand here into Megatron-LM of core 0.12 to 0.19 with its own ``load_checkpoint`` (docs/formats.md).
"""

from __future__ import annotations

import dataclasses
import shlex

import pytest
import torch
from dense import SMALL
from tiny import build_tiny

from megatron_prune.arch.model import RopeScaling
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint.megatron_args import megatron_args
from megatron_prune.checkpoint.megatron_lm_flags import contradictions, megatron_lm_flags
from megatron_prune.cli.main import main

PLAIN = dataclasses.replace(SMALL, qk_norm=False, norm_epsilon=1e-6, rope_scaling=None, sliding_window=None)
LLAMA31 = RopeScaling(kind="llama3", factor=8.0)


def said(changes, dtype=torch.float32, ckpt_format="torch_dist", transformer_impl="transformer_engine") -> str:
    config, layout = dataclasses.replace(PLAIN, **changes), ParallelLayout(tensor=2, pipeline=3)
    return shlex.join(megatron_lm_flags(config, layout, dtype, ckpt_format=ckpt_format, transformer_impl=transformer_impl))


@pytest.mark.parametrize(
    "changes, flags",
    [
        ({}, "--norm-epsilon 1e-06"),
        ({"norm_epsilon": 1.25e-5}, "--norm-epsilon 1.25e-05"),
        ({"qk_norm": True}, "--norm-epsilon 1e-06 --qk-layernorm"),
        ({"rope_scaling": LLAMA31}, "--norm-epsilon 1e-06 --use-rope-scaling --rope-scaling-factor 8.0"),
        (
            {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
            "--norm-epsilon 1e-06 --rotary-seq-len-interpolation-factor 4",
        ),
        ({"sliding_window": 4096}, "--norm-epsilon 1e-06 --window-size 4095,0"),
    ],
)
def test_what_the_model_needs_is_said(changes, flags):
    assert said(changes) == f"--use-checkpoint-args {flags}"


def test_element_type_layers_and_the_layout_of_the_legacy_format_are_said():
    assert said({}, torch.bfloat16) == "--use-checkpoint-args --norm-epsilon 1e-06 --bf16"
    assert said({}, torch.float16, "torch", "local") == (
        "--use-checkpoint-args --norm-epsilon 1e-06 --fp16 --transformer-impl local --ckpt-format torch"
        " --tensor-model-parallel-size 2 --pipeline-model-parallel-size 3"
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, []),
        ({"rope_scaling": LLAMA31}, []),
        ({"rope_scaling": RopeScaling(kind="linear", factor=4.0)}, [("before core 0.19", "needs 4")]),
        ({"rope_scaling": dataclasses.replace(LLAMA31, factor=32.0)}, [("factor 8", "needs 32")]),
        (
            {"rope_scaling": dataclasses.replace(LLAMA31, low_freq_factor=2.0, original_max_position_embeddings=4096)},
            [("low_freq_factor 1", "needs 2"), ("original_max_position_embeddings 8192", "needs 4096")],
        ),
        ({"rope_scaling": RopeScaling(kind="linear", factor=2.5)}, [("whole numbers", "needs 2.5")]),
        ({"sliding_window": 16, "max_position_embeddings": 64}, [("before core 0.15", "not to 16")]),
        ({"sliding_window": 64, "max_position_embeddings": 64}, []),
    ],
)
def test_what_megatron_lm_cannot_compute_is_named(changes, words):
    found = contradictions(dataclasses.replace(PLAIN, **changes))
    assert len(found) == len(words)
    assert all(word in sentence for sentence, both in zip(found, words) for word in both)


def test_args_have_what_megatron_bridge_reads_off_a_checkpoint_of_megatron_lm():
    """By name and without a default: ``training/mlm_compat`` of Megatron-Bridge 0.3.1 and 0.6.0."""
    names = """
    apply_layernorm_1p bf16 bias_gelu_fusion bias_swiglu_fusion config_logger_dir cp_comm_type decoder_first_pipeline_num_layers
    decoder_last_pipeline_num_layers fp16 fp16_lm_cross_entropy fp8_param_gather group_query_attention
    heterogeneous_layers_config_path init_method_xavier_uniform init_model_with_meta_device is_hybrid_model
    make_vocab_size_divisible_by max_position_embeddings moe_grouped_gemm moe_use_legacy_grouped_gemm mtp_num_layers
    multi_latent_attention no_persist_layer_norm norm_epsilon normalization num_experts num_layers num_query_groups
    overlap_p2p_comm padded_vocab_size params_dtype position_embedding_type qk_l2_norm qk_layernorm rotary_base
    rotary_interleaved rotary_percent spec squared_relu swiglu transformer_impl untie_embeddings_and_output_weights
    use_legacy_models use_rope_scaling
    """.split()
    args = vars(megatron_args(PLAIN, ParallelLayout(), torch.bfloat16, "hf"))
    assert not set(names) - set(args)
    assert (args["transformer_impl"], args["squared_relu"], args["spec"], args["cp_comm_type"]) == (
        "transformer_engine",
        False,
        None,
        ["p2p"],
    )


def test_convert_says_both_when_it_has_written(tmp_path, capsys):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32, "rope_theta": 500000.0}
    source, save = build_tiny(tmp_path / "hf", "qwen3", rope_parameters=scaling), tmp_path / "a model"
    capsys.readouterr()
    main(["convert", "--load-dir", str(source), "--save-dir", str(save)])
    lines = capsys.readouterr().err.splitlines()
    flags = "--use-checkpoint-args --norm-epsilon 1e-06 --bf16 --qk-layernorm --use-rope-scaling --rope-scaling-factor 8.0"
    assert f"INFO: Megatron-LM's arguments for it: --load '{save}' {flags}" in lines
    assert any("WARNING: " in line and "8192" in line and "needs 32" in line for line in lines)


def test_transfer_and_prune_name_tensors_for_local_layers_where_asked_to(tiny, tmp_path):
    source = tiny("qwen3", dtype="float32")
    main(["convert", "--load-dir", str(source), "--save-dir", str(tmp_path / "m"), "--transformer-impl", "local"])
    ways = {
        "transferred": ["transfer", "--load-dir", str(tmp_path / "m"), "--save-dir"],
        "pruned": ["prune", "--load", str(tmp_path / "m"), "--num_layers_remain", "2", "--metric", "magnitude", "--save"],
    }
    for name, words in ways.items():
        for impl, norm in (("local", "input_layernorm.weight"), (None, "self_attention.linear_qkv.layer_norm_weight")):
            save = tmp_path / f"{name}-{impl}"
            main([*words, str(save), "--ckpt-format", "torch", *(["--transformer-impl", impl] if impl else [])])
            held = torch.load(save / "release/mp_rank_00/model_optim_rng.pt", weights_only=False)["model"]
            assert f"decoder.layers.0.{norm}" in held
            assert ("decoder.final_layernorm._extra_state" in held) == (impl is None)
    main(["export", "--load-dir", str(tmp_path / "transferred-local"), "--save-dir", str(tmp_path / "back")])
    assert (tmp_path / "back/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
