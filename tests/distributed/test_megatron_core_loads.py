"""megatron-core's own loader reads what we write, and we read what its own writer writes.

The values expected on a rank are cut from the Hugging Face tensors here, by Megatron's rules and without the package.
"""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import numpy
import pytest
import rank_jobs
import rank_jobs_recovery
import recovery_reference
import torch
from tiny import state_dict

from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.transfer import TransferOptions, transfer

PADDED = 384
"""Rows of the embedding at every TP here: a distributed checkpoint has one padded vocabulary, whatever the ranks."""

MODELS = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 4},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
}


def megatron_lm_args(source: Path, tp: int, pp: int) -> dict:
    """The entries of Megatron-LM's ``args`` that say the model, from ``config.json`` and a TP × PP."""
    config = json.loads((source / "config.json").read_text())
    family = config["model_type"]
    args = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "group_query_attention": config["num_key_value_heads"] != config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "add_qkv_bias": family == "qwen2",
        "qk_layernorm": family == "qwen3",
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "vocab_size": config["vocab_size"],
        "make_vocab_size_divisible_by": PADDED // tp,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_base": int(config["rope_parameters"]["rope_theta"]),
        "max_position_embeddings": config["max_position_embeddings"],
        "seq_length": 32,
        "num_experts": None,
        "params_dtype": torch.bfloat16,
    }
    return args | {"padded_vocab_size": PADDED}


