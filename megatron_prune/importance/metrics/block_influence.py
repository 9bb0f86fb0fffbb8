"""How much a layer changes its input: ``1 - mean over tokens of cos(input, output)`` (ShortGPT, Men et al. 2024,
arXiv 2403.03853)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prune.importance.metric import METRICS, Metric


@METRICS.register("block_influence")
class BlockInfluence(Metric):
    """1 − cosine of input and output."""

    needs = frozenset({"activations"})
    axes = frozenset({"layer"})
    signed = True

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        similar = [self.statistics.layer(number).similarity for number in range(len(total))]
        return 1.0 - torch.tensor(similar, dtype=torch.float64)
