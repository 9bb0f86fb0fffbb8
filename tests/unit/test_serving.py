"""What runtimes load, and ``--serve``."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from per_layer import like_tiny

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.errors import InputError
from megatron_prune.families.choice import choose_family
from megatron_prune.families.family import FAMILIES
from megatron_prune.planning.allocators.free import sizes
from megatron_prune.planning.budget import Budget, parameters
from megatron_prune.pruning.allocation import AllocationOptions, read_bounds
from megatron_prune.pruning.request import read_request
from megatron_prune.pruning.options import TargetOptions
from megatron_prune.serving import tensor_parallel
from megatron_prune.serving.demand import Demand, served_by, warnings
from megatron_prune.serving.options import parse_serve
from megatron_prune.serving.pre_tokenizer import NAMES, UNKNOWN, advice, pre_tokenizer_of
from megatron_prune.serving.runtime import RUNTIMES

DOC = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


def model(family: str = "qwen2", **changes) -> ModelConfig:
    """Of the sizes of Qwen2.5-0.5B, in four layers."""
    sizes = {"hidden_size": 896, "ffn_hidden_size": 4864, "num_attention_heads": 14, "num_query_groups": 2, "kv_channels": 64}
    return dataclasses.replace(like_tiny(family), **{**sizes, "vocab_size": 151936, **changes})


def demand(family: str = "qwen2", serve: str = "", target: str | None = None, config: ModelConfig | None = None) -> Demand:
    runtimes, ranks = parse_serve(serve) if serve else ((), ())
    chosen = choose_family(FAMILIES.get(family), target, config or model(family))
    return Demand(family=chosen, runtimes=runtimes, ranks=ranks)


# ------------------------------------------------------------------------------------------------------------ the table


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_table_of_the_document_says_what_the_code_says():
    """Every rule is a row of the table behind ``<!-- rules -->``, and no row is more."""
    (_, _, *rows) = cells(DOC.read_text(encoding="utf-8").partition("<!-- rules -->")[2].partition("\n\n")[0])
    said = [
        [RUNTIMES.get(name).title, ", ".join(f"`{kind}`" for kind in rule.of), rule.what, rule.then]
        for name in ("transformers", "transformers4", "vllm", "llamacpp")
        for rule in RUNTIMES.get(name).rules
    ]
    assert rows == said


@pytest.mark.parametrize("name", RUNTIMES.names())
def test_a_runtime_loads_every_family_at_its_own_sizes(name):
    for family in tiny.FAMILIES:
        config = model(family, num_attention_heads=14)
        if family == "gemma3_text":
            layers = [None if layer % 6 == 5 else 512 for layer in range(12)]
            config = dataclasses.replace(
                config.of_layers([0] * 12), softmax_scale=None, sliding_window=tuple(layers), rope_scaling=None
            )
        assert served_by(config, FAMILIES.get(family), None)[name] == []


@pytest.mark.parametrize(
    "family, target, changes, lost",
    [
        ("qwen2", None, {"num_attention_heads": 10}, {"vllm": "head_dim 64, not 896 // 10", "llamacpp": "not 10 heads × 64"}),
        ("qwen2", None, {"hidden_size": 900}, {"llamacpp": "hidden_size 900, not 14 heads × 64"}),
        ("qwen2", "llama", {"hidden_size": 896 - 14 * 8}, {}),
        ("qwen2", None, {"num_query_groups": 1}, {}),
        ("qwen3", None, {"num_attention_heads": 10, "hidden_size": 777}, {}),
        ("llama", None, {"ffn_hidden_size": (99, 4864, 4864, 4864)}, {"llamacpp": "a class that it does not have"}),
        (
            "llama",
            None,
            {"num_attention_heads": (14, 14, 0, 14), "num_query_groups": (2, 2, 0, 2)},
            {"vllm": r"no attention \(layer 2\)", "llamacpp": "a class that it does not have"},
        ),
        (
            "llama",
            "nemotron-nas",
            {"ffn_hidden_size": (4864, 4800, 0, 4608)},
            {
                "transformers": "class",
                "transformers4": "class",
                "llamacpp": r"ffn_hidden_size 4800, no multiple of 256 \(layer 1\).*is left out \(layer 2\)",
            },
        ),
    ],
)
def test_what_is_not_loaded_is_said_in_words_with_the_layers(family, target, changes, lost):
    config = model(family, **changes)
    found = served_by(config, choose_family(FAMILIES.get(family), target, config), None)
    assert {name for name, problems in found.items() if problems} == set(lost)
    assert all(re.search(word, "; ".join(found[name])) for name, word in lost.items())


def test_a_warning_names_the_runtime_and_what_it_would_load_and_is_of_what_the_cut_did_alone():
    before = model()
    (llama_cpp, vllm) = warnings(model(hidden_size=784), FAMILIES.get("qwen2"), None, before)
    assert "llama.cpp refuses it" in llama_cpp and "vLLM refuses it" in vllm
    assert all("it loads --target-family llama" in line and "the nearest shapes" in line for line in (llama_cpp, vllm))
    windowed = model("mistral", sliding_window=4096)
    assert warnings(windowed, FAMILIES.get("mistral"), None) and not warnings(
        dataclasses.replace(windowed, ffn_hidden_size=4000), FAMILIES.get("mistral"), None, windowed
    )


# ------------------------------------------------------------------------------------------------------------ --serve


def test_serve_is_read_as_runtimes_and_sizes_in_any_order():
    assert parse_serve("vllm,tp=4,8") == (("vllm",), (4, 8))
    assert parse_serve("tp=2, transformers4,llamacpp,tp=2,3") == (("transformers4", "llamacpp"), (2, 3))


@pytest.mark.parametrize("text", ["", "4", "vllm,4", "tp=", "tp=0", "tp=4,foo", "vllm tp=4", "tp=4,,8", "VLLM", "tp=-2"])
def test_another_word_is_refused_with_what_there_is(text):
    with pytest.raises(InputError, match="(?s)--serve.*llamacpp, transformers, transformers4, vllm, or tp="):
        parse_serve(text)


@given(
    heads=st.integers(1, 12),
    groups=st.integers(1, 12),
    width=st.integers(1, 512),
    tokens=st.integers(1, 400),
    ranks=st.integers(1, 9),
)
def test_ranks_share_what_divides(heads, groups, width, tokens, ranks):
    """As ``vllm/model_executor/layers/linear.py`` and ``vocab_parallel_embedding.py`` divide."""
    config = model(num_attention_heads=heads * groups, num_query_groups=groups, ffn_hidden_size=width, vocab_size=tokens)
    split = groups % ranks == 0 if groups >= ranks else ranks % groups == 0
    padded = next(rows for rows in range(tokens, tokens + 64) if rows % 64 == 0)
    shared = heads * groups % ranks == 0 and split and width % ranks == 0 and padded % ranks == 0
    assert (tensor_parallel.problems(config, ranks) == []) == shared


@pytest.mark.parametrize(
    "serve, asked, words",
    [
        ("tp=8", {"num_attention_heads": 14, "ffn_hidden_size": 4001}, ["num_attention_heads 8, ffn_hidden_size 4000", "4008"]),
        ("vllm", {"num_attention_heads": 10}, ["head_dim 64, not 896 // 10 heads: vLLM", "hidden_size 640"]),
        (
            "vllm",
            {"hidden_size": 784},
            ["needed: hidden_size 896 or num_attention_heads 12, hidden_size 768", "--target-family llama"],
        ),
        ("llamacpp", {"ffn_hidden_size": (4864, 4864, 999, 4864)}, ["a class that it does not have"]),
        ("tp=4", {"num_attention_heads": 12, "ffn_hidden_size": (4864, 4864, 999, 4864)}, [r"999.*by 4 \(layer 2\)"]),
    ],
)
def test_a_shape_that_cannot_be_served_is_refused_with_the_nearest(serve, asked, words):
    with pytest.raises(InputError) as refused:
        demand(serve=serve).check(model(**asked), model())
    assert all(re.search(word, str(refused.value), re.DOTALL) for word in words), refused.value


def test_a_model_that_cannot_be_cut_to_what_is_asked_says_what_may_be_asked():
    odd = model(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=4864, hidden_size=256)
    with pytest.raises(InputError, match=r"what to do: ask less, such as --serve vllm,tp=1,2,4$"):
        demand(serve="vllm,tp=4,6").check(odd)


@settings(max_examples=8)
@given(
    heads=st.sampled_from([2, 6, 10, 14]),
    width=st.integers(64, 4864),
    hidden=st.integers(64, 896),
    serve=st.sampled_from(["vllm", "llamacpp", "vllm,tp=2", "tp=2", "llamacpp,tp=2,transformers4"]),
)
def test_the_nearest_shapes_can_be_served_and_reached(heads, width, hidden, serve):
    asked, before, wanted = (
        model(num_attention_heads=heads, ffn_hidden_size=width, hidden_size=hidden),
        model(),
        demand(serve=serve),
    )
    for words in wanted.ways_out(asked, before)[0]:
        named = {field: int(size) for field, size in re.findall(r"(\w+) (\d+)", words)}
        shape = dataclasses.replace(asked, **named)
        assert not wanted.problems(shape)
        assert all(getattr(shape, field) <= getattr(before, field) for field in named)


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    groups=st.integers(1, 6),
    each=st.sampled_from([1, 2]),
    hidden=st.integers(100, 192),
    serve=st.sampled_from([None, "tp=2", "tp=4", "vllm", "vllm,llamacpp,tp=2"]),
)
def test_what_a_refusal_proposes_is_within_the_model_said_by_the_class_and_served(family, groups, each, hidden, serve):
    """A size that the class itself refuses, too: what is proposed in its place is no larger than the model and meets --serve."""
    before = model(family, **SMALL)
    asked = dataclasses.replace(before, num_attention_heads=groups * each, num_query_groups=groups, hidden_size=hidden)
    try:
        demand(family, serve=serve).check(asked, before)
    except InputError as refused:
        said = str(refused)
    else:
        return
    nearest = re.search(r"needed: (.*) \(the nearest\)", said)
    for words in nearest[1].rpartition("; ")[2].split(" or ") if nearest else ():
        named = {field: int(size) for field, size in re.findall(r"(\w+) (\d+)", words)}
        shape = dataclasses.replace(asked, **named)
        assert all(getattr(shape, field) <= getattr(before, field) for field in named)
        demand(family, serve=serve).check(shape, before)
    for name in re.findall(r"--target-family (\S+)", said.partition("what to do")[2]):
        demand(family, target=name, serve=serve).check(asked, before)


def test_a_shape_that_can_be_served_is_taken_and_so_is_any_without_serve():
    demand(serve="vllm,llamacpp,tp=2").check(model(num_attention_heads=12, hidden_size=768, ffn_hidden_size=4000), model())
    demand().check(model(num_attention_heads=10), model())


# ------------------------------------------------------------------------------------------------------------ budgets


SMALL = {
    "hidden_size": 192,
    "num_attention_heads": 12,
    "num_query_groups": 6,
    "kv_channels": 16,
    "ffn_hidden_size": 384,
    "vocab_size": 300,
}


def request(serve: str, family: str = "qwen2", target: str | None = None, **options):
    config = model(family, **SMALL)
    opened = SimpleNamespace(config=config, dtype=torch.bfloat16, identity="id")
    asked = TargetOptions(metric="magnitude", **options)
    wanted = demand(family, serve, target, config)
    return read_request(asked, opened, ParallelLayout(), wanted, prune_type="balance", has_text=False), wanted


@settings(max_examples=10)
@given(
    family=st.sampled_from(["qwen2", "qwen3", "llama", "mistral"]),
    ratio=st.floats(0.05, 0.8),
    serve=st.sampled_from(["vllm", "llamacpp", "vllm,llamacpp,tp=2", "tp=4", "tp=2,6", "tp=5"]),
)
def test_every_shape_within_a_budget_can_be_served(family, ratio, serve):
    try:
        found, wanted = request(serve, family, ratio=round(ratio, 3))
    except InputError as error:  # nothing is left that could be served
        assert "shape" in str(error)
        return
    assert found.shapes and not [shape for shape in found.shapes if wanted.problems(shape)]
    assert all(parameters(shape) <= found.bounds.budget.limit(found.bounds.config) for shape in found.shapes)


def test_without_serve_a_budget_leaves_shapes_that_are_not_loaded():
    found, _ = request("", ratio=0.3)
    assert [shape for shape in found.shapes if demand(serve="vllm").problems(shape)]


def test_exact_sizes_that_do_not_fit_are_refused_before_anything():
    with pytest.raises(
        InputError, match="(?s)--serve: .*ffn_hidden_size 301.*needed: ffn_hidden_size 302 or ffn_hidden_size 300"
    ):
        request("tp=2", family="qwen3", ffn_hidden_size_remain=301)
    request("vllm,tp=2", ffn_hidden_size_remain=300)


@pytest.mark.parametrize("serve, target, odd", [("tp=4", None, 0), ("llamacpp,tp=2", "nemotron-nas", 256), ("vllm", None, 0)])
def test_sizes_by_layer_are_those_that_can_be_served(serve, target, odd):
    config = model("llama", num_attention_heads=12, hidden_size=768, num_query_groups=4, ffn_hidden_size=1024)
    wanted = demand("llama", serve, target, config)
    bounds = read_bounds(
        AllocationOptions(allocate="free"),
        config,
        Budget(ratio=0.3, vocab_size=None),
        {"ffn": 2},
        ParallelLayout(),
        wanted,
        prune_type="balance",
    )
    ranks = wanted.ranks[0] if wanted.ranks else 1
    attention, gated = config.kinds
    widths = [kept["ffn"] for kept in sizes(bounds, config, gated, ("ffn",), may_go=True)]
    assert set(widths) - {0} == {width for width in range(2, 1025, 2) if width % ranks == 0 and (not odd or width % odd == 0)}
    assert (0 in widths) == ("llamacpp" not in serve)  # attention alone is lost
    pairs = [(kept["head"], kept["kv_head"]) for kept in sizes(bounds, config, attention, ("head", "kv_head"), may_go=True)]
    assert pairs and all(
        heads % ranks == 0 and (not groups or groups % ranks == 0 or ranks % groups == 0) for heads, groups in pairs
    )
    assert ((0, 0) in pairs) == (serve != "vllm")


# ------------------------------------------------------------------------------------------------------------ pre-tokenizers

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = GPT4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")


def split(expression: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


@pytest.mark.parametrize(
    "steps, whole, name",
    [
        ([{**LEVEL, "use_regex": True}], False, "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {**LEVEL, "use_regex": True}], False, "smollm"),
        ([split(QWEN2), {**LEVEL, "use_regex": False}], False, "qwen2"),
        ([split(LLAMA3), {**LEVEL, "use_regex": False}], True, "llama-bpe"),
        ([split(LLAMA3), {**LEVEL, "use_regex": False}], False, "smaug-bpe"),
        ([split(GPT4O), {**LEVEL, "use_regex": False}], False, "gpt-4o"),
        ([split(TEKKEN), {**LEVEL, "use_regex": False}], True, "tekken"),
        ([split(r"\d+"), {**LEVEL, "use_regex": False}], False, UNKNOWN),
        ([{**LEVEL, "add_prefix_space": True, "use_regex": True}], False, UNKNOWN),
        ([{"type": "Metaspace"}], False, None),
    ],
)
def test_a_pre_tokenizer_is_called_as_llama_cpp_calls_it(tmp_path, steps, whole, name):
    said = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {"type": "BPE", "ignore_merges": whole}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    assert pre_tokenizer_of(tmp_path) == name
    line = advice(tmp_path, trimmed=True, nemotron_nas=False)
    assert line == "" if name is None else (name or "--pre") in line and "megatron_prune/serving/to_gguf.py CONVERT" in line
    assert advice(tmp_path, trimmed=False, nemotron_nas=False) == ""
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert pre_tokenizer_of(tmp_path) is None


def test_every_name_is_one_of_a_table_and_no_expression_has_two():
    assert len(set(NAMES.values())) == len(NAMES)
