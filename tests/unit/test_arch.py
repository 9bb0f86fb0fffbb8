"""Sizes, tensor tables and the arithmetic of shards."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dense import SMALL, fused_model, labelled_model, layouts, rank_part, role_shapes
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config

from megatron_prune.arch.model import SHAPE_FIELDS, ModelConfig, RopeScaling
from megatron_prune.arch.sharding import ParallelLayout, layer_tensors, outer_tensors, patches, rank_ranges, shard
from megatron_prune.arch.tensors import parameter_count, tensor_ids, tensor_shape
from megatron_prune.axes.axis import AXES
from megatron_prune.errors import CheckpointError, InputError


def all_tensors(config):
    """(Megatron tensor, layer) of a model."""
    return [(t, None) for t in outer_tensors(config)] + [(t, n) for n in range(config.num_layers) for t in layer_tensors(config)]


def held_part(full: torch.Tensor, held) -> torch.Tensor:
    """What a :class:`Shard` says a rank holds, cut by plain slices."""
    rows = torch.cat([full[part.start : part.stop] for part in held.rows])
    return rows[:, held.cols.start : held.cols.stop] if full.dim() == 2 else rows


def rebuild(config, full_tensors, layout, sizes=lambda tensor, layer: None):
    """Role tensors put together from every rank's blocks; ``seen`` counts how often each element came."""
    model = {t: torch.zeros(shape) for t, shape in role_shapes(config).items()}
    seen = {t: torch.zeros(shape, dtype=torch.long) for t, shape in role_shapes(config).items()}
    for tensor, layer in all_tensors(config):
        full = full_tensors[tensor.name, layer]
        for rank in range(layout.tensor if tensor.split != "none" else 1):
            held = shard(tensor, tuple(full.shape), layout.tensor, rank, sizes(tensor, layer))
            stored = held_part(full, held)
            for role, at, row, col, rows, cols in patches(tensor, config, full.shape[0], held):
                key = next(t for t in model if t == (role, layer))
                place = (slice(row, row + rows), slice(col, col + cols))[: full.dim()]
                model[key][place] = stored[at : at + rows]
                seen[key][place] += 1
    return model, seen


@given(layouts())
def test_the_block_that_a_rank_holds_is_the_chunk_of_the_dense_fused_tensor(drawn):
    config, tensor_parallel = drawn
    layout = ParallelLayout(tensor=tensor_parallel, vocab_divisible_by=4)
    layout.check(config)
    full_tensors = fused_model(config, labelled_model(config), layout.padded_vocab(config.vocab_size))
    assert {(t.name, layer) for t, layer in all_tensors(config)} == set(full_tensors)
    for tensor, layer in all_tensors(config):
        full = full_tensors[tensor.name, layer]
        assert tensor.full_shape(config, layout) == tuple(full.shape)
        for rank in range(tensor_parallel):
            held = shard(tensor, tuple(full.shape), tensor_parallel, rank)
            expected = rank_part(tensor.name, full, tensor_parallel, rank)
            assert held.shape == (expected.shape[0], expected.shape[1] if expected.dim() == 2 else 1)
            assert torch.equal(held_part(full, held), expected)


@given(layouts())
def test_the_blocks_of_all_ranks_hold_every_element_of_every_role_once(drawn):
    config, tensor_parallel = drawn
    layout = ParallelLayout(tensor=tensor_parallel, vocab_divisible_by=3)
    model = labelled_model(config)
    found, seen = rebuild(config, fused_model(config, model, layout.padded_vocab(config.vocab_size)), layout)
    assert all(torch.equal(found[t], model[t]) for t in model)
    assert all((count == 1).all() for count in seen.values())


@given(layouts(), st.randoms(use_true_random=False))
def test_shards_of_unequal_size_hold_every_element_once_too(drawn, chance):
    config, tensor_parallel = drawn
    layout = ParallelLayout(tensor=tensor_parallel, vocab_divisible_by=1)
    n, d = config.heads_per_group, config.kv_channels

    def split(count: int) -> list[int]:
        cuts = sorted(chance.randint(0, count) for _ in range(tensor_parallel - 1))
        return [high - low for low, high in zip([0, *cuts], [*cuts, count])]

    groups = [split(config.num_query_groups) for _ in range(config.num_layers)]
    ffn = [split(config.ffn_hidden_size) for _ in range(config.num_layers)]

    def sizes(tensor, layer):
        if layer is None or tensor.split == "none":
            return None
        if "qkv" in tensor.name:
            return [count * (n + 2) * d for count in groups[layer]]
        return [count * n * d for count in groups[layer]] if "proj" in tensor.name else ffn[layer]

    model = labelled_model(config)
    found, seen = rebuild(config, fused_model(config, model, layout.padded_vocab(config.vocab_size)), layout, sizes)
    assert all(torch.equal(found[t], model[t]) for t in model)
    assert all((count == 1).all() for count in seen.values())


