"""``torch.save`` archives: where the tensors in them lie, and archives laid out for tensors still to be written.

Nothing from outside is executed: the pickle in an archive is interpreted (``files/pickled.py``), tensors come back on the
``meta`` device with the place of their bytes in the file. Writing uses ``torch.serialization.skip_data``, which leaves room
for the bytes.
"""

from __future__ import annotations

import argparse
import errno
import io
import pathlib
import signal
import struct
import types
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_prune.errors import CheckpointError, reason
from megatron_prune.files.documents import open_regular
from megatron_prune.files.pickled import Inert, read_pickle
from megatron_prune.files.region import Region

MAX_PICKLE = 1 << 28
"""Bytes of the pickle in an archive; that of a whole rank of a large model has some hundred thousand."""


_SAVE_AGAIN = "save it again as torch does today: torch.save(torch.load(FILE, weights_only=True), FILE)"


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


class Archive:
    """An archive of ``torch.save``: its members, each stored as it is, and where in the file each begins.

    Args:
        path: the file, for messages.
        file: its bytes, or those of the part that is the archive.
        offset: where that part begins.

    Raises:
        CheckpointError: if it is none, or a reader could take it for another than the next one does.
    """

    def __init__(self, path: Path, file: io.RawIOBase, offset: int = 0):
        self.path, self._file, self._offset = path, file, offset
        begin = file.read(8)
        if begin[:2] != b"PK":
            raise _no_archive(path, begin)
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, UnicodeError) as error:
            raise CheckpointError(f"{path} cannot be read", got=reason(error), needed="a whole archive of torch.save") from None
        self._members = {member.filename: member for member in members}
        packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1]
        if packed:
            raise CheckpointError(
                f"{path} is a compressed archive",
                got=f"{packed[0]!r} and {len(packed) - 1} more members compressed",
                needed="members stored as they are, as torch.save writes them",
                do=_SAVE_AGAIN,
            )
        pickles = [name for name in self._members if name.rsplit("/", 1)[-1] == "data.pkl"]
        if len(self._members) < len(members) or len(pickles) != 1 or min(member.header_offset for member in members):
            raise CheckpointError(f"{path} is not as torch.save writes an archive", do=_SAVE_AGAIN)
        self.name = pickles[0].removesuffix("data.pkl")
        if self.name + "byteorder" in self._members and self.read("byteorder", 16) != b"little":
            raise CheckpointError(f"{path} was written on a machine of the other byte order", do=_SAVE_AGAIN)

    def size(self, member: str) -> int:
        """Bytes of a member (named without the archive's folder)."""
        return self._member(member).file_size

    def start(self, member: str) -> int:
        """Where in the file a member's bytes begin."""
        found = self._member(member)
        self._file.seek(found.header_offset)
        header = self._file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{self.path} is damaged", got=f"no member at byte {self._offset + found.header_offset}")
        name, extra = struct.unpack("<HH", header[26:30])
        if self._file.read(name) != found.orig_filename.encode():
            raise CheckpointError(f"{self.path} is damaged", got=f"another member where {found.filename!r} should be")
        return self._offset + found.header_offset + 30 + name + extra

    def read(self, member: str, limit: int) -> bytes:
        """A member's bytes."""
        size, start = self.size(member), self.start(member)
        if size > limit:
            raise CheckpointError(f"{self.path}: {member}", got=f"{size} bytes", needed=f"at most {limit}")
        self._file.seek(start - self._offset)
        data = self._file.read(size)
        if len(data) < size:
            raise CheckpointError(f"{self.path} is cut short", got=f"{len(data)} bytes of {member}", needed=f"{size}")
        return data

    def _member(self, member: str) -> zipfile.ZipInfo:
        if self.name + member not in self._members:
            raise CheckpointError(f"{self.path} is damaged", got=f"no member {self.name + member!r}")
        return self._members[self.name + member]


def _no_archive(path: Path, begin: bytes) -> CheckpointError:
    needed = "an archive as torch.save has written them since torch 1.6"
    if begin[:1] == b"\x80" or begin[:4] in (b"l\x03\xf3\n", b"ustar"):
        kind, do = "a pickle, or a file of torch before 1.6", _SAVE_AGAIN
    elif begin.startswith(b"version "):
        kind, do = "a pointer of git-lfs", "fetch the file itself: git lfs pull"
    else:
        kind, do = f"a file that begins with {begin!r}", "fetch it again"
    return CheckpointError(f"{path} is no archive of torch.save", got=kind, needed=needed, do=do)


def open_archive(path: Path, file: BinaryIO, *, offset: int = 0, length: int | None = None) -> Archive:
    """The archive in an open file, or in ``length`` bytes of it."""
    size = file.seek(0, io.SEEK_END) - offset if length is None else length
    return Archive(path, _Slice(file, offset, size), offset)


