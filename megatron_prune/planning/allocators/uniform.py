"""All layers keep the same shape: one of the grid (``planning/shapes.py``)."""

from __future__ import annotations

from typing import Sequence

from megatron_prune.arch.model import ModelConfig
from megatron_prune.planning.allocators.allocator import ALLOCATORS, Bounds, Depth
from megatron_prune.planning.costs import Costs
from megatron_prune.planning.target import Target


class Uniform:
    """Takes the shapes of the grid as they are."""

    measures_costs = False

    def alike(self, bounds: Bounds, shapes: Sequence[ModelConfig]) -> tuple[ModelConfig, ...]:
        return tuple(shapes)

    def targets(self, bounds: Bounds, costs: Costs | None, uniform: list[Target], depths: Sequence[Depth] = ()) -> list[Target]:
        return uniform


ALLOCATORS.register("uniform")(Uniform())
