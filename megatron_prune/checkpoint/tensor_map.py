"""Where every role tensor of a checkpoint lies: the one thing that a format has to say."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import Iterable, Iterator, NamedTuple

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import Patch
from megatron_prune.arch.tensors import TensorId, full_shape, tensor_ids
from megatron_prune.checkpoint import digests
from megatron_prune.errors import CheckpointError, raise_all
from megatron_prune.files.region import Region, Scratch


class Tile(NamedTuple):
    """A rectangle of a role tensor, and the region that holds exactly it. ``row``, ``col`` place it in the tensor."""

    region: Region
    row: int
    col: int


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Element types that weights may have."""


class DamagedTensor(CheckpointError):
    """Stored bytes of a tensor are not those that were written.

    Args:
        what: which, and where.
    """

    def __init__(self, what: str):
        got = "other bytes: damaged, exchanged with another file, or changed afterwards"
        super().__init__(what, got=got, do="restore the file, or make the checkpoint again")
        self.what = what

    def __reduce__(self):
        return type(self), (self.what,)


@dataclass
class TensorMap:
    """The tiles of every role tensor.

    Attributes:
        config: the model's shape.
        tiles: tensor → tiles that cover it once.
        replicas: tensor → further copies (norms of other tensor-parallel ranks, the embedding that a last pipeline
            stage repeats for the tied output); written, and read only by :meth:`check_copies`.
        expected: tensor → digests that its bytes must have (``checkpoint/digests.py``); what is read is compared with them.
        content_id: what all tensors together must have, where no digests of each are known (``checkpoint/stream.py``).
    """

    config: ModelConfig
    tiles: dict[TensorId, list[Tile]] = field(default_factory=lambda: defaultdict(list))
    replicas: dict[TensorId, list[Tile]] = field(default_factory=lambda: defaultdict(list))
    expected: dict[TensorId, str] = field(default_factory=dict)
    content_id: str | None = None
    _checked: set[tuple[TensorId, int]] = field(default_factory=set)

    def add(self, layer: int | None, region: Region, patches: Iterable[Patch], *, replica: bool = False) -> None:
        """File the patches of one stored tensor, whose rows start at ``region``'s first row."""
        target = self.replicas if replica else self.tiles
        for patch in patches:
            tile = Tile(region.part(patch.stored_row, patch.rows), patch.row, patch.col)
            target[TensorId(patch.role, layer)].append(tile)

    def dtype(self, tensor: TensorId) -> torch.dtype:
        """Element type of a tensor as stored."""
        return self.tiles[tensor][0].region.dtype

    def shape(self, tensor: TensorId) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return full_shape(tensor, self.config)

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
            elif len(kinds := {tile.region.dtype for tile in tiles}) > 1:
                problems.append(f"{tensor}: parts of different dtype")
            elif not kinds <= set(FLOATS):
                problems.append(f"{tensor}: holds {_name(*kinds)}, needed one of " + ", ".join(map(_name, FLOATS)))
            elif not _covers_once(tiles, self.shape(tensor)):
                problems.append(f"{tensor}: its parts do not cover {self.shape(tensor)} exactly once")
        problems += [f"{tensor}: not a tensor of this model" for tensor in set(self.tiles) - set(expected)]
        raise_all(CheckpointError, f"{where} does not hold the model it describes", problems)
        return self

    def expect(self, recorded: dict[str, str], where: object) -> TensorMap:
        """Compare what is read from now on with ``recorded`` digests, by the names of the tensors; none: with nothing.

        Raises:
            CheckpointError: if they are not of these tensors, cut as these are.
        """
        if not recorded:
            return self
        problems = []
        for tensor in tensor_ids(self.config):
            needed = sum(digests.count(tile.region) for tile in self.tiles[tensor]) * digests.WIDTH
            found = self.expected[tensor] = recorded.get(str(tensor), "")
            if len(found) != needed:
                problems.append(f"{tensor}: {len(found)} digits, needed {needed}")
        known = {str(tensor) for tensor in self.expected}
        problems += [f"{name}: not a tensor of this model" for name in recorded if name not in known]
        raise_all(CheckpointError, f"{where}: the digests are not of the tensors as they lie in the files", problems)
        return self

    def read(self, tensor: TensorId, scratch: Scratch) -> torch.Tensor:
        """The full tensor, in the dtype as stored, in memory of ``scratch`` (valid until its next read).

        Raises:
            DamagedTensor: if it is not what was written.
        """
        return self.read_digested(tensor, scratch)[0]

    def read_digested(self, tensor: TensorId, scratch: Scratch) -> tuple[torch.Tensor, str]:
        """The full tensor as :meth:`read` gives it, and the digests of its bytes."""
        shape, found = self.shape(tensor), []
        out = scratch.take("read", prod(shape), self.dtype(tensor))
        matrix = out.view(shape[0], -1)
        for tile, first in self._by_place(tensor):
            region, row, col = tile
            if region.cols == matrix.shape[1]:
                part = matrix[row : row + region.rows]
                region.read_into(part)
            else:
                part = scratch.take("tile", region.rows * region.cols, region.dtype).view(region.rows, region.cols)
                region.read_into(part)
                matrix[row : row + region.rows, col : col + region.cols] = part
            found.append(self._compared(tensor, region, part, first))
        return out.view(shape), "".join(found)

    def read_block(self, tensor: TensorId, rows: range, cols: range | None = None) -> torch.Tensor:
        """A rectangle of a tensor in memory of its own, reading no more than the rows it needs (whole stretches the first
        time, to compare their digests).

        Raises:
            DamagedTensor: if it is not what was written.
        """
        shape = self.shape(tensor)
        cols = range(shape[1] if len(shape) > 1 else 1) if cols is None else cols
        out = torch.empty(len(rows), len(cols), dtype=self.dtype(tensor))
        for tile, first in self._by_place(tensor):
            region, row, col = tile
            top, bottom = max(rows.start, row), min(rows.stop, row + region.rows)
            left, right = max(cols.start, col), min(cols.stop, col + region.cols)
            if top < bottom and left < right:
                part = self._rows(tensor, region, first, top - row, bottom - row)
                out[top - rows.start : bottom - rows.start, left - cols.start : right - cols.start] = part[
                    :, left - col : right - col
                ]
        return out if len(shape) > 1 else out.view(-1)

    def check_copies(self, tensor: TensorId) -> None:
        """Compare every further copy of a tensor with the digests of the tile that it is a copy of.

        Raises:
            DamagedTensor: if one is not what was written.
        """
        for region, first in self._copies(tensor):
            for number in range(digests.count(region)):
                self._check_stretch(tensor, region, first, number)

    def check_ends(self, tensor: TensorId) -> None:
        """Compare the first and the last stretch of every tile and copy of a tensor: whether it lies where it is to.

        Raises:
            DamagedTensor: if one is not what was written.
        """
        for region, first in [*((tile.region, first) for tile, first in self._by_place(tensor)), *self._copies(tensor)]:
            for number in {0, digests.count(region) - 1}:
                self._check_stretch(tensor, region, first, number)

    def _copies(self, tensor: TensorId) -> Iterator[tuple[Region, int]]:
        """Further copies of tiles, each with the number of its first digest."""
        firsts = {(tile.row, tile.col, tile.region.rows): first for tile, first in self._by_place(tensor)}
        for region, row, col in self.replicas.get(tensor, ()):
            first = firsts.get((row, col, region.rows))
            if first is not None and region.dtype == self.dtype(tensor):  # in another type its bytes are others
                yield region, first

    def _check_stretch(self, tensor: TensorId, region: Region, first: int, number: int) -> None:
        step = digests.stretch_rows(region)
        part = region.part(number * step, min(step, region.rows - number * step))
        rows = torch.empty(part.rows, part.cols, dtype=part.dtype)
        part.read_into(rows)
        self._compared(tensor, region, rows, first + number)

    def write(self, tensor: TensorId, data: torch.Tensor, scratch: Scratch) -> str:
        """Write a full tensor to all its tiles and copies, in the dtype laid out for it.

        Returns:
            The digests of what is in the tiles now.
        """
        matrix, found = data.reshape(data.shape[0], -1), []
        tiles = [tile for tile, _ in self._by_place(tensor)]
        for number, (region, row, col) in enumerate((*tiles, *self.replicas.get(tensor, ()))):
            part = matrix[row : row + region.rows, col : col + region.cols]
            if part.dtype != region.dtype or not part.is_contiguous():
                buffer = scratch.take("tile", part.numel(), region.dtype).view(part.shape)
                part = buffer.copy_(part)
            if number < len(tiles):
                found += digests.digest_rows(part, region)
            region.write_from(part)
        return "".join(found)

    def _by_place(self, tensor: TensorId) -> Iterator[tuple[Tile, int]]:
        """The tiles in the order of their digests, each with the number of its first."""
        first = 0
        for tile in sorted(self.tiles[tensor], key=lambda tile: (tile.row, tile.col)):
            yield tile, first
            first += digests.count(tile.region)

    def _rows(self, tensor: TensorId, region: Region, first: int, start: int, stop: int) -> torch.Tensor:
        """Rows of a tile, [rows, columns]; what was not compared yet is."""
        step, low, high = digests.stretch_rows(region), start, stop
        touched = range(start // step, -(-stop // step))
        place = [(tensor, first + number) for number in touched] if tensor in self.expected else []
        fresh = not self._checked.issuperset(place)
        if fresh:
            low, high = touched.start * step, min(touched.stop * step, region.rows)
        part = torch.empty(high - low, region.cols, dtype=region.dtype)
        region.part(low, high - low).read_into(part)
        if fresh:
            self._compared(tensor, region, part, first + touched.start)
            self._checked.update(place)
        return part[start - low : stop - low]

    def _compared(self, tensor: TensorId, region: Region, rows: torch.Tensor, first: int) -> str:
        """Digests of rows, which must be the expected ones from number ``first`` on, where any are known."""
        found = "".join(digests.digest_rows(rows, region))
        start = first * digests.WIDTH
        if tensor in self.expected and found != self.expected[tensor][start : start + len(found)]:
            raise DamagedTensor(f"{region.path}: {tensor} is not what was written there")
        return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
