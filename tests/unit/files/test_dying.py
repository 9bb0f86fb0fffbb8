"""A process that dies at any operation on files leaves the old state or the new one, and the same command goes on from there."""

from __future__ import annotations

import builtins
import fnmatch
import io
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from megatron_prune.errors import PruneError
from megatron_prune.files import hidden, moves, staging
from megatron_prune.text import parts

OPERATIONS = ("rename", "replace", "unlink", "rmdir", "mkdir", "open", "fsync", "link", "symlink", "truncate")


class Died(BaseException):
    """What no code of a killed process outlives: every later operation raises it too."""


@contextmanager
def dying(number: int):
    """Die before the ``number``-th operation; → a list that holds how many there were."""
    seen = [0]

    def counted(function):
        def call(*args, **kwargs):
            seen[0] += 1
            if seen[0] >= number:
                raise Died
            return function(*args, **kwargs)

        return call

    opening = counted(io.open)
    with mock.patch.multiple(os, **{name: counted(getattr(os, name)) for name in OPERATIONS}):
        with mock.patch.object(moves, "exchange", counted(moves.exchange)):
            with mock.patch.object(builtins, "open", opening), mock.patch.object(io, "open", opening):
                try:
                    yield seen
                except Died:
                    pass
    for folder in list(hidden.locks):  # the system takes a dead process's locks away
        hidden.unlock(hidden.locks.pop(folder))


def at_every_operation(command, prepare, check, tmp_path: Path, allow=lambda place: None) -> int:
    """Let ``command(place)`` die at every operation, ``check(place)`` what is there, and run it once more; how many there were.

    Args:
        allow: what the second run asks before.
    """
    for number in range(1, 500):
        place = tmp_path / str(number)
        place.mkdir()
        prepare(place)
        with dying(number) as seen:
            command(place)
        if seen[0] >= number:
            allow(place)
        check(place)
        command(place)
        assert state(place) == NEW, number
        if seen[0] < number:
            return seen[0]
    raise AssertionError("without end")


def state(place: Path) -> dict[str, str]:
    """Files and their texts, without a probe's mark (a probe is removed after a day)."""
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    return {str(path.relative_to(place)): path.read_text() for path in files if not is_probe(path.relative_to(place))}


def is_probe(path: Path) -> bool:
    return any(fnmatch.fnmatch(name, ".megatron_prune.*-????????") for name in path.parts)


OLD = {"out/config.json": "old", "out/deep/weights": "old", "out/gone": "old", "plan.json": "old"}
NEW = {"out/config.json": "new", "out/deep/weights": "new", "out/more": "new", "plan.json": "new"}


def write_old(place: Path) -> None:
    for name, text in OLD.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)


def write_new(place: Path) -> None:
    out, plan = place / "out", place / "plan.json"
    try:
        partial = staging.begin(out)
        (partial / "deep").mkdir()
        for name, text in NEW.items():
            if name.startswith("out/"):
                (partial / name.removeprefix("out/")).write_text(text)
        staging.commit(out, {plan: b"new"})
    except BaseException:
        staging.abandon(out)
        raise


def completed(place: Path) -> dict[str, str]:
    """What the next run finds, whatever it is going to write."""
    staging.begin(place / "out")
    staging.abandon(place / "out")
    return {name: text for name, text in state(place).items() if not name.startswith(".plan.json.partial")}


def checked(overwrite: bool):
    def check(place):
        if not NEW.items() <= state(place).items():  # the very end: whole, and nothing noted any more
            staging.check_output(place / "out", overwrite=overwrite)
        staging.check_file(place / "plan.json")

    return check


