"""Whole units: what each owns of the tensors of its block, for metrics that see all of it at once (:meth:`Metric.per_unit`).

A metric sees the same number of units whenever it is called for an axis of a layer, however many a rank holds: what it
computes of one then takes the same course at every layout, to the last bit.
"""

from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor

from megatron_prune.arch.blocks.block import BlockKind, spaces
from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.arch.tensors import TensorId
from megatron_prune.axes.axis import AXES
from megatron_prune.checkpoint.tensor_map import TensorMap
from megatron_prune.errors import InputError
from megatron_prune.importance.metric import Metric, Part

TOGETHER_ELEMENTS = 1 << 20
"""Weights that a metric sees together, unless one unit has more."""
CHUNK_ELEMENTS = 1 << 23
"""Weights that are read together."""


def owned_dims(axis: str, kind: BlockKind, config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Role → (the dimension that units of an axis share out, elements of one unit), of the tensors of a layer's block."""
    owns = AXES.get(axis).owns(config)
    labels = ((role.name, dim, space) for role in config.roles(kind) for dim, space in enumerate(role.spaces))
    return {role: (dim, owns[space]) for role, dim, space in labels if space in owns}


def by_unit(block: Tensor, dim: int, each: int) -> Tensor:
    """[units, elements of a unit, others] of a block of whole units."""
    return block.movedim(dim, 0).unflatten(0, (-1, each))


def together(axis: str, kind: BlockKind, config: ModelConfig) -> int:
    """How many units a metric sees at once: a power of two, the same at every layout."""
    sizes = (
        each * (config.size("hidden") if len(spaces(role)) > 1 else 1)
        for role, (_, each) in owned_dims(axis, kind, config).items()
    )
    return 1 << max(0, (TOGETHER_ELEMENTS // sum(sizes)).bit_length() - 1)


def unit_values(metric: Metric, axis: str, layer: int, parts: dict[str, Part], samples: float, config: ModelConfig) -> Tensor:
    """What a metric says of consecutive units, float64 [units]; the last of them repeats to fill a call.

    Args:
        config: of the layer.
    """
    units = len(next(iter(parts.values())).weight)
    count = together(axis, config.block_of(axis), config)
    values = []
    for start in range(0, units, count):
        places = torch.arange(start, start + count).clamp(max=units - 1)
        pick = lambda value: value[places.to(value.device)]
        chosen = {
            role: Part(pick(part.weight), {name: pick(value) for name, value in part.sums.items()})
            for role, part in parts.items()
        }
        found = metric.per_unit(axis, layer, chosen, samples)
        if found.shape != (count,):
            raise TypeError(f"{metric.spelling}: per_unit returned {tuple(found.shape)} for {count} units")
        values.append(found[: units - start].double())
    return torch.cat(values)


def check_shared(metric: Metric, config: ModelConfig, layout: ParallelLayout) -> None:
    """Refuse a metric that sees whole units with their gradients where ranks share a unit, each with a part of its gradient.

    Raises:
        InputError: naming the metric, the units and the layer.
    """
    if not (metric.reads_units and "gradients" in metric.needs):
        return
    for layer in range(config.num_layers):
        here = config.of_layer(layer)
        for axis in (axis for kind in here.kinds for axis in kind.axes if axis in metric.axes):
            dealt = AXES.get(axis).dealt_as or axis
            if (units := here.units(dealt)) % layout.tensor:
                raise InputError(
                    f"metric {metric.spelling} looks at whole units and their gradients, which {layout.tensor} ranks share",
                    got=f"{units} units of {dealt} in layer {layer}",
                    needed="a multiple of the tensor-parallel size",
                    do="measure with a smaller --tensor-model-parallel-size, or use another metric",
                )


def stored_units(tensors: TensorMap, axis: str, layer: int, units: range) -> Iterator[tuple[range, dict[str, Part]]]:
    """Some units of a layer at a time, as a checkpoint holds them."""
    config = tensors.config.of_layer(layer)
    kind = config.block_of(axis)
    owned = owned_dims(axis, kind, config)
    whole = sum(torch.Size(map(config.size, spaces(role))).numel() for role in owned) // AXES.get(axis).count(config)
    count = together(axis, kind, config)
    step = count * max(1, CHUNK_ELEMENTS // (count * whole))
    for start in range(units.start, units.stop, step):
        some = range(start, min(start + step, units.stop))
        yield some, {role: Part(_stored(tensors, TensorId(role, layer), some, *place)) for role, place in owned.items()}


def _stored(tensors: TensorMap, tensor: TensorId, units: range, dim: int, each: int) -> Tensor:
    ranges = [range(size) for size in tensors.shape(tensor)]
    ranges[dim] = range(units.start * each, units.stop * each)
    return by_unit(tensors.read_block(tensor, *ranges).float(), dim, each)
