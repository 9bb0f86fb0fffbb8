"""Models whose layers differ, cut under real ranks: the cut model is the dense one of the formulas without what was dropped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import oracle
import pytest
import rank_jobs
import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.checkpoint import megatron
from megatron_prune.planning.plan import Plan, load_plan

TOLERANCE = 1e-4
"""Of logits' deviation: float32 sums in another order. A head or channel too many or too few moves logits by 0.01 and more."""
TOKENS = torch.randint(0, 91, (2, 24), generator=torch.Generator().manual_seed(2))
UNIFORM = ModelConfig(
    num_layers=4,
    hidden_size=40,
    ffn_hidden_size=48,
    num_attention_heads=12,
    num_query_groups=6,
    kv_channels=8,
    vocab_size=91,
    tie_embeddings=False,
    qk_norm=True,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> tuple[Path, oracle.Model]:
    """A model whose layers are alike: a checkpoint of TP 1, and its weights."""
    weights = oracle.random_model(UNIFORM)
    home = tmp_path_factory.mktemp("dense") / "m"
    return oracle.write_checkpoint(home, UNIFORM, weights, ParallelLayout(), family="qwen3"), weights


def prune(pool, load: Path, save: Path, sizes: dict[str, dict] | None, layout: tuple[int, int], **options) -> Plan:
    """Prune under the ranks of ``pool`` → the plan that was saved."""
    if sizes:
        options["layer_sizes"] = f"{save}.sizes.json"
        Path(options["layer_sizes"]).write_text(json.dumps(sizes))
    tp, pp = layout
    options |= {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    options |= {"load": str(load), "save": str(save), "save_plan": f"{save}.plan.json"}
    pool.run(rank_jobs.run_steps, ("prune", options))
    return load_plan(Path(f"{save}.plan.json"))


def masked(config: ModelConfig, weights: oracle.Model, plan: Plan) -> oracle.Model:
    """The dense model, whose dropped units feed zeros into what writes to the stream; dropped blocks and layers add nothing."""
    found, kept = dict(weights), {entry.layer: entry for entry in plan.layers}
    for tensor, data in weights.items():
        if tensor.role not in ("o", "down"):
            continue
        own, entry = config.of_layer(tensor.layer), kept.get(tensor.layer)
        axis, each = ("head", own.kv_channels) if tensor.role == "o" else ("ffn", 1)
        units = [] if entry is None else entry.units(axis)
        stays = torch.zeros(data.shape[1] // each)
        stays[slice(None) if units is None else units] = 1
        found[tensor] = data * stays.repeat_interleave(each)
    return found


def found_logits(ranks, checkpoint: Path, layout: tuple[int, int]) -> torch.Tensor:
    tp, pp = layout
    return torch.from_numpy(ranks(tp * pp).run(rank_jobs.logits, str(checkpoint), TOKENS.tolist(), tp, pp)[-1])


@pytest.mark.parametrize(
    "prune_type, layout, groups, ckpt_format, run_at",
    [
        ("balance", (1, 1), 5, "torch_dist", (1, 2)),
        ("balance", (2, 2), 4, "torch", (1, 1)),
        ("balance", (3, 1), 3, "torch_dist", (3, 1)),
        ("global", (2, 1), 4, "torch_dist", (2, 2)),
        ("global", (3, 1), 3, "torch", (1, 1)),
        ("unbalance", (2, 1), 3, "torch_dist", (1, 1)),
        ("unbalance", (3, 1), 4, "torch", (2, 1)),
    ],
)
def test_the_cut_model_is_the_masked_dense_one_and_can_be_cut_again(
    ranks, dense, tmp_path, prune_type, layout, groups, ckpt_format, run_at
):
    pool, (load, weights) = ranks(layout[0] * layout[1]), dense
    how = {"prune_type": prune_type, "metric": "magnitude", "ckpt_format": ckpt_format}
    sizes = {"0": {"ffn_hidden_size": 24, "num_query_groups": groups}, "3": {"num_attention_heads": 6}}
    plan = prune(pool, load, tmp_path / "one", sizes, layout, drop_attention=(1,), drop_mlp=(2,), **how)
    expected = dataclasses.replace(
        UNIFORM,
        ffn_hidden_size=(24, 48, 0, 48),
        num_attention_heads=(2 * groups, 0, 12, 6),
        num_query_groups=(groups, 0, 6, 6),
    )
    assert plan.new_config(UNIFORM) == megatron.open_checkpoint(tmp_path / "one").config == expected
    wanted = oracle.logits(UNIFORM, masked(UNIFORM, weights, plan), TOKENS)
    assert (found_logits(ranks, tmp_path / "one", run_at) - wanted).abs().max() < TOLERANCE * wanted.std()

    config, once = oracle.model_of(tmp_path / "one")
    if prune_type == "unbalance":  # unequal shards are of no layout that runs
        pool, layout, run_at = ranks(1), (1, 1), (1, 1)
    sizes = {"0": {"ffn_hidden_size": 12, "num_attention_heads": groups}, "2": {"num_query_groups": 2 * layout[0] % 6 or 6}}
    again = prune(pool, tmp_path / "one", tmp_path / "two", sizes, layout, drop_mlp=(1,), drop_layers=(3,), **how)
    assert [entry.layer for entry in again.layers] == [0, 2]  # layer 1 lost its last block
    assert again.new_config(config) == megatron.open_checkpoint(tmp_path / "two").config
    wanted = oracle.logits(config, masked(config, once, again), TOKENS)
    assert (found_logits(ranks, tmp_path / "two", run_at) - wanted).abs().max() < TOLERANCE * wanted.std()


def test_a_plan_without_new_sizes_edited_by_hand_cuts_at_any_layout_to_the_same_model(ranks, dense, tmp_path):
    load, weights = dense
    plan = prune(ranks(1), load, tmp_path / "one", {"3": {"ffn_hidden_size": 12}}, (1, 1), drop_mlp=(0,), metric="magnitude")
    said = json.loads(plan.dumps())
    del said["new"], said["content_id"]
    first, last = said["layers"][1], said["layers"][3]
    for axis in ("kv_head", "head"):
        del first[axis]
    first["attention"] = "none"
    last["kv_head"], last["head"] = [5, 0, 2], [10, 11, 0, 1, 4, 5]
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(said))
    plan = load_plan(path)
    wanted = oracle.logits(UNIFORM, masked(UNIFORM, weights, plan), TOKENS)
    identities = set()
    for layout, ckpt_format in (((1, 2), "torch"), ((3, 1), "torch_dist")):
        save = tmp_path / ckpt_format
        prune(ranks(layout[0] * layout[1]), load, save, None, layout, plan=str(path), ckpt_format=ckpt_format)
        opened = megatron.open_checkpoint(save)
        assert opened.config.num_query_groups == (6, 0, 6, 3) and opened.config.ffn_hidden_size == (0, 48, 48, 12)
        identities.add(opened.manifest.content_id)
        assert (found_logits(ranks, save, (1, 1)) - wanted).abs().max() < TOLERANCE * wanted.std()
    assert len(identities) == 1
