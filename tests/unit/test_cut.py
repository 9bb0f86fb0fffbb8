"""Cutting equals plain indexing, and what is cut is what is stored on every rank."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from dense import SMALL, assert_same_model, fused_model, labelled_model, random_model, rank_part, raw_map, read_all, role_shapes
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import TensorId
from megatron_prune.checkpoint import legacy, torch_dist
from megatron_prune.checkpoint.megatron_args import megatron_args
from megatron_prune.checkpoint.stream import stream
from megatron_prune.files.region import Scratch
from megatron_prune.planning.check import check_plan
from megatron_prune.planning.plan import LayerPlan, Plan, shape_of
from megatron_prune.surgery.cut import Cut

ALL = None


def plan_of(layers: list[LayerPlan], hidden: list[int] | None, **new: int) -> Plan:
    plan = Plan(old=shape_of(SMALL), new={**shape_of(SMALL), **new, "num_layers": len(layers)}, hidden=hidden, layers=layers)
    check_plan(plan, SMALL, "the plan")
    return plan


@st.composite
def plans(draw) -> Plan:
    """Any plan that fits :data:`SMALL`, units in any order."""
    pick = lambda count, keep: draw(st.permutations(range(count)))[:keep]
    hidden, ffn = draw(st.integers(1, 20)), draw(st.integers(1, 24))
    groups, each = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    layers = []
    for layer in sorted(pick(4, draw(st.integers(1, 4)))):
        kv = pick(6, groups)
        heads = [2 * g + position for g in kv for position in pick(2, each)]
        layers.append(LayerPlan(layer=layer, ffn=pick(24, ffn), kv_head=kv, head=heads))
    sizes = dict(hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=groups * each, num_query_groups=groups)
    return plan_of(layers, pick(20, hidden), **sizes)


def indexed(plan: Plan, model: dict[TensorId, torch.Tensor]) -> dict[TensorId, torch.Tensor]:
    """The plan carried out with numpy's fancy indexing, role by role."""
    d, everything = SMALL.kv_channels, {"hidden": range(20), "ffn": range(24), "head": range(12), "kv_head": range(6)}
    units = lambda axis, kept: np.array(list(everything[axis] if kept is None else kept))
    rows = lambda heads: np.array([head * d + position for head in heads for position in range(d)])
    h = units("hidden", plan.hidden)
    result = {}
    for role in ("embedding", "output"):
        result[TensorId(role)] = model[TensorId(role)].numpy()[:, h]
    result[TensorId("final_norm")] = model[TensorId("final_norm")].numpy()[h]
    for new, entry in enumerate(plan.layers):
        at = lambda role: model[TensorId(role, entry.layer)].numpy()
        f, q, kv = units("ffn", entry.ffn), rows(units("head", entry.head)), rows(units("kv_head", entry.kv_head))
        cut = {"q": at("q")[np.ix_(q, h)], "o": at("o")[np.ix_(h, q)], "q_bias": at("q_bias")[q]}
        cut |= {role: at(role)[np.ix_(kv, h)] for role in ("k", "v")} | {role: at(role)[kv] for role in ("k_bias", "v_bias")}
        cut |= {role: at(role)[np.ix_(f, h)] for role in ("gate", "up")} | {"down": at("down")[np.ix_(h, f)]}
        cut |= {role: at(role)[h] for role in ("input_norm", "post_norm")} | {role: at(role) for role in ("q_norm", "k_norm")}
        result |= {TensorId(role, new): data for role, data in cut.items()}
    return {tensor: torch.from_numpy(np.ascontiguousarray(data)) for tensor, data in result.items()}


def carried_out(plan: Plan, model: dict[TensorId, torch.Tensor]) -> dict[TensorId, torch.Tensor]:
    cut, scratch = Cut(plan, SMALL), Scratch()
    return {t: cut.transform(t, model[cut.origin(t)], scratch).clone() for t in role_shapes(cut.config)}


