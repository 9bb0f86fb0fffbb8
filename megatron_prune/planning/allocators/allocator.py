"""What an allocator is: from what a budget leaves room for, to the shapes that are fitted and compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, NamedTuple, Protocol, Sequence

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.planning.budget import Budget
from megatron_prune.planning.costs import Costs
from megatron_prune.planning.target import Target
from megatron_prune.registry import Registry

ALLOCATORS: Registry[Allocator] = Registry("allocator", "megatron_prune.planning.allocators")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What shapes within a budget have to keep to.

    Attributes:
        config: the model before pruning (its head untied, if it is to be).
        multiple_of: axis → step of its sizes (``multiples.py``).
        layout, prune_type: how ranks share the model; every layer of every shape divides over them.
        check: refuses a shape that the model's class cannot say, with :class:`InputError`.
        unserved, layer_unserved: what of a shape, and of a layer (of a model whose layers differ), cannot be served as was asked.
        least, most: share of a layer's units along an axis that stays at least, and at most, where its block stays.
    """

    config: ModelConfig
    budget: Budget
    multiple_of: dict[str, int]
    layout: ParallelLayout
    prune_type: str
    check: Callable[[ModelConfig], None]
    least: float = 0.0
    most: float = 1.0
    unserved: Callable[[ModelConfig], list[str]] = lambda shape: []
    layer_unserved: Callable[[ModelConfig], list[str]] = lambda layer: []

    def allow(self, share: float) -> bool:
        """Whether that share of a layer's units may stay along an axis, where its block stays."""
        return self.least <= share and (share <= self.most or share == 1.0)


class Depth(NamedTuple):
    """Layers that may go before sizes are dealt out, and what the model is expected to lose by it, in nats a token."""

    layers: tuple[int, ...]
    loss: float


class Allocator(Protocol):
    """Deals a budget out to layers.

    Attributes:
        measures_costs: whether it asks what every block costs the model at every size (:class:`Costs`).
    """

    measures_costs: bool

    def alike(self, bounds: Bounds, shapes: Sequence[ModelConfig]) -> tuple[ModelConfig, ...]:
        """Of shapes within the budget whose layers are alike, those that may be compared."""

    def targets(self, bounds: Bounds, costs: Costs | None, uniform: list[Target], depths: Sequence[Depth] = ()) -> list[Target]:
        """The shapes to be fitted and compared, those first that promise most.

        Args:
            costs, depths: where it measures costs.
            uniform: shapes within the budget whose layers are alike, the best first.

        Raises:
            InputError: if there is none.
        """
