"""Output directories that appear whole or not at all.

Everything is written to a hidden sibling, synced, and put in place by one rename. An existing directory is exchanged
for the new one in one step (``renameat2`` with ``RENAME_EXCHANGE``) and then removed, so a run killed at any moment
leaves either the old state or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
from pathlib import Path
from typing import Callable, Iterator

from megatron_prune.errors import InputError
from megatron_prune.files.region import close_files

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_KEY_FILE = "request.json"


def check_output(path: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output path that is taken, cannot be made, or would take the source away.

    Raises:
        InputError: if ``path`` exists and ``overwrite`` is not set, is a file, or its parent is not writable; if it is
            ``source``, holds it or lies in it.
    """
    if source is not None:
        out, held = path.resolve(), source.resolve()
        if out == held or out in held.parents or held in out.parents:
            raise InputError(f"output {path} is, holds or lies in the input {source}", do="name another directory")
    path = path.absolute()
    _recover(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"output {path}", got="a file or a link", needed="a directory, or a name that is free")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"output {path} exists", do="name another directory, or pass --overwrite to replace it")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"output {path}: {parent} cannot be written to", do="name a directory that you may write to")


def check_file(path: Path, *, beside: Path | None = None) -> None:
    """Refuse a file path that cannot be written.

    Raises:
        InputError: if it is a directory or its parent cannot be written to, or it is in the output ``beside`` it.
    """
    if beside is not None and beside.resolve() in (path.resolve(), *path.resolve().parents):
        raise InputError(f"{path} is the output {beside} or lies in it", do="name a file elsewhere")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path} cannot be written", do="name a file in a directory that you may write to")


def partial_path(path: Path) -> Path:
    """The hidden sibling that ``path`` is written as until it is whole."""
    path = path.absolute()
    return path.with_name(f".{path.name}.partial")


def _replaced_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _recover(path: Path) -> None:
    """Mend what a run left that was killed between the two renames of :func:`commit`: the old directory goes back."""
    old = _replaced_path(path)
    if old.is_dir() and not path.exists():
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            os.rename(old, path)
    elif old.is_dir():
        shutil.rmtree(old, ignore_errors=True)


def begin(path: Path) -> Path:
    """Make an empty :func:`partial_path`, removing what an interrupted run left there.

    The directory stays locked until :func:`commit` or :func:`abandon`, or until this process ends in any way.

    Raises:
        InputError: if another run is writing the same output.
    """
    close_files()
    partial = partial_path(path)
    if partial.is_dir():
        _unlock(_lock(partial))
    shutil.rmtree(partial, ignore_errors=True)
    _recover(path.absolute())
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise _busy(partial) from None
    _locks[partial] = _lock(partial)
    return partial


_locks: dict[Path, int] = {}


def _lock(partial: Path) -> int:
    number = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        raise _busy(partial) from None
    except OSError:
        pass  # a file system that cannot lock directories
    return number


def _unlock(number: int | None) -> None:
    if number is not None:
        os.close(number)


def _busy(partial: Path) -> InputError:
    return InputError(f"another run is writing {partial}", do="wait for it, or name another output")


def abandon(path: Path) -> None:
    """Remove the partial output of ``path``."""
    shutil.rmtree(partial_path(path), ignore_errors=True)
    _unlock(_locks.pop(partial_path(path), None))


def commit(path: Path) -> None:
    """Sync the partial output and put it in place of ``path``."""
    _place(partial_path(path), path.absolute())
    _unlock(_locks.pop(partial_path(path), None))


def _place(partial: Path, path: Path) -> None:
    """Sync a finished directory and put it in place of ``path``."""
    close_files()
    for folder, _, files in os.walk(partial):
        for name in files:
            sync(os.path.join(folder, name))
        sync(folder)
    if path.exists():
        if not _exchange(partial, path):
            old = _replaced_path(path)
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
            os.rename(partial, path)
            shutil.rmtree(old, ignore_errors=True)  # it is out of the way; the output is in place
        shutil.rmtree(partial, ignore_errors=True)
    else:
        os.rename(partial, path)
    sync(path.parent)


@contextlib.contextmanager
def work(path: Path, key: str, *, main: bool, agree: Callable[[Exception | None], None]) -> Iterator[Path]:
    """The hidden sibling of output ``path`` where a long run keeps its finished parts.

    It stays when the run is stopped, and the next run with the same ``key`` goes on from it; what another request left
    there is removed. It goes when the run ends well, unless :func:`finish_work` made it the output.

    Args:
        main: whether this process makes and removes it.
        agree: waits for all processes, and raises on all of them what one hands it.

    Raises:
        InputError: if another run is at work on the same output.
    """
    folder = path.absolute().with_name(f".{path.name}.work")
    error = None
    if main:
        try:
            _take_up(folder, key)
        except (InputError, OSError) as found:
            error = found
    agree(error)
    try:
        yield folder
        agree(None)
        if main:
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        if main and folder.is_dir() and os.listdir(folder) == [_KEY_FILE]:
            shutil.rmtree(folder, ignore_errors=True)  # nothing was done yet: a refused run leaves nothing
        raise
    finally:
        if main:
            _unlock(_locks.pop(folder, None))


def check_free(folder: Path) -> None:
    """Refuse a directory that another run holds.

    Raises:
        InputError: if one does.
    """
    _unlock(_lock(folder))


def hold(folder: Path) -> None:
    """Make a directory, if it is not there, and keep other runs off it until this process ends.

    Raises:
        InputError: if another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _locks[folder] = _lock(folder)


def _take_up(folder: Path, key: str) -> None:
    """Lock a work directory, emptied of what another request left."""
    folder.mkdir(parents=True, exist_ok=True)
    _locks[folder] = _lock(folder)
    note = folder / _KEY_FILE
    if not note.is_file() or note.read_text(encoding="utf-8") != key:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_text(note, key)


def finish_work(folder: Path, path: Path) -> None:
    """Put a finished work directory in place of the output ``path``."""
    (folder / _KEY_FILE).unlink()
    _place(folder, path.absolute())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically: see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a temporary sibling, synced, then renamed."""
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync(path.parent)


def sync(path: str | Path) -> None:
    """Have a file, or what a directory lists, on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the file system or the C library cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
