"""What of a folder is read and what is not, files packed in any way, and records of every kind: against texts written by hand."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_prune.errors import InputError
from megatron_prune.text.contents import check_read_once, contents_of, summary
from megatron_prune.text.documents import open_documents
from megatron_prune.text.reader import stamps
from megatron_prune.text.readers import jsonl
from megatron_prune.text.windows import draw_windows

ZSTD = lambda data: pyarrow.compress(data, codec="zstd", asbytes=True)
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": ZSTD}


def texts(name, *keys: str, split: str = "train") -> list[str]:
    keys = keys or ("text",)
    return [text for document in open_documents(str(name), keys, split=split).documents(keys) for text in document.texts]


def write(folder, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def table(file, **columns) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file)


def test_everything_in_a_folder_is_read_once_or_named_with_the_reason(tmp_path):
    record = lambda text: json.dumps({"text": text}).encode()
    write(tmp_path, {f"a{ending}.txt{ending}": pack(b"plain " + ending.encode()) for ending, pack in PACKERS.items()})
    write(tmp_path, {f"b{ending}.JSONL{ending.upper()}": pack(record("lines " + ending)) for ending, pack in PACKERS.items()})
    write(tmp_path, {"c.json": b"[" + record("one") + b",\n" + record("two") + b"]", "d.ndjson": record("nd")})
    table(tmp_path / "e" / "shard-00000-of-00001.PARQUET", text=["row"], id=[1])
    write(
        tmp_path,
        {"README.md": b"x", "LICENSE": b"x", "licence-MIT.txt": b"x", "dataset_infos.json": b"{}", "readme.jsonl": record("r")},
    )
    write(tmp_path, {".hidden.txt": b"x", ".git/a.txt": b"x", "e/.ipynb_checkpoints/a-checkpoint.txt": b"x"})
    write(tmp_path, {"about.json": b'{"name": "x"}', "config.json.xz": lzma.compress(b'[{"a": 1}]')})
    write(tmp_path, {"s.csv": b'id,text\n1,"a\nrow"\n', "s.tsv": b"text\tid\ntabs\t2\n"})
    write(tmp_path, {"x.pdf": b"x", "noending": b"x", "empty.txt": b"", "c.json.gz": gzip.compress(b"x")})
    write(tmp_path, {"p.bin": b"x", "p.idx": b"x", "p.json": b"{}"})
    os.symlink("a.txt", tmp_path / "link.txt")
    os.link(tmp_path / "d.ndjson", tmp_path / "z.jsonl")
    os.symlink("..", tmp_path / "e" / "round")
    os.symlink("nowhere", tmp_path / "dead.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    source = open_documents(str(tmp_path), ("text",), split="train")
    found = source.contents()
    assert found["passed_over"] == {
        "hidden": [".git", ".hidden.txt", "e/.ipynb_checkpoints"],
        "about the data": ["LICENSE", "README.md", "dataset_infos.json", "licence-MIT.txt"],
        "compressed, beside the same unpacked": ["c.json.gz"],
        "links to nothing, pipes or devices": ["dead.txt", "pipe.txt"],
        "links to folders: name those": ["e/round"],
        "empty": ["empty.txt"],
        "other names of files that are read": ["link.txt", "z.jsonl"],
        "no ending of text that is read": ["noending", "x.pdf"],
        "tokens: name their prefix": ["p.bin", "p.idx", "p.json"],
        "JSON without the field that is read": ["about.json", "config.json.xz"],
    }
    plain, lines = [f"plain {ending}" for ending in sorted(PACKERS)], [f"lines {ending}" for ending in sorted(PACKERS)]
    wanted = [*plain[1:], plain[0], *lines[1:], lines[0], "one", "two", "nd", "row", "r", "a\nrow", "tabs"]
    read = texts(tmp_path)
    assert sorted(read) == sorted(wanted) and len(found["files"]) == len(read) - 1
    line = summary("corpus", found)
    assert line.startswith("corpus: read 16 files (a.bz2.txt.bz2, ") and " and 8 more); passed over 21: .git, .hidden.txt" in line
    assert "e/round (links to folders: name those)" in line and "\n" not in line
    assert {os.path.basename(name) for name, _, _ in stamps(str(tmp_path))} >= {os.path.basename(name) for name in found["files"]}


def test_shards_are_read_by_the_split_that_their_names_say(tmp_path, folder):
    names = ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000-of-00001", "test/0", "more")
    for name in names:
        table(tmp_path / f"{name}.parquet", text=[f"text of {name} " * 9])
    said = lambda split: [text.split()[2] for text in texts(tmp_path, split=split)]
    assert said("train") == [*names[:2], "more"] and said("validation") == said("dev") == [names[2]]
    assert draw_windows(str(tmp_path), folder, seq_length=4, count=1).facts["split"] == "test"
    found = open_documents(str(tmp_path), ("text",), split="train").contents()
    assert found["passed_over"] == {
        "of the split validation": [f"{names[2]}.parquet"],
        "of the split test": [f"{names[3]}.parquet"],
    }
    with pytest.raises(InputError, match="(?s)no split 'mine'.*splits train, validation, test"):
        texts(tmp_path, split="mine")


def test_a_name_that_is_not_utf_8_is_read_and_recorded_as_text(tmp_path):
    write(tmp_path, {os.fsdecode(b"na\xffme.txt"): b"plain", os.fsdecode(b"\xfe.pdf"): b"x"})
    found = open_documents(str(tmp_path), ("text",), split="train").contents()
    assert found == {"files": ["na?me.txt"], "passed_over": {"no ending of text that is read": ["?.pdf"]}}
    assert texts(tmp_path) == ["plain"] and summary("corpus", found).encode("utf-8")


def test_names_that_only_look_like_splits_are_none(tmp_path):
    write(tmp_path, {f"{name}.txt": name.encode() for name in ("train_station", "test_drive", "test", "validity")})
    assert sorted(texts(tmp_path)) == ["test", "test_drive", "train_station", "validity"]


def test_a_folder_without_text_says_what_it_holds(tmp_path):
    write(tmp_path, {"README.md": b"x", "x.pdf": b"x"})
    with pytest.raises(
        InputError,
        match=r"(?s)^there is no text in .*read 0 files; passed over.*README.md \(about the data\).*x.pdf \(no ending.*needed: .*\.txt",
    ):
        texts(tmp_path)


def test_a_file_is_not_read_by_two_sources(load, tmp_path):
    write(tmp_path, {"c/a.txt": b"some words " * 50, "b.txt": b"other words " * 50})
    os.link(tmp_path / "b.txt", tmp_path / "same.txt")
    for names in (("c", "c/a.txt"), ("b.txt", "same.txt")):
        with pytest.raises(InputError, match="(?s)--data: .* would be read twice.*leave one of them out"):
            load(*(f"{tmp_path / name}:1" for name in names))
    check_read_once("--data", [("a", [tmp_path / "b.txt"]), ("b", [tmp_path / "c" / "a.txt"])])
    entry = load(f"{tmp_path / 'c'}:1").provenance[0]
    assert entry["files"] == ["a.txt"] and entry["passed_over"] == {}


@pytest.mark.parametrize("ending", PACKERS)
def test_one_packed_file_is_a_source_of_any_length(tmp_path, ending, monkeypatch):
    rows = [{"text": f"row {number} " + "ü" * number} for number in range(700)]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    for mark in (b"", b"\xef\xbb\xbf"):
        write(tmp_path, {f"x.jsonl{ending}": PACKERS[ending](mark + content), f"x.txt{ending}": PACKERS[ending](mark + content)})
        assert texts(tmp_path / f"x.jsonl{ending}") == [row["text"] for row in rows]
        assert "".join(texts(tmp_path / f"x.txt{ending}")) == content.decode()
    if ending:
        whole = (tmp_path / f"x.jsonl{ending}").read_bytes()
        for damaged in (whole[:-9], whole[: len(whole) // 2], b"no", whole[:30] + bytes([whole[30] ^ 255]) + whole[31:]):
            (tmp_path / f"bad.jsonl{ending}").write_bytes(damaged)
            with pytest.raises(InputError, match=rf"(?s)bad.jsonl\{ending} cannot be read|bad.jsonl\{ending}, line \d+"):
                texts(tmp_path / f"bad.jsonl{ending}")
        (tmp_path / f"x.parquet{ending}").write_bytes(whole)
        with pytest.raises(InputError, match="(?s)not read while it is packed.*unpack it"):
            texts(tmp_path / f"x.parquet{ending}")


@settings(max_examples=40)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=12), st.integers(0, 4), st.booleans())
def test_json_in_any_layout_is_its_records(tmp_path_factory, said, layout, escape):
    file = tmp_path_factory.mktemp("json") / "x.json"
    rows = [{"id": [{"a": 1.5e3}], "text": text} for text in said]
    dumps = lambda value, **options: json.dumps(value, ensure_ascii=escape, **options)
    content = [
        dumps(rows),
        dumps(rows, indent=2),
        "\n".join(map(dumps, rows)),
        " ".join(dumps(row, indent=1) for row in rows),
        "\ufeff\n[\n" + ",\n".join(map(dumps, rows)) + "\n]\n\n",
    ][layout]
    file.write_text(content, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jsonl._Values, "_BLOCK", 7)
        assert texts(file) == [text.removeprefix("\ufeff") for text in said]


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"text": "a"}\n,{"text": 5}]', "line 2 has no text in field 'text'.*int"),
        ('[{"text": "a"}\n', "line 2 is not JSON.*, or ]"),
        ('[{"text": "a"}]\n[]', "line 2 is not JSON.*something follows"),
        ('[{"text": "a"},\n]', "line 2 is not JSON"),
        ('{"text": "a"}\n{"text": "b', "line 2 is not JSON.*Unterminated"),
        ('{"text": "a"}\n\n{"text" "b"}' + " " * 99, "line 3 is not JSON.*delimiter"),
        ("[1, 2]", "line 1.*got: int.*JSON object"),
        ("[" * 200_000, "line 1 is not JSON.*too deep"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 1 is not JSON.*thousands of digits"),
        ('{"text": "\\ud800"}', "line 1 is no text"),
    ],
)
def test_json_that_is_damaged_is_named_by_its_line(tmp_path, content, message):
    for name in ("x.json", "x.jsonl"):
        if name == "x.json" or content[0] == "{":
            (tmp_path / name).write_text(content)
            with pytest.raises(InputError, match=f"(?s){name}, {message}"):
                texts(tmp_path / name)


def test_a_record_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_RECORD", 1000)
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_text('{"text": "' + "a" * 5000)
        with pytest.raises(InputError, match=f"{name}, line 1 has no end"):
            texts(tmp_path / name)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "text".encode("utf-16"), "UTF-16.*iconv -f UTF-16"),
        ("a.jsonl", "text".encode("utf-32"), "UTF-32.*iconv -f UTF-32"),
        ("a.txt", "text".encode("utf-16-le"), "a NUL byte after 1 characters: a binary file, or UTF-16"),
        ("a.txt.gz", gzip.compress(b"good" * 9000 + b"\0", mtime=0), "a NUL byte after 36000 characters"),
        ("a.parquet", b"PAR1 no", "cannot be read.*a whole Parquet file"),
        ("a.arrow", b"ARROW1 no", "cannot be read.*a whole Arrow file"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"(?s){name} {'cannot be read as text.*' if 'whole' not in message else ''}{message}"):
        texts(tmp_path / name)


def test_tables_are_read_column_by_column(tmp_path, monkeypatch):
    rows = [f"row {number}" for number in range(600)]
    kinds = {"text": rows, "body": pyarrow.array(rows).dictionary_encode(), "id": list(range(600)), "deep": [{"a": 1}] * 600}
    table(tmp_path / "x.parquet", **kinds)
    with (
        pyarrow.OSFile(str(tmp_path / "file.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, pyarrow.table(kinds).schema) as out,
    ):
        out.write(pyarrow.table(kinds))
    with (
        pyarrow.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, pyarrow.table(kinds).schema) as out,
    ):
        out.write(pyarrow.table(kinds))
    for name in ("x.parquet", "file.arrow", "stream.arrow"):
        assert texts(tmp_path / name) == texts(tmp_path / name, "body") == rows
        with pytest.raises(InputError, match=r"(?s)no column 'txt'.*text \(string\).*id \(int64\), deep \(struct<a: int64>\)"):
            texts(tmp_path / name, "txt")
        for column in ("id", "deep"):
            with pytest.raises(InputError, match=f"(?s)column '{column}' of .*{name} holds no text.*got: columns text"):
                texts(tmp_path / name, column)
    table(tmp_path / "holes.parquet", text=["a", None])
    with pytest.raises(InputError, match="(?s)holes.parquet, row 2 has no text in field 'text'.*NoneType"):
        texts(tmp_path / "holes.parquet")


def test_an_arrow_file_whose_offsets_lead_outside_is_refused(tmp_path):
    columns = pyarrow.table({"text": ["ab", "cd"]})
    for name, new in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with pyarrow.OSFile(str(tmp_path / name), "wb") as sink, new(sink, columns.schema) as out:
            out.write(columns)
        whole, offsets = (tmp_path / name).read_bytes(), struct.pack("<3i", 0, 2, 4)
        assert whole.count(offsets) == 1 and texts(tmp_path / name) == ["ab", "cd"]
        (tmp_path / name).write_bytes(whole.replace(offsets, struct.pack("<3i", 0, 2, 1 << 30)))
        with pytest.raises(InputError, match=f"(?s){name} cannot be read.*a whole Arrow file"):
            texts(tmp_path / name)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"id,txt\n1,a\n", "x.csv, line 2 has no text in field 'text'.*fields id, txt"),
        (b"id,text\n1,a\n2\n", "x.csv, line 3 is no row.*more or fewer fields"),
        (b'id,text\n1,"a\n', "x.csv, line 2 is no row.*unexpected end of data"),
        (b"id,text\n1,\xff\n", "x.csv cannot be read as text"),
    ],
)
def test_tables_of_text_that_are_damaged_are_named(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(InputError, match=f"(?s){message}"):
        texts(tmp_path / "x.csv")


def test_too_much_to_tokenise_whole_is_refused(load, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_prune.text.documents.MOST", 1 << 20)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a " * (1 << 20)))
    with pytest.raises(InputError, match="(?s)bomb.txt.gz is too long.*1048576 characters.*preprocess"):
        load(f"{tmp_path}/bomb.txt.gz:1")


@pytest.mark.parametrize("name", ["", "a" * 5000, "./x/" + "a" * 300, "a\0b"])
def test_names_that_name_nothing_are_refused(name):
    with pytest.raises(InputError):
        open_documents(name, ("text",), split="train")


def test_a_pipe_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is a pipe or a device"):
        open_documents(str(tmp_path / "pipe"), ("text",), split="train")


@pytest.mark.parametrize(
    "changes, flag",
    [
        ({"nsamples": 0}, "--nsamples"),
        ({"nsamples": -1}, "--nsamples"),
        ({"nsamples": 10**20}, "--nsamples"),
        ({"seq_length": 1}, "--seq-length"),
        ({"seq_length": -5}, "--seq-length"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_numbers_that_are_nonsense_are_refused_by_their_flag(load, tmp_path, changes, flag):
    (tmp_path / "a.txt").write_text("words " * 99)
    with pytest.raises(InputError, match=flag):
        load(f"{tmp_path}/a.txt:1", **changes)


def test_a_folder_that_may_not_be_looked_into_is_an_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("megatron_prune.text.contents.os.scandir", refuse)
    with pytest.raises(InputError, match="(?s)cannot be read.*Permission denied"):
        contents_of(tmp_path, lambda file: True)
