"""What an axis is: its units, the tensor elements a unit owns, and how units spread over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import ROLES
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

    def total(self, role: str, values: torch.Tensor, config: ModelConfig) -> torch.Tensor | None:
        """Sum a value per weight over what each unit owns of one tensor.

        Args:
            values: same shape as the role tensor or as a rank's block of whole units of it.

        Returns:
            float64 [units in ``values``], or ``None`` if no unit owns any of this tensor.
        """
        result = None
        for dim, label in enumerate(ROLES[role]):
            each = self.owns(config).get(label)
            if each is not None:
                others = [other for other in range(values.dim()) if other != dim]
                sums = values.sum(dim=others, dtype=torch.float64) if others else values.double()
                sums = sums.view(-1, each).sum(dim=1)
                result = sums if result is None else result + sums
        return result


def axes_by_name() -> dict[str, Axis]:
    """All axes."""
    return {name: AXES.get(name) for name in AXES.names()}
