"""Digests of stored bytes: what a tensor, or a part of one, is compared with when it is read.

The rows of a tile are cut into stretches of about 1 MiB and each stretch has a digest of its own (16 hexadecimal digits), so
that a process which needs a few rows checks just these, without reading anything twice. A tensor's digests are one string: its
tiles by row and column, their stretches in order.
"""

from __future__ import annotations

from pathlib import Path

import torch
import xxhash

from megatron_prune.files.documents import open_regular
from megatron_prune.files.region import Region

WIDTH = 16
STRETCH_BYTES = 1 << 20


def stretch_rows(region: Region) -> int:
    """Rows of a stretch: as many as fit, at least one."""
    return max(1, STRETCH_BYTES // max(1, region.row_bytes))


def count(region: Region) -> int:
    """Stretches of a region."""
    return -(-region.rows // stretch_rows(region))


def digest(data: torch.Tensor) -> str:
    """Digest of a contiguous tensor: of its bytes and its element type."""
    state = xxhash.xxh3_64(str(data.dtype).encode())
    state.update(memoryview(data.view(-1).view(torch.uint8).numpy()))
    return state.hexdigest()


def digest_rows(rows: torch.Tensor, region: Region) -> list[str]:
    """Digests of the stretches of contiguous rows of a region; the first row begins a stretch."""
    flat, step = rows.reshape(-1), max(1, stretch_rows(region) * region.cols)
    return [digest(flat[start : start + step]) for start in range(0, flat.numel(), step)]


def digest_file(path: Path) -> str:
    """Digest of a whole file, read in pieces.

    Raises:
        CheckpointError: if it is no regular file that can be read.
    """
    state = xxhash.xxh3_64()
    with open_regular(path) as file:
        while piece := file.read(STRETCH_BYTES):
            state.update(piece)
    return state.hexdigest()
