"""Outputs that appear whole or not at all.

Everything is written in a hidden directory beside its place (hidden.py), synced, and put in place by renames (moves.py). A
directory that is there is exchanged for the new one in one step (``renameat2`` with ``RENAME_EXCHANGE``) where the file system
can do that. Several outputs are put in place together: what a run stopped in between has left to do, the next run does first. A
run killed at any moment so leaves the old state, or the new one, or what the same command makes into the new one.

A directory that cannot be renamed (a mount point) is filled where it is: old entries out, new ones in, those that make it a
checkpoint out first and in last.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence

from megatron_prune.errors import InputError, PruneError
from megatron_prune.files import hidden, moves
from megatron_prune.files.atomic import sync, write_bytes, write_text
from megatron_prune.files.failures import explained
from megatron_prune.files.hidden import CONTENT, OLD, PARTIAL, REQUEST, WORK, hidden_path, located
from megatron_prune.files.placement import check_file, check_output, check_room, unfinished
from megatron_prune.files.region import close_files

__all__ = ["check_file", "check_output", "check_room", "sync", "unfinished", "write_bytes", "write_text"]

log = logging.getLogger("megatron_prune")

_SIGNS = ("latest_checkpointed_iteration.txt", "config.json", "scores.json", "teacher.json", "adapter_config.json")
"""What makes a directory a checkpoint, a model, or something else that is whole."""


def partial_path(path: Path) -> Path:
    """The directory that is written until it is whole, to become ``path``."""
    return hidden_path(path, PARTIAL) / CONTENT


def begin(path: Path) -> Path:
    """Make an empty :func:`partial_path`; what an interrupted run left is completed or removed.

    It stays locked until :func:`commit` or :func:`abandon`, or until this process ends in any way.

    Raises:
        InputError: if another run is writing the same output.
    """
    close_files()
    box = hidden_path(path, PARTIAL)
    _take(box)
    hidden.clear(box)
    (box / CONTENT).mkdir()
    return box / CONTENT


def _take(box: Path) -> None:
    hidden.take(box)
    moves.complete(box)


def abandon(path: Path) -> None:
    """Remove the partial output of ``path``, unless it is about to be in place."""
    box = hidden_path(path, PARTIAL)
    end = _let_go if (box / hidden.MOVES).is_file() else hidden.leave
    end(box)


def _let_go(box: Path) -> None:
    hidden.unlock(hidden.locks.pop(box, None))


def commit(path: Path, files: Mapping[Path, bytes] | None = None) -> None:
    """Put the partial output in place of ``path``.

    Args:
        files: what is to be at these places together with it.
    """
    box = hidden_path(path, PARTIAL)
    _place(box, path, files or {})
    hidden.leave(box)


def _place(box: Path, path: Path, files: Mapping[Path, bytes]) -> None:
    close_files()
    for folder, _, names in os.walk(box / CONTENT):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)
    with _staged_files(files, box) as staged:
        moves.carry_out(box, [*_moves_of(box, located(path)), *staged])


def _moves_of(box: Path, place: Path) -> Sequence[tuple[Path, Path]]:
    """The new directory as a whole, or, where that has to be, entry by entry."""
    if box.parent != place:
        return [(box / CONTENT, place)]
    inwards = sorted(os.listdir(box / CONTENT), key=lambda name: name in _SIGNS)
    outwards = sorted(hidden.entries(place), key=lambda name: name not in _SIGNS)
    gone = [(place / name, box / OLD / name) for name in outwards]
    return [*gone, *((box / CONTENT / name, place / name) for name in inwards)]


@contextlib.contextmanager
def _staged_files(files: Mapping[Path, bytes], box: Path) -> Iterator[list[tuple[Path, Path]]]:
    """Files on the disk beside their places, and the moves that bring them there, which ``box`` is going to note."""
    beside = {path: hidden_path(path, PARTIAL) for path in files}
    try:
        for path, data in files.items():
            _take(beside[path])
            hidden.clear(beside[path])
            write_bytes(beside[path] / CONTENT, data)
        yield [(beside[path] / CONTENT, located(path)) for path in files]
    except BaseException:
        end = _let_go if (box / hidden.MOVES).is_file() else hidden.leave  # what is noted will be completed
        for each in beside.values():
            end(each)
        raise
    for each in beside.values():
        hidden.leave(each)


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files at places that a user named, all of them or none.

    Raises:
        PruneError: if one cannot be written, or would replace something else than a file.
    """
    with explained(", ".join(map(str, files))):
        first = hidden_path(next(iter(files)), PARTIAL)
        with _staged_files(files, first) as staged:
            moves.carry_out(first, staged)


