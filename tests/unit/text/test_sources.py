"""``--data`` as written, the mixture it becomes, and what is refused before work starts."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_words import words

from megatron_prune.errors import InputError
from megatron_prune.text.data_specs import DataSpec, parse_data
from megatron_prune.text.sources import load_calibration


def parsed(*specs: str) -> dict[str, float]:
    return {spec.name: spec.weight for spec in parse_data(specs)}


@pytest.mark.parametrize(
    "specs, shares",
    [
        ([], {"self": 1}),
        (["self"], {"self": 1}),
        (["self:3"], {"self": 1}),
        (["a.txt"], {"a.txt": 0.5, "self": 0.5}),
        (["a.txt", "c4"], {"a.txt": 0.25, "c4": 0.25, "self": 0.5}),
        (["a.txt:1"], {"a.txt": 1}),
        (["a.txt:3", "c4:1"], {"a.txt": 0.75, "c4": 0.25}),
        (["a.txt", "self"], {"a.txt": 0.5, "self": 0.5}),
        (["a.txt", "c4", "self"], {"a.txt": 1 / 3, "c4": 1 / 3, "self": 1 / 3}),
        (["a.txt", "kept.safetensors"], {"a.txt": 0.5, "kept.safetensors": 0.5}),
        (["a.txt:.5", "self:1.5e0"], {"a.txt": 0.25, "self": 0.75}),
        (["C:/texts/a.txt"], {"C:/texts/a.txt": 0.5, "self": 0.5}),
        (["C:/a.txt:2"], {"C:/a.txt": 1}),
        (["a:b:c:1"], {"a:b:c": 1}),
        (["a:1:1"], {"a:1": 1}),
        (["a.txt:1e308", "b.txt:1e308"], {"a.txt": 0.5, "b.txt": 0.5}),
    ],
)
def test_shares_are_what_the_user_means(specs, shares):
    assert parsed(*specs) == pytest.approx(shares)
    assert list(parsed(*specs)) == list(shares)


def test_nothing_given_is_the_models_own_samples():
    assert parse_data(None) == parse_data([]) == [DataSpec(name="self", weight=1.0)]


@pytest.mark.parametrize(
    "specs, message",
    [
        (["a.txt:0"], "weight of a.txt.*got: 0.*positive"),
        (["a.txt:-1"], "positive"),
        (["a.txt:nan"], "positive"),
        (["a.txt:inf"], "positive"),
        (["a.txt:1e999"], "positive"),
        (["a.txt:1", "b.txt"], "b.txt without a weight"),
        (["a.txt", "a.txt"], "lists a.txt twice"),
        (["a.txt:1", "a.txt:2"], "twice"),
        (["b/a.txt", "./b/../b/a.txt"], "twice"),
        (["c.bin:1", "c.idx:1"], "twice"),
        ([""], "NAME or NAME:WEIGHT"),
        ([":1"], "NAME or NAME:WEIGHT"),
        (["a.txt:1e-320", "b.txt:1e300"], "far apart"),
    ],
)
def test_what_makes_no_sense_is_refused(specs, message):
    with pytest.raises(InputError, match="(?s)" + message):
        parse_data(specs)


NAMES = st.lists(st.from_regex(r"[a-z/:.]{1,8}x", fullmatch=True), min_size=1, max_size=5, unique=True)


@given(names=NAMES, data=st.data())
def test_weights_are_normalised_whatever_the_names(names, data):
    weights = data.draw(st.lists(st.integers(1, 10**6), min_size=len(names), max_size=len(names)))
    result = parse_data([f"{name}:{weight}" for name, weight in zip(names, weights)])
    assert [spec.name for spec in result] == names
    for spec, weight in zip(result, weights):
        assert spec.weight == pytest.approx(float(Fraction(weight, sum(weights))), rel=1e-14)


def own_samples(count: int) -> torch.Tensor:
    return torch.arange(count * 8).view(count, 8) % 307


@given(weights=st.lists(st.integers(1, 1000), min_size=3, max_size=3), nsamples=st.integers(1, 6), seed=st.integers(0, 2**40))
def test_every_source_has_its_share_of_the_sum(served, load, ids, tmp_path_factory, weights, nsamples, seed):
    folder = tmp_path_factory.mktemp("mix")
    (folder / "a.txt").write_text(words(200))
    questions = [f"what {'is ' * (n % 3)}it {n}" for n in range(9)]
    served({"allenai/ai2_arc": {"train": {"question": questions, "choices": [{"text": ["x"], "label": ["A"]}] * 9}}})
    a, b, c = weights
    specs = [f"{folder}/a.txt:{a}", f"arc_easy:{b}", f"self:{c}"]
    found = load(*specs, nsamples=nsamples, seed=seed, seq_length=40, self_samples=lambda n: torch.ones(n, 40, dtype=torch.int64))
    assert found.tokens.shape == (3 * nsamples, 40)
    counted = found.weights * found.lengths
    assert float(counted.sum()) == pytest.approx(int(found.lengths.sum()), rel=1e-12)
    for number, weight in enumerate(weights):
        part = slice(number * nsamples, (number + 1) * nsamples)
        assert float(counted[part].sum() / counted.sum()) == pytest.approx(weight / sum(weights), rel=1e-12)
        assert found.weights[part].unique().numel() == 1
        entry = found.provenance[number]
        assert entry["share"] == pytest.approx(weight / sum(weights), rel=1e-12)
        assert entry["samples"] == nsamples and entry["tokens"] == int(found.lengths[part].sum())
    assert [entry["name"] for entry in found.provenance] == ["a.txt", "arc_easy", "self"]
    assert (found.lengths[nsamples : 2 * nsamples] < 40).any()
    for row, length in zip(found.tokens, found.lengths):
        assert not row[length:].any()
    json.dumps(found.provenance)


def test_the_same_request_gives_the_same_samples_and_another_seed_others(load, tmp_path):
    (tmp_path / "a.txt").write_text(words(300))
    spec = f"{tmp_path}/a.txt:1"
    one, same, other = load(spec), load(spec), load(spec, seed=1)
    assert one.digest == same.digest != other.digest
    assert one.provenance == same.provenance
    assert str(tmp_path) not in json.dumps(one.provenance)
    assert one.provenance[0] | {"digest": ""} == {
        "name": "a.txt",
        "split": None,
        "digest": "",
        "samples": 4,
        "tokens": 32,
        "share": 1.0,
        "seq_length": 8,
        "seed": 0,
    }


def test_data_is_read_before_own_samples_are_drawn(load, tmp_path):
    (tmp_path / "a.txt").write_text("too little")

    def sampler(count):
        raise AssertionError("minutes of work before the error")

    with pytest.raises(InputError, match="fewer tokens than asked for"):
        load("self", f"{tmp_path}/a.txt", self_samples=sampler)
    with pytest.raises(InputError, match="no file or folder"):
        load("self", f"{tmp_path}/b.txt", self_samples=sampler)


def test_own_samples_need_no_tokenizer(load):
    found = load("self", tokenizer_dir=None, self_samples=own_samples)
    assert torch.equal(found.tokens, own_samples(4))
    assert torch.equal(found.weights, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_length": 65}, "--seq-length.*got: 65.*at most the model's 64"),
        ({"seq_length": 1}, "--seq-length.*at least 2"),
        ({"nsamples": 0}, "--nsamples"),
        ({"seed": -1}, "--seed"),
        ({"self_samples": None}, "self needs a model"),
        ({"self_samples": lambda count: own_samples(count + 1)}, r"got: .*\[5, 8\].*needed: int64 \[4, 8\]"),
        ({"self_samples": lambda count: own_samples(count).float()}, "float32"),
        ({"vocab_size": 31}, "self: a token is not in the model's vocabulary.*got: token 31.*0 to 30"),
        ({"self_samples": lambda count: own_samples(count) - 1}, "got: token -1"),
    ],
)
def test_sizes_and_samples_that_do_not_fit_the_model_are_refused(load, changes, message):
    with pytest.raises(InputError, match="(?s)" + message):
        load("self", **{"self_samples": own_samples, **changes})


def test_text_without_a_tokenizer_is_refused(load, tmp_path):
    (tmp_path / "a.txt").write_text(words(100))
    with pytest.raises(InputError, match="(?s)needs a tokenizer.*--tokenizer"):
        load(f"{tmp_path}/a.txt:1", tokenizer_dir=None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer in .* cannot be read"):
        load(f"{tmp_path}/a.txt:1", tokenizer_dir=tmp_path)


def test_samples_begin_with_the_token_that_a_model_needs(load, tmp_path):
    (tmp_path / "a.txt").write_text(words(400))
    plain, led = (load(f"{tmp_path}/a.txt:1", leading=leading) for leading in (None, 5))
    assert (led.tokens[:, 0] == 5).all() and not (plain.tokens[:, 0] == 5).all()
    assert torch.equal(led.tokens[:, 1:], plain.tokens[:, 1:])  # the first token is never predicted
    assert led.provenance[0]["leading"] == 5 and "leading" not in plain.provenance[0]


def test_no_source_at_all_is_refused():
    with pytest.raises(InputError, match="without a source"):
        load_calibration([], tokenizer_dir=None, seq_length=8, nsamples=1, seed=0, max_position_embeddings=8, vocab_size=9)
