"""What the loss would change to second order, the Hessian's diagonal taken from per-sample gradients.

``s_u = sum over the unit's weights of |w · ḡ| + ½ · w² · mean over samples of g_n²``, ḡ the mean of the g_n, g_n the
gradient of sample n's own loss (the mean over its tokens, not divided by the number of samples). The mean of squares is
the empirical Fisher diagonal, LLM-Pruner's approximation of the Hessian (Ma et al. 2023, arXiv 2305.11627). Squares are of
each sample's gradient, in float32: the square of a sum over samples is another thing, and squares in float16 vanish
below 1.7e-4.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prune.importance.metric import METRICS, GradientMetric


@METRICS.register("taylor_2nd")
class Taylor2nd(GradientMetric):
    """Second-order Taylor expansion."""

    sums = frozenset({"total", "squares"})

    def per_gradient(self, weight: Tensor, sums: dict[str, Tensor], samples: float) -> Tensor:
        first = (weight * sums["total"]).abs_()
        return first.add_(weight.square() * sums["squares"], alpha=0.5).div_(samples)
