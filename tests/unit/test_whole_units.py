"""Metrics that see whole units, or all layers at once, against dense computations, with every rank doing its part."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dense import SMALL, random_model, raw_map
from fake_ranks import on_every_rank
from trial_metrics import Spread, registered

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.axes.axis import AXES
from megatron_prune.errors import InputError
from megatron_prune.importance import whole_units
from megatron_prune.importance.metric import METRICS, GradientMetric, metric_named
from megatron_prune.importance.scoring import all_scores, score
from megatron_prune.importance.whole_units import check_shared
from megatron_prune.runtime.world import World

LAYERS = range(SMALL.num_layers)
WANTED = [(axis, layer) for layer in LAYERS for axis in ("ffn", "kv_head", "head")]


@pytest.fixture(autouse=True)
def trials():
    with registered():
        yield


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    return raw_map(tmp_path_factory.mktemp("units") / "bytes", SMALL, random_model(SMALL, seed=3))


def owned(config, model, axis: str, unit: int, layer: int) -> dict[str, torch.Tensor]:
    """Role → all that a unit owns of it, by slices of dense matrices: [its elements, hidden], or [its elements] of a bias."""
    at = lambda role: next(value.double() for tensor, value in model.items() if tensor == (role, layer))
    d, n = config.kv_channels, config.num_attention_heads // config.num_query_groups
    part = lambda each: slice(unit * each, (unit + 1) * each)
    if axis == "ffn":
        return {"gate": at("gate")[part(1)], "up": at("up")[part(1)], "down": at("down")[:, part(1)].T}
    heads = part(d if axis == "head" else n * d)
    found = {"q": at("q")[heads], "o": at("o")[:, heads].T} | ({"q_bias": at("q_bias")[heads]} if config.qkv_bias else {})
    if axis == "kv_head":
        roles = ("k", "v", "k_bias", "v_bias") if config.qkv_bias else ("k", "v")
        found |= {role: at(role)[part(d)] for role in roles}
    return found


def dense_spread(config, model, axis: str, layer: int) -> torch.Tensor:
    """One unit after the other, float64."""
    found = []
    for unit in range(AXES.get(axis).count(config)):
        parts = owned(config, model, axis, unit, layer)
        every = torch.cat([value.flatten() for value in parts.values()]).sort().values[2:-2]
        singular = sum(torch.linalg.matrix_norm(value, "nuc") for value in parts.values() if value.dim() == 2)
        found.append(every.mean().abs() / (every.std() + 1e-8) + singular)
    return torch.stack(found)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"num_query_groups": 12}, {"num_query_groups": 1}])
def test_a_unit_is_seen_with_all_that_it_owns(tmp_path, changes):
    config = dataclasses.replace(SMALL, **changes)
    model = random_model(config, torch.bfloat16, seed=1)
    ours = score(metric_named("trial_spread"), raw_map(tmp_path / "bytes", config, model), ParallelLayout(), WANTED, World())
    for axis, layer in WANTED:
        theirs = dense_spread(config, model, axis, layer)
        assert ours[axis, layer].dtype == torch.float64 and ours[axis, layer].shape == theirs.shape
        assert ((ours[axis, layer] - theirs).abs() <= 1e-5 * theirs.abs()).all(), (axis, layer)


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("layout", [(2, 1, 1), (3, 1, 1), (6, 1, 1), (2, 2, 1), (1, 1, 3), (3, 2, 2)], ids=str)
def test_what_is_said_of_a_unit_is_the_same_at_every_layout_to_the_bit(tmp_path, groups, layout):
    """With two KV groups, ranks of three and of six share none: some have none to look at."""
    tp, pp, copies = layout
    config = dataclasses.replace(SMALL, num_query_groups=groups)
    tensors, metric = raw_map(tmp_path / "bytes", config, random_model(config, seed=2)), metric_named("trial_spread")
    alone = score(metric, tensors, ParallelLayout(), WANTED, World())
    for ours in on_every_rank(
        lambda rank: score(metric, tensors, ParallelLayout(tensor=tp, pipeline=pp), WANTED, rank),
        ParallelLayout(tensor=tp, pipeline=pp),
        copies,
    ):
        assert ours.keys() == alone.keys()
        assert all(torch.equal(ours[key], alone[key]) for key in alone)


@pytest.mark.parametrize("elements", [1, 500])
def test_it_does_not_depend_on_how_many_units_are_read_together(tensors, monkeypatch, elements):
    metric = metric_named("trial_spread")
    alone = score(metric, tensors, ParallelLayout(), WANTED, World())
    monkeypatch.setattr(whole_units, "CHUNK_ELEMENTS", elements)
    ours = score(metric, tensors, ParallelLayout(), WANTED, World())
    assert all(torch.equal(ours[key], alone[key]) for key in alone)


def test_every_call_shows_as_many_units(tensors, monkeypatch):
    seen = set()

    class Counting(Spread):
        def per_unit(self, axis, layer, parts, samples):
            seen.add((axis, *{len(part.weight) for part in parts.values()}))
            return super().per_unit(axis, layer, parts, samples)

    Counting.name = "counting"
    monkeypatch.setattr(whole_units, "TOGETHER_ELEMENTS", 8 * 3 * SMALL.hidden_size)
    score(Counting(), tensors, ParallelLayout(), WANTED, World())
    assert {axis for axis, *_ in seen} == {"ffn", "head", "kv_head"} and len(seen) == 3
    assert ("ffn", 8) in seen


# -------------------------------------------------------------------------------------------------------- the last word


@pytest.mark.parametrize("layout", [(1, 1, 1), (3, 2, 1)], ids=str)
def test_the_last_word_is_over_all_layers_whichever_are_wanted(tensors, layout):
    tp, pp, copies = layout
    run = lambda rank: score(
        metric_named("trial_standardised"), tensors, ParallelLayout(tensor=tp, pipeline=pp), [("ffn", 2), ("head", 0)], rank
    )
    plain = all_scores(metric_named("trial_spread"), tensors, ParallelLayout(), World())
    for ours in on_every_rank(run, ParallelLayout(tensor=tp, pipeline=pp), copies):
        assert list(ours) == [("ffn", 2), ("head", 0)]
        for axis, layer in ours:
            every = torch.cat([plain[axis, at] for at in LAYERS])
            expected = (plain[axis, layer] - every.mean()) / every.std()
            torch.testing.assert_close(ours[axis, layer], expected, rtol=1e-12, atol=1e-12)


def test_a_broken_unit_goes_first_and_leaves_the_others_their_last_word(tmp_path):
    model = random_model(SMALL, seed=3)
    next(value for tensor, value in model.items() if tensor == ("up", 1))[5, 3] = torch.nan

    class Ranked(type(metric_named("magnitude"))):
        def conclude(self, scores):
            order = torch.cat(list(scores.values())).argsort().argsort().double()
            return dict(zip(scores, order.split([len(value) for value in scores.values()])))

    ours = score(Ranked(), raw_map(tmp_path / "bytes", SMALL, model), ParallelLayout(), [("ffn", n) for n in LAYERS], World())
    assert ours["ffn", 1][5] == -torch.inf
    rest = torch.cat([value[value.isfinite()] for value in ours.values()])
    assert len(rest) == len(rest.unique()) == 4 * 24 - 1 and rest.max() == 4 * 24 - 1


def test_a_last_word_on_other_units_is_an_error(tensors):
    class Forgetful(Spread):
        def conclude(self, scores):
            return {place: value[1:] for place, value in scores.items()}

    Forgetful.name = "forgetful"
    with pytest.raises(TypeError, match="forgetful: conclude returned scores of other units"):
        score(Forgetful(), tensors, ParallelLayout(), [("ffn", 0)], World())


# ---------------------------------------------------------------------------------------------------------------- refused


def test_units_that_no_rank_holds_are_refused_when_a_metric_is_registered():
    class Everywhere(Spread):
        axes = frozenset({"hidden", "ffn"})

    class Both(GradientMetric):
        axes, sums = frozenset({"ffn"}), frozenset({"sample", "total"})

    with pytest.raises(TypeError, match="units of hidden are on all ranks"):
        METRICS.register("everywhere")(Everywhere)
    with pytest.raises(TypeError, match="'sample' is asked for alone, and of whole units"):
        METRICS.register("both")(Both)
    assert not {"everywhere", "both"} & set(METRICS.names())


def test_gradients_of_units_that_ranks_share_are_refused_by_name():
    config = dataclasses.replace(SMALL, num_query_groups=2)
    for name in ("trial_saliency", "trial_spread", "taylor"):  # of channels; of weights alone; of no whole units
        check_shared(metric_named(name), config, ParallelLayout(tensor=4))
    check_shared(metric_named("trial_group"), config, ParallelLayout(tensor=2))
    with pytest.raises(InputError, match="(?s)trial_group looks at whole units.*4 ranks share.*2 units of kv_head in layer 0"):
        check_shared(metric_named("trial_group"), config, ParallelLayout(tensor=4))
