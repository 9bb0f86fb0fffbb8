"""How much worse the model predicts without a layer: ``mean loss without layer l - mean loss of the whole``.

The logarithm of the ratio of both perplexities, which orders layers as the difference of perplexities does (removal
importance of the LLaMA Pruning Toolkit, S2; Shortened LLaMA, Kim et al. 2024, arXiv 2402.02834). It may be negative.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prune.importance.metric import METRICS, Metric


@METRICS.register("perplexity")
class Perplexity(Metric):
    """Remove, measure."""

    needs = frozenset({"losses"})
    axes = frozenset({"layer"})
    signed = True

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        losses = self.statistics.losses()
        return losses[:-1] - losses[-1]
