"""What an output may replace, where it may be put, and what comes along with weights."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
import types
import typing
from pathlib import Path

import pytest

from megatron_prune.checkpoint import huggingface, manifest
from megatron_prune.verbs.table import VERBS, options_of
from megatron_prune.cli.parser import parse
from megatron_prune.errors import InputError, PruneError
from megatron_prune.files import failures, hidden, staging
from megatron_prune.writing import overwrite as ours
from megatron_prune.writing.overwrite import HUGGING_FACE, MEGATRON, RUN, SCORES, TEACHER, check_output, check_pair

FILES = {
    "megatron": [
        "latest_checkpointed_iteration.txt",
        "iter_0000100/__0_0.distcp",
        "iter_0000100/.metadata",
        "iter_0000100/common.pt",
    ],
    "legacy": ["latest_checkpointed_iteration.txt", "release/mp_rank_00/model_optim_rng.pt"],
    "own megatron": [
        "latest_checkpointed_iteration.txt",
        f"release/{manifest.FILE}",
        "release/hf/tokenizer.json",
        "release/__0_0.distcp",
    ],
    "hf": ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "LICENSE"],
    "own hf": ["config.json", "model.safetensors", manifest.RECIPE_FILE, "plan.json", "README.md"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors"],
    "tokenizer": ["tokenizer.json", "vocab_map.npz", "config.json"],
    "scores": ["scores.json", "scores.safetensors", "layer_0000.safetensors"],
    "teacher": ["teacher.json", "part_00000.safetensors"],
    "run": [
        "run.json",
        "history.jsonl",
        "iter_0000001/.metadata",
        "tensorboard/events.out.tfevents.1",
        "data_cache/a-b-description.txt",
    ],
}
SAYS = {
    "scores.json": {"format": "megatron-prune scores"},
    "teacher.json": {"teacher": "x", "settings": {}},
    "run.json": {"id": "x", "settings": {}},
}


def made(place: Path, kind: str) -> Path:
    for name in FILES[kind]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(json.dumps(SAYS.get(name, {})))
    return place


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("writing", [MEGATRON, HUGGING_FACE, SCORES, TEACHER, RUN], ids=lambda kind: kind.name)
def test_ours_is_replaced_and_plain_checkpoints_by_their_own_kind_alone(tmp_path, kind, writing):
    plain = {"megatron": MEGATRON, "legacy": MEGATRON, "hf": HUGGING_FACE, "adapter": HUGGING_FACE}
    out = made(tmp_path / "out", kind)
    if plain.get(kind, writing) is writing:
        check_output(out, writing, overwrite=True)
    else:
        with pytest.raises(InputError, match="(?s)is not replaced.*of another origin.*needed: an output of megatron-prune"):
            check_output(out, writing, overwrite=True)
    with pytest.raises(InputError, match="exists.*"):
        check_output(out, writing, overwrite=False)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "foreign", ["thesis.txt", "data/x", ".git/HEAD", "model.safetensors.bak", "link", "release/notes", "pipe"]
)
def test_one_thing_more_and_nothing_is_replaced(tmp_path, kind, foreign):
    out = made(tmp_path / "out", kind)
    (out / foreign).parent.mkdir(parents=True, exist_ok=True)
    if foreign == "link":
        (out / foreign).symlink_to(tmp_path)
    elif foreign == "pipe":
        os.mkfifo(out / foreign)
    else:
        (out / foreign).write_text("thesis")
    for writing in (MEGATRON, HUGGING_FACE, RUN):
        with pytest.raises(InputError, match="is not replaced"):
            check_output(out, writing, overwrite=True)
    assert (out / foreign).is_fifo() or (out / foreign).exists()


@pytest.mark.parametrize("name", ["config.json", "thesis.txt", "model.safetensors", "scores.json", "run.json", "sub/config.json"])
def test_a_directory_of_other_things_is_not_replaced(tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("{}")
    for writing in (MEGATRON, HUGGING_FACE, SCORES, TEACHER, RUN):
        with pytest.raises(
            InputError, match=f"(?s)is not replaced.*got: {name.split('/')[0]}.*needed: an output of megatron-prune"
        ):
            check_output(tmp_path / "out", writing, overwrite=True)


def test_what_came_along_with_a_source_is_replaced_with_it(tmp_path):
    out, source = made(tmp_path / "out", "own hf"), made(tmp_path / "source", "hf")
    (out / "vocabulary.dat").write_text("x")
    with pytest.raises(InputError, match="vocabulary.dat, which is no part of a Hugging Face model"):
        check_output(out, HUGGING_FACE, overwrite=True, source=source)
    (source / "vocabulary.dat").write_text("x")
    check_output(out, HUGGING_FACE, overwrite=True, source=source)


def test_a_run_keeps_links_of_its_own_alone(tmp_path):
    out = made(tmp_path / "out", "run")
    (out / "best").symlink_to("iter_0000001")
    (out / ".iter_0000002.partial").mkdir()
    (out / ".iter_0000002.partial" / "anything").touch()
    check_output(out, RUN, overwrite=True)


@pytest.mark.parametrize("name", [".", "", "..", "../..", "/", "~", "sub/..", "../here", "./", "../here/."])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_holds_where_we_are_or_live_is_never_an_output(tmp_path, monkeypatch, name, overwrite):
    home = tmp_path / "home" / "me"
    (tmp_path / "here" / "sub").mkdir(parents=True)
    made(home, "hf")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "here")
    path = home if name == "~" else Path(name)
    for place in (path, home.parent):
        with pytest.raises(InputError, match="is the (current|home) directory or holds it"):
            check_output(place, HUGGING_FACE, overwrite=overwrite)


def test_what_is_read_is_not_taken_away(tmp_path):
    out = made(tmp_path / "out", "own hf")
    for name in ("out", "out/deep"):
        (tmp_path / name).mkdir(exist_ok=True)
        with pytest.raises(InputError, match=f"is or holds the input .*{name}"):
            check_output(out, HUGGING_FACE, overwrite=True, inputs=(None, str(tmp_path / name)))
    with pytest.raises(InputError, match="is, holds or lies in the input"):
        check_output(out / "deep", HUGGING_FACE, overwrite=True, source=out)


def test_dots_links_and_slashes_lead_to_where_they_lead(tmp_path, monkeypatch):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/deep")
    monkeypatch.chdir(tmp_path / "real")
    check_output(Path("../link/../out"), MEGATRON, overwrite=False)
    assert staging.partial_path(Path("../link/../out")) == tmp_path / "real" / ".out.partial" / "content"
    assert staging.partial_path(tmp_path / "link" / "out") == tmp_path / "real" / "deep" / ".out.partial" / "content"
    for path in (tmp_path / "link", Path(f"{tmp_path}/link/")):
        with pytest.raises(InputError, match="got: a link"):
            check_output(path, MEGATRON, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "kind, got",
    [("pipe", "a pipe"), ("socket", "a socket"), ("link", "a link"), ("dangling", "a link"), ("folder", "a directory")],
)
def test_a_file_replaces_regular_files_alone(tmp_path, kind, got):
    path = tmp_path / "out"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "target").write_text("old")
        path.symlink_to("target" if kind == "link" else "none")
    before = os.lstat(path)
    with pytest.raises(InputError, match=f"(?s)out.*got: {got}.*needed: a regular file"):
        staging.check_file(path)
    with pytest.raises(PruneError, match=f"(?s)out.*got: {got}"):
        staging.write_files({path: b"new", tmp_path / "other": b"new"})
    assert os.lstat(path).st_ino == before.st_ino and not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_device_is_refused(tmp_path, monkeypatch):
    """Not a real node: only root could make one."""
    lstat = os.lstat
    node = types.SimpleNamespace(st_mode=0o020666, st_ino=1)
    monkeypatch.setattr(os, "lstat", lambda path, **more: node if Path(path) == tmp_path / "null" else lstat(path, **more))
    with pytest.raises(InputError, match="(?s)null.*got: a device.*needed: a regular file"):
        staging.check_file(tmp_path / "null")


def pair(folder: Path, name: str = "x", **texts: bytes) -> dict[str, Path]:
    files = {ending: folder / f"{name}.{ending}" for ending in ("json", "bin", "idx")}
    for ending, text in texts.items():
        files[ending].write_bytes(text)
    return files


RECORD = b'{"format": "megatron-prune documents", "tokenizer": {}}'
INDEX = b"MMIDIDX\x00\x00rest"


@pytest.mark.parametrize(
    "there, refused",
    [
        ({"bin": b"1", "idx": INDEX}, None),
        ({"json": RECORD, "bin": b"1", "idx": INDEX}, None),
        ({"json": RECORD}, None),
        ({"json": b"{}", "bin": b"1", "idx": INDEX}, "x.json"),
        ({"bin": b"a program"}, "x.bin"),
        ({"idx": INDEX}, "x.idx"),
        ({"bin": b"1", "idx": b"an index of a book"}, "x.bin"),
    ],
)
def test_a_pair_replaces_pairs_alone(tmp_path, there, refused):
    files = pair(tmp_path, **there)
    with pytest.raises(InputError, match="exists"):
        check_pair(files, False, overwrite=False)
    check_pair(files, True, overwrite=False)  # a stopped run was putting it there
    if refused:
        with pytest.raises(InputError, match=f"{refused} is not replaced"):
            check_pair(files, False, overwrite=True)
    else:
        check_pair(files, False, overwrite=True)


def test_counts_replace_counts_alone(tmp_path):
    (tmp_path / "c").write_text("thesis")
    (tmp_path / "t").write_text("5 17\n3 2\n")
    with pytest.raises(InputError, match="c is not replaced"):
        ours.check_counts(tmp_path / "c", ours.is_list_of_counts, True)
    ours.check_counts(tmp_path / "t", ours.is_list_of_counts, True)
    with pytest.raises(InputError, match="exists"):
        ours.check_counts(tmp_path / "t", ours.is_list_of_counts, False)


# ------------------------------------------------------------------------------------------------------- empty, and refused


def texts_of(verb: str) -> list[str]:
    kind = options_of(verb)
    hints = typing.get_type_hints(kind)
    is_text = lambda hint: hint is str or hint == tuple[str, ...] or any(map(is_text, typing.get_args(hint)))
    fields = (item.name for item in dataclasses.fields(kind) if item.metadata and not item.metadata["choices"])
    return [f"--{name.replace('_', '-')}" for name in fields if is_text(hints[name])]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_nothing_is_no_path(verb, empty):
    for flag in texts_of(verb):
        with pytest.raises(InputError, match=f"^{flag}: nothing is given: it is empty"):
            parse(options_of(verb), [flag, empty], prog="x")
    if verb in ("inspect", "estimate", "evaluate"):  # these take theirs without a flag too
        with pytest.raises(InputError, match="nothing is given: it is empty"):
            parse(options_of(verb), [empty], prog="x")


def refuse(number: int):
    def call(*_, **__):
        raise OSError(number, os.strerror(number), "x")

    return call


@pytest.mark.parametrize(
    "number, do",
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission"),
        (errno.EROFS, "may be written"),
        (errno.EIO, "look at the disk"),
        (errno.ENAMETOOLONG, "shorter"),
    ],
)
@pytest.mark.parametrize("name", ["mkdir", "rename", "write"])
def test_what_stands_against_an_output_is_found_before_work(tmp_path, monkeypatch, number, do, name):
    if name == "write":
        monkeypatch.setattr(Path, "write_bytes", refuse(number))
    else:
        monkeypatch.setattr(os, name, refuse(number))
    for check in (lambda: staging.check_output(tmp_path / "out", overwrite=False), lambda: staging.check_file(tmp_path / "f")):
        with pytest.raises(InputError, match=f"(?s)cannot be written.*got: .*{os.strerror(number)}.*what to do: .*{do}"):
            check()
    monkeypatch.undo()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EPERM])
def test_a_directory_that_cannot_be_renamed_is_found_before_work(tmp_path, monkeypatch, number):
    out, rename = made(tmp_path / "out", "hf"), os.rename
    monkeypatch.setattr(os, "rename", lambda one, other: refuse(number)() if one == out else rename(one, other))
    with pytest.raises(InputError, match=f"(?s)out cannot be written.*{os.strerror(number)}"):
        check_output(out, HUGGING_FACE, overwrite=True)


def test_a_mount_point_is_filled_where_it_is(tmp_path, monkeypatch):
    out = made(tmp_path / "out", "hf")
    (out / "lost+found").mkdir()
    monkeypatch.setattr(hidden, "mount_points", lambda: {out})
    check_output(out, HUGGING_FACE, overwrite=True)
    (staging.begin(out) / "config.json").write_text("new")
    staging.commit(out)
    assert sorted(os.listdir(out)) == ["config.json", "lost+found"] and (out / "config.json").read_text() == "new"
    monkeypatch.setattr(hidden, "mount_points", lambda: {out / "lost+found"})
    with pytest.raises(InputError, match=r"holds the mount point .*lost\+found"):
        check_output(out, HUGGING_FACE, overwrite=True)


def test_mount_points_are_read_as_the_kernel_writes_them(tmp_path, monkeypatch):
    (tmp_path / "mounts").write_text("36 35 98:0 /x /a\\040b rw - ext4 d rw\n37 35 0:1 / / rw - tmpfs t rw\n")
    monkeypatch.setattr(hidden, "_MOUNTS", str(tmp_path / "mounts"))
    assert hidden.mount_points() == {Path("/a b"), Path("/")}
    monkeypatch.setattr(hidden, "_MOUNTS", str(tmp_path / "none"))
    assert hidden.mount_points() == set()


@pytest.mark.parametrize("where", ["safetensors", "torch"])
def test_what_libraries_make_of_a_full_disk_is_seen_through(tmp_path, where):
    from safetensors import SafetensorError

    error = {
        "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "torch": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    }[where]
    with pytest.raises(PruneError, match="(?s)out was not written.*got: .*(No space left|is there room).*make room"):
        with failures.explained("out"):
            raise error
    with pytest.raises(RuntimeError, match="mat1"), failures.explained("out"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


# ------------------------------------------------------------------------------------------------- links beside weights


@pytest.fixture
def model(tmp_path):
    """A directory as the hub's cache has it: links into the repository's blobs."""
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/1"
    blobs.mkdir(parents=True)
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors", "additional_chat_templates/rag.jinja"):
        (blobs / name.replace("/", "-")).write_text(name)
        (snapshot / name).symlink_to(os.path.relpath(blobs / name.replace("/", "-"), (snapshot / name).parent))
    (tmp_path / "secret").write_text("secret")
    return snapshot


def test_links_of_the_hub_cache_are_followed(model, tmp_path):
    (tmp_path / "out").mkdir()
    huggingface.copy_side_files(model, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "out/additional_chat_templates/rag.jinja").read_text() == "additional_chat_templates/rag.jinja"
    assert not (tmp_path / "out/model.safetensors").exists() and not huggingface.linked_weights(model)
    (model / "another").symlink_to("config.json")  # within the directory
    assert "another" in huggingface.side_files(model)


@pytest.mark.parametrize(
    "name", ["notes.txt", "tokenizer.model", "additional_chat_templates", "additional_chat_templates/x.jinja"]
)
@pytest.mark.parametrize("target", ["secret", "folder", "/etc/passwd", "../../models--y/blobs/x"])
def test_links_to_elsewhere_are_refused(model, tmp_path, name, target):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x").write_text("x")
    (tmp_path / "models--y/blobs").mkdir(parents=True)
    (tmp_path / "models--y/blobs/x").touch()
    if name == "additional_chat_templates":
        (model / name / "rag.jinja").unlink()
        (model / name).rmdir()
    to = tmp_path / target if not target.startswith("..") else tmp_path / "models--y/blobs/x"
    (model / name).symlink_to(to)
    if to.is_dir() and name in ("notes.txt", "tokenizer.model"):
        assert name not in huggingface.side_files(model)  # folders but those of templates are left out
    else:
        with pytest.raises(InputError, match=f"(?s){name} is a link to {to}, outside of the model's directory.*put a copy"):
            huggingface.side_files(model)


def test_pipes_and_giants_beside_weights_are_refused_and_linked_weights_said(model, tmp_path, monkeypatch):
    os.mkfifo(model / "pipe")
    with pytest.raises(InputError, match="(?s)pipe.*got: a directory, a pipe or a device.*remove it"):
        huggingface.side_files(model)
    (model / "pipe").unlink()
    (model / os.fsdecode(b"na\xffme")).touch()
    with pytest.raises(InputError, match="(?s)na.me.*not UTF-8.*rename or remove it"):
        huggingface.side_files(model)
    (model / os.fsdecode(b"na\xffme")).unlink()
    with open(model / "huge.txt", "wb") as file:
        file.truncate(huggingface.LIMIT + 1)
    with pytest.raises(InputError, match="huge.txt beside the weights"):
        huggingface.side_files(model)
    (model / "more.safetensors").symlink_to(tmp_path / "secret")
    assert huggingface.linked_weights(model) == [f"more.safetensors → {tmp_path / 'secret'}"]
