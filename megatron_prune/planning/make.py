"""Making a plan: units chosen by their scores, to a target."""

from __future__ import annotations

from typing import Any

from megatron_prune.arch.model import ModelConfig
from megatron_prune.axes.axis import AXES, layer_axes
from megatron_prune.planning.plan import LayerPlan, Plan, shape_of, sizes_after
from megatron_prune.planning.selection import Scores, keep_heads, keep_layers, keep_units, shard_counts
from megatron_prune.planning.target import Target


def make_plan(
    config: ModelConfig,
    target: Target,
    scores: Scores,
    *,
    prune_type: str,
    ranks: int,
    made_by: dict[str, Any],
    content_id: str | None,
    rotate: bool = False,
) -> Plan:
    """Choose units by their scores.

    Args:
        scores: for every pair of :func:`selection.needed_scores`; ``("block", n)`` instead of ``("layer", None)`` where
            the n layers that go are one block.
        ranks: tensor-parallel ranks that hold the model.
        rotate: cut hidden units are rotated first; they need no scores.
    """
    new = target.config
    rotated = rotate and new.hidden_size != config.hidden_size
    hidden = None
    if new.hidden_size != config.hidden_size and not rotated:
        hidden = keep_units("hidden", scores["hidden", None], new.hidden_size, config, ranks, prune_type)
    if target.drop_layers is None:
        kept = keep_layers(scores, config.num_layers, new.num_layers)
    else:
        kept = [layer for layer in range(config.num_layers) if layer not in target.drop_layers]
    layers = [_layer_plan(config, layer, target, scores, prune_type=prune_type, ranks=ranks) for layer in kept]
    layers = [
        entry for entry in layers if any(entry.units(axis) != [] for axis in layer_axes())
    ]  # without a block it only hands on
    old = shape_of(config)
    width = {"hidden_size": new.hidden_size}
    return Plan(
        old=old,
        new={**sizes_after(old, None, layers, None), **width},
        hidden=hidden,
        rotated=rotated,
        untied=config.tie_embeddings and not new.tie_embeddings,
        layers=layers,
        made_by=made_by,
        content_id=content_id,
    )


def _layer_plan(model: ModelConfig, layer: int, target: Target, scores: Scores, *, prune_type: str, ranks: int) -> LayerPlan:
    """What stays of a layer that stays."""
    found: dict[str, list[int] | None] = dict.fromkeys(layer_axes())
    sizes, config = {axis: target.units(axis, layer, model) for axis in layer_axes()}, model.of_layer(layer)
    for axis in ("ffn", "kv_head"):
        if sizes[axis] != AXES.get(axis).count(config):
            choose = lambda: keep_units(axis, scores[axis, layer], sizes[axis], config, ranks, prune_type)
            found[axis] = choose() if sizes[axis] else []
    groups = found["kv_head"] if found["kv_head"] is not None else list(range(config.units("kv_head")))
    n, each = config.heads_per_group, sizes["head"] // sizes["kv_head"] if sizes["kv_head"] else 0
    if groups and each != n:
        found["head"] = keep_heads(scores["head", layer], groups, each, config)
    elif found["kv_head"] is not None:
        found["head"] = [group * n + position for group in groups for position in range(n)]
    shards = {}
    if prune_type == "unbalance":
        shards = {axis: shard_counts(axis, found[axis], config, ranks) for axis in ("ffn", "kv_head") if found[axis]}
    return LayerPlan(layer=layer, shards=shards, **found)
