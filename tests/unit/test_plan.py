"""Plans: a round trip through text, and every way in which one can be wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from dense import SMALL
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.errors import PlanError
from megatron_prune.families.family import FAMILIES
from megatron_prune.planning.check import check_plan
from megatron_prune.planning.plan import LayerPlan, Plan, load_plan, shape_of
from megatron_prune.pruning.request import read_request
from megatron_prune.pruning.options import TargetOptions
from megatron_prune.serving.demand import Demand

UNITS = st.one_of(st.none(), st.lists(st.integers(0, 99), max_size=6))
SHAPE = st.fixed_dictionaries({name: st.integers(1, 99) for name in shape_of(SMALL)})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.builds(
        Plan,
        old=SHAPE,
        new=SHAPE,
        hidden=UNITS,
        layers=st.lists(
            st.builds(
                LayerPlan,
                layer=st.integers(0, 99),
                ffn=UNITS,
                kv_head=UNITS,
                head=UNITS,
                shards=st.dictionaries(st.sampled_from(["ffn", "kv_head"]), st.lists(st.integers(0, 9), min_size=3, max_size=3)),
            ),
            max_size=4,
        ),
        rotated=st.booleans(),
        made_by=st.dictionaries(st.text(max_size=5), JSON, max_size=3),
        content_id=st.none() | st.text(max_size=9),
    ).map(lambda plan: dataclasses.replace(plan, hidden=None) if plan.rotated else plan)
)
def test_any_plan_comes_back_from_its_text(plan):
    text = plan.dumps()
    assert Plan.loads(text, "here") == plan
    assert Plan.loads(text, "here").dumps() == text
    assert json.loads(text)["version"] == 2


def good() -> dict:
    """A plan as JSON: 4 layers → 2, 20 → 5 channels, 24 → 3 channels, 6 groups of 2 heads → 2 of 1."""
    layer = lambda number: {"layer": number, "ffn": [23, 0, 7], "kv_head": [4, 1], "head": [9, 2]}
    new = {
        **shape_of(SMALL),
        "num_layers": 2,
        "hidden_size": 5,
        "ffn_hidden_size": 3,
        "num_attention_heads": 2,
        "num_query_groups": 2,
    }
    return {
        "format": "megatron-prune plan",
        "version": 1,
        "made_by": {"metric": "by hand"},
        "content_id": None,
        "old": shape_of(SMALL),
        "new": new,
        "hidden": [19, 3, 0, 4, 11],
        "layers": [layer(1), {**layer(3), "shards": {"ffn": [1, 2], "kv_head": [0, 2]}}],
    }


def check(data: dict) -> Plan:
    plan = Plan.loads(json.dumps(data), "p.json")
    check_plan(plan, SMALL, "p.json")
    return plan


def test_units_may_stand_in_any_order_and_heads_follow_their_groups():
    plan = check(good())
    assert plan.layers[0] == LayerPlan(layer=1, ffn=[23, 0, 7], kv_head=[4, 1], head=[9, 2])
    assert plan.shard_sizes() == {("ffn", 1): [1, 2], ("kv_head", 1): [0, 2]}
    assert plan.new_config(SMALL).hidden_size == 5 and plan.new_config(SMALL).vocab_size == SMALL.vocab_size


def set_in(*path_and_value):
    *path, last, value = path_and_value

    def change(data):
        for key in path:
            data = data[key]
        data[last] = value

    return change


def drop(*path):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


CORRUPTIONS = {
    "a hidden channel twice": set_in("hidden", [0, 0, 1, 2, 3]),
    "a hidden channel out of range": set_in("hidden", [0, 1, 2, 3, 20]),
    "a negative hidden channel": set_in("hidden", [-1, 1, 2, 3, 4]),
    "too few hidden channels": set_in("hidden", [0, 1, 2, 3]),
    "too many hidden channels": set_in("hidden", [0, 1, 2, 3, 4, 5]),
    "all hidden channels of a narrower model": set_in("hidden", "all"),
    "a hidden channel that is a float": set_in("hidden", [0, 1, 2, 3, 4.0]),
    "a hidden channel that is a boolean": set_in("hidden", [True, 0, 2, 3, 4]),
    "a hidden channel that is text": set_in("hidden", ["0", 1, 2, 3, 4]),
    "hidden null": set_in("hidden", None),
    "hidden another word": set_in("hidden", "most"),
    "a channel twice": set_in("layers", 0, "ffn", [5, 5, 1]),
    "a channel out of range": set_in("layers", 1, "ffn", [5, 24, 1]),
    "a negative channel": set_in("layers", 1, "ffn", [5, -1, 1]),
    "too few channels": set_in("layers", 0, "ffn", [5]),
    "no channels": set_in("layers", 0, "ffn", []),
    "all channels": set_in("layers", 0, "ffn", "all"),
    "a group twice": set_in("layers", 0, "kv_head", [4, 4]),
    "a group out of range": set_in("layers", 0, "kv_head", [6, 1]),
    "too many groups": set_in("layers", 0, "kv_head", [4, 1, 0]),
    "a head twice": set_in("layers", 0, "head", [9, 9]),
    "a head out of range": set_in("layers", 0, "head", [12, 2]),
    "a head of a group that goes": set_in("layers", 0, "head", [9, 4]),
    "heads in another order than their groups": set_in("layers", 0, "head", [2, 9]),
    "two heads of one group and none of the other": set_in("layers", 0, "head", [8, 9]),
    "all heads of fewer groups": set_in("layers", 0, "head", "all"),
    "a layer twice": set_in("layers", 0, "layer", 3),
    "a layer out of range": set_in("layers", 1, "layer", 4),
    "a negative layer": set_in("layers", 0, "layer", -1),
    "a layer that is a boolean": set_in("layers", 0, "layer", True),
    "layers not ascending": lambda data: data["layers"].reverse(),
    "a layer too few": lambda data: data["layers"].pop(),
    "a layer too many": lambda data: data["layers"].insert(0, {**data["layers"][0], "layer": 0}),
    "no layers": set_in("layers", []),
    "layers that are not a list": set_in("layers", 3),
    "a layer that is not an object": set_in("layers", 0, [1]),
    "shards that add up to less": set_in("layers", 1, "shards", "ffn", [1, 1]),
    "shards that add up to more": set_in("layers", 1, "shards", "kv_head", [2, 1]),
    "a negative shard": set_in("layers", 1, "shards", "ffn", [4, -1]),
    "an empty list of shards": set_in("layers", 1, "shards", "ffn", []),
    "shards of an axis that has none": set_in("layers", 1, "shards", "head", [1, 1]),
    "shards of an unknown axis": set_in("layers", 1, "shards", "width", [1, 1]),
    "shards that are not a list": set_in("layers", 1, "shards", "ffn", 3),
    "shards over different numbers of ranks": set_in("layers", 1, "shards", "ffn", [1, 1, 1]),
    "an unknown key": set_in("notes", "mine"),
    "an unknown key of a layer": set_in("layers", 0, "experts", "all"),
    "an unknown size": set_in("new", "num_experts", 1),
    "an unknown old size": set_in("old", "num_experts", 1),
    "another format": set_in("format", "another plan"),
    "no format": drop("format"),
    "a later version": set_in("version", 3),
    "a version as text": set_in("version", "1"),
    "no version": drop("version"),
    "no old shape": drop("old"),
    "an old shape that is not an object": set_in("old", [1, 2]),
    "an old size missing": drop("old", "hidden_size"),
    "an old size that is another": set_in("old", "ffn_hidden_size", 25),
    "a new shape that is not an object": set_in("new", 5),
    "a new size missing": drop("new", "vocab_size"),
    "another vocabulary": set_in("new", "vocab_size", 28),
    "another head dimension": set_in("new", "kv_channels", 1),
    "a new size of zero": set_in("new", "num_query_groups", 0),
    "no new layers": lambda data: (data["new"].update(num_layers=0), data.update(layers=[])),
    "a new size that is a float": set_in("new", "num_attention_heads", 2.0),
    "a new size that is text": set_in("new", "num_attention_heads", "2"),
    "a new size that is null": set_in("new", "hidden_size", None),
    "a new size that is a boolean": lambda data: (data["new"].update(num_layers=True), data["layers"].pop()),
    "more heads than the groups had": lambda data: data["new"].update(num_attention_heads=3),
    "no hidden": drop("hidden"),
    "no layer number": drop("layers", 0, "layer"),
    "no channels named": drop("layers", 0, "ffn"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_plan_is_refused_that_has(name):
    data = copy.deepcopy(good())
    CORRUPTIONS[name](data)
    with pytest.raises(PlanError, match="p.json"):
        check(data)


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{", '"plan"', "{}", "\x00"])
def test_text_that_is_not_a_plan_is_refused(text):
    with pytest.raises(PlanError):
        Plan.loads(text, "p.json")


def test_everything_that_does_not_fit_is_told_at_once():
    data = good()
    data["hidden"] = [0, 0, 1, 2, 99]
    data["layers"][1]["ffn"] = [1]
    with pytest.raises(PlanError) as error:
        check(data)
    for part in (
        "hidden: [99] out of range 0 to 19",
        "hidden: a unit stands twice",
        "layer 3: ffn: 1 units, the new shape says 3",
    ):
        assert part in str(error.value)


def test_a_plan_for_another_model_is_refused_naming_both_sizes():
    data = good()
    data["old"]["ffn_hidden_size"] = 100
    with pytest.raises(PlanError, match="made for ffn_hidden_size 100, the checkpoint has 24"):
        check(data)


def test_a_plan_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none", tmp_path, tmp_path / "binary"):
        with pytest.raises(PlanError, match=path.name):
            load_plan(path)


def test_a_plan_file_is_read(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(good()))
    assert load_plan(tmp_path / "p.json") == check(good())


def test_a_plan_dealt_over_two_ranks_is_evened_out_on_one(tmp_path):
    """The shards of a plan are for its own number of ranks; one rank cannot hold only the first of them."""
    (tmp_path / "p.json").write_text(json.dumps(good()))
    options = TargetOptions(plan=str(tmp_path / "p.json"))
    family = dataclasses.replace(
        FAMILIES.get("qwen3"), traits={"qkv_bias": True, "qk_norm": True}
    )  # no family has all that SMALL has
    given = {"prune_type": "balance", "has_text": False}
    plan = read_request(
        options,
        SimpleNamespace(config=SMALL, dtype=torch.float32, identity="id"),
        ParallelLayout(),
        Demand(family=family),
        **given,
    ).plan
    assert plan.shard_sizes() == {} and plan.layers[1].ffn == [23, 0, 7]


def test_the_summary_names_what_changes_and_nothing_else():
    text = check(good()).summary()
    assert "hidden_size 20 → 5" in text and "num_layers 4 → 2" in text and "vocab_size" not in text


@pytest.mark.parametrize(
    "sizes, wanted",
    [
        ({"num_query_groups_remain": 1}, {"context"}),
        ({"ffn_hidden_size_remain": SMALL.ffn_hidden_size - 4}, set()),
        ({"ffn_hidden_size_remain": SMALL.ffn_hidden_size - 4, "metric": "obs"}, {"channels"}),
        ({"num_layers_remain": SMALL.num_layers - 1}, {"rows"}),
        ({"drop_layers": (1,)}, set()),
    ],
)
def test_only_the_second_moments_of_what_is_cut_are_asked_for(sizes, wanted):
    given = {"prune_type": "global", "has_text": True, "held": None, "refit": True}
    options = TargetOptions(**sizes)
    family = dataclasses.replace(
        FAMILIES.get("qwen3"), traits={"qkv_bias": True, "qk_norm": True}
    )  # no family has all that SMALL has
    request = read_request(
        options, SimpleNamespace(config=SMALL, dtype=torch.float32), ParallelLayout(), Demand(family=family), **given
    )
    assert request.moments(SMALL) == wanted
