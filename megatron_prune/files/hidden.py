"""The hidden directory in which an output is made until it is whole.

.NAME.partial/ or .NAME.work/    beside NAME; where NAME cannot be renamed (a mount point), .megatron_prune.partial/ … in it
    .megatron_prune              shows that it is ours; locked while a run is at work
    request.json                 what a run that can go on was asked for
    content/                     what becomes NAME
    moves.json                   what is being put in place (moves.py)
    old/                         what that takes the place of

What has such a name and is not ours is left alone: the next free name is taken.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import tempfile
from itertools import count
from pathlib import Path

from megatron_prune.errors import InputError

CONTENT, OLD, REQUEST, MOVES = "content", "old", "request.json", "moves.json"
PARTIAL, WORK = "partial", "work"
_MARK = ".megatron_prune"
_MOUNTS = "/proc/self/mountinfo"


def located(path: Path) -> Path:
    """``path``, absolute, without ``..`` and links but a link at its end."""
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def hidden_path(path: Path, ending: str) -> Path:
    """The hidden directory of output ``path``, made or not."""
    place = located(path)
    base = place / f"{_MARK}.{ending}" if is_fixed(place) else place.with_name(f".{place.name}.{ending}")
    names = (base if number == 1 else base.with_name(f"{base.name}-{number}") for number in count(1))
    return next(name for name in names if is_ours(name) or not os.path.lexists(name))


def is_ours(folder: Path) -> bool:
    """Whether a directory is one of ours (or empty: as good as not there)."""
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            return False
        return (folder / _MARK).is_file() or not os.listdir(folder)
    except OSError:
        return False


def kept_parts(path: Path) -> Path | None:
    """The hidden directory of finished parts that a stopped run has left for an output, if there is one."""
    box = hidden_path(path, WORK)
    return box if is_ours(box) and (box / REQUEST).is_file() else None


def is_fixed(place: Path) -> bool:
    """Whether a directory has to be filled where it is: it is a mount point, or nothing can be put beside it."""
    if place.is_symlink() or not place.is_dir():
        return False
    return place in mount_points() or os.path.ismount(place) or not os.access(place.parent, os.W_OK | os.X_OK)


def mount_points() -> set[Path]:
    """Where file systems are mounted, bind mounts too (Linux; elsewhere none are known)."""
    try:
        with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
            fields = [line.split(" ")[4] for line in file]
    except OSError:
        return set()
    escapes = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}
    for escape, character in escapes.items():
        fields = [name.replace(escape, character) for name in fields]
    return set(map(Path, fields))


def entries(folder: Path) -> list[str]:
    """Names in an output directory, without what is no part of it: our hidden directories, ``lost+found`` of a disk."""
    names = sorted(os.listdir(folder))
    return [name for name in names if name != "lost+found" and not (name.startswith(f"{_MARK}.") and is_ours(folder / name))]


def take(folder: Path) -> None:
    """Make a hidden directory, if it is not there, and keep other runs out until :func:`leave`, or the end of this process.

    Raises:
        InputError: if another run is at work in it.
    """
    for _ in range(3):  # a run that just ends may remove it once we have seen it
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            number = lock(folder / _MARK)
            if os.fstat(number).st_nlink:
                locks[folder] = number
                return
            unlock(number)
    raise InputError(f"another run is writing {folder}", do="wait for it, or name another output")


def temporary(parent: Path) -> Path:
    """A hidden directory of no output, which :func:`leave` removes; those of dead processes of this machine go on the way."""
    own = f"{_MARK}.{socket.gethostname()}."
    for stray in parent.glob(f"{own}*"):
        number = stray.name.removeprefix(own).partition("-")[0]
        if number.isdecimal() and not _is_alive(int(number)):
            leave(stray)
    folder = Path(tempfile.mkdtemp(prefix=f"{own}{os.getpid()}-", dir=parent))
    (folder / _MARK).touch()
    return folder


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def leave(folder: Path) -> None:
    """Remove a hidden directory, its mark last, so that it is known as ours as long as it holds anything."""
    if is_ours(folder):
        with contextlib.suppress(OSError):
            clear(folder)
            (folder / _MARK).unlink(missing_ok=True)
            folder.rmdir()
    unlock(locks.pop(folder, None))


def clear(folder: Path, *, keep: tuple[str, ...] = ()) -> None:
    """Remove what a hidden directory holds, but for its mark and names to ``keep``.

    First the request, so that nobody goes on with the rest; last what is noted as done, for as long the run is not at its end.
    """
    for name in sorted(os.listdir(folder), key=lambda name: (name == MOVES) - (name == REQUEST)):
        path = folder / name
        if name not in (_MARK, *keep):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


locks: dict[Path, int] = {}
"""Descriptors that hold what this process has taken."""


def lock(path: Path) -> int:
    """Lock a directory, or a file that is made if it is not there, until the descriptor is closed.

    Raises:
        InputError: if another run has it.
    """
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        where = path.parent if path.name == _MARK else path
        raise InputError(f"another run is writing {where}", do="wait for it, or name another output") from None
    except OSError:
        pass  # a file system that cannot lock
    return number


def unlock(number: int | None) -> None:
    """Close the descriptor of a lock."""
    if number is not None:
        os.close(number)
