"""Shapes said layer by layer: plans of version 2, sizes named by hand, and what ranks cannot share."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from dense import SMALL
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.errors import InputError, PlanError
from megatron_prune.families.family import FAMILIES
from megatron_prune.planning.budget import Budget
from megatron_prune.planning.check import check_plan
from megatron_prune.planning.layer_sizes import dropped, read_layer_sizes
from megatron_prune.planning.make import make_plan
from megatron_prune.planning.plan import LayerPlan, Plan, shape_of
from megatron_prune.planning.shapes import candidates
from megatron_prune.planning.target import check_kinds, check_target, needed_scores, PRUNE_TYPES, resolve_target, Target
from megatron_prune.pruning.request import read_request
from megatron_prune.pruning.options import TargetOptions
from megatron_prune.serving.demand import Demand

DIFFERS = dataclasses.replace(
    SMALL, ffn_hidden_size=(24, 12, 0, 18), num_attention_heads=(12, 0, 6, 12), num_query_groups=(6, 0, 6, 3)
)
"""SMALL (4 layers; 24 channels; 6 groups of 2 heads) after a pruning: no attention in layer 1, no feed-forward block in 2."""


def some(draw, count: int) -> list[int] | None:
    """Some of ``count`` units in any order, or all by the word."""
    return draw(st.none() | st.permutations(range(count)).flatmap(lambda units: st.just(units[: draw(st.integers(1, count))])))


@st.composite
def plans(draw, config: ModelConfig) -> Plan:
    """Plans that fit a model: layers, blocks and units of each that go as they like."""
    layers = []
    for layer in range(config.num_layers):
        own = config.of_layer(layer)
        groups, each = own.num_query_groups, own.heads_per_group
        ffn = some(draw, own.ffn_hidden_size) if own.ffn_hidden_size and draw(st.booleans()) else []
        kv_head = some(draw, groups) if groups and draw(st.booleans()) else []
        per_group = draw(st.integers(1, each)) if each else 0
        of_group = lambda group: draw(st.permutations(range(group * each, group * each + each)))[:per_group]
        head = [head for group in (range(groups) if kv_head is None else kv_head) for head in of_group(group)]
        if ffn != [] or kv_head != []:
            layers.append(LayerPlan(layer=layer, ffn=ffn, kv_head=kv_head, head=head))
    if not any(entry.ffn != [] for entry in layers) or not any(entry.kv_head != [] for entry in layers):
        layers = [LayerPlan(layer=0)]  # a model keeps a block of each kind
    old = shape_of(config)
    new = {**old, "num_layers": len(layers)}
    for axis, field in (("ffn", "ffn_hidden_size"), ("kv_head", "num_query_groups"), ("head", "num_attention_heads")):
        whole = lambda entry: getattr(config.of_layer(entry.layer), field)
        counts = [whole(entry) if entry.units(axis) is None else len(entry.units(axis)) for entry in layers]
        new[field] = counts[0] if len(set(counts)) == 1 else counts
    return Plan(old=old, new=new, hidden=None, layers=layers)


@pytest.mark.parametrize("config", [SMALL, DIFFERS], ids=["alike", "differing"])
@given(st.data())
def test_any_plan_comes_back_from_its_text_with_or_without_the_new_sizes(config, data):
    plan = data.draw(plans(config))
    check_plan(plan, config, "here")
    text = plan.dumps()
    assert Plan.loads(text, "here") == plan
    said = json.loads(text)
    del said["new"]
    assert Plan.loads(json.dumps(said), "here") == plan  # sizes follow from the lists
    for entry, row in zip(plan.layers, said["layers"]):
        assert ("attention" in row) == (entry.kv_head == entry.head == []) != ({"kv_head", "head"} <= row.keys())
        assert ("mlp" in row) == (entry.ffn == []) != ("ffn" in row)
    new = plan.new_config(config)
    for number, entry in enumerate(plan.layers):
        old, own = config.of_layer(entry.layer), new.of_layer(number)
        for axis in ("ffn", "kv_head", "head"):
            units = entry.units(axis)
            assert own.units(axis) == (old.units(axis) if units is None else len(units))


def dropping() -> dict:
    """A plan as JSON: layer 0 whole, 1 without attention, 2 without its feed-forward block."""
    whole = {"ffn": "all", "kv_head": "all", "head": "all"}
    layers = [
        {"layer": 0, **whole},
        {"layer": 1, "attention": "none", "ffn": [3, 1]},
        {"layer": 2, "mlp": "none", "kv_head": [5], "head": [10, 11]},
    ]
    said = {"format": "megatron-prune plan", "version": 2, "made_by": {}, "old": shape_of(SMALL), "hidden": "all"}
    return {**said, "layers": layers}


def read(said: dict) -> Plan:
    plan = Plan.loads(json.dumps(said), "p.json")
    check_plan(plan, SMALL, "p.json")
    return plan


def test_blocks_that_go_alone_are_layers_without_them():
    new = read(dropping()).new_config(SMALL)
    assert new.ffn_hidden_size == (24, 2, 0) and new.num_query_groups == (6, 0, 1) and new.num_attention_heads == (12, 0, 2)
    assert [[kind.half for kind in new.of_layer(layer).kinds] for layer in (1, 2)] == [["mlp"], ["attention"]]


def layer(number: int, **changes):
    def change(said):
        said["layers"][number].update(changes)
        for name in [name for name, value in changes.items() if value is ...]:
            del said["layers"][number][name]

    return change


def new(**changes):
    sizes = {"num_layers": 3, "ffn_hidden_size": [24, 2, 0], "num_query_groups": [6, 0, 1], "num_attention_heads": [12, 0, 2]}
    return lambda said: said.update(new={**shape_of(SMALL), **sizes, **changes})


CONTRADICTIONS = {
    "units of attention that is none": (layer(1, kv_head=[1], head=[2, 3]), "layer 1: kv_head.*units, and a block that is none"),
    "all of a block that is none": (layer(2, ffn="all"), "layer 2: ffn.*units, and a block that is none"),
    "an axis left out": (layer(0, head=...), 'layer 0: head.*got: nothing.*a list of units, or "all"'),
    "another word": (layer(1, attention="gone"), "attention.*'gone'.*'none'"),
    "no block at all": (layer(1, mlp="none", ffn=...), "layer 1: neither its attention nor its mlp stays; leave the layer out"),
    "groups without heads": (layer(0, kv_head=[]), "layer 0: 12 heads do not divide over 0 KV groups"),
    "heads without groups": (layer(0, head=[]), "layer 0: 0 heads do not divide over 6 KV groups"),
    "another new width": (new(ffn_hidden_size=[24, 3, 0]), "layer 1: ffn: 2 units, the new shape says 3"),
    "a new width of a block that goes": (new(ffn_hidden_size=[24, 2, 5]), "layer 2: ffn: 0 units, the new shape says 5"),
    "one width for layers that differ": (new(ffn_hidden_size=24), "layer 1: ffn: 2 units, the new shape says 24"),
    "widths of fewer layers": (new(ffn_hidden_size=[24, 2]), "ffn_hidden_size: sizes of 2 layers, and 3 layers that stay"),
    "widths of more layers": (new(ffn_hidden_size=[24, 2, 0, 1]), "ffn_hidden_size: sizes of 4 layers, and 3"),
    "a negative width": (new(ffn_hidden_size=[24, 2, -1]), "ffn_hidden_size.*-1"),
    "a hidden size for each layer": (new(hidden_size=[20, 20, 20]), "new: hidden_size.*needed: one number"),
    "a number of layers for each": (new(num_layers=[3]), "new: num_layers.*needed: one number"),
    "another model's widths": (lambda said: said["old"].update(ffn_hidden_size=[24, 24, 24, 12]), "made for ffn_hidden_size"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_plan_is_refused_that_has(name):
    change, words = CONTRADICTIONS[name]
    said = dropping()
    change(said)
    with pytest.raises(PlanError, match=f"(?s)p.json.*{words}"):
        read(said)


# ------------------------------------------------------------------------------------------------------------ named by hand


def by_layer(**sizes: dict[int, int]):
    """``ffn={3: 12}`` → sizes by (axis, layer)."""
    return {(axis, layer): units for axis, found in sizes.items() for layer, units in found.items()}


def test_a_file_of_sizes_is_read_by_layer_and_axis(tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text('{"3": {"ffn_hidden_size": 8, "num_query_groups": 2}, "0": {"mlp": "none"}, "1": {"num_attention_heads": 6}}')
    assert read_layer_sizes(path) == by_layer(ffn={3: 8, 0: 0}, kv_head={3: 2}, head={1: 6})
    path.write_text('{"2": {"attention": "none"}}')
    assert read_layer_sizes(path) == by_layer(kv_head={2: 0}, head={2: 0})
    assert dropped((2,), "attention", "--drop-attention") == by_layer(kv_head={2: 0}, head={2: 0})
    assert dropped(None, "mlp", "--drop-mlp") == {}


@pytest.mark.parametrize(
    "text, words",
    [
        ("[]", "sizes.json"),
        ("{", "is not JSON"),
        ("{}", "names no size"),
        ('{"1": {}}', "names no size"),
        ('{"one": {"mlp": "none"}}', "'one'.*numbers of layers"),
        ('{"-1": {"mlp": "none"}}', "'-1'.*numbers of layers"),
        ('{"1": {"ffn_hidden_size": 0}}', "ffn_hidden_size.*got: 0.*greater than or equal to 1"),
        ('{"1": {"ffn_hidden_size": 8.0}}', "ffn_hidden_size.*8.0.*integer"),
        ('{"1": {"ffn_hidden_size": true}}', "ffn_hidden_size.*True.*integer"),
        ('{"1": {"hidden_size": 8}}', "no field 'hidden_size'.*some of ffn_hidden_size"),
        ('{"1": {"mlp": "all"}}', "mlp.*'all'.*'none'"),
        ('{"1": {"mlp": "none", "ffn_hidden_size": 8}}', 'layer 1.*sizes of a block, and "mlp": "none".*one of the two'),
        ('{"2": {"attention": "none", "num_attention_heads": 2}}', 'layer 2.*"attention": "none"'),
    ],
)
def test_a_file_that_says_no_sizes_is_refused(tmp_path, text, words):
    (tmp_path / "sizes.json").write_text(text)
    with pytest.raises(InputError, match=f"(?s){words}"):
        read_layer_sizes(tmp_path / "sizes.json")


@pytest.mark.parametrize(
    "config, sizes, words",
    [
        (SMALL, by_layer(ffn={4: 8}), "layer 4: needed 0 to 3"),
        (SMALL, by_layer(ffn={1: 25}), "layer 1: ffn_hidden_size 25 is larger than the layer's 24"),
        (DIFFERS, by_layer(ffn={1: 13}), "layer 1: ffn_hidden_size 13 is larger than the layer's 12"),
        (SMALL, by_layer(ffn={2: 8}), "layer 2 goes, and has a size of its own"),
        (SMALL, by_layer(head={3: 7}), "layer 3: 7 heads; needed 1 to 2 query heads in each KV group"),
        (SMALL, by_layer(head={3: 8}, kv_head={3: 3}), "layer 3: 8 heads in 3 KV groups; needed 1 to 2"),
        (DIFFERS, by_layer(head={1: 0}, kv_head={1: 0}), "layer 1 has no attention"),
        (DIFFERS, by_layer(ffn={2: 0}), "layer 2 has no mlp"),
    ],
)
def test_sizes_that_a_layer_cannot_have_are_refused_naming_it(config, sizes, words):
    with pytest.raises(InputError, match=words):
        resolve_target(config, drop_layers=(2,) if "goes" in words else None, by_layer=sizes)


def test_a_layer_that_two_options_name_or_one_names_twice_is_refused(tmp_path):
    with pytest.raises(InputError, match="(?s)--drop-mlp.*layer 3 stands twice"):
        dropped((3, 1, 3), "mlp", "--drop-mlp")
    (tmp_path / "sizes.json").write_text('{"1": {"ffn_hidden_size": 4}}')
    with pytest.raises(InputError, match="layer 1 is named by two options"):
        request(SMALL, drop_mlp=(1,), drop_attention=(0, 1), layer_sizes=str(tmp_path / "sizes.json"))


@pytest.mark.parametrize(
    "sizes, pairs",
    [
        (by_layer(head={0: 6}), (6, 6)),
        (by_layer(head={0: 8}), (8, 4)),
        (by_layer(kv_head={0: 2}), (4, 2)),
        (by_layer(head={0: 2}, kv_head={0: 2}), (2, 2)),
        (by_layer(head={0: 0}, kv_head={0: 0}), (0, 0)),
    ],
)
def test_heads_and_groups_of_a_layer_complete_each_other(sizes, pairs):
    target = resolve_target(SMALL, by_layer=sizes)
    found = [(own.num_attention_heads, own.num_query_groups) for own in map(target.config.of_layer, range(4))]
    assert found == [pairs, (12, 6), (12, 6), (12, 6)]


def test_sizes_of_layers_go_before_one_size_for_all():
    target = resolve_target(SMALL, ffn_hidden_size=18, by_layer=by_layer(ffn={1: 6, 3: 0}))
    assert target.config.ffn_hidden_size == (18, 6, 18, 0)
    assert [target.units("ffn", layer, SMALL) for layer in range(4)] == [18, 6, 18, 0]
    target = resolve_target(SMALL, drop_layers=(0,), by_layer=by_layer(ffn={2: 6}))
    assert target.config.ffn_hidden_size == (24, 6, 24) and target.units("ffn", 2, SMALL) == 6


def test_a_layer_that_loses_its_last_block_goes_and_one_block_must_stay():
    target = resolve_target(DIFFERS, by_layer=by_layer(ffn={1: 0, 0: 12}))
    assert target.drop_layers == (1,) and target.config.num_layers == 3
    assert target.config.ffn_hidden_size == (12, 0, 18) and target.config.num_query_groups == (6, 6, 3)
    every = by_layer(ffn=dict.fromkeys((0, 1, 3), 0), head=dict.fromkeys((0, 2, 3), 0), kv_head=dict.fromkeys((0, 2, 3), 0))
    with pytest.raises(InputError, match="(?s)empties every block of the model.*needed: at least one block that stays"):
        resolve_target(DIFFERS, by_layer=every)
    del every["ffn", 3]
    assert resolve_target(DIFFERS, by_layer=every).config.num_layers == 1


def test_a_half_that_no_layer_keeps_is_refused_in_options_and_in_a_plan():
    every = dict.fromkeys(range(SMALL.num_layers), 0)
    with pytest.raises(InputError, match="no layer keeps its attention"):
        check_kinds(SMALL, resolve_target(SMALL, by_layer=by_layer(head=every, kv_head=every)).config)
    with pytest.raises(InputError, match="no layer keeps its mlp"):
        check_kinds(SMALL, resolve_target(SMALL, by_layer=by_layer(ffn=every)).config)
    with pytest.raises(InputError, match="no layer keeps its mlp"):
        request(SMALL, drop_mlp=(0, 1, 2, 3), metric="magnitude")
    said = dropping()
    for row in said["layers"]:
        row.update(mlp="none")
        row.pop("ffn", None)
    del said["layers"][1]
    with pytest.raises(PlanError, match="no layer keeps its mlp"):
        read(said)


def test_layers_that_scores_choose_are_refused_beside_sizes_by_layer():
    with pytest.raises(InputError, match="(?s)sizes by layer, and layers that scores choose.*--drop-layers"):
        resolve_target(SMALL, num_layers=3, by_layer=by_layer(ffn={1: 6}))


@pytest.mark.parametrize("name", ["ffn_hidden_size", "num_attention_heads", "num_query_groups"])
def test_one_size_for_layers_that_differ_is_refused_naming_them(name):
    with pytest.raises(InputError, match=f"(?s){name} is not one number for the model.* in layer 1"):
        resolve_target(DIFFERS, **{name: 6})
    assert resolve_target(DIFFERS, hidden_size=8, num_layers=4).config == dataclasses.replace(DIFFERS, hidden_size=8)


def test_a_budget_of_shapes_with_layers_alike_is_refused_naming_them():
    budget = Budget(params=parameter_count(DIFFERS) // 2)
    with pytest.raises(InputError, match="(?s)is not one number for the model: layers differ.*in layer 1"):
        candidates(DIFFERS, budget, multiple_of={}, layout=ParallelLayout(), prune_type="global", legal=lambda shape: True)


# ------------------------------------------------------------------------------------------------- units that are chosen


@pytest.mark.parametrize("prune_type", PRUNE_TYPES)
@given(st.data())
def test_every_layer_keeps_the_best_of_its_own_units(prune_type, data):
    """Scores are drawn; of a layer that keeps everything none are asked for."""
    sizes = {}
    for number in range(4):
        own = DIFFERS.of_layer(number)
        if own.ffn_hidden_size and data.draw(st.booleans()):
            sizes["ffn", number] = data.draw(st.sampled_from(range(2, own.ffn_hidden_size + 1, 2)))
        if own.num_query_groups == 6 and data.draw(st.booleans()):
            sizes["kv_head", number] = data.draw(st.sampled_from((2, 4, 6)))
    target = resolve_target(DIFFERS, by_layer=sizes)
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    count = lambda axis, number: DIFFERS.of_layer(number).units(axis)
    scores = {key: torch.rand(count(*key), generator=draw, dtype=torch.float64) for key in needed_scores(DIFFERS, target)}
    assert scores.keys() == {key for key, units in sizes.items() if units < count(*key)}
    plan = make_plan(DIFFERS, target, scores, prune_type=prune_type, ranks=2, made_by={}, content_id=None)
    check_plan(plan, DIFFERS, "here")
    assert plan.new_config(DIFFERS) == target.config
    for (axis, number), values in scores.items():
        keep, half = sizes[axis, number], len(values) // 2
        halves = [(0, values[:half], keep // 2), (half, values[half:], keep // 2)]
        parts = halves if prune_type == "balance" else [(0, values, keep)]
        best = sorted(start + int(unit) for start, part, stay in parts for unit in part.topk(stay).indices)
        entry = plan.layers[number]
        assert entry.units(axis) == best
        shards = [sum(unit < half for unit in best), sum(unit >= half for unit in best)]
        assert entry.shards.get(axis) == (shards if prune_type == "unbalance" else None)


# ------------------------------------------------------------------------------------------------------ under a layout


@pytest.mark.parametrize(
    "prune_type, sizes, words",
    [
        ("balance", by_layer(ffn={1: 10}), "layer 1: ffn_hidden_size 10 does not divide over 3 ranks; legal: .3, 6, 9"),
        ("global", by_layer(ffn={1: 10}), "layer 1: ffn_hidden_size 10 does not divide over 3 ranks"),
        ("unbalance", by_layer(ffn={1: 10}), None),
        ("balance", by_layer(kv_head={2: 4}), "layer 2: num_query_groups 4 does not divide over 3 ranks; legal: .3, 6."),
        ("global", by_layer(kv_head={2: 4}), "8 attention heads do not divide over 3 ranks in layer 2"),
        ("unbalance", by_layer(kv_head={2: 4}), None),
        ("balance", by_layer(ffn={0: 12, 3: 0}, kv_head={1: 3, 2: 0}, head={2: 0}), None),
        ("global", by_layer(ffn={0: 12, 3: 0}, kv_head={1: 3, 2: 0}, head={2: 0}), None),
    ],
)
def test_a_layer_that_ranks_cannot_share_is_refused_by_its_number(prune_type, sizes, words):
    target, layout = resolve_target(SMALL, by_layer=sizes), ParallelLayout(tensor=3)
    if words is None:
        return check_target(SMALL, target, layout, prune_type)
    with pytest.raises(InputError, match=f"(?s)over TP 3.*{words}"):
        check_target(SMALL, target, layout, prune_type)


def test_every_layer_that_ranks_cannot_share_is_named():
    with pytest.raises(InputError, match="24 FFN channels do not divide over 5 ranks in layers 0, 2, 3\n"):
        ParallelLayout(tensor=5).check(dataclasses.replace(SMALL, ffn_hidden_size=(24, 25, 24, 24)))


def test_sizes_that_stay_as_they_are_are_not_held_against_a_layer():
    odd = dataclasses.replace(SMALL, ffn_hidden_size=(24, 24, 24, 7))
    target = resolve_target(odd, by_layer=by_layer(ffn={0: 9}))
    with pytest.raises(InputError, match="7 FFN channels do not divide over 3 ranks in layer 3") as error:
        check_target(odd, target, ParallelLayout(tensor=3), "balance")
    assert "layer 3: ffn_hidden_size 7" not in str(error.value)


@pytest.mark.parametrize("prune_type", PRUNE_TYPES)
def test_a_shape_alike_is_told_by_its_option_and_layers_count_over_stages(prune_type):
    target = resolve_target(SMALL, by_layer=by_layer(ffn={0: 0}, kv_head={0: 0}))
    assert isinstance(target, Target) and target.config.num_layers == 3
    with pytest.raises(InputError, match="3 layers do not divide over 2 pipeline stages"):
        check_target(SMALL, target, ParallelLayout(pipeline=2), prune_type)


# ------------------------------------------------------------------------------------------------------------- --uniform


def request(config: ModelConfig, **options):
    traits = {"qkv_bias": True, "qk_norm": True}  # no family has all that SMALL has
    family = dataclasses.replace(FAMILIES.get("qwen3"), traits=traits)
    model = SimpleNamespace(config=config, dtype=torch.float32, identity="id")
    return read_request(
        TargetOptions(**options), model, ParallelLayout(), Demand(family=family), prune_type="balance", has_text=False
    )


@pytest.mark.parametrize("drops", [True, False])
def test_a_plan_by_layer_becomes_shapes_alike_of_as_many_parameters(tmp_path, drops):
    said = dropping()
    if not drops:  # a twin of a plan that keeps all layers keeps them
        said["layers"].append({**said["layers"][0], "layer": 3})
    path = tmp_path / "p.json"
    path.write_text(json.dumps(said))
    most = parameter_count(read(said).new_config(SMALL))
    shapes = request(SMALL, plan=str(path), uniform=True, metric="magnitude").shapes
    assert shapes and all(shape.is_uniform for shape in shapes)
    assert all(shape.hidden_size == SMALL.hidden_size for shape in shapes)
    assert any(shape.num_layers < SMALL.num_layers for shape in shapes) == drops
    assert 0.98 * most < max(map(parameter_count, shapes)) <= most


def test_the_twin_of_an_untied_plan_is_untied(tmp_path):
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    said = {**dropping(), "untied": True}
    (tmp_path / "p.json").write_text(json.dumps(said))
    with pytest.raises(PlanError, match="(?s)a matrix of its own.*--untie"):
        request(tied, plan=str(tmp_path / "p.json"), uniform=True, metric="magnitude")
    shapes = request(tied, plan=str(tmp_path / "p.json"), uniform=True, untie=True, metric="magnitude").shapes
    assert shapes and not any(shape.tie_embeddings for shape in shapes)


@pytest.mark.parametrize(
    "change, options, words",
    [
        (lambda said: None, {"params": "100"}, "--uniform and --params both say how large"),
        (lambda said: None, {"allocate": "free"}, "--uniform and --allocate free"),
        (lambda said: None, {"ffn_hidden_size_remain": 12}, "a budget and --ffn-hidden-size-remain both say what stays"),
        (lambda said: said.update(layers=said["layers"][:1]), {}, "the layers of .* are alike.*leave --uniform out"),
        (lambda said: said.update(vocab=[0, 1, 5]), {}, "cuts the vocabulary too.*--vocab-plan"),
        (lambda said: said["old"].update(hidden_size=21), {}, "made for hidden_size 21, the checkpoint has 20"),
    ],
)
def test_a_plan_that_cannot_be_made_alike_is_refused(tmp_path, change, options, words):
    said = dropping()
    change(said)
    (tmp_path / "p.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=f"(?s){words}"):
        request(SMALL, plan=str(tmp_path / "p.json"), uniform=True, **options)


def test_what_differs_already_is_not_made_alike(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(dropping()))
    with pytest.raises(
        InputError, match="(?s)--uniform starts from a model whose layers are alike.*differ already.*that one's plan"
    ):
        request(DIFFERS, plan=str(tmp_path / "p.json"), uniform=True)


def test_uniform_without_a_plan_is_refused():
    with pytest.raises(InputError, match="(?s)--uniform without --plan.*name the plan"):
        request(SMALL, uniform=True)
