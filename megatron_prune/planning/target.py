"""The requested shape, completed and checked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Mapping

from megatron_prune.arch.blocks.block import BLOCKS
from megatron_prune.arch.model import FIELDS, ModelConfig
from megatron_prune.arch.sharding import ParallelLayout
from megatron_prune.axes.axis import AXES, layer_axes
from megatron_prune.errors import InputError, raise_all
from megatron_prune.planning.layer_sizes import Sizes, completed, paired

HIDDEN_METHODS = ["rotate", "select"]
"""How residual channels are cut: after a rotation of the stream, or as they are."""

NO_ROTATION = "a model with a norm after its blocks: its weight stands between what writes to the stream and the stream"
"""Why no rotation of such a stream is exact: diag(g) after the division by the root mean square does not commute with it."""

PRUNE_TYPES = ["balance", "global", "unbalance"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The shape to reach.

    Attributes:
        config: the model after pruning; where layers differ in numerics, those of the first ones stand for those that will stay.
        drop_layers: layers named to go, ascending; ``None`` where scores choose them.
        by_layer: (axis, layer before pruning) → units of every layer that stays, where the request tells layers apart; 0 drops
            the block.
    """

    config: ModelConfig
    drop_layers: tuple[int, ...] | None = None
    by_layer: Mapping[tuple[str, int], int] = field(default_factory=dict)

    def units(self, axis: str, layer: int, config: ModelConfig) -> int:
        """Units that stay in a layer, if it stays.

        Args:
            layer: its number before pruning.
            config: of the model before pruning.
        """
        if (axis, layer) in self.by_layer:
            return self.by_layer[axis, layer]
        return config.of_layer(layer).units(axis) if FIELDS[axis] in config.differing else self.config.units(axis)


def resolve_target(
    config: ModelConfig,
    *,
    hidden_size: int | None = None,
    ffn_hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    num_query_groups: int | None = None,
    num_layers: int | None = None,
    drop_layers: tuple[int, ...] | None = None,
    by_layer: Sizes | None = None,
) -> Target:
    """Complete a request from the model's own shape (``None``: as it is) and check it.

    Query heads and KV groups complete each other (:func:`layer_sizes.paired`). A layer that loses all its blocks goes.

    Args:
        by_layer: sizes of single layers, before those for all.

    Raises:
        InputError: naming every size that is not positive, larger than the model's, or does not divide; the layers, where
            these differ and one size for all is asked for.
    """
    problems = []
    asked = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_query_groups": num_query_groups,
        "num_layers": num_layers,
    }
    for name, value in asked.items():
        if value is not None and value < 1:
            problems.append(f"{name}_remain {value} is not a positive number")
        elif value is not None and value > config.uniform(name):
            problems.append(f"{name}_remain {value} is larger than the model's {config.uniform(name)}")
    problems += _layer_problems(config, drop_layers, num_layers)
    raise_all(InputError, "the requested shape does not fit the model", problems)
    by_layer = completed(by_layer or {}, config, drop_layers or ())
    if by_layer and num_layers is not None and drop_layers is None and num_layers < config.num_layers:
        raise InputError("sizes by layer, and layers that scores choose", do="name the layers that go with --drop-layers")
    drop_layers = tuple(drop_layers or ()) + _emptied(config, by_layer) or None
    if len(drop_layers or ()) == config.num_layers:
        raise InputError("the request empties every block of the model", needed="at least one block that stays")
    layers = num_layers or config.num_layers - len(drop_layers or ())
    named = tuple(sorted(drop_layers)) if drop_layers else (() if layers == config.num_layers else None)
    kept = range(layers) if named is None else [layer for layer in range(config.num_layers) if layer not in named]
    asked = {"hidden_size": hidden_size, "ffn_hidden_size": ffn_hidden_size}
    if num_attention_heads or num_query_groups:
        heads, groups = _heads_and_groups(config, num_attention_heads, num_query_groups)
        asked |= {"num_attention_heads": heads, "num_query_groups": groups}
    target = Target(
        config=replace(config.of_layers(kept), **{name: size for name, size in asked.items() if size}),
        drop_layers=named,
        by_layer=by_layer,
    )
    if not by_layer:
        return target
    whole = {(axis, layer): target.units(axis, layer, config) for axis in layer_axes() for layer in kept}
    sizes = {AXES.get(axis).field: tuple(whole[axis, layer] for layer in kept) for axis in layer_axes()}
    return replace(target, config=replace(target.config, **sizes), by_layer=whole)


def check_kinds(config: ModelConfig, new: ModelConfig) -> None:
    """Refuse a shape in which no layer has attention, or none a feed-forward block: no class and no argument says that.

    Raises:
        InputError: naming the half.
    """
    for kind in map(BLOCKS.get, config.blocks):
        if not any(new.of_layer(layer).units(kind.axes[0]) for layer in range(new.num_layers)):
            raise InputError(f"no layer keeps its {kind.half}", needed="one layer that does")


def _emptied(config: ModelConfig, by_layer: Sizes) -> tuple[int, ...]:
    """Layers that lose every block that they have."""
    axes = lambda layer: [kind.axes[0] for kind in config.of_layer(layer).kinds]
    return tuple(n for n in range(config.num_layers) if axes(n) and all(by_layer.get((axis, n)) == 0 for axis in axes(n)))


