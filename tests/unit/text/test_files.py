"""Files and folders as sources, against tokens cut by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_words import words

from megatron_prune.errors import InputError
from megatron_prune.text.artifact import load_samples, save_samples
from megatron_prune.text.draw import published_starts, random_starts, windows_at
from megatron_prune.text.reader import READERS, reader_kind
from megatron_prune.text.windows import read_windows


def protocol(tokens: torch.Tensor, length: int, count: int, seed: int) -> torch.Tensor:
    """The draw of ``spec/quality-protocol.md``, word for word."""
    n = len(tokens)
    starts = torch.randint(0, n - length, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([tokens[s : s + length] for s in starts.tolist()])


@given(n=st.integers(2, 500), data=st.data(), seed=st.integers(0, 2**63 - 1))
def test_windows_lie_inside_and_follow_the_protocol(n, data, seed):
    length = data.draw(st.integers(1, n))
    count = data.draw(st.integers(1, 20))
    tokens = torch.arange(n)
    for draw in (random_starts, published_starts):
        found = windows_at(tokens, draw(n, seq_length=length, count=count, seed=seed), length)
        assert found.shape == (count, length)
        assert torch.equal(found - found[:, :1], torch.arange(length).expand(count, length))
    if n > length:
        starts = random_starts(n, seq_length=length, count=count, seed=seed)
        assert torch.equal(windows_at(tokens, starts, length), protocol(tokens, length, count, seed))


def test_a_text_file_gives_the_windows_of_the_protocol(load, ids, tmp_path):
    text = words(400) + "\n\nZwölf\r\nBoxkämpfer\n"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    found = load(f"{tmp_path}/text:1", nsamples=7, seq_length=33, seed=5)
    tokens = ids((tmp_path / "text").read_text(encoding="utf-8"))
    assert torch.equal(found.tokens, protocol(tokens, 33, 7, 5))
    assert found.lengths.tolist() == [33] * 7


def test_exactly_enough_is_enough_and_one_less_is_not(load, ids, tmp_path):
    text = words(100)
    (tmp_path / "a.txt").write_text(text)
    count = len(ids(text))
    found = load(f"{tmp_path}/a.txt:1", nsamples=1, seq_length=count, max_position_embeddings=count)
    assert torch.equal(found.tokens[0], ids(text))
    with pytest.raises(InputError, match=f"(?s)fewer tokens.*got: {count} tokens.*needed: {count + 1} tokens"):
        load(f"{tmp_path}/a.txt:1", nsamples=1, seq_length=count + 1, max_position_embeddings=count + 1)
    with pytest.raises(InputError, match=rf"(?s)fewer tokens.*\({count} samples of 2\)"):
        load(f"{tmp_path}/a.txt:1", nsamples=count, seq_length=2)


def test_json_lines_are_joined_with_blank_lines(load, ids, tmp_path):
    texts = [words(60, seed) for seed in range(3)]
    lines = [json.dumps({"body": text, "text": 5}) for text in texts]
    (tmp_path / "a.jsonl").write_text(lines[0] + "\n\n" + "\n".join(lines[1:]))
    found = load(f"{tmp_path}/a.jsonl:1", field="body")
    assert torch.equal(found.tokens, protocol(ids("\n\n".join(texts)), 8, 4, 0))
    assert found.provenance[0]["field"] == "body" and found.provenance[0]["documents"] == 3


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n ", "a.txt is empty"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as text.*UTF-8"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'["x"]', "line 1.*got: list.*JSON object"),
        ("a.jsonl", b'{"body": "x"}', "line 1 has no text in field 'text'.*fields body.*--data-field"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800 y"}', "a.jsonl, line 2 is no text.*surrogates"),
        ("a.jsonl", b'{"text": null}', "line 1 has no text in field 'text'.*NoneType"),
        ("a.safetensors", b"no", "not a whole safetensors file"),
        ("a.idx", b"x", "there is no file .*a.bin"),
        ("a.bin", b"x", "there is no file .*a.idx"),
    ],
)
def test_files_that_hold_no_text_are_refused(load, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="(?s)" + message):
        load(f"{tmp_path / name}:1")


def test_a_folder_is_its_text_files_in_order(load, ids, tmp_path):
    texts = [words(50, seed) for seed in range(3)]
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text(texts[2])
    (tmp_path / "b" / "z.txt").write_text(texts[1])
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": texts[0]}))
    (tmp_path / "README.md").write_text("not text")
    found = load(f"{tmp_path}:1")
    assert torch.equal(found.tokens, protocol(ids("\n\n".join(texts)), 8, 4, 0))
    assert found.provenance[0]["files"] == ["a.jsonl", "b/z.txt", "c.txt"]


def test_a_folder_of_data_files_goes_to_datasets(load, ids, tmp_path, folder):
    import datasets

    texts = {"train": [words(60, 1), words(60, 2)], "test": [words(60, 3)]}
    tables = {name: datasets.Dataset.from_dict({"body": rows}) for name, rows in texts.items()}
    for name, table in tables.items():
        (tmp_path / "parquet" / name).mkdir(parents=True)
        table.to_parquet(tmp_path / "parquet" / name / "0000.parquet")
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "disk")
    tables["train"].save_to_disk(tmp_path / "one")
    for kind in ("parquet", "disk", "one"):
        found = load(f"{tmp_path / kind}:1", field="body")
        assert torch.equal(found.tokens, protocol(ids("\n\n".join(texts["train"])), 8, 4, 0)), kind
        assert found.provenance[0]["split"] == "train" and found.provenance[0]["name"] == kind
        own = "test" if kind != "one" else "train"
        windows = read_windows(tmp_path / kind, folder, seq_length=8, count=2, field="body")
        assert torch.equal(windows, ids("\n\n".join(texts[own]))[:16].view(2, 8))
    with pytest.raises(InputError, match="(?s)no column 'text'.*columns body.*--data-field"):
        load(f"{tmp_path}/disk:1")
    with pytest.raises(InputError, match="(?s)no split 'dev'.*splits train, test"):
        load(f"{tmp_path}/disk:1", field="body", split="dev")


def test_an_empty_folder_is_refused(load, tmp_path):
    with pytest.raises(InputError, match="is empty"):
        load(f"{tmp_path}:1")


def indexed(prefix: Path, documents: list[list[int]], dtype=numpy.int32) -> Path:
    """A pair written by megatron-core."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_item(torch.tensor(document, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int32, numpy.int64])
