"""What an axis is: its units, the tensor elements a unit owns, and how units spread over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from megatron_prune.arch.model import ModelConfig
from megatron_prune.registry import Registry

AXES: Registry[Axis] = Registry("axis", "megatron_prune.axes")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One prunable direction.

    Attributes:
        name: its name in plans and scores.
        field: the field of :class:`ModelConfig` that counts its units.
        per_layer: units are chosen layer by layer (else once for the model).
        sharded: tensor-parallel ranks hold different units (else every rank holds them all).
        owns: dimension label → consecutive elements of that dimension that belong to one unit.
    """

    name: str
    field: str
    per_layer: bool
    sharded: bool
    owns: Callable[[ModelConfig], dict[str, int]]

    def count(self, config: ModelConfig) -> int:
        """Units of this axis in a model (in each layer, where they are chosen by layer)."""
        return getattr(config, self.field)

    def local_units(self, config: ModelConfig, rank: int, ranks: int) -> range:
        """Global ids of the units that tensor-parallel ``rank`` of ``ranks`` holds: consecutive, as even as can be.

        Exactly Megatron's shares where the units divide; query heads follow their KV group.
        """
        if not self.sharded:
            return range(self.count(config))
        whole = config.num_query_groups if self.name in ("head", "kv_head") else self.count(config)
        each = self.count(config) // whole
        return range(rank * whole // ranks * each, (rank + 1) * whole // ranks * each)
