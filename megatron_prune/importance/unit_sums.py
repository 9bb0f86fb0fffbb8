"""From values of weights to sums over the units that own them, this rank's part of each.

Units are counted by global id, so a KV group whose rows lie on several ranks gets its parts from each of them, and
replicated tensors (norms) are counted by tensor-parallel rank 0 alone. Parts add up to the same sums at every layout.
"""

from __future__ import annotations

from typing import Iterator

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prune.arch.blocks.block import spaces
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import Patch
from megatron_prune.arch.tensors import TensorId, offset_of
from megatron_prune.axes.axis import AXES
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.files.region import close_files
from megatron_prune.importance.gates import GateSums, owned
from megatron_prune.importance.gradient_sums import ParameterSums
from megatron_prune.importance.metric import GATES, GradientMetric
from megatron_prune.importance.placed import Placed
from megatron_prune.importance.statistics import gradient_key
from megatron_prune.runtime.model import RunningModel


class UnitTotals:
    """Sums over all units, of the gradients of one objective.

    Attributes:
        values: name in ``gradients.safetensors`` → float64 [units].
    """

    def __init__(self, config: ModelConfig, objective: str):
        self.values: dict[str, Tensor] = {}
        self._config, self._objective = config, objective

    def of(self, metric: GradientMetric, axis: str, layer: int | None) -> Tensor:
        """Those of an axis (of a layer), to be added to; zeros at first."""
        key = gradient_key(metric.spelling, self._objective, axis, layer)
        if key not in self.values:
            self.values[key] = torch.zeros(AXES.get(axis).count(self._config.of_layer(layer)), dtype=torch.float64)
        return self.values[key]


CHUNK_ELEMENTS = 1 << 22
"""Weights that are looked at together."""


def add_gates(
    metrics: list[GradientMetric], model: RunningModel, gates: dict[tuple[str, int], GateSums], totals: UnitTotals
) -> None:
    """Enter the sums of gates; those of one copy, since all copies hold the same."""
    if parallel_state.get_data_parallel_rank():
        return
    rank = parallel_state.get_tensor_model_parallel_rank()
    for (finest, layer), gate in gates.items():
        config, mine = model.config.of_layer(layer), gate.total.cpu()
        units, kind = torch.arange(len(mine)) + rank * len(mine), config.block_of(finest)
        for axis in kind.axes:
            each = owned(axis, kind, config) // owned(finest, kind, config)
            for metric in (metric for metric in metrics if axis in metric.axes):
                totals.of(metric, axis, layer).index_add_(0, units // each, mine)


def add_weights(
    metrics: list[GradientMetric],
    tensors: TensorMap,
    model: RunningModel,
    parts: list[tuple[Placed, ParameterSums]],
    samples: float,
    totals: UnitTotals,
) -> None:
    """Apply metrics to this rank's weights and their sums, parameters dealt out over the data-parallel copies."""
    copy, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    for number, (part, sums) in enumerate(parts):
        if number % copies != copy or not (first or part.tensor.axis):
            continue
        for patch in part.patches(model):
            for piece in _pieces(patch):
                _add_piece(metrics, tensors, model.config, part, sums, piece, samples, totals)
    close_files()


def _pieces(patch: Patch) -> Iterator[Patch]:
    """Some rows at a time of a large patch."""
    step = max(1, CHUNK_ELEMENTS // patch.cols)
    for start in range(0, patch.rows, step):
        rows = min(step, patch.rows - start)
        yield patch._replace(stored_row=patch.stored_row + start, row=patch.row + start, rows=rows)


def _add_piece(
    metrics: list[GradientMetric],
    tensors: TensorMap,
    config: ModelConfig,
    part: Placed,
    sums: ParameterSums,
    patch: Patch,
    samples: float,
    totals: UnitTotals,
) -> None:
    rows, cols = range(patch.row, patch.row + patch.rows), range(patch.col, patch.col + patch.cols)
    stored = slice(patch.stored_row, patch.stored_row + patch.rows)
    held = {name: value.view(len(value), -1)[stored] for name, value in sums.values.items()}
    weight = tensors.read_block(TensorId(patch.role, part.layer), rows, cols).reshape(len(rows), len(cols))
    weight = weight.to(part.parameter.device, torch.float32) + offset_of(patch.role, tensors.config)
    for metric in metrics:
        values = metric.per_gradient(weight, {name: held[name] for name in metric.sums - {GATES}}, samples)
        lines = [values.sum(dim=1, dtype=torch.float64).cpu(), values.sum(dim=0, dtype=torch.float64).cpu()]
        if "layer" in metric.axes and part.layer is not None:
            totals.of(metric, "layer", None)[part.layer] += lines[0].sum()
        for space, places, line in zip(spaces(patch.role), (rows, cols), lines):
            for name in metric.axes - {"layer"}:
                axis = AXES.get(name)
                each = axis.owned(config, part.layer).get(space)
                if each is not None:
                    units = torch.arange(places.start, places.stop) // each
                    layer = part.layer if axis.per_layer else None
                    totals.of(metric, name, layer).index_add_(0, units, line)
