"""Budgets dealt out to layers: as good as trying every size of every block, and within all that shapes have to keep to."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.errors import InputError
from megatron_prune.planning.allocators.allocator import ALLOCATORS, Bounds, Depth
from megatron_prune.planning.allocators.free import allocated
from megatron_prune.planning.budget import Budget
from megatron_prune.planning.costs import Costs
from megatron_prune.planning.target import PRUNE_TYPES, Target

AXES = ("ffn", "kv_head", "head")
ATTENTION, MLP = BLOCKS.get("attention"), BLOCKS.get("gated")
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=12,
    ffn_hidden_size=16,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=2,
    vocab_size=40,
    tie_embeddings=True,
)
FOUR = dataclasses.replace(MODEL, num_layers=4)
UNIFORM = Target(config=dataclasses.replace(FOUR, ffn_hidden_size=8), drop_layers=())


def bounds(budget: Budget, config: ModelConfig = MODEL, **changes) -> Bounds:
    kept = {"multiple_of": {"ffn": 4}, "layout": ParallelLayout(), "prune_type": "balance", "check": lambda shape: None}
    return Bounds(config=config, budget=budget, **{**kept, **changes})


def random_costs(seed: int, config: ModelConfig = MODEL) -> Costs:
    """Losses that grow with what is cut, other ones in every layer."""
    draw = np.random.default_rng(seed)
    rows = lambda levels: 2 + np.cumsum(draw.random((config.num_layers, levels)), axis=1)
    alone = {"gated": rows(4), "attention": np.concatenate([rows(3), rows(4)], axis=1)}
    together = {name: 2 + draw.uniform(0.8, 2.0) * (losses - 2).sum(axis=0) for name, losses in alone.items()}
    return Costs(config=config, dense=2.0, alone=alone, together=together)


def loss(costs: Costs, target: Target) -> float:
    config, total = costs.config, 0.0
    for layer in range(config.num_layers):
        units = lambda axis: 0 if layer in target.drop_layers else target.units(axis, layer, config)
        total += costs.of(layer, MLP, {"ffn": units("ffn")})
        total += costs.of(layer, ATTENTION, {"head": units("head"), "kv_head": units("kv_head")})
    return total


def shape(config: ModelConfig, layers: tuple[tuple[int, int, int], ...]) -> ModelConfig:
    """Of layers of (channels, groups, heads); those without any are left out."""
    kept = [number for number, sizes in enumerate(layers) if any(sizes)]
    ffn, groups, heads = (tuple(layers[number][place] for number in kept) for place in range(3))
    sized = config.of_layers(kept)
    return dataclasses.replace(sized, ffn_hidden_size=ffn, num_query_groups=groups, num_attention_heads=heads)


EVERY = [(ffn, groups, groups * each) for ffn in (16, 12, 8, 4, 0) for groups, each in [*product((4, 3, 2, 1), (2, 1)), (0, 0)]]
"""Every (channels, groups, heads) that a layer of ``MODEL`` can keep in steps of 4 channels."""


def stored(ffn: int, groups: int, heads: int) -> int:
    """Parameters of a layer of ``MODEL``: 12 channels of the stream, heads of 2."""
    return (12 + 3 * 12 * ffn if ffn else 0) + (12 + 2 * 12 * 2 * (heads + groups) if groups else 0)


@given(st.integers(0, 10**6), st.integers(500, 3500))
@settings(max_examples=20)
def test_no_shape_within_the_budget_is_expected_to_lose_less(seed, params):
    costs = random_costs(seed)
    found = allocated(bounds(Budget(params=params)), costs, AXES, may_go=True)
    cost = lambda layer, ffn, groups, heads: sum(
        [costs.of(layer, MLP, {"ffn": ffn}), costs.of(layer, ATTENTION, {"head": heads, "kv_head": groups})]
    )
    first, second = (np.array([cost(layer, *sizes) for sizes in EVERY]) for layer in range(2))
    each = np.array([stored(*sizes) for sizes in EVERY])
    counts = 40 * 12 + 12 + each[:, None] + each
    within = (counts <= params) & (each[:, None] + each > 0)
    if not within.any():
        assert found is None
    else:
        assert parameter_count(found.config) <= params
        assert loss(costs, found) == pytest.approx((first[:, None] + second)[within].min(), abs=1e-9)


@pytest.mark.parametrize("axes, may_go", [(("ffn",), False), (("ffn",), True), (AXES, False)])
@given(seed=st.integers(0, 10**6), ratio=st.floats(0.1, 0.4))
@settings(max_examples=10)
def test_what_is_not_to_be_cut_stays_whole(axes, may_go, seed, ratio):
    found = allocated(bounds(Budget(ratio=ratio), FOUR), random_costs(seed, FOUR), axes, may_go=may_go)
    if found is None:
        return
    for (axis, layer), units in found.by_layer.items():
        assert units == FOUR.units(axis) or (axis in axes and units) or (may_go and units == 0)
    if not may_go:
        assert found.config.num_layers == 4


@given(st.integers(0, 10**6), st.floats(0.15, 0.45), st.sampled_from([1, 2, 4]), st.sampled_from(PRUNE_TYPES))
@settings(max_examples=10)
def test_ranks_can_share_every_layer(seed, ratio, ranks, prune_type):
    layout = ParallelLayout(tensor=ranks, pipeline=2)
    kept = bounds(Budget(ratio=ratio), FOUR, multiple_of={"ffn": 2}, layout=layout, prune_type=prune_type)
    for target in targets(kept, random_costs(seed, FOUR)):
        config = target.config
        assert config.num_layers == 4 and parameter_count(config) <= kept.budget.limit(FOUR)
        for layer in range(4):
            sizes = [config.of_layer(layer).units(axis) for axis in AXES]
            assert sizes[0] % 2 == 0 and sizes[0]
            if prune_type == "balance":
                assert all(size % ranks == 0 for size in sizes)
            if prune_type == "global":
                assert sizes[0] % ranks == 0 and sizes[2] % ranks == 0


def targets(kept: Bounds, costs: Costs) -> list[Target]:
    """Those of the free allocator alone; none where it has none."""
    try:
        return ALLOCATORS.get("free").targets(kept, costs, [])
    except InputError as error:
        assert "no sizes by layer meet the budget" in str(error)
        return []


@given(st.integers(0, 10**6), st.floats(0.1, 0.45))
@settings(max_examples=10)
def test_limits_hold_where_a_block_stays(seed, ratio):
    kept = bounds(Budget(ratio=ratio), FOUR, least=0.5, most=0.75)
    for target in targets(kept, random_costs(seed, FOUR)):
        for (axis, layer), units in target.by_layer.items():
            assert units in (0, FOUR.units(axis)) or 0.5 <= units / FOUR.units(axis) <= 0.75


def test_limits_hold_for_shapes_whose_layers_are_alike():
    sizes = ((16, 8, 4), (14, 8, 4), (8, 8, 4), (16, 8, 2), (12, 4, 4))  # channels, query heads, groups: of 16, 8, 4
    named = [dict(zip(("ffn_hidden_size", "num_attention_heads", "num_query_groups"), size)) for size in sizes]
    shapes = [dataclasses.replace(FOUR, **size) for size in named]
    held = bounds(Budget(ratio=0.3), FOUR, least=0.6, most=0.8)
    assert ALLOCATORS.get("free").alike(held, shapes) == (shapes[0],)
    held = bounds(Budget(ratio=0.3), FOUR, least=0.5, most=0.8)
    assert ALLOCATORS.get("free").alike(held, shapes) == (shapes[0], *shapes[2:])
    assert ALLOCATORS.get("uniform").alike(held, shapes) == tuple(shapes)


@given(st.integers(0, 10**6), st.integers(5000, 9000))
@settings(max_examples=10)
def test_memory_counts_what_every_layer_caches(seed, memory):
    budget = Budget(memory=memory, seq_length=20, batch=3)
    for target in targets(bounds(budget, FOUR), random_costs(seed, FOUR)):
        groups = sum(target.config.of_layer(layer).units("kv_head") for layer in range(target.config.num_layers))
        assert 2 * (parameter_count(target.config) + 2 * groups * 2 * 20 * 3) <= memory


def test_a_smaller_cache_is_worth_more_where_sequences_are_long():
    costs, share = random_costs(3, FOUR), 0.6
    groups = []
    for length in (1, 4000):
        budget = Budget(memory=round(share * Budget(memory=1, seq_length=length).cost(FOUR)), seq_length=length)
        found = allocated(bounds(budget, FOUR), costs, AXES, may_go=True)
        groups.append(sum(found.config.of_layer(layer).units("kv_head") for layer in range(found.config.num_layers)))
    assert groups[1] < groups[0]


def test_every_candidate_stands_once_and_uniform_shapes_stand_last():
    uniform = [UNIFORM]
    kept, costs = bounds(Budget(ratio=0.3), FOUR), random_costs(1, FOUR)
    found = ALLOCATORS.get("free").targets(kept, costs, uniform)
    assert found[-1] is uniform[0] and 2 <= len(found) <= 5
    assert len({frozenset(target.by_layer.items()) for target in found}) == len(found)
    assert ALLOCATORS.get("uniform").targets(kept, None, uniform) == uniform


@given(st.integers(0, 10**6), st.floats(0.2, 0.5), st.lists(st.floats(0, 1.5), min_size=3, max_size=3))
@settings(max_examples=10)
def test_the_block_of_layers_that_goes_first_is_the_one_by_which_least_is_lost(seed, ratio, losses):
    """Without it the budget is dealt out as in a model that never had these layers."""
    kept, costs = bounds(Budget(params=round((1 - ratio) * parameter_count(FOUR))), FOUR), random_costs(seed, FOUR)
    costs = dataclasses.replace(
        costs, together={name: np.full(len(each), 2.0) for name, each in costs.together.items()}
    )  # unscaled
    depths = [Depth(layers, loss) for layers, loss in zip([(1,), (1, 2), (0, 1, 2)], losses)]
    expected = {}
    for layers, added in depths:
        stay = [layer for layer in range(4) if layer not in layers]
        alone = {name: rows[stay] for name, rows in costs.alone.items()}
        fewer = dataclasses.replace(costs, config=FOUR.of_layers(stay), alone=alone)
        found = allocated(dataclasses.replace(kept, config=fewer.config), fewer, AXES, may_go=False)
        expected |= {layers: added + loss(fewer, dataclasses.replace(found, drop_layers=()))} if found else {}
    nothing = ((MLP, {"ffn": 0}), (ATTENTION, {"head": 0, "kv_head": 0}))
    lost = []
    for target in ALLOCATORS.get("free").targets(kept, costs, [UNIFORM], depths)[:-1]:
        if target.drop_layers in dict(depths) and all(target.by_layer.values()):
            left_out = sum(costs.of(layer, kind, sizes) for layer in target.drop_layers for kind, sizes in nothing)
            lost.append(dict(depths)[target.drop_layers] + loss(costs, target) - left_out)
    assert bool(lost) == bool(expected)
    assert not lost or min(lost) == pytest.approx(min(expected.values()), abs=1e-9)


def test_a_candidate_that_the_class_cannot_say_is_left_out():
    def check(shape: ModelConfig) -> None:
        if "num_attention_heads" in shape.differing:
            raise InputError("query heads differ")

    kept, costs = bounds(Budget(ratio=0.3), FOUR, check=check), random_costs(1, FOUR)
    assert all("num_attention_heads" not in target.config.differing for target in targets(kept, costs))
    assert targets(kept, costs)
    refuse = dataclasses.replace(kept, check=lambda shape: check(FOUR.of_layers([0])) or (_ for _ in ()).throw(InputError("no")))
    assert targets(refuse, costs) == []


def test_the_smallest_sizes_are_more_than_the_budget():
    kept = bounds(Budget(params=490), FOUR, least=0.9)
    with pytest.raises(InputError, match="no sizes by layer meet the budget\\s+got: at most 490 parameters"):
        ALLOCATORS.get("free").targets(kept, random_costs(0, FOUR), [])


def test_layers_that_differ_already_are_dealt_out_too():
    narrow = shape(FOUR, ((16, 4, 8), (8, 2, 4), (12, 0, 0), (0, 3, 3)))
    costs = random_costs(5, narrow)
    found = allocated(bounds(Budget(ratio=0.2), narrow), costs, AXES, may_go=True)
    assert parameter_count(found.config) <= 0.8 * parameter_count(narrow)
    for (axis, layer), units in found.by_layer.items():
        assert units <= narrow.of_layer(layer).units(axis)


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_an_allocator_says_whether_it_measures_and_gives_shapes_within_the_budget(name):
    allocator, kept = ALLOCATORS.get(name), bounds(Budget(ratio=0.3), FOUR)
    small = dataclasses.replace(FOUR, ffn_hidden_size=4, num_query_groups=2, num_attention_heads=4)
    uniform = [Target(config=small, drop_layers=())]
    found = allocator.targets(kept, random_costs(2, FOUR) if allocator.measures_costs else None, uniform)
    assert found and all(parameter_count(target.config) <= 0.7 * parameter_count(FOUR) for target in found)