def test_a_rank_of_fc1_holds_its_gate_rows_above_its_up_rows_and_not_a_cut_through_the_middle():
    config = dataclasses.replace(SMALL, ffn_hidden_size=6, qkv_bias=False, qk_norm=False)
    fc1 = next(t for t in layer_tensors(config) if t.name == "mlp.linear_fc1.weight")
    held = shard(fc1, (12, 20), 3, 1)
    assert [list(part) for part in held.rows] == [[2, 3], [8, 9]]
    assert [(b.role, b.stored_row, b.row, b.rows) for b in patches(fc1, config, 12, held)] == [("gate", 0, 2, 2), ("up", 2, 2, 2)]


def test_padding_rows_of_the_vocabulary_belong_to_no_role():
    layout = ParallelLayout(tensor=2, vocab_divisible_by=16)
    embedding = outer_tensors(SMALL)[0]
    assert embedding.full_shape(SMALL, layout) == (32, 20)
    spans = list(embedding.spans(SMALL, 32))
    assert [(s.role, s.start, s.size) for s in spans] == [("embedding", 0, 29), (None, 0, 3)]
    last = list(patches(embedding, SMALL, 32, shard(embedding, (32, 20), 2, 1)))
    assert [(b.row, b.rows) for b in last] == [(16, 13)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_ranges_of_ranks_follow_each_other_and_have_the_asked_sizes(sizes):
    ranges = rank_ranges(sizes)
    assert [len(part) for part in ranges] == sizes
    assert [unit for part in ranges for unit in part] == list(range(sum(sizes)))


@given(st.integers(1, 300_000), st.integers(1, 16), st.integers(1, 512))
def test_the_padded_vocabulary_is_the_smallest_multiple_that_holds_it(vocab, tensor, divisible):
    padded = ParallelLayout(tensor=tensor, vocab_divisible_by=divisible).padded_vocab(vocab)
    assert padded % (tensor * divisible) == 0 and 0 <= padded - vocab < tensor * divisible


@given(st.integers(1, 6), st.integers(1, 8))
def test_pipeline_stages_hold_consecutive_layers_and_stage_of_is_the_inverse(stages, each):
    layout, count = ParallelLayout(pipeline=stages), stages * each
    held = [layout.stage_layers(stage, count) for stage in range(stages)]
    assert [layer for layers in held for layer in layers] == list(range(count))
    assert all(layout.stage_of(layer, count) == stage for stage, layers in enumerate(held) for layer in layers)


@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(1, 4),
)
def test_a_layout_is_accepted_exactly_where_megatron_core_accepts_it(groups, n, d, ffn, layers, tensor, pipeline):
    heads = groups * n
    config = dataclasses.replace(
        SMALL, num_attention_heads=heads, num_query_groups=groups, kv_channels=d, ffn_hidden_size=ffn, num_layers=layers
    )
    fits = heads % tensor == 0 and (groups % tensor == 0 or tensor % groups == 0) and ffn % tensor == 0
    fits = fits and (heads + 2 * groups) * d % tensor == 0 and layers % pipeline == 0
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
    if fits:
        layout.check(config)
    else:
        with pytest.raises(InputError):
            layout.check(config)


def test_a_layout_that_does_not_fit_is_refused_with_every_reason_and_the_sizes_that_do():
    with pytest.raises(InputError) as error:
        ParallelLayout(tensor=5, pipeline=3).check(SMALL)
    text = str(error.value)
    for part in ("12 attention heads", "6 KV groups", "48 fused QKV rows", "24 FFN channels", "4 layers", "[1, 2, 4]"):
        assert part in text
    assert "[1, 2, 3, 6, 12]" in text


