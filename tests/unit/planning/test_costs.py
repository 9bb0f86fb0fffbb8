"""Costs of blocks between the sizes that were measured, and their files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from dense import SMALL

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.errors import InputError
from megatron_prune.planning.costs import Costs, levels, sizes_at
from megatron_prune.planning.costs_file import CostsManifest, load_costs, save_costs

ATTENTION, MLP = BLOCKS.get("attention"), BLOCKS.get("gated")
WIDE = dataclasses.replace(SMALL, ffn_hidden_size=40, num_attention_heads=24)
"""Four layers of 40 channels, and of 24 heads in 6 groups."""


def costs(mlp, attention, mlp_together, attention_together, dense: float = 2.0) -> Costs:
    """Of a model that adds these to the loss: in every layer the same."""
    rows = lambda losses: np.tile(dense + np.array(losses, dtype=float), (WIDE.num_layers, 1))
    joint = lambda losses: dense + np.array(losses, dtype=float)
    return Costs(
        config=WIDE,
        dense=dense,
        alone={"gated": rows(mlp), "attention": rows(attention)},
        together={"gated": joint(mlp_together), "attention": joint(attention_together)},
    )


ADDING_UP = costs([1, 2, 4, 8], [1, 2, 3, 1, 3, 5, 9], [4, 8, 16, 32], [4, 8, 12, 4, 12, 20, 36])


def test_blocks_are_measured_at_shares_of_every_axis_and_left_out_once():
    assert [tuple(level) for level in levels(MLP)] == [("ffn", 0.75), ("ffn", 0.5), ("ffn", 0.25), ("ffn", 0.0)]
    heads = [("head", 0.75), ("head", 0.5), ("head", 0.25)]
    assert [tuple(level) for level in levels(ATTENTION)] == [*heads, *(("kv_head", share) for share in (0.75, 0.5, 0.25, 0.0))]
    sizes = [tuple(sizes_at(level, ATTENTION, WIDE).values()) for level in levels(ATTENTION)]
    assert sizes == [(18, 6), (12, 6), (6, 6), (16, 4), (12, 3), (8, 2), (0, 0)]
    single = dataclasses.replace(WIDE, num_attention_heads=6)
    assert [sizes_at(level, ATTENTION, single)["head"] for level in levels(ATTENTION)] == [6, 6, 6, 4, 3, 2, 0]


@pytest.mark.parametrize(
    "channels, expected", [(40, 0), (35, 0.5), (30, 1), (25, 1.5), (20, 2), (10, 4), (5, 6), (1, 7.6), (0, 8)]
)
def test_a_cost_between_two_measured_sizes_lies_on_the_line(channels, expected):
    assert ADDING_UP.of(2, MLP, {"ffn": channels}) == pytest.approx(expected)


@pytest.mark.parametrize(
    "heads, groups, expected", [(24, 6, 0), (18, 6, 1), (16, 4, 1), (12, 4, 2), (6, 3, 5), (4, 1, 7), (0, 0, 9)]
)
def test_costs_of_heads_and_of_groups_add_up_and_a_block_that_goes_has_its_own(heads, groups, expected):
    assert ADDING_UP.of(0, ATTENTION, {"head": heads, "kv_head": groups}) == pytest.approx(expected)


def test_fewer_heads_than_were_measured_lie_on_the_way_to_none():
    many = dataclasses.replace(ADDING_UP, config=dataclasses.replace(WIDE, num_attention_heads=48))
    found = [many.of(0, ATTENTION, {"head": 6 * each, "kv_head": 6}) for each in (8, 2, 1)]
    assert found == pytest.approx([0, 3, 6])


def test_a_larger_size_never_costs_more_and_none_costs_less_than_nothing():
    odd = costs([-1, 3, 2, 2.5], [0] * 7, [0] * 4, [0] * 7)
    found = [odd.of(1, MLP, {"ffn": channels}) for channels in range(40, -1, -1)]
    assert found == sorted(found) and found[0] == found[10] == 0 and found[20] == found[-1] == 3


def test_levels_are_scaled_by_what_all_layers_lose_together():
    """By no less than at a milder level, nor than one."""
    scaled = costs([1, 2, 4, 8], [1, 2, 3, 1, 3, 5, 9], [2, 12, 48, 64], [4, 8, 12, 8, 24, 80, 36])
    assert scaled.scale(MLP) == pytest.approx([1, 1.5, 3, 3])
    assert scaled.scale(ATTENTION) == pytest.approx([1, 1, 1, 2, 2, 4, 4])
    assert scaled.of(3, MLP, {"ffn": 20}) == pytest.approx(3) and scaled.of(3, MLP, {"ffn": 15}) == pytest.approx(7.5)
    assert scaled.of(3, ATTENTION, {"head": 6, "kv_head": 3}) == pytest.approx(2 + 6)


def test_a_level_that_cuts_nothing_costs_nothing():
    """One head in every group: levels of query heads are the model itself, which is not measured."""
    single = dataclasses.replace(WIDE, num_attention_heads=6)
    alone = np.array([[2, 2, 2, 3, 4, 5, 6.0]] * 4)
    found = Costs(
        config=single, dense=2.0, alone={"attention": alone}, together={"attention": np.array([np.nan] * 3 + [6, 10, 14, 18])}
    )
    assert found.of(0, ATTENTION, {"head": 6, "kv_head": 6}) == 0.0
    assert found.of(0, ATTENTION, {"head": 4, "kv_head": 4}) == pytest.approx(1.0)


def test_what_is_filed_comes_back_also_half_done(tmp_path):
    half = costs([1, 2, 4, 8], [1, 2, 3, 1, 3, 5, 9], [4, 8, np.nan, 32], [4] * 7)
    half.alone["gated"][2] = np.nan
    save_costs(tmp_path, half)
    found = load_costs(tmp_path, WIDE)
    assert found.dense == 2.0
    for name in ("gated", "attention"):
        assert np.array_equal(found.alone[name], half.alone[name], equal_nan=True)
        assert np.array_equal(found.together[name], half.together[name], equal_nan=True)


def test_costs_of_another_shape_are_refused(tmp_path):
    save_costs(tmp_path, ADDING_UP)
    with pytest.raises(InputError, match="'attention.alone'(.|\n)*needed: torch.float64 \\[3, 7\\]"):
        load_costs(tmp_path, WIDE.of_layers([0, 1, 2]))


def test_costs_of_another_model_or_other_units_are_refused(tmp_path):
    said = CostsManifest(content_id="a", calibration="b", samples=8, metrics={"ffn": "obs"}, ridge=0.01)
    with pytest.raises(InputError, match="holds no costs(.|\n)*score --costs"):
        CostsManifest.load(tmp_path)
    said.save(tmp_path)
    assert CostsManifest.load(tmp_path) == said
    said.check("a", {"ffn": "obs"}, tmp_path)
    with pytest.raises(InputError, match="another model\\s+got: a\\s+needed: b"):
        said.check("b", {"ffn": "obs"}, tmp_path)
    with pytest.raises(InputError, match="ffn were measured(.|\n)*got: obs\\s+needed: fisher"):
        said.check("a", {"ffn": "fisher"}, tmp_path)
