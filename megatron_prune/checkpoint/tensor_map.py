"""Where every role tensor of a checkpoint lies: the one thing that a format has to say."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import Iterable, NamedTuple

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import Block
from megatron_prune.arch.tensors import TensorId, tensor_ids, tensor_shape
from megatron_prune.errors import CheckpointError, raise_all
from megatron_prune.files.region import Region, Scratch


class Tile(NamedTuple):
    """A rectangle of a role tensor, and the region that holds exactly it. ``row``, ``col`` place it in the tensor."""

    region: Region
    row: int
    col: int


@dataclass
class TensorMap:
    """The tiles of every role tensor.

    Attributes:
        config: the model's shape.
        tiles: tensor → tiles that cover it once.
        replicas: tensor → further copies (norms of other tensor-parallel ranks, the embedding that a last pipeline
            stage repeats for the tied output); written, never read.
    """

    config: ModelConfig
    tiles: dict[TensorId, list[Tile]] = field(default_factory=lambda: defaultdict(list))
    replicas: dict[TensorId, list[Tile]] = field(default_factory=lambda: defaultdict(list))

    def add(self, layer: int | None, region: Region, blocks: Iterable[Block], *, replica: bool = False) -> None:
        """File the blocks of one stored tensor, whose rows start at ``region``'s first row."""
        target = self.replicas if replica else self.tiles
        for block in blocks:
            tile = Tile(region.part(block.stored_row, block.rows), block.row, block.col)
            target[TensorId(block.role, layer)].append(tile)

    def dtype(self, tensor: TensorId) -> torch.dtype:
        """Element type of a tensor as stored."""
        return self.tiles[tensor][0].region.dtype

    def shape(self, tensor: TensorId) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return tensor_shape(tensor.role, self.config)

    def nbytes(self, tensor: TensorId) -> int:
        """Bytes of a tensor as stored, copies and padding not counted."""
        return prod(self.shape(tensor)) * self.dtype(tensor).itemsize

    def validate(self, where: object) -> TensorMap:
        """Check that every tensor of the model is covered exactly once, in one dtype.

        Raises:
            CheckpointError: naming every tensor that is missing, overlapping or of mixed dtype.
        """
        problems, expected = [], tensor_ids(self.config)
        for tensor in expected:
            tiles = self.tiles.get(tensor)
            if not tiles:
                problems.append(f"{tensor}: missing")
            elif len({tile.region.dtype for tile in tiles}) > 1:
                problems.append(f"{tensor}: parts of different dtype")
            elif not _covers_once(tiles, self.shape(tensor)):
                problems.append(f"{tensor}: its parts do not cover {self.shape(tensor)} exactly once")
        problems += [f"{tensor}: not a tensor of this model" for tensor in set(self.tiles) - set(expected)]
        raise_all(CheckpointError, f"{where} does not hold the model it describes", problems)
        return self

    def read(self, tensor: TensorId, scratch: Scratch) -> torch.Tensor:
        """The full tensor, in the dtype as stored, in memory of ``scratch`` (valid until its next read)."""
        shape = self.shape(tensor)
        out = scratch.take("read", prod(shape), self.dtype(tensor))
        matrix = out.view(shape[0], -1)
        for region, row, col in self.tiles[tensor]:
            if region.cols == matrix.shape[1]:
                region.read_into(matrix[row : row + region.rows])
            else:
                part = scratch.take("tile", region.rows * region.cols, region.dtype)
                region.read_into(part)
                matrix[row : row + region.rows, col : col + region.cols] = part.view(region.rows, region.cols)
        return out.view(shape)

    def read_block(self, tensor: TensorId, rows: range, cols: range | None = None) -> torch.Tensor:
        """A rectangle of a tensor in memory of its own, reading no more than the rows it needs."""
        shape = self.shape(tensor)
        cols = range(shape[1] if len(shape) > 1 else 1) if cols is None else cols
        out = torch.empty(len(rows), len(cols), dtype=self.dtype(tensor))
        for region, row, col in self.tiles[tensor]:
            top, bottom = max(rows.start, row), min(rows.stop, row + region.rows)
            left, right = max(cols.start, col), min(cols.stop, col + region.cols)
            if top < bottom and left < right:
                part = torch.empty(bottom - top, region.cols, dtype=region.dtype)
                region.part(top - row, bottom - top).read_into(part)
                out[top - rows.start : bottom - rows.start, left - cols.start : right - cols.start] = part[
                    :, left - col : right - col
                ]
        return out if len(shape) > 1 else out.view(-1)

    def write(self, tensor: TensorId, data: torch.Tensor, scratch: Scratch) -> None:
        """Write a full tensor to all its tiles and copies, in the dtype laid out for it."""
        matrix = data.reshape(data.shape[0], -1)
        for region, row, col in (*self.tiles[tensor], *self.replicas.get(tensor, ())):
            part = matrix[row : row + region.rows, col : col + region.cols]
            if part.dtype != region.dtype or not part.is_contiguous():
                buffer = scratch.take("tile", part.numel(), region.dtype).view(part.shape)
                part = buffer.copy_(part)
            region.write_from(part)


def _covers_once(tiles: list[Tile], shape: tuple[int, ...]) -> bool:
    rows, cols = shape[0], shape[1] if len(shape) > 1 else 1
    if sum(tile.region.rows * tile.region.cols for tile in tiles) != rows * cols:
        return False
    # Of the right area in all: once each unless two overlap. Tiles of a column range are stacked, so sweep by column.
    by_column: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for region, row, col in tiles:
        if row < 0 or col < 0 or row + region.rows > rows or col + region.cols > cols:
            return False
        by_column[col, col + region.cols].append((row, row + region.rows))
    bands = sorted(by_column)
    if any(left[1] > right[0] for left, right in zip(bands, bands[1:])):
        return False
    for stacked in by_column.values():
        stacked.sort()
        if any(upper[1] > lower[0] for upper, lower in zip(stacked, stacked[1:])):
            return False
    return True
