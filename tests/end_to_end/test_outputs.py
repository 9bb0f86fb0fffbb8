"""A disk that refuses, at every verb: a message that names file and cause, the right exit code, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny import build_tiny

from megatron_prune.cli.main import main
from megatron_prune.files import atomic
from megatron_prune.text.pair import open_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, its checkpoint, counts of a text, its plan of a vocabulary, and a pair."""
    home = tmp_path_factory.mktemp("models")
    build_tiny(home / "hf", "qwen2")
    (home / "text.txt").write_text("A small text for a small tokenizer.\n" * 40)
    main(["convert", "--load-dir", str(home / "hf"), "--save-dir", str(home / "m")])
    words = ["--tokenizer", str(home / "hf"), "--workers", "1", "--input", str(home / "text.txt")]
    main(["vocab", "count", *words, "--output", str(home / "counts")])
    main(["preprocess", *words, "--output-prefix", str(home / "x")])
    main(["vocab", "trim", "--load-dir", str(home / "hf"), "--save-dir", str(home / "trimmed"), "--remain-vocab-size", "290"])
    return home


VERBS = {
    "convert": "--load-dir {m}/hf --save-dir {o}/out",
    "export": "--load-dir {m}/m --save-dir {o}/out",
    "transfer": "--load-dir {m}/m --save-dir {o}/out --ckpt-format torch",
    "prune": "--load {m}/m --save {o}/out --ffn-hidden-size-remain 48 --metric magnitude --save-plan {o}/plan.json",
    "prune-hf": "--model-name-or-path {m}/hf --output-path {o}/out --params 90K --metric magnitude --save-plan {o}/plan.json",
    "score": "--load {m}/m --save {o}/out --metrics magnitude --data {m}/text.txt --seq-length 16 --nsamples 2",
    "sample": "--load {m}/m --save {o}/out.safetensors --nsamples 1 --seq-length 4",
    "vocab count": "--tokenizer {m}/hf --input {m}/x_text_document.bin --output {o}/out --text {o}/out.txt --workers 1",
    "vocab select": "--load-dir {m}/hf --remain-vocab-size 290 --report {o}/report --save-ids {o}/ids --save-plan {o}/plan.json",
    "vocab trim": "--load-dir {m}/hf --save-dir {o}/out --remain-vocab-size 290 --report {o}/report --save-ids {o}/ids",
    "vocab remap": "--input {m}/x_text_document --output-prefix {o}/out --map {m}/trimmed",
}


def words(verb: str, models: Path, place: Path) -> list[str]:
    return [*verb.split(), *VERBS[verb].format(m=models, o=place).split()]


