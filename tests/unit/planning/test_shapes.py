"""Budgets: read, turned into every maximal shape that meets them, and ranked."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from unittest import mock

import pytest
import torch
from dense import SMALL
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.errors import InputError
from megatron_prune.families.family import FAMILIES
from megatron_prune.planning import loss_weights as ranking
from megatron_prune.planning import shapes as grid
from megatron_prune.planning.budget import Budget, parameters, parse_bytes, parse_count, read_budget
from megatron_prune.planning.loss_estimate import loss_estimate
from megatron_prune.planning.loss_weights import LOSS_WEIGHTS, cut_axes, even_loss, rank_candidates
from megatron_prune.planning.multiples import VARIED, check_multiples, parse_multiples
from megatron_prune.planning.shapes import LIMIT, candidates
from megatron_prune.planning.target import PRUNE_TYPES, check_parallel

FIELDS = {
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "head": "num_attention_heads",
    "kv_head": "num_query_groups",
    "layer": "num_layers",
}
SMOL = ModelConfig(
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=49152,
    tie_embeddings=True,
    norm_epsilon=1e-5,
)
LLAMA3_70B = ModelConfig(
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    tie_embeddings=False,
    norm_epsilon=1e-5,
)


def sizes(config: ModelConfig) -> tuple[int, ...]:
    return tuple(getattr(config, field) for field in FIELDS.values())


def heads_divide_hidden(config: ModelConfig) -> bool:
    return config.hidden_size % config.num_attention_heads == 0


def expressible(family: str):
    def legal(config: ModelConfig) -> bool:
        try:
            FAMILIES.get(family).check_expressible(config)
        except InputError:
            return False
        return True

    return legal


def divides(old: ModelConfig, new: ModelConfig, layout: ParallelLayout, prune_type: str) -> bool:
    try:
        check_parallel(old, new, layout, prune_type)
    except InputError:
        return False
    return True


def find(config=SMALL, budget=None, *, multiple_of=None, tensor=1, pipeline=1, prune_type="global", legal=None, **more):
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
    legal = legal or (lambda config: True)
    return candidates(config, budget, multiple_of=multiple_of or {}, layout=layout, prune_type=prune_type, legal=legal, **more)


def undominated(shapes: list[ModelConfig]) -> set[ModelConfig]:
    front: dict[tuple[int, ...], ModelConfig] = {}
    for shape in sorted(shapes, key=lambda shape: sum(sizes(shape)), reverse=True):
        if not any(all(x >= y for x, y in zip(larger, sizes(shape))) for larger in front):
            front[sizes(shape)] = shape
    return set(front.values())


def budgets(config: ModelConfig):
    total = parameter_count(config)
    return st.one_of(
        st.builds(Budget, params=st.integers(1, total - 1)),
        st.builds(Budget, ratio=st.floats(0.01, 0.99)),
        st.builds(Budget, memory=st.integers(total, 3 * total), seq_length=st.integers(1, 50), batch=st.integers(1, 3)),
    )


# ------------------------------------------------------------------------------------------------------------- the grid


def brute_force(config, budget, steps, axes, layout, prune_type, legal):
    """Every shape in the box, by plain enumeration; of those that meet the budget, the ones nothing surpasses."""
    own, limit = dict(zip(FIELDS, sizes(config))), budget.limit(config)
    for floors in (dict(hidden=1 / 2, ffn=1 / 4, head=1 / 2, kv_head=1 / 2, layer=1 / 2), dict.fromkeys(FIELDS, 0)):
        box = {
            name: [n for n in range(1, size + 1) if n == size or n % steps[name] == 0 and n >= size * floors[name]]
            if name in axes
            else [size]
            for name, size in own.items()
        }
        box["head"] = [n for n in range(1, own["head"] + 1) if n == own["head"] or n % steps["head"] == 0]
        found = []
        for values in product(*box.values()):
            named = dict(zip(box, values))
            each, old_each = named["head"] / named["kv_head"], own["head"] // own["kv_head"]
            if each != int(each) or each > old_each or each < old_each * floors["head"]:
                continue
            if "head" not in axes and each != old_each:
                continue
            shape = replace(config, **{FIELDS[name]: value for name, value in named.items()})
            if budget.cost(shape) <= limit and legal(shape) and divides(config, shape, layout, prune_type):
                found.append(shape)
        if found:
            return undominated(found)
    return set()


@settings(max_examples=20)
@given(st.data())
def test_candidates_are_those_that_trying_every_shape_finds(data):
    config = replace(SMALL, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=8, hidden_size=8)
    tensor, pipeline = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)]))
    steps = {
        "hidden": data.draw(st.sampled_from([1, 2, 3])),
        "ffn": data.draw(st.sampled_from([1, 2, 3])),
        "head": data.draw(st.sampled_from([1, 2, 3])),
        "kv_head": data.draw(st.sampled_from([1, 2])),
        "layer": data.draw(st.sampled_from([1, 2])),
    }
    axes = tuple(data.draw(st.sets(st.sampled_from(VARIED), min_size=1)))
    legal = data.draw(st.sampled_from([lambda config: True, heads_divide_hidden]))
    prune_type = data.draw(st.sampled_from(PRUNE_TYPES))
    budget = data.draw(budgets(config))
    assume(budget.cost(config) > budget.limit(config))
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
    expected = brute_force(config, budget, steps, axes, layout, prune_type, legal)
    ask = dict(multiple_of=steps, tensor=tensor, pipeline=pipeline, prune_type=prune_type, legal=legal, axes=axes)
    with mock.patch.object(grid, "LIMIT", 10**6):
        if expected:
            found = find(config, budget, **ask)
            assert set(found) == expected and len(found) == len(expected)
        else:
            with pytest.raises(InputError, match="no shape meets the budget"):
                find(config, budget, **ask)


@settings(max_examples=10)
@given(st.data())
def test_every_candidate_meets_the_budget_is_legal_on_the_ranks_and_surpassed_by_none(data):
    tensor, pipeline = data.draw(st.sampled_from([(1, 1), (3, 1), (3, 2), (1, 5)]))
    family, prune_type = data.draw(st.sampled_from(["llama", "mistral"])), data.draw(st.sampled_from(PRUNE_TYPES))
    multiples = data.draw(st.sampled_from([{}, {"hidden": 64, "ffn": 128}, {"layer": 2}, {"head": 3, "kv_head": 1}]))
    total = parameter_count(SMOL)
    budget = data.draw(
        st.one_of(
            st.builds(Budget, params=st.integers(total // 8, total - 1)),
            st.builds(Budget, ratio=st.floats(0.01, 0.85)),
            st.builds(Budget, memory=st.integers(total // 4, 2 * total), batch=st.integers(1, 4)),
        )
    )
    ask = dict(multiple_of=multiples, tensor=tensor, pipeline=pipeline, prune_type=prune_type, legal=expressible(family))
    found = find(SMOL, budget, **ask)
    assert 1 <= len(found) <= LIMIT
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
    for shape in found:
        assert shape != SMOL
        assert budget.cost(shape) <= budget.limit(SMOL)
        assert divides(SMOL, shape, layout, prune_type) and expressible(family)(shape)
        if prune_type != "unbalance":
            layout.check(shape)
        check_multiples(SMOL, shape, multiples)
        others = (shape.num_attention_heads % shape.num_query_groups, shape.kv_channels, shape.vocab_size)
        assert others == (0, SMOL.kv_channels, SMOL.vocab_size)
    assert undominated(found) == set(found)
    assert [parameters(shape) for shape in found] == sorted(map(parameters, found), reverse=True)


def test_the_largest_models_have_few_candidates_soon():
    found = find(LLAMA3_70B, Budget(ratio=0.25), tensor=8, pipeline=4, legal=expressible("llama"))
    assert 10 < len(found) <= LIMIT
    assert {shape.num_layers % 4 for shape in found} == {0} and {shape.ffn_hidden_size % 32 for shape in found} == {0}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_hidden_is_among_what_is_cut_where_the_family_divides_it_by_heads_too(family):
    found = find(SMOL, Budget(params=101_900_000), legal=expressible(family))
    cut = {axis for shape in found for axis in cut_axes(SMOL, shape)}
    assert cut == set(VARIED)
    assert any("hidden" in cut_axes(SMOL, shape) and shape.num_attention_heads == 9 for shape in found)


def test_only_the_named_axes_are_cut():
    (shape,) = find(SMOL, Budget(params=101_900_000), axes=("ffn",))
    assert shape == replace(SMOL, ffn_hidden_size=896)
    (shape,) = find(SMOL, Budget(params=115_000_000), axes=("layer",))
    assert shape == replace(SMOL, num_layers=24)
    (shape,) = find(SMOL, Budget(params=128_000_000), axes=("head", "kv_head"))
    assert shape == replace(SMOL, num_attention_heads=6, num_query_groups=3)


def test_sizes_go_below_their_usual_least_only_where_nothing_else_meets_the_budget():
    (shape,) = find(SMOL, Budget(params=60_000_000), axes=("ffn",))
    assert shape.ffn_hidden_size < 1536 // 4
    assert all(shape.num_layers >= 15 for shape in find(SMOL, Budget(params=60_000_000)))


def test_memory_counts_weights_and_the_cache_of_keys_and_values():
    budget = Budget(memory=10**9, seq_length=100, batch=3, dtype_bytes=4)
    assert budget.cost(SMOL) == 4 * 134_515_008 + 4 * 2 * 30 * 3 * 64 * 100 * 3
    longer = replace(budget, seq_length=10_000)
    assert longer.cost(SMOL) - budget.cost(SMOL) == 4 * 2 * 30 * 3 * 64 * 9_900 * 3
    assert Budget(memory=10**9).cost(SMOL) == 2 * 134_515_008 + 2 * 2 * 30 * 3 * 64 * 4096


def test_a_long_cache_is_met_by_fewer_groups_or_layers():
    found = find(SMOL, Budget(memory=2 * 134_515_008, seq_length=8192, batch=8))
    assert found and all(shape.num_query_groups < 3 or shape.num_layers < 30 for shape in found)


@pytest.mark.parametrize("ratio, share", [(0.25, (3, 4)), (0.1, (9, 10)), (0.9, (1, 10)), (0.3, (7, 10))])
def test_a_ratio_is_the_share_that_goes_without_rounding_errors(ratio, share):
    total = parameter_count(SMOL)
    assert Budget(ratio=ratio).limit(SMOL) == total * share[0] // share[1]


@given(st.integers(1, 9), st.booleans())
def test_parameters_are_those_of_the_tensor_table(layers, tied):
    config = replace(SMALL, num_layers=layers, tie_embeddings=tied)
    assert parameters(config) == parameter_count(config)


# -------------------------------------------------------------------------------------------------------------- options


@given(st.integers(1, 10**6), st.sampled_from([("", 1), ("K", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12)]))
def test_counts_read_back_what_was_written(number, unit):
    for text in (f"{number}{unit[0]}", f" {number} {unit[0].lower()} "):
        assert parse_count(text) == number * unit[1]


BINARY = [(f"{letter}iB", 1024 ** (n + 1)) for n, letter in enumerate("KMGT")]
DECIMAL = [(letter + end, 1000 ** (n + 1)) for n, letter in enumerate("KMGT") for end in ("", "B")]


@given(st.integers(1, 10**6), st.sampled_from([("", 1), ("B", 1), *BINARY, *DECIMAL]))
def test_sizes_read_back_what_was_written(number, unit):
    for text in (f"{number}{unit[0]}", f" {number} {unit[0].lower()} "):
        assert parse_bytes(text) == number * unit[1]


@given(st.dictionaries(st.sampled_from(VARIED), st.integers(1, 10**4), min_size=1))
def test_multiples_read_back_what_was_written(steps):
    assert parse_multiples(",".join(f"{name}={step}" for name, step in steps.items())) == steps


def test_broken_numbers_are_exact_and_rounded_down():
    assert (parse_count("1.5B"), parse_count("0.1M"), parse_count("1.0009K")) == (1_500_000_000, 100_000, 1000)
    assert (parse_count("12e9"), parse_count("1.25E+3")) == (12_000_000_000, 1250)
    assert (parse_bytes("1.5GiB"), parse_bytes("2.3MB"), parse_bytes("1.0009KB")) == (
        1_610_612_736,
        2_300_000,
        1000,
    )


@pytest.mark.parametrize("text", ["", "M", "-1M", "0", "0.0B", "1e", "1e-6", "e6", "90MB", "1,5B", "1.5.B", "٣M", "nan", "0.5"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(InputError, match="--params\n.*got: "):
        parse_count(text)


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e6", "2iB", "2 X", "1,5GB", "2GBiB", "2GiBB", "0.5B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="--max-shard-size\n.*got: "):
        parse_bytes(text, "--max-shard-size")


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "axes and their steps"),
        ("hidden", "axes and their steps"),
        ("hidden=64,", "axes and their steps"),
        ("hidden=1.5", "axes and their steps"),
        ("hidden=-64", "axes and their steps"),
        ("hidden=64,hidden=32", "hidden twice"),
        ("width=64", "unknown axis 'width', needed one of hidden, ffn"),
        ("vocab=64", "unknown axis 'vocab'"),
        ("ffn=0", "ffn=0 is not a positive number"),
    ],
)
def test_what_are_no_multiples_is_refused(text, word):
    with pytest.raises(InputError, match=word):
        parse_multiples(text)


def test_options_make_a_budget_or_none():
    at = dict(seq_length=4096, batch=1, dtype_bytes=2)
    assert read_budget(params=None, ratio=None, memory=None, **at) is None
    assert read_budget(params="90M", ratio=None, memory=None, **at) == Budget(params=90_000_000)
    assert read_budget(params=None, ratio=0.25, memory=None, **at) == Budget(ratio=0.25)
    assert read_budget(params=None, ratio=None, memory="2GiB", **at) == Budget(memory=2 << 30)
    with pytest.raises(InputError, match="--params and --memory"):
        read_budget(params="90M", ratio=None, memory="2GiB", **at)


@pytest.mark.parametrize(
    "ask, word",
    [
        ({}, "none of them"),
        (dict(params=1, ratio=0.5), "--params and --ratio"),
        (dict(params=1, ratio=0.5, memory=1), "--params and --ratio and --memory"),
        (dict(ratio=0.0), "--ratio\n  got: 0.0"),
        (dict(ratio=1.0), "between 0 and 1"),
        (dict(ratio=-0.5), "--ratio"),
        (dict(ratio=25), "--ratio"),
        (dict(ratio=math.nan), "--ratio"),
        (dict(params=0), "--params"),
        (dict(memory=-1), "--memory"),
        (dict(memory=1, seq_length=0), "--memory-seq-length"),
        (dict(memory=1, batch=0), "--memory-batch"),
    ],
)
def test_a_budget_is_one_number_in_range(ask, word):
    with pytest.raises(InputError, match=word):
        Budget(**ask)


# --------------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize("over", [0, 1, 10**9])
def test_a_budget_that_the_model_meets_is_refused_with_the_models_size(over):
    with pytest.raises(InputError, match="nothing to prune.*\n.*\n  needed: less than the model's 134,515,008 parameters"):
        find(SMOL, Budget(params=134_515_008 + over))


def test_a_budget_that_no_shape_meets_names_the_smallest_shape():
    with pytest.raises(InputError) as error:
        find(SMOL, Budget(params=1000), axes=("ffn",), multiple_of={"ffn": 512})
    smallest = replace(SMOL, ffn_hidden_size=512)
    assert f"at most 1,000 parameters\n  needed: at least {parameter_count(smallest):,} parameters" in str(error.value)
    assert "hidden 576, ffn 512, head 9, kv_head 3, layer 30" in str(error.value)
    found = find(SMOL, Budget(params=parameter_count(smallest)), axes=("ffn",), multiple_of={"ffn": 512})
    assert found == [smallest]


@settings(max_examples=20)
@given(budgets(SMALL), st.sampled_from([(1, 1), (2, 2), (3, 1), (6, 4)]), st.sampled_from(PRUNE_TYPES))
def test_the_named_nearest_is_what_can_be_reached(budget, ranks, prune_type):
    ask = dict(tensor=ranks[0], pipeline=ranks[1], prune_type=prune_type)
    try:
        find(SMALL, replace(budget, ratio=None, memory=None, params=1), **ask)
    except InputError as error:
        least = int(str(error).split("at least ")[1].split(" parameters")[0].replace(",", ""))
    assert all(parameters(shape) == least for shape in find(SMALL, Budget(params=least), **ask))
    with pytest.raises(InputError, match=f"at least {least:,} parameters"):
        find(SMALL, Budget(params=least - 1), **ask)


def test_a_memory_budget_tells_bytes_and_where():
    with pytest.raises(InputError, match=r"at least [0-9,]+ bytes of weights, keys and values at 2 × 512 tokens"):
        find(SMOL, Budget(memory=1000, seq_length=512, batch=2))


def test_no_legal_shape_is_told():
    with pytest.raises(InputError, match="no shape of these multiples is legal"):
        find(SMOL, Budget(ratio=0.5), legal=lambda config: False)


def test_a_budget_and_exact_sizes_are_refused_together():
    with pytest.raises(InputError, match="a budget and --hidden-size-remain, --drop-layers both say what stays"):
        find(SMOL, Budget(ratio=0.5), fixed={"hidden_size_remain": 512, "drop_layers": (1,), "num_layers_remain": None})
    assert find(SMOL, Budget(ratio=0.5), fixed={"hidden_size_remain": None})


@pytest.mark.parametrize(
    "multiples, word",
    [
        ({"hidden": 577}, "hidden=577 is larger than the model's 576"),
        ({"head": 10}, "head=10 is larger than the model's 9"),
        ({"layer": 0}, "layer=0 is not a positive number"),
        ({"depth": 2}, "unknown axis 'depth'"),
    ],
)
def test_steps_that_no_size_can_have_are_refused(multiples, word):
    with pytest.raises(InputError, match=word):
        find(SMOL, Budget(ratio=0.5), multiple_of=multiples)
    with pytest.raises(InputError, match=word):
        check_multiples(SMOL, SMOL, multiples)


@pytest.mark.parametrize("axes", [(), ("vocab",), ("ffn", "width")])
def test_axes_that_a_budget_cannot_cut_are_refused(axes):
    with pytest.raises(InputError, match="some of hidden, ffn, head, kv_head, layer"):
        find(SMOL, Budget(ratio=0.5), axes=axes)


def test_a_layout_that_does_not_divide_the_model_is_refused():
    with pytest.raises(InputError, match="does not divide over TP 2"):
        find(SMOL, Budget(ratio=0.5), tensor=2)


@pytest.mark.parametrize(
    "ask, nearest",
    [
        ({"hidden_size": 500}, "hidden_size_remain 500 is not a multiple of 64; nearest: 448 or 512"),
        ({"hidden_size": 10}, "nearest: 64"),
        ({"ffn_hidden_size": 1500}, "ffn_hidden_size_remain 1500 is not a multiple of 1000; nearest: 1000 or 1536"),
    ],
)
def test_exact_sizes_that_are_no_multiples_are_refused_with_the_nearest(ask, nearest):
    with pytest.raises(InputError, match=nearest):
        check_multiples(SMOL, replace(SMOL, **ask), {"hidden": 64, "ffn": 1000})


def test_exact_sizes_that_are_multiples_or_do_not_change_pass():
    check_multiples(SMOL, replace(SMOL, hidden_size=512), {"hidden": 128, "ffn": 1000, "layer": 7})


# -------------------------------------------------------------------------------------------------------------- ranking


def score_keys(config: ModelConfig) -> dict[tuple[str, int | None], int]:
    own = dict(zip(FIELDS, sizes(config)))
    whole = {("hidden", None): own["hidden"], ("layer", None): own["layer"]}
    return whole | {(axis, n): own[axis] for axis in ("ffn", "kv_head", "head") for n in range(own["layer"])}


def random_scores(seed: int, config: ModelConfig = SMALL):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda count: torch.randn(count, generator=generator, dtype=torch.float64).exp()
    return {key: draw(count) for key, count in score_keys(config).items()}


def even_scores(config: ModelConfig, value: float = 1.0):
    return {key: torch.full((count,), value, dtype=torch.float64) for key, count in score_keys(config).items()}


@st.composite
def shapes(draw, largest: ModelConfig = SMALL):
    groups, each = draw(st.integers(1, largest.num_query_groups)), draw(st.integers(1, largest.heads_per_group))
    return replace(
        largest,
        hidden_size=draw(st.integers(1, largest.hidden_size)),
        ffn_hidden_size=draw(st.integers(1, largest.ffn_hidden_size)),
        num_layers=draw(st.integers(1, largest.num_layers)),
        num_attention_heads=groups * each,
        num_query_groups=groups,
    )


@given(shapes(), st.data(), st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0]))
def test_cutting_more_never_lowers_the_estimate(shape, data, seed, even):
    smaller = data.draw(shapes(shape))
    scores = random_scores(seed)
    if data.draw(st.booleans()):
        scores |= {key: values - 1 for key, values in scores.items()}  # some below zero
    more, less = (loss_estimate(SMALL, scores, even=even)(new) for new in (smaller, shape))
    assert more >= less >= 0
    if cut_axes(shape, smaller) and even:
        assert more > less


def test_nothing_cut_costs_nothing():
    assert loss_estimate(SMALL, {})(SMALL) == 0


@pytest.mark.parametrize("value", [3.0, 0.0, -1.0])
def test_even_scores_cost_the_share_of_units(value):
    new = replace(SMALL, ffn_hidden_size=18, num_layers=3, num_attention_heads=3, num_query_groups=3)
    expected = LOSS_WEIGHTS["ffn"] * -math.log(18 / 24) + LOSS_WEIGHTS["layer"] * -math.log(3 / 4)
    expected += (LOSS_WEIGHTS["kv_head"] + LOSS_WEIGHTS["head"]) * -math.log(1 / 2)
    assert loss_estimate(SMALL, even_scores(SMALL, value))(new) == pytest.approx(expected)
    assert loss_estimate(SMALL, random_scores(0), even=1.0)(new) == pytest.approx(expected)


def test_the_best_units_stay_and_each_layer_counts_the_same():
    scores = {("ffn", n): torch.ones(24) for n in range(4)}
    scores["ffn", 2] = torch.zeros(24)
    scores["ffn", 2][5] = 1000.0
    new = replace(SMALL, ffn_hidden_size=6)
    assert loss_estimate(SMALL, scores)(new) == pytest.approx(LOSS_WEIGHTS["ffn"] * -math.log((3 * 6 / 24 + 1) / 4))
    heads = {("head", n): torch.tensor([1.0, 3.0] * 6) for n in range(4)}
    new = replace(SMALL, num_attention_heads=6)
    assert loss_estimate(SMALL, heads)(new) == pytest.approx(LOSS_WEIGHTS["head"] * -math.log(3 / 4))


def test_the_measured_shapes_cost_about_what_was_measured():
    """``docs/quality.md``: perplexities on the text of the calibration's kind, dense 42.5."""
    measured = {(30, 576, 1152): 59.3, (30, 512, 1536): 60.2, (24, 576, 1536): 56.6, (30, 512, 1152): 79.7, (22, 576, 1408): 69.8}
    for (layers, hidden, ffn), perplexity in measured.items():
        new = replace(SMOL, num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn)
        ratio = loss_estimate(SMOL, even_scores(SMOL))(new) / math.log(perplexity / 42.5)
        assert 0.95 < ratio < 1.14


