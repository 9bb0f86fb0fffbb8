"""Pruning under real ranks, checked by values: against ``prune_hf``, an independent score, and a masked dense model."""

from __future__ import annotations

import filecmp
import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import rank_jobs
import torch
from tiny import state_dict

from megatron_prune.planning.plan import LayerPlan, Plan, load_plan
from megatron_prune.runtime.world import World
from megatron_prune.steps.convert import ConvertOptions, convert
from megatron_prune.steps.export import ExportOptions, export
from megatron_prune.steps.prune_hf import PruneHfOptions, prune_hf
from megatron_prune.steps.transfer import TransferOptions, transfer

HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS = 12, 8, 48, 96, 4
AXES = {
    "hidden": {"hidden_size_remain": 36},
    "ffn": {"ffn_hidden_size_remain": 48},
    "heads inside groups": {"num_attention_heads_remain": 6, "num_query_groups_remain": 6},
    "KV groups": {"num_query_groups_remain": 3},
    "layers by score": {"num_layers_remain": 2},
    "layers by number": {"drop_layers": (1, 2)},
    "all": {
        "hidden_size_remain": 36,
        "ffn_hidden_size_remain": 60,
        "num_attention_heads_remain": 6,
        "num_query_groups_remain": 6,
        "num_layers_remain": 2,
    },
    "blocks alone": {"drop_attention": (0, 3), "drop_mlp": (1,), "hidden_size_remain": 36},
}


@pytest.fixture(scope="module")
def megatron(tiny, tmp_path_factory):
    """``megatron(family, **changes)`` → (Hugging Face directory, Megatron checkpoint of TP 1)."""
    made = {}

    def get(family: str = "qwen2", **changes) -> tuple[Path, Path]:
        key = (family, *sorted(changes.items()))
        if key not in made:
            target = tmp_path_factory.mktemp("megatron") / "checkpoint"
            source = tiny(family, **changes)
            convert(ConvertOptions(load=str(source), save=str(target)), World())
            made[key] = source, target
        return made[key]

    return get


def prune(pool, checkpoint: Path, save: Path, tp: int, pp: int = 1, **options) -> Plan:
    """Prune under the ranks of ``pool`` → the plan that was saved."""
    options = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **options}
    options |= {"load": str(checkpoint), "save": str(save), "save_plan": f"{save}.plan.json"}
    pool.run(rank_jobs.run_steps, ("prune", options))
    return load_plan(Path(f"{save}.plan.json"))


def exported(checkpoint: Path, save: Path, **options) -> Path:
    export(ExportOptions(load=str(checkpoint), save=str(save), **options), World())
    return save


def by_prune_hf(source: Path, plan: Path, save: Path, **options) -> Path:
    prune_hf(PruneHfOptions(load=str(source), save=str(save), plan=str(plan), **options), World())
    return save


def assert_same_model(left: Path, right: Path) -> None:
    names = ["config.json", "model.safetensors"]
    assert filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


def units(plan: Plan, axis: str) -> list[tuple[int, list[int]]]:
    return [(entry.layer, getattr(entry, axis)) for entry in plan.layers]


# ------------------------------------------------------------------------------------------------ (a) prune_hf is the oracle

ORACLE = [
    # every axis at TP 3 (6 KV groups), all in a family with biases, both metrics and prune types taking turns
    *[
        ("qwen2", axes, 3, 3, 1, prune_type, metric)
        for axes, (prune_type, metric) in zip(
            AXES,
            [
                ("balance", "magnitude"),
                ("global", "magnitude"),
                ("balance", "random"),
                ("global", "magnitude"),
                ("global", "random"),
                ("balance", "random"),
                ("balance", "magnitude"),
            ],
        )
    ],
    ("qwen2", "all", 3, 3, 1, "unbalance", "magnitude"),
    ("gemma3_text", "all", 3, 3, 1, "balance", "magnitude"),
    ("qwen3", "blocks alone", 4, 2, 2, "global", "magnitude"),
    ("gemma3_text", "blocks alone", 3, 3, 1, "balance", "magnitude"),
    ("mistral", "all", 1, 1, 1, "global", "magnitude"),
    ("mistral", "all", 2, 2, 1, "balance", "magnitude"),
    ("mistral", "all", 2, 1, 2, "global", "random"),
    ("mistral", "all", 4, 2, 2, "balance", "random"),
    ("mistral", "KV groups", 4, 1, 2, "unbalance", "magnitude"),
    ("qwen3", "all", 3, 1, 1, "global", "magnitude"),
    ("qwen3", "all", 4, 2, 1, "unbalance", "magnitude"),
    ("qwen3", "layers by score", 4, 2, 2, "balance", "magnitude"),
]


