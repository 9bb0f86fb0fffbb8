"""The safetensors file format: where tensors lie in a file, and files laid out for tensors still to be written.

``safetensors.save_file`` wants all tensors of a file in memory at once; a stream needs the header first and the bytes
later. The header written here is byte for byte what ``save_file`` writes (tested): tensors ordered by falling
alignment of dtype and then by name, compact JSON, padded with spaces to 8 bytes.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_prune.errors import CheckpointError, reason
from megatron_prune.files.documents import open_regular, shorten
from megatron_prune.files.region import Region

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""In the order in which ``save_file`` lays tensors of these types out."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = tuple(DTYPES)


def read_header(path: Path) -> dict[str, tuple[Region, tuple[int, ...]]]:
    """Tensor name → (region, shape) of a safetensors file.

    Raises:
        CheckpointError: if the file is truncated or malformed (safetensors' own checks), or holds a dtype that is not known.
    """
    with open_regular(path) as file:
        begin = file.read(8)
        if begin == b"version ":
            raise CheckpointError(f"{path} is a pointer of git-lfs", do="fetch the file itself: git lfs pull")
        try:
            with safe_open(path, framework="pt"):
                pass  # validates the header, the offsets and the file's length
            length = int.from_bytes(begin, "little")
            header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            got = reason(error)
            raise CheckpointError(f"{path} is not a whole safetensors file", got=got, do="fetch it again") from None
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {shorten(name)}", got=f"dtype {entry['dtype']}", needed="one of " + ", ".join(DTYPES)
            )
        shape = tuple(entry["shape"])
        cols = prod(shape[1:])
        region = Region(path, 8 + length + entry["data_offsets"][0], shape[0] if shape else 1, cols, DTYPES[entry["dtype"]])
        found[name] = (region, shape)
    return found


def lay_out(path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Create a safetensors file whose tensors are all zero and take no room on disk yet."""
    order = sorted(tensors, key=lambda name: (_RANK.index(_NAMES[tensors[name][0]]), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.ftruncate(file.fileno(), 8 + len(text) + position)