@given(plans())
def test_every_tensor_equals_fancy_indexing(plan):
    model = labelled_model(SMALL)
    result = carried_out(plan, model)
    assert_same_model(result, indexed(plan, model))
    assert {tensor: tuple(data.shape) for tensor, data in result.items()} == role_shapes(Cut(plan, SMALL).config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "entry",
    [
        lambda n: LayerPlan(layer=n),
        lambda n: LayerPlan(layer=n, ffn=list(range(24)), kv_head=list(range(6)), head=list(range(12))),
    ],
)
def test_a_plan_that_keeps_all_changes_no_bit(dtype, entry):
    model = random_model(SMALL, dtype)
    for hidden in (None, list(range(20))):
        plan = plan_of([entry(n) for n in range(4)], hidden)
        assert Cut(plan, SMALL).config == SMALL
        assert_same_model(carried_out(plan, model), model)


@pytest.mark.parametrize("axis", ["hidden", "ffn", "head", "kv_head", "layer"])
def test_cutting_one_axis_leaves_the_others_whole(axis):
    model = labelled_model(SMALL)
    hidden, sizes, layers = None, {}, range(4)
    entry = lambda n: LayerPlan(layer=n)
    if axis == "hidden":
        hidden, sizes = [3, 1], {"hidden_size": 2}
    elif axis == "ffn":
        entry, sizes = lambda n: LayerPlan(layer=n, ffn=[20, n]), {"ffn_hidden_size": 2}
    elif axis == "head":
        entry, sizes = lambda n: LayerPlan(layer=n, head=[1, 2, 5, 7, 8, 10]), {"num_attention_heads": 6}
    elif axis == "kv_head":
        entry = lambda n: LayerPlan(layer=n, kv_head=[5, n], head=[10, 11, 2 * n, 2 * n + 1])
        sizes = {"num_query_groups": 2, "num_attention_heads": 4}
    else:
        layers = [0, 3]
    plan = plan_of([entry(n) for n in layers], hidden, **sizes)
    result = carried_out(plan, model)
    assert_same_model(result, indexed(plan, model))
    untouched = [t for t in result if result[t].shape == model[Cut(plan, SMALL).origin(t)].shape]
    assert all(torch.equal(result[t], model[Cut(plan, SMALL).origin(t)]) for t in untouched)
    assert len(untouched) >= (3 if axis == "layer" else 4)


def test_layers_that_stay_keep_their_own_weights_under_their_new_number():
    plan = plan_of([LayerPlan(layer=1), LayerPlan(layer=3)], None)
    cut = Cut(plan, SMALL)
    assert [cut.origin(TensorId("q", n)) for n in (0, 1)] == [TensorId("q", 1), TensorId("q", 3)]
    assert cut.origin(TensorId("embedding")) == TensorId("embedding")


# ------------------------------------------------------------------------------------------------- split, cut and merge

ROOMS = {"torch": legacy, "torch_dist": torch_dist}


def stored(room, path, config, layout, sizes=None):
    """An empty checkpoint of a format and its map."""
    path.mkdir()
    dtypes = {tensor: torch.float32 for tensor in role_shapes(config)}
    room.lay_out(path, config, layout, dtypes, megatron_args(config, layout, torch.float32, None), sizes or {})
    return room.open_map(path, config, layout)


