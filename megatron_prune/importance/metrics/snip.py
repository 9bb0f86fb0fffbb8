"""Connection sensitivity (SNIP, Lee et al. 2019, arXiv 1810.02340), sample by sample.

``s_u = sum over the unit's weights of sum over samples of |w · g_n|``, g_n the gradient of sample n's loss. The paper takes
the gradient of one batch; here absolute values are summed over samples, so that gradients of opposite sign do not cancel.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prune.importance.metric import METRICS, GradientMetric


@METRICS.register("snip")
class Snip(GradientMetric):
    """Sum of |w · g| over samples."""

    sums = frozenset({"magnitudes"})

    def per_gradient(self, weight: Tensor, sums: dict[str, Tensor], samples: float) -> Tensor:
        return weight.abs() * sums["magnitudes"]
