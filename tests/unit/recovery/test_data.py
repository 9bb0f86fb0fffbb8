"""What a step is trained on: blends, splits and batches, against the documents themselves; and data that will not do."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recovery_reference import documents, samples, write_pair

from megatron_prune.errors import InputError
from megatron_prune.recovery import data as module
from megatron_prune.recovery.data import BatchSizes, DataOptions, build_datasets, check_data, parse_blend, step_batches
from megatron_prune.runtime.world import World

LENGTH, VOCAB = 16, 307


@pytest.fixture(scope="module", autouse=True)
def group():
    """megatron-core's blends ask for their rank."""
    World().connect(always=True)


def options(tmp_path: Path, *words: str, **changes) -> DataOptions:
    return DataOptions(**{"data_path": words, "seq_length": LENGTH, "seed": 5, "split": "60,30,10", "cache": tmp_path, **changes})


def numbered(folder: Path, name: str, count: int, *, first: int = 0, shortest: int = 3, longest: int = 40) -> str:
    """A pair of documents ``1000 d, 1000 d + 1, …`` for d from ``first``: a token tells its document and its place there."""
    texts = documents(count, seed=first, shortest=shortest, longest=longest)
    texts = [[1000 * (first + number) + place for place in range(len(text))] for number, text in enumerate(texts)]
    return write_pair(folder / name, texts, numpy.int32)


def whole(item: dict) -> list[int]:
    return item["tokens"].tolist() + item["labels"].tolist()[-1:]


# ------------------------------------------------------------------------------------------------------------------ blends


@pytest.mark.parametrize(
    "words, expected",
    [
        ("a", (["a"], None)),
        ("a b c", (["a", "b", "c"], None)),
        ("0.3 a 0.7 b", (["a", "b"], [0.3, 0.7])),
        ("30 a.bin 70 dir/b.idx", (["a", "dir/b"], [30.0, 70.0])),
        ("1 a", (["a"], [1.0])),
        ("a.bin b.idx", (["a", "b"], None)),
        ("1e-3 a 2 b 3 c", (["a", "b", "c"], [1e-3, 2.0, 3.0])),
    ],
)
def test_a_blend_is_prefixes_or_weights_and_prefixes(words, expected):
    assert parse_blend(tuple(words.split()), "--data-path") == expected


@pytest.mark.parametrize(
    "words",
    ["0.3 a b", "0.3 a 0.7", "a 0.3 b 0.7", "0 a 1 b", "-1 a 1 b", "nan a 1 b", "inf a 1 b", "0.3", "1 a b c", "0.5 a x b"],
)
def test_what_is_no_blend_is_refused_by_its_flag(words):
    with pytest.raises(InputError, match="--valid-data-path"):
        parse_blend(tuple(words.split()), "--valid-data-path")


def test_a_prefix_may_look_like_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pair(Path("2024"), [[1, 2]])
    assert parse_blend(("2024",), "--data-path") == (["2024"], None)
    assert parse_blend(("0.5", "2024"), "--data-path") == (["2024"], [0.5])


@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.from_regex(r"\A[a-z][a-z/]{0,8}\Z")), min_size=1, max_size=6))
def test_weights_and_prefixes_come_back_in_order(pairs):
    pairs = [(weight, name) for weight, name in pairs if name not in ("nan", "inf", "infinity")] or [(1.0, "x")]
    words = tuple(str(word) for pair in pairs for word in pair)
    assert parse_blend(words, "") == ([name for _, name in pairs], [weight for weight, _ in pairs])
    assert parse_blend(tuple(name for _, name in pairs), "") == ([name for _, name in pairs], None)


# --------------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def pair(tmp_path) -> str:
    return write_pair(tmp_path / "text", documents(20))


def refused(wanted: DataOptions, pattern: str) -> None:
    before = sorted(os.listdir(wanted.cache))
    with pytest.raises(InputError, match=f"(?s){pattern}"):
        check_data(wanted, VOCAB)
    assert sorted(os.listdir(wanted.cache)) == before