@pytest.mark.parametrize("family, axes, size, tp, pp, prune_type, metric", ORACLE)
def test_the_export_equals_prune_hf_with_the_saved_plan(
    megatron, ranks, tmp_path, family, axes, size, tp, pp, prune_type, metric
):
    source, checkpoint = megatron(family, tie_word_embeddings=family in ("gemma3_text", "qwen2"))
    plan = prune(ranks(size), checkpoint, tmp_path / "cut", tp, pp, prune_type=prune_type, metric=metric, **AXES[axes])
    assert (plan.made_by["tensor_parallel"], plan.made_by["pipeline_parallel"]) == (tp, pp)
    oracle = by_prune_hf(source, tmp_path / "cut.plan.json", tmp_path / "oracle")
    assert_same_model(exported(tmp_path / "cut", tmp_path / "exported"), oracle)
    assert (tmp_path / "cut/release/plan.json").read_text() == (tmp_path / "cut.plan.json").read_text()
    new = json.loads((oracle / "config.json").read_text())
    sizes = {"hidden_size_remain": "hidden_size", "ffn_hidden_size_remain": "intermediate_size"}
    sizes |= {"num_attention_heads_remain": "num_attention_heads", "num_query_groups_remain": "num_key_value_heads"}
    for asked, key in sizes.items():
        if asked in AXES[axes]:
            assert new[key] == AXES[axes][asked]
    assert new["num_hidden_layers"] == (2 if "layers" in axes or axes == "all" else LAYERS)


@pytest.mark.parametrize("axes", ["ffn", "all"])
def test_a_llama_with_as_many_groups_as_heads_and_tied_embeddings_at_tp_4(megatron, ranks, tmp_path, axes):
    source, checkpoint = megatron("llama", tie_word_embeddings=True)
    sizes = {"ffn": {"ffn_hidden_size_remain": 48}, "all": {"hidden_size_remain": 40, "num_attention_heads_remain": 8}}[axes]
    plan = prune(ranks(4), checkpoint, tmp_path / "cut", 4, prune_type="balance", metric="magnitude", **sizes)
    assert plan.new["num_query_groups"] == plan.new["num_attention_heads"]
    oracle = by_prune_hf(source, tmp_path / "cut.plan.json", tmp_path / "oracle")
    assert_same_model(exported(tmp_path / "cut", tmp_path / "exported"), oracle)


@pytest.mark.parametrize("sizes", [{"num_attention_heads_remain": 8}, {"ffn_hidden_size_remain": 48, "hidden_size_remain": 36}])
def test_fewer_kv_groups_than_ranks(megatron, ranks, tmp_path, sizes):
    source, checkpoint = megatron("mistral", num_key_value_heads=2)
    plan = prune(ranks(4), checkpoint, tmp_path / "cut", 4, prune_type="global", metric="magnitude", **sizes)
    alone = prune(ranks(1), checkpoint, tmp_path / "alone", 1, prune_type="global", metric="magnitude", **sizes)
    assert (plan.hidden, plan.layers) == (alone.hidden, alone.layers)
    oracle = by_prune_hf(source, tmp_path / "cut.plan.json", tmp_path / "oracle")
    assert_same_model(exported(tmp_path / "cut", tmp_path / "exported"), oracle)


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_both_formats_and_a_second_pruning_of_the_result(megatron, ranks, tmp_path, ckpt_format):
    source, checkpoint = megatron("qwen3")
    options = {"prune_type": "balance", "metric": "magnitude", "ckpt_format": ckpt_format}
    prune(ranks(3), checkpoint, tmp_path / "one", 3, **options, drop_layers=(0,), ffn_hidden_size_remain=72)
    prune(ranks(3), tmp_path / "one", tmp_path / "two", 3, **options, hidden_size_remain=30, drop_layers=(1,))
    once = by_prune_hf(source, tmp_path / "one.plan.json", tmp_path / "once")
    twice = by_prune_hf(once, tmp_path / "two.plan.json", tmp_path / "twice")
    assert_same_model(exported(tmp_path / "two", tmp_path / "exported"), twice)
    before, after = state_dict(source), state_dict(twice)
    kept = load_plan(tmp_path / "two.plan.json").hidden
    for new, old in ((0, 1), (1, 3)):  # dropping 0, then 1 of what remains, leaves 1 and 3
        norm = "model.layers.{}.input_layernorm.weight"
        assert torch.equal(after[norm.format(new)], before[norm.format(old)][kept])


