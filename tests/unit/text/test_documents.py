"""Documents of every kind of source, pairs opened and checked, and parts: against values written out by hand."""

from __future__ import annotations

import gzip
import json
import os

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_words import words

from megatron_prune.errors import InputError, PruneError
from megatron_prune.text.documents import LONGEST, open_documents, pieces
from megatron_prune.text.encoder import load_tokenizer, tokenizer_digest
from megatron_prune.text.pair import open_pair
from megatron_prune.text.parts import Coding, Part, grouped, join_parts, text_digest, write_part, write_parts


@given(st.text(alphabet="ab \n", max_size=400), st.integers(1, 60), st.lists(st.integers(0, 400), max_size=5))
def test_pieces_are_the_text_whatever_blocks_it_comes_in(text, longest, cuts):
    found = list(pieces([text], longest))
    assert "".join(found) == text
    assert all(found) and all(len(piece) <= longest for piece in found)
    assert all(len(piece) >= longest // 2 for piece in found[:-1])
    cuts = [0, *sorted(cuts), len(text)]
    assert list(pieces((text[a:b] for a, b in zip(cuts, cuts[1:])), longest)) == found
    start = 0
    for piece in found[:-1]:
        stops = {
            mark: [n for n in range(longest // 2 + len(mark), longest + 1) if text[start : start + n].endswith(mark)]
            for mark in ("\n\n", "\n", " ")
        }
        assert len(piece) == max(next(filter(None, stops.values()), [longest]))
        start += len(piece)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("aaaaa\n\nbb\ncc d", ["aaaaa\n\n", "bb\ncc d"]),
        ("aaaaa\nbbbb cc d", ["aaaaa\n", "bbbb cc d"]),
        ("aaaaaa bbbb ccc", ["aaaaaa ", "bbbb ccc"]),
        ("abcdefghijklm", ["abcdefghij", "klm"]),
        ("\n\nabcdefghijkl", ["\n\nabcdefgh", "ijkl"]),
        ("short\n\ntext", ["short\n\n", "text"]),
        ("fits\n\nwell", ["fits\n\nwell"]),
        ("", []),
    ],
)
def test_a_text_is_cut_at_the_best_place_in_the_second_half(text, expected):
    assert list(pieces([text], 10)) == expected


@given(st.lists(st.integers(0, 9)), st.integers(1, 20))
def test_groups_are_as_large_as_asked_for(sizes, enough):
    found = list(grouped(sizes, lambda size: size, enough))
    assert sum(found, []) == sizes
    assert all(sum(group) >= enough > sum(group[:-1]) for group in found[:-1])
    assert all(sum(group[:-1]) < enough for group in found)


def texts(name, *keys: str, split: str = "train") -> list[tuple[str, ...]]:
    return [document.texts for document in open_documents(str(name), keys or ("text",), split=split).documents(keys or ("text",))]


def test_a_text_file_is_a_document_or_several(tmp_path):
    (tmp_path / "a").write_bytes("eins\r\n\r\nzwölf\n".encode())
    assert texts(tmp_path / "a") == [("eins\n\nzwölf\n",)]
    long = "\n\n".join(words(300, seed) for seed in range(40))
    (tmp_path / "b.txt").write_text(long)
    found = [text for (text,) in texts(tmp_path / "b.txt", "any")]
    assert "".join(found) == long and len(found) == len(list(pieces([long], LONGEST))) > 3
    assert all(piece.endswith("\n\n") for piece in found[:-1])
    source = open_documents(str(tmp_path / "b.txt"), ("text",), split="train")
    assert source.size() == len(long) == sum(document.size for document in source.documents(("text",)))


def test_a_line_of_jsonl_is_a_document_with_a_text_for_every_key(tmp_path):
    lines = [json.dumps({"a": f"ä{n}", "b": "", "c": 1}, ensure_ascii=False) for n in range(3)]
    content = (lines[0] + "\n\n \n" + lines[1] + "\r\n" + lines[2]).encode()
    (tmp_path / "x.jsonl").write_bytes(content)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("x.jsonl", "x.jsonl.gz"):
        assert texts(tmp_path / name, "b", "a") == [("", "ä0"), ("", "ä1"), ("", "ä2")]
    assert open_documents(str(tmp_path / "x.jsonl"), ("a",), split="train").size() == len(content)
    assert open_documents(str(tmp_path / "x.jsonl.gz"), ("a",), split="train").size() is None


def test_a_folder_is_its_files_in_order(tmp_path, load, ids):
    (tmp_path / "b").mkdir()
    (tmp_path / "c.txt").write_text("three")
    (tmp_path / "b" / "z.txt.gz").write_bytes(gzip.compress(b"two"))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "and"}')
    (tmp_path / "README.md").write_text("not text")
    assert texts(tmp_path) == [("one",), ("and",), ("two",), ("three",)]
    found = load(f"{tmp_path}:1", nsamples=1, seq_length=2)
    assert found.provenance[0]["files"] == ["a.jsonl", "b/z.txt.gz", "c.txt"]
    joined = ids("one\n\nand\n\ntwo\n\nthree").tolist()
    assert any(found.tokens[0].tolist() == joined[start : start + 2] for start in range(len(joined)))
    (tmp_path / "b" / "z.txt.gz").unlink()
    assert open_documents(str(tmp_path), ("text",), split="train").size() == 31 + 5


