"""What is left of a block of layers when the matrix before it has learnt to do its work (``surgery/refit.py`` folds a cut
block into the ``down`` of the layer before it).

For layers s … s+n−1 and a token t, d_t = x_{s+n} − x_s is what the block adds to the stream and a_t the input of ``down`` in
layer s−1. Ridge regression of d on a, fitted to all tokens but t, leaves r_t; the score is the mean over tokens of
``||r_t||² / ||x_{s+n}||²``. Leaving one out has a closed form, ``r = (K + λI)⁻¹ d / diag((K + λI)⁻¹)`` with K the products of
the tokens' inputs (Allen 1974; Golub, Heath & Wahba 1979), so that some thousand tokens tell how the fold will do on others.
Tokens are weighted by 1 / mean square of x_s: those of massive activation count like any other. A block at the very start
has nothing before it to fold into: all that it adds is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_prune.config import option
from megatron_prune.importance.metric import METRICS, Metric
from megatron_prune.importance.statistics import ROWS

RIDGE = 0.3


@METRICS.register("fold")
class Fold(Metric):
    """Error after folding."""

    @dataclass(frozen=True, kw_only=True)
    class Parameters:
        ridge: float = option("λ as a share of the mean diagonal of the second moment of a", RIDGE, least=1e-3)

    needs = frozenset({"activations"})
    moments = {"layer": ROWS}
    axes = frozenset({"layer"})
    block_wise = True

    def __init__(self, **given):
        super().__init__(**given)
        self._leave_one_out = lru_cache(maxsize=None)(self._leave_one_out)

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        return self.block_scores(1)

    def block_scores(self, count: int) -> Tensor:
        layers = self.statistics.config.num_layers
        return torch.stack([self._left(start, start + count) for start in range(layers - count + 1)])

    def _left(self, start: int, end: int) -> Tensor:
        rows = self.statistics.rows
        after, left = rows(end).stream.double(), (rows(end).stream.double() - rows(start).stream.double())
        if start > 0:
            left = (self._leave_one_out(start - 1) @ left.float()).double()
        weights = rows(start).weights
        return (weights * left.square().mean(dim=1) / self._mean_square(after)).sum() / weights.sum()

    def _mean_square(self, stream: Tensor) -> Tensor:
        """Of every token, float64 [tokens]; at least a norm's epsilon, since an embedding's row may be all zeros."""
        return stream.double().square().mean(dim=1).clamp(min=self.statistics.config.norm_epsilon)

    def _leave_one_out(self, layer: int) -> Tensor:
        """The matrix that takes d to r, float32 [tokens, tokens]."""
        kernel, stream = self.statistics.rows(layer).kernel, self.statistics.rows(layer + 1).stream
        root = (self.statistics.rows(layer).weights / self._mean_square(stream)).sqrt()
        weighted = root[:, None] * kernel.double() * root
        config = self.statistics.config.of_layer(layer)
        damping = self.parameters.ridge * weighted.diagonal().sum() / config.size(config.kinds[-1].inside_space)
        weighted.diagonal().add_(damping.clamp(min=torch.finfo(torch.float64).tiny))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(weighted))
        return (inverse / inverse.diagonal()[:, None] * root / root[:, None]).float()