# -------------------------------------------------------------------------------------------- (b) which units a plan keeps


def dense_scores(source: Path) -> dict[tuple[str, int | None], numpy.ndarray]:
    """L2 norm of all weights of every unit, float64, from the files alone: independent of the package."""
    weights = {name: value.double().numpy() ** 2 for name, value in state_dict(source).items()}
    config = json.loads((source / "config.json").read_text())
    groups = config["num_key_value_heads"]
    n = HEADS // groups
    sums: dict[tuple[str, int | None], numpy.ndarray] = {("hidden", None): 0, ("layer", None): numpy.zeros(LAYERS)}
    for name, w in weights.items():
        if name.startswith("model.layers."):
            sums["layer", None][int(name.split(".")[2])] += w.sum()
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            sums["hidden", None] = sums["hidden", None] + w.sum(1)
        elif w.ndim == 2:
            sums["hidden", None] = sums["hidden", None] + w.sum(0)
        elif name.endswith("norm.weight") and w.size == HIDDEN and "q_norm" not in name and "k_norm" not in name:
            sums["hidden", None] = sums["hidden", None] + w
    for layer in range(LAYERS):
        mlp, attention = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.self_attn."
        gate, up, down = (weights[f"{mlp}{part}_proj.weight"] for part in ("gate", "up", "down"))
        sums["ffn", layer] = gate.sum(1) + up.sum(1) + down.sum(0)
        rows = {
            part: weights[f"{attention}{part}_proj.weight"].sum(1) + weights.get(f"{attention}{part}_proj.bias", 0)
            for part in "qkv"
        }
        head = (rows["q"] + weights[f"{attention}o_proj.weight"].sum(0)).reshape(HEADS, HEAD_DIM).sum(1)
        sums["head", layer] = head
        pairs = (rows["k"] + rows["v"]).reshape(groups, HEAD_DIM).sum(1)
        sums["kv_head", layer] = pairs + head.reshape(groups, n).sum(1)
    return {key: numpy.sqrt(value) for key, value in sums.items()}


def best(scores: numpy.ndarray, keep: int) -> list[int]:
    """The ``keep`` largest, ascending; a tie would make the expectation ambiguous."""
    ordered = numpy.sort(scores)[::-1]
    assert keep == len(scores) or ordered[keep - 1] > ordered[keep] * (1 + 1e-12)
    return sorted(numpy.argsort(-scores)[:keep].tolist())


LAYOUTS = [(1, 1, 1), (2, 2, 1), (3, 3, 1), (2, 1, 2), (4, 2, 2), (4, 1, 2), (4, 1, 1), (4, 2, 1)]


@pytest.mark.parametrize("metric", ["magnitude", "random"])
def test_global_makes_the_same_plan_at_every_tp_pp_and_number_of_copies(megatron, ranks, tmp_path, metric):
    source, checkpoint = megatron("qwen2", tie_word_embeddings=True)
    sizes = {**AXES["all"], "num_query_groups_remain": 6}
    plans = [
        prune(ranks(size), checkpoint, tmp_path / f"{size}{tp}{pp}", tp, pp, prune_type="global", metric=metric, **sizes)
        for size, tp, pp in LAYOUTS
    ]
    prune_hf(
        PruneHfOptions(
            load=str(source),
            save=str(tmp_path / "hf"),
            prune_config_path=_write(tmp_path / "sizes.json", sizes),
            save_plan=str(tmp_path / "hf.json"),
            metric=metric,
        ),
        World(),
    )
    first = load_plan(tmp_path / "hf.json")
    for plan in plans:
        assert (plan.hidden, plan.layers, plan.new, plan.content_id) == (first.hidden, first.layers, first.new, first.content_id)


