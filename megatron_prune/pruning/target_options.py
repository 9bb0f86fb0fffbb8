"""The options that say what a pruned model is to be: a shape, a budget or a plan, and how units are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_prune.config import option
from megatron_prune.errors import InputError, raise_all
from megatron_prune.importance.metric import metric_named
from megatron_prune.planning.layer_sizes import Sizes, dropped, read_layer_sizes
from megatron_prune.pruning.allocation import AllocationOptions
from megatron_prune.surgery.basis import HIDDEN_METHODS

BEST = {"hidden": "activation", "ffn": "fisher", "head": "obs", "kv_head": "obs", "layer": "fold"}
"""Axis → how units are chosen where nothing else is asked for: what measured best before least squares in first trials
(channels: perplexity 61.2 by ``fisher``, 63.2 by ``activation``, 65.1 by ``obs`` on one protocol)."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions(AllocationOptions):
    """The shape to reach, or a budget to keep to, and how units are chosen; or a plan."""

    hidden_size_remain: int | None = option("residual channels that stay", None)
    ffn_hidden_size_remain: int | None = option("feed-forward channels that stay in every layer", None)
    num_attention_heads_remain: int | None = option("query heads that stay in every layer", None)
    num_query_groups_remain: int | None = option("KV groups that stay in every layer", None)
    num_layers_remain: int | None = option("layers that stay, chosen by the depth metric", None)
    drop_layers: tuple[int, ...] | None = option("layers that go, 0-based, such as 7,13", None)
    drop_attention: tuple[int, ...] | None = option("layers whose attention goes alone, 0-based, such as 3,7", None)
    drop_mlp: tuple[int, ...] | None = option("layers whose feed-forward block goes alone, 0-based", None)
    layer_sizes: str | None = option(
        'JSON file of sizes by layer, such as {"3": {"ffn_hidden_size": 800, "num_query_groups": 2}, "5": {"mlp": "none"}}', None
    )
    uniform: bool = option(
        "turn a plan whose layers differ (--plan) into the shape with layers alike and as many parameters", False
    )
    params: str | None = option("budget: at most this many parameters as stored, such as 90M", None)
    ratio: float | None = option("budget: share of all parameters to remove, such as 0.25", None)
    memory: str | None = option("budget: weights and KV cache of an inference, such as 2GiB", None)
    memory_seq_length: int = option("tokens in the KV cache of --memory", 4096)
    memory_batch: int = option("sequences in the KV cache of --memory", 1)
    search: int = option(
        "within a budget, re-fit this many of the shapes that look best and keep what loses least on held-out text", 1
    )
    multiple_of: str | None = option("sizes are multiples of these, such as hidden=64,ffn=128", None)
    metric: str | None = option(
        "how units are scored: random, magnitude, activation, wanda, taylor …, with parameters where it has any, as in "
        "obs:damping=0.1 (default: what measured best for each axis)",
        None,
    )
    depth_metric: str | None = option(
        "how layers are chosen (default: fold where there is text, angular with --no-refit, else the metric)", None
    )
    hidden_method: str | None = option(
        "how hidden units are cut (default: rotate where there is text, what stays is re-fitted and the model allows it, else select)",
        None,
        choices=HIDDEN_METHODS,
    )
    untie: bool = option("store the head of a tied model as a matrix of its own", False)
    plan: str | None = option("apply this plan instead of making one", None)
    vocab_plan: str | None = option("keep the tokens of this plan (of megatron-prune vocab select) alone", None)

    SIZES: ClassVar[tuple[str, ...]] = (
        "hidden_size_remain",
        "ffn_hidden_size_remain",
        "num_attention_heads_remain",
        "num_query_groups_remain",
        "num_layers_remain",
        "drop_layers",
    )
    BY_LAYER: ClassVar[tuple[str, ...]] = ("drop_attention", "drop_mlp", "layer_sizes")


def metrics_of(options: TargetOptions, *, has_text: bool, held: list[str] | None = None, refit: bool = True) -> dict[str, str]:
    """Axis → metric: as asked for, else the best (of those whose scores are ``held``, where scores were named).

    Args:
        refit: whether what stays is re-fitted; ``fold`` judges layers by what that leaves.

    Raises:
        InputError: if there is no such metric, or it takes no such parameters.
    """
    chosen = {axis: options.metric or _best(axis, held) for axis in BEST}
    if has_text and not (options.metric and metric_named(options.metric).block_wise):
        chosen["layer"] = _best("layer", held) if refit else "angular"
    chosen["layer"] = options.depth_metric or chosen["layer"]
    return {axis: metric_named(name).spelling for axis, name in chosen.items()}


def _best(axis: str, held: list[str] | None) -> str:
    able = [name for name in held or () if axis in metric_named(name).axes]
    return min(able or [BEST[axis]], key=lambda name: (name != BEST[axis], metric_named(name).name != BEST[axis]))


def by_layer(options: TargetOptions) -> Sizes:
    """Sizes of single layers.

    Raises:
        InputError: if two options say the same layer's.
    """
    parts = [
        dropped(options.drop_attention, "attention", "--drop_attention"),
        dropped(options.drop_mlp, "mlp", "--drop_mlp"),
        read_layer_sizes(Path(options.layer_sizes)) if options.layer_sizes else {},
    ]
    found: Sizes = {}
    for part in parts:
        twice = sorted({layer for axis, layer in part if (axis, layer) in found})
        raise_all(InputError, "sizes by layer", [f"layer {layer} is named by two options" for layer in twice])
        found |= part
    return found


def vocab_alone(options: TargetOptions) -> bool:
    """Whether nothing but the vocabulary is to be cut."""
    others = (*TargetOptions.SIZES, *TargetOptions.BY_LAYER, "params", "ratio", "memory", "plan")
    return bool(options.vocab_plan) and not options.untie and all(getattr(options, name) is None for name in others)