def read_objects(path: Path, *, offset: int = 0, length: int | None = None) -> Any:
    """The object saved in a file (or in ``length`` bytes of it): plain values, tensors on ``meta``, inert stand-ins of all else.

    Raises:
        CheckpointError: if it is no whole archive of ``torch.save``, or its pickle is not sound.
    """
    with open_regular(path) as file:
        archive = open_archive(path, file, offset=offset, length=length)
        pickle = archive.read("data.pkl", MAX_PICKLE)
        return read_pickle(pickle, path, known=_KNOWN, persistent=_Storages(archive).find)


class _Storages:
    """The storages of an archive, by the persistent ids that its pickle has of them."""

    def __init__(self, archive: Archive):
        self._archive = archive

    def find(self, name: Any) -> _Storage:
        kind, (storage, key, _, elements) = name[0], name[1:5]
        if kind != "storage" or not isinstance(key, str) or not isinstance(storage, Inert):
            raise ValueError("a persistent id that is no storage")
        dtype = _STORAGES.get(storage.kind)
        if dtype is None:
            raise CheckpointError(f"{self._archive.path} holds a storage of an unknown type", got=storage.kind)
        if self._archive.size(f"data/{key}") < elements * dtype.itemsize:
            raise CheckpointError(f"{self._archive.path}: storage {key} is cut short")
        return _Storage(dtype, elements, self._archive.start(f"data/{key}"))


class _Storage:
    """Elements of one dtype (bytes, where it is not typed), and where in the file they begin."""

    def __init__(self, dtype: torch.dtype, elements: int, start: int):
        self.dtype, self.elements, self.start = dtype, elements, start


_STORAGES = {
    **{
        f"torch.{name}Storage": dtype
        for name, dtype in {
            "Double": torch.float64,
            "Float": torch.float32,
            "Half": torch.float16,
            "BFloat16": torch.bfloat16,
            "Long": torch.int64,
            "Int": torch.int32,
            "Short": torch.int16,
            "Char": torch.int8,
            "Byte": torch.uint8,
            "Bool": torch.bool,
            "ComplexFloat": torch.complex64,
            "ComplexDouble": torch.complex128,
        }.items()
    },
    "torch.storage.UntypedStorage": torch.uint8,
}


def _tensor(storage: _Storage, start: int, shape: tuple, strides: tuple, *rest: Any) -> torch.Tensor:
    """What ``torch._utils._rebuild_tensor_v2`` (or ``_v3``: the dtype is its sixth further argument) gives, on ``meta``."""
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), storage.dtype)
    numbers = [start, *shape, *strides]
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) or len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {shape} and strides {strides}")
    reach = start + sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1 if 0 not in shape else start
    if reach * dtype.itemsize > storage.elements * storage.dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} that is larger than its storage")
    tensor = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    tensor.bytes_at = storage.start + start * dtype.itemsize
    return tensor


def _first(tensor: Any, *_: Any) -> Any:
    """A parameter is the tensor in it."""
    return tensor


def _of_subclass(function: Inert, _kind: Any, arguments: tuple, _state: Any) -> Any:
    """A tensor with attributes, or of a subclass (``torch._tensor._rebuild_from_type_v2``): the tensor."""
    return _KNOWN[function.kind](*arguments)


DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
"""``torch.bfloat16`` … → the dtype."""

_KNOWN = {
    **DTYPES,
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
    "collections.OrderedDict": dict,
    "signal.Signals": lambda number: (
        signal.Signals(number) if number in set(signal.Signals) else Inert("signal.Signals", (number,))
    ),
    **{f"{module}.PosixPath": pathlib.Path for module in ("pathlib", "pathlib._local")},
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "_codecs.encode": lambda text, coding: text.encode("latin-1") if coding in ("latin1", "latin-1") else text,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _of_subclass,
}


def region_of(tensor: torch.Tensor, path: Path) -> Region:
    """Where the bytes of a tensor from :func:`read_objects` lie.

    Raises:
        CheckpointError: if the tensor is not stored row by row.
    """
    if not tensor.is_contiguous():
        raise CheckpointError(f"{path} holds a tensor that is not stored row by row", got=f"strides {tensor.stride()}")
    rows = tensor.shape[0] if tensor.dim() else 1
    return Region(path, tensor.bytes_at, rows, tensor.numel() // max(1, rows), tensor.dtype)


def values(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """A tensor from :func:`read_objects` with its values.

    Raises:
        CheckpointError: as :func:`region_of`, or if the file has been cut since.
    """
    read = torch.empty(tensor.shape, dtype=tensor.dtype)
    if read.numel():
        region_of(tensor, path).read_into(read)
    return read


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
