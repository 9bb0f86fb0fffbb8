"""Whether an output can be put in place, found by trying it before any work, and whether there is room for it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import shutil
from pathlib import Path
from typing import Iterable, Iterator

from megatron_prune.errors import InputError
from megatron_prune.files import failures, hidden, moves


def check_output(path: Path, *, overwrite: bool, source: Path | None = None, inputs: Iterable[str | None] = ()) -> None:
    """Refuse an output directory that is taken, cannot be put in place, or would take something else away.

    Args:
        source: what is turned into the output.
        inputs: what else is read, where it was named.

    Raises:
        InputError: if ``path`` holds something and ``overwrite`` is not set, is no directory, or cannot be made; if it is the
            current directory, the home directory or the root, or holds one of them; if it is an input or holds it, or lies in
            ``source``.
    """
    with _refused(path):
        place = hidden.located(path)
        if source is not None:
            held = Path(os.path.realpath(source))
            if place == held or place in held.parents or held in place.parents:
                raise InputError(f"output {path} is, holds or lies in the input {source}", do="name another directory")
        for name in filter(None, inputs):
            held = Path(os.path.realpath(name))
            if held.exists() and place in (held, *held.parents):
                raise InputError(f"output {path} is or holds the input {name}", do="name another directory")
        _check_kept(place, path)
        moves.check_target(place, directory=True)
        if place.is_dir() and hidden.entries(place) and not overwrite and not unfinished(path):
            raise InputError(f"output {path} exists", do="name another directory, or pass --overwrite to replace it")
        below = [point for point in hidden.mount_points() if place in point.parents]
        if below:
            raise InputError(f"output {path} holds the mount point {below[0]}", do="name another directory")
        _try(place, directory=True)


def check_file(path: Path, *, beside: Path | None = None, inputs: Iterable[Path] = ()) -> None:
    """Refuse a file to write that cannot be put in place, or would take away what is no regular file.

    Args:
        beside: an output directory, in which the file may not lie.
        inputs: files and directories that are read.

    Raises:
        InputError: saying what is wrong.
    """
    with _refused(path):
        place = hidden.located(path)
        if beside is not None and hidden.located(beside) in (place, *place.parents):
            raise InputError(f"{path} is the output {beside} or lies in it", do="name a file elsewhere")
        for name in inputs:
            held = Path(os.path.realpath(name))
            if held.exists() and (held == place or held.is_dir() and held in place.parents):
                raise InputError(f"output {path} is the input {name} or lies in it", do="name another output")
        moves.check_target(place, directory=False)
        if place in hidden.mount_points():
            raise InputError(f"output {path}", got="a mount point", needed="a file that can be replaced", do="name another file")
        _try(place, directory=False)


def check_room(path: Path, needed: int) -> None:
    """Refuse an output that the disk has no room for.

    Raises:
        InputError: with both amounts of bytes.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        got, wanted = (f"{size / 1e9:.1f} GB" if size > 1e8 else f"{size:,} bytes" for size in (free, needed))
        do = "make room, or name a place that has it"
        raise InputError(f"not enough room for {path}", got=f"{got} free", needed=wanted, do=do)


def unfinished(path: Path) -> bool:
    """Whether a run was stopped while it put this output in place; the next one completes that."""
    boxes = [hidden.hidden_path(path, ending) for ending in (hidden.PARTIAL, hidden.WORK)]
    return any((box / hidden.MOVES).is_file() for box in boxes)


def _check_kept(place: Path, path: Path) -> None:
    """Refuse directories whose loss would take more away than an output."""
    for name, folder in (("the current directory", "."), ("the home directory", os.path.expanduser("~"))):
        folder = Path(os.path.realpath(folder))
        if place in (folder, *folder.parents):
            raise InputError(f"output {str(path)!r} is {name} or holds it", do="name a new directory")


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = failures.describe(error, str(path)).split("\n  what to do: ")
        do = cause[1] if len(cause) > 1 else "name an output that you may write to"
        raise InputError(f"output {path} cannot be written", got=cause[0], do=do) from None


def _try(place: Path, *, directory: bool) -> None:
    """Make what a run would make, under the names that it would use, in a directory of its own; and remove it.

    Raises:
        OSError: whatever the system has against it.
    """
    base = place if directory and hidden.is_fixed(place) else place.parent
    missing = []
    while not os.path.lexists(base):
        missing.append(base.name)
        base = base.parent
    if not base.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(base))
    before = os.stat(base)
    with _leaving_when_terminated():
        _probe(base, missing, place, before, directory=directory)


def _probe(base: Path, missing: list[str], place: Path, before: os.stat_result, *, directory: bool) -> None:
    probe = hidden.temporary(base)
    try:
        folder = probe.joinpath(*reversed(missing))
        box = folder / hidden.hidden_path(place, hidden.PARTIAL).name
        (box / hidden.CONTENT).mkdir(parents=True)
        (box / hidden.CONTENT / "file").write_bytes(b"0")
        os.rename(box / hidden.CONTENT, folder / place.name)
        if directory and place.is_dir() and base != place:
            _try_to_rename(place, folder / place.name)
    finally:
        hidden.leave(probe)
        with contextlib.suppress(OSError):
            os.utime(base, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nobody had been there


@contextlib.contextmanager
def _leaving_when_terminated() -> Iterator[None]:
    """A process that torchrun ends meanwhile, because another has failed, cleans up first."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    unheeded = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if unheeded:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if unheeded:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _try_to_rename(place: Path, taken: Path) -> None:
    """Whether an existing directory may be renamed: onto one that is not empty, which cannot succeed but for this reason alone."""
    try:
        os.rename(place, taken)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