def _layer_problems(config: ModelConfig, drop: tuple[int, ...] | None, remain: int | None) -> list[str]:
    drop = drop or ()
    problems = [
        f"drop_layers names layer {layer}, needed 0 to {config.num_layers - 1}"
        for layer in drop
        if not 0 <= layer < config.num_layers
    ]
    problems += [f"drop_layers names layer {layer} twice" for layer in sorted(set(drop)) if drop.count(layer) > 1]
    if drop and len(set(drop)) >= config.num_layers:
        problems.append("drop_layers leaves no layer")
    if drop and remain is not None and config.num_layers - len(drop) != remain:
        problems.append(f"num_layers_remain {remain} and drop_layers, which leaves {config.num_layers - len(drop)}, disagree")
    return problems


def _heads_and_groups(config: ModelConfig, heads: int | None, groups: int | None) -> tuple[int, int]:
    if both := paired(config, heads, groups):
        return both
    legal = [h for h in range(1, config.units("head") + 1) if paired(config, h, groups)]
    raise InputError(
        f"num_attention_heads_remain {heads}" + (f" with num_query_groups_remain {groups}" if groups else ""),
        got=f"a model with {config.units('head')} heads in {config.units('kv_head')} KV groups",
        needed="the same number of query heads (1 to "
        f"{config.heads_per_group}) in each of the KV groups that stay: {legal} heads"
        + (f" for {groups} groups" if groups else ""),
    )


def check_parallel(old: ModelConfig, new: ModelConfig, layout: ParallelLayout, prune_type: str) -> None:
    """Refuse a shape whose layers are alike and that ``prune_type`` cannot reach on this layout.

    Raises:
        InputError: naming what does not divide, and the legal values.
    """
    sizes = {axis: new.units(axis) for axis in layer_axes()}
    _check_divides(_division_problems(old, sizes, layout, prune_type, "{}_remain"), old, new, layout, prune_type)


def check_target(config: ModelConfig, target: Target, layout: ParallelLayout, prune_type: str) -> None:
    """The same of a target, whose layers may differ.

    Raises:
        InputError: naming the layers too.
    """
    if not target.by_layer and config.is_uniform:
        return check_parallel(config, target.config, layout, prune_type)
    problems = []
    for layer in range(config.num_layers):
        if layer not in (target.drop_layers or ()):
            sizes = {axis: target.units(axis, layer, config) for axis in layer_axes()}
            problems += _division_problems(config.of_layer(layer), sizes, layout, prune_type, f"layer {layer}: {{}}")
    _check_divides(problems, config, target.config, layout, prune_type)


def _check_divides(problems: list[str], old: ModelConfig, new: ModelConfig, layout: ParallelLayout, prune_type: str) -> None:
    if new.num_layers % layout.pipeline:
        legal = [n for n in range(1, old.num_layers + 1) if n % layout.pipeline == 0]
        problems.append(f"{new.num_layers} layers do not divide over {layout.pipeline} pipeline stages; legal: {legal}")
    over = f"TP {layout.tensor} × PP {layout.pipeline}"
    raise_all(InputError, f"the requested shape does not divide over {over}", problems)
    if prune_type != "unbalance":
        layout.check(new, "the requested shape")


def _division_problems(old: ModelConfig, sizes: dict[str, int], layout: ParallelLayout, prune_type: str, name: str) -> list[str]:
    """What of a layer does not divide.

    Args:
        old: the layer before pruning.
        sizes: its units after it.
        name: form of what a size is called.
    """
    ranks, problems = layout.tensor, []
    heads_change = any(old.units(axis) != sizes[axis] for axis in ("head", "kv_head"))
    if prune_type != "global" and heads_change and sizes["kv_head"] and old.units("kv_head") % ranks:
        problems.append(
            f"{prune_type}: {old.units('kv_head')} KV groups do not divide over {ranks} ranks, so no rank holds whole "
            "groups; use --prune-type global, or a smaller tensor-parallel size"
        )
    if prune_type == "balance":
        for axis in ("kv_head", "head"):
            problems += _not_divisible(name.format(FIELDS[axis]), sizes[axis], old.units(axis), ranks, heads_change)
    if prune_type in ("balance", "global"):
        changed = sizes["ffn"] != old.units("ffn")
        problems += _not_divisible(name.format(FIELDS["ffn"]), sizes["ffn"], old.units("ffn"), ranks, changed)
    return problems


def _not_divisible(name: str, value: int, largest: int, ranks: int, changed: bool) -> list[str]:
    if not changed or value % ranks == 0:
        return []
    legal = list(range(ranks, largest + 1, ranks))
    shown = str(legal) if len(legal) <= 16 else f"multiples of {ranks} up to {legal[-1]}"
    return [f"{name} {value} does not divide over {ranks} ranks; legal: {shown}"]


def needed_scores(config: ModelConfig, target: Target) -> list[tuple[str, int | None]]:
    """(axis, layer) pairs whose scores a selection will ask for."""
    new, needed = target.config, []
    if new.hidden_size != config.hidden_size:
        needed.append(("hidden", None))
    if target.drop_layers is None:
        needed.append(("layer", None))
    layers = [layer for layer in range(config.num_layers) if layer not in (target.drop_layers or ())]
    for axis in ("ffn", "kv_head"):
        units = lambda layer: target.units(axis, layer, config)
        needed += [(axis, layer) for layer in layers if 0 < units(layer) < AXES.get(axis).count(config.of_layer(layer))]
    return needed + [("head", layer) for layer in layers if _narrows_groups(target, layer, config)]


def _narrows_groups(target: Target, layer: int, config: ModelConfig) -> bool:
    """Whether KV groups of a layer lose query heads."""
    groups = target.units("kv_head", layer, config)
    return bool(groups) and target.units("head", layer, config) // groups != config.of_layer(layer).heads_per_group
