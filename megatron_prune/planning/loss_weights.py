"""What a shape is expected to cost in quality by its sizes alone, and the order of shapes by what they cost."""

from __future__ import annotations

from math import inf, isnan, log
from typing import Callable

from megatron_prune.arch.model import ModelConfig
from megatron_prune.axes.axis import AXES
from megatron_prune.planning.budget import parameters
from megatron_prune.planning.multiples import VARIED

LOSS_WEIGHTS = {"hidden": 2.96, "ffn": 1.16, "head": 0.40, "kv_head": 0.72, "layer": 1.28}
"""Rise of the log perplexity per −log(share that stays). Measured on SmolLM2-135M-Instruct, re-fitted, one axis at a time
(``docs/quality.md``: ffn 1152, hidden 512 tied, 24 layers, 2 of 3 KV groups, 6 of 9 query heads), with even scores. Hidden 512
with ffn 1152 then comes out 8 % too high, 22 layers with ffn 1408 within 1 %."""


def rank_candidates(
    config: ModelConfig, candidates: list[ModelConfig], loss: Callable[[ModelConfig], float]
) -> list[tuple[float, ModelConfig]]:
    """(loss, shape) by loss, ascending; among equals more parameters first, then fewer axes cut. NaN counts as infinite."""
    measured = [(inf if isnan(value := float(loss(shape))) else value, shape) for shape in candidates]
    return sorted(measured, key=lambda pair: (pair[0], -parameters(pair[1]), len(cut_axes(config, pair[1]))))


def cut_axes(config: ModelConfig, new: ModelConfig) -> list[str]:
    """Axes on which ``new``, or a layer of it, is smaller than a model whose layers are alike.

    Query heads that go with their KV group are not cut themselves.
    """
    layers = [new] if new.is_uniform else [new.of_layer(layer) for layer in range(new.num_layers)]
    less = lambda name, layer: units_each(layer, name) < units_each(config, name) and (name != "head" or layer.units(name))
    return [name for name in VARIED if any(less(name, layer) for layer in layers)]


def even_loss(config: ModelConfig) -> Callable[[ModelConfig], float]:
    """A function that tells what a shape costs where every unit counts the same: ``loss_estimate`` at even scores."""

    def loss(target: ModelConfig) -> float:
        shares = ((axis, units_each(target, axis) / units_each(config, axis)) for axis in cut_axes(config, target))
        return sum(LOSS_WEIGHTS[axis] * -log(share) if share > 0 else inf for axis, share in shares)

    return loss


def units_each(config: ModelConfig, axis: str) -> int:
    """Units of an axis; query heads are counted within their KV group."""
    return config.heads_per_group if axis == "head" else AXES.get(axis).count(config)