def test_good_data_is_opened(tmp_path, pair):
    other = write_pair(tmp_path / "other", documents(20, seed=1))
    assert set(check_data(options(tmp_path, "1", pair, "3", f"{other}.bin"), VOCAB)) == {pair, other}
    separate = options(tmp_path, train_data_path=(pair,), valid_data_path=(other,))
    assert set(check_data(separate, VOCAB)) == {pair, other}


def test_the_data_is_named_in_one_way_and_in_full(tmp_path, pair):
    refused(options(tmp_path), "neither.*preprocess")
    refused(options(tmp_path, pair, train_data_path=(pair,), valid_data_path=(pair,)), "both")
    refused(options(tmp_path, train_data_path=(pair,)), "--valid-data-path")
    refused(options(tmp_path, valid_data_path=(pair,)), "neither")


@pytest.mark.parametrize("flag", ["train", "valid", "test"])
def test_every_blend_of_its_own_is_looked_at(tmp_path, pair, flag):
    separate = {"train_data_path": (pair,), "valid_data_path": (pair,), "test_data_path": (pair,)}
    refused(options(tmp_path, **{**separate, f"{flag}_data_path": (f"{tmp_path}/gone",)}), "gone.bin")
    refused(options(tmp_path, **{**separate, f"{flag}_data_path": ("0.3", pair, pair)}), f"--{flag}-data-path")


def test_a_file_that_is_missing_or_not_whole_is_named(tmp_path, pair):
    refused(options(tmp_path, f"{tmp_path}/gone"), r"gone\.bin.*gone\.idx")
    whole = Path(f"{pair}.bin").read_bytes()
    Path(f"{pair}.bin").write_bytes(whole[:-2])
    refused(options(tmp_path, pair), rf"text\.bin is not whole.*{len(whole) - 2} bytes.*{len(whole)} bytes")
    Path(f"{pair}.bin").write_bytes(b"")
    refused(options(tmp_path, pair), r"text\.bin is not whole")
    Path(f"{pair}.bin").write_bytes(whole)
    Path(f"{pair}.idx").write_bytes(b"no index")
    refused(options(tmp_path, pair), r"text\.idx is not the index")
    Path(f"{pair}.idx").unlink()
    refused(options(tmp_path, pair), r"text\.idx")
    refused(options(tmp_path, write_pair(tmp_path / "none", [])), "none")


@pytest.mark.parametrize(
    "what, said",
    [
        ("far", r"text\.bin is not whole.*92233720368537"),
        ("far, around 0", r"text\.bin is not whole.*922337203685477"),
        ("on each other", r"text\.bin is not whole"),
        ("no documents", r"text\.idx is damaged"),
        ("more than there is", r"text\.idx is damaged.*at least [0-9]{20,} bytes"),
    ],
)
def test_an_index_that_leads_outside_of_the_file_or_reads_it_again_and_again_is_refused(tmp_path, pair, what, said):
    index = bytearray(Path(f"{pair}.idx").read_bytes())
    count = int.from_bytes(index[18:26], "little")
    lengths, pointers = 34, 34 + 4 * count
    if what.startswith("far"):
        place = 2**63 - (1 if "around" in what else 10**6)
        index[pointers + 8 * 3 : pointers + 8 * 4] = place.to_bytes(8, "little")
    elif what == "on each other":
        longest = max(range(count), key=lambda number: int.from_bytes(index[lengths + 4 * number :][:4], "little"))
        for number in range(count):
            index[lengths + 4 * number : lengths + 4 * number + 4] = index[lengths + 4 * longest :][:4]
            index[pointers + 8 * number : pointers + 8 * number + 8] = bytes(8)
    else:
        index[18:34] = (2**64 - 1).to_bytes(8, "little") * 2 if what == "more than there is" else index[18:26] + bytes(8)
    Path(f"{pair}.idx").write_bytes(index)
    refused(options(tmp_path, pair), said)


def test_a_token_that_the_model_has_not_is_named(tmp_path):
    texts = documents(20)
    texts[13][2] = VOCAB
    refused(options(tmp_path, write_pair(tmp_path / "new", texts)), rf"new\.bin.*token {VOCAB}.*0 to {VOCAB - 1}.*preprocess")
    texts[13][2] = VOCAB - 1
    check_data(options(tmp_path, write_pair(tmp_path / "old", texts)), VOCAB)


