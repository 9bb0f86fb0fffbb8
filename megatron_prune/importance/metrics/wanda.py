"""Weights times the size of what they read (Wanda, Sun et al. 2023, arXiv 2306.11695), summed over a unit's weights.

``s_u = sum over the unit's weights of |w_ij| · ||x_j||₂``, x_j the input feature over all calibration tokens. The paper
scores single weights; the sum over a structure is that of the LLaMA Pruning Toolkit (S2), which uses a mean of absolute
values where the paper, and this, use the L2 norm. Norm weights, biases and the embedding, which read no activations,
count nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prune.arch.tensors import TensorId
from megatron_prune.importance.metric import METRICS, Metric
from megatron_prune.importance.statistics import site_of


@METRICS.register("wanda")
class Wanda(Metric):
    """Sum of |w| · ||x||."""

    needs = frozenset({"activations"})
    reads_weights = True

    def per_weight(self, axis: str, tensor: TensorId, weight: Tensor, cols: range) -> Tensor:
        if site_of(tensor.role) is None:
            return torch.zeros_like(weight)
        norms = self.statistics.site(*tensor).squares.sqrt()
        return weight.double().abs_() * norms[cols.start : cols.stop]

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        return total
