"""What removing a unit costs when all the others may adjust (Optimal Brain Surgeon, Hassibi & Stork 1993).

For a matrix W read from x with second moment H, dropping the columns b and re-fitting the rest by least squares adds
``trace(W_b · ([H⁻¹]_bb)⁻¹ · W_bᵀ)`` to the squared error (as in ZipLM, Kurtic et al. 2023, arXiv 2302.04089). A channel is
one column of ``down``, a head ``head_dim`` columns of ``o``, a KV group those of all its heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_prune.arch.blocks.block import is_writer, kind_of
from megatron_prune.arch.tensors import TensorId
from megatron_prune.axes.axis import AXES
from megatron_prune.config import option
from megatron_prune.errors import InputError
from megatron_prune.importance.metric import METRICS, Metric

DAMPING = 0.01


@METRICS.register("obs")
class Obs(Metric):
    """Error after re-fitting."""

    @dataclass(frozen=True, kw_only=True)
    class Parameters:
        damping: float = option("added to the second moment's diagonal, as a share of its mean", DAMPING, least=1e-6)

    needs = frozenset({"activations"})
    moments = {"ffn": "channels", "head": "context", "kv_head": "context"}
    axes = frozenset({"ffn", "head", "kv_head"})
    reads_weights = True

    def __init__(self, **given):
        super().__init__(**given)
        self._blocks = lru_cache(maxsize=4)(self._blocks)

    def per_weight(self, axis: str, tensor: TensorId, weight: Tensor, cols: range) -> Tensor:
        if not is_writer(tensor.role) or axis not in kind_of(tensor.role).axes:
            return torch.zeros_like(weight)
        blocks = self._blocks(axis, *tensor)
        each = blocks.shape[1]
        mine = blocks[cols.start // each : cols.stop // each]
        weight = weight.double()
        return torch.einsum("rub,ubc->ruc", weight.view(len(weight), -1, each), mine).flatten(1) * weight

    def _blocks(self, axis: str, role: str, layer: int) -> Tensor:
        """([H⁻¹]_bb)⁻¹ of every unit, float64 [units, columns of a unit, the same]."""
        moment = self.statistics.moment(role, layer)
        each = AXES.get(axis).owns(self.statistics.config.of_layer(layer))[kind_of(role).inside_space]
        moment.diagonal().add_(self.parameters.damping * moment.diagonal().mean().clamp(min=1e-30))
        factor, failed = torch.linalg.cholesky_ex(moment)
        if failed:
            raise InputError(
                f"obs: the second moment at the input of {role} in layer {layer} cannot be inverted",
                got=f"damping={self.parameters.damping:g}",
                do=f"damp it more, as in --metric obs:damping={10 * self.parameters.damping:g}",
            )
        inverse = torch.cholesky_inverse(factor)
        units = len(moment) // each
        diagonal = inverse.view(units, each, units, each)[torch.arange(units), :, torch.arange(units)]
        return torch.cholesky_inverse(torch.linalg.cholesky(diagonal))

    def finish(self, axis: str, layer: int | None, total: Tensor) -> Tensor:
        return total
