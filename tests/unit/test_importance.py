"""Scores against dense sums, alone and with every rank doing its part."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dense import SMALL, random_model, raw_map
from fake_ranks import Captured, Rank, on_every_rank
from hypothesis import given
from hypothesis import strategies as st
from measured import activations, measured

from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.axes.axis import AXES
from megatron_prune.importance import scoring
from megatron_prune.importance.metric import METRICS
from megatron_prune.importance.scoring import Place, all_scores, score
from megatron_prune.runtime.world import World

WANTED = [("hidden", None), ("layer", None), *((axis, n) for n in range(4) for axis in ("ffn", "kv_head", "head"))]


def simulated(metric, tensors, layout, copies: int = 1, wanted=WANTED) -> list[dict]:
    """Scores as every rank of TP × PP × ``copies`` ends up with them."""
    return on_every_rank(lambda rank: score(metric, tensors, layout, wanted, rank), layout, copies)


def dense_magnitude(config, model) -> dict:
    """Norm of everything a unit owns, unit by unit, in float64."""
    d, n = config.kv_channels, config.num_attention_heads // config.num_query_groups
    offset = lambda role: 1.0 if config.zero_centered_norms and "norm" in role else 0.0
    square = {tensor: (data.float() + offset(tensor.role)).double() ** 2 for tensor, data in model.items()}
    result = {}
    channels = torch.zeros(config.hidden_size, dtype=torch.float64)
    for (role, _), data in square.items():
        if role in ("o", "down"):
            channels += data.sum(1)
        elif role in ("embedding", "output", "q", "k", "v", "gate", "up"):
            channels += data.sum(0)
        elif role in ("final_norm", "input_norm", "post_norm", "o_norm", "down_norm"):
            channels += data
    result["hidden", None] = channels.sqrt()
    layers = range(config.num_layers)
    result["layer", None] = torch.stack(
        [sum(data.sum() for (_, layer), data in square.items() if layer == n_) for n_ in layers]
    ).sqrt()
    for layer in layers:
        at = lambda role: square[role, layer] if (role, layer) in square else None
        ffn = [at("gate")[u].sum() + at("up")[u].sum() + at("down")[:, u].sum() for u in range(config.ffn_hidden_size)]
        head = []
        for u in range(config.num_attention_heads):
            rows = slice(u * d, (u + 1) * d)
            head.append(at("q")[rows].sum() + at("o")[:, rows].sum() + (at("q_bias")[rows].sum() if config.qkv_bias else 0))
        group = []
        for u in range(config.num_query_groups):
            rows = slice(u * d, (u + 1) * d)
            own = at("k")[rows].sum() + at("v")[rows].sum()
            own = own + (at("k_bias")[rows].sum() + at("v_bias")[rows].sum() if config.qkv_bias else 0)
            group.append(own + sum(head[u * n : (u + 1) * n]))
        for axis, values in (("ffn", ffn), ("head", head), ("kv_head", group)):
            result[axis, layer] = torch.stack(values).sqrt()
    return result


def assert_close(ours: dict, theirs: dict, tolerance: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == torch.float64 and ours[key].shape == theirs[key].shape
        assert ((ours[key] - theirs[key]).abs() <= tolerance * theirs[key].abs()).all(), key


def magnitude():
    return METRICS.get("magnitude")(seed=0)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    return raw_map(tmp_path_factory.mktemp("importance") / "bytes", SMALL, random_model(SMALL, seed=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": False, "tie_embeddings": True},
        {"num_query_groups": 12},
        {"after_norms": True, "zero_centered_norms": True},
    ],
)
def test_magnitude_is_the_norm_of_everything_a_unit_owns_on_every_axis(tmp_path, dtype, changes):
    config = dataclasses.replace(SMALL, **changes)
    model = random_model(config, dtype, seed=1)
    ours = score(magnitude(), raw_map(tmp_path / "bytes", config, model), ParallelLayout(), WANTED, World())
    assert_close(ours, dense_magnitude(config, model))


@pytest.mark.parametrize(
    "tensor, pipeline, copies",
    [(1, 1, 1), (2, 1, 1), (3, 1, 1), (6, 1, 1), (2, 2, 1), (1, 4, 1), (3, 2, 2), (1, 1, 3), (2, 1, 3)],
)
def test_magnitude_is_the_same_at_every_parallel_layout_and_on_every_rank(tensors, tensor, pipeline, copies):
    alone = score(magnitude(), tensors, ParallelLayout(), WANTED, World())
    ranks = simulated(magnitude(), tensors, ParallelLayout(tensor=tensor, pipeline=pipeline), copies)
    for ours in ranks:
        assert_close(ours, alone)
        assert all(torch.equal(ours[key], ranks[0][key]) for key in ours)


@pytest.mark.parametrize("groups, tensor", [(1, 2), (2, 4), (3, 6), (6, 12)])
def test_magnitude_is_the_same_where_there_are_fewer_kv_groups_than_ranks(tmp_path, groups, tensor):
    config = dataclasses.replace(SMALL, num_query_groups=groups)
    ParallelLayout(tensor=tensor).check(config)
    model = random_model(config, seed=2)
    tensors = raw_map(tmp_path / "bytes", config, model)
    for ours in simulated(magnitude(), tensors, ParallelLayout(tensor=tensor)):
        assert_close(ours, dense_magnitude(config, model))


@pytest.mark.parametrize("elements", [1, 7, 50, 100])
@pytest.mark.parametrize("tensor", [1, 3])
def test_scores_do_not_depend_on_how_many_weights_are_looked_at_together(tensors, monkeypatch, elements, tensor):
    alone = score(magnitude(), tensors, ParallelLayout(), WANTED, World())
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", elements)
    assert_close(simulated(magnitude(), tensors, ParallelLayout(tensor=tensor))[0], alone)


def test_every_weight_is_looked_at_once_over_all_ranks(tensors):
    """The bytes told to the progress bar add up to the model, norms counted once."""
    for tensor, pipeline in ((1, 1), (2, 2), (3, 1)):
        counted, layout = [], ParallelLayout(tensor=tensor, pipeline=pipeline)
        for rank in range(tensor * pipeline):
            with pytest.raises(Captured):
                score(magnitude(), tensors, layout, WANTED, Rank(rank, tensor * pipeline), counted.append)
        assert sum(counted) == sum(tensors.nbytes(t) for t in tensors.tiles)


def test_only_what_was_asked_for_is_scored_and_read(tensors):
    read: list[int] = []
    ours = score(magnitude(), tensors, ParallelLayout(), [("ffn", 2)], World(), read.append)
    assert list(ours) == [("ffn", 2)]
    assert sum(read) == 3 * 24 * 20 * 4
    assert score(magnitude(), tensors, ParallelLayout(), [], World()) == {}


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_magnitude_of_bf16_weights_neither_overflows_nor_underflows(tmp_path, scale):
    """bf16 has float32's exponents: its squares do not fit float32."""
    model = {t: (data * scale).bfloat16() for t, data in random_model(SMALL).items()}
    ours = score(magnitude(), raw_map(tmp_path / "bytes", SMALL, model), ParallelLayout(), [("ffn", 0)], World())
    assert_close(ours, {("ffn", 0): dense_magnitude(SMALL, model)["ffn", 0]})


