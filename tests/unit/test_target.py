"""Requests for a shape: completed, or refused with the values that are legal."""

from __future__ import annotations

import dataclasses

import pytest
from dense import SMALL
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.errors import InputError
from megatron_prune.planning.make import make_plan
from megatron_prune.planning.target import check_parallel, needed_scores, resolve_target

KEYS = ["hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_layers"]


def shape(heads: int, groups: int):
    return dataclasses.replace(SMALL, num_attention_heads=heads, num_query_groups=groups)


def test_nothing_asked_for_is_the_model_itself():
    target = resolve_target(SMALL)
    assert (target.config, target.drop_layers) == (SMALL, ())


@given(st.integers(1, 20), st.integers(1, 24), st.integers(1, 4))
def test_sizes_that_are_asked_for_are_the_sizes_that_come(hidden, ffn, layers):
    target = resolve_target(SMALL, hidden_size=hidden, ffn_hidden_size=ffn, num_layers=layers)
    assert target.config == dataclasses.replace(SMALL, hidden_size=hidden, ffn_hidden_size=ffn, num_layers=layers)
    assert target.drop_layers == (() if layers == 4 else None)


@pytest.mark.parametrize(
    "heads, groups, expected",
    [
        (6, None, (6, 6)),
        (12, None, (12, 6)),
        (8, None, (8, 4)),
        (2, None, (2, 1)),
        (None, 2, (4, 2)),
        (3, 3, (3, 3)),
        (6, 3, (6, 3)),
    ],
)
def test_heads_and_groups_complete_each_other(heads, groups, expected):
    target = resolve_target(SMALL, num_attention_heads=heads, num_query_groups=groups)
    assert (target.config.num_attention_heads, target.config.num_query_groups) == expected


@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_heads_and_groups_together_are_accepted_exactly_if_every_kept_group_can_keep_the_same_number(n, g, data):
    config = shape(n * g, g)
    heads, groups = data.draw(st.integers(1, n * g)), data.draw(st.integers(1, g))
    if heads % groups == 0 and heads // groups <= n:
        new = resolve_target(config, num_attention_heads=heads, num_query_groups=groups).config
        assert (new.num_attention_heads, new.num_query_groups) == (heads, groups)
    else:
        with pytest.raises(InputError) as error:
            resolve_target(config, num_attention_heads=heads, num_query_groups=groups)
        assert str([groups * each for each in range(1, n + 1)]) in str(error.value)


@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_heads_alone_are_cut_inside_every_group_else_by_whole_groups_else_refused(n, g, data):
    config = shape(n * g, g)
    heads = data.draw(st.integers(1, n * g))
    if heads % g == 0:
        expected = g
    elif heads % n == 0:
        expected = heads // n
    else:
        legal = [h for h in range(1, n * g + 1) if h % g == 0 or h % n == 0]
        with pytest.raises(InputError) as error:
            resolve_target(config, num_attention_heads=heads)
        assert str(legal) in str(error.value)
        return
    new = resolve_target(config, num_attention_heads=heads).config
    assert (new.num_attention_heads, new.num_query_groups) == (heads, expected)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_that_are_not_positive_are_refused_by_name(key, value):
    with pytest.raises(InputError, match=f"{key}_remain {value} is not a positive number"):
        resolve_target(SMALL, **{key: value})


@pytest.mark.parametrize("key", KEYS)
def test_sizes_larger_than_the_models_are_refused_by_name(key):
    largest = getattr(SMALL, key)
    with pytest.raises(InputError, match=f"{key}_remain {largest + 1} is larger than the model's {largest}"):
        resolve_target(SMALL, **{key: largest + 1})


@pytest.mark.parametrize(
    "drop, remain, word",
    [
        ((4,), None, "names layer 4, needed 0 to 3"),
        ((-1,), None, "names layer -1"),
        ((1, 1), None, "layer 1 twice"),
        ((0, 1, 2, 3), None, "leaves no layer"),
        ((1,), 2, "num_layers_remain 2 and drop_layers, which leaves 3, disagree"),
        ((1,), 4, "disagree"),
    ],
)
def test_layers_that_cannot_be_dropped_are_refused(drop, remain, word):
    with pytest.raises(InputError, match=word):
        resolve_target(SMALL, drop_layers=drop, num_layers=remain)


@pytest.mark.parametrize("remain", [None, 2])
def test_named_layers_are_dropped_in_any_order(remain):
    target = resolve_target(SMALL, drop_layers=(3, 0), num_layers=remain)
    assert (target.config.num_layers, target.drop_layers) == (2, (0, 3))