def _write(path: Path, data: dict) -> str:
    path.write_text(json.dumps(data))
    return str(path)


def test_another_seed_makes_another_random_plan_and_the_same_seed_the_same(megatron, ranks, tmp_path):
    _, checkpoint = megatron("qwen2", tie_word_embeddings=True)
    run = lambda name, seed: prune(ranks(3), checkpoint, tmp_path / name, 3, metric="random", seed=seed, **AXES["all"])
    one, same, other = run("one", 5), run("same", 5), run("other", 6)
    assert one == same
    assert one.hidden != other.hidden and units(one, "ffn") != units(other, "ffn")
    drawn = [entry.ffn for entry in one.layers]
    assert len({tuple(kept) for kept in drawn}) == len(drawn)  # layers do not share a draw


@pytest.mark.parametrize("size, tp, pp", [(3, 3, 1), (4, 2, 2), (2, 2, 1)])
def test_balance_keeps_the_same_number_of_its_own_best_units_on_every_rank(megatron, ranks, tmp_path, size, tp, pp):
    source, checkpoint = megatron("qwen2", tie_word_embeddings=True)
    scores = dense_scores(source)
    groups = 3 if tp == 3 else 4
    sizes = {"ffn_hidden_size_remain": 60, "num_query_groups_remain": groups}
    plan = prune(ranks(size), checkpoint, tmp_path / "cut", tp, pp, prune_type="balance", metric="magnitude", **sizes)
    for entry in plan.layers:
        for axis, kept, count, keep in (("ffn", entry.ffn, FFN, 60), ("kv_head", entry.kv_head, 6, groups)):
            each, mine = count // tp, keep // tp
            expected = [
                rank * each + unit
                for rank in range(tp)
                for unit in best(scores[axis, entry.layer][rank * each : (rank + 1) * each], mine)
            ]
            assert kept == expected
        assert entry.head == [group * 2 + head for group in entry.kv_head for head in range(2)]