@pytest.mark.parametrize("broken", [torch.full((24,), math.nan), torch.full((24,), math.inf), torch.ones(23), None])
def test_scores_that_are_missing_or_broken_are_refused_by_axis_and_layer(broken):
    scores = random_scores(0)
    scores["ffn", 2] = broken
    with pytest.raises(InputError, match="scores of ffn in layer 2"):
        loss_estimate(SMALL, scores)(replace(SMALL, ffn_hidden_size=6))
    loss_estimate(SMALL, scores)(replace(SMALL, hidden_size=6))


def test_candidates_are_ranked_by_loss_then_parameters_then_axes_and_nan_comes_last():
    one, two = replace(SMALL, ffn_hidden_size=12), replace(SMALL, num_layers=3)
    both, tiny = replace(one, num_layers=3), replace(SMALL, num_layers=1)
    losses = {one: 1.0, two: 1.0, both: 0.5, tiny: math.nan}
    larger, smaller = sorted((one, two), key=parameters, reverse=True)
    ranked = rank_candidates(SMALL, [tiny, smaller, larger, both], losses.get)
    assert ranked == [(0.5, both), (1.0, larger), (1.0, smaller), (math.inf, tiny)]


def test_of_equal_loss_and_parameters_the_one_with_fewer_axes_cut_comes_first():
    by_heads = replace(SMALL, num_attention_heads=6)
    with mock.patch.object(ranking, "parameters", lambda shape: 1):
        many = replace(by_heads, hidden_size=10)
        assert rank_candidates(SMALL, [many, by_heads], lambda shape: 0.0) == [(0.0, by_heads), (0.0, many)]