def test_a_token_below_zero_is_refused(tmp_path):
    texts = documents(20)
    texts[13][2] = -1
    refused(options(tmp_path, write_pair(tmp_path / "negative", texts, numpy.int32)), r"negative\.bin.*-1")


def test_fewer_tokens_than_a_sample_needs(tmp_path):
    texts = [[1] * LENGTH, [2] * 0]
    separate = {"train_data_path": (write_pair(tmp_path / "short", texts),), "valid_data_path": (f"{tmp_path}/short",)}
    refused(options(tmp_path, **separate), rf"short\.bin.*{LENGTH} tokens.*{LENGTH + 1}")
    write_pair(tmp_path / "short", [[1] * LENGTH, [2]])
    check_data(options(tmp_path, **separate), VOCAB)


@pytest.mark.parametrize(
    "split, count, pattern",
    [
        ("99,1,0", 20, "20 documents"),  # round(19.8) is 20
        ("1,99", 20, "train"),
        ("100", 20, "measure"),
        ("0,100", 20, "train"),
        ("60,30,10", 1, "1 document"),
        ("a,b,c", 20, "--split"),
        ("", 20, "--split"),
    ],
)
def test_a_split_that_leaves_nothing_to_train_or_to_measure_on(tmp_path, split, count, pattern):
    refused(options(tmp_path, write_pair(tmp_path / "text", documents(count, shortest=20)), split=split), pattern)


def test_every_pair_of_a_blend_has_to_have_documents_in_both_splits(tmp_path, pair):
    few = write_pair(tmp_path / "few", documents(1, shortest=40))
    refused(options(tmp_path, pair, few), "few.*valid")


@pytest.mark.timeout(6)
@pytest.mark.parametrize("split", ["969,30,1", "60,40,0", "50,50"])
def test_a_test_split_without_a_document_is_refused_or_no_test_split(tmp_path, split):
    """megatron-core repeats what there is until it is enough: without a document, for ever."""
    wanted = options(tmp_path, write_pair(tmp_path / "text", documents(40)), split=split)
    try:
        check_data(wanted, VOCAB)
    except InputError as error:
        assert split == "969,30,1" and "--split" in str(error) and "test" in str(error)
        return
    train, valid, test = build_datasets(wanted, (8, 4, 4), World())
    assert len(train) >= 8 and len(valid) >= 4 and test is None