def run(argv: list[str], capsys) -> tuple[int, str]:
    capsys.readouterr()
    try:
        main(argv)
        code = 0
    except SystemExit as left:
        code = left.code
    return code, re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\r", "", capsys.readouterr().err)


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "verb, number", [*((verb, errno.ENOSPC) for verb in VERBS), ("convert", errno.EDQUOT), ("export", errno.EIO)]
)
def test_a_disk_that_refuses_in_the_middle_leaves_nothing(models, tmp_path, monkeypatch, capsys, verb, number):
    """Refused is the last write of a run, or of the streamed ones the second."""
    seen, pwrite, fsync = [0], os.pwrite, os.fsync

    def refuse(descriptor, *_):
        raise OSError(number, os.strerror(number))

    def second(descriptor, *rest):
        seen[0] += 1
        return refuse(descriptor) if seen[0] == 2 else pwrite(descriptor, *rest)

    def sync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        return refuse(descriptor) if "content" in path and os.path.isfile(path) else fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", second)
        patched.setattr(os, "fsync", sync)
        code, said = run(words(verb, models, tmp_path), capsys)
    assert code == 1 and "Traceback" not in said
    assert re.search(rf"was not written\n  got: .*{os.strerror(number)}\n  what to do: ", said), said
    left = [name for name in os.listdir(tmp_path) if not name.endswith(".work")]
    assert not left, left
    assert run(words(verb, models, tmp_path), capsys)[0] == 0
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_what_torch_makes_of_a_full_disk_is_said_too(models, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", refuse)
    code, said = run(words("convert", models, tmp_path), capsys)
    assert code == 1 and "is there room?" in said and "inline_container" not in said and not os.listdir(tmp_path)


def test_a_plan_and_its_model_appear_together_or_not_at_all(models, tmp_path, monkeypatch, capsys):
    assert run(words("prune", models, tmp_path), capsys)[0] == 0
    before, write = contents(tmp_path), atomic.write_bytes

    def refuse(path, data):
        if ".plan.json.partial" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    changed = ["--overwrite", "--ffn_hidden_size_remain", "36"]
    with monkeypatch.context() as patched:
        patched.setattr("megatron_prune.files.staging.write_bytes", refuse)
        code, said = run([*words("prune", models, tmp_path), *changed], capsys)
    assert code == 1 and "plan.json" in said and contents(tmp_path) == before
    assert run([*words("prune", models, tmp_path), *changed], capsys)[0] == 0
    after = contents(tmp_path)
    assert after.keys() == before.keys() and after["plan.json"] == after["out/release/plan.json"] != before["plan.json"]


def test_an_unreadable_input_is_named_before_work(models, tmp_path, monkeypatch, capsys):
    shutil.copytree(models / "hf", tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    (tmp_path / "hf/model.safetensors").mkdir()
    iterdir = Path.iterdir

    def refuse(path):
        if path == models / "m/release/hf":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    code, said = run(["export", "--load-dir", str(models / "m"), "--save-dir", str(tmp_path / "out")], capsys)
    assert code == 2 and re.search("release/hf: Permission denied\n  what to do: ask for the permission", said)
    assert "Traceback" not in said and os.listdir(tmp_path) == ["hf"]


def test_no_room_is_seen_before_work_with_side_files_and_plan_counted(models, tmp_path, monkeypatch, capsys):
    weights = (models / "hf/model.safetensors").stat().st_size
    for free, code in ((weights + 1000, 2), (weights + 10_000_000, 0)):
        room = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda path: room)
        got, said = run(words("convert", models, tmp_path), capsys)
        assert got == code and (not code or re.search("not enough room for .*out.*needed: .* bytes.*make room", said, re.S)), said
        assert bool(os.listdir(tmp_path)) is not bool(code)


def test_a_pair_half_in_place_is_completed_by_whoever_opens_it(models, tmp_path, monkeypatch, capsys):
    class Died(BaseException):
        pass

    rename = os.rename

    def die(one, other):
        if Path(other) == tmp_path / "out.bin":
            raise Died
        rename(one, other)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(os, "rename", die)
        main(words("vocab remap", models, tmp_path))
    assert (tmp_path / "out.json").exists() and not (tmp_path / "out.idx").exists()
    assert open_pair(tmp_path / "out").documents == open_pair(models / "x_text_document").documents
    assert json.loads((tmp_path / "out.json").read_text())["tokens"] == open_pair(tmp_path / "out").total
    assert run(words("vocab remap", models, tmp_path), capsys)[0] == 0  # without --overwrite: it was not at its end
    assert sorted(os.listdir(tmp_path)) == ["out.bin", "out.idx", "out.json"]
    assert run(words("vocab remap", models, tmp_path), capsys)[0] == 2


def test_links_out_of_a_model_are_refused_and_linked_weights_said(models, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    for file in (models / "hf").iterdir():
        shutil.copy(file, tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    (tmp_path / "hf/model.safetensors").symlink_to(models / "hf/model.safetensors")
    words = ["convert", "--load-dir", str(tmp_path / "hf"), "--save-dir", str(tmp_path / "out")]
    code, said = run(words, capsys)
    assert code == 0 and f"weights that are links: model.safetensors → {models / 'hf/model.safetensors'}" in said
    (tmp_path / "hf/LICENSE").symlink_to("/etc/hostname")
    code, said = run([*words, "--overwrite"], capsys)
    assert code == 2 and re.search("LICENSE is a link to /etc/hostname, outside of the model's directory", said)
    plan = tmp_path / "out/release/plan.json"
    plan.symlink_to(models / "text.txt")
    for verb in ("export", "transfer"):
        code, said = run([verb, "--load-dir", str(tmp_path / "out"), "--save-dir", str(tmp_path / "more")], capsys)
        assert code == 2 and re.search("(?s)plan.json.*got: a link", said) and not (tmp_path / "more").exists()


FILE_FLAGS = {
    "plan": ["--save"],
    "prune": ["--save-plan"],
    "prune-hf": ["--save-plan"],
    "sample": ["--save"],
    "vocab count": ["--output", "--text"],
    "vocab select": ["--report", "--save-ids", "--save-plan"],
    "vocab trim": ["--report", "--save-ids"],
    "evaluate": ["--output"],
    "compare": ["--output"],
}


@pytest.mark.parametrize("verb, flag", [(verb, flag) for verb, flags in FILE_FLAGS.items() for flag in flags])
def test_links_and_pipes_are_refused_by_every_flag_that_names_a_file(models, tmp_path, capsys, verb, flag):
    shared = {
        "evaluate": f"--load-dir {models}/m --data {models}/text.txt --seq-length 16",
        "compare": f"--before {models}/hf --after {models}/hf",
        "plan": f"--load {models}/hf --ffn-hidden-size-remain 48 --metric magnitude",
    }
    link, pipe = tmp_path / "link.safetensors", tmp_path / "pipe.safetensors"
    (tmp_path / "target").write_text("kept")
    link.symlink_to("target")
    os.mkfifo(pipe)
    for path, got in ((link, "a link"), (pipe, "a pipe")):
        argv = [*verb.split(), *shared[verb].split()] if verb in shared else words(verb, models, tmp_path)
        again = ["--overwrite"] if verb == "vocab count" else []
        code, said = run([*argv, flag, str(path), *again], capsys)
        assert code == 2 and re.search(f"(?s){path.name}.*got: {got}.*needed: a regular file", said), said
    assert sorted(os.listdir(tmp_path)) == ["link.safetensors", "pipe.safetensors", "target"]
    assert link.is_symlink() and pipe.is_fifo() and (tmp_path / "target").read_text() == "kept"


@pytest.mark.parametrize("ending", ["json", "bin", "idx"])
@pytest.mark.parametrize("verb", ["vocab remap", "preprocess"])
def test_a_pair_replaces_no_link_and_nothing_of_others(models, tmp_path, capsys, verb, ending):
    name = "out" if verb == "vocab remap" else "out_text_document"
    argv = words(verb, models, tmp_path) if verb in VERBS else ["preprocess", "--input", str(models / "text.txt"), "--tokenizer"]
    argv += [] if verb in VERBS else [str(models / "hf"), "--output-prefix", str(tmp_path / "out"), "--workers", "1"]
    file = tmp_path / f"{name}.{ending}"
    file.write_text("thesis")
    code, said = run([*argv, "--overwrite"], capsys)
    assert code == 2 and re.search(f"{name}.{ending} is not replaced", said) and file.read_text() == "thesis"
    file.unlink()
    file.symlink_to(models / "text.txt")
    code, said = run([*argv, "--overwrite"], capsys)
    assert code == 2 and re.search(f"(?s){name}.{ending}.*got: a link", said) and file.is_symlink()
    assert os.listdir(tmp_path) == [file.name]
