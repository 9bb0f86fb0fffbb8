"""Renames that are all done or all still to be done: written down before the first one, so that the next run completes them.

``moves.json`` in a hidden directory (hidden.py): [source, target, inode of the source], paths from that directory. A move is
still to be done as long as its source is what it was.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
from itertools import count
from pathlib import Path
from typing import Sequence

from megatron_prune.errors import InputError
from megatron_prune.files.atomic import sync, write_text
from megatron_prune.files.documents import read_json
from megatron_prune.files.hidden import MOVES, OLD

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def carry_out(hidden: Path, moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename every source to its target, in order; a stopped process leaves none of it done, or what :func:`complete` completes.

    Raises:
        InputError: if a target is what may not be replaced (see :func:`check_target`); nothing is moved.
        OSError: if that cannot be written down, or a move is refused.
    """
    for source, target in moves:
        check_target(target, directory=source.is_dir())
    name = lambda path: os.path.relpath(path, hidden)
    listed = [[name(source), name(target), os.lstat(source).st_ino] for source, target in moves]
    (hidden / OLD).mkdir(exist_ok=True)
    write_text(hidden / MOVES, json.dumps(listed))
    complete(hidden)


def noted(hidden: Path) -> list[tuple[Path, Path, int]]:
    """(source, target, inode) of the moves that a hidden directory has written down, done or not."""
    if not (hidden / MOVES).is_file():
        return []
    found = read_json(hidden / MOVES, list[tuple[str, str, int]], error=InputError, do=f"remove {hidden}")
    path = lambda name: Path(os.path.normpath(hidden / name))
    return [(path(source), path(target), inode) for source, target, inode in found]


def complete(hidden: Path) -> None:
    """Do what is left to do of the moves that a hidden directory has written down.

    Raises:
        OSError: if one is refused.
    """
    for source, target, inode in noted(hidden):
        if _inode(source) == inode and target.parent.is_dir():
            _move(source, target, hidden / OLD)
            sync(target.parent)


def check_target(path: Path, *, directory: bool) -> None:
    """Refuse to put a file in place of anything but a regular file, or a directory in place of anything but a directory.

    Raises:
        InputError: saying what is there.
    """
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISDIR(mode) if directory else stat.S_ISREG(mode):
        return
    kinds = {stat.S_ISDIR: "a directory", stat.S_ISREG: "a file", stat.S_ISLNK: "a link", stat.S_ISFIFO: "a pipe"}
    kinds |= {stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    found = next((kind for test, kind in kinds.items() if test(mode)), "something else")
    needed = "a directory" if directory else "a regular file"
    raise InputError(f"output {path}", got=found, needed=f"{needed}, or a name that is free", do="name another output")


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None


def _move(source: Path, target: Path, old: Path) -> None:
    check_target(target, directory=source.is_dir())
    if target.is_dir():
        if exchange(source, target):
            return
        aside = (old / f"{target.name}-{number}" for number in count())
        os.rename(target, next(path for path in aside if not os.path.lexists(path)))
    os.rename(source, target)


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the file system or the C library cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