def test_a_split_counts_sequences_as_megatron_core_does(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "one.bin"), dtype=numpy.uint16)
    builder.add_document(torch.arange(200), [20] * 10)
    builder.finalize(str(tmp_path / "one.idx"))
    wanted = options(tmp_path, str(tmp_path / "one"))
    check_data(wanted, VOCAB)
    train, valid, _ = build_datasets(wanted, (4, 4, 4), World())
    assert {token // 20 for number in range(4) for token in whole(train[number])} <= set(range(6))
    assert {token // 20 for number in range(4) for token in whole(valid[number])} <= {6, 7, 8}


# ------------------------------------------------------------------------------------------------------------ the data sets


def test_labels_are_the_next_tokens_of_documents_one_after_the_other(tmp_path):
    wanted = options(tmp_path, numbered(tmp_path, "text", 30))
    train, valid, test = build_datasets(wanted, (40, 10, 10), World())
    parts = {"train": (train, range(0, 18)), "valid": (valid, range(18, 27)), "test": (test, range(27, 30))}
    for name, (dataset, allowed) in parts.items():
        seen = Counter()
        for number in range(len(dataset)):
            item = dataset[number]
            tokens, labels = item["tokens"], item["labels"]
            assert tokens.dtype == labels.dtype == torch.int64 and len(tokens) == len(labels) == LENGTH
            assert torch.equal(tokens[1:], labels[:-1])
            text = whole(item)
            for before, after in zip(text, text[1:]):
                assert after == before + 1 or after % 1000 == 0  # the next token, or the first of another document
            seen.update(token // 1000 for token in text)
        assert set(seen) <= set(allowed), name
        assert name == "valid" or len(seen) == len(allowed)


def test_the_samples_are_those_of_megatron_cores_data_set(tmp_path):
    pair = write_pair(tmp_path / "text", documents(30))
    ours = build_datasets(options(tmp_path, pair), (25, 8, 4), World())
    theirs = samples(([pair], None), "60,30,10", seq_length=LENGTH, seed=5, counts=(25, 8, 4))
    for mine, wanted in zip(ours, theirs):
        assert [whole(mine[number]) for number in range(len(wanted))] == wanted.tolist()
    other = build_datasets(options(tmp_path, pair, seed=6), (25, 8, 4), World())
    assert [whole(other[0][number]) for number in range(25)] != theirs[0].tolist()
    again = build_datasets(options(tmp_path, pair), (25, 8, 4), World())  # from the indices that are kept
    assert [whole(again[0][number]) for number in range(25)] == theirs[0].tolist()


@pytest.mark.parametrize("weights", [(1, 3), (0.25, 0.75), (90, 10)])
def test_a_blend_draws_in_proportion_to_its_weights(tmp_path, weights):
    pairs = [numbered(tmp_path, "a", 40), numbered(tmp_path, "b", 40, first=100)]
    words = [str(word) for both in zip(weights, pairs) for word in both]
    train, valid, _ = build_datasets(options(tmp_path, *words), (80, 40, 40), World())
    for dataset, count in ((train, 80), (valid, 40)):
        first = sum(whole(dataset[number])[0] < 100_000 for number in range(count))
        assert first == pytest.approx(weights[0] / sum(weights) * count, abs=1.01)


def test_a_blend_without_weights_is_every_document_once(tmp_path):
    pairs = [numbered(tmp_path, "a", 40), numbered(tmp_path, "b", 20, first=100)]
    train, _, _ = build_datasets(options(tmp_path, *pairs), (1000, 4, 4), World())
    seen = Counter(token for number in range(len(train)) for token in train[number]["tokens"].tolist())
    held = [
        sum(map(len, documents(count, seed=first, shortest=3, longest=40)[: 6 * count // 10]))
        for first, count in ((0, 40), (100, 20))
    ]
    assert max(seen.values()) == 1
    for total, found in zip(held, (sum(token < 100_000 for token in seen), sum(token >= 100_000 for token in seen))):
        assert total - LENGTH - 1 <= found <= total  # the last tokens do not fill a sample


def test_each_split_may_have_a_blend_of_its_own(tmp_path):
    names = {name: numbered(tmp_path, name, 12, first=100 * place) for place, name in enumerate("abcd")}
    separate = options(tmp_path, train_data_path=("1", names["a"], "1", names["b"]), valid_data_path=(names["c"],))
    train, valid, test = build_datasets(separate, (20, 10, 10), World())
    assert test is None
    assert {whole(train[number])[0] // 100_000 for number in range(20)} == {0, 1}
    assert {token // 1000 for number in range(len(valid)) for token in whole(valid[number])} == set(range(200, 212))
    with_test = options(tmp_path, **{**vars(separate), "test_data_path": (names["d"],)})
    assert {
        whole(item)[0] // 100_000 for item in map(build_datasets(with_test, (20, 10, 10), World())[2].__getitem__, range(10))
    } == {3}


def marked(folder: Path, name: str, count: int, *, first: int = 0) -> str:
    """A :func:`numbered` pair with a mask: tokens that divide by three count."""
    prefix = numbered(folder, name, count, first=first)
    texts = documents(count, seed=first, shortest=3, longest=40)
    masks = [[int((1000 * (first + number) + place) % 3 == 0) for place in range(len(text))] for number, text in enumerate(texts)]
    write_pair(f"{prefix}_mask", masks, numpy.uint8)
    return prefix


def test_labels_that_a_mask_does_not_name_are_left_out_wherever_the_sample_comes_from(tmp_path):
    words = ("1", marked(tmp_path, "a", 20), "2", marked(tmp_path, "b", 20, first=100))
    plain = build_datasets(options(tmp_path, *words), (90, 30, 10), World())
    wanted = options(tmp_path, *words, answers_only=True)
    check_data(wanted, 10**6)
    for both in zip(plain, build_datasets(wanted, (90, 30, 10), World()), strict=True):
        for number in range(len(both[0])):  # more than one epoch of the training set
            whole_item, item = (dataset[number] for dataset in both)
            labels = whole_item["labels"]
            assert torch.equal(item["tokens"], whole_item["tokens"])
            assert torch.equal(item["labels"], torch.where(labels % 3 == 0, labels, -100))


def test_answers_only_needs_a_mask_of_every_pair(tmp_path):
    with_mask, without = marked(tmp_path, "a", 20), numbered(tmp_path, "b", 20)
    for words in ((without,), ("1", with_mask, "2", without)):
        with pytest.raises(InputError, match="(?s)b does not say which of its tokens are answers.*preprocess --answers-only"):
            check_data(options(tmp_path, *words, answers_only=True), 10**6)


# --------------------------------------------------------------------------------------------------------------- the steps


class Numbered:
    """A data set whose sample n is n, n + 1, …"""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        assert 0 <= number < self.size
        return {"tokens": torch.arange(number, number + 4), "labels": torch.arange(number + 1, number + 5)}


def of_copy(monkeypatch, copies: int, copy: int, dataset, consumed: int, sizes: BatchSizes, vocab: int = 10**9):
    monkeypatch.setattr(module.parallel_state, "get_data_parallel_world_size", lambda: copies)
    monkeypatch.setattr(module.parallel_state, "get_data_parallel_rank", lambda: copy)
    return list(step_batches(dataset, consumed, sizes, vocab))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 50))
def test_a_step_is_the_same_samples_once_each_over_any_copies_and_micro_batches(copies, micro, times, step):
    with pytest.MonkeyPatch.context() as monkeypatch:
        whole_batch = copies * micro * times
        sizes = BatchSizes(global_batch=whole_batch, micro_batch=micro)
        dataset, consumed = Numbered(10_000), step * whole_batch
        seen = []
        for copy in range(copies):
            batches = of_copy(monkeypatch, copies, copy, dataset, consumed, sizes)
            assert len(batches) == times == sizes.micro_batches
            for tokens, labels, numbers in batches:
                assert tokens.shape == labels.shape == (micro, 4)
                assert tokens[:, 0].tolist() == list(numbers)
                assert torch.equal(labels, tokens + 1)
                seen += numbers
        assert sorted(seen) == list(range(consumed, consumed + whole_batch))


def test_the_data_begins_anew_at_its_end(monkeypatch):
    batches = of_copy(monkeypatch, 1, 0, Numbered(5), 4, BatchSizes(global_batch=3, micro_batch=3))
    assert batches[0][0][:, 0].tolist() == [4, 0, 1]
    assert list(batches[0][2]) == [4, 5, 6]


@pytest.mark.parametrize("vocab, fits", [(14, True), (13, False)])  # sample 9 ends in the label 13
def test_a_token_that_the_model_has_not_stops_the_step(monkeypatch, vocab, fits):
    sizes = BatchSizes(global_batch=2, micro_batch=1)
    if fits:
        assert len(of_copy(monkeypatch, 1, 0, Numbered(10), 8, sizes, vocab)) == 2
        return
    with pytest.raises(InputError, match=r"samples 9 to 9.*12"):
        of_copy(monkeypatch, 1, 0, Numbered(10), 8, sizes, vocab)


@pytest.mark.parametrize("batch, micro, copies, fits", [(6, 3, 2, True), (6, 2, 2, False), (6, 6, 1, True), (6, 4, 1, False)])
def test_a_global_batch_has_to_divide(batch, micro, copies, fits):
    sizes = BatchSizes(global_batch=batch, micro_batch=micro)
    if fits:
        sizes.check(copies)
        return
    with pytest.raises(
        InputError, match=rf"(?s)--global-batch-size {batch}.*{copies} data-parallel.*multiple of {micro * copies}"
    ):
        sizes.check(copies)