def test_an_empty_list_of_layers_beside_a_number_of_layers_is_refused_or_lets_the_metric_choose():
    """``drop_layers: []`` in a JSON file, beside ``num_layers_remain: 3``."""
    import torch

    try:
        target = resolve_target(SMALL, drop_layers=(), num_layers=3)
    except InputError:
        return
    scores = {key: torch.arange(4.0) for key in needed_scores(SMALL, target)}
    plan = make_plan(SMALL, target, scores, prune_type="global", ranks=1, made_by={}, content_id=None)
    assert len(plan.layers) == plan.new["num_layers"] == 3


def test_all_problems_are_told_at_once():
    with pytest.raises(InputError) as error:
        resolve_target(SMALL, hidden_size=0, ffn_hidden_size=999, drop_layers=(9,))
    assert all(part in str(error.value) for part in ("hidden_size_remain 0", "ffn_hidden_size_remain 999", "layer 9"))


# --------------------------------------------------------------------------------------------- under a parallel layout


def check(new, prune_type, tensor=1, pipeline=1, old=SMALL):
    check_parallel(old, new, ParallelLayout(tensor=tensor, pipeline=pipeline), prune_type)


@pytest.mark.parametrize("prune_type", ["balance", "global", "unbalance"])
@given(st.sampled_from([1, 2, 3, 6]), st.integers(1, 6), st.integers(1, 2), st.integers(1, 24))
def test_a_shape_is_accepted_exactly_where_the_prune_type_can_deal_it_out(prune_type, ranks, groups, n, ffn):
    new = dataclasses.replace(shape(groups * n, groups), ffn_hidden_size=ffn)
    heads_change = (groups, n) != (6, 2)
    ffn_fits = ffn % ranks == 0
    megatron = (groups * n) % ranks == 0 and (groups % ranks == 0 or ranks % groups == 0) and groups * (n + 2) * 2 % ranks == 0
    fits = {
        "balance": ffn_fits and (groups % ranks == 0 or not heads_change),
        "global": ffn_fits and megatron,
        "unbalance": True,
    }[prune_type]
    if fits:
        check(new, prune_type, ranks)
    else:
        with pytest.raises(InputError):
            check(new, prune_type, ranks)


@pytest.mark.parametrize(
    "new, prune_type, tensor, word",
    [
        (dataclasses.replace(SMALL, ffn_hidden_size=10), "balance", 3, r"legal: \[3, 6, 9, 12, 15, 18, 21, 24\]"),
        (dataclasses.replace(SMALL, ffn_hidden_size=10), "global", 3, r"legal: \[3, 6, 9, 12, 15, 18, 21, 24\]"),
        (shape(8, 4), "balance", 3, r"num_query_groups_remain 4 does not divide over 3 ranks; legal: \[3, 6\]"),
        (shape(8, 4), "balance", 3, r"num_attention_heads_remain 8 does not divide over 3 ranks; legal: \[3, 6, 9, 12\]"),
        (shape(6, 6), "balance", 12, "no rank holds whole groups; use --prune-type global"),
        (shape(6, 6), "unbalance", 4, "no rank holds whole groups"),
        (shape(4, 4), "global", 3, "4 attention heads do not divide over 3 ranks"),
    ],
)
def test_a_shape_that_ranks_cannot_share_is_refused_with_the_legal_values(new, prune_type, tensor, word):
    with pytest.raises(InputError, match=word):
        check(new, prune_type, tensor)


def test_many_legal_values_are_told_in_short():
    old = dataclasses.replace(SMALL, ffn_hidden_size=1024)
    with pytest.raises(InputError, match="legal: multiples of 4 up to 1024"):
        check(dataclasses.replace(old, ffn_hidden_size=1023), "balance", 4, old=old)


@pytest.mark.parametrize("prune_type", ["balance", "global", "unbalance"])
def test_layers_that_do_not_divide_over_the_stages_are_refused_with_the_legal_numbers(prune_type):
    with pytest.raises(InputError, match=r"3 layers do not divide over 2 pipeline stages; legal: \[2, 4\]"):
        check(dataclasses.replace(SMALL, num_layers=3), prune_type, pipeline=2)


@pytest.mark.parametrize("prune_type", ["balance", "global"])
def test_sizes_that_do_not_change_are_not_held_against_balance(prune_type):
    check(dataclasses.replace(SMALL, hidden_size=7), prune_type, 12)
