"""What a block costs the model at every size: the loss of the whole model with that block alone cut and fitted, measured at a
few sizes (``pruning/costs.py``) and read between them.

What a local error says of a block is another thing, and allocated worse than all layers alike in first trials. Costs of
feed-forward blocks add up over layers, those of attention do not: each is scaled, level by level, by what a cut of all layers
together to that level loses over the sum of what they lose one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, NamedTuple

import numpy as np

from megatron_prune.arch.blocks.block import BlockKind
from megatron_prune.arch.model import ModelConfig

SHARES = (0.75, 0.5, 0.25)
"""Of a block's units along an axis: where it is measured. Besides it is measured left out."""


class Level(NamedTuple):
    """A share of the units along an axis that stays; 0 leaves the block out."""

    axis: str
    share: float


def levels(kind: BlockKind) -> tuple[Level, ...]:
    """Where a kind of block is measured; leaving it out is the end of its coarsest axis."""
    ends = {axis: (0.0,) if axis == kind.axes[-1] else () for axis in kind.axes}
    return tuple(Level(axis, share) for axis in kind.axes for share in (*SHARES, *ends[axis]))


def whole(kind: BlockKind, config: ModelConfig) -> dict[str, int]:
    """Units along the axes of a layer's block."""
    return {axis: config.units(axis) for axis in kind.axes}


def sizes_at(level: Level, kind: BlockKind, config: ModelConfig) -> dict[str, int]:
    """Units along the axes of a block that stay at a level; at least one, but at share 0.

    Args:
        config: of the layer.
    """
    kept = whole(kind, config)
    counted = _counted(level.axis, kept)
    some = max(1, round(level.share * counted)) if level.share else 0
    if level.axis == "head":
        return {**kept, "head": some * kept["kv_head"]}
    if level.axis == "kv_head":
        return {**kept, "kv_head": some, "head": some * config.heads_per_group}
    return {**kept, level.axis: some}


def _counted(axis: str, kept: dict[str, int]) -> int:
    """Units along an axis as costs are read by them: query heads count within their KV group."""
    return kept[axis] // max(1, kept["kv_head"]) if axis == "head" else kept[axis]


@dataclass(frozen=True, kw_only=True, eq=False)
class Costs:
    """Mean next-token losses on the probe text, in nats.

    Attributes:
        config: of the model.
        dense: of the whole model.
        alone: name of a kind of block → [layers, levels], with that layer's block alone cut and fitted; NaN where it has none.
        together: the same with all layers' blocks at a level, [levels]; NaN where that cuts nothing.
    """

    config: ModelConfig
    dense: float
    alone: Mapping[str, np.ndarray]
    together: Mapping[str, np.ndarray]

    def of(self, layer: int, kind: BlockKind, kept: dict[str, int]) -> float:
        """What a layer's block adds to the loss where ``kept`` units stay along its axes (all 0: it is left out).

        Linear between the sizes that were measured; a larger size never costs more. Along several axes at once: the sum.
        """
        if not any(kept.values()):
            return float(self._curve(layer, kind, kind.axes[-1])[1][0])
        curves = ((_counted(axis, kept), *self._curve(layer, kind, axis)) for axis in kind.axes)
        return float(sum(np.interp(units, sizes, losses) for units, sizes, losses in curves))

    def _curve(self, layer: int, kind: BlockKind, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """Units, ascending, and the scaled loss that each adds."""
        config, scale = self.config.of_layer(layer), self.scale(kind)
        found = {_counted(axis, whole(kind, config)): 0.0}
        for number, level in enumerate(levels(kind)):
            if level.axis == axis or not level.share:  # without units along any axis the block is left out
                added = max(0.0, float(self.alone[kind.name][layer, number]) - self.dense)
                found.setdefault(_counted(axis, sizes_at(level, kind, config)), added * float(scale[number]))
        sizes = sorted(found, reverse=True)
        losses = np.maximum.accumulate([found[size] for size in sizes])
        return np.array(sizes[::-1], dtype=float), losses[::-1]

    def scale(self, kind: BlockKind) -> np.ndarray:
        """What all layers lose together over the sum of what they lose alone, [levels].

        At least 1, and no less than at a milder level: where nearly everything is lost, losses stop adding up because the model
        knows nothing any more, which says nothing of a few blocks.
        """
        alone = np.nansum(np.maximum(self.alone[kind.name] - self.dense, 0.0), axis=0)
        joint = np.maximum(np.nan_to_num(self.together[kind.name] - self.dense), 0.0)
        ratios = np.divide(joint, alone, out=np.ones_like(joint), where=alone > 0)
        for axis in kind.axes:
            mine = [number for number, level in enumerate(levels(kind)) if level.axis == axis]
            ratios[mine] = np.maximum.accumulate(np.maximum(ratios[mine], 1.0))
        return ratios