def rank_state(source: Path, tp: int, pp: int, rank: int, stage: int) -> dict[str, numpy.ndarray]:
    """Parameters of one rank under the local layers' names, float32."""
    config, hf = json.loads((source / "config.json").read_text()), state_dict(source)
    hf = {name: value.float() for name, value in hf.items()}
    groups = config["num_key_value_heads"]
    rows = lambda tensor: tensor.chunk(tp)[rank]
    grouped = lambda tensor: tensor.view(groups, -1, *tensor.shape[1:])
    table = lambda tensor: rows(torch.cat([tensor, torch.zeros(PADDED - len(tensor), tensor.shape[1])]))
    state = {}
    if stage == 0:
        state["embedding.word_embeddings.weight"] = table(hf["model.embed_tokens.weight"])
    if stage == pp - 1:
        state["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not config["tie_word_embeddings"] or pp > 1:
            state["output_layer.weight"] = table(hf.get("lm_head.weight", hf["model.embed_tokens.weight"]))
    each = config["num_hidden_layers"] // pp
    for local in range(each):
        ours, theirs = f"decoder.layers.{local}.", f"model.layers.{stage * each + local}."
        state[ours + "input_layernorm.weight"] = hf[theirs + "input_layernorm.weight"]
        state[ours + "pre_mlp_layernorm.weight"] = hf[theirs + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            parts = [hf.get(f"{theirs}self_attn.{part}_proj.{kind}") for part in "qkv"]
            if parts[0] is not None:
                fused = torch.cat([grouped(part) for part in parts], dim=1)
                state[f"{ours}self_attention.linear_qkv.{kind}"] = rows(fused.flatten(0, 1))
        for part in "qk":
            if f"{theirs}self_attn.{part}_norm.weight" in hf:
                state[f"{ours}self_attention.{part}_layernorm.weight"] = hf[f"{theirs}self_attn.{part}_norm.weight"]
        state[ours + "self_attention.linear_proj.weight"] = hf[theirs + "self_attn.o_proj.weight"].chunk(tp, dim=1)[rank]
        halves = [rows(hf[f"{theirs}mlp.{part}_proj.weight"]) for part in ("gate", "up")]
        state[ours + "mlp.linear_fc1.weight"] = torch.cat(halves)
        state[ours + "mlp.linear_fc2.weight"] = hf[theirs + "mlp.down_proj.weight"].chunk(tp, dim=1)[rank]
    return {name: value.contiguous().numpy() for name, value in state.items()}


def converted(source: Path, save: Path, tp: int, pp: int, **options) -> Path:
    options |= {"target_tensor_parallel_size": tp, "target_pipeline_parallel_size": pp}
    convert(ConvertOptions(load=str(source), save=str(save), make_vocab_size_divisible_by=PADDED // tp, **options), World())
    return save


def assert_ranks_hold(loaded: list[dict[str, numpy.ndarray]], source: Path, tp: int, pp: int) -> None:
    for number, found in enumerate(loaded):
        expected = rank_state(source, tp, pp, number % tp, number // tp)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert numpy.array_equal(found[name], value), f"rank {number}: {name}"


# ------------------------------------------------------------------------------------- what we write, megatron-core loads

BY_4 = [(1, 1, 2, 1), (2, 1, 1, 1), (2, 2, 4, 1), (4, 1, 2, 2), (1, 4, 1, 2)]
BY_3 = [(1, 1, 3, 1), (3, 1, 1, 1), (3, 2, 2, 1), (6, 1, 2, 2)]
LOADS = [(name, *case) for name in MODELS for case in (BY_4 if name in ("llama", "mistral") else BY_3)]


@pytest.mark.parametrize("name, written_tp, written_pp, tp, pp", LOADS)
def test_megatron_cores_own_loader_reads_our_torch_dist_at_another_tp_and_pp(
    tiny, ranks, tmp_path, name, written_tp, written_pp, tp, pp
):
    source = tiny(name, **MODELS[name])
    folder = converted(source, tmp_path / "m", written_tp, written_pp) / "release"
    args = megatron_lm_args(source, tp, pp)
    assert_ranks_hold(ranks(tp * pp).run(rank_jobs.load_stock, str(folder), args, tp, pp), source, tp, pp)


@pytest.mark.parametrize("name, written_tp, pp", [("llama", 2, 1), ("qwen2", 3, 2), ("qwen3", 1, 2)])
def test_layers_of_transformer_engine_find_in_our_torch_dist_all_that_they_look_for(tiny, ranks, tmp_path, name, written_tp, pp):
    source = tiny(name, **MODELS[name])
    folder = converted(source, tmp_path / "m", written_tp, 1) / "release"
    args = megatron_lm_args(source, 1, pp)
    assert_ranks_hold(ranks(pp).run(rank_jobs.load_stock, str(folder), args, 1, pp, "transformer_engine"), source, 1, pp)


def test_layers_of_transformer_engine_find_it_in_the_checkpoint_of_a_recovery_too(tiny, ranks, tmp_path):
    source = tiny("qwen3", dtype="float32", **MODELS["qwen3"])
    checkpoint = converted(source, tmp_path / "m", 1, 1)
    pair = recovery_reference.write_pair(tmp_path / "text", recovery_reference.documents(40))
    options = {"load": str(checkpoint), "save": str(tmp_path / "run"), "data_path": (pair,), "split": "60,30,10"}
    options |= {"train_iters": 1, "global_batch_size": 1, "seq_length": 18, "eval_iters": 1, "lr": 1e-30, "min_lr": 0.0}
    options |= {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2, "lr_warmup_iters": 0}
    ranks(2).run(rank_jobs_recovery.recover, options)
    folder = tmp_path / "run/iter_0000001"
    stored = ranks(1).run(rank_jobs.load_common, str(folder))[0]
    assert stored["tokenizer_model"] == str(folder / "hf") and (folder / "hf/tokenizer.json").is_file()
    args = megatron_lm_args(source, 1, 1)
    assert_ranks_hold(ranks(1).run(rank_jobs.load_stock, str(folder), args, 1, 1, "transformer_engine"), source, 1, 1)


@pytest.mark.parametrize("prune_type, written_tp", [("balance", 3), ("global", 2), ("unbalance", 3)])
def test_megatron_cores_own_loader_reads_a_pruned_checkpoint_with_the_args_stored_in_it(
    tiny, ranks, tmp_path, prune_type, written_tp
):
    checkpoint = converted(tiny("qwen2", **MODELS["qwen2"]), tmp_path / "m", 1, 1)
    sizes = {
        "hidden_size_remain": 36,
        "ffn_hidden_size_remain": 60,
        "num_attention_heads_remain": 6,
        "num_query_groups_remain": 6,
    }
    options = {"load": str(checkpoint), "save": str(tmp_path / "cut"), "prune_type": prune_type, "metric": "magnitude", **sizes}
    options |= {"tensor_model_parallel_size": written_tp, "num_layers_remain": 2}
    ranks(written_tp).run(rank_jobs.run_steps, ("prune", options))
    # of Megatron-LM's defaults, padding depends on TP: write the result again with the padding of the TP that will load it
    moved = {"load": str(tmp_path / "cut"), "save": str(tmp_path / "moved"), "target_tensor_parallel_size": written_tp}
    transfer(TransferOptions(**moved, make_vocab_size_divisible_by=PADDED // written_tp), World())
    export(ExportOptions(load=str(tmp_path / "cut"), save=str(tmp_path / "hf")), World())
    folder = str(tmp_path / "moved/release")
    stored = ranks(1).run(rank_jobs.load_common, folder)[0]
    expected = megatron_lm_args(tmp_path / "hf", written_tp, 1)
    assert {name: stored[name] for name in expected if name != "seq_length"} == {
        name: value for name, value in expected.items() if name != "seq_length"
    }
    args = {**stored, "tensor_model_parallel_size": 2, "make_vocab_size_divisible_by": PADDED // 2}
    assert_ranks_hold(ranks(2).run(rank_jobs.load_stock, folder, args, 2, 1), tmp_path / "hf", 2, 1)


def test_opening_a_checkpoint_leaves_megatron_cores_own_loader_in_the_same_process_as_it_was(tiny, ranks, tmp_path):
    folder = converted(tiny("llama", **MODELS["llama"]), tmp_path / "m", 1, 1) / "release"
    assert ranks(1).run(rank_jobs.open_then_load_common, str(folder)) == ["Namespace"]


@pytest.mark.parametrize("impl", ["transformer_engine", "local"])
@pytest.mark.parametrize("name, tp, pp", [("llama", 4, 1), ("llama", 2, 2), ("mistral", 1, 2), ("qwen2", 3, 1), ("qwen3", 2, 1)])
def test_megatron_cores_model_takes_every_rank_file_of_our_legacy_layout(tiny, ranks, tmp_path, name, tp, pp, impl):
    source = tiny(name, **MODELS[name])
    folder = converted(source, tmp_path / "m", tp, pp, ckpt_format="torch", transformer_impl=impl) / "release"
    args = megatron_lm_args(source, tp, pp)
    assert_ranks_hold(ranks(tp * pp).run(rank_jobs.load_legacy, str(folder), args, tp, pp, impl), source, tp, pp)


# ------------------------------------------------------------------------------------- what megatron-core writes, we read


def saved_by_megatron_core(ranks, source: Path, root: Path, tp: int, pp: int, *, singleton: bool) -> Path:
    """A checkpoint as a training run of Megatron-LM leaves it at iteration 5."""
    args = megatron_lm_args(source, tp, pp)
    # ranks of a pool: tensor-parallel neighbours first, then pipeline stages
    states = [rank_state(source, tp, pp, rank, stage) for stage in range(pp) for rank in range(tp)]
    ranks(tp * pp).run(rank_jobs.save_stock, str(root / "iter_0000005"), args, states, tp, pp, singleton)
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    return root


SAVES = [("llama", 2, 2), ("llama", 4, 1), ("mistral", 1, 2), ("qwen2", 3, 1), ("qwen3", 2, 1), ("qwen3", 2, 2)]


@pytest.mark.parametrize("singleton", [False, True])
@pytest.mark.parametrize("name, tp, pp", SAVES)
def test_a_checkpoint_of_megatron_cores_own_writer_exports_to_the_exact_model(tiny, ranks, tmp_path, name, tp, pp, singleton):
    source = tiny(name, **MODELS[name])
    root = saved_by_megatron_core(ranks, source, tmp_path / "run", tp, pp, singleton=singleton)
    export(ExportOptions(load=str(root), save=str(tmp_path / "hf"), hf_dir=str(source), target_family=name), World())
    names = sorted(path.name for path in source.iterdir())
    assert filecmp.cmpfiles(source, tmp_path / "hf", names, shallow=False) == (names, [], [])


def test_a_checkpoint_of_megatron_cores_own_writer_is_pruned_like_the_model_it_came_from(tiny, ranks, tmp_path):
    source = tiny("qwen2", **MODELS["qwen2"])
    theirs = saved_by_megatron_core(ranks, source, tmp_path / "run", 2, 2, singleton=False)
    ours = converted(source, tmp_path / "m", 1, 1)
    for load, save in ((theirs, "theirs"), (ours, "ours")):
        options = {"load": str(load), "save": str(tmp_path / save), "metric": "magnitude", "prune_type": "global"}
        options |= {"hidden_size_remain": 36, "num_layers_remain": 2, "save_plan": str(tmp_path / f"{save}.json")}
        ranks(2).run(
            rank_jobs.run_steps, ("prune", {**options, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1})
        )
        export(ExportOptions(load=str(tmp_path / save), save=str(tmp_path / f"{save}-hf"), hf_dir=str(source)), World())
    assert (tmp_path / "theirs.json").read_text() == (tmp_path / "ours.json").read_text()
    for file in ("model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "theirs-hf" / file, tmp_path / "ours-hf" / file, shallow=False)
