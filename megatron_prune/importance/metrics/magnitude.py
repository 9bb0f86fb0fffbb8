"""L2 norm of all the weights a unit owns.

Weight magnitude is the saliency of Han et al. 2015 (arXiv 1506.02626); the norm over a whole coupled group is that of
Li et al. 2017 (arXiv 1608.08710) as Fang et al. 2023 (DepGraph, arXiv 2301.12900) extend it:
``s_u = sqrt(sum of w² over every weight of every tensor that unit u owns)``. Squares and sums are float64.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prune.arch.tensors import TensorId
from megatron_prune.importance.metric import METRICS, Metric


@METRICS.register("magnitude")
class Magnitude(Metric):
    """Group L2 norm."""

    reads_weights = True

    def per_weight(self, axis: str, tensor: TensorId, weight: Tensor, cols: range) -> Tensor:
        return weight.double().square_()

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        return total.sqrt()
