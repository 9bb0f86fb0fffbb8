"""Every layer has sizes of its own, so that the model loses least within the budget, by what each block was measured to cost.

Channels of feed-forward blocks add up well, heads and whole blocks less so (``planning/costs.py``): so there are several
candidates, of which some leave these alone, and one lets some layers go first, where they are alike: as many as promise most.
Shapes with layers alike stand beside them. They are fitted and judged on text: what is chosen is never worse there than the best
of those.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf, lcm
from typing import Iterator, Sequence

import numpy as np

from megatron_prune.arch.blocks.block import BlockKind
from megatron_prune.arch.model import FIELDS, ModelConfig
from megatron_prune.axes.axis import layer_axes
from megatron_prune.errors import InputError
from megatron_prune.planning.allocators.allocator import ALLOCATORS, Bounds, Depth
from megatron_prune.planning.costs import Costs, whole
from megatron_prune.planning.knapsack import choose
from megatron_prune.planning.shapes import axis_step
from megatron_prune.planning.target import Target, check_kinds, check_target, resolve_target

FREEDOMS = ((("ffn",), False), (("ffn",), True), (None, False), (None, True))
"""Of the candidates: (axes that are cut, ``None`` for all that are chosen by layer; whether whole blocks may go)."""

Kept = dict[str, int]
"""Units along the axes of a block that stay; all 0 where it goes."""


class Free:
    """Dynamic programming over blocks and their sizes."""

    measures_costs = True

    def alike(self, bounds: Bounds, shapes: Sequence[ModelConfig]) -> tuple[ModelConfig, ...]:
        shares = lambda shape: (shape.units(axis) / bounds.config.units(axis) for axis in layer_axes())
        return tuple(shape for shape in shapes if all(map(bounds.allow, shares(shape))))

    def targets(self, bounds: Bounds, costs: Costs | None, uniform: list[Target], depths: Sequence[Depth] = ()) -> list[Target]:
        found: list[Target] = []
        for target in [*_freely(bounds, costs), *_shallower(bounds, costs, depths)]:
            if all(target.by_layer != other.by_layer for other in found) and _holds(target, bounds):
                found.append(target)
        if not found and not uniform:
            raise InputError(
                "no sizes by layer meet the budget",
                got=f"at most {bounds.budget.describe(bounds.budget.limit(bounds.config))}",
                do="allow more, a smaller --min-layer-ratio, or smaller multiples",
            )
        return [*found, *uniform]


ALLOCATORS.register("free")(Free())


def _freely(bounds: Bounds, costs: Costs) -> Iterator[Target]:
    """The shape of every freedom that makes use of it."""
    for axes, may_go in FREEDOMS:
        target = allocated(bounds, costs, axes or layer_axes(), may_go=may_go)
        if target is not None and (not may_go or target.drop_layers or not all(target.by_layer.values())):
            yield target


def _shallower(bounds: Bounds, costs: Costs, depths: Sequence[Depth]) -> list[Target]:
    """The shape without the layers of one of ``depths`` that is expected to lose least, if any meets the budget."""
    best, least = None, inf
    for layers, loss in sorted(depths, key=lambda depth: depth.loss):
        if loss >= least:  # whatever is cut besides
            break
        target = allocated(bounds, costs, layer_axes(), may_go=False, gone=layers)
        if target is not None and _holds(target, bounds) and loss + expected_loss(costs, target) < least:
            best, least = target, loss + expected_loss(costs, target)
    return [best] if best else []


def expected_loss(costs: Costs, target: Target) -> float:
    """What the blocks that are cut add to the loss; layers that go are not counted."""
    stay = [layer for layer in range(costs.config.num_layers) if layer not in (target.drop_layers or ())]
    kept = lambda layer, kind: {axis: target.units(axis, layer, costs.config) for axis in kind.axes}
    return sum(costs.of(layer, kind, kept(layer, kind)) for layer in stay for kind in costs.config.of_layer(layer).kinds)


def allocated(bounds: Bounds, costs: Costs, axes: tuple[str, ...], *, may_go: bool, gone: tuple[int, ...] = ()) -> Target | None:
    """The sizes by layer that are expected to lose least; ``None`` if none meet the budget.

    Args:
        axes: along which blocks are cut.
        may_go: whether whole blocks may go.
        gone: layers of which nothing stays.
    """
    config = bounds.config
    blocks = [(layer, kind) for layer in range(config.num_layers) for kind in config.of_layer(layer).kinds]
    options: dict[tuple[ModelConfig, str], tuple[list[Kept], np.ndarray]] = {}
    for layer, kind in blocks:
        of_layer = config.of_layer(layer)
        if (of_layer, kind.name) not in options:
            kept = list(sizes(bounds, of_layer, kind, axes, may_go=may_go))
            spent = [_block_cost(bounds, of_layer, each) for each in kept]
            options[of_layer, kind.name] = kept, np.array(spent, dtype=np.int64)
    nothing = lambda kind: ([dict.fromkeys(kind.axes, 0)], np.zeros(1, dtype=np.int64))
    mine = [nothing(kind) if layer in gone else options[config.of_layer(layer), kind.name] for layer, kind in blocks]
    if not all(kept for kept, _ in mine):
        return None
    losses = [np.array([costs.of(layer, kind, each) for each in kept]) for (layer, kind), (kept, _) in zip(blocks, mine)]
    of_layers = [(config.of_layer(layer), kind) for layer, kind in blocks]
    outside = bounds.budget.cost(config) - sum(_block_cost(bounds, one, whole(kind, one)) for one, kind in of_layers)
    chosen = choose([spent for _, spent in mine], losses, bounds.budget.limit(config) - outside)
    if chosen is None:
        return None
    return _target(config, {block: kept[option] for block, (kept, _), option in zip(blocks, mine, chosen)})


def _target(config: ModelConfig, chosen: dict[tuple[int, BlockKind], Kept]) -> Target | None:
    by_layer = {
        (axis, layer): units
        for (layer, kind), kept in chosen.items()
        for axis, units in kept.items()
        if units != config.of_layer(layer).units(axis)
    }
    try:
        return resolve_target(config, by_layer=by_layer)
    except InputError:  # nothing stays
        return None


def _holds(target: Target, bounds: Bounds) -> bool:
    """Whether ranks can share a shape, and the model's class can say it."""
    try:
        check_target(bounds.config, target, bounds.layout, bounds.prune_type)
        check_kinds(bounds.config, target.config)
        bounds.check(target.config)
    except InputError:
        return False
    return not bounds.unserved(target.config)


