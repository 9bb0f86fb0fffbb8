"""What the loss would change to first order if a unit's weights were zero.

``s_u = sum over the unit's weights of |w · ḡ|``, ḡ the gradient of the mean loss over samples: the element-wise Taylor
score of LLM-Pruner (Ma et al. 2023, arXiv 2305.11627), summed over a coupled group as in the LLaMA Pruning Toolkit (S2).
"""

from __future__ import annotations

from torch import Tensor

from megatron_prune.importance.metric import METRICS, GradientMetric


@METRICS.register("taylor")
class Taylor(GradientMetric):
    """First-order Taylor expansion."""

    sums = frozenset({"total"})

    def per_gradient(self, weight: Tensor, sums: dict[str, Tensor], samples: float) -> Tensor:
        return (weight * sums["total"]).abs_().div_(samples)