@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_an_indexed_pair_is_the_run_of_its_sequences(load, tmp_path, dtype, ending):
    documents = [list(range(5)), [7], list(range(100, 140)), list(range(200, 290))]
    prefix = indexed(tmp_path / "my.data", documents, dtype)
    flat = torch.tensor(sum(documents, []))
    found = load(f"{prefix}{ending}:1", tokenizer_dir=None, nsamples=9, seq_length=15, seed=3)
    assert torch.equal(found.tokens, protocol(flat, 15, 9, 3))
    windows = read_windows(f"{prefix}{ending}", None, seq_length=15, count=100)
    assert torch.equal(windows, flat[:135].view(9, 15))
    with pytest.raises(InputError, match="(?s)token 2..*0 to 199"):
        load(f"{prefix}{ending}:1", vocab_size=200, nsamples=9, seq_length=15)
    with pytest.raises(InputError, match="(?s)fewer tokens.*got: 136 tokens"):
        load(f"{prefix}{ending}:1", nsamples=9, seq_length=16)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), data=st.data())
def test_windows_of_a_pair_span_its_documents(tmp_path_factory, sizes, data):
    from megatron_prune.text.pair import open_pair

    total = sum(sizes)
    ends = numpy.cumsum([0, *sizes])
    prefix = tmp_path_factory.mktemp("pair") / "p"
    if total == 0:
        return
    indexed(prefix, [list(range(a, b)) for a, b in zip(ends, ends[1:])])
    pair = open_pair(prefix)
    start = data.draw(st.integers(0, total - 1))
    length = data.draw(st.integers(1, total - start))
    assert pair.total == total
    assert pair.window(start, length).tolist() == list(range(start, start + length))


