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

from megatron_prune.errors import CheckpointError
from megatron_prune.files.region import Region

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = ("F64", "F32", "BF16", "F16")  # save_file's order of the four


def read_header(path: Path) -> dict[str, tuple[Region, tuple[int, ...]]]:
    """Tensor name → (region, shape) of a safetensors file.

    Raises:
        CheckpointError: if the file is truncated or malformed (safetensors' own checks), or holds a dtype that is not
            a floating-point type.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # validates the header, the offsets and the file's length
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file", got=str(error), do="fetch it again") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name}", got=f"dtype {entry['dtype']}", needed="one of " + ", ".join(DTYPES))
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
