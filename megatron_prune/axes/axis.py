"""What an axis is: its units, the tensor elements a unit owns, and how units spread over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

from megatron_prune.arch.model import FIELDS, ModelConfig
from megatron_prune.registry import Registry

AXES: Registry[Axis] = Registry("axis", "megatron_prune.axes")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One prunable direction. What takes a ``config`` takes that of a layer (:meth:`ModelConfig.of_layer`), or of a model whose
    layers are alike; of an axis that is not chosen by layer any model's.

    Attributes:
        name: its name in plans and scores.
        per_layer: units are chosen layer by layer (else once for the model).
        sharded: tensor-parallel ranks hold different units (else every rank holds them all).
        owns: space → the part of it that one unit owns is this many elements. A space that is named by more than one axis is
            cut by each.
        dealt_as: the axis whose units ranks share out, where whole units of that one stay together.
    """

    name: str
    per_layer: bool
    sharded: bool
    owns: Callable[[ModelConfig], dict[str, int]]
    dealt_as: str = ""

    @property
    def field(self) -> str:
        """The field of :class:`ModelConfig` that counts its units."""
        return FIELDS[self.name]

    def count(self, config: ModelConfig) -> int:
        """Units of this axis in a model (in each layer, where they are chosen by layer)."""
        return config.units(self.name)

    def places(self, config: ModelConfig) -> list[int | None]:
        """Where units are chosen: every layer that has any, or (``None``) once."""
        if not self.per_layer:
            return [None]
        return [layer for layer in range(config.num_layers) if self.count(config.of_layer(layer))]

    def owned(self, config: ModelConfig, layer: int | None) -> dict[str, int]:
        """``owns`` in a layer of any model; of an axis that is chosen by layer nothing outside of them (``None``)."""
        return {} if layer is None and self.per_layer else self.owns(config.of_layer(layer))

    def local_units(self, config: ModelConfig, rank: int, ranks: int) -> range:
        """Global ids of the units that tensor-parallel ``rank`` of ``ranks`` holds: consecutive, as even as can be.

        Exactly Megatron's shares where the units divide; query heads follow their KV group.
        """
        if not self.sharded:
            return range(self.count(config))
        whole = config.units(self.dealt_as or self.name)
        each = self.count(config) // whole if whole else 0
        return range(rank * whole // ranks * each, (rank + 1) * whole // ranks * each)


def layer_axes() -> tuple[str, ...]:
    """Names of the axes whose units are chosen, and may be counted, layer by layer; one that is dealt out with another after it."""
    found = [name for name in AXES.names() if AXES.get(name).per_layer]
    return tuple(sorted(found, key=lambda name: bool(AXES.get(name).dealt_as)))