@contextlib.contextmanager
def work(path: Path, key: str, *, main: bool, agree: Callable[[Exception | None], None]) -> Iterator[Path]:
    """The directory where a long run keeps its finished parts, hidden beside its output ``path``.

    It stays when the run is stopped, and the next run with the same ``key`` goes on from it; what another request left
    there is removed. It goes when the run ends well.

    Args:
        main: whether this process makes and removes it.
        agree: waits for all processes, and raises on all of them what one hands it.

    Raises:
        InputError: if another run is at work on the same output.
        PruneError: if the disk refuses something while the run is at work.
    """
    error, goes_on = None, False
    if main:
        try:
            goes_on = _take_up(work_path(path).parent, key)
        except (InputError, OSError) as found:
            error = found
    agree(error)
    if goes_on:
        log.info("%s: going on from what a stopped run of the same command had finished", path)
    folder = work_path(path)
    box = folder.parent
    try:
        with explained(path, kept="finished parts are kept: the same command goes on from them"):
            yield folder
        agree(None)
        if main:
            hidden.leave(box)
    except BaseException as stopped:
        if main and folder.is_dir():
            if not os.listdir(folder):
                hidden.leave(box)  # nothing was done yet: a refused run leaves nothing
            elif isinstance(stopped, KeyboardInterrupt):
                log.info("%s: finished parts are kept; the same command goes on from them", path)
        raise
    finally:
        if main:
            _let_go(box)


def work_path(path: Path) -> Path:
    """The directory of :func:`work` for an output."""
    return hidden_path(path, WORK) / CONTENT


def _take_up(box: Path, key: str) -> bool:
    """Lock a work directory, emptied of what another request left, and of what an output was exchanged for.

    Returns:
        Whether it holds something to go on from.
    """
    _take(box)
    note, placed = box / REQUEST, any(source == box / CONTENT for source, _, _ in moves.noted(box))
    same = not placed and note.is_file() and note.read_text(encoding="utf-8") == key
    hidden.clear(box, keep=(REQUEST, CONTENT) if same else ())
    (box / CONTENT).mkdir(exist_ok=True)
    if not same:
        write_text(note, key)
    return bool(os.listdir(box / CONTENT))


def finish_work(folder: Path, path: Path) -> None:
    """Put a finished :func:`work` directory in place of the output ``path``."""
    _place(folder.parent, path, {})


def place_from_work(folder: Path, files: Sequence[tuple[Path, Path | None]]) -> None:
    """Put files of a :func:`work` directory in place, all together.

    Args:
        files: (place, file in ``folder``), in order; ``None`` where what is there goes away.
    """
    box = folder.parent
    for _, made in files:
        if made:
            sync(made)
    wanted = [(made, located(place)) if made else (located(place), box / OLD / place.name) for place, made in files]
    moves.carry_out(box, [(source, target) for source, target in wanted if os.path.lexists(source)])


def settle(place: Path) -> None:
    """Complete what a stopped run has left to do to put a file in place, where it does that beside the file.

    For readers: the next run of the same command does it too. What cannot be done is left.
    """
    with contextlib.suppress(OSError, PruneError):
        place = located(place)
        for box in place.parent.glob(f".*.{WORK}*"):
            listed = moves.noted(box) if hidden.is_ours(box) else []
            within = all(target.parent == place.parent or box in target.parents for _, target, _ in listed)
            if within and place in (target for _, target, _ in listed):
                hidden.take(box)
                try:
                    moves.complete(box)
                finally:
                    _let_go(box)


def check_free(folder: Path) -> None:
    """Refuse a directory that another run holds.

    Raises:
        InputError: if one does.
    """
    hidden.unlock(hidden.lock(folder))


def empty(folder: Path, *, last: str) -> None:
    """Remove what an output directory holds; a process stopped in between leaves what the next call completes.

    Args:
        last: name of what goes after all else, as it says what that is.
    """
    box = hidden_path(folder, PARTIAL)
    _take(box)
    hidden.clear(box)
    names = sorted(hidden.entries(folder), key=lambda name: name == last)
    moves.carry_out(box, [(folder / name, box / OLD / name) for name in names])
    hidden.leave(box)


def hold(folder: Path) -> None:
    """Make a directory, if it is not there, and keep other runs off it until this process ends.

    Raises:
        InputError: if another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hidden.locks[folder] = hidden.lock(folder)
