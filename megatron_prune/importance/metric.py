"""What a metric is. Methods see a layer through its role tensors, as a rank's own blocks of whole units."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from megatron_prune.registry import Registry

METRICS: Registry[type[Metric]] = Registry("metric", "megatron_prune.importance.metrics")


class Metric(ABC):
    """Scores units in two moves: a sum that ranks and tensors add to, and a function of the finished sum.

    The runner (``importance/scoring.py``) adds the sums of all tensors a unit owns and of all ranks that hold a part of
    it, so a metric never communicates.

    Attributes:
        reads_weights: whether :meth:`per_weight` is called at all.
    """

    reads_weights: bool = True

    def __init__(self, *, seed: int):
        self.seed = seed

    @abstractmethod
    def per_weight(self, role: str, weight: torch.Tensor) -> torch.Tensor:
        """What every weight of a block contributes to the unit that owns it; same shape as ``weight``."""

    @abstractmethod
    def finish(self, axis: str, layer: int | None, total: torch.Tensor) -> torch.Tensor:
        """Scores from finished sums.

        Args:
            total: float64 [units], full (zeros if :attr:`reads_weights` is false).

        Returns:
            float64 [units]; larger is more important.
        """