@pytest.mark.parametrize("overwrites, exchanges", [(True, True), (True, False), (False, True)])
def test_a_directory_and_the_file_beside_it(tmp_path, monkeypatch, overwrites, exchanges):
    before = OLD if overwrites else {}
    visible = [{name: text for name, text in state_.items() if name.startswith("out/")} for state_ in (before, NEW)]
    found = set()
    if not exchanges:
        monkeypatch.setattr(moves, "exchange", lambda one, other: False)

    def check(place):
        there = {name: text for name, text in state(place).items() if name.startswith("out/")}
        whole = visible if exchanges or not overwrites else [*visible, {}]
        assert there in whole
        after = completed(place)
        assert after in (before, NEW)
        found.add(len(after))

    prepare = write_old if overwrites else lambda place: None
    count = at_every_operation(write_new, prepare, check, tmp_path, checked(True))
    assert count > 30 and (overwrites or found == {0, 4})


@pytest.mark.parametrize("overwrites", [True, False])
def test_a_directory_that_is_filled_where_it_is(tmp_path, monkeypatch, overwrites):
    monkeypatch.setattr(hidden, "is_fixed", lambda place: place.name == "out" and place.is_dir())
    before = OLD if overwrites else {"out/lost+found/x": "disk"}

    def prepare(place):
        if overwrites:
            write_old(place)
        else:
            (place / "out").mkdir()

    def check(place):
        there = {name: text for name, text in state(place).items() if name.startswith("out/") and "/.megatron" not in name}
        parts = {text for text in there.values()}
        assert "out/config.json" not in there or there in (
            {name: text for name, text in content.items() if name.startswith("out/")} for content in (OLD, NEW)
        ), "it is taken for whole, and is not"
        assert parts <= {"old", "new"}
        assert completed(place) in (OLD if overwrites else {}, NEW)

    assert before and at_every_operation(write_new, prepare, check, tmp_path, checked(overwrites)) > 30


def test_several_files(tmp_path):
    files = {"out/config.json": "new", "out/deep/weights": "new", "out/more": "new", "plan.json": "new"}

    def command(place):
        staging.write_files({place / name: text.encode() for name, text in files.items()})

    def prepare(place):
        write_old(place)
        (place / "out/gone").unlink()

    def check(place):
        for name in files:
            assert (place / name).read_text() in ("old", "new") if name in OLD else True

    assert at_every_operation(command, prepare, check, tmp_path) > 30


def test_work_that_becomes_the_output(tmp_path):
    def command(place):
        out = place / "out"
        with staging.work(out, "key", main=True, agree=lambda error: None) as folder:
            (folder / "deep").mkdir(exist_ok=True)
            for name, text in NEW.items():
                if name.startswith("out/"):
                    (folder / name.removeprefix("out/")).write_text(text)
            staging.finish_work(folder, out)
        staging.write_files({place / "plan.json": b"new"})

    def check(place):
        there = {name: text for name, text in state(place).items() if name.startswith("out/")}
        assert there in [{name: text for name, text in content.items() if name.startswith("out/")} for content in (OLD, NEW)]

    assert at_every_operation(command, write_old, check, tmp_path) > 30


@pytest.mark.parametrize("overwrites", [True, False])
def test_pairs_of_files(tmp_path, overwrites):
    names = [f"x_{key}_document.{ending}" for key in ("text", "title") for ending in ("bin", "idx", "json")]

    def command(place):
        with staging.work(place / "x", "key", main=True, agree=lambda error: None) as folder:
            for column, key in enumerate(("text", "title")):
                for ending in ("json", "bin", "idx"):
                    (folder / f"whole-{column}.{ending}").write_text("new")
            prefixes = [place / f"x_{key}_document" for key in ("text", "title")]
            parts.place_pairs(folder, {prefix: folder / f"whole-{column}" for column, prefix in enumerate(prefixes)})

    def prepare(place):
        for name in names if overwrites else ():
            (place / name).write_text("old")

    def check(place):
        for key in ("text", "title"):
            pair = [place / f"x_{key}_document.{ending}" for ending in ("idx", "bin", "json")]
            if pair[0].exists():  # no index: no reader takes it for a pair
                assert len({file.read_text() for file in pair}) == 1
            staging.settle(pair[0])  # what open_pair does
        found.add(tuple((place / name).exists() and (place / name).read_text() for name in names))

    found: set = set()
    for number in range(1, 500):
        place = tmp_path / str(number)
        place.mkdir()
        prepare(place)
        with dying(number) as seen:
            command(place)
        check(place)
        command(place)
        assert {name: (place / name).read_text() for name in names} == dict.fromkeys(names, "new")
        assert not (place / ".x.work").exists()
        if seen[0] < number:
            break
    assert found == {("new",) * 6, ("old",) * 6 if overwrites else (False,) * 6}, "both at once"