@pytest.mark.parametrize("ckpt_format", ROOMS)
@pytest.mark.parametrize("before, after", [(1, 3), (3, 1), (2, 6), (12, 2)])
def test_every_labelled_row_and_column_arrives_where_the_plan_says(tmp_path, ckpt_format, before, after):
    """Every element has its own number; it goes through a split over ranks, the cut and a merge."""
    model, room = labelled_model(SMALL), ROOMS[ckpt_format]
    entry = lambda n: LayerPlan(
        layer=n, ffn=[(5 * i + n) % 24 for i in range(12)], kv_head=[4, n, 5], head=[9, 8, 2 * n, 2 * n + 1, 10, 11]
    )
    if after in (2, 6):
        entry = lambda n: LayerPlan(layer=n, ffn=[(5 * i + n) % 24 for i in range(12)])
        plan = plan_of([entry(0), entry(2)], [19, 0, 7], hidden_size=3, ffn_hidden_size=12)
    else:
        plan = plan_of(
            [entry(0), entry(2)], [19, 0, 7], hidden_size=3, ffn_hidden_size=12, num_query_groups=3, num_attention_heads=6
        )
    split = stored(room, tmp_path / "split", SMALL, ParallelLayout(tensor=before, pipeline=2))
    stream(raw_map(tmp_path / "raw", SMALL, model), split)
    assert_same_model(read_all(split), model)
    cut = Cut(plan, SMALL)
    small = stored(room, tmp_path / "small", cut.config, ParallelLayout(tensor=after, vocab_divisible_by=8))
    stream(split, small, origin=cut.origin, transform=cut.transform)
    expected = indexed(plan, model)
    assert_same_model(read_all(small), expected)
    if ckpt_format == "torch":
        full = fused_model(cut.config, expected, -(-29 // (8 * after)) * 8 * after)
        for rank in range(after):
            held = torch.load(tmp_path / f"small/mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=False)["model"]
            for (name, layer), data in full.items():
                key = name if layer is None else f"decoder.layers.{layer}.{name}"
                assert torch.equal(held[key], rank_part(name, data, after, rank)), key


@pytest.mark.parametrize("ckpt_format", ROOMS)
def test_shards_of_unequal_size_hold_what_the_plan_deals_to_every_rank(tmp_path, ckpt_format):
    model, room, layout = labelled_model(SMALL), ROOMS[ckpt_format], ParallelLayout(tensor=3, vocab_divisible_by=1)
    layers = [
        LayerPlan(
            layer=0,
            ffn=[1, 2, 9, 20, 21],
            kv_head=[0, 1, 5],
            head=[0, 1, 2, 3, 10, 11],
            shards={"ffn": [2, 1, 2], "kv_head": [2, 0, 1]},
        ),
        LayerPlan(
            layer=3,
            ffn=[8, 9, 10, 11, 12],
            kv_head=[2, 3, 4],
            head=[4, 5, 6, 7, 8, 9],
            shards={"ffn": [0, 5, 0], "kv_head": [0, 2, 1]},
        ),
    ]
    plan = plan_of(layers, None, ffn_hidden_size=5, num_query_groups=3, num_attention_heads=6)
    cut = Cut(plan, SMALL)
    target = stored(room, tmp_path / "uneven", cut.config, layout, plan.shard_sizes())
    stream(raw_map(tmp_path / "raw", SMALL, model), target, origin=cut.origin, transform=cut.transform)
    expected = indexed(plan, model)
    assert_same_model(read_all(target), expected)
    if ckpt_format == "torch":
        full = fused_model(cut.config, expected, 30)
        for rank in range(3):
            held = torch.load(tmp_path / f"uneven/mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=False)["model"]
            for layer, entry in enumerate(layers):
                groups, ffn = np.cumsum([0, *entry.shards["kv_head"]]), np.cumsum([0, *entry.shards["ffn"]])
                g, f = slice(groups[rank], groups[rank + 1]), slice(ffn[rank], ffn[rank + 1])
                at = lambda name: held[f"decoder.layers.{layer}.{name}"]
                dense = lambda name: full[name, layer]
                qkv = dense("self_attention.linear_qkv.weight").view(3, 8, 20)[g].reshape(-1, 20)
                assert torch.equal(at("self_attention.linear_qkv.weight"), qkv)
                assert torch.equal(
                    at("self_attention.linear_proj.weight"),
                    dense("self_attention.linear_proj.weight").view(20, 3, 4)[:, g].reshape(20, -1),
                )
                assert torch.equal(
                    at("mlp.linear_fc1.weight"), dense("mlp.linear_fc1.weight").view(2, 5, 20)[:, f].reshape(-1, 20)
                )
                assert torch.equal(at("mlp.linear_fc2.weight"), dense("mlp.linear_fc2.weight")[:, f])


def test_a_tied_model_is_cut_without_an_output_layer():
    config = dataclasses.replace(SMALL, tie_embeddings=True)
    plan = Plan(
        old=shape_of(config),
        new={**shape_of(config), "hidden_size": 2},
        hidden=[4, 1],
        layers=[LayerPlan(layer=n) for n in range(4)],
    )
    cut, model = Cut(plan, config), labelled_model(config)
    assert TensorId("output") not in role_shapes(cut.config)
    assert torch.equal(
        cut.transform(TensorId("embedding"), model[TensorId("embedding")], Scratch()), model[TensorId("embedding")][:, [4, 1]]
    )
