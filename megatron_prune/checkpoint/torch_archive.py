"""``torch.save`` archives: where the tensors in them lie, and archives laid out for tensors still to be written.

Nothing from outside is executed: objects are read with ``weights_only=True`` and a short list of harmless types, tensors
come back on the ``meta`` device, and torch tells where in the file their bytes are. Writing uses
``torch.serialization.skip_data``, which leaves room for the bytes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import io
import pathlib
import signal
import types
from pathlib import Path
from typing import Any, BinaryIO, Iterator

import torch

from megatron_prune.errors import CheckpointError
from megatron_prune.files.region import Region


class _Slice(io.RawIOBase):
    """Part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if target < 0:
            raise OSError(errno.EINVAL, "a position before the start")
        self._at = target
        return target

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._offset + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def read_objects(path: Path, *, offset: int = 0, length: int | None = None) -> Any:
    """The object saved in a file (or in ``length`` bytes of it), tensors on the ``meta`` device.

    Raises:
        CheckpointError: if it is not a zip archive of ``torch.save`` or wants a type that is not on the safe list.
    """
    size = path.stat().st_size - offset if length is None else length
    safe = [*_SAFE_TYPES, *_megatron_types()]
    try:
        with open(path, "rb") as file, _allowed(safe):
            return torch.load(_Slice(file, offset, size), map_location="meta", weights_only=True)
    except Exception as error:  # a damaged archive can fail in any way
        raise CheckpointError(
            f"{path} cannot be read",
            got=str(error).split("\n")[0][:300],
            needed="a whole archive of torch.save that holds tensors and plain values only",
        ) from None


@contextlib.contextmanager
def _allowed(types: list) -> Iterator[None]:
    """Allow types for a while. (torch's own ``safe_globals`` would end what megatron-core has allowed for good.)"""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(types)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


_SAFE_TYPES = [
    argparse.Namespace,
    types.SimpleNamespace,
    io.BytesIO,
    pathlib.PosixPath,
    signal.Signals,
    collections.OrderedDict,
]
"""Types that Megatron's ``args`` hold; naming one never runs code of the file's choosing."""


def _megatron_types() -> list:
    """Stand-ins for the enumerations in ``args``: each takes the stored value and does nothing with it.

    So a conversion need not import megatron-core.
    """
    return [
        (_Value, "megatron.core.enums.ModelType"),
        (_Value, "megatron.core.transformer.enums.AttnBackend"),
        (_Value, "megatron.core.transformer.enums.CudaGraphScope"),
        (_Value, "megatron.core.rerun_state_machine.RerunMode"),
        (_Value, "megatron.core.rerun_state_machine.RerunDiagnostic"),
        (_Value, "megatron.core.rerun_state_machine.RerunState"),
    ]


class _Value:
    """The stored arguments of an enumeration member."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments


def region_of(tensor: torch.Tensor, path: Path, offset: int = 0) -> Region:
    """Where the bytes of a tensor from :func:`read_objects` lie (``offset`` as given there).

    Raises:
        CheckpointError: if the tensor is not stored row by row.
    """
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not tensor.is_contiguous():
        raise CheckpointError(f"{path} holds a tensor that is not stored row by row", got=f"strides {tensor.stride()}")
    start += offset + tensor.storage_offset() * tensor.element_size()
    rows = tensor.shape[0] if tensor.dim() else 1
    return Region(path, start, rows, tensor.numel() // max(1, rows), tensor.dtype)


def empty_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor to be saved by :func:`lay_out`; its memory is never touched, so it takes none."""
    return torch.empty(shape, dtype=dtype)


def lay_out(content: Any, file: BinaryIO) -> int:
    """Save ``content`` at the end of ``file``, leaving room for the bytes of its :func:`empty_tensor` s.

    Returns:
        The number of bytes the archive takes.
    """
    start = file.tell()
    with torch.serialization.skip_data():
        torch.save(content, file)
    return file.tell() - start