@pytest.mark.parametrize("name", ["tensor", "pipeline", "vocab_divisible_by"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True, None])
def test_a_layout_of_sizes_that_are_not_positive_integers_is_refused(name, value):
    with pytest.raises(InputError, match=name):
        ParallelLayout(**{name: value})


@pytest.mark.parametrize("name", SHAPE_FIELDS)
@pytest.mark.parametrize("value", [0, -4, 2.0, "8", True, None])
def test_a_model_of_sizes_that_are_not_positive_integers_is_refused(name, value):
    with pytest.raises(CheckpointError, match=name):
        dataclasses.replace(SMALL, **{name: value})


def test_heads_that_do_not_divide_over_the_kv_groups_are_refused():
    with pytest.raises(CheckpointError, match="12 heads, 5 groups"):
        dataclasses.replace(SMALL, num_query_groups=5)


@pytest.mark.parametrize(
    "scaling", [None, RopeScaling(kind="linear", factor=2.5), RopeScaling(kind="llama3", factor=8.0, low_freq_factor=2.0)]
)
def test_a_model_description_comes_back_from_json(scaling):
    config = dataclasses.replace(SMALL, rope_scaling=scaling, sliding_window=7, rotary_base=5e5)
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(experts=8),
        lambda data: data.pop("hidden_size"),
        lambda data: data.update(rope_scaling={"kind": "linear"}),
        lambda data: data.update(rope_scaling={"kind": "linear", "factor": 2, "beta": 1}),
        lambda data: data.update(rope_scaling="linear"),
        lambda data: data.update(num_layers="4"),
    ],
)
def test_a_damaged_model_description_is_refused(change):
    data = SMALL.to_json()
    change(data)
    with pytest.raises(CheckpointError):
        ModelConfig.from_json(data)


@given(layouts())
def test_the_tensor_table_lists_every_role_tensor_with_its_shape(drawn):
    config, _ = drawn
    expected = role_shapes(config)
    assert len(tensor_ids(config)) == len(expected) and set(tensor_ids(config)) == set(expected)
    assert all(tensor_shape(t.role, config) == shape for t, shape in expected.items())
    assert parameter_count(config) == sum(torch.Size(shape).numel() for shape in expected.values())


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_as_transformers_counts_them(family, tied):
    from transformers import AutoModelForCausalLM

    from megatron_prune.families.family import FAMILIES

    hf = tiny_config(family, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    assert parameter_count(FAMILIES.get(family).model_config(hf.to_dict())) == model.num_parameters()


# ------------------------------------------------------------------------------------------------------------- axes


@pytest.mark.parametrize("name", AXES.names())
@given(layouts(), st.integers(1, 7))
def test_ranks_share_the_units_of_every_axis_without_gap_or_overlap(name, drawn, ranks):
    config, axis = drawn[0], AXES.get(name)
    held = [axis.local_units(config, rank, ranks) for rank in range(ranks)]
    if axis.sharded:
        assert [unit for part in held for unit in part] == list(range(axis.count(config)))
    else:
        assert held == [range(axis.count(config))] * ranks


@given(layouts())
def test_ranks_share_units_as_megatron_does_where_they_divide(drawn):
    config, ranks = drawn
    sizes = {"ffn": config.ffn_hidden_size}
    if config.num_query_groups % ranks == 0:
        sizes |= {"kv_head": config.num_query_groups, "head": config.num_attention_heads}
    for name, count in sizes.items():
        for rank in range(ranks):
            each = count // ranks
            assert AXES.get(name).local_units(config, rank, ranks) == range(rank * each, (rank + 1) * each)


@given(layouts(), st.integers(1, 7))
def test_query_heads_are_on_the_rank_of_their_kv_group(drawn, ranks):
    config = drawn[0]
    for rank in range(ranks):
        groups = AXES.get("kv_head").local_units(config, rank, ranks)
        heads = AXES.get("head").local_units(config, rank, ranks)
        assert sorted({head // config.heads_per_group for head in heads}) == list(groups)
        assert len(heads) == len(groups) * config.heads_per_group


@pytest.mark.parametrize("name", AXES.names())
def test_the_units_of_every_axis_own_whole_dimensions(name):
    axis = AXES.get(name)
    for label, each in axis.owns(SMALL).items():
        assert each * axis.count(SMALL) == SMALL.dims[label]


def test_every_prunable_axis_is_found():
    assert AXES.names() == ["ffn", "head", "hidden", "kv_head", "layer"]