# ------------------------------------------------------------------------------------------------- what is not ours


@pytest.mark.parametrize("name", [".out.partial", ".out.work", ".plan.json.partial", ".out.replaced"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_has_a_hidden_name_and_is_not_ours_stays_and_blocks_nothing(tmp_path, name, kind):
    if kind == "file":
        (tmp_path / name).write_text("thesis")
    elif kind == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("thesis")
    else:
        (tmp_path / "thesis.txt").write_text("thesis")
        (tmp_path / name).symlink_to("thesis.txt")
    before = state(tmp_path)
    with staging.work(tmp_path / "out", "key", main=True, agree=lambda error: None):
        write_new(tmp_path)
    assert state(tmp_path) == {**before, **NEW}


def test_an_empty_directory_of_a_hidden_name_is_taken_over(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    write_new(tmp_path)
    assert state(tmp_path) == NEW and sorted(os.listdir(tmp_path)) == ["out", "plan.json"]


def test_what_a_dead_process_tried_is_removed_by_the_next(tmp_path, monkeypatch):
    strays = [hidden.temporary(tmp_path) for _ in range(2)]
    (strays[0] / "content").mkdir()
    staging.check_output(tmp_path / "out", overwrite=False)
    assert sorted(tmp_path.iterdir()) == sorted(strays)  # it lives: it may be at it
    monkeypatch.setattr(hidden, "_is_alive", lambda process: False)
    staging.check_output(tmp_path / "out", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_a_rename_that_is_refused_in_the_middle_is_completed_by_the_next_run(tmp_path):
    write_old(tmp_path)
    rename = os.rename

    def refuse(source, target):
        if Path(target) == tmp_path / "plan.json":
            raise OSError(5, "Input/output error", str(target))
        rename(source, target)

    with mock.patch.object(os, "rename", refuse), pytest.raises(OSError):
        write_new(tmp_path)
    assert (tmp_path / "out/more").exists() and (tmp_path / "plan.json").read_text() == "old"
    assert completed(tmp_path) == NEW


def test_a_file_that_became_something_else_while_we_worked_keeps_all_as_it_was(tmp_path):
    write_old(tmp_path)
    partial = staging.begin(tmp_path / "out")
    (partial / "more").write_text("new")
    (tmp_path / "plan.json").unlink()
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(PruneError, match="plan.json"):
        staging.commit(tmp_path / "out", {tmp_path / "plan.json": b"new"})
    staging.abandon(tmp_path / "out")
    assert state(tmp_path) == {name: text for name, text in OLD.items() if name.startswith("out/")}
    assert sorted(os.listdir(tmp_path)) == ["out", "plan.json"]


TERMINATED = """
import os, signal, sys
from pathlib import Path
from megatron_prune.files import staging
rename = os.rename
def ended(*paths):
    os.kill(os.getpid(), signal.SIGTERM)
    return rename(*paths)
os.rename = ended
staging.check_output(Path(sys.argv[1]), overwrite=False)
"""


def test_a_process_that_is_terminated_while_it_tries_a_place_leaves_nothing_there(tmp_path):
    """As torchrun ends all others where one rank refuses its input."""
    done = subprocess.run([sys.executable, "-c", TERMINATED, tmp_path / "out"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert not list(tmp_path.iterdir())