def test_a_damaged_pair_is_refused(load, tmp_path):
    prefix = indexed(tmp_path / "p", [list(range(100))])
    whole = {ending: Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx")}
    for ending, content, message in (
        ("bin", whole["bin"][:-1], "p.bin is not whole.*399 bytes.*400 bytes"),
        ("idx", b"", "not the index of a Megatron data set"),
        ("idx", whole["idx"][:20], "p.idx is damaged"),
        ("idx", whole["idx"][:40], "p.idx is damaged.*40 bytes.*at least 62 bytes"),
        ("idx", whole["idx"][:9] + b"\x02" + whole["idx"][10:], "p.idx is damaged.*version 2"),
        ("idx", whole["idx"][:-8] + b"\x07" + whole["idx"][-7:], "p.idx is damaged"),
        ("idx", whole["idx"][:34] + b"\xff\xff\xff\x0f" + whole["idx"][38:], "p.bin is not whole"),
        ("idx", b"PK" + whole["idx"][2:], "not the index of a Megatron data set"),
    ):
        Path(f"{prefix}.{ending}").write_bytes(content)
        with pytest.raises(InputError, match="(?s)" + message):
            load(f"{prefix}:1")
        Path(f"{prefix}.{ending}").write_bytes(whole[ending])
    floats = indexed(tmp_path / "f", [[1, 2, 3]], numpy.float32)
    with pytest.raises(InputError, match="(?s)float32.*integers"):
        load(f"{floats}:1")
    assert load(f"{prefix}:1").tokens.shape == (4, 8)


def test_samples_are_kept_with_where_they_come_from(load, tmp_path):
    from safetensors import safe_open

    tokens = torch.arange(50).view(5, 10)
    file = tmp_path / "new" / "self.safetensors"
    save_samples(file, tokens, {"content_id": "abc", "temperature": 1.0, "seed": 3})
    assert [path.name for path in file.parent.iterdir()] == ["self.safetensors"]
    with safe_open(file, framework="pt") as stored:
        assert stored.metadata()["format"] == "megatron-prune samples"
    again, provenance = load_samples(file)
    assert torch.equal(again, tokens) and provenance == {"content_id": "abc", "temperature": 1.0, "seed": 3}
    found = load(f"{file}", tokenizer_dir=None)
    assert torch.equal(found.tokens, tokens[:4, :8])
    assert found.provenance[0]["samples_of"]["content_id"] == "abc"
    for changes in ({"nsamples": 6}, {"seq_length": 11}):
        with pytest.raises(InputError, match="(?s)fewer tokens.*5 samples of 10"):
            load(f"{file}:1", **changes)
    with pytest.raises(InputError, match="not measured"):
        read_windows(file, None, seq_length=4, count=1)
    with pytest.raises(InputError, match="not measured"):
        read_windows("self", None, seq_length=4, count=1)


def test_other_tensors_are_no_samples(load, tmp_path, folder):
    from safetensors.torch import save_file

    with pytest.raises(InputError, match="not a file of samples"):
        load(f"{folder}/model.safetensors:1")
    save_file(
        {"tokens": torch.zeros(2, 3)},
        tmp_path / "a.safetensors",
        metadata={"format": "megatron-prune samples", "provenance": "{}"},
    )
    with pytest.raises(InputError, match="float32"):
        load_samples(tmp_path / "a.safetensors")
    for tokens, provenance in ((torch.zeros(2, 3), {"content_id": "x"}), (torch.zeros(2, 3, dtype=torch.int64), {})):
        with pytest.raises(InputError, match="samples to keep"):
            save_samples(tmp_path / "b.safetensors", tokens, provenance)


def test_the_first_windows_are_the_text_in_order(folder, ids, tmp_path):
    text = words(200)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"t": text}))
    tokens = ids(text)
    for source, field in (("a.txt", "text"), ("a.jsonl", "t")):
        found = read_windows(tmp_path / source, folder, seq_length=20, count=3, field=field)
        assert torch.equal(found, tokens[:60].view(3, 20))
    assert len(read_windows(tmp_path / "a.txt", folder, seq_length=20, count=10**6)) == len(tokens) // 20
    with pytest.raises(InputError, match=f"(?s)too short.*{len(tokens)} tokens.*at least {len(tokens) + 1}"):
        read_windows(tmp_path / "a.txt", folder, seq_length=len(tokens) + 1, count=1)


def test_a_name_means_a_word_then_a_path_then_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("c4", "plain", "x.jsonl", "odd.ending", "pair.bin", "pair.idx"):
        Path(name).write_text("x")
    Path("data").mkdir()
    kinds = {
        "c4": "c4",
        "./c4": ".txt",
        "plain": ".txt",
        "x.jsonl": ".jsonl",
        "odd.ending": ".txt",
        "pair": ".bin",
        "pair.idx": ".idx",
        "data": "/",
        "self": "self",
        "allenai/c4": "owner/name",
        "allenai/c4/en": "owner/name",
    }
    assert {name: reader_kind(name) for name in kinds} == kinds
    for name in ("missing.txt", "./missing", "/missing/too", "data/missing", "~/x", "pair2.bin"):
        with pytest.raises(InputError, match="no file or folder"):
            reader_kind(name)
    with pytest.raises(InputError, match="(?s)unknown data 'wikitext'; did you mean 'wikitext2'.*arc_challenge, .*wikitext2"):
        reader_kind("wikitext")
    with pytest.raises(InputError, match="unknown data"):
        reader_kind("owner/name/config/more")


def test_every_source_says_what_it_is():
    words_known = {name for name in READERS.names() if name.isidentifier()}
    assert words_known == {"self", "wikitext2", "ptb", "c4", "mmlu", "hellaswag", "winogrande", "arc_easy", "arc_challenge"}
    assert all(READERS.get(name).__doc__ for name in READERS.names())