def test_a_row_of_a_data_set_is_a_document(served, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("megatron_prune.text.records._ROWS", 2)
    rows = {"text": ["a", "", "c", "d", "e"], "url": ["1", "2", "3", "4", "5"]}
    served({"me/mine": {"train": rows, "dev": {"text": ["x"], "url": ["y"]}}, "allenai/c4": {"train": rows}})
    assert texts("me/mine", "url", "text") == list(zip(rows["url"], rows["text"]))
    assert texts("me/mine", split="dev") == [("x",)]
    assert texts("c4") == [(text,) for text in rows["text"]]
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == [(text,) for text in rows["text"]]
    with pytest.raises(InputError, match="(?s)no column 'body'.*columns text, url"):
        texts("me/mine", "body")


def test_a_known_data_set_is_cut_as_its_text(served):
    rows = ["", " = Title = \n", words(2000, 1) + "\n", words(2000, 2) + "\n"]
    served({"Salesforce/wikitext": {"train": {"text": rows}}})
    assert "".join(text for (text,) in texts("wikitext2")) == " ".join(rows)
    assert len(texts("wikitext2")) > 1


@pytest.mark.parametrize(
    "name, content, keys, message",
    [
        ("a.txt", b"good\xff\xfe", ("text",), "a.txt cannot be read as text.*UTF-8"),
        ("a.txt", b"good", ("text", "title"), "a.txt is plain text.*got: keys text, title"),
        ("a.txt.gz", gzip.compress(b"good" * 999, mtime=0)[:-9], ("text",), "a.txt.gz cannot be read as text"),
        ("a.jsonl.gz", b"good", ("text",), "a.jsonl.gz cannot be read as text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', ("text",), "a.jsonl, line 2 cannot be read as text"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text', ("text",), "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", b"[" * 99999, ("text",), "a.jsonl, line 1 is not JSON"),
        ("a.jsonl", b'{"text": "x"}', ("text", "body"), "line 1 has no text in field 'body'.*fields text.*--json-keys"),
        ("a.jsonl", b'{"text": ["x"]}', ("text",), "line 1 has no text in field 'text'.*got: list"),
        ("a.safetensors", b"x", ("text",), "a.safetensors is not text"),
        ("a.bin", b"x", ("text",), "a.bin is not text.*got: tokens"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content, keys, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="(?s)" + message):
        texts(tmp_path / name, *keys)


def make_pair(prefix, documents: list[list[int]], dtype=numpy.int32):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(sequences, [len(sequences)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int32])
def test_a_pair_says_what_it_holds(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("megatron_prune.text.pair._BLOCK", 4)
    prefix = make_pair(tmp_path / "p.q", [list(range(5)), [], [7, 3001, 9], [2]], dtype)
    for name in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        pair = open_pair(name)
        assert (pair.prefix, pair.dtype, pair.sequences, pair.documents, pair.total) == (str(prefix), dtype, 4, 4, 9)
        assert pair.extremes() == (0, 3001) and pair.highest() == 3001
        assert pair.window(3, 5).tolist() == [3, 4, 7, 3001, 9]


def test_only_what_the_index_names_counts(tmp_path):
    prefix = make_pair(tmp_path / "p", [[5, 6], [900, 901], [-3, 8]])
    index = bytearray((tmp_path / "p.idx").read_bytes())
    index[34 + 4 : 34 + 8] = (1).to_bytes(4, "little")  # the second sequence ends before its last token
    (tmp_path / "p.idx").write_bytes(index)
    assert open_pair(prefix).total == 5 and open_pair(prefix).extremes() == (-3, 900)


def test_a_pair_that_is_not_whole_is_refused(tmp_path):
    prefix = make_pair(tmp_path / "p", [[1, 2, 3], [4]])
    whole = (tmp_path / "p.idx").read_bytes()
    for place, value in ((34, -2), (34 + 8, -8), (len(whole) - 16, 5), (len(whole) - 24, 1)):
        size = 4 if place == 34 else 8
        (tmp_path / "p.idx").write_bytes(whole[:place] + value.to_bytes(size, "little", signed=True) + whole[place + size :])
        with pytest.raises(InputError, match="p.idx is damaged"):
            open_pair(prefix)
    make_pair(tmp_path / "empty", [[], []])
    with pytest.raises(InputError, match="(?s)empty.bin is empty.*no tokens"):
        open_pair(tmp_path / "empty")


def test_a_tokenizer_is_known_by_its_vocabulary(tokenizer, folder, tmp_path):
    tokenizer.save_pretrained(tmp_path / "same")
    assert tokenizer_digest(load_tokenizer(tmp_path / "same")) == tokenizer_digest(tokenizer)
    other = load_tokenizer(folder)
    other.add_tokens(["<new>"])
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)
    os.mkdir(tmp_path / "none")
    with pytest.raises(InputError, match="needs a tokenizer, and there is none in .*none"):
        load_tokenizer(tmp_path / "none")


@pytest.mark.parametrize("dtype, eod", [("uint16", 1), ("int32", None)])
def test_parts_joined_are_the_pair(tmp_path, tokenizer, ids, dtype, eod):
    coding = Coding(tokenizer=tokenizer, special_tokens=False, eod=eod, dtype=dtype)
    groups = [["one text", "and two"], [], ["", "three"]]
    parts = [
        Part(prefix=str(tmp_path / f"part-{n}"), texts=group, answers=[None] * len(group), size=n)
        for n, group in enumerate(groups)
    ]
    assert [write_part(part, coding) for part in parts] == [0, 1, 2] and all(part.is_written for part in parts)
    assert not Part(prefix=str(tmp_path / "part-3"), texts=[], answers=[], size=0).is_written
    found = join_parts([part.prefix for part in parts], str(tmp_path / "whole"), dtype)
    documents = [ids(text).tolist() + ([] if eod is None else [eod]) for text in ("one text", "and two", "three")]
    assert found == (3, sum(map(len, documents)))
    make_pair(tmp_path / "expected", documents, getattr(numpy, dtype))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"whole.{ending}").read_bytes() == (tmp_path / f"expected.{ending}").read_bytes()


class Dying:
    """Ends the process that receives it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_worker_that_is_ended_is_told(tmp_path):
    coding = Coding(tokenizer=Dying(), special_tokens=False, eod=None, dtype="uint16")
    parts = [Part(prefix=str(tmp_path / "part"), texts=["x"], answers=[None], size=1)]
    with pytest.raises(PruneError, match="a worker was ended from outside.*--workers"):
        write_parts(parts, coding, workers=1, progress=print)


def test_a_digest_tells_texts_and_their_ends_apart():
    found = {text_digest(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["2:ab1:c"], [])}
    assert len(found) == 6 and text_digest(["ä", "b"]) == text_digest(iter(["ä", "b"]))