@pytest.mark.parametrize(
    "family, size, tp, pp", [("qwen2", 3, 3, 1), ("qwen3", 4, 2, 2), ("mistral", 1, 1, 1), ("qwen3", 4, 1, 1)]
)
@pytest.mark.parametrize("prune_type", ["global", "unbalance"])
def test_global_and_unbalance_keep_the_best_of_all_ranks_on_every_axis(
    megatron, ranks, tmp_path, prune_type, family, size, tp, pp
):
    source, checkpoint = megatron(family, tie_word_embeddings=family == "qwen2")
    scores = dense_scores(source)
    run = lambda name, **sizes: prune(
        ranks(size), checkpoint, tmp_path / name, tp, pp, prune_type=prune_type, metric="magnitude", **sizes
    )
    plan = run("one", hidden_size_remain=36, ffn_hidden_size_remain=66, num_attention_heads_remain=6, num_query_groups_remain=6)
    assert plan.hidden == best(scores["hidden", None], 36)
    for layer, kept in units(plan, "ffn"):
        assert kept == best(scores["ffn", layer], 66)
    for layer, kept in units(plan, "head"):
        heads = scores["head", layer].reshape(6, 2)
        assert kept == [2 * group + int(heads[group].argmax()) for group in range(6)]
    plan = run("two", num_query_groups_remain=6 // tp * tp - tp, num_layers_remain=2)
    assert [entry.layer for entry in plan.layers] == best(scores["layer", None], 2)
    for layer, kept in units(plan, "kv_head"):
        assert kept == best(scores["kv_head", layer], plan.new["num_query_groups"])


# --------------------------------------------------------------- (c) the cut model is the dense one without what was dropped

TOKENS = torch.randint(0, 307, (2, 24), generator=torch.Generator().manual_seed(11))


def masked_logits(source: Path, plan: Plan) -> torch.Tensor:
    """Stock transformers on the dense model: dropped units feed zeros into o_proj and down_proj, dropped layers add nothing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    kept = {entry.layer: entry for entry in plan.layers}
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            heads, channels = torch.zeros(HEADS), torch.zeros(FFN)
            if number in kept:
                entry = kept[number]
                heads[slice(None) if entry.head is None else entry.head] = 1
                channels[slice(None) if entry.ffn is None else entry.ffn] = 1
            layer.self_attn.o_proj.weight *= heads.repeat_interleave(HEAD_DIM)
            layer.mlp.down_proj.weight *= channels
        return model(TOKENS).logits


@pytest.mark.parametrize(
    "family, size, tp, pp, prune_type, run_tp, run_pp",
    [
        ("qwen2", 3, 3, 1, "balance", 3, 1),
        ("qwen3", 2, 2, 1, "global", 1, 2),
        ("mistral", 3, 3, 1, "unbalance", 2, 2),
        ("qwen2", 4, 2, 2, "unbalance", 1, 1),
        ("qwen3", 4, 2, 2, "balance", 2, 2),
    ],
)
@pytest.mark.parametrize("axes", ["heads", "groups", "heads and groups"])
def test_where_no_hidden_unit_is_cut_the_cut_model_is_the_masked_dense_one(
    megatron, ranks, tmp_path, family, size, tp, pp, prune_type, run_tp, run_pp, axes
):
    source, checkpoint = megatron(family, tie_word_embeddings=family == "qwen2")
    groups = 6 if axes == "heads" else 3 if tp == 3 and prune_type == "balance" else 4
    sizes = {"ffn_hidden_size_remain": 60, "num_layers_remain": 2, "num_query_groups_remain": groups}
    if "heads" in axes:
        sizes["num_attention_heads_remain"] = groups
    plan = prune(ranks(size), checkpoint, tmp_path / "cut", tp, pp, prune_type=prune_type, metric="magnitude", **sizes)
    found = ranks(run_tp * run_pp).run(rank_jobs.logits, str(tmp_path / "cut"), TOKENS.tolist(), run_tp, run_pp)[-1]
    expected = masked_logits(source, plan)
    # float32 sums in another order; one head or channel too many or too few moves logits by 0.01 of their deviation or more
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-4 * expected.std()


# -------------------------------------------------------------------------------------------------------- (d) unbalance


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
@pytest.mark.parametrize("metric", ["magnitude", "random"])
def test_unequal_shards_transfer_to_equal_ones_and_export_to_the_same_bytes(megatron, ranks, tmp_path, ckpt_format, metric):
    source, checkpoint = megatron("mistral")
    sizes = {"ffn_hidden_size_remain": 60, "num_query_groups_remain": 4, "hidden_size_remain": 40}
    options = {"prune_type": "unbalance", "metric": metric, "ckpt_format": ckpt_format}
    plan = prune(ranks(3), checkpoint, tmp_path / "cut", 3, **options, **sizes)
    for axis, each in (("ffn", FFN // 3), ("kv_head", 2)):
        counts = [entry.shards[axis] for entry in plan.layers]
        assert any(len(set(count)) > 1 for count in counts)
        for (_, kept), count in zip(units(plan, axis), counts):
            assert count == [sum(rank * each <= unit < (rank + 1) * each for unit in kept) for rank in range(3)]
    oracle = by_prune_hf(source, tmp_path / "cut.plan.json", tmp_path / "oracle")
    assert_same_model(exported(tmp_path / "cut", tmp_path / "direct"), oracle)
    for tp, pp, target in ((1, 1, "torch"), (2, 2, "torch_dist"), (4, 1, "torch")):
        moved = tmp_path / f"tp{tp}"
        options = {"load": str(tmp_path / "cut"), "save": str(moved), "ckpt_format": target}
        options |= {"target_tensor_parallel_size": tp, "target_pipeline_parallel_size": pp}
        transfer(TransferOptions(**options), World())
        assert_same_model(exported(moved, tmp_path / f"exported{tp}"), oracle)


def test_every_rank_file_of_unequal_shards_holds_its_own_units(megatron, ranks, tmp_path):
    from argparse import Namespace

    source, checkpoint = megatron("mistral")
    options = {"prune_type": "unbalance", "metric": "magnitude", "ckpt_format": "torch"}
    plan = prune(ranks(3), checkpoint, tmp_path / "cut", 3, **options, ffn_hidden_size_remain=60, num_query_groups_remain=4)
    dense = state_dict(source)
    for rank in range(3):
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(tmp_path / f"cut/release/mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=True)
        for new, entry in enumerate(plan.layers):
            mine = [unit for unit in entry.ffn if unit // (FFN // 3) == rank]
            prefix = f"model.layers.{entry.layer}.mlp."
            expected = torch.cat([dense[f"{prefix}{part}_proj.weight"][mine] for part in ("gate", "up")])
            assert torch.equal(content["model"][f"decoder.layers.{new}.mlp.linear_fc1.weight"], expected)
            down = dense[f"{prefix}down_proj.weight"][:, mine]
            assert torch.equal(content["model"][f"decoder.layers.{new}.mlp.linear_fc2.weight"], down)
            groups = [group for group in entry.kv_head if group // 2 == rank]
            columns = [g * 2 * HEAD_DIM + i for g in groups for i in range(2 * HEAD_DIM)]
            o = dense[f"model.layers.{entry.layer}.self_attn.o_proj.weight"][:, columns]
            assert torch.equal(content["model"][f"decoder.layers.{new}.self_attention.linear_proj.weight"], o)


# ------------------------------------------------------------------------------------------------------ (e) edited plans


def keep_all(source: Path, *, named: bool) -> Plan:
    """A plan that keeps everything: by the word ``all``, or unit by unit."""
    config = json.loads((source / "config.json").read_text())
    shape = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": HEAD_DIM,
        "vocab_size": config["vocab_size"],
    }
    each = lambda size: list(range(size)) if named else None
    layers = [
        LayerPlan(layer=layer, ffn=each(FFN), kv_head=each(shape["num_query_groups"]), head=each(HEADS))
        for layer in range(LAYERS)
    ]
    return Plan(old=shape, new=shape, hidden=each(HIDDEN), layers=layers)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("size, tp, pp", [(1, 1, 1), (3, 3, 1), (4, 2, 2)])
def test_a_plan_that_keeps_everything_is_the_identity(megatron, ranks, tmp_path, family, size, tp, pp, named):
    source, checkpoint = megatron(family, tie_word_embeddings=family in ("llama", "qwen2"))
    (tmp_path / "all.json").write_text(keep_all(source, named=named).dumps())
    prune(ranks(size), checkpoint, tmp_path / "cut", tp, pp, plan=str(tmp_path / "all.json"))
    back = exported(tmp_path / "cut", tmp_path / "back")
    assert filecmp.cmp(back / "model.safetensors", source / "model.safetensors", shallow=False)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    assert before.items() <= after.items()  # what a pruned model says besides is for transformers 4


def test_a_plan_in_another_order_of_ffn_channels_and_kv_groups_computes_the_same_model(megatron, ranks, tmp_path):
    source, checkpoint = megatron("qwen3")
    plan, generator = keep_all(source, named=True), torch.Generator().manual_seed(1)
    shuffled = lambda count: torch.randperm(count, generator=generator).tolist()
    layers = []
    for entry in plan.layers:
        groups = shuffled(6)
        head = [2 * group + position for group in groups for position in shuffled(2)]
        layers.append(replace(entry, ffn=shuffled(FFN), kv_head=groups, head=head))
    (tmp_path / "edited.json").write_text(replace(plan, layers=layers).dumps())
    prune(ranks(2), checkpoint, tmp_path / "cut", 2, plan=str(tmp_path / "edited.json"))
    assert state_dict(exported(tmp_path / "cut", tmp_path / "back")).keys() == state_dict(source).keys()
    found = ranks(3).run(rank_jobs.logits, str(tmp_path / "cut"), TOKENS.tolist(), 3, 1)[0]
    expected = masked_logits(source, plan)
    assert (torch.from_numpy(found) - expected).abs().max() < 1e-4 * expected.std()
    assert not filecmp.cmp(tmp_path / "back/model.safetensors", source / "model.safetensors", shallow=False)
