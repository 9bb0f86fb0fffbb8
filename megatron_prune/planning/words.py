"""A cut in words."""

from __future__ import annotations

from megatron_prune.arch.model import ModelConfig
from megatron_prune.arch.tensors import parameter_count
from megatron_prune.axes.axis import AXES
from megatron_prune.planning.multiples import VARIED

CALLED = {
    "hidden": "hidden size",
    "ffn": "feed-forward channels",
    "head": "query heads",
    "kv_head": "KV groups",
    "layer": "layers",
}


def cut_in_words(config: ModelConfig, target: ModelConfig) -> str:
    """``layers 80 → 60, parameters 70,553,706,496 → 53,440,618,496 (-24.3 %)``; sizes that stay are not named."""
    parts = []
    for axis in VARIED:
        old, new = (_sizes(axis, model) for model in (config, target))
        if old != new:
            parts.append(f"{CALLED[axis]} {old} → {new}")
    if config.vocab_size != target.vocab_size:
        parts.append(f"tokens {config.vocab_size:,} → {target.vocab_size:,}")
    before, after = parameter_count(config), parameter_count(target)
    parts.append(f"parameters {before:,} → {after:,} ({after / before - 1:+.1%})")
    return ", ".join(parts)


def _sizes(axis: str, config: ModelConfig) -> str:
    """The units of a layer, or the least and the most of any."""
    if axis == "layer":
        return str(config.num_layers)
    units = [AXES.get(axis).count(config.of_layer(layer)) for layer in range(config.num_layers)]
    return str(units[0]) if len(set(units)) == 1 else f"{min(units)}–{max(units)}"
