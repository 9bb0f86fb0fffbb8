"""Accumulating second moments under TP × DP.

The input of a row-parallel matrix spans the ranks, and its second moment couples all of them. Every rank of a
tensor-parallel group accumulates a share of the rows; copies hold other samples and are added at the end. No rank
accumulates a whole moment, none is held for more than one layer, and only the first process ever sees one in one piece.

A moment is symmetric. Its rows and columns are cut into blocks in a ring, and each row of blocks is multiplied with itself
and the half of the ring that follows: every pair once, the same work on every rank, a little over half of the products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prune.runtime.stage import Stage

CHUNK_TOKENS = 4096
"""Tokens multiplied together in float32 before the product is added in float64."""
BLOCK_WIDTH = 192
"""Features of a block, at least: narrower products cost more than the half that they save."""
RANK_BLOCKS = 5
"""Blocks of a rank's rows, at most; of an odd number of blocks none is paired with another twice."""
ALIGNED = 32
"""Blocks inside a rank's rows begin at a multiple of it."""


class Moment:
    """``sum of w · x (x, y)ᵀ`` over tokens, float64; this rank's rows of it.

    Args:
        features: of x, over all ranks.
        beside: features of y.
    """

    def __init__(self, stage: Stage, features: int, beside: int = 0):
        self._stage, self._mine, self._features = stage, stage.share(features), features
        each = min(RANK_BLOCKS, max(1, features // stage.ranks // BLOCK_WIDTH))
        starts = [_start(features, block, each, stage.ranks) for block in range(each * stage.ranks + 1)]
        self._ring = [range(start, stop) for start, stop in zip(starts, starts[1:])]
        self._own = range(each * stage.rank, each * (stage.rank + 1))
        self._sum = torch.zeros(len(self._mine), features + beside, dtype=torch.float64, device=stage.device)

    def add(self, value: Tensor, weight: Tensor, beside: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            value: x, [..., features], full.
            weight: float32 [...].
            beside: y, [..., beside].
        """
        value, weight = value.flatten(0, -2), weight.flatten()
        for start in range(0, len(value), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            right = value[part].float()
            left = right[:, self._mine.start : self._mine.stop] * weight[part, None]
            for block in self._own:
                rows = self._local(self._ring[block])
                for cols in self._follows(block):
                    self._sum[rows, cols] += left[:, rows].T @ right[:, cols]
            if beside is not None:
                self._sum[:, self._features :] += left.T @ beside.flatten(0, -2)[part].float()

    def whole(self) -> Tensor | None:
        """The finished moment, float64 [features, features + beside], on the host of the first process; ``None`` on all others.

        Nothing can be added after it.
        """
        whole = self._stage.gather_rows(self._stage.sum_copies(self._sum), self._features)
        if whole is None:
            return None
        count = len(self._ring)
        for row, rows in enumerate(self._ring):
            for distance in range(count // 2 + 1, count):
                cols = self._ring[(row + distance) % count]
                whole[rows.start : rows.stop, cols.start : cols.stop] = whole[cols.start : cols.stop, rows.start : rows.stop].T
        return whole

    def _local(self, rows: range) -> slice:
        """A block's rows among this rank's."""
        return slice(rows.start - self._mine.start, rows.stop - self._mine.start)

    def _follows(self, block: int) -> list[slice]:
        """Columns of a block and of the half of the ring that follows it."""
        last, count = block + len(self._ring) // 2, len(self._ring)
        if last < count:
            return [slice(self._ring[block].start, self._ring[last].stop)]
        return [slice(self._ring[block].start, self._features), slice(0, self._ring[last - count].stop)]


def _start(features: int, block: int, each: int, ranks: int) -> int:
    """First feature of a block, of ``each`` on every rank."""
    place = features * block // (each * ranks)
    return place if block % each == 0 else (place + ALIGNED // 2) // ALIGNED * ALIGNED
