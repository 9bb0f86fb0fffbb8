"""Outputs appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from megatron_prune.errors import InputError
from megatron_prune.files import hidden, moves, staging


def fill(folder, text):
    (folder / "sub").mkdir()
    (folder / "a").write_text(text)
    (folder / "sub" / "b").write_text(text)


def content(folder) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def made(out, text):
    fill(staging.begin(out), text)
    staging.commit(out)


NEW, OLD = ({"a": text, "sub/b": text} for text in ("new", "old"))


def test_nothing_stands_at_the_output_until_commit_and_nothing_else_after_it(tmp_path):
    out = tmp_path / "deep" / "out"
    partial = staging.begin(out)
    assert partial.is_dir() and partial.parent.parent == out.parent and partial.parent.name.startswith(".")
    fill(partial, "new")
    assert not out.exists()
    staging.commit(out)
    assert content(out) == NEW
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_existing_directory_is_replaced_with_nothing_of_it_left(tmp_path, monkeypatch, can_exchange):
    out = tmp_path / "out"
    made(out, "old")
    (out / "stale").write_text("old")
    if not can_exchange:
        monkeypatch.setattr(moves, "exchange", lambda one, other: False)
    made(out, "new")
    assert content(out) == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_exchange_is_one_step_in_which_the_output_never_goes_missing(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    assert moves.exchange(one, other)
    assert ((one / "name").read_text(), (other / "name").read_text()) == ("other", "one")
    assert not moves.exchange(one, tmp_path / "none")
    assert (one / "name").read_text() == "other"


def test_what_an_interrupted_run_left_does_not_get_into_the_next_one(tmp_path):
    out = tmp_path / "out"
    (staging.begin(out) / "leftover").write_text("x")
    hidden.unlock(hidden.locks.pop(staging.partial_path(out).parent))  # as a process that ends lets it go
    made(out, "new")
    assert content(out) == NEW


def test_two_runs_cannot_write_one_output(tmp_path):
    out = tmp_path / "out"
    partial = staging.begin(out)
    (partial / "mine").write_text("x")
    with pytest.raises(InputError, match="another run"):
        staging.begin(out)
    assert (partial / "mine").read_text() == "x"
    staging.abandon(out)
    staging.begin(out)
    staging.abandon(out)


def test_an_abandoned_run_leaves_the_old_directory_and_no_trace(tmp_path):
    out = tmp_path / "out"
    made(out, "old")
    fill(staging.begin(out), "new")
    staging.abandon(out)
    assert content(out) == OLD and [p.name for p in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_prune.files import moves, staging
out, at = Path(sys.argv[1]), sys.argv[2]
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
partial = staging.begin(out)
(partial / "sub").mkdir()
(partial / "a").write_text("new")
if at == "writing": die()
(partial / "sub" / "b").write_text("new")
if at == "written": die()
if at == "syncing": staging.sync = die
if at == "before": moves.exchange = die
if at == "after":
    import shutil
    shutil.rmtree = die
staging.commit(out)
"""


@pytest.mark.parametrize("at, expected", [("writing", OLD), ("written", OLD), ("syncing", OLD), ("before", OLD), ("after", NEW)])
def test_a_run_killed_at_any_moment_leaves_the_old_directory_or_the_new_one(tmp_path, at, expected):
    out = tmp_path / "out"
    made(out, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), at])
    assert done.returncode == -signal.SIGKILL
    assert content(out) == expected
    made(out, "new")
    assert content(out) == NEW and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_while_syncing_leaves_the_old_directory(tmp_path, monkeypatch):
    out = tmp_path / "out"
    made(out, "old")
    fill(staging.begin(out), "new")
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        staging.commit(out)
    assert content(out) == OLD


def events_of_commit(out, monkeypatch) -> list[tuple[str, str]]:
    """(what, path) of every sync and every change of names, in order."""
    events, real_sync, real_rename, real_exchange = [], os.fsync, os.rename, moves.exchange
    monkeypatch.setattr(os, "fsync", lambda n: (events.append(("sync", os.readlink(f"/proc/self/fd/{n}"))), real_sync(n)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", str(b))), real_rename(a, b)))
    monkeypatch.setattr(moves, "exchange", lambda a, b: (events.append(("rename", str(b))), real_exchange(a, b))[1])
    staging.commit(out)
    return events


@pytest.mark.parametrize("exists", [False, True])
def test_every_file_and_folder_is_synced_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch, exists):
    out = tmp_path / "out"
    if exists:
        made(out, "old")
    partial = staging.begin(out)
    fill(partial, "new")
    events = events_of_commit(out, monkeypatch)
    renamed = events.index(("rename", str(out)))
    before = {path for what, path in events[:renamed] if what == "sync"}
    assert before >= {str(p) for p in (partial, partial / "a", partial / "sub", partial / "sub" / "b")}
    assert ("sync", str(tmp_path)) in events[renamed:]


def test_a_text_file_is_replaced_atomically_and_synced(tmp_path, monkeypatch):
    target = tmp_path / "new" / "plan.json"
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: (synced.append(os.readlink(f"/proc/self/fd/{n}")), real(n)))
    staging.write_text(target, "first")
    staging.write_text(target, "zweiter → Ω")
    assert target.read_bytes() == "zweiter → Ω".encode()
    assert [p.name for p in target.parent.iterdir()] == ["plan.json"]
    assert len(synced) == 4 and synced[1] == str(target.parent)


