"""The angle by which n consecutive layers turn the stream (Gromov et al. 2024, arXiv 2403.17887).

``d(l, n) = arccos(cos(x_l, x_{l+n})) / π`` at the last token of a sample, averaged over samples; x_l is the input of layer l.
The n layers with the smallest d go together. One layer alone is d(l, 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_prune.importance.metric import METRICS, Metric


@METRICS.register("angular")
class Angular(Metric):
    """Angular distance over windows of n layers."""

    needs = frozenset({"activations"})
    axes = frozenset({"layer"})
    block_wise = True

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        return self.block_scores(1)

    def block_scores(self, count: int) -> Tensor:
        of, layers = self.statistics.layer, self.statistics.config.num_layers
        ends = [of(number).last.double() for number in (*range(layers), None)]
        cosine = torch.nn.functional.cosine_similarity
        angles = [cosine(ends[at], ends[at + count], dim=-1).clamp(-1.0, 1.0).arccos().mean() for at in range(layers - count + 1)]
        return torch.stack(angles) / math.pi