def test_query_heads_that_go_with_their_group_are_not_an_axis_of_their_own():
    assert cut_axes(SMALL, replace(SMALL, num_attention_heads=8, num_query_groups=4)) == ["kv_head"]
    assert cut_axes(SMALL, replace(SMALL, num_attention_heads=6)) == ["head"]
    assert cut_axes(SMALL, replace(SMALL, num_attention_heads=3, num_query_groups=3, hidden_size=5)) == [
        "hidden",
        "head",
        "kv_head",
    ]


def test_at_even_scores_the_estimate_is_that_of_sizes_alone():
    """What ``estimate`` takes to be the shape that a budget will lead to."""
    scores = {("hidden", None): torch.ones(SMALL.hidden_size)}
    for layer in range(SMALL.num_layers):
        scores |= {("ffn", layer): torch.full((SMALL.ffn_hidden_size,), 3.0), ("head", layer): torch.ones(12)}
        scores |= {("kv_head", layer): torch.ones(6)}
    scores["layer", None] = torch.ones(SMALL.num_layers)
    by_scores, by_sizes = loss_estimate(SMALL, scores, even=0.5), even_loss(SMALL)
    for sizes in (
        {"ffn_hidden_size": 18},
        {"hidden_size": 12, "num_layers": 3},
        {"num_attention_heads": 6, "num_query_groups": 3},
    ):
        shape = replace(SMALL, **sizes)
        assert by_sizes(shape) == pytest.approx(by_scores(shape))
