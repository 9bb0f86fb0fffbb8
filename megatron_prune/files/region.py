"""A tensor's bytes in a file, read and written in whole rows without mapping or loading the file.

Mapped pages would count towards a process's memory as they are touched; positioned reads and writes into one buffer
do not, and are as fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch

from megatron_prune.errors import CheckpointError

_written: weakref.WeakSet[_Handle] = weakref.WeakSet()


@functools.lru_cache(maxsize=256)
class _Handle:
    """An open file, closed when it falls out of the cache."""

    def __init__(self, path: str, writable: bool):
        self.path = path
        self.number = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        if writable:
            _written.add(self)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


def sync_files() -> None:
    """Wait until what this process wrote is on the disk (another machine cannot do that for it)."""
    for handle in list(_written):
        with _named(handle):
            os.fsync(handle.number)


@contextlib.contextmanager
def _named(handle: _Handle) -> Iterator[None]:
    """Let errors of a descriptor name its file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, handle.path) from None


def close_files() -> None:
    """Close every file this module holds open: a path may soon name another file."""
    _Handle.cache_clear()


@contextlib.contextmanager
def closed_files() -> Iterator[None]:
    """Close every file at the end, also after an error."""
    try:
        yield
    finally:
        close_files()


@dataclass(frozen=True, slots=True)
class Region:
    """A row-major matrix in a file (a vector has one column).

    Attributes:
        offset: first byte of the matrix in the file.
        rows, cols: in elements.
    """

    path: Path
    offset: int
    rows: int
    cols: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.cols * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def part(self, row: int, rows: int) -> Region:
        """The region of ``rows`` rows from ``row`` on."""
        return Region(self.path, self.offset + row * self.row_bytes, rows, self.cols, self.dtype)

    def read_into(self, out: torch.Tensor) -> None:
        """Fill ``out`` (contiguous, this region's dtype and number of elements).

        Raises:
            CheckpointError: if the file ends early.
        """
        handle = _Handle(str(self.path), False)
        view, done = _bytes(out, self), 0
        while done < self.nbytes:
            with _named(handle):
                count = os.preadv(handle.number, [view[done : done + (1 << 30)]], self.offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ends early", got=f"{self.offset + done} bytes", needed=f"{self.offset + self.nbytes}"
                )
            done += count

    def write_from(self, data: torch.Tensor) -> None:
        """Write ``data`` (contiguous, this region's dtype and number of elements)."""
        handle = _Handle(str(self.path), True)
        view, done = _bytes(data, self), 0
        while done < self.nbytes:
            with _named(handle):
                count = os.pwrite(handle.number, view[done : done + (1 << 30)], self.offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "nothing could be written")
            done += count
        if self.nbytes >= _WRITE_BACK_BYTES:
            _start_write_back(handle.number, self.offset, self.nbytes)


_WRITE_BACK_BYTES = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2


@functools.cache
def _sync_file_range():
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def _start_write_back(number: int, offset: int, count: int) -> None:
    """Let the disk begin on what was written, so that the sync at the end has less to wait for (Linux; a hint)."""
    if (function := _sync_file_range()) is not None:
        function(number, offset, count, _SYNC_FILE_RANGE_WRITE)


def _bytes(tensor: torch.Tensor, region: Region) -> memoryview:
    """The tensor's own memory, without a copy (numpy has no bfloat16, so by way of bytes)."""
    if tensor.dtype != region.dtype or tensor.numel() != region.rows * region.cols:
        raise ValueError(
            f"{tensor.dtype} {list(tensor.shape)} for {region.dtype} [{region.rows}, {region.cols}] of {region.path}"
        )
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


class Scratch(dict):
    """Buffers that are kept between tensors: memory fresh from the system costs more than the copy into it."""

    def take(self, slot: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised flat tensor, valid until the same slot is taken again."""
        needed = elements * dtype.itemsize
        if slot not in self or self[slot].numel() < needed:
            self.pop(slot, None)
            self[slot] = torch.empty(needed, dtype=torch.uint8)
        return self[slot][:needed].view(dtype)
