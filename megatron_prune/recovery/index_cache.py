"""The indices of the data that megatron-core keeps in files: made again when a run begins or goes on, in some seconds.

megatron-core 0.16.1 takes every file that is there for whole, and unpickles one that is no array. A run that was killed while
it wrote them, or a disk that was full, leaves them cut short. Of a directory that runs share what is whole is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, Iterator
from unittest import mock

import numpy
import torch.distributed as dist
from numpy.lib import format as npy

from megatron_prune.errors import InputError
from megatron_prune.files.documents import open_regular

log = logging.getLogger("megatron_prune")

_NAME = re.compile(r"[0-9a-f]{32}-(?:GPT|Answers|Blended)Dataset-(?:train|valid|test)-(?:description\.txt|(\w+)_index\.npy)")
_KINDS = {
    "document": ("int32",),
    "sample": ("int32", "int64"),
    "shuffle": ("uint32", "int64"),
    "dataset": ("int16",),
    "dataset_sample": ("int64",),
}
"""Index → the types that its elements may have."""


def check_place(folder: Path) -> None:
    """Refuse a place for the indices that is no directory of its own.

    Raises:
        InputError: if it is a link or a file, may not be written to, or one of the indices' names is taken by a directory.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}", got="a link or a file", needed="a directory", do="name it itself with --data-cache-path")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} cannot be written to", do="name another place for the indices with --data-cache-path")
    for path in folder.iterdir() if folder.is_dir() else ():
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            raise InputError(f"{path}", got="a directory", needed="a file of megatron-core's, or nothing", do="move it away")


@contextlib.contextmanager
def held(folder: Path, *, shared: bool) -> Iterator[None]:
    """Keep other runs of this project from a directory of indices, freed of those that are not to be used.

    What has not the name of an index is left alone.

    Args:
        shared: whether other runs use it too: then those that are whole stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system that cannot lock directories
            fcntl.flock(number, fcntl.LOCK_EX)
        for path in sorted(folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            trouble = _trouble(path, match[1]) if match else None
            if trouble:
                log.warning("%s is made again: %s", path, trouble)
            if trouble or match and not shared:
                path.unlink()
        yield
    finally:
        os.close(number)


def _trouble(path: Path, kind: str | None) -> str | None:
    """What is wrong with an index, or with the description beside them (``kind`` None), if anything."""
    if path.is_symlink():
        return "it is a link"
    try:
        with open_regular(path, error=InputError) as file:
            if kind is None:
                return None
            size = os.fstat(file.fileno()).st_size
            if npy.read_magic(file) != (1, 0):
                return "it is of another version"
            shape, _, dtype = npy.read_array_header_1_0(file)
            whole = file.tell() + math.prod(shape) * dtype.itemsize
    except InputError as error:
        return str(error)
    except Exception:  # what a damaged header does to numpy
        return "it is no array"
    if dtype.name not in _KINDS.get(kind, ()) or len(shape) != (2 if kind == "sample" else 1):
        return f"it holds {dtype} of shape {shape}"
    return None if size == whole else f"it has {size} bytes of {whole}"


@contextlib.contextmanager
def without_pickles() -> Iterator[None]:
    """Let ``numpy.load`` refuse pickles, whatever megatron-core asks it for."""
    with mock.patch.object(numpy, "load", partial(_arrays_alone, numpy.load)):
        yield


def _arrays_alone(load: Any, file: Any, *, allow_pickle: bool = False, **rest: Any) -> Any:
    return load(file, allow_pickle=False, **rest)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let megatron-core build data sets in this process as the only one: it waits for no other, and its errors are no others'."""
    with mock.patch.object(dist, "is_initialized", lambda: False), mock.patch.object(dist, "get_rank", lambda *_: 0):
        yield
