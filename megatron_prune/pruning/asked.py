"""What the options of a pruning mean: metrics, sizes by layer, whether text is wanted."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

from megatron_prune.arch.model import ModelConfig
from megatron_prune.config import flag
from megatron_prune.errors import InputError, raise_all
from megatron_prune.planning.amounts import SEQ_LENGTH
from megatron_prune.planning.layer_sizes import Sizes, dropped, read_layer_sizes
from megatron_prune.pruning.metric_facts import metric_facts
from megatron_prune.pruning.options import BEST, QUICK, CalibrationOptions, ChoosingOptions, ShapeOptions, TargetOptions


def metrics_of(options: TargetOptions, *, has_text: bool, held: list[str] | None = None, refit: bool = True) -> dict[str, str]:
    """Axis → metric: as asked for, else the best (of those whose scores are ``held``, where scores were named).

    Args:
        refit: whether what stays is re-fitted; ``fold`` judges layers by what that leaves.

    Raises:
        InputError: if there is no such metric, or it takes no such parameters.
    """
    chosen = {axis: options.metric or _best(axis, held) for axis in BEST}
    if has_text and not (options.metric and metric_facts(options.metric).block_wise):
        chosen["layer"] = _best("layer", held) if refit else "angular"
    chosen["layer"] = options.depth_metric or chosen["layer"]
    return {axis: metric_facts(name).spelling for axis, name in chosen.items()}


def _best(axis: str, held: list[str] | None) -> str:
    able = [name for name in held or () if axis in metric_facts(name).axes]
    return min(able or [BEST[axis]], key=lambda name: (name != BEST[axis], name.partition(":")[0] != BEST[axis]))


def by_layer(options: TargetOptions) -> Sizes:
    """Sizes of single layers.

    Raises:
        InputError: if two options say the same layer's.
    """
    parts = [
        dropped(options.drop_attention, "attention", "--drop-attention"),
        dropped(options.drop_mlp, "mlp", "--drop-mlp"),
        read_layer_sizes(Path(options.layer_sizes)) if options.layer_sizes else {},
    ]
    found: Sizes = {}
    for part in parts:
        twice = sorted({layer for axis, layer in part if (axis, layer) in found})
        raise_all(InputError, "sizes by layer", [f"layer {layer} is named by two options" for layer in twice])
        found |= part
    return found


SHAPE = (*TargetOptions.SIZES, *TargetOptions.BY_LAYER, *TargetOptions.BUDGETS, "plan", "vocab_plan")
"""Options that say what is to stay."""


def names_shape(options: ShapeOptions) -> bool:
    """Whether anything says what is to stay."""
    return options.untie or any(getattr(options, name) is not None for name in SHAPE)


def check_asked(options: TargetOptions) -> None:
    """Refuse a pruning of which nothing says what is to stay; nothing is opened for that.

    Raises:
        InputError: naming the options that say it.
    """
    if names_shape(options) or options.uniform:  # which says itself what it needs
        return
    flags = list(map(flag, SHAPE))
    raise InputError(
        "nothing to prune: no size, budget or plan was named",
        needed=f"one of {', '.join(flags)}",
        do="name a budget, such as --ratio 0.25, or sizes, such as --ffn-hidden-size-remain 1024",
    )


def vocab_alone(options: TargetOptions) -> bool:
    """Whether nothing but the vocabulary is to be cut."""
    others = [name for name in SHAPE if name != "vocab_plan"]
    return bool(options.vocab_plan) and not options.untie and all(getattr(options, name) is None for name in others)


AXES_OF = {
    "hidden_size_remain": ("hidden",),
    "ffn_hidden_size_remain": ("ffn",),
    "num_attention_heads_remain": ("head", "kv_head"),
    "num_query_groups_remain": ("kv_head",),
    "num_layers_remain": ("layer",),
    "layer_sizes": ("ffn", "head", "kv_head"),
    "params": tuple(BEST),
    "ratio": tuple(BEST),
    "memory": tuple(BEST),
    "plan": tuple(BEST),
}
"""Option → axes along which units may have to be chosen for it. Layers and blocks that are named are not chosen."""


def wants_text(options: ChoosingOptions) -> bool:
    """Whether anything is measured: text or scores were named, re-fitting asked for, or a metric needs it: one that may choose
    units, or, where nothing says whether to re-fit, any that would."""
    named = options.data is not None or options.scores is not None or bool(options.refit)
    if (options.plan and not options.uniform) or vocab_alone(options):
        return named
    metrics = metrics_of(options, has_text=False)
    if options.refit is False:
        asked = {axis for name, axes in AXES_OF.items() if getattr(options, name) is not None for axis in axes}
        metrics = {axis: name for axis, name in metrics.items() if axis in asked}
    return named or any(metric_facts(name).needs for name in metrics.values())


def quickened(options: ChoosingOptions, config: ModelConfig, *, text: bool) -> ChoosingOptions:
    """The options with those of ``--quick``, where it was asked for.

    Raises:
        InputError: where no text is read, so that nothing would be quicker.
    """
    if not options.quick:
        return options
    if not text:
        raise InputError("--quick has no effect: no text is read", do="leave it out, or name text with --data")
    names = [name for name in QUICK if options.refit is not False or name in ("nsamples", "seq_length", "metric")]
    if options.scores or options.plan:  # what is chosen is settled
        names.remove("metric")
    quick = {**QUICK, "seq_length": min(QUICK["seq_length"], config.max_position_embeddings)}
    default = {item.name: item.default for item in dataclasses.fields(options)}
    return replace(options, **{name: quick[name] for name in names if getattr(options, name) == default[name]})


def sample_length(options: CalibrationOptions, config: ModelConfig) -> int:
    """Tokens in a sample."""
    return min(SEQ_LENGTH, config.max_position_embeddings) if options.seq_length is None else options.seq_length