def test_a_text_file_that_fails_to_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    staging.write_text(tmp_path / "f", "old")
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        staging.write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"


# ------------------------------------------------------------------------------------------------------------ refusals


def test_an_output_that_holds_something_is_refused_unless_overwriting(tmp_path):
    (tmp_path / "out").mkdir()
    staging.check_output(tmp_path / "out", overwrite=False)  # empty: nothing is lost
    (tmp_path / "out" / "x").touch()
    with pytest.raises(InputError, match="--overwrite"):
        staging.check_output(tmp_path / "out", overwrite=False)
    staging.check_output(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["file", "link", "dangling", "file/below"])
def test_an_output_that_is_a_file_or_a_link_is_refused(tmp_path, name, overwrite):
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "dir")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    with pytest.raises(InputError, match=name.split("/")[0]):
        staging.check_output(tmp_path / name, overwrite=overwrite)


def test_an_output_where_nothing_may_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(InputError, match="cannot be written"):
        staging.check_output(tmp_path / "a" / "out", overwrite=False)
    with pytest.raises(InputError, match="cannot be written"):
        staging.check_file(tmp_path / "plan.json")


def test_a_file_path_that_is_a_directory_or_lies_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    staging.check_file(tmp_path / "new" / "plan.json")
    staging.check_file(tmp_path / "file")
    for path in (tmp_path, tmp_path / "file" / "plan.json"):
        with pytest.raises(InputError):
            staging.check_file(path)


def test_checking_writes_nothing(tmp_path):
    staging.check_output(tmp_path / "a" / "b", overwrite=False)
    staging.check_file(tmp_path / "c" / "d")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- work that goes on


def raise_it(error):
    if error is not None:
        raise error


def work(out, key="a", main=True):
    return staging.work(out, key, main=main, agree=raise_it)


def test_work_stays_when_it_is_stopped_and_goes_when_it_ends(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), work(out) as folder:
        (folder / "part").write_text("done")
        raise KeyboardInterrupt
    assert folder.parent.parent == out.parent and folder.parent.name.startswith(".")
    with work(out) as again:
        assert again == folder and (folder / "part").read_text() == "done"
    assert list(out.parent.iterdir()) == []


def test_a_stopped_run_says_that_the_same_command_goes_on_and_that_one_that_it_does(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(staging.log, "info", lambda text, *values: said.append(text % values))

    def stopped(key, does, main=True) -> list[str]:
        said.clear()
        with pytest.raises(KeyboardInterrupt), work(tmp_path / "out", key, main) as folder:
            does(folder)
            raise KeyboardInterrupt
        return [message.removeprefix(f"{tmp_path / 'out'}: ") for message in said]

    nothing, part = lambda folder: None, lambda folder: (folder / "part").write_text("done")
    goes_on = "going on from what a stopped run of the same command had finished"
    kept = "finished parts are kept; the same command goes on from them"
    assert stopped("a", nothing) == []
    assert stopped("a", part) == [kept]
    assert stopped("a", nothing, main=False) == []
    assert stopped("a", nothing) == [goes_on, kept]
    assert stopped("b", nothing) == []  # another request's parts are gone


def test_work_of_another_request_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), work(tmp_path / "out", "a") as folder:
        fill(folder, "old")
        raise KeyboardInterrupt
    with work(tmp_path / "out", "b") as folder:
        assert list(folder.iterdir()) == []


def test_work_that_was_refused_before_it_began_leaves_nothing(tmp_path):
    with pytest.raises(InputError), work(tmp_path / "out"):
        raise InputError("no")
    assert list(tmp_path.iterdir()) == []


def test_finished_work_becomes_the_output_and_replaces_an_older_one(tmp_path):
    out = tmp_path / "out"
    made(out, "old")
    with work(out) as folder:
        fill(folder, "new")
        staging.finish_work(folder, out)
    assert content(out) == NEW and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_the_main_process_makes_and_removes_the_work(tmp_path):
    with work(tmp_path / "out", main=False) as folder:
        assert not folder.exists()
    with work(tmp_path / "out") as folder, work(tmp_path / "out", main=False):
        assert folder.is_dir()


def test_two_runs_do_not_work_on_one_output(tmp_path):
    with work(tmp_path / "out"), pytest.raises(InputError, match="another run"), work(tmp_path / "out"):
        pass
    with work(tmp_path / "out"):  # the first one's lock is gone with it
        pass
