"""Accumulating second moments under TP × DP.

The input of a row-parallel matrix spans the ranks, and its second moment couples all of them. Every rank of a
tensor-parallel group accumulates a share of the rows, against all columns; copies hold other samples and are added at
the end. No rank accumulates a whole moment, and none is held for more than one layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prune.runtime.stage import Stage

CHUNK_TOKENS = 4096
"""Tokens multiplied together in float32 before the product is added in float64."""


class Moment:
    """``sum of w · left rightᵀ`` over tokens, float64; this rank's rows of it.

    Args:
        rows: features of ``left``, over all ranks.
        cols: features of ``right``.
    """

    def __init__(self, stage: Stage, rows: int, cols: int):
        self._stage, self._mine = stage, stage.share(rows)
        self._sum = torch.zeros(len(self._mine), cols, dtype=torch.float64, device=stage.device)

    def add(self, left: Tensor, right: Tensor, weight: Tensor) -> None:
        """Add tokens.

        Args:
            left, right: [..., rows] and [..., cols], full.
            weight: float32 [...].
        """
        mine = left.flatten(0, -2)[:, self._mine.start : self._mine.stop]
        right, weight = right.flatten(0, -2), weight.flatten()
        for start in range(0, len(mine), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            self._sum += (mine[part].float() * weight[part, None]).T @ right[part].float()

    def full(self) -> Tensor:
        """The finished moment, float64 [rows, cols], the same on every rank."""
        return self._stage.gather_rows(self._stage.sum_copies(self._sum.clone()))
