"""From scores to units: what every prune type keeps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from dense import SMALL
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.planning.check import check_plan
from megatron_prune.planning.make import make_plan
from megatron_prune.planning.selection import best, keep_heads, keep_units, shard_counts
from megatron_prune.planning.target import needed_scores, resolve_target

SCORES = st.lists(st.integers(0, 5), min_size=1, max_size=24).map(lambda values: torch.tensor(values, dtype=torch.float64))


def top(scores: torch.Tensor, keep: int, ids=None) -> list[int]:
    """Plain top-k by numpy: by falling score, then by rising id."""
    ids = np.arange(len(scores)) if ids is None else np.array(ids)
    order = np.lexsort((ids, -scores.numpy()[ids]))
    return sorted(ids[order[:keep]].tolist())


@given(SCORES, st.data())
def test_the_best_are_the_plain_top_k_and_ties_go_to_the_lower_id(scores, data):
    keep = data.draw(st.integers(0, len(scores)))
    assert best(scores, keep) == top(scores, keep)


def test_among_equal_scores_the_lower_ids_stay():
    assert best(torch.ones(5000, dtype=torch.float64), 3) == [0, 1, 2]
    assert best(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3) == [0, 1, 3]


@st.composite
def ffn_cases(draw):
    """(configuration, scores with ties, ranks, kept channels of each rank)."""
    ranks, local = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    values = draw(st.lists(st.integers(0, 5), min_size=ranks * local, max_size=ranks * local))
    config = dataclasses.replace(SMALL, ffn_hidden_size=ranks * local)
    return config, torch.tensor(values, dtype=torch.float64), ranks, draw(st.integers(1, local))


@given(ffn_cases())
def test_balance_keeps_the_same_number_on_every_rank_and_the_best_of_each(case):
    config, scores, ranks, each = case
    local = config.ffn_hidden_size // ranks
    kept = keep_units("ffn", scores, each * ranks, config, ranks, "balance")
    assert kept == [u for rank in range(ranks) for u in top(scores, each, range(rank * local, (rank + 1) * local))]


@pytest.mark.parametrize("prune_type", ["global", "unbalance"])
@given(ffn_cases())
def test_global_and_unbalance_keep_the_plain_top_k_at_every_number_of_ranks(prune_type, case):
    config, scores, ranks, each = case
    for number in (1, ranks):
        assert keep_units("ffn", scores, each * ranks, config, number, prune_type) == top(scores, each * ranks)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.data())
def test_balance_keeps_whole_kv_groups_of_every_rank(ranks, local, n, data):
    config = dataclasses.replace(SMALL, num_query_groups=ranks * local, num_attention_heads=ranks * local * n)
    scores = torch.tensor(
        data.draw(st.lists(st.integers(0, 4), min_size=ranks * local, max_size=ranks * local)), dtype=torch.float64
    )
    each = data.draw(st.integers(1, local))
    kept = keep_units("kv_head", scores, each * ranks, config, ranks, "balance")
    assert kept == [u for rank in range(ranks) for u in top(scores, each, range(rank * local, (rank + 1) * local))]


@pytest.mark.parametrize("axis", ["hidden", "layer"])
@pytest.mark.parametrize("prune_type", ["balance", "global", "unbalance"])
def test_units_that_every_rank_holds_are_chosen_alike_by_all_prune_types(axis, prune_type):
    scores = torch.randn(20, dtype=torch.float64)
    assert keep_units(axis, scores, 5, SMALL, 3, prune_type) == top(scores, 5)


@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_heads_are_the_best_of_every_kept_group(groups, n, data):
    config = dataclasses.replace(SMALL, num_query_groups=groups, num_attention_heads=groups * n)
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=groups * n, max_size=groups * n)), dtype=torch.float64)
    kept = data.draw(st.permutations(range(groups)))[: data.draw(st.integers(1, groups))]
    each = data.draw(st.integers(1, n))
    expected = [head for g in kept for head in top(scores, each, range(g * n, (g + 1) * n))]
    assert keep_heads(scores, kept, each, config) == expected


@given(ffn_cases())
def test_unbalance_counts_what_every_rank_held_before(case):
    config, scores, ranks, each = case
    local = config.ffn_hidden_size // ranks
    kept = top(scores, each * ranks)
    expected = np.histogram(kept, bins=ranks, range=(0, config.ffn_hidden_size))[0] if local else []
    assert shard_counts("ffn", kept, config, ranks) == list(expected)


# ------------------------------------------------------------------------------------------------------ whole plans


def scores_for(target, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = {"hidden": 20, "layer": 4, "ffn": 24, "kv_head": 6, "head": 12}
    return {key: torch.rand(count[key[0]], dtype=torch.float64, generator=generator) for key in needed_scores(SMALL, target)}


def plan_for(prune_type, ranks, **sizes):
    target = resolve_target(SMALL, **sizes)
    plan = make_plan(SMALL, target, scores_for(target), prune_type=prune_type, ranks=ranks, made_by={}, content_id="id")
    check_plan(plan, SMALL, "the plan")
    return plan, scores_for(target)


SIZES = dict(hidden_size=10, ffn_hidden_size=12, num_attention_heads=3, num_query_groups=3, num_layers=2)


@pytest.mark.parametrize(
    "prune_type, ranks", [("balance", 1), ("balance", 3), ("global", 1), ("global", 3), ("unbalance", 2), ("unbalance", 6)]
)
def test_a_plan_keeps_the_best_by_every_score_and_fits_the_model(prune_type, ranks):
    plan, scores = plan_for(prune_type, ranks, **SIZES)
    assert plan.hidden == top(scores["hidden", None], 10)
    assert [entry.layer for entry in plan.layers] == top(scores["layer", None], 2)
    for entry in plan.layers:
        ffn, group = scores["ffn", entry.layer], scores["kv_head", entry.layer]
        if prune_type == "balance":
            cut = lambda s, count: [
                u for r in range(ranks) for u in top(s, count // ranks, range(r * len(s) // ranks, (r + 1) * len(s) // ranks))
            ]
        else:
            cut = top
        assert (entry.ffn, entry.kv_head) == (cut(ffn, 12), cut(group, 3))
        assert entry.head == [top(scores["head", entry.layer], 1, [2 * g, 2 * g + 1])[0] for g in entry.kv_head]


def test_a_global_plan_does_not_depend_on_the_number_of_ranks():
    assert len({plan_for("global", ranks, **SIZES)[0].dumps() for ranks in (1, 2, 3, 6)}) == 1


def test_unbalance_records_every_ranks_share_and_the_others_record_none():
    plan, _ = plan_for("unbalance", 3, **SIZES)
    for entry in plan.layers:
        assert entry.shards["ffn"] == [sum(r * 8 <= u < (r + 1) * 8 for u in entry.ffn) for r in range(3)]
        assert entry.shards["kv_head"] == [sum(r * 2 <= g < (r + 1) * 2 for g in entry.kv_head) for r in range(3)]
    for other in ("balance", "global"):
        assert plan_for(other, 3, **SIZES)[0].shard_sizes() == {}


def test_whole_groups_take_all_their_query_heads_along():
    plan, _ = plan_for("global", 1, num_query_groups=2)
    for entry in plan.layers:
        assert entry.head == [head for g in entry.kv_head for head in (2 * g, 2 * g + 1)]


def test_axes_that_do_not_change_are_kept_whole_and_need_no_scores():
    target = resolve_target(SMALL, ffn_hidden_size=6, drop_layers=(1,))
    assert needed_scores(SMALL, target) == [("ffn", 0), ("ffn", 2), ("ffn", 3)]
    plan, _ = plan_for("balance", 2, ffn_hidden_size=6, drop_layers=(1,))
    assert plan.hidden is None and [(e.layer, e.kv_head, e.head) for e in plan.layers] == [(n, None, None) for n in (0, 2, 3)]
