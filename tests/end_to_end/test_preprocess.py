"""`megatron-prune preprocess`, against files written out by hand, by Megatron's own tokenizer, and read by Megatron's own data
sets; stopped runs, and bad input."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from tiny import build_tiny

from megatron_prune import __version__
from megatron_prune.cli.main import main, run_verb
from megatron_prune.errors import InputError, PruneError
from megatron_prune.runtime.world import World
from megatron_prune.steps import preprocess as step
from megatron_prune.steps.preprocess import PreprocessOptions, part_size, preprocess
from megatron_prune.text.cutting import cut
from megatron_prune.text.documents import open_documents
from megatron_prune.text.encoder import tokenizer_digest
from megatron_prune.text.pair import open_pair

FORMATS = {"uint16": (8, "H"), "int32": (4, "i")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model: its tokenizer has 307 tokens, 1 is the end of text."""
    return build_tiny(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of about two kilobytes."""
    monkeypatch.setattr(step, "part_size", lambda total: 2000)


def run(**options) -> None:
    tuples = {name: tuple(map(str, options.pop(name))) for name in ("input", "json_keys") if name in options}
    rest = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    preprocess(PreprocessOptions(**tuples, **rest), World())


def records(count: int, seed: int = 0) -> list[dict]:
    """Some of them hold nothing; one is long."""
    generator = random.Random(seed)

    def text() -> str:
        length = generator.choice([0, 1, 20, 200])
        return " ".join("".join(generator.choices("abcdefghij ß漢", k=generator.randint(1, 9))) for _ in range(length))

    made = [{"text": text(), "title": text(), "id": number} for number in range(count)]
    return [*made, {"text": "word " * 3000, "title": " \n\t", "id": count}]


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def dense(documents: list[list[int]], dtype: str = "uint16") -> tuple[bytes, bytes]:
    """(.idx, .bin) as the specification has them."""
    code, letter = FORMATS[dtype]
    lengths, size = [len(document) for document in documents], struct.calcsize(letter)
    places = [size * place for place in accumulate([0, *lengths[:-1]])]
    count = len(documents)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, count, count + 1)
    index += struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *places, *range(count + 1))
    return index, b"".join(struct.pack(f"<{len(document)}{letter}", *document) for document in documents)


def written(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    return tuple(Path(f"{prefix}_{key}_document.{ending}").read_bytes() for ending in ("idx", "bin"))


def encoded(tokenizer, texts: list[str], end: list[int]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in texts if text.strip()]


def test_every_byte_is_that_of_the_specification_for_any_number_of_workers(folder, tokenizer, tmp_path):
    rows = records(60)
    one, two = write_jsonl(tmp_path / "one.jsonl", rows[:45]), write_jsonl(tmp_path / "two.jsonl", rows[45:])
    for workers in (1, 3):
        prefix = tmp_path / "new" / f"by{workers}"
        run(input=(one, two), save=prefix, tokenizer=folder, json_keys=("text", "title"), workers=workers)
        for key in ("text", "title"):
            documents = encoded(tokenizer, [row[key] for row in rows], [1])
            assert written(prefix, key) == dense(documents)
            record = json.loads(Path(f"{prefix}_{key}_document.json").read_text())
            assert record == {
                "format": "megatron-prune documents",
                "version": __version__,
                "inputs": ["one.jsonl", "two.jsonl"],
                "contents": {},
                "key": key,
                "left_out": {"without text": len(rows) - len(documents)},
                "split": "train",
                "tokenizer": {"name": "hf", "vocab_size": 307, "eod": 1, "digest": tokenizer_digest(tokenizer)},
                "append_eod": True,
                "include_special_tokens": False,
                "documents": len(documents),
                "tokens": sum(map(len, documents)),
                "dtype": "uint16",
                "digest": hashlib.sha256(dense(documents)[1]).hexdigest(),
            }
    names = [f"by{n}_{key}_document.{end}" for n in (1, 3) for key in ("text", "title") for end in ("bin", "idx", "json")]
    assert sorted(os.listdir(tmp_path / "new")) == names


def test_the_tokens_are_those_of_megatrons_own_tokenizer(folder, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    begins = AutoTokenizer.from_pretrained(folder)  # it puts <s> before a text, as Llama's does
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    begins.save_pretrained(tmp_path / "begins")
    rows = [row for row in records(20, seed=1) if row["text"].strip()] + [{"text": "An end </s> in a text"}]
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    for special in (False, True):
        theirs = HuggingFaceTokenizer(str(tmp_path / "begins"), include_special_tokens=special)
        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=step.numpy_dtype(307))
        for row in rows:  # Encoder.encode of tools/preprocess_data.py
            ids = theirs.text_to_ids(row["text"]) + [1]
            builder.add_document(ids, [len(ids)])
        builder.finalize(str(tmp_path / "theirs.idx"))
        run(
            input=(file,),
            save=tmp_path / "ours",
            tokenizer=tmp_path / "begins",
            tokenizer_hf_include_special_tokens=special,
            overwrite=True,
        )
        assert written(tmp_path / "ours") == tuple((tmp_path / f"theirs.{end}").read_bytes() for end in ("idx", "bin"))
        assert (open_pair(tmp_path / "ours_text_document").window(0, 1).item() == 0) is special


def test_megatron_trains_on_it(folder, tokenizer, tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 307, 1, 0, {"name": "tiny"}

    text = "\n\n".join(row["text"] for row in records(400, seed=2))
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(text.encode()))
    run(input=(tmp_path / "text.txt.gz",), save=tmp_path / "x", tokenizer=folder, append_eod=False)
    pair = open_pair(tmp_path / "x_text_document")
    stored = IndexedDataset(pair.prefix)
    assert "".join(tokenizer.decode(stored[number]) for number in range(len(stored))) == text
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend=([pair.prefix], None),
        split="80,20,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        tokenizer=Tokenizer(),
        path_to_cache=str(tmp_path / "cache"),
        mid_level_dataset_surplus=0.005,
    )
    train, valid, test = BlendedMegatronDatasetBuilder(GPTDataset, [9, 3, 0], lambda: True, config).build()
    assert pair.documents > 5 and test is None
    runs = pair.window(0, pair.total).unfold(0, 33, 1)
    for sample in (train[0], valid[0]):
        row = torch.cat([sample["tokens"], sample["labels"][-1:]])
        joined = [row[:n].tolist() for n in (8, 33)]
        assert any((runs[:, : len(part)] == torch.tensor(part)).all(1).any() for part in joined)


@pytest.mark.parametrize("size, dtype", [(307, "uint16"), (65499, "uint16"), (65500, "int32"), (128256, "int32")])
def test_the_vocabulary_decides_the_width_of_a_token(size, dtype):
    assert step.numpy_dtype(size).__name__ == dtype


def test_parts_suit_the_input():
    sizes = {None: 1 << 22, 10: 1 << 20, 1 << 30: 1 << 22, (1 << 30) - 999: 1 << 21, 1 << 40: 1 << 24}
    assert {total: part_size(total) for total in sizes} == sizes


def test_a_checkpoint_lends_its_tokenizer(folder, tokenizer, tmp_path):
    main(["convert", "--load-dir", str(folder), "--save-dir", str(tmp_path / "megatron")])
    (tmp_path / "x.txt").write_text("some text")
    for number, name in enumerate(("megatron", "megatron/release")):
        run(input=(tmp_path / "x.txt",), save=tmp_path / str(number), tokenizer=tmp_path / name, workers=1)
        assert written(tmp_path / str(number)) == dense(encoded(tokenizer, ["some text"], [1]))
    shutil.rmtree(tmp_path / "megatron" / "release" / "hf")
    with pytest.raises(InputError, match="megatron keeps no tokenizer"):
        run(input=(tmp_path / "x.txt",), save=tmp_path / "x", tokenizer=tmp_path / "megatron")


def parts_of(work: Path) -> dict[str, int]:
    """Finished parts with the times of their files."""
    return {file.name: file.stat().st_mtime_ns for file in work.glob("part-*") if file.with_suffix(".npy").exists()}


def test_a_stopped_run_goes_on_where_it_was(folder, tokenizer, tmp_path, monkeypatch):
    rows = records(60, seed=3)
    asked = {"input": (write_jsonl(tmp_path / "x.jsonl", rows),), "save": tmp_path / "x", "tokenizer": folder}
    work, join = tmp_path / ".x.work/content", step.join_parts
    expected, found = dense(encoded(tokenizer, [row["text"] for row in rows], [1])), []

    class Stopping:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self.stop

        def __exit__(self, *_):
            pass

        def stop(self, size):
            raise KeyboardInterrupt

    def watched(parts, *more):
        found.append(parts_of(work))
        return join(parts, *more)

    with monkeypatch.context() as stopped:
        stopped.setattr(step, "progress_bar", Stopping)
        with pytest.raises(KeyboardInterrupt):
            run(**asked, workers=1)
    kept = parts_of(work)
    assert kept and sorted(os.listdir(tmp_path)) == [".x.work", "x.jsonl"]
    monkeypatch.setattr(step, "join_parts", watched)
    source = open_documents(str(asked["input"][0]), ("text",), split="train")
    parts = cut(source.documents(("text",)), 2000, work, [Counter()], answers=False)
    missing = [part.prefix for part in parts if not part.is_written]
    full = Path(f"{missing[-1]}.bin")
    full.symlink_to("/dev/full")
    with pytest.raises(PruneError, match="(?s)x was not written.*No space left.*finished parts are kept"):
        run(**asked, workers=2)
    assert sorted(os.listdir(tmp_path)) == [".x.work", "x.jsonl"] and kept.items() <= parts_of(work).items()
    full.unlink()
    kept = parts_of(work)
    run(**asked, workers=3)
    assert len(found[0]) > len(kept) and kept.items() <= found[0].items()
    assert written(tmp_path / "x") == expected and not work.exists()
    with monkeypatch.context() as stopped:
        stopped.setattr(step, "progress_bar", Stopping)
        with pytest.raises(KeyboardInterrupt):
            run(**asked, workers=1, overwrite=True, append_eod=False)
    assert written(tmp_path / "x") == expected
    before = parts_of(work)
    run(**asked, overwrite=True)  # other tokens: no part of the stopped run is taken
    assert written(tmp_path / "x") == expected and before and not before.items() & found[1].items()


def test_a_mended_line_leaves_the_other_parts_as_they_were(folder, tokenizer, tmp_path, monkeypatch):
    rows = records(60, seed=5)
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    good = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*good[:-1], "no\n"]))
    with pytest.raises(InputError, match="x.jsonl, line 61 is not JSON"):
        run(input=(file,), save=tmp_path / "x", tokenizer=folder, workers=1)
    kept, found, join = parts_of(tmp_path / ".x.work/content"), {}, step.join_parts

    def watched(parts, *more):
        found.update(parts_of(tmp_path / ".x.work/content"))
        return join(parts, *more)

    monkeypatch.setattr(step, "join_parts", watched)
    write_jsonl(file, rows)
    run(input=(file,), save=tmp_path / "x", tokenizer=folder, workers=1)
    assert written(tmp_path / "x") == dense(encoded(tokenizer, [row["text"] for row in rows], [1]))
    assert kept and kept.items() <= found.items()


KILLED = """
import sys
from megatron_prune.runtime.world import World
from megatron_prune.steps import preprocess as step
step.part_size = lambda total: 2000
options = step.PreprocessOptions(input=(sys.argv[1],), save=sys.argv[2], tokenizer=sys.argv[3], workers=2)
step.preprocess(options, World())
"""


def descendants(pid: int) -> set[int]:
    """Living processes below one."""
    parents = {}
    for entry in os.listdir("/proc"):
        try:
            state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if entry.isdigit() and state != "Z":
            parents[int(entry)] = int(parent)
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {pid}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_run_leaves_no_process_and_no_output(folder, tokenizer, tmp_path):
    rows = records(2000, seed=4)
    file, work = write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / ".x.work/content"
    words = [sys.executable, "-c", KILLED, str(file), str(tmp_path / "x"), str(folder)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (work.is_dir() and parts_of(work)):
        time.sleep(0.01)
    workers = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and workers
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if alive(pid)]
    assert sorted(os.listdir(tmp_path)) == [".x.work", "x.jsonl"]
    run(input=(file,), save=tmp_path / "x", tokenizer=folder, workers=2)
    assert written(tmp_path / "x") == dense(encoded(tokenizer, [row["text"] for row in rows], [1]))
    assert not work.exists()


@pytest.fixture
def refused(folder, tmp_path, capsys):
    """``refused(["--input", …], "pattern")``: exit code 2, a message with the pattern, ``tmp_path`` as it was."""

    def contents() -> dict:
        return {str(path): (path.stat().st_mtime_ns, path.is_dir()) for path in sorted(tmp_path.rglob("*"))}

    def check(argv: list, pattern: str) -> None:
        given = {"--output-prefix": tmp_path / "x", "--tokenizer": folder}
        more = [word for flag, value in given.items() if flag not in argv for word in (flag, value)]
        before = contents()
        with pytest.raises(SystemExit) as left:
            run_verb("preprocess", [*map(str, argv), *map(str, more)], prog="preprocess")
        message = capsys.readouterr().err
        assert left.value.code == 2 and "Traceback" not in message
        assert re.search("(?s)" + pattern, message), message
        assert contents() == before

    return check


def test_bad_input_is_refused_by_name(refused, folder, tokenizer, tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "x"}])
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe4")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\nno\n')
    (tmp_path / "nothing").mkdir()
    for file in ("taken_text_document.bin", "y_text_document.json"):
        (tmp_path / file).write_text('{"text": "x"}')
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    for argv, pattern in (
        (["--input", tmp_path / "missing.jsonl"], "no file or folder .*missing.jsonl"),
        (["--input", "wikitext"], "unknown data 'wikitext'; did you mean 'wikitext2'"),
        (["--input", good, tmp_path / "empty.txt"], "empty.txt is empty"),
        (["--input", tmp_path / "nothing"], "nothing is empty"),
        (["--input", good, tmp_path / "latin.txt"], "latin.txt cannot be read as text.*UTF-8"),
        (["--input", tmp_path / "bad.jsonl"], "bad.jsonl, line 2 is not JSON"),
        (["--input", good, "--json-keys", "text", "body"], "good.jsonl, line 1 has no text in field 'body'.*--json-keys"),
        (["--input", good, "--json-keys", "text", "text"], "--json-keys.*different names"),
        (["--input", good, "--json-keys", "a/b"], "--json-keys.*a/b"),
        (["--input", good, "--workers", 0], "--workers.*positive"),
        (["--input", good, "--workers", 10**6], "--workers.*at most 1024"),
        (["--input", good, "--split", "nope"], "--split nope has no effect"),
        (["--input", good, good], "--input: .*good.jsonl would be read twice"),
        (["--input", good, "--output-prefix", tmp_path / "taken"], "taken_text_document.bin exists.*--overwrite"),
        (["--input", good, "--output-prefix", f"{tmp_path}/"], "--save.*start of a file's name"),
        (["--input", good, "--output-prefix", good / "x"], "x_text_document.json cannot be written"),
        (["--input", tmp_path / "y_text_document.json", "--output-prefix", tmp_path / "y", "--overwrite"], "is the input"),
        (["--input", tmp_path, "--output-prefix", tmp_path / "nothing" / "x"], "lies in it"),
        (["--input", good, "--tokenizer", tmp_path / "nothing"], "there is none in .*nothing"),
        (["--input", good, "--tokenizer", tmp_path / "absent"], "absent"),
        (["--input", good, "--tokenizer", tmp_path / "endless"], "no end-of-text token.*--no-append-eod"),
        (["--input", tmp_path / "taken_text_document.bin"], "is not text"),
    ):
        refused(argv, pattern)
    run(input=(good,), save=tmp_path / "z", tokenizer=tmp_path / "endless", append_eod=False, workers=1)
    assert open_pair(tmp_path / "z_text_document").total == 1
    assert json.loads((tmp_path / "z_text_document.json").read_text())["tokenizer"]["eod"] is None
    with pytest.raises(InputError, match="(?s)one process.*got: 2.*--workers"):
        preprocess(PreprocessOptions(input=(str(good),), save="x", tokenizer=str(folder)), World(0, 2, 0))
