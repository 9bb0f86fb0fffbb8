"""Weighted input feature variance (FLAP, An et al. 2023, arXiv 2312.11983, WIFV).

``s_u = sum over the unit's features j of Var(x_j) · ||W[:, j]||²`` at the input of ``down`` (channels) and of ``o`` (heads):
what removing the feature costs when its mean is put in its place. FLAP adds that mean as a bias, which no stock Llama
has; here least squares takes that part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_prune.arch.blocks.block import is_writer
from megatron_prune.arch.tensors import TensorId
from megatron_prune.importance.metric import METRICS, Metric


@METRICS.register("fluctuation")
class Fluctuation(Metric):
    """FLAP's WIFV."""

    needs = frozenset({"activations"})
    axes = frozenset({"ffn", "head", "kv_head"})
    reads_weights = True

    def per_weight(self, axis: str, tensor: TensorId, weight: Tensor, cols: range) -> Tensor:
        if not is_writer(tensor.role):
            return torch.zeros_like(weight)
        site = self.statistics.site(*tensor)
        variance = site.squares / site.tokens - (site.total / site.tokens).square()
        return weight.double().square_() * variance.clamp(min=0.0)[cols.start : cols.stop]

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        return total