# ----------------------------------------------------------------------------------------------------------- random


@pytest.mark.parametrize("tensor, pipeline, copies", [(2, 1, 1), (3, 2, 1), (6, 1, 2)])
def test_random_is_the_same_bit_for_bit_at_every_layout(tensors, tensor, pipeline, copies):
    metric = METRICS.get("random")(seed=5)
    alone = score(metric, tensors, ParallelLayout(), WANTED, World())
    for ours in simulated(metric, tensors, ParallelLayout(tensor=tensor, pipeline=pipeline), copies):
        assert all(torch.equal(ours[key], alone[key]) for key in WANTED)


def test_random_differs_by_axis_layer_and_seed_and_repeats_for_the_same_seed():
    total = torch.zeros(64, dtype=torch.float64)
    draws = [
        METRICS.get("random")(seed=seed).finish(axis, layer, total)
        for seed in (0, 1)
        for axis in AXES.names()
        for layer in (None, 0, 1, 10)
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)
    assert torch.equal(draws[0], METRICS.get("random")(seed=0).finish("ffn", None, total))
    assert all(((draw >= 0) & (draw < 1)).all() and draw.dtype == torch.float64 for draw in draws)


def test_random_reads_no_weights():
    empty = type("Closed", (), {"config": SMALL})()
    assert len(score(METRICS.get("random")(seed=0), empty, ParallelLayout(), WANTED, World())) == len(WANTED)


@pytest.mark.parametrize("name", METRICS.names())
def test_every_metric_agrees_at_every_number_of_ranks(tensors, tmp_path, name):
    metric = METRICS.get(name)(seed=11, statistics=measured(tmp_path, SMALL, activations(SMALL)))
    alone = all_scores(metric, tensors, ParallelLayout(), World())
    places = {"block", *metric.axes} if metric.block_wise else metric.axes
    assert {axis for axis, _ in alone} == places
    assert all(value.isfinite().all() and value.unique().numel() > 1 for value in alone.values() if value.numel() > 1)
    for tensor, pipeline, copies in ((2, 1, 1), (3, 1, 1), (6, 1, 1), (1, 2, 1), (2, 2, 2)):
        layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
        for ours in on_every_rank(lambda rank: all_scores(metric, tensors, layout, rank), layout, copies):
            assert_close(ours, alone)


# ----------------------------------------------------------------------------------------------------------- places


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_places_are_megatrons_order_tensor_first_then_copies_then_stages(tensor, pipeline, copies):
    size = tensor * pipeline * copies
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
    expected = [Place(t, s, c, copies) for s in range(pipeline) for c in range(copies) for t in range(tensor)]
    assert [Place.of(World(rank, size), layout) for rank in range(size)] == expected