def sizes(bounds: Bounds, config: ModelConfig, kind: BlockKind, axes: tuple[str, ...], *, may_go: bool) -> Iterator[Kept]:
    """What may stay of a block: its own size, and smaller multiples that ranks can share, within the limits.

    Args:
        config: of the layer.
    """
    for kept in _combinations(bounds, config, kind, axes):
        shares = [kept[axis] / config.units(axis) for axis in kind.axes if axis in axes]
        if all(map(bounds.allow, shares)) and _divides(bounds, config, kept) and _served(bounds, config, kept):
            yield kept
    stays = bounds.layout.pipeline > 1 and kind == config.kinds[-1]  # else the layers that stay need not divide over the stages
    if may_go and not stays and _served(bounds, config, dict.fromkeys(kind.axes, 0)):
        yield dict.fromkeys(kind.axes, 0)


def _combinations(bounds: Bounds, config: ModelConfig, kind: BlockKind, axes: tuple[str, ...]) -> Iterator[Kept]:
    """Query heads are the same number in every KV group that stays."""
    ranks = {"ffn": 1 if bounds.prune_type == "unbalance" else bounds.layout.tensor}
    ladders = {}
    for axis in kind.axes:
        own = config.units(axis)
        step = lcm(axis_step(axis, own, bounds.multiple_of), ranks.get(axis, 1))
        ladders[axis] = [own, *range((own - 1) // step * step, 0, -step)] if axis in axes else [own]
    if "kv_head" not in kind.axes:
        yield from (dict(zip(ladders, units)) for units in product(*ladders.values()))
        return
    each = range(1, config.heads_per_group + 1) if "head" in axes else [config.heads_per_group]
    for groups, heads in product(ladders["kv_head"], each):
        if groups * heads in ladders["head"] or "head" not in axes:
            yield {"head": groups * heads, "kv_head": groups}


def _divides(bounds: Bounds, config: ModelConfig, kept: Kept) -> bool:
    """Whether ranks can share a layer with a block of that size."""
    one = replace(config, num_layers=1)
    cut = {(axis, 0): units for axis, units in kept.items() if units != config.units(axis)}
    try:
        check_target(one, resolve_target(one, by_layer=cut), replace(bounds.layout, pipeline=1), bounds.prune_type)
    except InputError:
        return False
    return True


def _served(bounds: Bounds, config: ModelConfig, kept: Kept) -> bool:
    """Whether a layer with a block of that size can be served, if the other one stays as it is (and whether it may go, if none does)."""
    if not any(kept.values()) and len(config.kinds) == 1:
        return True
    differing = {FIELDS[axis]: (config.units(axis), units) for axis, units in kept.items()}
    after = replace(config, num_layers=2, **differing).of_layer(1)
    return len(bounds.layer_unserved(after)) <= len(bounds.layer_unserved(config))


def _block_cost(bounds: Bounds, config: ModelConfig, kept: Kept) -> int:
    """What a block adds to the cost of a model, in the budget's unit: that of a second layer which has nothing else."""
    if not any(kept.values()):
        return 0
    units = {FIELDS[axis]: (config.units(axis), kept.get(axis, 0)) for axis in layer_axes()}
    two = replace(config, num_layers=2, **units)
    return bounds.budget.cost(two) - bounds.budget.cost(replace(config, num_layers=1))
