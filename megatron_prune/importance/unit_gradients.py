"""Whole units of this rank with their gradients: sample by sample, or once the sums over samples are whole."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_prune.arch.blocks.block import BlockKind
from megatron_prune.arch.tensors import TensorId
from megatron_prune.axes.axis import AXES
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.files.region import close_files
from megatron_prune.importance.gradient_sums import ParameterSums
from megatron_prune.importance.metric import SAMPLE, GradientMetric, Part
from megatron_prune.importance.placed import Placed
from megatron_prune.importance.unit_sums import UnitTotals
from megatron_prune.importance.whole_units import by_unit, owned_dims, unit_values
from megatron_prune.runtime.model import RunningModel

Blocks = dict[tuple[int, BlockKind], list[Placed]]
"""(layer, block) → this rank's parameters of it that units share out."""


def blocks_of(placed: list[Placed], model: RunningModel) -> Blocks:
    """This rank's blocks."""
    found: Blocks = {}
    for part in placed:
        if part.layer is not None and part.tensor.axis:
            kinds = model.config.of_layer(part.layer).kinds
            kind = next(kind for kind in kinds if part.tensor in kind.megatron)
            found.setdefault((part.layer, kind), []).append(part)
    return found


def role_blocks(part: Placed, model: RunningModel, value: Tensor) -> dict[str, Tensor]:
    """Role → the consecutive units of it that are in something shaped as a parameter."""
    pieces: dict[str, list[Tensor]] = {}
    for patch in sorted(part.patches(model), key=lambda patch: patch.row):
        pieces.setdefault(patch.role, []).append(value[patch.stored_row : patch.stored_row + patch.rows])
    return {role: torch.cat(parts) for role, parts in pieces.items()}


def stored_blocks(part: Placed, model: RunningModel, tensors: TensorMap) -> dict[str, Tensor]:
    """The same of the weights as stored, on the parameter's device."""
    places = {}
    for patch in part.patches(model):
        rows = places[patch.role][0] if patch.role in places else range(patch.row, patch.row)
        rows = range(min(rows.start, patch.row), max(rows.stop, patch.row + patch.rows))
        places[patch.role] = rows, range(patch.col, patch.col + patch.cols)
    read = lambda role, place: tensors.read_block(TensorId(role, part.layer), *place).to(part.parameter.device)
    return {role: read(role, place) for role, place in places.items()}


class SampleUnits:
    """What metrics say of this rank's units of one block, sample by sample, summed by the samples' weights.

    Attributes:
        layer: of the block.
        totals: (metric, axis) → float64 [units of this rank].
    """

    def __init__(
        self,
        metrics: list[GradientMetric],
        tensors: TensorMap,
        model: RunningModel,
        layer: int,
        kind: BlockKind,
        parts: list[Placed],
    ):
        self._model, self.layer, self._kind, self._config = model, layer, kind, model.config.of_layer(layer)
        self._asking = [(metric, axis) for metric in metrics for axis in kind.axes if axis in metric.axes]
        self._stored = {role: block for part in parts for role, block in stored_blocks(part, model, tensors).items()}
        close_files()
        self._names = {part.tensor.name for part in parts}
        self._missing, self._gradients = set(self._names), {}
        units = lambda axis: AXES.get(axis).count(self._config) // model.layout.tensor
        device = parts[0].parameter.device
        self.totals = {(m, axis): torch.zeros(units(axis), dtype=torch.float64, device=device) for m, axis in self._asking}

    def take(self, part: Placed, gradient: Tensor, weight: float) -> None:
        """A sample's gradient of one parameter, float32; with the last one of the block the metrics are asked."""
        self._gradients |= role_blocks(part, self._model, gradient)
        self._missing.remove(part.tensor.name)
        if self._missing:
            return
        for metric, axis in self._asking:
            parts = {
                role: Part(by_unit(self._stored[role].float(), *place), {SAMPLE: by_unit(self._gradients[role], *place)})
                for role, place in owned_dims(axis, self._kind, self._config).items()
            }
            values = unit_values(metric, axis, self.layer, parts, 1.0, self._config)
            self.totals[metric, axis].add_(values, alpha=weight)
        self._missing, self._gradients = set(self._names), {}


def add_samples(watched: list[SampleUnits], totals: UnitTotals) -> None:
    """Enter what metrics said sample by sample; that of one copy, since all copies hold the same."""
    if parallel_state.get_data_parallel_rank():
        return
    for units in watched:
        for (metric, axis), mine in units.totals.items():
            _enter(totals, metric, axis, units.layer, mine)


def add_units(
    metrics: list[GradientMetric],
    tensors: TensorMap,
    model: RunningModel,
    sums: list[tuple[Placed, ParameterSums]],
    samples: float,
    totals: UnitTotals,
) -> None:
    """Show metrics the units with finished sums, layers dealt out over the data-parallel copies."""
    copy, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    values = {(part.layer, part.tensor.name): held.values for part, held in sums}
    for (layer, kind), parts in blocks_of([part for part, _ in sums], model).items():
        if layer % copies != copy:
            continue
        config = model.config.of_layer(layer)
        weights = {role: block.float() for part in parts for role, block in stored_blocks(part, model, tensors).items()}
        held: dict[str, dict[str, Tensor]] = {role: {} for role in weights}
        for part in parts:
            for name, value in values[layer, part.tensor.name].items():
                for role, block in role_blocks(part, model, value).items():
                    held[role][name] = block
        for metric in metrics:
            for axis in (axis for axis in kind.axes if axis in metric.axes):
                whole = {
                    role: Part(by_unit(weights[role], *place), {name: by_unit(held[role][name], *place) for name in metric.sums})
                    for role, place in owned_dims(axis, kind, config).items()
                }
                _enter(totals, metric, axis, layer, unit_values(metric, axis, layer, whole, samples, config))
    close_files()


def _enter(totals: UnitTotals, metric: GradientMetric, axis: str, layer: int, mine: Tensor) -> None:
    start = len(mine) * parallel_state.get_tensor_model_parallel_rank()
    totals.of(metric, axis, layer)[start : start + len(mine)] += mine.cpu()
