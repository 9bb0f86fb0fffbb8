"""What a metric is: a function of the weights and of what a pass over text left behind, unit by unit.

A metric never communicates and knows nothing of ranks: weights come to it as blocks of whole role tensors, statistics as
full sums. The runner (``importance/scoring.py``) adds up over tensors and ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from megatron_prune.arch.tensors import TensorId
from megatron_prune.importance.statistics import Statistics
from megatron_prune.registry import Registry

METRICS: Registry[type[Metric]] = Registry("metric", "megatron_prune.importance.metrics")


class Metric(ABC):
    """Scores units in two moves: a sum that ranks and tensors add to, and a function of the finished sum.

    Attributes:
        needs: what must have been collected: ``"activations"`` (a forward pass), ``"gradients"`` (forward and backward
            passes of the whole model) or ``"losses"`` (a forward pass for every layer taken out).
        moments: axis → the site (``statistics.SITES``) whose second moments, or the tokens, it reads to score that axis.
        axes: the axes it can score.
        reads_weights: whether :meth:`per_weight` is called at all.
        block_wise: whether it judges consecutive layers as a whole (:meth:`block_scores`).
        signed: whether a score can be below zero.

    Args:
        seed: for metrics that draw.
        statistics: what was collected; ``None`` where nothing is needed.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    moments: ClassVar[dict[str, str]] = {}
    axes: ClassVar[frozenset[str]] = frozenset({"hidden", "ffn", "head", "kv_head", "layer"})
    reads_weights: ClassVar[bool] = False
    block_wise: ClassVar[bool] = False
    signed: ClassVar[bool] = False

    def __init__(self, *, seed: int = 0, statistics: Statistics | None = None):
        self.seed, self.statistics = seed, statistics

    def per_weight(self, axis: str, tensor: TensorId, weight: Tensor, cols: range) -> Tensor:
        """What every weight of a block contributes to the unit of ``axis`` that owns it.

        Args:
            tensor: the role tensor the block is from.
            weight: whole rows of units, [rows] or [rows, cols].
            cols: which columns of the role tensor these are.

        Returns:
            The same shape as ``weight``, floating point.
        """
        raise NotImplementedError

    @abstractmethod
    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        """Scores from finished sums.

        Args:
            total: float64 [units], full (zeros if :attr:`reads_weights` is false).

        Returns:
            float64 [units]; larger is more important.
        """

    def block_scores(self, count: int) -> Tensor:
        """Importance of every ``count`` consecutive layers as a whole, float64 [layers - count + 1] by first layer."""
        raise NotImplementedError


class GradientMetric(Metric):
    """A metric of gradients, summed while the backward passes run (``importance/gradients.py``).

    Attributes:
        sums: which sums over samples it asks for. Of the gradient g of a sample's loss (the mean over its tokens), for
            every weight: ``"total"`` (Σ g), ``"squares"`` (Σ g²), ``"magnitudes"`` (Σ \\|g\\|). For every channel and head
            instead of weights: ``"gates"``, which are scores by themselves (``metrics/fisher.py``).
    """

    needs = frozenset({"gradients"})
    sums: ClassVar[frozenset[str]]
    name: ClassVar[str]

    def per_gradient(self, weight: Tensor, sums: dict[str, Tensor], samples: float) -> Tensor:
        """What every weight contributes to the unit that owns it; not called for ``"gates"``.

        Args:
            weight: float32, any shape.
            sums: :attr:`sums`, float32, of the same shape, over all samples.
            samples: their number (sum of their weights).
        """
        raise NotImplementedError

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        return self.statistics.gradient(self.name, axis, layer)
